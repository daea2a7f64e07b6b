"""DPO in a Trainer: losses and figures by hand, the weighting of a step, training, and what is refused."""

import math
import warnings

import pytest
import torch
from dpo_cases import LABELLED, LORA, PAIRS, RecordingDPO, assert_figures, batches, mismatched, shake, spelt_out
from judged import make_pairs, train, trainable
from tiny import make_model, make_rows, make_tokenizer
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader

from lightning_ft import DPO, PairDataModule
from lightning_ft._lightning import Trainer
from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.errors import ConfigError

# ---------------------------------------------------------------- losses and figures


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_loss_and_figures_by_hand(model_folder, lora):
    module = DPO(model_folder, lora=lora, dtype="float32", beta=0.2)
    module.configure_model()
    shake(module)
    batch = batches(PAIRS)[0]
    judged = module.judge(batch)
    logps, entropies, _ = spelt_out(module.model, batch)
    reference, *_ = spelt_out(make_model(), batch)
    rewards = (0.2 * (logps - reference)).detach().view(-1, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    torch.testing.assert_close(judged.losses, -logsigmoid(margins), rtol=0, atol=1e-5)
    want = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
        "logps/chosen": logps.detach()[0::2],
        "logps/rejected": logps.detach()[1::2],
        "entropy": entropies,
    }
    assert_figures(judged, want)
    assert 0 < want["rewards/accuracies"].mean() < 1
    judged.losses.mean().backward()
    got = {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}
    module.zero_grad()
    (-logsigmoid(0.2 * ((logps - reference)[0::2] - (logps - reference)[1::2]))).mean().backward()
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [LABELLED, PAIRS], ids=["labelled", "pairs"])
def test_kto_by_hand(model_folder, rows):
    module = DPO(model_folder, loss="kto", beta=0.2, desirable_weight=1.2, undesirable_weight=0.7)
    module.configure_model()
    shake(module)
    batch = batches(rows)[0]
    judged = module.judge(batch)
    logps, entropies, _ = spelt_out(module.model, batch)
    reference, *_ = spelt_out(make_model(), batch)
    kl = (spelt_out(module.model, mismatched(batch))[0] - spelt_out(make_model(), mismatched(batch))[0]).mean()
    ratios, kl, good = (logps - reference).detach(), kl.detach().clamp(min=0), batch.labels
    losses = torch.where(
        good, 1.2 * (1 - torch.sigmoid(0.2 * (ratios - kl))), 0.7 * (1 - torch.sigmoid(0.2 * (kl - ratios)))
    )
    margins = 0.2 * (ratios[0::2] - ratios[1::2]) if batch.paired else ratios[:0]
    torch.testing.assert_close(judged.losses, losses.view(len(batch), -1).mean(1), rtol=0, atol=1e-5)
    want = {
        "kl": kl.expand(len(batch)),
        "rewards/chosen": 0.2 * ratios[good],
        "rewards/rejected": 0.2 * ratios[~good],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
        "logps/chosen": logps.detach()[good],
        "logps/rejected": logps.detach()[~good],
        "entropy": entropies,
    }
    assert_figures(judged, want)
    assert good.any()
    assert not good.all()


@pytest.mark.parametrize("loss", ["simpo", "orpo", "sft"])
def test_without_a_reference_rewards_are_average_log_probabilities(model_folder, loss):
    module = DPO(model_folder, loss=loss, beta=2.0)
    module.configure_model()
    batch = batches(PAIRS)[0]
    judged = module.judge(batch)
    logps, _, lengths = spelt_out(module.model, batch)
    average = (logps / lengths).detach()
    good, bad = average[0::2], average[1::2]
    odds = good - torch.log1p(-good.exp()) - bad + torch.log1p(-bad.exp())
    want = {
        "simpo": -logsigmoid(2.0 * (good - bad) - 0.5),
        "orpo": -good - 2.0 * logsigmoid(odds),
        "sft": -good,
    }
    torch.testing.assert_close(judged.losses, want[loss], rtol=0, atol=1e-5)
    torch.testing.assert_close(judged.figures["rewards/margins"], 2.0 * (good - bad), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kinds", [{"sigmoid": 0.8, "sft": 0.2}, {"ipo": 0.5, "hinge": 2.0, "kto": 0.3}])
def test_several_losses_are_weighted(model_folder, kinds):
    def losses(loss):
        module = DPO(model_folder, loss=loss)
        module.configure_model()
        shake(module)
        return module.judge(batches(PAIRS)[0]).losses

    want = sum(weight * losses(name) for name, weight in kinds.items())
    torch.testing.assert_close(losses(kinds), want, rtol=0, atol=1e-5)


def test_what_is_logged_are_means_over_examples_of_whole_steps_and_splits(model_folder, trainer_options):
    module = RecordingDPO(model_folder, lora={"r": 4}, learning_rate=1e-2, beta=0.3)
    data = {"batch_size": 2, "validation": PAIRS[:5]}  # batches of 2, 2 and 1
    trainer = train(module, PAIRS, trainer_options, data=data, accumulate_grad_batches=4)
    assert len(module.step_losses) == 3
    names = {"entropy", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    names |= {"logps/chosen", "logps/rejected"}
    assert module.step_figures[0].keys() == {f"train/{name}" for name in names}
    assert module.step_losses[0] == pytest.approx(math.log(2))
    assert module.step_figures[0]["train/rewards/margins"] == 0.0
    with torch.no_grad():
        judged = module.judge(batches(PAIRS[:5])[0])
    logged = trainer.callback_metrics
    assert {name for name in logged if name.startswith("val/")} == {f"val/{name}" for name in {*names, "loss"}}
    assert logged["val/loss"] == pytest.approx(float(judged.losses.mean()), abs=1e-5)
    for name, values in judged.figures.items():
        assert logged[f"val/{name}"] == pytest.approx(float(values.mean()), abs=1e-4), name
    assert logged["val/rewards/margins"] > 0


def test_a_gradient_that_is_clipped_is_the_mean_over_examples(model_folder, trainer_options):
    module = RecordingDPO(model_folder, learning_rate=1e-3)
    train(module, PAIRS, trainer_options, gradient_clip_val=1e-3, max_steps=1)
    norm = torch.nn.utils.get_total_norm(list(module.clipped[0].values()))
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0)
    assert torch.nn.utils.get_total_norm(list(module.steps[0].values())) > 1e-2


# ---------------------------------------------------------------- the weighting of a step


@pytest.mark.parametrize(
    ("lora", "loss"), [(None, "sigmoid"), ({"r": 4}, "sigmoid"), (None, {"hinge": 1.0, "simpo": 0.5})]
)
def test_every_way_to_make_a_step_of_eight_pairs_gives_the_same_gradients(model_folder, trainer_options, lora, loss):
    def gradients(batch_size, accumulate=1, **options):
        # AdamW makes much of a difference in the last bit: the same weights in all steps
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
        plain.judge(batch).losses.mean().backward()
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


def test_an_empty_batch_takes_part_and_adds_nothing(model_folder):
    for loss in ("sigmoid", "kto", "simpo"):
        module = DPO(model_folder, loss=loss)
        module.configure_model()
        none = PreferenceBatch([], [], torch.zeros(0, dtype=torch.bool), None, torch.zeros(0, dtype=torch.int64))
        judged = module.judge(none)
        assert judged.losses.shape == (0,)
        assert judged.figures.keys() == module.judge(batches(LABELLED if loss == "kto" else PAIRS)[0]).figures.keys()
        assert all(value.numel() == 0 for value in judged.figures.values())
        judged.losses.sum().backward()
        gradients = [parameter.grad for parameter in module.model.parameters()]
        assert all(gradient is not None and not gradient.any() for gradient in gradients)  # DDP waits for all of them


# ---------------------------------------------------------------- KTO's mismatched completions


def test_a_batch_of_one_prompt_has_nothing_to_estimate_the_kl_from(model_folder):
    module = DPO(model_folder, loss="kto")
    module.configure_model()
    shake(module)
    one = batches(LABELLED, 1)[0]
    with pytest.warns(UserWarning, match="batch_size of 2 or more"):
        judged = module.judge(one)
    assert judged.figures["kl"].tolist() == [0.0]
    logratio = judged.figures["rewards/chosen"] / 0.1
    torch.testing.assert_close(judged.losses, torch.sigmoid(-0.1 * logratio))


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("options", [{}, {"lora": LORA}, {"loss": "kto", "lora": LORA}, {"loss": "simpo", "beta": 2.0}])
def test_it_learns_to_prefer(model_folder, trainer_options, options):
    rows = LABELLED if options.get("loss") == "kto" else PAIRS
    module = DPO(model_folder, learning_rate=1e-2 if options.get("lora") else 2e-3, **options)
    trainer = train(module, rows, trainer_options, max_epochs=10, data={"validation": rows})
    figures = trainer.callback_metrics
    assert figures["val/rewards/chosen"] > figures["val/rewards/rejected"] + 0.5
    if rows is PAIRS:
        assert figures["val/rewards/accuracies"] == 1.0


@pytest.mark.parametrize("disable", [True, False])
def test_dropout_is_off_unless_asked_for(model_folder, disable):
    config = make_model(dropout=0.2)
    module = DPO(config, tokenizer=make_tokenizer(), lora={"r": 4, "lora_dropout": 0.5}, disable_dropout=disable)
    module.configure_model()
    shake(module)
    assert all(part.training for part in module.model.modules())
    batch = batches(PAIRS)[0]
    with torch.no_grad():
        first, second = (module.judge(batch) for _ in range(2))
    assert torch.equal(first.losses, second.losses) == disable


def test_gradient_checkpointing_changes_nothing(model_folder, trainer_options):
    trained = {}
    for on in (False, True):
        module = DPO(model_folder, lora={"r": 4}, gradient_checkpointing=on, learning_rate=1e-2)
        train(module, PAIRS, trainer_options, max_steps=3)
        trained[on] = trainable(module)
    for name, value in trained[False].items():
        torch.testing.assert_close(trained[True][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_lower_precision_trains_about_the_same(model_folder, trainer_options, lora, precision):
    losses = []
    for chosen in ("32-true", precision):
        module = RecordingDPO(model_folder, lora=lora, learning_rate=1e-3 if lora is None else 1e-2)
        trainer = train(module, PAIRS, trainer_options, max_epochs=4, precision=chosen, data={"validation": PAIRS})
        losses.append(float(trainer.callback_metrics["val/loss"]))
        assert module.step_losses[0] == pytest.approx(math.log(2), abs=1e-6)  # the reference is as precise as the model
    assert losses[0] < math.log(2) - 0.2
    assert losses[1] == pytest.approx(losses[0], abs=0.1)


def test_a_bfloat16_base_under_an_adapter(model_folder, trainer_options):
    module = RecordingDPO(model_folder, lora={"r": 4}, learning_rate=1e-2, dtype="bfloat16")
    train(module, PAIRS, trainer_options, max_epochs=4)
    assert {parameter.dtype for parameter in module.model.parameters() if parameter.requires_grad} == {torch.float32}
    assert module.step_losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert module.step_losses[-1] < math.log(2) - 0.1


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpo"}, "expected one of"),
        ({"loss": {}}, "No preference loss"),
        ({"loss": {"sigmoid": -1.0}}, "weight"),
        ({"beta": 0.0}, "beta"),
        ({"loss": "kto", "beta": 0.0}, "beta"),
        ({"loss": "kto", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss": "kto", "precompute_reference": True}, "kto compares with completions of other rows"),
        ({"lora": {"init_lora_weights": "eva"}}, "eva"),
        ({"quantization": "4bit"}, "lora=True"),
    ],
)
def test_settings_that_contradict_each_other(options, message):
    with pytest.raises(ConfigError, match=message):
        DPO("some/model", **options)


def test_pairs_for_kto_and_single_completions_for_nothing_else(model_folder, trainer_options):
    train(DPO(model_folder, loss="kto"), PAIRS, trainer_options, max_steps=1)
    for loss in ("sigmoid", {"kto": 1.0, "sft": 0.2}):
        with pytest.raises(ConfigError, match="they need loss='kto'"):
            train(DPO(model_folder, loss=loss), LABELLED, trainer_options, max_steps=1)


def test_other_data_is_refused(model_folder, trainer_options):
    module = DPO(model_folder)
    with pytest.raises(ConfigError, match="DPO trains on preferences, and got TokenBatch: give the Trainer a Pref"):
        Trainer(**trainer_options, max_steps=1).fit(module, PairDataModule(make_rows(8), cache_dir=False))
    with pytest.raises(ConfigError, match="PreferenceDataModule"):
        Trainer(**trainer_options, max_steps=1).fit(module, DataLoader([1, 2]))


def test_batches_of_a_plain_loader(model_folder, trainer_options):
    made = batches(PAIRS)
    module = RecordingDPO(model_folder, learning_rate=1e-3)
    loader = DataLoader(made, batch_size=None)
    trainer = Trainer(**trainer_options, max_epochs=1)
    trainer.fit(module, loader, loader)
    other = RecordingDPO(model_folder, learning_rate=1e-3)
    train(other, PAIRS, trainer_options, data={"batch_size": 8})
    assert module.step_losses == other.step_losses
    assert "val/rewards/margins" in trainer.callback_metrics


def test_a_whole_run_warns_of_nothing(model_folder, trainer_options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*does not have many workers|.*litlogger|.*isinstance")
        train(DPO(model_folder, lora=LORA), PAIRS, trainer_options, data={"validation": make_pairs(23)[20:]})


def test_losses_without_weights_are_refused():
    with pytest.raises(ConfigError, match="a dict of names with their weights"):
        DPO("no/such-model", loss=["sigmoid", "sft"])
