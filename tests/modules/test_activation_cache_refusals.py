"""The activation cache: refusals, warnings, cost, and options."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from frozen import adapted as with_adapters
from frozen import batch_of, build
from tiny import make_model, make_rows

from lightning_ft import LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer
from lightning_ft.callbacks.compute import ComputeMeter
from lightning_ft.cli import FineTuningCLI
from lightning_ft.data.layout import Example, Segment, collate_examples, lay_out
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.logprob_model import LogProbModel
from lightning_ft.modules.activation_cache import GIB, ActivationCache, ActivationReader

ROWS = make_rows(24)


def module_for(model, cache=None, **options):
    settings = {"lora": {"r": 4}, "learning_rate": 1e-2, "top_layers": 1, **options}
    return LoRAFineTuning(model, activation_cache=cache, **settings)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def same(one, other):
    found = weights(other)
    return all(torch.equal(value, found[name]) for name, value in weights(one).items())


def counts(module):
    return module._activations.reader.computed, module._activations.reader.read


# -------------------------------------------------------------------- models


def reader_of(model, folder):
    return ActivationReader(model, ActivationCache(folder), LogProbModel())


def of_first_layer(model, needed):
    """A model whose last layer adds a state of the first layer, from this or an earlier pass."""
    layers, left = model.model.layers, {}
    attention, last = layers[0].self_attn.forward, layers[-1].forward

    def leaves(*args, **kwargs):
        out = attention(*args, **kwargs)
        left["states"] = out[0]
        return out

    def adds(hidden, *args, **kwargs):
        stash = left.pop("states") if needed else left.get("states", 0.0)
        if not needed and torch.is_tensor(stash) and stash.shape != hidden.shape:
            stash = stash.mean()
        return last(hidden, *args, **kwargs) + stash

    layers[0].self_attn.forward, layers[-1].forward = leaves, adds
    return model


def noisy(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out + torch.randn_like(out))
    return model


SHARES_KEYS = {
    "layer_types": ["full_attention"] * 4,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 100,
}
UNFIT = {
    "reads what the first layer left": (lambda: of_first_layer(build("llama"), needed=False), "the output differs"),
    "needs what the first layer left": (lambda: of_first_layer(build("llama"), needed=True), "don't run without"),
    "random": (lambda: noisy(build("llama")), "the output differs"),
    "keys of lower layers": (lambda: build("gemma4_text", **SHARES_KEYS), "don't run without the lower ones"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_activation_cache_detects_unsupported_layers_at_the_first_batch(tmp_path, case):
    make, reason = UNFIT[case]
    reader = reader_of(with_adapters(make(), 1), tmp_path)
    with pytest.raises(ModelError, match=reason), reader.around(batch_of()):
        pass
    assert not any("forward" in vars(layer) for layer in reader.frozen.layers[1:-1])


def test_activation_cache_accepts_dropout_in_trained_layers(tmp_path):
    """With an adapter that has an effect, so that dropout would show."""
    reader = reader_of(with_adapters(build("llama"), 1, lora_dropout=0.5), tmp_path)
    before = torch.random.get_rng_state()
    with reader.around(batch_of(packing=False)):
        assert torch.equal(torch.random.get_rng_state(), before)


def test_activation_cache_refuses_shared_prefixes(tmp_path):
    reader = reader_of(with_adapters(build("llama")), tmp_path)
    with reader.around(batch_of()):
        pass
    prompt = Example(torch.arange(5, 9), torch.zeros(4, dtype=torch.bool))
    answer = Example(torch.arange(20, 23), torch.ones(3, dtype=torch.bool))
    shared = lay_out([[Segment(prompt), Segment(answer, 0, 0), Segment(answer, 0, 1)]])
    with pytest.raises(ModelError, match="share prefixes"), reader.around(shared):
        pass


def test_activation_cache_refuses_dropout_in_the_model_config(fit, tmp_path, tokenizer):
    module = module_for(make_model(dropout=0.1), str(tmp_path), tokenizer=tokenizer)
    with pytest.raises(ModelError, match=r"attention_dropout is 0.1 below the trained layers"):
        fit(module, ROWS)
    assert module.trainer.global_step == 0


def test_activation_cache_refuses_adapters_in_all_layers(fit, model_folder, tmp_path):
    module = module_for(model_folder, str(tmp_path), top_layers=None)
    with pytest.raises(ModelError, match="The lowest of the 2 layers is trained"):
        fit(module, ROWS)
    assert module.trainer.global_step == 0


# -------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation_cache": 3}, "activation_cache=3: expected a folder"),
        ({"activation_cache": {"foldr": "x"}}, "expected a folder, True, or a dict of 'folder' and 'max_gib'"),
        ({"activation_cache": {"max_gib": 0}}, "must be above 0"),
        ({"activation_cache": {"max_gib": -2}}, "must be above 0"),
        ({"activation_cache": {"max_gib": float("nan")}}, "must be above 0"),
        ({"activation_cache": {"max_gib": "much"}}, "max_gib='much' is not a number of GiB"),
        ({"activation_cache": True, "torch_compile": True}, "leave out torch_compile"),
        ({"adapter": "some/adapter", "top_layers": 1}, "leave out top_layers"),
    ],
)
def test_activation_cache_rejects_invalid_options_before_loading(arguments, message):
    with pytest.raises(ConfigError, match=message):
        LoRAFineTuning("no/such-model", **arguments)


def test_activation_cache_accepts_its_options(tmp_path):
    assert [ActivationCache.of(given) for given in (None, False)] == [None, None]
    default = ActivationCache.of(True)
    assert default.folder.name == "lightning_ft_activations"
    assert default.max_gib == 50
    assert ActivationCache.of(str(tmp_path)) == ActivationCache.of(tmp_path) == ActivationCache(tmp_path)
    assert ActivationCache.of({"max_gib": 2}) == ActivationCache(default.folder, 2.0)
    assert ActivationCache.of({"folder": str(tmp_path)}) == ActivationCache(tmp_path, 50.0)


def test_activation_cache_over_its_limit_is_refused_before_training(fit, model_folder, tmp_path):
    module = module_for(model_folder, {"folder": str(tmp_path), "max_gib": 1e-6})
    with pytest.raises(ConfigError, match=r"[\d,]+ bytes of states are more than the 1,073 .* larger max_gib"):
        fit(module, ROWS)
    assert module.trainer.global_step == 0
    assert not list(tmp_path.rglob("*.safetensors"))


def test_activation_cache_size_is_logged_before_training(fit, model_folder, tmp_path, caplog):
    for there in (0, 24):
        caplog.clear()
        with caplog.at_level("INFO"):
            fit(module_for(model_folder, str(tmp_path)), ROWS)
        assert "layers 0 to 0 of 2 are computed once per row" in caplog.text
        assert f"{there} rows are already there" in caplog.text
    assert "tokens of 128 bytes take" in caplog.text
    assert "24 rows were read, 0 were computed" in caplog.text


def batches(tokenizer):
    data = PairDataModule(ROWS, tokenizer=tokenizer, batch_size=4, shuffle=False, cache_dir=False)
    data.setup("fit")
    return list(data.train_dataloader())


def test_full_activation_cache_warns_once_and_trains_exactly(trainer_options, model_folder, tokenizer, tmp_path):
    """Without a DataModule, the number of tokens isn't known in advance."""
    ends = []
    for name, size in (("small", 10_000), ("large", GIB)):
        torch.manual_seed(1)
        module = module_for(model_folder, {"folder": str(tmp_path / name), "max_gib": size / GIB})
        loader = torch.utils.data.DataLoader(batches(tokenizer), batch_size=None)
        trainer = Trainer(**trainer_options, max_epochs=3)
        if name == "small":
            with pytest.warns(UserWarning, match="cache is full") as caught:
                trainer.fit(module, loader)
            assert sum("cache is full" in str(warning.message) for warning in caught) == 1
        else:
            trainer.fit(module, loader)
        ends.append(module)
    small, large = (counts(module) for module in ends)
    assert large == (24, 48)
    assert small[0] + small[1] == 72
    assert 0 < small[1] < 48
    assert same(*ends)


def test_activation_cache_warns_of_rows_that_change_every_epoch(trainer_options, model_folder, tmp_path):
    class Anew(torch.utils.data.IterableDataset):
        drawn = 0

        def __iter__(self):
            for _ in range(2):
                self.drawn += 1
                yield batch_of(seed=self.drawn)

    def train(data):
        module = module_for(model_folder, str(tmp_path), lr_schedule="constant")
        Trainer(**trainer_options, max_epochs=2).fit(module, torch.utils.data.DataLoader(data, batch_size=None))

    with pytest.warns(UserWarning, match="No row of the second epoch appeared in the first"):
        train(Anew())


def test_activation_cache_options_are_json_and_restored(fit, model_folder, tmp_path):
    cache = {"folder": str(tmp_path / "states"), "max_gib": 1}
    module = module_for(model_folder, cache)
    trainer = fit(module, ROWS)
    assert json.loads(json.dumps(dict(module.hparams)))["activation_cache"] == cache
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all("layers.1." in name and "lora_" in name for name in saved["state_dict"])
    again = LoRAFineTuning.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert (again.hparams["top_layers"], again._activations) == (1, ActivationCache.of(cache))
    assert same(module, again)


@pytest.mark.parametrize("given", [lambda path: path, lambda path: {"folder": path}])
def test_activation_cache_path_is_a_string_in_hyperparameters(model_folder, tmp_path, given):
    module = module_for(model_folder, given(tmp_path))
    assert json.loads(json.dumps(dict(module.hparams)))["activation_cache"] in (
        str(tmp_path),
        {"folder": str(tmp_path)},
    )


def test_activation_cache_options_are_read_from_the_command_line(monkeypatch, tmp_path, model_folder):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_checkpointing": False}
    config = {
        "trainer": {**options, "enable_progress_bar": False, "default_root_dir": str(tmp_path)},
        "model": {"class_path": "lightning_ft.LoRAFineTuning", "init_args": {"model": model_folder}},
        "data": {"class_path": "lightning_ft.PairDataModule", "init_args": {"train": str(tmp_path / "rows.jsonl")}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    caught = ["--model.activation_cache", str(tmp_path / "states"), "--model.top_layers", "1"]
    monkeypatch.setattr(sys, "argv", ["lightning-ft", "fit", "--config", str(tmp_path / "run.yaml"), *caught])
    cli = FineTuningCLI()
    assert counts(cli.model) == (24, 24)
    assert cli.model._activations == ActivationCache(Path(tmp_path / "states"))


# -------------------------------------------------------------------- cost


def test_activation_cache_flops_count_frozen_layers_once_per_row(trainer_options, model_folder, tmp_path):
    spent = []
    for cache in (str(tmp_path), str(tmp_path), None):
        meter, module = ComputeMeter(every_n_steps=1), module_for(model_folder, cache)
        data = PairDataModule(ROWS, batch_size=4, shuffle=False, cache_dir=False)
        Trainer(**trainer_options, max_epochs=3, callbacks=[meter]).fit(module, data)
        spent.append((meter.result.flops, module.frozen_flops))
    (cold, once), (warm, nothing), (every, none) = spent
    assert nothing == none == 0
    assert once > 0
    assert cold == pytest.approx(warm + once, rel=1e-6)
    assert cold < every


def test_activation_cache_flops_of_one_row(tmp_path):
    model = with_adapters(make_model(layers=3), 1)
    reader = reader_of(model, tmp_path)
    length = 20
    for seed in (0, 1):  # the second one's are known from the first's
        ids = torch.randint(0, 400, (length,), generator=torch.Generator().manual_seed(seed))
        with reader.around(collate_examples([Example(ids, torch.arange(length) > 9)])):
            pass
        weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64  # q and o, k and v, and the MLP
        a_layer = 2 * weights * length + 2 * (2 * 32 * length**2)  # scores, and their product with the values
        assert reader.flops == pytest.approx((seed + 1) * 2 * a_layer, rel=0.02)
