"""All policy-gradient modules: steps, metrics, validation, and rewards."""

import math
import random
from functools import partial

import pytest
import torch
from policies import BATCHES, LORA, PREDRAWN, Actor, Policy, by_tokens, make
from predrawn_rollouts import END, draw_prompts, largest_difference, run, weights
from tiny import make_rows

from lightning_ft import GRPO, PPO, PromptDataModule
from lightning_ft._lightning import Trainer, _pl, cli_module
from lightning_ft.data.batches import PromptBatch
from lightning_ft.data.layout import Example
from lightning_ft.errors import ConfigError, RewardError
from lightning_ft.modules import rollout_batch
from lightning_ft.modules.samples import RolloutSamples
from lightning_ft.rollout.protocol import Completion, Rollouts

# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Policy, {"kl_coef": 0.1, "mask_truncated": True}),
        (Policy, {"kl_coef": 0.1, "loss_type": "grpo", "lora": LORA}),
        (Policy, {"kl_coef": 0.1, "loss_type": "rloo", "learning_rate": 0.002}),
        (Actor, {}),
        (Actor, {"lora": LORA, "critic": "adapter"}),
    ],
    ids=["dapo", "grpo-lora", "rloo", "ppo", "ppo-adapter"],
)
def test_policy_steps_do_not_depend_on_micro_batches_and_sharing(kind, options, trainer_options):
    found = []
    ways = [{"micro_batch_size": size} for size in (None, 1, 3, 7)] + [{"share_prompts": False}]
    for way in ways:
        module = make(kind, **{"epochs_per_rollout": 2, "learning_rate": 0.01, **options, **way})
        run(module, BATCHES, trainer_options, rollouts=PREDRAWN)
        found.append(module)
    assert [len(module.results) // 4 for module in found] == [1, 12, 4, 2, 1]
    for other in found[1:]:
        assert len(other.gradients) == 4
        for a, b in zip(other.gradients, found[0].gradients, strict=True):
            assert largest_difference(a, b) < 1e-6 * max(1.0, *(float(g.abs().max()) for g in b.values()))
        assert largest_difference(weights(other), weights(found[0])) < 1e-6


@pytest.mark.parametrize("kind", [Policy, Actor])
def test_steps_of_a_rollout_use_weights_of_their_own_time_where_autocast_keeps_copies(kind, trainer_options):
    """As in a Trainer of Lightning 2.5, whose autocast keeps half-precision copies for the whole training step."""
    found = []
    for keeps in (True, False):

        class Precision(_pl.plugins.MixedPrecision):
            def autocast_context_manager(self, keeps=keeps):
                return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=keeps)

        module = make(kind, epochs_per_rollout=3)
        plugins = [Precision("bf16-mixed", "cpu")]
        run(module, BATCHES[:1], trainer_options, rollouts=PREDRAWN, plugins=plugins)
        found.append(module)
    for a, b in zip(found[0].gradients, found[1].gradients, strict=True):
        assert largest_difference(a, b) == 0


def test_micro_batches_have_a_bounded_number_of_tokens_by_default(trainer_options, monkeypatch):
    found = []
    for limit in (None, 40, 1):
        if limit is not None:
            monkeypatch.setattr(rollout_batch, "TOKENS_PER_PASS", limit)
        module = make(Policy)
        run(module, BATCHES[:1], trainer_options, rollouts=PREDRAWN)
        found.append(module)
    longest = max(len(p) for p in BATCHES[0].input_ids) + 9
    sizes = [max(len(batch.weights) for batch, _ in module.results) for module in found]
    assert sizes[0] == 12
    assert 1 < sizes[1] <= max(1, 40 // (longest - 9))
    assert sizes[2] == 1
    for other in found[1:]:
        assert largest_difference(other.gradients[0], found[0].gradients[0]) < 1e-6


def test_parts_of_a_group_are_of_equal_size_by_default(monkeypatch):
    nothing = torch.zeros(0)
    completion = Example(torch.ones(100, dtype=torch.int64), torch.ones(100, dtype=torch.bool))
    one = rollout_batch.RolloutBatch(
        PromptBatch([], [], {}), [], [torch.ones(30, dtype=torch.int64)], [completion] * 8, 8, nothing, []
    )
    for limit, size in ((130 * 8, 8), (130 * 8 - 1, 4), (130 * 3, 3), (130 * 2, 2), (100, 1), (10**6, 10**6 // 130)):
        monkeypatch.setattr(rollout_batch, "TOKENS_PER_PASS", limit)
        assert one.micro_batch_size() == size


@pytest.mark.parametrize("kind", [Policy, Actor])
def test_steps_per_rollout_cover_all_prompts_per_epoch(kind, trainer_options):
    """Each epoch over a rollout visits all prompts in a new order; a step takes a part of them."""
    module = make(kind, epochs_per_rollout=3, steps_per_rollout=2)
    trainer = run(module, BATCHES, trainer_options, rollouts=PREDRAWN)
    assert trainer.global_step == len(module.gradients) == len(module.results) == 2 * 3 * 2
    sizes = [len(batch.weights) for batch, _ in module.results]
    assert sizes == [6] * 12
    lengths = [len(completion.tokens) for completion in PREDRAWN[0].completions]
    whole = [len(a.logprobs) + len(b.logprobs) for (a, _), (b, _) in zip(*[iter(module.results[:6])] * 2, strict=True)]
    assert whole == [sum(lengths)] * 3
    assert len({tuple(batch.sequences.bincount().tolist()) for batch, _ in module.results[::2]}) > 2
    ratios = [result.ratio for _, result in module.results[:6]]
    torch.testing.assert_close(ratios[0], torch.ones_like(ratios[0]), rtol=0, atol=1e-5)
    assert all((ratio - 1).abs().max() > 1e-3 for ratio in ratios[2:])  # relative to the policy that sampled


def test_max_steps_may_end_within_a_rollout(trainer_options):
    module = make(Policy, epochs_per_rollout=3, steps_per_rollout=2, lr_schedule="linear", warmup_ratio=0.0)
    trainer = run(module, BATCHES, trainer_options, rollouts=PREDRAWN, max_steps=4, max_epochs=5)
    assert trainer.global_step == len(module.gradients) == 4
    assert len(module.samples) == 1
    assert module.lr_schedulers().get_last_lr() == [0.0]


@pytest.mark.parametrize(("schedule", "end"), [("linear", 0.0), ("cosine", 0.0), ("constant", 0.05)])
def test_policy_schedule_spans_all_optimizer_steps(schedule, end, trainer_options):
    rates = []

    class Watched(Policy):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            rates.append(optimizer.param_groups[0]["lr"])

    module = make(Watched, epochs_per_rollout=2, steps_per_rollout=2, lr_schedule=schedule, warmup_ratio=0.25)
    run(module, BATCHES, trainer_options, rollouts=PREDRAWN, max_epochs=2)
    assert len(rates) == 16
    assert rates[:5] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])  # no step of the first rollout has a rate of 0
    assert module.lr_schedulers().get_last_lr()[0] == pytest.approx(end, abs=1e-9)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_policy_clips_gradients(trainer_options):
    norms = []
    for limit in (None, 0.01):
        module = make(Policy, max_grad_norm=limit)
        trainer = run(module, BATCHES[:1], trainer_options, rollouts=PREDRAWN)
        norm = math.sqrt(sum(float((g**2).sum()) for g in module.gradients[0].values()))
        norms.append((norm, float(trainer.callback_metrics["train/grad_norm"])))
    assert norms[0][0] == pytest.approx(norms[0][1], rel=1e-5)
    assert norms[0][0] > 0.05
    assert norms[1][0] == pytest.approx(0.01, rel=1e-4)
    assert norms[1][1] == pytest.approx(norms[0][1], rel=1e-5)  # the logged one is that before clipping


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ({"gradient_clip_val": 0.5}, r"max_grad_norm=0\.5"),
        ({"accumulate_grad_batches": 2}, "2 times larger"),
    ],
)
def test_policy_refuses_accumulation_and_clipping_of_the_trainer(option, instead, trainer_options):
    with pytest.raises(ConfigError, match=instead):
        run(make(Policy), BATCHES, trainer_options, rollouts=PREDRAWN, **option)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [0.1, 0.1, 0.01, 0.01]),  # Lightning's default interval is the epoch
        ({"frequency": 2}, [0.1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        ({"interval": "step"}, [0.1, 0.01]),
        ({"interval": "step", "frequency": 3}, [0.1, 0.1, 0.1, 0.01]),
    ],
)
def test_policy_steps_schedulers_at_their_interval(config, expected, trainer_options):
    rates = []

    class Scheduled(Policy):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **config}}

        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            rates.append(optimizer.param_groups[0]["lr"])

    epochs = -(-len(expected) // len(BATCHES))
    run(make(Scheduled), BATCHES, trainer_options, rollouts=PREDRAWN * epochs, max_epochs=epochs)
    assert rates[: len(expected)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("plateau", "message"),
    [
        (torch.optim.lr_scheduler.ReduceLROnPlateau, "has no metric to monitor when"),
        (partial(cli_module().ReduceLROnPlateau, monitor="val/los"), "monitors 'val/los', which isn't logged when"),
    ],
)
def test_policy_names_a_monitored_metric_that_is_not_logged(plateau, message, trainer_options):
    class Scheduled(Policy):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            return [optimizer], [plateau(optimizer)]

    with pytest.raises(ConfigError, match=rf"ReduceLROnPlateau {message} Scheduled.*train/reward"):
        run(make(Scheduled), BATCHES, trainer_options, rollouts=PREDRAWN)


@pytest.mark.parametrize(("values", "lowered"), [([1.0, 2.0, 3.0], True), ([3.0, 2.0, 1.0], False)])
def test_policy_lowers_its_rate_on_a_plateau_of_the_monitored_metric(values, lowered, trainer_options):
    class Scheduled(Policy):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            scheduler = cli_module().ReduceLROnPlateau(optimizer, "watched", factor=0.5, patience=1)
            return [optimizer], [scheduler]

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.log("watched", values[self.trainer.current_epoch])

    trainer = run(make(Scheduled), BATCHES, trainer_options, rollouts=PREDRAWN * 3, max_epochs=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 if lowered else 0.1)


# ---------------------------------------------------------------- metrics


def with_logprobs(rollout):
    """Rollouts of an engine that returns log-probabilities."""
    return Rollouts(
        tuple(Completion(c.tokens, c.truncated, (-1.0,) * len(c.tokens)) for c in rollout.completions), 0, 0
    )


def other(completion_ids, log_metric, **columns):
    """A reward function that applies to long completions only."""
    log_metric("seen", len(completion_ids))
    return [float(len(ids)) if len(ids) > 4 else None for ids in completion_ids]


def spread(numbers):
    mean = sum(numbers) / len(numbers)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1))


@pytest.mark.parametrize("kind", [Policy, Actor])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_policy_metrics_match_plain_python(kind, mask_truncated, trainer_options):
    options = {"clip_low": 0.01, "clip_high": 0.02, "kl_coef": 0.1, "epochs_per_rollout": 2, "micro_batch_size": 3}
    module = make(
        kind, rewards=[by_tokens, other], reward_weights=[1.0, 0.5], mask_truncated=mask_truncated, lora=LORA, **options
    )
    trainer = run(module, BATCHES[:1], trainer_options, rollouts=[with_logprobs(PREDRAWN[0])])
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    completions = PREDRAWN[0].completions

    first = by_tokens([c.tokens for c in completions])
    second = [float(len(c.tokens)) if len(c.tokens) > 4 else None for c in completions]
    totals = [a + 0.5 * (b or 0.0) for a, b in zip(first, second, strict=True)]
    assert None in second
    for name, numbers in {
        "rewards/by_tokens": first,
        "rewards/other": [b for b in second if b is not None],
        "reward": totals,
    }.items():
        mean, std = spread(numbers)
        assert metrics[f"train/{name}"] == pytest.approx(mean, abs=1e-5), name
        assert metrics[f"train/{name}_std"] == pytest.approx(std, abs=1e-5), name
    assert metrics["train/seen"] == len(completions)
    assert metrics["train/completion_length"] == pytest.approx(spread([len(c.tokens) for c in completions])[0])
    assert metrics["train/truncated_fraction"] == sum(c.truncated for c in completions) / 12
    advantages = [float(a.mean()) for a in module.rollout_batch.advantages]
    assert metrics["train/advantage_std"] == pytest.approx(spread(advantages)[1], abs=1e-5)

    tokens, lost, sums = 0, 0, dict.fromkeys(("entropy", "kl", "low", "high", "policy_kl", "gap", "completion"), 0.0)
    seen = 0
    for number, (batch, _) in enumerate(module.results):
        of_piece = range(number % 4 * 3, number % 4 * 3 + 3)
        lost += sum(mask_truncated and completions[c].truncated for c in of_piece)
        seen += 3
        for t in range(len(batch.logprobs)):
            now, before, ref = (float(x[t]) for x in (batch.logprobs, batch.old_logprobs, batch.ref_logprobs))
            sums["gap"] += abs(before + 1.0)  # relative to the engine's log-probability
            if not batch.mask[t]:
                continue
            tokens += 1
            ratio, gain = math.exp(now - before), float(batch.advantages[t])
            sums["entropy"] += float(batch.entropy[t])
            sums["kl"] += math.exp(ref - now) - 1 - (ref - now)
            sums["completion"] += now - ref
            sums["policy_kl"] += math.exp(now - before) - 1 - (now - before)
            sums["low"] += ratio < 0.99 and gain < 0
            sums["high"] += ratio > 1.02 and gain > 0
    every = sum(len(c.tokens) for c in completions) * 2
    assert (lost > 0) == (tokens < every) == mask_truncated
    expected = {
        "entropy": sums["entropy"] / tokens,
        "kl": sums["kl"] / tokens,
        "policy_kl": sums["policy_kl"] / tokens,
        "clip_fraction/low": sums["low"] / tokens,
        "clip_fraction/high": sums["high"] / tokens,
        "kl_completion": sums["completion"] / (seen - lost),
        "sampling_gap": sums["gap"] / every,
        "loss": sum(float(result.loss.detach()) for _, result in module.results) / 2,
        "grad_norm": sum(math.sqrt(sum(float((g**2).sum()) for g in s.values())) for s in module.gradients) / 2,
    }
    for name, value in expected.items():
        assert metrics[f"train/{name}"] == pytest.approx(value, abs=1e-5), name
        assert value, name
    assert metrics["train/rollout_seconds"] > 0
    assert metrics["train/train_seconds"] > 0
    assert metrics["train/learning_rate"] == pytest.approx(0.05)
    assert "val/reward" not in metrics


def test_engine_without_logprobs_logs_no_sampling_gap(trainer_options):
    trainer = run(make(Policy), BATCHES[:1], trainer_options, rollouts=PREDRAWN)
    assert "train/sampling_gap" not in trainer.callback_metrics
    assert "train/kl" not in trainer.callback_metrics  # full weights without a KL have no reference


def test_sampled_logprobs_match_computed_logprobs(trainer_options):
    """With sampled completions, at a temperature and with top-p filtering."""
    module = make(Policy, temperature=0.7, top_p=0.9, epochs_per_rollout=2, max_new_tokens=12)
    trainer = run(module, BATCHES, trainer_options)
    assert trainer.callback_metrics["train/sampling_gap"] < 1e-5
    lengths = [len(tokens) for tokens in module.samples[0]]
    assert len(module.samples) == 2
    assert max(lengths) <= 12


def test_last_rollout_contains_samples(trainer_options):
    module = make(Policy, rewards=[by_tokens, other])
    assert module.last_rollout is None
    trainer = run(module, BATCHES, trainer_options, rollouts=PREDRAWN)
    record = module.last_rollout
    assert isinstance(record, RolloutSamples)
    assert record.step == trainer.global_step - 1
    assert record.prompts == [prompt for prompt in BATCHES[1].prompts for _ in range(3)]
    assert record.lengths == [len(c.tokens) for c in PREDRAWN[1].completions]
    assert record.truncated == [c.truncated for c in PREDRAWN[1].completions]
    assert record.advantages == pytest.approx(module.advantages[1].tolist())
    kept = [[t for t in c.tokens if t != END] for c in PREDRAWN[1].completions]
    assert record.completions == module.tokenizer.batch_decode(kept)
    assert record.rows()[0]["rewards"].keys() == {"by_tokens", "other"}


# ---------------------------------------------------------------- validation


def drawn(completions, **columns):
    """A random reward from both random states."""
    return [random.random() + float(torch.rand(())) for _ in completions]


class KeepsValidation(_pl.Callback):
    def __init__(self):
        self.metrics = []

    def on_validation_end(self, trainer, module):
        self.metrics.append({n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")})


@pytest.mark.parametrize("kind", [Policy, Actor])
def test_policy_validation_keeps_the_random_state(kind, model_folder, trainer_options):
    found = []
    for validation in (None, make_rows(5)[:3]):
        torch.manual_seed(3)
        random.seed(3)
        module = make(kind, rewards=drawn, epochs_per_rollout=2, steps_per_rollout=2)
        data = PromptDataModule(make_rows(12), validation=validation, batch_size=4, cache_dir=False)
        Trainer(**trainer_options, max_epochs=2, val_check_interval=1).fit(module, data)
        found.append(module)
    assert len(found[0].samples) == 6
    assert found[0].samples == found[1].samples
    ours, theirs = map(weights, found)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_policy_validation_samples_the_same_completions(trainer_options):
    validation = [draw_prompts(3, seed=7), draw_prompts(2, seed=8)]
    kept = KeepsValidation()
    module = make(Policy, learning_rate=1e-12, validation_rewards=other)
    run(module, BATCHES * 2, trainer_options, validation=validation, val_check_interval=1, callbacks=[kept])
    names = {"rewards/by_tokens", "rewards/other", "reward"}
    names |= {f"{name}_std" for name in names} | {"completion_length", "truncated_fraction", "seen"}
    assert kept.metrics[1].keys() == {f"val/{name}" for name in names}
    # The weights have hardly changed, so the samples are the same.
    assert kept.metrics[1:] == [kept.metrics[1]] * 4


def test_validation_rewards_are_not_used_in_training(trainer_options):
    asked = []

    def true_reward(completions, **columns):
        asked.append(len(completions))
        return [-1000.0] * len(completions)

    validation = [draw_prompts(3, seed=7)]
    found = []
    for further in (None, true_reward):
        torch.manual_seed(3)
        module = make(Policy, validation_rewards=further)
        trainer = run(module, BATCHES, trainer_options, validation=validation)
        found.append(weights(module))
    assert asked == [3, 3]  # the sanity check and one validation, with one completion per prompt
    assert trainer.callback_metrics["val/rewards/true_reward"] == -1000
    assert trainer.callback_metrics["val/reward"] == trainer.callback_metrics["val/rewards/by_tokens"]
    assert "train/rewards/true_reward" not in trainer.callback_metrics
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_policy_validates_without_training(trainer_options):
    module = make(Policy)
    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    metrics = Trainer(**trainer_options).validate(module, loader)[0]
    again = Trainer(**trainer_options).test(module, loader)[0]
    assert metrics["val/reward"] == again["test/reward"]
    assert metrics["val/completion_length"] > 1


# ---------------------------------------------------------------- rewards


def test_group_without_rewards_has_zero_gradient(trainer_options):
    def nothing_for_the_second(completion_ids, **columns):
        return [None if 3 <= i < 6 else float(len(ids)) for i, ids in enumerate(completion_ids)]

    for kind in (Policy, Actor):
        module = make(kind, rewards=nothing_for_the_second)
        with pytest.warns(UserWarning, match="No reward applied to 3 of 12"):
            trainer = run(module, BATCHES[:1], trainer_options, rollouts=PREDRAWN)
        assert module.advantages[0][3:6].tolist() == [0.0] * 3
        assert module.advantages[0][:3].any()
        assert all(g.isfinite().all() for step in module.gradients for g in step.values())
        lengths = [len(c.tokens) for i, c in enumerate(PREDRAWN[0].completions) if not 3 <= i < 6]
        assert trainer.callback_metrics["train/reward"] == pytest.approx(sum(lengths) / 9)
        assert module.last_rollout.rows()[4]["reward"] is None


@pytest.mark.filterwarnings("ignore:No reward applied")
def test_policy_without_any_reward_has_zero_gradient(trainer_options):
    for kind in (Policy, Actor):
        module = make(kind, rewards=lambda completions, **columns: [None] * len(completions))
        trainer = run(module, BATCHES[:1], trainer_options, rollouts=PREDRAWN)
        policy = [g for n, g in module.gradients[0].items() if "critic" not in n]
        assert max(float(g.abs().max()) for g in policy) == 0.0
        assert "train/reward" not in trainer.callback_metrics


def test_reward_error_names_the_function(trainer_options):
    def divides(completions, **columns):
        return [1 / (len(text) - len(text)) for text in completions]

    with pytest.raises(RewardError, match=r"'divides' failed on .*ZeroDivisionError"):
        run(make(Policy, rewards=divides), BATCHES, trainer_options, rollouts=PREDRAWN)

    def too_few(completions, **columns):
        return [1.0]

    with pytest.raises(RewardError, match="too_few"):
        run(make(Policy, rewards=too_few), BATCHES, trainer_options, rollouts=PREDRAWN)

    def wants_an_answer(completions, answer):
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=r"wants_an_answer.*answer"):
        run(make(Policy, rewards=wants_an_answer), BATCHES, trainer_options, rollouts=PREDRAWN)


def test_policy_refuses_other_batches(trainer_options):
    with pytest.raises(ConfigError, match="PromptDataModule"):
        run(make(Policy), [torch.zeros(3)], trainer_options, rollouts=PREDRAWN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0"),
        ({"epochs_per_rollout": 0}, "epochs_per_rollout=0"),
        ({"steps_per_rollout": 0}, "steps_per_rollout=0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"num_completions": 0}, "num_completions=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"rollout_batch_size": 0}, "rollout_batch_size=0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"kl_coef": -0.1}, "kl_coef=-0.1"),
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"quantization": "4bit"}, "pass lora=True"),
        ({"lora": {"init_lora_weights": "eva"}}, "eva"),
    ],
)
@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_policy_rejects_invalid_settings(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind("no/such-model", rewards=by_tokens, **options)
