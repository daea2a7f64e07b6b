"""Runs that are continued from a checkpoint written after their last step, as one that was killed while measuring."""

import json

import pytest
import torch
from plain_module import WORDS
from safetensors.torch import load_file

from lightning_ft import (
    ComputeMeter,
    ExportModel,
    LoRAFineTuning,
    PairDataModule,
    PromptBaseline,
    Retention,
    RetentionFrontier,
    TokenSavings,
)
from lightning_ft._lightning import Trainer, _pl

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [{"input": f"where is the {word}", "output": "here"} for word in WORDS]
TESTS = [{"input": f"what is a {word}", "output": "here"} for word in WORDS[:4]]
AVERAGES = {
    "none": lambda: [],
    "ema": lambda: [_pl.callbacks.EMAWeightAveraging(decay=0.5)],
    "swa": lambda: [_pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1)],
}


def shares_letters(output, reference):
    """Share of correct letters."""
    return (1 + len(set(output) & set(reference))) / 5


class Run:
    """The callbacks of one fit, their Trainer and its module."""

    def __init__(self, folder, *others, measures=True, **options):
        texts = ["the quick brown fox jumps"]
        self.savings = TokenSavings(
            PromptBaseline("Answer."), scorer=shares_letters, max_new_tokens=2, timed_requests=0, resamples=50
        )
        self.retention, self.meter = Retention(texts, resamples=50), ComputeMeter()
        self.frontier = RetentionFrontier(
            texts, scorer=shares_letters, scales=(0.5, 1.0), max_new_tokens=2, resamples=50
        )
        self.export = ExportModel(str(folder / "out"), best=False)
        self.measuring = [self.savings, self.frontier, self.retention, self.meter]
        self.folder = folder
        saver = _pl.callbacks.ModelCheckpoint(folder / "checkpoints", save_last=True)
        callbacks = [*(self.measuring if measures else []), self.export, *others, saver]
        fixed = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        self.trainer = Trainer(
            **{"max_epochs": 2, "default_root_dir": str(folder), **fixed, **options}, callbacks=callbacks
        )

    def fit(self, model, ckpt_path=None):
        self.module = LoRAFineTuning(model, learning_rate=1e-2, lr_schedule="constant")
        data = PairDataModule(ROWS, test=TESTS, validation=TESTS, cache_dir=False, batch_size=4)
        self.trainer.fit(self.module, data, ckpt_path=ckpt_path)
        return self

    @property
    def last(self):
        return str(self.folder / "checkpoints" / "last.ckpt")

    @property
    def exported(self):
        return load_file(self.folder / "out" / "last" / "adapter_model.safetensors")


@pytest.mark.parametrize("average", AVERAGES)
def test_finished_run_is_measured_and_exported_from_its_checkpoint(tmp_path, model_folder, average):
    torch.manual_seed(0)
    first = Run(tmp_path / "first", *AVERAGES[average]()).fit(model_folder)
    again = Run(tmp_path / "again", *AVERAGES[average]()).fit(model_folder, first.last)
    assert again.trainer.global_step == 4
    assert [callback.failures for callback in [*again.measuring, again.export]] == [()] * 5
    assert again.savings.result.arms == first.savings.result.arms
    assert again.frontier.result.chosen == first.frontier.result.chosen
    assert again.retention.result.kl_general == first.retention.result.kl_general
    assert (again.meter.result.steps, again.meter.result.tokens) == (4, first.meter.result.tokens)
    assert all(torch.equal(again.exported[name], weight) for name, weight in first.exported.items())
    assert (tmp_path / "again" / "token_savings" / "token_savings.json").is_file()
    assert (tmp_path / "again" / "report" / "report.html").is_file()
    card = (tmp_path / "again" / "out" / "last" / "README.md").read_text()
    assert "## Token savings" in card


def test_finished_run_without_the_state_of_measurements_records_failures(tmp_path, model_folder):
    first = Run(tmp_path / "first", measures=False).fit(model_folder)
    again = Run(tmp_path / "again").fit(model_folder, first.last)
    assert [callback.result for callback in again.measuring] == [None] * 4
    assert "without a prompted arm" in again.savings.undefined
    assert "has already been trained" in again.frontier.undefined
    assert "nothing was kept of the weights before" in again.retention.undefined
    assert "there was no training step" in again.meter.undefined
    assert [len(callback.failures) for callback in again.measuring] == [1] * 4
    undefined = json.loads((tmp_path / "again" / "token_savings" / "undefined.json").read_text())
    assert undefined["Token savings"] == again.savings.undefined
    assert all(torch.equal(again.exported[name], weight) for name, weight in first.exported.items())


@pytest.mark.parametrize("nothing", [{"fast_dev_run": True}, {"limit_train_batches": 0}, {"max_steps": 0}])
def test_fit_that_is_to_train_nothing_measures_nothing(tmp_path, model_folder, nothing):
    first = Run(tmp_path / "first", measures=False, max_epochs=1).fit(model_folder)
    again = Run(tmp_path / "again", **nothing).fit(model_folder, first.last)
    assert [callback.result for callback in again.measuring] == [None] * 4
    assert [callback.failures for callback in again.measuring] == [()] * 4
    assert again.export.exported == {}


def test_trainer_that_has_finished_and_fits_again_measures_nothing(tmp_path, model_folder):
    run = Run(tmp_path).fit(model_folder)
    run.export.overwrite, run.meter.result = True, None
    run.trainer.fit(run.module, run.trainer.datamodule)
    assert (run.meter.result, run.meter.failures, run.export.exported) == (None, (), {})
