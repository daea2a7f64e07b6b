"""The same project with parts of lightning_ft, one line each: `python examples/existing_project/with_parts.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as L

sys.path.insert(0, str(Path(__file__).parent))

from project import CausalLM, make_loader

from lightning_ft import AnswerQuality, ExportModel, PairDataModule, TokenMeanAccumulation, TrainableCheckpoint
from lightning_ft.data.resumable_loader import ResumableLoader
from lightning_ft.modules.exact_resume import ExactResume

DATA = "examples/support/data/"


class ResumableLM(ExactResume, CausalLM):
    """The module of the project, which resumes exactly."""


def main() -> None:
    """Train until the answers no longer become better."""
    L.seed_everything(0)
    module = ResumableLM("examples/tiny_base")
    rows = PairDataModule(train=DATA + "train.jsonl", validation=DATA + "validation.jsonl", tokenizer=module.tokenizer)
    rows.load_rows()
    trainer = L.Trainer(
        max_epochs=20,
        accumulate_grad_batches=4,
        default_root_dir="runs/existing_project",
        callbacks=[
            TokenMeanAccumulation(),  # 4 micro-batches of 8 rows give the gradient of one batch of 32
            TrainableCheckpoint(),  # checkpoints of the adapter alone
            AnswerQuality("exact", requests=rows.requests("validation"), max_requests=200, max_new_tokens=12),
            L.callbacks.EarlyStopping("val/quality", mode="max", patience=2),
            ExportModel("runs/existing_project/export", overwrite=True),  # a folder that transformers and PEFT load
        ],
    )
    trainer.fit(module, ResumableLoader(make_loader(module.tokenizer, DATA + "train.jsonl", limit=1000)))


if __name__ == "__main__":
    main()
