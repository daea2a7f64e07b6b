"""Distilling the support prompt, against fine-tuning on the prompted model's own answers, at equal FLOPs.

    python examples/support/distill_compare.py

Quality is the share of the 600 test answers that are right, agreement the share that are those of the prompted model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_ft import PairDataModule, PromptBaseline
from lightning_ft.data.tokenizers import load_tokenizer

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent)]

from distilling import Comparison, Task  # noqa: E402

CONFIG = yaml.safe_load((FOLDER / "distill.yaml").read_text(encoding="utf-8"))


def task() -> Task:
    """The support example with the settings of `distill.yaml`."""
    files: dict[str, Any] = CONFIG["data"]["init_args"]
    settings: dict[str, Any] = CONFIG["model"]["init_args"]
    base, prompt = str(FOLDER.parent / "tiny_base"), PromptBaseline.from_file(FOLDER / "baseline.json")
    rows = PairDataModule(train=files["train"], test=files["test"], tokenizer=load_tokenizer(base))
    rows.load_rows()
    examples = {example["input"] for example in prompt.few_shot}  # not trained on, since the prompt has their answers
    return Task(
        model=base,
        prompt=prompt,
        train=[request for request in rows.requests("train") if request.messages[-1]["content"] not in examples],
        test=rows.requests("test"),
        scorer="exact",
        max_new_tokens=settings["max_new_tokens"],
        epochs=CONFIG["trainer"]["max_epochs"],
        batch_size=files["batch_size"],
        learning_rate=settings["learning_rate"],
        texts=str(FOLDER.parent / "tiny_base" / "general.jsonl"),
    )


def main() -> None:
    """Run both methods with every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/distill_compare.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Comparison(task(), options.output).run(options.seeds)


if __name__ == "__main__":
    main()
