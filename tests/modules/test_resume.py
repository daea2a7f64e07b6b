"""A run that is resumed from any checkpoint that Lightning can write equals the uninterrupted one bit for bit."""

import random

import pytest
import torch
from resumed_runs import METHODS, ROLLS_OUT, Lines, Stops, differences, end, killed, make, train

from lightning_ft._lightning import _pl

ModelCheckpoint = _pl.callbacks.ModelCheckpoint


class SavesEverywhere(_pl.Callback):
    """Writes a checkpoint in every hook of training, and records how much was logged before it."""

    def __init__(self, folder, lines):
        self.folder, self.lines, self.saved = folder, lines, {}

    def save(self, trainer, where):
        path = self.folder / f"{len(self.saved)}-{where}.ckpt"
        trainer.save_checkpoint(path)
        self.saved[path] = len(self.lines.lines)

    def on_train_batch_start(self, trainer, *args):
        self.save(trainer, "batch_start")

    def on_train_batch_end(self, trainer, *args):
        self.save(trainer, "batch_end")

    def on_validation_start(self, trainer, *args):
        self.save(trainer, "validation_start")

    def on_validation_end(self, trainer, *args):
        self.save(trainer, "validation_end")

    def on_train_epoch_start(self, trainer, *args):
        self.save(trainer, "epoch_start")

    def on_train_epoch_end(self, trainer, *args):
        self.save(trainer, "epoch_end")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"accumulate_grad_batches": 2}),
        ("lora", {"val_check_interval": 2}),
        ("full", {"max_steps": 12, "max_epochs": -1, "mixed": True}),
        ("grpo", {"limit_val_batches": 0}),
    ],
    ids=["accumulation", "validation within epochs", "mixing up to max_steps", "rollouts without validation"],
)
def test_checkpoint_of_every_hook_resumes(method, settings, model_folder, trainer_options, tmp_path):
    settings = dict(settings)
    mixed = {"mixed": True} if settings.pop("mixed", False) else {}

    def run(**options):
        return train(*make(method, model_folder, tmp_path, **mixed), trainer_options, **settings, **options)

    lines = Lines()
    saver = SavesEverywhere(tmp_path, lines)
    whole = end(run(callbacks=[saver], logger=lines))
    paths = list(saver.saved)
    for path in random.Random(0).sample(paths, 9):
        again = Lines()
        assert not differences(end(run(ckpt_path=path, logger=again, seed=1)), whole), path.name
        assert again.lines == lines.lines[len(lines.lines) - len(again.lines) :], path.name
        own = "batch_end" in path.name  # the line of that batch's own step comes after the checkpoint
        assert len(again.lines) >= len(lines.lines) - saver.saved[path] - own, path.name


@pytest.mark.parametrize(
    ("method", "every"),
    [*((method, None) for method in METHODS), ("lora", 2), ("grpo", 2)],
)
def test_run_resumed_several_times_equals_the_uninterrupted_one(method, every, model_folder, trainer_options, tmp_path):
    """Stops after the ends of two epochs and within the last, and resumes again after the end."""

    def run(folder, stop=None, seed=0):
        saver = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_train_steps=every)
        callbacks = [saver, *([] if stop is None else [Stops(stop)])]
        module, data = make(method, model_folder, tmp_path)
        return train(module, data, trainer_options, callbacks=callbacks, ckpt_path="last", seed=seed)

    whole = end(run("whole"))
    stops = (4, 4, 2) if method in ROLLS_OUT else (6, 6, 4)
    for seed, stop in enumerate(stops):  # the first starts, the others resume with a different seed
        run("stopped", stop, seed)
    assert not differences(end(run("stopped", seed=5)), whole)
    assert not differences(end(run("stopped", seed=6)), whole)  # it had finished


def test_run_with_workers_resumes(model_folder, trainer_options, tmp_path):
    def run(folder, stop=None, num_workers=2):
        saver = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_train_steps=2)
        module, data = make("lora", model_folder, tmp_path, num_workers=num_workers)
        callbacks = [saver, *([] if stop is None else [Stops(stop)])]
        return train(module, data, trainer_options, callbacks=callbacks, ckpt_path="last")

    whole = end(run("whole", num_workers=0))
    run("stopped", 7)
    assert not differences(end(run("stopped")), whole)


def test_exception_inside_a_training_step_resumes_from_its_checkpoint(model_folder, trainer_options, tmp_path):
    """The exception comes after dropout was drawn and a micro-batch of the accumulation window was used."""

    def run(fails=None, **options):
        module, data = make("lora", model_folder, tmp_path)
        seen, step = 0, module.training_step

        def training_step(batch, batch_idx):
            nonlocal seen
            loss = step(batch, batch_idx)
            seen += 1
            if seen == fails:
                raise InterruptedError
            return loss

        module.training_step = training_step
        return train(module, data, trainer_options, accumulate_grad_batches=2, **options)

    whole = end(run())
    for fails in (2, 5, 8, 9):
        saver = _pl.callbacks.OnExceptionCheckpoint(tmp_path, filename=f"{fails}")
        run(fails, callbacks=[saver])
        assert not differences(end(run(ckpt_path=tmp_path / f"{fails}.ckpt", seed=1)), whole), fails


def test_checkpoint_within_a_rollout_is_reported(model_folder, trainer_options, tmp_path):
    module, data = make("grpo", model_folder, tmp_path)
    take, taken = module._take_step, 0

    def take_step(*args):
        nonlocal taken
        if taken == 6:
            raise InterruptedError
        take(*args)
        taken += 1

    module._take_step = take_step
    saver = _pl.callbacks.OnExceptionCheckpoint(tmp_path, filename="half")
    train(module, data, trainer_options, callbacks=[saver])
    module, data = make("grpo", model_folder, tmp_path)
    with pytest.warns(UserWarning, match="between the optimizer steps of batch 1 of epoch 0"):
        trainer = train(module, data, trainer_options, ckpt_path=tmp_path / "half.ckpt")
    assert trainer.global_step == 36 - 2


def test_plateau_scheduler_and_early_stopping_resume(model_folder, trainer_options, tmp_path):
    """Their metric is logged before the checkpoint, and they read it afterwards."""

    def run(folder, stop=None):
        module, data = make("full", model_folder, tmp_path)

        def configure_optimizers():
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}

        module.configure_optimizers = configure_optimizers
        saver = ModelCheckpoint(tmp_path / folder, save_last=True)
        early = _pl.callbacks.EarlyStopping("val/loss", patience=3)
        callbacks = [early, saver, *([] if stop is None else [Stops(stop)])]
        trainer = train(module, data, trainer_options, callbacks=callbacks, ckpt_path="last", max_epochs=4)
        return end(trainer), trainer.optimizers[0].param_groups[0]["lr"]

    whole, rate = run("whole")
    run("stopped", 7)
    resumed, again = run("stopped")
    assert not differences(resumed, whole)
    assert again == rate < 0.1


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 2}], ids=["after an epoch", "within one"])
def test_run_that_was_stopped_early_takes_no_more_steps(settings, model_folder, trainer_options, tmp_path):
    """A scheduler repeats the command of a run that was killed while its final weights were measured."""

    def run(ckpt_path=None):
        module, data = make("lora", model_folder, tmp_path)
        stopping = _pl.callbacks.EarlyStopping("val/loss", patience=1, min_delta=1e9)
        callbacks = [stopping, ModelCheckpoint(tmp_path, save_last=True)]
        return train(module, data, trainer_options, callbacks=callbacks, ckpt_path=ckpt_path, max_epochs=9, **settings)

    whole = end(run())
    last = str(tmp_path / "last.ckpt")
    assert not differences(end(run(last)), whole)
    assert not differences(end(run(last)), whole)
    module, data = make("lora", model_folder, tmp_path)
    trainer = train(module, data, trainer_options, ckpt_path=last, max_epochs=4)
    assert trainer.global_step == 20


def kill_and_resume(method, moments, model_folder, options, folder):
    """Kill at several moments, as shares of the run's events, and return those after which the resumed run differs."""

    def run(where):
        saver = ModelCheckpoint(folder / where, save_last=True, every_n_train_steps=1, save_top_k=1)
        return train(*make(method, model_folder, folder), options, callbacks=[saver], ckpt_path="last", max_epochs=2)

    whole = end(run("whole"))
    events = killed(lambda: run("counted"))
    bad = []
    for moment in moments:
        where = f"killed-{moment}"
        killed(lambda where=where: run(where), at=max(1, int(events * moment)))
        if differences(end(run(where)), whole):
            bad.append(moment)
    return bad


@pytest.mark.parametrize("method", ["lora", "dpo", "grpo"])
def test_run_killed_at_any_moment_resumes(method, model_folder, trainer_options, tmp_path):
    moments = [random.Random(method).uniform(0.3, 1.0)]
    assert not kill_and_resume(method, moments, model_folder, trainer_options, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_run_killed_at_twenty_moments_resumes(method, model_folder, trainer_options, tmp_path):
    draw = random.Random(method)
    moments = [draw.random() for _ in range(20)]
    assert not kill_and_resume(method, moments, model_folder, trainer_options, tmp_path)
