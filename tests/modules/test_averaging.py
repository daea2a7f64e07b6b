"""Lightning's weight averaging over an adapter: resumable, small, and without the frozen base."""

import pytest
import torch
from tiny import make_rows

from lightning_ft import LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer, _pl

AVERAGES = {
    "ema": lambda: _pl.callbacks.EMAWeightAveraging(decay=0.9),
    "swa": lambda: _pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1),
}


def fit(trainer_options, folder, model_folder, average, epochs, resume=None):
    _pl.seed_everything(0, verbose=False)
    module = LoRAFineTuning(model_folder, learning_rate=1e-2, lr_schedule="constant")
    saver = _pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = Trainer(
        **{**trainer_options, "enable_checkpointing": True}, max_epochs=epochs, callbacks=[AVERAGES[average](), saver]
    )
    trainer.fit(module, PairDataModule(make_rows(8), cache_dir=False, batch_size=4), ckpt_path=resume)
    return module


def split(module):
    """Trained weights, and frozen ones."""
    weights = {name: (p.detach().clone(), p.requires_grad) for name, p in module.named_parameters()}
    return tuple({name: value for name, (value, kind) in weights.items() if kind is wanted} for wanted in (True, False))


@pytest.mark.parametrize("average", AVERAGES)
def test_weight_averages_resume_and_exclude_the_base(trainer_options, tmp_path, model_folder, average):
    epochs = 3 if average == "swa" else 2
    trained, frozen = split(fit(trainer_options, tmp_path / "whole", model_folder, average, epochs))
    original = LoRAFineTuning(model_folder)
    original.configure_model()
    for name, weights in split(original)[1].items():
        assert torch.equal(frozen[name], weights), name

    path = tmp_path / "whole" / f"epoch={epochs - 2}.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    states = [checkpoint["state_dict"]]
    if average == "ema":
        states.append(checkpoint["current_model_state"])
        assert any(not torch.equal(states[0][name], states[1][name]) for name in trained)
    else:
        states += [s["average_model_state"] for s in checkpoint["callbacks"].values() if "average_model_state" in s]
    assert len(states) == 2
    assert all(state.keys() == trained.keys() for state in states)

    resumed, _ = split(fit(trainer_options, tmp_path / "rest", model_folder, average, epochs, path))
    for name, weights in trained.items():
        assert torch.equal(resumed[name], weights), name


def test_weight_averaging_ends_with_averaged_weights(trainer_options, tmp_path, model_folder):
    ends = [split(fit(trainer_options, tmp_path / name, model_folder, name, 3))[0] for name in AVERAGES]
    last = torch.load(tmp_path / "swa" / "epoch=2.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(ends[1][name], last[name]) for name in last)
    current = torch.load(tmp_path / "ema" / "epoch=2.ckpt", weights_only=True)["current_model_state"]
    assert any(not torch.equal(ends[0][name], current[name]) for name in current)


def test_checkpoint_within_a_validation_keeps_weights_and_average_apart(trainer_options, tmp_path, model_folder):
    """The callback swaps them for a validation, in which an exception or a signal may write a checkpoint."""

    class Saves(_pl.Callback):
        def on_validation_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / f"within-{trainer.current_epoch}.ckpt")

    def run(resume=None):
        _pl.seed_everything(0, verbose=False)
        module = LoRAFineTuning(model_folder, learning_rate=1e-2, lr_schedule="constant")
        callbacks = [] if resume else [Saves()]
        trainer = Trainer(**trainer_options, max_epochs=2, callbacks=[AVERAGES["ema"](), *callbacks])
        rows = make_rows(12)
        data = PairDataModule(rows[:8], validation=rows[8:], cache_dir=False, batch_size=4)
        trainer.fit(module, data, ckpt_path=resume)
        return split(module)[0]

    whole, resumed = run(), run(tmp_path / "within-0.ckpt")
    last = torch.load(tmp_path / "within-1.ckpt", weights_only=True)["state_dict"]
    for name, weights in whole.items():
        assert torch.equal(last[name], weights), name
        assert torch.equal(resumed[name], weights), name
