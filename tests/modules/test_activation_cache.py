"""Training with the activation cache: equal weights whether activations are computed or read, or all layers run."""

import pytest
import torch
from frozen import batch_of
from peft import PeftModel
from tiny import make_model, make_rows
from transformers import AutoModelForCausalLM

from lightning_ft import LoRAFineTuning
from lightning_ft._lightning import _pl

ROWS = make_rows(24)


def module_for(model, folder=None, *, lora=None, **options):
    cache = str(folder) if folder is not None and not isinstance(folder, dict) else folder
    settings = {"learning_rate": 1e-2, "top_layers": 1, "activation_cache": cache, **options}
    return LoRAFineTuning(model, lora={"r": 4, **(lora or {})}, **settings)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def same(one, other):
    found = weights(one), weights(other)
    assert found[0].keys() == found[1].keys()
    return all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def close(one, other, *, atol=1e-4):
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=0, atol=atol)


@pytest.fixture
def train(fit, model_folder):
    def run(folder=None, *, lora=None, data=None, module=None, model=model_folder, **options):
        torch.manual_seed(1)
        module = module or module_for(model, folder, lora=lora)
        fit(module, ROWS, data={"shuffle": True, **(data or {})}, **{"max_epochs": 3, **options})
        return module

    return run


def counts(module):
    return module._activations.reader.computed, module._activations.reader.read


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("packing", [True, False])
def test_cold_and_warm_cache_runs_are_equal(train, tmp_path, packing, precision):
    """With dropout in trained layers, so that equal weights need equal random states."""
    options = {"data": {"packing": packing}, "lora": {"lora_dropout": 0.3}, "precision": precision}
    cold, warm = (train(tmp_path / "states", **options) for _ in range(2))
    assert (counts(cold), counts(warm)) == ((24, 48), (0, 72))
    assert same(cold, warm)
    if precision == "32-true":
        close(train(**options), cold)
    untrained = train(max_steps=1, precision=precision, data={"packing": packing})
    assert not same(untrained, cold)


def test_activation_cache_trains_first_step_under_autocast(train, tmp_path):
    """The comparison before the first step must not leave cast weights without gradients in autocast's cache."""
    options = {"max_steps": 1, "precision": "bf16-mixed", "lora": {"init_lora_weights": "orthogonal"}}
    without, cached = (weights(train(folder, **options)) for folder in (None, tmp_path))
    for (
        name,
        value,
    ) in without.items():  # Adam's first step is the sign of the gradient, which depends on rounding near 0
        assert ((value - cached[name]).abs() <= 1e-3).float().mean() >= 0.95


def test_activation_cache_may_be_half_filled(train, tmp_path):
    cold = train(tmp_path / "all")
    train(tmp_path / "half", max_steps=3)  # batches of 4
    mixed = train(tmp_path / "half")
    assert counts(mixed) == (12, 60)
    assert same(cold, mixed)
    assert counts(train(tmp_path / "half")) == (0, 72)


def test_activation_cache_recomputes_lost_files(train, tmp_path):
    cold = train(tmp_path, max_epochs=1)
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    again = train(tmp_path, max_epochs=1)
    assert counts(again) == (24, 0)
    assert same(cold, again)


def test_activation_cache_is_exact_under_gradient_checkpointing(train, tmp_path, model_folder):
    ends = [train(module=module_for(model_folder, tmp_path, gradient_checkpointing=on)) for on in (False, True)]
    close(*ends, atol=1e-6)


def test_activation_cache_supports_accumulation_and_several_layers(train, tmp_path, tokenizer):
    def deep(folder):
        return module_for(make_model(layers=4), folder, tokenizer=tokenizer, top_layers=2)

    ends = [train(module=deep(folder), accumulate_grad_batches=3) for folder in (None, tmp_path, tmp_path)]
    assert same(*ends[1:])
    close(*ends[:2])
    assert ends[1]._activations.reader.frozen.depth == 2


@pytest.mark.parametrize(
    "stop_at", [pytest.param(4, marks=pytest.mark.slow), 6, pytest.param(9, marks=pytest.mark.slow)]
)
def test_activation_cache_run_resumes_exactly(train, fit, model_folder, tmp_path, stop_at):
    """Six steps per epoch: stops within an epoch, at its end, and within the next; with dropout in trained layers."""
    lora = {"lora_dropout": 0.3}
    saver = _pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = train(tmp_path / "states", lora=lora, callbacks=[saver], enable_checkpointing=True)
    torch.manual_seed(2)
    resumed = module_for(model_folder, tmp_path / "states", lora=lora)
    options = {"data": {"shuffle": True}, "max_epochs": 3, "ckpt_path": tmp_path / f"step={stop_at}.ckpt"}
    fit(resumed, ROWS, **options)
    assert counts(resumed) == (0, 72 - 4 * stop_at)
    assert same(whole, resumed)


def test_activation_cache_is_flushed_with_a_checkpoint(train, tmp_path):
    """A run that is killed later can read them when it is resumed."""

    class Stops(_pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path / "states", callbacks=[Stops()])
    assert counts(train(tmp_path / "states", max_epochs=1)) == (12, 12)


def test_continued_adapter_keeps_its_layers(train, model_folder, tmp_path):
    folder = train().export(tmp_path / "adapter")

    def continued(cache):
        return LoRAFineTuning(model_folder, adapter=str(folder), activation_cache=cache, learning_rate=1e-2)

    ends = [train(module=continued(cache)) for cache in (None, str(tmp_path / "states"))]
    close(*ends)
    assert counts(ends[1]) == (24, 48)


@torch.no_grad()
def test_exported_top_layers_load_in_plain_peft(train, model_folder, tmp_path):
    with torch.enable_grad():
        module = train(tmp_path / "states")
    folder = module.export(tmp_path / "adapter")
    ids = torch.randint(4, 300, (2, 12))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), str(folder)).eval()
    assert plain.peft_config["default"].layers_to_transform == [1]
    live = module.model.eval()(ids).logits
    torch.testing.assert_close(plain(ids).logits, live, rtol=1e-4, atol=1e-4)
    with plain.disable_adapter():
        assert (plain(ids).logits - live).abs().max() > 1e-2


def test_validation_bypasses_the_activation_cache(fit, model_folder, tmp_path):
    losses = []
    for folder in (None, tmp_path):
        torch.manual_seed(1)
        module = module_for(model_folder, folder)
        trainer = fit(module, ROWS, data={"validation": ROWS[:6]}, max_epochs=2)
        losses.append(float(trainer.callback_metrics["val/loss"]))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert counts(module) == (24, 24)  # none was cached


def test_activation_cache_works_in_a_custom_loop(model_folder, tmp_path):
    found = []
    for folder in (None, tmp_path / "states", tmp_path / "states"):
        module = module_for(model_folder, folder, lora={"init_lora_weights": "orthogonal"})
        module.configure_model()
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(2):
            for seed in range(3):
                module.training_step(batch_of(seed=seed), 0).backward()
                optimizer.step()
                optimizer.zero_grad()
            module.on_train_epoch_end()
        found.append(module)
    close(*found[:2])
    assert same(*found[1:])
    assert [counts(module) for module in found[1:]] == [(12, 12), (0, 24)]


def test_activation_cache_computes_repeated_rows_once(fit, model_folder, tmp_path):
    module = module_for(model_folder, tmp_path)
    fit(module, ROWS[:4] * 3)
    assert counts(module) == (4, 8)
