"""Supervised training: modes, metrics, evaluation and refusals."""

import math
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_rows, make_tokenizer

from lightning_ft import FullFineTuning, LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.errors import ConfigError, ModelError, TokenizerError

ROWS = make_rows(24)


@pytest.mark.parametrize("kind", [FullFineTuning, LoRAFineTuning])
def test_sft_trains_in_train_mode(fit, model_folder, kind):
    seen = []

    class Watched(kind):
        def training_step(self, batch, batch_idx):
            seen.append(all(m.training for m in self.model.modules()))
            return super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            seen.append(not any(m.training for m in self.model.modules()))
            super().on_validation_epoch_end()

    fit(Watched(model_folder), ROWS, data={"validation": 0.2}, max_epochs=2)
    assert seen
    assert all(seen)


@pytest.mark.parametrize("kind", [FullFineTuning, LoRAFineTuning])
def test_sft_gradient_checkpointing_gives_same_weights(fit, model_folder, kind):
    calls = {}
    trained = {}
    for on in (False, True):
        module = kind(model_folder, gradient_checkpointing=on, learning_rate=1e-2, seed=3)
        module.configure_model()
        count = [0]
        layer = next(m for m in module.modules() if type(m).__name__ == "LlamaAttention")
        layer.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        module.compute_logprobs(
            next(iter(_loader(module))), "sum"
        )  # the probe of the first call comes before the count
        before = count[0]
        fit(module, ROWS, max_steps=2)
        calls[on] = count[0] - before
        trained[on] = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    assert calls[True] == 2 * calls[False]
    for name, value in trained[False].items():
        torch.testing.assert_close(trained[True][name], value, rtol=0, atol=1e-6)


def test_sft_names_the_keys_of_a_dict_that_it_cannot_train_on(model_folder):
    module = LoRAFineTuning(model_folder)
    with pytest.raises(ConfigError, match=r"got a dict with 'q', 'a': .* dicts with 'input_ids', 'attention_mask' and"):
        module.training_step(module.on_after_batch_transfer({"q": ["a"], "a": ["b"]}, 0), 0)


def _loader(module):
    data = PairDataModule(ROWS, tokenizer=module.tokenizer, cache_dir=False)
    data.setup("fit")
    return data.train_dataloader()


def test_sft_learns_the_rows(fit, model_folder):
    module = FullFineTuning(model_folder, learning_rate=1e-2)
    trainer = fit(module, ROWS, max_epochs=40, data={"shuffle": True})
    assert trainer.callback_metrics["train/loss"] < 0.05
    assert module.generate([row["input"] for row in ROWS[:6]]) == [row["output"] for row in ROWS[:6]]


@pytest.mark.parametrize("kind", [FullFineTuning, LoRAFineTuning])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_sft_in_lower_precision_reaches_similar_loss(fit, model_folder, kind, precision):
    losses = []
    for chosen in ("32-true", precision):
        module = kind(model_folder, learning_rate=1e-2)
        trainer = fit(module, ROWS, max_epochs=4, precision=chosen, data={"validation": ROWS[:5]})
        losses.append(float(trainer.callback_metrics["val/loss"]))
        assert module.generate(["where is the parcel 1"])
    assert losses[1] == pytest.approx(losses[0], rel=0.15)


def test_compiled_backbone_gives_same_weights(fit, model_folder):
    weights = []
    for compiled in (
        False,
        {"backend": "eager"},
    ):  # graph capture only, without the compiler backend
        module = FullFineTuning(model_folder, learning_rate=1e-2, torch_compile=compiled)
        fit(module, ROWS, max_steps=3)
        weights.append({name: p.detach().clone() for name, p in module.named_parameters()})
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-6)


def test_sft_logs_its_metrics(fit, model_folder, tmp_path):
    logger = _pl.loggers.CSVLogger(tmp_path)
    module = LoRAFineTuning(model_folder)
    options = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 2}
    trainer = fit(module, ROWS, data={"validation": ROWS[:5]}, **options)
    rows = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    columns = {name: [row[i] for row in rows[1:] if row[i]] for i, name in enumerate(rows[0])}
    for name in ("loss", "token_accuracy", "grad_norm", "learning_rate", "tokens_per_second", "padding_fraction"):
        assert len(columns[f"train/{name}"]) == 12, name
    for name in ("loss", "perplexity", "token_accuracy"):
        assert len(columns[f"val/{name}"]) == 2, name
    assert all(0 <= float(x) < 0.12 for x in columns["train/padding_fraction"])
    tokens = sum(batch.num_tokens for batch in _loader(module))
    assert float(columns["train/tokens_seen"][-1]) == 2 * tokens
    assert max(float(x) for x in columns["train/learning_rate"]) == pytest.approx(2e-4, rel=0.1)
    loss = float(trainer.callback_metrics["val/loss"])
    assert float(trainer.callback_metrics["val/perplexity"]) == pytest.approx(math.exp(loss), rel=1e-5)


def test_unpacked_rows_log_their_padding(fit, model_folder):
    trainer = fit(FullFineTuning(model_folder), ROWS, data={"packing": False})
    assert 0 < trainer.callback_metrics["train/padding_fraction"] < 0.5


def test_validation_loss_is_weighted_by_token(trainer_options, model_folder):
    """The validation loss is the mean over all supervised tokens, whatever the batches are."""
    losses = set()
    for batch_size in (1, 3, 24):
        data = PairDataModule(ROWS, validation=ROWS, batch_size=batch_size, cache_dir=False)
        metrics = Trainer(**trainer_options).validate(FullFineTuning(model_folder), data)[0]
        losses.add(round(metrics["val/loss"], 5))
    assert len(losses) == 1


def test_validation_loaders_are_logged_separately(trainer_options, model_folder):
    module = FullFineTuning(model_folder)
    loaders = [_loader(module), _loader(module)]
    metrics = Trainer(**trainer_options).validate(module, loaders)
    assert metrics[0]["val/loss/dataloader_0"] == pytest.approx(metrics[1]["val/loss/dataloader_1"])


@pytest.mark.parametrize("kind", [FullFineTuning, LoRAFineTuning])
def test_loaded_model_is_used_unchanged(fit, kind):
    model = make_model().eval()
    module = kind(model, tokenizer=make_tokenizer(), learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(module, ROWS)
    base = module.model if kind is FullFineTuning else module.model.get_base_model()
    assert base is model
    changed = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert bool(changed) == (kind is FullFineTuning)


def test_norms_and_biases_do_not_decay(fit, model_folder):
    module = FullFineTuning(model_folder, weight_decay=0.1)
    fit(module, ROWS, max_steps=1)
    groups = module.optimizers().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim < 2 for p in groups[1]["params"])


def test_schedule_without_end_is_refused(fit, model_folder):
    with pytest.raises(ConfigError, match="max_steps or max_epochs"):
        fit(FullFineTuning(model_folder), ROWS, max_epochs=-1)


def test_constant_schedule_needs_no_end(fit, model_folder):
    module = FullFineTuning(model_folder, lr_schedule="constant", warmup_ratio=0.0)
    stop = _pl.callbacks.Timer(duration={"seconds": 1})
    fit(module, ROWS, max_epochs=-1, callbacks=[stop])
    assert module.lr_schedulers().get_last_lr()[0] == 2e-5


class Rates(_pl.callbacks.Callback):
    """Learning rates of each step, by parameter group."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append([group["lr"] for group in optimizer.param_groups])


def test_continued_fit_of_a_trainer_has_a_schedule_of_its_own(fit, trainer_options, model_folder, tmp_path):
    options = {"learning_rate": 1.0, "lr_schedule": "linear", "warmup_ratio": 0.0, "optimizer": "torch.optim.SGD"}
    module, rates = FullFineTuning(model_folder, **options), Rates()
    data = PairDataModule(ROWS[:8], batch_size=2, cache_dir=False)
    saver = _pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = Trainer(**{**trainer_options, "enable_checkpointing": True}, max_epochs=1, callbacks=[rates, saver])
    trainer.fit(module, data)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data)
    assert [rate for rate, *_ in rates.seen] == pytest.approx(
        [1, 3 / 4, 1 / 2, 1 / 4] + [n / 8 for n in range(8, 0, -1)]
    )
    resumed, again = FullFineTuning(model_folder, **options), Rates()
    fit(resumed, ROWS[:8], data={"batch_size": 2}, ckpt_path=tmp_path / "step=6.ckpt", max_epochs=3, callbacks=[again])
    assert again.seen == rates.seen[6:]


def test_added_parameter_groups_follow_the_schedule(fit, model_folder, tmp_path):
    class Unfreeze(_pl.callbacks.BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze([module.model.model.layers[0]])

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group([module.model.model.layers[0]], optimizer, initial_denom_lr=10)

    def run(**settings):
        module, rates = FullFineTuning(model_folder, learning_rate=1e-2), Rates()
        module.configure_model()
        callbacks = [Unfreeze(), rates, *settings.pop("callbacks", [])]
        fit(module, ROWS[:16], max_epochs=3, callbacks=callbacks, **settings)
        return rates.seen, module

    saver = _pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, module = run(callbacks=[saver], enable_checkpointing=True)
    assert [len(rates) for rates in whole] == 4 * [2] + 8 * [3]
    assert all(added == pytest.approx(first / 10) for first, _, added in whole[4:])

    class Halve(_pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                module.hparams["learning_rate"] /= 2  # as LearningRateFinder at a milestone

    halved, _ = run(callbacks=[Halve()])
    assert halved[:8] == whole[:8]
    assert all(
        a == pytest.approx(b / 2) for x, y in zip(halved[8:], whole[8:], strict=True) for a, b in zip(x, y, strict=True)
    )
    rates, resumed = run(ckpt_path=tmp_path / "step=6.ckpt")  # within the epoch that unfreezes
    assert rates == whole[6:]
    assert all(torch.equal(resumed.get_parameter(name), value) for name, value in module.named_parameters())


def test_bad_rows_are_reported_before_weights_are_loaded(fit, tmp_path):
    """The model's folder has a tokenizer but no weights, and yet the rows' error comes first."""
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="row 1"):
        fit(FullFineTuning(str(tmp_path)), [{"input": "a", "output": ""}])


def test_missing_model_is_an_error(fit, tmp_path):
    with pytest.raises(ModelError, match="could not be loaded"):
        fit(FullFineTuning(str(tmp_path / "no"), tokenizer=make_tokenizer()), ROWS)


def test_missing_folder_is_named_with_the_nearest_one(fit, tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(TokenizerError, match=r"no such folder.*base'") as error:
        fit(FullFineTuning(str(tmp_path / "bsae")), ROWS)
    assert "repo_type" not in str(error.value)


@pytest.mark.parametrize("options", [{"barebones": True}, {"log_every_n_steps": 0}])
def test_sft_trains_where_nothing_is_logged(trainer_options, model_folder, options):
    names = ("accelerator", "devices", "default_root_dir") if "barebones" in options else tuple(trainer_options)
    trainer = Trainer(**{name: trainer_options[name] for name in names}, max_epochs=1, **options)
    trainer.fit(LoRAFineTuning(model_folder), PairDataModule(ROWS, batch_size=8, cache_dir=False))
    assert trainer.global_step == 3


def test_sft_trains_at_the_rate_of_its_hparams(fit, model_folder):
    """LearningRateFinder writes it there."""
    module = LoRAFineTuning(model_folder, learning_rate=1e-2, lr_schedule="constant", warmup_ratio=0.0)
    module.hparams["learning_rate"] = 3e-3
    trainer = fit(module, ROWS)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(3e-3)


def test_each_group_has_the_rate_that_an_optimizer_at_the_found_rate_has(fit, model_folder):
    """The rates of LoRA+ aren't all multiples of the learning rate."""
    options = {"optimizer": "loraplus", "lr_schedule": "constant", "warmup_ratio": 0.0}
    module = LoRAFineTuning(model_folder, learning_rate=1e-2, **options)
    finder = _pl.callbacks.LearningRateFinder(min_lr=1e-4, max_lr=1.0, num_training_steps=20)
    trainer = fit(module, ROWS, max_epochs=5, callbacks=[finder], enable_checkpointing=True)
    found = module.hparams["learning_rate"]
    assert found != 1e-2
    fresh = fit(LoRAFineTuning(model_folder, learning_rate=found, **options), ROWS)
    rates = [[group["lr"] for group in each.optimizers[0].param_groups] for each in (trainer, fresh)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)
    assert len(set(rates[0])) > 2


@pytest.mark.parametrize("kind", [FullFineTuning, LoRAFineTuning])
def test_callbacks_see_the_mean_loss_that_is_logged(fit, model_folder, kind):
    seen = []

    class Look(_pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((float(outputs["loss"]), float(trainer.callback_metrics["train/loss"])))

    fit(kind(model_folder), ROWS, callbacks=[Look()])
    assert len(seen) == 6
    for loss, logged in seen:
        assert loss == pytest.approx(logged, rel=1e-5)


def test_quantization_requires_bitsandbytes(fit, model_folder, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(ImportError, match=r"pip install 'lightning-ft\[quant\]'"):
        fit(LoRAFineTuning(model_folder, quantization="4bit"), ROWS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_schedule": "cosinus"}, "expected 'cosine'"),
        ({"warmup_ratio": 1.5}, "expected a share"),
        ({"dtype": "float17"}, "expected 'auto'"),
        ({"optimizer": "sgd"}, "expected 'adamw'"),
        ({"lora": {"rnk": 3}}, "no argument 'rnk'"),
        ({"quantization": "2bit"}, "expected '4bit'"),
        ({"quantization": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}}, "Leave it out: packed bytes"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_sft_rejects_invalid_settings_before_loading(arguments, message):
    with pytest.raises(ConfigError, match=message):
        LoRAFineTuning("no/such-model", **arguments)
