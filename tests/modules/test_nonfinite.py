"""Non-finite losses, gradients and weights: they never reach the weights, and are never written."""

import math

import pytest
import torch
from policies import by_tokens
from safetensors.torch import load_file, save_file
from tiny import make_model, make_rows, make_tokenizer
from tiny_scorer import make_scorer

from lightning_ft import (
    DPO,
    GRPO,
    KTO,
    PPO,
    FullFineTuning,
    LoRAFineTuning,
    PairDataModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModeling,
)
from lightning_ft._lightning import Callback, Trainer, _pl
from lightning_ft.errors import ConfigError, ExportError, ModelError, NonFiniteError

PAIRS = make_rows(16)
PREFERENCES = [{"prompt": r["input"], "chosen": r["output"], "rejected": r["output"] + " no"} for r in PAIRS]
LABELED = [{"prompt": r["input"], "completion": r["output"], "label": bool(n % 2)} for n, r in enumerate(PAIRS)]
SAMPLING = {"rewards": by_tokens, "num_completions": 2, "max_new_tokens": 3}
KINDS = {
    "full": (FullFineTuning, {}, PairDataModule, PAIRS),
    "lora": (LoRAFineTuning, {"lora": {"r": 2}}, PairDataModule, PAIRS),
    "reward": (RewardModeling, {}, PreferenceDataModule, PREFERENCES),
    "dpo": (DPO, {"lora": {"r": 2}}, PreferenceDataModule, PREFERENCES),
    "kto": (KTO, {}, PreferenceDataModule, LABELED),
    "grpo": (GRPO, SAMPLING, PromptDataModule, PREFERENCES),
    "ppo": (PPO, {**SAMPLING, "epochs_per_rollout": 2}, PromptDataModule, PREFERENCES),
}


class Spike(Callback):
    """Makes a gradient infinite before some optimizer steps, counted from 1."""

    def __init__(self, *steps, value=math.inf):
        self.steps, self.value, self.states = steps, value, []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.states.append(trained(module))
        if trainer.global_step + 1 in self.steps:
            next(p for p in module.parameters() if p.grad is not None).grad.view(-1)[-1] = self.value


class Broken:
    """Mixin for a module: returns a non-finite loss in some optimizer steps, counted from 1."""

    steps, value = (2,), math.nan

    def _broken(self, loss):
        return loss * self.value if self.trainer.training and self.trainer.global_step + 1 in self.steps else loss

    def compute_loss(self, batch):
        result = super().compute_loss(batch)
        name = "losses" if hasattr(result, "losses") else "loss"
        return result._replace(**{name: self._broken(getattr(result, name))})

    def compute_logprobs(self, batch, reduction="none", **options):
        result = super().compute_logprobs(batch, reduction, **options)
        return result._replace(logprobs=self._broken(result.logprobs)) if reduction == "sum" else result


def make(kind, options, **more):
    model = make_scorer() if issubclass(kind, RewardModeling) else make_model()
    return kind(model, tokenizer=make_tokenizer(), learning_rate=1e-2, **{**options, **more})


def trained(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def finite(module):
    return all(bool(p.isfinite().all()) for p in module.parameters())


def fit(module, data, options, *callbacks, **more):
    trainer = Trainer(**{**options, "max_steps": 4, "log_every_n_steps": 1, "callbacks": list(callbacks), **more})
    trainer.fit(module, data)
    return trainer


def data_of(kind, rows, **options):
    return kind(rows, **{"batch_size": 2, "shuffle": False, "cache_dir": False, **options})


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(("name", "value"), zip(KINDS, [math.nan, math.inf] * len(KINDS), strict=False))
def test_nonfinite_loss_stops_the_run_before_the_update(name, value, trainer_options):
    kind, options, data, rows = KINDS[name]
    broken = type("Spoilt", (Broken, kind), {"value": value})
    module, spike = make(broken, options), Spike()
    with pytest.raises(
        NonFiniteError, match=r"^Optimizer step 2 is not finite \(loss -?(nan|inf), gradient norm "
    ) as found:
        fit(module, data_of(data, rows), trainer_options, spike)
    assert same(trained(module), spike.states[-1])
    assert not same(spike.states[-1], spike.states[0])
    batch = 0 if name == "ppo" else 1  # PPO takes two steps on each batch
    assert f"batch {batch} of epoch 0: rows {2 * batch + 1}, {2 * batch + 2} of train" in str(found.value)


@pytest.mark.parametrize("name", list(KINDS))
def test_skipped_step_changes_nothing_and_is_counted(name, trainer_options):
    kind, options, data, rows = KINDS[name]
    module, spike = make(kind, options, on_nonfinite="skip", weight_decay=0.5), Spike(2, 3)
    with pytest.warns(UserWarning, match="Optimizer step 2 is not finite .* It is skipped"):
        trainer = fit(module, data_of(data, rows), trainer_options, spike)
    _, before, between, after = spike.states
    assert same(before, between)
    assert same(between, after)
    assert not same(after, trained(module))
    assert finite(module)
    assert trainer.global_step == 4
    assert trainer.callback_metrics["train/skipped_steps"] == module.skipped_steps == 2


def test_nonfinite_error_names_only_affected_micro_batches(trainer_options):
    class Second(FullFineTuning):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if batch_idx == 2 else loss

        def note_loss(self, batch_idx, loss):
            super().note_loss(batch_idx, loss * math.nan if batch_idx == 2 else loss)

    module = make(Second, {})
    with pytest.raises(NonFiniteError, match=r"It is made of batch 2 of epoch 0: rows 5, 6 of train\. The weights"):
        fit(module, data_of(PairDataModule, PAIRS), trainer_options, accumulate_grad_batches=4)


def test_nonfinite_error_names_batches_of_a_custom_loader(trainer_options):
    data = data_of(PairDataModule, PAIRS, tokenizer=make_tokenizer())
    data.setup("fit")
    loader = torch.utils.data.DataLoader(list(data.train_dataloader()), batch_size=None)
    with pytest.raises(NonFiniteError, match=r"gradient norm nan\)\. It is made of batch 0 of epoch 0\."):
        fit(make(FullFineTuning, {}), loader, trainer_options, Spike(1, value=math.nan))


def test_nonfinite_error_distinguishes_nonfinite_weights(trainer_options):
    class Overwritten(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.model.lm_head.weight.data[0, 0] = math.nan

    with pytest.raises(
        NonFiniteError, match=r"weights were not finite before it, the first of them model\.lm_head\.weight"
    ):
        fit(
            make(FullFineTuning, {}, on_nonfinite="skip"),
            data_of(PairDataModule, PAIRS),
            trainer_options,
            Overwritten(),
        )


@pytest.mark.parametrize(("scale", "raises"), [(256.0, False), (1.0, True)])
def test_gradient_overflow_lowers_the_scale_of_the_scaler(scale, raises, trainer_options):
    """A non-finite gradient that the scaler finds is an overflow of scaled gradients, except at a scale of 1."""

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    class Overflowing(FullFineTuning):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return Overflow.apply(loss) if batch_idx == 1 else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    plugin = _pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)
    module, spike = make(Overflowing, {}), Spike()
    options = {**trainer_options, "plugins": [plugin]}
    if raises:
        with pytest.raises(NonFiniteError, match="Optimizer step 2"):
            fit(module, data_of(PairDataModule, PAIRS), options, spike, gradient_clip_val=1.0)
        return
    fit(module, data_of(PairDataModule, PAIRS), options, spike, gradient_clip_val=1.0)
    assert same(spike.states[1], spike.states[2])
    assert not same(spike.states[2], spike.states[3])
    assert scaler.get_scale() == scale / 2
    assert module.skipped_steps == 1


def test_skipped_steps_count_is_resumed(trainer_options, tmp_path):
    module = make(FullFineTuning, {}, on_nonfinite="skip")
    with pytest.warns(UserWarning, match="It is skipped"):
        trainer = fit(module, data_of(PairDataModule, PAIRS), trainer_options, Spike(1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = make(FullFineTuning, {}, on_nonfinite="skip")
    fit(again, data_of(PairDataModule, PAIRS), trainer_options, Spike()).fit(
        again, data_of(PairDataModule, PAIRS), ckpt_path=tmp_path / "a.ckpt", weights_only=True
    )
    assert again.skipped_steps == 1


@pytest.mark.parametrize(
    "options", [{"on_nonfinite": "warn"}, {"learning_rate": math.nan}, {"learning_rate": math.inf}]
)
def test_on_nonfinite_rejects_unknown_values(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        FullFineTuning("some/model", **options)


# ---------------------------------------------------------------- weights


def spoil(model, where="up_proj", value=math.nan):
    next(p for n, p in model.named_parameters() if where in n).data.view(-1)[3] = value
    return model


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("name", ["lora", "reward", "grpo"])
def test_nonfinite_base_is_refused_on_loading(name, value):
    kind, options, _, _ = KINDS[name]
    base = make_scorer() if name == "reward" else make_model()
    module = kind(spoil(base, value=value), tokenizer=make_tokenizer(), **options)
    for _ in range(2):  # also the second time
        with pytest.raises(ModelError, match=r"up_proj.* contains values that aren't finite"):
            module.configure_model()


def test_nonfinite_adapter_is_refused_on_loading(model_folder, tokenizer, tmp_path):
    module = LoRAFineTuning(model_folder, lora={"r": 2})
    module.export(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    next(value for name, value in weights.items() if "lora_B" in name).view(-1)[0] = math.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lora_B.*finite"):
        LoRAFineTuning(model_folder, adapter=str(tmp_path / "adapter")).configure_model()


@pytest.mark.parametrize(("name", "where"), [("full", "up_proj"), ("lora", "lora_B"), ("reward", "score")])
def test_nonfinite_weights_are_neither_exported_nor_checkpointed(name, where, trainer_options, tmp_path):
    kind, options, data, rows = KINDS[name]
    module = make(kind, options)
    trainer = fit(module, data_of(data, rows), trainer_options, max_steps=1)
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    spoil(module.model, where)
    with pytest.raises(ExportError, match=rf"The weight .*{where}.* contains values that aren't finite"):
        module.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(NonFiniteError, match=rf"No checkpoint is written: .*{where}"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()

    saved = torch.load(tmp_path / "good.ckpt", weights_only=True)
    spoilt = next(n for n in saved["state_dict"] if where in n)
    saved["state_dict"][spoilt].view(-1)[0] = math.inf
    with pytest.raises(ModelError, match=rf"checkpoint's weight {spoilt}.*finite"):
        make(kind, options).on_load_checkpoint(saved)
