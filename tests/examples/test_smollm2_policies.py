"""The programs that compare policies on the real model and make pairs of its mistakes, on a tiny model."""

import doctest
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_ft import FullFineTuning, LoRAFineTuning

SMOLLM2 = Path(__file__).parents[2] / "examples" / "smollm2"
CITATION = "{n} F.2d 88 (9th Cir. 1978)"


@pytest.fixture
def programs(monkeypatch):
    """Imports a program of the example."""
    monkeypatch.syspath_prepend(str(SMOLLM2))
    yield importlib.import_module
    for name in (
        "policies",
        "scales",
        "legal_preferences",
        "legal_rewards",
        "legal_citation",
        "courts",
        "packages",
        "reporters",
    ):
        sys.modules.pop(name, None)


@pytest.fixture
def rows(tmp_path):
    """A folder with four requests per split."""
    for split in ("train", "validation", "test"):
        lines = [
            {"input": f"{n} F. 2nd 88, Ninth Circuit, 1978", "output": CITATION.format(n=n), "cluster": f"c{n % 2}"}
            for n in range(4)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return tmp_path


@pytest.fixture
def adapters(tmp_path, model_folder):
    """Two exported adapters; the second one answers differently."""
    module = LoRAFineTuning(str(model_folder), dtype="float32")
    module.configure_model()
    folders = [str(module.export(tmp_path / "first"))]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in module.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return [*folders, str(module.export(tmp_path / "second"))]


def run(program, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    program.main()


def configure(program, rows, monkeypatch, folder):
    """Write a domain's configuration and general texts to a folder; returns the path of the texts."""
    data = {split: str(rows / f"{split}.jsonl") for split in ("train", "validation", "test")}
    savings = {"scorer": f"{rows / 'chars.py'}:score", "max_new_tokens": 6}
    # graded by length, so that a tiny model gets different grades for different answers
    (rows / "chars.py").write_text("def score(output, reference):\n    return len(output) % 7 / 7\n", "utf-8")
    config = {"trainer": {"callbacks": [{"init_args": savings}]}, "data": {"init_args": data}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config), "utf-8")
    monkeypatch.setattr(program, "HERE", folder)
    texts = folder / "texts.jsonl"
    texts.write_text('{"text": "The capital of France is Paris."}\n', "utf-8")
    return texts


def test_doctests_of_rewards_pass(programs):
    assert doctest.testmod(programs("legal_rewards")).failed == 0


def test_policies_are_compared_with_the_first(programs, rows, adapters, monkeypatch, tmp_path, model_folder):
    program = programs("policies")
    texts = configure(program, rows, monkeypatch, tmp_path)
    named = [f"{name}={folder}" for name, folder in zip(("first", "second"), adapters, strict=True)]
    output = tmp_path / "out.json"
    run(program, monkeypatch, "tiny", *named, "--threads", 1, "--texts", texts, "--output", output)
    found = json.loads(output.read_text())
    first, second = found["first"], found["second"]
    assert first["gain"]["value"] == first["kl"]["value"] == 0
    assert first["kl_general"]["value"] == pytest.approx(0, abs=1e-6)  # its update is zero
    assert second["gain"]["value"] == pytest.approx(second["quality"]["value"] - first["quality"]["value"])
    assert second["kl"]["value"] > 0
    assert second["kl_general"]["value"] > 0.01


@pytest.mark.parametrize("kind", ["adapter", "all weights"])
def test_scales_lead_from_the_trained_model_to_the_base(
    kind, programs, rows, adapters, monkeypatch, tmp_path, model_folder
):
    program = programs("scales")
    texts = configure(programs("policies"), rows, monkeypatch, tmp_path)
    monkeypatch.setattr(program, "BASE", str(model_folder))
    folder = adapters[1]
    if kind == "all weights":
        whole = FullFineTuning(str(model_folder), dtype="float32")
        whole.configure_model()
        with torch.no_grad():
            for weight in whole.model.parameters():
                weight.mul_(1.1)
        folder = whole.export(tmp_path / "whole")
    output = tmp_path / "scales.json"
    options = ("--scales", 1, 0.5, 0, "--texts", texts, "--requests", 3, "--threads", 1, "--output", output)
    run(program, monkeypatch, "tiny", folder, *options)
    trained, half, base = json.loads(output.read_text())
    assert [found["scale"] for found in (trained, half, base)] == [1, 0.5, 0]
    kl = [found["kl_general"]["value"] for found in (trained, half, base)]
    assert kl[0] > kl[1] > 0.001
    assert kl[2] == pytest.approx(0, abs=1e-6)
    assert base["ppl_ratio"]["value"] == pytest.approx(1, abs=1e-5)
    grades = {round(7 * 3 * found["quality"]["value"], 6) for found in (trained, half, base)}
    assert all(grade == int(grade) for grade in grades)  # sevenths of three answers


def test_pairs_are_right_answers_and_the_models_own_wrong_ones(programs, rows, adapters, monkeypatch, tmp_path, capsys):
    program = programs("legal_preferences")
    monkeypatch.setattr(program, "DATA", rows)
    run(program, monkeypatch, adapters[1], tmp_path / "pairs", "--threads", 1, "--requests", 3, 2, "--samples", 2)
    pairs = [json.loads(line) for line in (tmp_path / "pairs" / "train.jsonl").read_text().splitlines()]
    assert pairs
    right = {f"{n} F. 2nd 88, Ninth Circuit, 1978": CITATION.format(n=n) for n in range(4)}
    assert all(pair["chosen"] == right[pair["prompt"]] != pair["rejected"] for pair in pairs)
    assert len({pair["prompt"] for pair in pairs}) <= 3
    assert f"train: {len(pairs)} pairs of 3 requests" in capsys.readouterr().out
