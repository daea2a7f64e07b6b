"""Measurements and exports that fail on one of two ranks: `python two_ranks_failing.py WHERE MODEL OUT`."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
from ranks import trainer_options
from tiny import make_rows

from lightning_ft import ComputeMeter, ExportModel, LoRAFineTuning, PairDataModule, PromptBaseline, Retention
from lightning_ft import TokenSavings as Savings
from lightning_ft._lightning import Callback, Trainer
from lightning_ft.callbacks.export import FineTuning
from lightning_ft.errors import ExportError
from lightning_ft.evaluation.retention.measurement import RetentionMeasurement
from lightning_ft.rollout.local import LocalEngine


def fail(*_, **__):
    raise RuntimeError("broken on one rank")


class BreaksOneRank(Callback):
    """Makes a function fail on one rank after the last step."""

    def __init__(self, where):
        self.rank, self.owner, self.name = {
            "generation": (1, LocalEngine, "generate"),
            "retention": (1, RetentionMeasurement, "after"),
            "export": (0, FineTuning, "export"),
        }[where]

    def on_train_end(self, trainer, pl_module):
        if trainer.global_rank == self.rank:
            setattr(self.owner, self.name, fail)


def main(where, model, out):
    torch.set_num_threads(1)
    options = {"timed_requests": 0, "max_new_tokens": 2, "resamples": 50, "output_dir": f"{out}/savings"}
    savings = Savings(PromptBaseline(system="Say it."), scorer=lambda output, _: 1 / (1 + len(output)), **options)
    retention = Retention(["the quick brown fox"], output_dir=f"{out}/retention", resamples=50)
    trainer = Trainer(
        **trainer_options("ddp", out),
        callbacks=[BreaksOneRank(where), savings, retention, ComputeMeter(), ExportModel(f"{out}/export")],
    )
    data = PairDataModule(make_rows(8), test=make_rows(12)[8:], batch_size=2, cache_dir=False)
    raised = ""
    try:
        trainer.fit(LoRAFineTuning(model, learning_rate=1e-2), data)
    except ExportError as error:
        raised = str(error)
    reported = {"savings": savings.undefined, "retention": retention.undefined, "export": raised}
    Path(out, f"reported-{trainer.global_rank}.json").write_text(json.dumps(reported))


if __name__ == "__main__":
    main(*sys.argv[1:])
