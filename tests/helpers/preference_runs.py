"""Preference rows, and modules that record their metrics."""

from recording import RecordsGradients
from tiny import make_rows

from lightning_ft import PreferenceDataModule
from lightning_ft._lightning import Trainer


class RecordsMetrics:
    """Mixin that records all metrics of each step, unrounded, in `step_metrics`, and losses in `step_losses`."""

    def log(self, name, value, **kwargs):
        if name == "train/loss":
            self.step_losses = [*getattr(self, "step_losses", []), value]
        super().log(name, value, **kwargs)

    def log_dict(self, metrics, **kwargs):
        if any(name.startswith("train/") for name in metrics):
            self.step_metrics = [*getattr(self, "step_metrics", []), dict(metrics)]
        super().log_dict(metrics, **kwargs)


class Records(RecordsGradients, RecordsMetrics):
    """Mixin that records losses, metrics and gradients."""


def make_pairs(count=24):
    """Prompts of several lengths with a better and a worse answer, which start alike in every third row."""
    words = ["parcel", "lamp", "kettle", "invoice", "refund", "dog", "fox", "line", "quick", "lazy", "brown", "answer"]
    return [
        {
            "prompt": row["input"],
            "chosen": row["output"],
            "rejected": (row["output"].split()[0] + " " if n % 3 == 0 else "") + f"the {words[(n * 7 + 3) % 12]}",
        }
        for n, row in enumerate(make_rows(count))
    ]


def make_labeled(count=24):
    """Prompts with one labeled answer each."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen"] if good else row["rejected"], "label": good}
        for row, good in ((row, n % 5 in (0, 2, 3)) for n, row in enumerate(make_pairs(count)))
    ]


def train(module, rows, trainer_options, *, data=None, ckpt_path=None, **options):
    """Fit on preferences and return the Trainer."""
    settings = {"batch_size": 4, "shuffle": False, "cache_dir": False, **(data or {})}
    trainer = Trainer(**{**trainer_options, "max_epochs": 1, **options})
    trainer.fit(module, PreferenceDataModule(rows, **settings), ckpt_path=ckpt_path)
    return trainer


def trainable(module):
    """Copies of the trainable weights."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
