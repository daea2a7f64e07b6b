"""The report that is written at the end of a fit."""

import importlib
from pathlib import Path

import pytest
import torch
from tiny import TEXT, make_rows

from lightning_ft import (
    ComputeMeter,
    LoRAFineTuning,
    PairDataModule,
    PromptBaseline,
    Retention,
    RetentionFrontier,
    TokenSavings,
)
from lightning_ft._lightning import Callback, Trainer, _pl
from lightning_ft.callbacks.measuring import report_at_end

BoringModel = importlib.import_module(f"{_pl.__name__}.demos.boring_classes").BoringModel


class Measures(Callback):
    """Writes a result when training ends, like the callbacks that measure."""

    reports = True

    def __init__(self, name, write, output_dir=None):
        super().__init__()
        self.name, self.write, self.output_dir = name, write, output_dir
        self.written = None

    @property
    def state_key(self):
        return f"Measures({self.name})"

    def on_train_end(self, trainer, pl_module):
        if self.output_dir is not False:
            self.write(trainer.log_dir or trainer.default_root_dir)

    def on_fit_end(self, trainer, pl_module):
        self.written = report_at_end(trainer, self)


def fit(trainer_options, *callbacks):
    torch.manual_seed(0)
    Trainer(max_steps=1, callbacks=list(callbacks), **trainer_options).fit(BoringModel())


@pytest.fixture
def writers(make):
    return {
        "retention": lambda folder: make.write(Path(folder) / "retention", "retention.json", make.retention()),
        "compute": lambda folder: make.write(Path(folder) / "compute", "compute.json", make.compute()),
    }


def test_report_at_end_is_written_by_last_callback(trainer_options, tmp_path, writers):
    first, last = (Measures(name, write) for name, write in writers.items())
    fit(trainer_options, first, Callback(), last, Callback())
    assert first.written == []
    assert [path.name for path in last.written] == ["report.html", "report.md", "report.json"]
    assert last.written[0].parent == tmp_path / "report"
    page = last.written[0].read_text()
    assert "<h2>Forgetting</h2>" in page
    assert "<h2>Training compute</h2>" in page


def test_report_at_end_ignores_other_results_in_folder(trainer_options, tmp_path, make, writers):
    make.run(tmp_path / "an earlier run")
    last = Measures("retention", writers["retention"])
    fit(trainer_options, last)
    page = last.written[0].read_text()
    assert "<h2>Forgetting</h2>" in page
    assert "<h2>Training compute</h2>" not in page


def test_report_at_end_skips_callbacks_without_files(trainer_options, tmp_path, writers):
    silent = [Measures(name, write, output_dir=False) for name, write in writers.items()]
    fit(trainer_options, *silent)
    assert silent[-1].written == []
    assert not (tmp_path / "report").exists()


def test_report_at_end_skips_results_in_other_folders(trainer_options, tmp_path, writers):
    away = Measures("retention", lambda folder: None, output_dir=tmp_path / "away")
    fit(trainer_options, away)
    assert away.written == []
    assert not (tmp_path / "report").exists()


def test_fast_dev_run_measures_and_writes_nothing(trainer_options, tmp_path, model_folder):
    options = {"max_new_tokens": 3, "resamples": 99, "progress": False}
    callbacks = [
        TokenSavings(PromptBaseline(system="Answer."), timed_requests=0, **options),
        Retention(TEXT, resamples=99, progress=False, output_dir=tmp_path / "elsewhere"),
        RetentionFrontier(TEXT, scales=(0.5, 1.0), **options),
        ComputeMeter(),
    ]
    data = PairDataModule(make_rows(12), validation=make_rows(16)[12:], cache_dir=False)
    Trainer(**trainer_options, fast_dev_run=True, callbacks=callbacks).fit(LoRAFineTuning(model_folder), data)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert all(callback.result is not None for callback in callbacks[1:])
    assert not any(callback.failures for callback in callbacks[1:])


def test_report_at_end_writes_on_rank_zero_only(trainer_options, tmp_path, writers):
    last = Measures("retention", writers["retention"])
    fit(trainer_options, last)

    class Other:
        callbacks = [last]  # noqa: RUF012
        is_global_zero = False
        log_dir = str(tmp_path)
        loggers = ()

    assert report_at_end(Other(), last) == []
