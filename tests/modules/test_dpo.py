"""DPO in a Trainer: losses and metrics against plain Python, weighting within a step, training, and refusals."""

import math
import warnings

import pytest
import torch
from dpo_cases import LABELED, LORA, PAIRS, RecordingDPO, assert_metrics, batches, plain_logprobs, shake
from preference_runs import make_pairs, train, trainable
from tiny import make_model, make_rows, make_tokenizer
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader

from lightning_ft import DPO, KTO, PairDataModule
from lightning_ft._lightning import NAMESPACE, Trainer
from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.errors import ConfigError

# ---------------------------------------------------------------- losses and metrics


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_dpo_loss_and_metrics_match_plain_python(model_folder, lora):
    module = DPO(model_folder, lora=lora, dtype="float32", beta=0.2)
    module.configure_model()
    shake(module)
    batch = batches(PAIRS)[0]
    result = module.compute_loss(batch)
    logps, entropies, _ = plain_logprobs(module.model, batch)
    reference, *_ = plain_logprobs(make_model(), batch)
    rewards = (0.2 * (logps - reference)).detach().view(-1, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    torch.testing.assert_close(result.losses, -logsigmoid(margins), rtol=0, atol=1e-5)
    want = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
        "logps/chosen": logps.detach()[0::2],
        "logps/rejected": logps.detach()[1::2],
        "entropy": entropies,
    }
    assert_metrics(result, want)
    assert 0 < want["rewards/accuracies"].mean() < 1
    result.losses.mean().backward()
    got = {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}
    module.zero_grad()
    (-logsigmoid(0.2 * ((logps - reference)[0::2] - (logps - reference)[1::2]))).mean().backward()
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", ["simpo", "orpo", "sft"])
def test_dpo_rewards_without_reference_are_average_logprobs(model_folder, loss):
    module = DPO(model_folder, loss=loss, beta=2.0)
    module.configure_model()
    batch = batches(PAIRS)[0]
    result = module.compute_loss(batch)
    logps, _, lengths = plain_logprobs(module.model, batch)
    average = (logps / lengths).detach()
    good, bad = average[0::2], average[1::2]
    odds = good - torch.log1p(-good.exp()) - bad + torch.log1p(-bad.exp())
    want = {
        "simpo": -logsigmoid(2.0 * (good - bad) - 0.5),
        "orpo": -good - 2.0 * logsigmoid(odds),
        "sft": -good,
    }
    torch.testing.assert_close(result.losses, want[loss], rtol=0, atol=1e-5)
    torch.testing.assert_close(result.metrics["rewards/margins"], 2.0 * (good - bad), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kinds", [{"sigmoid": 0.8, "sft": 0.2}, {"ipo": 0.5, "hinge": 2.0, "simpo": 0.3}])
def test_dpo_combines_weighted_losses(model_folder, kinds):
    def losses(loss):
        module = DPO(model_folder, loss=loss)
        module.configure_model()
        shake(module)
        return module.compute_loss(batches(PAIRS)[0]).losses

    want = sum(weight * losses(name) for name, weight in kinds.items())
    torch.testing.assert_close(losses(kinds), want, rtol=0, atol=1e-5)


def test_dpo_metrics_are_means_over_steps_and_splits(model_folder, trainer_options):
    module = RecordingDPO(model_folder, lora={"r": 4}, learning_rate=1e-2, beta=0.3)
    data = {"batch_size": 2, "validation": PAIRS[:5]}  # batches of 2, 2 and 1
    trainer = train(module, PAIRS, trainer_options, data=data, accumulate_grad_batches=4)
    assert len(module.step_losses) == 3
    names = {"entropy", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    names |= {"logps/chosen", "logps/rejected"}
    assert module.step_metrics[0].keys() == {f"train/{name}" for name in names}
    assert module.step_losses[0] == pytest.approx(math.log(2))
    assert module.step_metrics[0]["train/rewards/margins"] == 0.0
    with torch.no_grad():
        result = module.compute_loss(batches(PAIRS[:5])[0])
    logged = trainer.callback_metrics
    assert {name for name in logged if name.startswith("val/")} == {f"val/{name}" for name in {*names, "loss"}}
    assert logged["val/loss"] == pytest.approx(float(result.losses.mean()), abs=1e-5)
    for name, values in result.metrics.items():
        assert logged[f"val/{name}"] == pytest.approx(float(values.mean()), abs=1e-4), name
    assert logged["val/rewards/margins"] > 0


def test_clipping_applies_to_mean_gradient_over_examples(model_folder, trainer_options):
    module = RecordingDPO(model_folder, learning_rate=1e-3)
    train(module, PAIRS, trainer_options, gradient_clip_val=1e-3, max_steps=1)
    norm = torch.nn.utils.get_total_norm(list(module.clipped[0].values()))
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0)
    assert torch.nn.utils.get_total_norm(list(module.steps[0].values())) > 1e-2


# ---------------------------------------------------------------- weighting within a step


@pytest.mark.parametrize(
    ("lora", "loss"), [(None, "sigmoid"), ({"r": 4}, "sigmoid"), (None, {"hinge": 1.0, "simpo": 0.5})]
)
def test_dpo_gradients_do_not_depend_on_micro_batches(model_folder, trainer_options, lora, loss):
    def gradients(batch_size, accumulate=1, **options):
        # AdamW amplifies differences in the last bit, so all steps are compared at the same weights
        module = RecordingDPO(model_folder, lora=lora, loss=loss, learning_rate=1e-9, **options)
        module.configure_model()
        shake(module)
        train(module, PAIRS, trainer_options, data={"batch_size": batch_size}, accumulate_grad_batches=accumulate)
        return module.steps

    plain = DPO(model_folder, lora=lora, loss=loss)
    plain.configure_model()
    shake(plain)
    expected = []
    for batch in batches(PAIRS):
        plain.zero_grad()
        plain.compute_loss(batch).losses.mean().backward()
        expected.append({name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None})
    assert len(expected) == 3
    ways = {
        "1x8": gradients(8),
        "8x1": gradients(1, 8),
        "4x2": gradients(2, 4),
        "prompts repeated": gradients(8, share_prompts=False),
        "2x4, prompts repeated": gradients(4, 2, share_prompts=False),
    }
    for way, got in ways.items():
        assert len(got) == 3, way
        for step, (want, have) in enumerate(zip(expected, got, strict=True)):
            assert want.keys() == have.keys()
            worst = max(float((want[key] - have[key]).abs().max()) for key in want)
            assert worst <= 1e-6, f"{way}, step {step}: {worst}"


@pytest.mark.parametrize(("kind", "options"), [(DPO, {}), (DPO, {"loss": "simpo"}), (KTO, {})])
def test_dpo_loss_of_empty_batch_reaches_all_parameters(model_folder, kind, options):
    module = kind(model_folder, **options)
    module.configure_model()
    none = PreferenceBatch([], [], torch.zeros(0, dtype=torch.bool), None, torch.zeros(0, dtype=torch.int64))
    result = module.compute_loss(none)
    assert result.losses.shape == (0,)
    assert result.metrics.keys() == module.compute_loss(batches(LABELED if kind is KTO else PAIRS)[0]).metrics.keys()
    assert all(value.numel() == 0 for value in result.metrics.values())
    result.losses.sum().backward()
    gradients = [parameter.grad for parameter in module.model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)  # DDP waits for all of them


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("kind", "options"),
    [(DPO, {}), (DPO, {"lora": LORA}), (KTO, {"lora": LORA}), (DPO, {"loss": "simpo", "beta": 2.0})],
)
def test_dpo_training_increases_chosen_rewards(model_folder, trainer_options, kind, options):
    rows = LABELED if kind is KTO else PAIRS
    module = kind(model_folder, learning_rate=1e-2 if options.get("lora") else 2e-3, **options)
    trainer = train(module, rows, trainer_options, max_epochs=10, data={"validation": rows})
    metrics = trainer.callback_metrics
    assert metrics["val/rewards/chosen"] > metrics["val/rewards/rejected"] + 0.5
    if rows is PAIRS:
        assert metrics["val/rewards/accuracies"] == 1.0


@pytest.mark.parametrize("disable", [True, False])
def test_dpo_disables_dropout_by_default(model_folder, disable):
    config = make_model(dropout=0.2)
    module = DPO(config, tokenizer=make_tokenizer(), lora={"r": 4, "lora_dropout": 0.5}, disable_dropout=disable)
    module.configure_model()
    shake(module)
    assert all(part.training for part in module.model.modules())
    batch = batches(PAIRS)[0]
    with torch.no_grad():
        first, second = (module.compute_loss(batch) for _ in range(2))
    assert torch.equal(first.losses, second.losses) == disable


def test_dpo_gradient_checkpointing_gives_same_weights(model_folder, trainer_options):
    trained = {}
    for on in (False, True):
        module = DPO(model_folder, lora={"r": 4}, gradient_checkpointing=on, learning_rate=1e-2)
        train(module, PAIRS, trainer_options, max_steps=3)
        trained[on] = trainable(module)
    for name, value in trained[False].items():
        torch.testing.assert_close(trained[True][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_dpo_in_lower_precision_reaches_similar_loss(model_folder, trainer_options, lora, precision):
    losses = []
    for chosen in ("32-true", precision):
        module = RecordingDPO(model_folder, lora=lora, learning_rate=1e-3 if lora is None else 1e-2)
        trainer = train(module, PAIRS, trainer_options, max_epochs=4, precision=chosen, data={"validation": PAIRS})
        losses.append(float(trainer.callback_metrics["val/loss"]))
        assert module.step_losses[0] == pytest.approx(math.log(2), abs=1e-6)  # the reference is as precise as the model
    assert losses[0] < math.log(2) - 0.2
    assert losses[1] == pytest.approx(losses[0], abs=0.1)


def test_dpo_trains_float32_adapter_over_bfloat16_base(model_folder, trainer_options):
    module = RecordingDPO(model_folder, lora={"r": 4}, learning_rate=1e-2, dtype="bfloat16")
    train(module, PAIRS, trainer_options, max_epochs=4)
    assert {parameter.dtype for parameter in module.model.parameters() if parameter.requires_grad} == {torch.float32}
    assert module.step_losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert module.step_losses[-1] < math.log(2) - 0.1


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpo"}, "expected one of"),
        ({"loss": {}}, "`loss` is empty"),
        ({"loss": {"sigmoid": -1.0}}, "Weight -1"),
        ({"beta": 0.0}, "beta"),
        ({"loss": "kto"}, "use lightning_ft.KTO"),
        ({"loss": {"kto": 1.0, "sft": 0.2}}, "use lightning_ft.KTO"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss": {"orpo": 1.0, "sft": 0.2}, "precompute_reference": True}, "no meaning for orpo, sft, which uses no"),
        ({"lora": {"init_lora_weights": "eva"}}, "eva"),
        ({"quantization": "4bit"}, "lora=True"),
    ],
)
def test_dpo_rejects_contradicting_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        DPO("some/model", **options)


def test_dpo_refuses_labeled_completions(model_folder, trainer_options):
    module = DPO(model_folder)
    with pytest.raises(ConfigError, match=r"use lightning_ft\.KTO"):
        train(module, LABELED, trainer_options, max_steps=1)
    assert module.model is None, "weights were loaded first"
    module.configure_model()
    batch = batches(LABELED)[0]
    with pytest.raises(ConfigError, match=r"use lightning_ft\.KTO"):  # of a loader of one's own
        module.compute_loss(batch)


def test_dpo_refuses_other_batches(model_folder, trainer_options):
    module = DPO(model_folder)
    with pytest.raises(ConfigError, match="preferences and got a PairDataModule: pass a PreferenceDataModule"):
        Trainer(**trainer_options, max_steps=1).fit(module, PairDataModule(make_rows(8), cache_dir=False))
    assert module.model is None, "weights were loaded first"
    with pytest.raises(ConfigError, match="PreferenceDataModule"):
        Trainer(**trainer_options, max_steps=1).fit(module, DataLoader([1, 2]))


def test_dpo_plain_loader_matches_datamodule(model_folder, trainer_options):
    made = batches(PAIRS)
    module = RecordingDPO(model_folder, learning_rate=1e-3)
    loader = DataLoader(made, batch_size=None)
    trainer = Trainer(**trainer_options, max_epochs=1)
    trainer.fit(module, loader, loader)
    other = RecordingDPO(model_folder, learning_rate=1e-3)
    train(other, PAIRS, trainer_options, data={"batch_size": 8})
    assert module.step_losses == other.step_losses
    assert "val/rewards/margins" in trainer.callback_metrics


def test_dpo_run_emits_no_warning(model_folder, trainer_options, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FT_NAMESPACE", NAMESPACE)  # another test may have imported the other package
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*does not have many workers|.*litlogger|.*isinstance")
        train(DPO(model_folder, lora=LORA), PAIRS, trainer_options, data={"validation": make_pairs(23)[20:]})


def test_dpo_rejects_losses_without_weights():
    with pytest.raises(ConfigError, match="a dict of names with their weights"):
        DPO("no/such-model", loss=["sigmoid", "sft"])
