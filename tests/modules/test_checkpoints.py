"""A checkpoint contains trainable weights only, loads without pickled code, and a run resumes bit for bit."""

import pytest
import torch
from tiny import make_rows

from lightning_ft import FullFineTuning, LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.errors import ModelError

ROWS = make_rows(24)
DROPOUT = {"r": 4, "lora_dropout": 0.3}  # so that resuming needs the random state too


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def module_for(kind, folder):
    lora = {"lora": DROPOUT} if kind is LoRAFineTuning else {}
    return kind(folder, learning_rate=1e-2, **lora)


@pytest.mark.parametrize("kind", [FullFineTuning, LoRAFineTuning])
def test_checkpoint_contains_trainable_weights_without_pickled_objects(fit, model_folder, tmp_path, kind):
    module = module_for(kind, model_folder)
    trainer = fit(module, ROWS, max_steps=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == weights(module).keys()
    if kind is LoRAFineTuning:
        assert all("lora_" in name for name in checkpoint["state_dict"])
        assert checkpoint["hyper_parameters"]["lora"]["lora_dropout"] == 0.3
    again = kind.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    for name, value in weights(module).items():
        assert torch.equal(dict(again.named_parameters())[name], value)


@pytest.mark.parametrize("kind", [FullFineTuning, LoRAFineTuning])
@pytest.mark.parametrize("stop_at", [2, 3])
def test_sft_run_resumes_exactly(fit, model_folder, tmp_path, kind, stop_at):
    """Three steps per epoch: stops within an epoch, at its end, and within the next."""
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "data": {"shuffle": True}}
    torch.manual_seed(1)
    whole = module_for(kind, model_folder)
    saver = _pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(whole, ROWS, callbacks=[saver], enable_checkpointing=True, **options)
    torch.manual_seed(2)  # earlier random draws of the process must not matter
    resumed = module_for(kind, model_folder)
    trainer = fit(resumed, ROWS, ckpt_path=tmp_path / f"step={stop_at}.ckpt", **options)
    assert trainer.global_step == 9
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert resumed._step_metrics.tokens_seen == whole._step_metrics.tokens_seen


def test_checkpoint_of_another_adapter_is_refused(fit, model_folder, tmp_path):
    trainer = fit(LoRAFineTuning(model_folder, lora={"r": 4, "target_modules": ["q_proj"]}), ROWS, max_steps=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ModelError, match=r"it lacks \d+ trainable weights .first: model[\w., ]+\)\. Use"):
        fit(LoRAFineTuning(model_folder, lora={"r": 4}), ROWS, ckpt_path=tmp_path / "a.ckpt", max_epochs=2)


def test_validation_uses_the_weights_of_the_checkpoint(fit, model_folder, tmp_path, trainer_options):
    module = module_for(LoRAFineTuning, model_folder)
    trainer = fit(module, ROWS, max_steps=4)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    data = PairDataModule(ROWS, validation=ROWS[:6], cache_dir=False)
    losses = []
    for which in (module, module_for(LoRAFineTuning, model_folder)):
        path = None if which is module else tmp_path / "a.ckpt"
        losses.append(Trainer(**trainer_options).validate(which, data, ckpt_path=path)[0]["val/loss"])
    assert losses[0] == losses[1]
    untrained = Trainer(**trainer_options).validate(module_for(LoRAFineTuning, model_folder), data)[0]["val/loss"]
    assert untrained != losses[0]


@pytest.mark.parametrize("how", ["load_from_checkpoint", "validate"])
def test_new_fit_of_loaded_weights_draws_with_its_own_seed(fit, model_folder, tmp_path, trainer_options, how):
    fit(module_for(LoRAFineTuning, model_folder), ROWS, max_steps=1).save_checkpoint(tmp_path / "a.ckpt")

    def tuned(seed):
        if how == "load_from_checkpoint":
            module = LoRAFineTuning.load_from_checkpoint(tmp_path / "a.ckpt")
        else:
            module, data = module_for(LoRAFineTuning, model_folder), PairDataModule(ROWS, validation=ROWS[:2])
            Trainer(**trainer_options).validate(module, data, ckpt_path=tmp_path / "a.ckpt", verbose=False)
        torch.manual_seed(seed)  # of dropout
        fit(module, ROWS, max_steps=2)
        return weights(module)

    first, again, other = tuned(1), tuned(1), tuned(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_checkpoint_contains_weights_that_a_callback_froze_or_unfroze(fit, model_folder, tmp_path):
    class Switch(_pl.callbacks.BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze([module.model.get_submodule("base_model.model.model.layers.0")])

        def finetune_function(self, module, epoch, optimizer):
            self.unfreeze_and_add_param_group([module.model.base_model.model.model.norm], optimizer, lr=1e-2)

    module = LoRAFineTuning(model_folder, lora={"r": 4}, learning_rate=1e-2)
    module.configure_model()
    trainer = fit(module, ROWS, callbacks=[Switch()])
    trained = weights(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = LoRAFineTuning.load_from_checkpoint(tmp_path / "a.ckpt")
    assert all(torch.equal(dict(again.named_parameters())[name], value) for name, value in trained.items())
    fit(again, ROWS, max_steps=1).save_checkpoint(tmp_path / "b.ckpt")  # the norm is frozen now, and not the base's
    saved = [torch.load(tmp_path / name, weights_only=True)["state_dict"] for name in ("a.ckpt", "b.ckpt")]
    assert saved[0].keys() == saved[1].keys()
    assert {"model.base_model.model.model.norm.weight"} == {name for name in saved[0] if "lora_" not in name}
    assert any("layers.0" in name for name in saved[0])
