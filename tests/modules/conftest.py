import pytest

from lightning_ft import PairDataModule
from lightning_ft._lightning import Trainer


@pytest.fixture
def fit(trainer_options):
    """Train a module on rows and return the Trainer."""

    def run(module, rows, *, data=None, ckpt_path=None, **options):
        settings = {"batch_size": 4, "shuffle": False, "cache_dir": False, **(data or {})}
        trainer = Trainer(**{**trainer_options, "max_epochs": 1, **options})
        trainer.fit(module, PairDataModule(rows, **settings), ckpt_path=ckpt_path)
        return trainer

    return run
