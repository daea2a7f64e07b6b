"""Training on rows that are read while training: exact resume, schedules, and what needs all rows before."""

import os
import signal

import datasets
import pytest
import torch
from resumed_runs import DROPOUT, Stops, differences, end, train
from tiny import make_rows

from lightning_ft import (
    DPO,
    GRPO,
    FullFineTuning,
    LoRAFineTuning,
    PairDataModule,
    PreferenceDataModule,
    PromptDataModule,
)
from lightning_ft._lightning import _pl
from lightning_ft.errors import ConfigError, NonFiniteError

SOURCES = {
    "function": lambda rows: lambda: iter(rows),
    "dataset": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3),
}


def run(model_folder, folder, options, *, callbacks=(), ckpt_path=None, source=None, **settings):
    module = LoRAFineTuning(model_folder, learning_rate=1e-2, lora=DROPOUT, lr_schedule="linear")
    rows = make_rows(23)
    data = PairDataModule(
        SOURCES[source](rows), validation=make_rows(4), batch_size=2, shuffle_buffer=5, cache_dir=False
    )
    settings = {"max_epochs": -1, "max_steps": 11, "accumulate_grad_batches": 3, **settings}
    return train(module, data, options, callbacks=callbacks, ckpt_path=ckpt_path, **settings)


@pytest.mark.parametrize("source", ["function", "dataset"])
@pytest.mark.parametrize("after", [4, 13, 20], ids=["in a window", "second epoch", "later window"])
def test_run_that_is_stopped_in_an_accumulation_window_resumes(model_folder, tmp_path, trainer_options, source, after):
    """Twelve batches per epoch, in windows of three; the window that was open is trained on again."""
    whole = end(run(model_folder, tmp_path, trainer_options, source=source))
    stopped = run(model_folder, tmp_path, trainer_options, source=source, callbacks=[Stops(after)])
    stopped.save_checkpoint(tmp_path / "a.ckpt")
    resumed = run(model_folder, tmp_path, trainer_options, source=source, ckpt_path=tmp_path / "a.ckpt", seed=5)
    assert not differences(end(resumed), whole)


class Terminated(_pl.Callback):
    """Sends SIGTERM to this process at the start of a batch."""

    def __init__(self, after):
        self.left = after

    def on_train_batch_start(self, *args):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        self.left -= 1


@pytest.mark.parametrize("source", ["function", "dataset"])
def test_checkpoint_of_a_terminated_run_resumes(model_folder, tmp_path, trainer_options, source):
    whole = end(run(model_folder, tmp_path, trainer_options, source=source))

    def checkpointing():
        return _pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_on_exception=True)

    with pytest.raises(SystemExit):
        run(model_folder, tmp_path, trainer_options, source=source, callbacks=[checkpointing(), Terminated(16)])
    (checkpoint,) = sorted(tmp_path.glob("*exception*.ckpt")) or sorted(tmp_path.glob("last*.ckpt"))
    resumed = run(model_folder, tmp_path, trainer_options, source=source, ckpt_path=checkpoint, seed=5)
    assert not differences(end(resumed), whole)


def test_schedule_without_an_end_is_refused(model_folder, tmp_path, trainer_options):
    for epochs, remedy in (
        (1, r"max_epochs=1 doesn't say it, .*Set max_steps, or"),
        (-1, "set max_steps or max_epochs"),
    ):
        with pytest.raises(ConfigError, match=rf"lr_schedule='linear' needs the length of the training: {remedy}"):
            run(model_folder, tmp_path, trainer_options, source="function", max_epochs=epochs, max_steps=-1)


def test_warm_up_without_an_end_is_told(model_folder, trainer_options):
    module = FullFineTuning(model_folder, lr_schedule="constant")
    data = PairDataModule(lambda: iter(make_rows(8)), batch_size=4)
    with pytest.warns(UserWarning, match="warmup_ratio=0.03 is a share of all optimizer steps, whose number isn't"):
        train(module, data, trainer_options, max_epochs=1)


def test_batches_are_those_of_rows_read_before(model_folder, tmp_path, trainer_options):
    """The same steps, whether rows are streamed or not."""

    def final(streaming):
        data = PairDataModule(make_rows(23), batch_size=4, shuffle=False, streaming=streaming, cache_dir=False)
        module = FullFineTuning(
            model_folder, learning_rate=1e-2, dtype="float32", lr_schedule="constant", warmup_ratio=0
        )
        return end(train(module, data, trainer_options, max_epochs=2, accumulate_grad_batches=4))

    assert not differences(final(True), final(False))


def test_empty_batch_takes_part_in_a_window(model_folder, trainer_options):
    """A batch whose rows are all left out adds nothing to the step of its window."""

    def final(rows, **settings):
        data = PairDataModule(
            rows, batch_size=1, shuffle=False, streaming=True, max_length=64, on_overlong="drop", cache_dir=False
        )
        module = FullFineTuning(
            model_folder, learning_rate=1e-2, dtype="float32", lr_schedule="constant", warmup_ratio=0
        )
        return end(train(module, data, trainer_options, max_epochs=1, **settings))

    rows, long = make_rows(4), {"input": "a " * 300, "output": "b"}
    with pytest.warns(UserWarning, match="a row is left out"):
        found = final([*rows[:2], long, *rows[2:], long], accumulate_grad_batches=3)
    expected = final(rows, accumulate_grad_batches=2)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_row_that_the_model_cant_read_is_named(model_folder, trainer_options):
    """It is checked with its batch, since it isn't known before."""
    module = FullFineTuning(model_folder, lr_schedule="constant")
    rows = [*make_rows(20) * 6, {"input": "plus " * 500, "output": "b"}]
    data = PairDataModule(lambda: iter(rows), max_length=4096, batch_size=8, shuffle=False)
    with pytest.warns(UserWarning, match="A row of this batch has 515 tokens, more than the 512 positions"):
        train(module, data, trainer_options, max_epochs=1)


def test_nonfinite_step_names_rows_of_the_stream(model_folder, trainer_options):
    class Breaks(_pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 2:
                next(p for p in module.parameters() if p.requires_grad).data.fill_(float("nan"))

    data = PairDataModule(lambda: iter(make_rows(20)), batch_size=4, shuffle=False)
    with pytest.raises(NonFiniteError, match="batch 2 of epoch 0: rows 9, 10, 11, 12 of train"):
        train(FullFineTuning(model_folder, lr_schedule="constant"), data, trainer_options, callbacks=[Breaks()])


def test_precomputed_reference_is_refused(model_folder, trainer_options):
    rows = [{"prompt": row["input"], "chosen": row["output"], "rejected": "no"} for row in make_rows(8)]
    module = DPO(model_folder, precompute_reference=True)
    with pytest.raises(ConfigError, match="precompute_reference=True needs all training rows before training"):
        train(module, PreferenceDataModule(lambda: iter(rows)), trainer_options)


def test_preferences_and_prompts_train(model_folder, trainer_options):
    rows = [{"prompt": row["input"], "chosen": row["output"], "rejected": "no"} for row in make_rows(8)]
    trainer = train(
        DPO(model_folder, lr_schedule="constant"),
        PreferenceDataModule(lambda: iter(rows), batch_size=4),
        trainer_options,
    )
    assert trainer.global_step == 6
    rewards = [
        lambda completions, output, **_: [float(len(a) - len(b)) for a, b in zip(completions, output, strict=True)]
    ]
    module = GRPO(model_folder, rewards=rewards, num_completions=2, max_new_tokens=4)
    data = PromptDataModule(lambda: iter(make_rows(8)), batch_size=4)
    trainer = train(module, data, trainer_options, max_steps=3, max_epochs=-1)
    assert trainer.global_step == 3
