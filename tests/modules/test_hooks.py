"""Subclasses with hooks and layers of their own: replaced hooks are refused, and layers are trained."""

import pytest
import torch
from preference_runs import make_pairs
from tiny import make_rows

import lightning_ft
from lightning_ft._lightning import LightningModule, Trainer
from lightning_ft.errors import ConfigError
from lightning_ft.modules.exact_resume import ExactResume
from lightning_ft.modules.hooks import refuse_replaced_hooks

ROWS = make_rows(8)


def replaced(base, name):
    def hook(self, *args):
        pass

    return type("Mine", (base,), {name: hook, "__module__": "users_own"})


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (lightning_ft.FullFineTuning, "on_before_optimizer_step"),
        (lightning_ft.FullFineTuning, "on_save_checkpoint"),
        (lightning_ft.LoRAFineTuning, "optimizer_step"),
        (lightning_ft.DPO, "on_train_start"),
        (lightning_ft.DPO, "on_fit_start"),
        (lightning_ft.GRPO, "on_validation_epoch_start"),
        (lightning_ft.PPO, "configure_callbacks"),
        (ExactResume, "on_train_batch_start"),
    ],
)
def test_a_hook_that_replaces_one_of_the_package_is_refused(base, name):
    bases = (base, LightningModule) if base is ExactResume else (base,)
    with pytest.raises(ConfigError, match=rf"^Mine\.{name} must call super\(\)\.{name}\("):
        replaced(type("Between", bases, {"__module__": "users_own"}), name)


def test_the_error_for_a_replaced_hook_says_what_to_call():
    class Mixin:
        def on_before_optimizer_step(self, optimizer):
            self.norms = []

    with pytest.raises(ConfigError) as error:
        type("Mine", (Mixin, lightning_ft.DPO), {"__module__": "users_own"})
    assert str(error.value) == (
        "Mixin.on_before_optimizer_step must call super().on_before_optimizer_step(optimizer): Lightning's own hook "
        "does nothing, and that of PreferenceLearning is part of how it trains, evaluates or resumes."
    )


def test_hooks_that_call_those_of_the_package_or_replace_none_are_taken():
    class Mine(lightning_ft.FullFineTuning):
        def on_train_start(self):
            [super(Mine, self).on_train_start() for _ in range(1)]

        def on_train_end(self):
            getattr(super(), "on_train_end")()  # noqa: B009

        @torch.no_grad()
        def on_save_checkpoint(self, checkpoint):
            lightning_ft.FullFineTuning.on_save_checkpoint(self, checkpoint)

        def on_after_backward(self):
            pass

        def training_step(self, batch, batch_idx):
            pass

    def timed(hook):
        return lambda self: hook(self)

    class Called(lightning_ft.LoRAFineTuning):
        @timed
        def on_train_start(self):
            super().on_train_start()

        def on_save_checkpoint(self, checkpoint):
            self.add_to(checkpoint)

        def add_to(self, checkpoint):
            super().on_save_checkpoint(checkpoint)

        def on_train_epoch_end(self):  # the package's does nothing without an activation cache
            pass

    with pytest.raises(ConfigError, match=r"Called\.on_train_epoch_end must call super\(\)\.on_train_epoch_end\(\)"):
        refuse_replaced_hooks(Called, with_options=True)

    class Theirs(LightningModule):
        def on_train_start(self):
            pass

    type("Mixed", (ExactResume, Theirs), {"__module__": "users_own"})


def with_layer(base):
    class WithLayer(base):
        """Has a layer of its own, with a loss per supervised token or pair."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.layer = torch.nn.Linear(4, 1)

        def own_loss(self):
            return self.layer(torch.ones(4)).square().sum()

        def training_step(self, batch, batch_idx):
            count = len(batch) if base is lightning_ft.DPO else batch.num_targets
            return super().training_step(batch, batch_idx) + count * self.own_loss()

        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            want = torch.autograd.grad(self.own_loss(), self.layer.weight)[0]
            torch.testing.assert_close(self.layer.weight.grad, want)
            self.before = self.layer.weight.detach().clone()

    return WithLayer


@pytest.mark.parametrize("base", [lightning_ft.FullFineTuning, lightning_ft.LoRAFineTuning, lightning_ft.DPO])
def test_layers_of_a_subclass_are_trained(model_folder, trainer_options, base, tmp_path):
    module = with_layer(base)(model_folder, learning_rate=1e-2)
    settings = {"batch_size": 2, "cache_dir": False}
    if base is lightning_ft.DPO:
        data = lightning_ft.PreferenceDataModule(make_pairs(8), **settings)
    else:
        data = lightning_ft.PairDataModule(ROWS, **settings)
    trainer = Trainer(**trainer_options, max_steps=2, accumulate_grad_batches=2)
    trainer.fit(module, data)
    assert not torch.equal(module.before, module.layer.weight)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "saved.ckpt")
    assert torch.equal(loaded.layer.weight, module.layer.weight)


def test_layers_that_an_optimizer_of_adapters_would_leave_out_are_refused(fit, model_folder):
    module = with_layer(lightning_ft.LoRAFineTuning)(model_folder, optimizer="loraplus")
    with pytest.raises(ConfigError, match=r"optimizer='loraplus' trains the adapter alone, .* layer\.weight"):
        fit(module, ROWS)
