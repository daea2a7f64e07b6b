"""Custom losses of DPO: what a checkpoint may name, and what training with them reports."""

import functools
import sys

import pytest
import torch
from dpo_cases import PAIRS
from preference_runs import train

from lightning_ft import DPO
from lightning_ft.errors import ConfigError
from lightning_ft.losses.preference import PREFERENCE_LOSSES, PreferenceLoss

REFUSED = "not a built-in loss, and a checkpoint doesn't decide which code runs. Pass loss= to load_from_checkpoint"


def margin(chosen, rejected, *, beta):
    return (1 - beta * (chosen.average - rejected.average)).relu()


MARGIN = PreferenceLoss(margin, needs_reference=False, name="margin")


@pytest.fixture
def save(model_folder, trainer_options, tmp_path):
    """Train a step with a loss, save a checkpoint, and return its path."""

    def run(loss):
        trainer = train(DPO(model_folder, lora={"r": 2}, loss=loss), PAIRS, trainer_options, max_steps=1)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    return run


def rename(path, loss):
    """Replace the loss that a checkpoint names."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["loss"] = loss
    torch.save(checkpoint, path)


@pytest.mark.parametrize("loss", ["evil.loss", {"sigmoid": 1.0, "evil:loss": 1.0}, "FOLDER/evil.py:loss"])
def test_checkpoint_imports_no_loss(save, tmp_path, monkeypatch, loss):
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef loss(chosen, rejected): return rejected.average - chosen.average\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evil", raising=False)  # of an earlier case
    loss = loss.replace("FOLDER", str(tmp_path)) if isinstance(loss, str) else loss
    path = save("sigmoid")
    rename(path, loss)
    with pytest.raises(ConfigError, match=REFUSED):
        DPO.load_from_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    assert DPO.load_from_checkpoint(path, loss="hinge").hparams["loss"] == {"hinge": 1.0}
    assert not (tmp_path / "ran").exists()
    again = DPO.load_from_checkpoint(path, loss=loss)
    assert again.hparams["loss"] == (loss if isinstance(loss, dict) else {loss: 1.0})
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("loss", "recorded"),
    [
        (PreferenceLoss(margin, name="sigmoid"), "custom sigmoid"),
        (MARGIN, "custom margin"),
        (lambda chosen, rejected: rejected.average - chosen.average, f"{__name__}.<lambda>"),
        (margin, f"{__name__}.margin"),
        (functools.partial(margin, beta=3.0), f"partial({__name__}.margin)"),
    ],
)
def test_checkpoint_of_custom_loss_needs_the_loss_again(save, loss, recorded):
    path = save(loss)
    with pytest.raises(ConfigError, match=REFUSED) as refusal:
        DPO.load_from_checkpoint(path)
    assert f"names loss={recorded!r}" in str(refusal.value)
    again = DPO.load_from_checkpoint(path, loss=loss)
    assert again.hparams["loss"] == {recorded: 1.0}
    assert [one.compute for one, _ in again.losses] == [loss.compute if isinstance(loss, PreferenceLoss) else loss]


def test_checkpoint_of_registered_losses_loads(save, monkeypatch):
    path = save({"sigmoid": 0.8, "sft": 0.2})
    assert DPO.load_from_checkpoint(path).hparams["loss"] == {"sigmoid": 0.8, "sft": 0.2}
    monkeypatch.setitem(PREFERENCE_LOSSES, "margin", MARGIN)
    assert DPO.load_from_checkpoint(save("margin")).losses == [(MARGIN, 1.0)]


def test_checkpoint_of_subclass_with_own_loss_loads(model_folder, trainer_options, tmp_path):
    class MarginDPO(DPO):
        """DPO whose code decides on the loss."""

        def __init__(self, model):
            super().__init__(model, lora={"r": 2}, loss=margin)

    trainer = train(MarginDPO(model_folder), PAIRS, trainer_options, max_steps=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert MarginDPO.load_from_checkpoint(tmp_path / "a.ckpt").losses[0][0].compute is margin


def test_import_path_can_be_a_loss_after_a_refused_checkpoint(save):
    path = save(margin)
    with pytest.raises(ConfigError, match=REFUSED):
        DPO.load_from_checkpoint(path)
    assert DPO("some/model", loss="operator:sub").hparams["loss"] == {"operator:sub": 1.0}


def test_dpo_with_loss_without_gradient_names_it(model_folder, trainer_options):
    def constant(chosen, rejected):
        return torch.ones_like(chosen.logprobs)

    module = DPO(model_folder, loss=PreferenceLoss(constant, name="constant"))
    with pytest.raises(ConfigError, match="Loss 'constant' returned losses without gradient"):
        train(module, PAIRS, trainer_options, max_steps=1)


def test_dpo_keeps_settings_bound_by_partial(model_folder, trainer_options):
    seen = []

    def recording(chosen, rejected, *, beta):
        seen.append(beta)
        return rejected.average - chosen.average

    module = DPO(model_folder, loss=functools.partial(recording, beta=3.0), beta=0.2)
    train(module, PAIRS, trainer_options, max_steps=1)
    assert set(seen) == {3.0}
