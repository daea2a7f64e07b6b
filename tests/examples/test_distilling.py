"""The comparison of distillation with fine-tuning on the prompted model's answers."""

import json
from pathlib import Path

import pytest

from lightning_ft import PromptBaseline
from lightning_ft.types import Request


def requests(start, count):
    return [Request(f"r{n}", ({"role": "user", "content": f"Say {n}."},), "") for n in range(start, start + count)]


def test_both_methods_learn_from_requests_alone_at_equal_flops(model_folder, tmp_path):
    from distilling import Comparison, Task

    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "It was a bright cold day in April."}) + "\n", "utf-8")
    graded = []

    def grade(output, reference):
        graded.append(reference)
        return float(len(output) % 2)

    task = Task(
        model=str(model_folder),
        prompt=PromptBaseline("Answer in French."),
        train=requests(0, 8),
        test=requests(8, 4),
        scorer=grade,
        max_new_tokens=4,
        epochs=6,
        batch_size=4,
        learning_rate=1e-3,
        texts=str(texts),
    )
    output = tmp_path / "runs.json"
    comparison = Comparison(task, output)
    comparison.run([0])

    distilled, same_epochs, same_flops = comparison.runs
    assert [run.method for run in comparison.runs] == ["distillation", "its answers", "its answers"]
    assert distilled.epochs == same_epochs.epochs == 6
    assert same_epochs.tflop < distilled.tflop  # the teacher reads the prompt and writes the answers
    assert same_flops.epochs == round(6 * distilled.tflop / same_epochs.tflop)
    assert same_flops.tflop == pytest.approx(distilled.tflop, rel=0.5 / 6 + 0.05)
    assert all(0 <= run.agreement <= 1 and run.kl > 0 for run in comparison.runs)
    assert set(graded) == {""}
    written = json.loads(Path(output).read_text("utf-8"))
    assert written["prompted"] == comparison.prompted.quality
    assert [run["tflop"] for run in written["runs"]] == [run.tflop for run in comparison.runs]
