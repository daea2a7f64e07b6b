"""The policy loss against a plain one, token by token in Python floats."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from lightning_ft.errors import ConfigError
from lightning_ft.losses.policy import (
    POLICY_LOSSES,
    check_policy_loss,
    cispo_loss,
    clipped_surrogate,
    importance_ratio,
    policy_loss,
    token_weights,
)

LEVELS = ["token", "sequence", "sequence_sum"]
LENGTHS = [3, 1, 7, 5, 2, 6]  # a one-token completion among them
MAX_NEW_TOKENS = 9
NAN = math.nan


def draw(seed=0, spread=0.4, masked=True):
    """A step of six completions; one of them is fully masked, some have masked tokens."""
    generator = torch.Generator().manual_seed(seed)
    n, s = sum(LENGTHS), len(LENGTHS)
    old = -3 * torch.rand(n, generator=generator, dtype=torch.float64)
    step = SimpleNamespace(
        sequences=torch.arange(s).repeat_interleave(torch.tensor(LENGTHS)),
        old=old,
        new=(old + spread * torch.randn(n, generator=generator, dtype=torch.float64)).requires_grad_(),
        ref=old + spread * torch.randn(n, generator=generator, dtype=torch.float64),
        advantages=torch.tensor([1.0, -2.0, 0.5, -0.7, 0.0, 1.5], dtype=torch.float64),
        mask=torch.ones(n, dtype=torch.bool),
    )
    if masked:
        step.mask[step.sequences == 4] = False
        step.mask[[0, 6, 12]] = False
    return step


def lengths_of(step):
    s = len(step.advantages)
    return torch.tensor([int(step.mask[step.sequences == i].sum()) for i in range(s)])


def weights_of(step, loss_type, parts=1):
    lengths = lengths_of(step)
    total = {"total_sequences": len(lengths) * parts, "total_tokens": int(lengths.sum()) * parts}
    return token_weights(loss_type, lengths, max_new_tokens=MAX_NEW_TOKENS, **total).double()


def rows(step):
    """The unmasked tokens of each completion as floats, with its advantage."""
    for i, advantage in enumerate(step.advantages.tolist()):
        here = (step.sequences == i) & step.mask
        yield [
            SimpleNamespace(new=a, old=b, ref=c, advantage=advantage)
            for a, b, c in zip(*(x[here].tolist() for x in (step.new, step.old, step.ref)), strict=True)
        ]


def ratios(tokens, level):
    logs = [t.new - t.old for t in tokens]
    if level == "sequence":
        logs = [sum(logs) / max(1, len(logs))] * len(logs)
    elif level == "sequence_sum":
        logs = [sum(logs)] * len(logs)
    return [math.exp(x) for x in logs]


def plain_tokens(tokens, loss_type, level, low, high, delta, kl_coef, corrected):
    losses, metrics = [], {"clipped_low": 0, "clipped_high": 0, "kl": 0.0, "approx_kl": 0.0}
    for t, ratio in zip(tokens, ratios(tokens, level), strict=True):
        if loss_type == "cispo":
            loss = -min(ratio, high) * t.advantage * t.new
            metrics["clipped_high"] += t.advantage > 0 and ratio > high
        else:
            clipped = min(max(ratio, 1 - low), 1 + high)
            bounded = ratio if delta is None else min(ratio, delta)
            loss = -min(bounded * t.advantage, clipped * t.advantage)
            metrics["clipped_low"] += t.advantage < 0 and ratio < 1 - low
            metrics["clipped_high"] += t.advantage > 0 and ratio > 1 + high
        kl = math.exp(t.ref - t.new) - (t.ref - t.new) - 1
        kl *= ratio if corrected else 1
        metrics["kl"] += kl
        metrics["approx_kl"] += math.exp(t.new - t.old) - (t.new - t.old) - 1
        losses.append(loss + kl_coef * kl)
    return losses, metrics


def plain_step(step, loss_type, *options):
    per_row, total = [], {"clipped_low": 0, "clipped_high": 0, "kl": 0.0, "approx_kl": 0.0}
    for tokens in rows(step):
        losses, metrics = plain_tokens(tokens, loss_type, *options)
        per_row.append(losses)
        total = {name: total[name] + metrics[name] for name in total}
    everything = list(itertools.chain(*per_row))
    if loss_type in ("grpo", "rloo"):
        loss = sum(sum(row) / len(row) for row in per_row if row) / len(per_row)
    elif loss_type == "dr_grpo":
        loss = sum(everything) / (len(per_row) * MAX_NEW_TOKENS)
    else:
        loss = sum(everything) / len(everything)
    return loss, everything, total


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("low", "high", "delta", "kl_coef", "corrected"),
    [(0.2, 0.28, None, 0.0, True), (0.1, 0.1, 1.3, 0.05, True), (0.3, 0.2, 1.5, 0.2, False)],
)
@pytest.mark.parametrize("masked", [True, False])
def test_policy_loss_matches_plain_python(loss_type, level, low, high, delta, kl_coef, corrected, masked):
    step = draw(7, spread=1.2, masked=masked)  # a draw that reaches both bounds at every level
    if loss_type == "cispo":
        high, delta = 1 + high, None
    options = (level, low, high, delta, kl_coef, corrected)
    loss, everything, metrics = plain_step(step, loss_type, *options)
    ours = policy_loss(
        step.new,
        step.old,
        step.advantages,
        step.sequences,
        weights=weights_of(step, loss_type),
        mask=step.mask if masked else None,
        ref_logprobs=step.ref,
        kl_coef=kl_coef,
        loss_type=loss_type,
        level=level,
        clip_low=low,
        clip_high=high,
        delta=delta,
        bias_corrected_kl=corrected,
    )
    assert ours.loss.item() == pytest.approx(loss, rel=2e-7)  # weights are fp32
    assert ours.per_token[step.mask].tolist() == pytest.approx(everything, rel=1e-12)
    assert not ours.per_token[~step.mask].any()
    assert {name: getattr(ours, name).item() for name in metrics} == pytest.approx(metrics, rel=1e-12)
    assert ours.tokens.item() == len(everything)
    assert metrics["clipped_high"]
    assert metrics["clipped_low"] or loss_type == "cispo"
    assert not ours.ratio.requires_grad
    assert not ours.kl.requires_grad


@pytest.mark.parametrize("level", LEVELS)
def test_importance_ratio_matches_plain_python(level):
    step = draw()
    ours = importance_ratio(step.new, step.old, step.sequences, 6, step.mask, level)
    expected = list(itertools.chain(*(ratios(tokens, level) for tokens in rows(step) if tokens)))
    assert ours[step.mask].tolist() == pytest.approx(expected, rel=1e-12)
    everywhere = importance_ratio(step.new, step.old, step.sequences, 6, torch.ones_like(step.mask), level)
    torch.testing.assert_close(importance_ratio(step.new, step.old, step.sequences, 6, None, level), everywhere)


@pytest.mark.parametrize("loss_type", ["dapo", "rloo"])
@pytest.mark.parametrize("level", LEVELS)
def test_policy_loss_gradients_match_finite_differences(loss_type, level):
    step = draw(spread=0.05)  # within the bounds, where the loss is smooth
    weights = weights_of(step, loss_type)

    def loss(logprobs):
        options = {"mask": step.mask, "ref_logprobs": step.ref, "kl_coef": 0.1, "loss_type": loss_type, "level": level}
        return policy_loss(logprobs, step.old, step.advantages, step.sequences, weights=weights, **options).loss

    assert torch.autograd.gradcheck(loss, step.new)


def test_cispo_loss_weights_policy_gradient():
    ratio, advantages = torch.tensor([0.5, 3.0]), torch.tensor([2.0, -1.0])
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    cispo_loss(ratio * (logprobs - logprobs.detach()).exp(), advantages, logprobs, 2.5).sum().backward()
    assert logprobs.grad.tolist() == [-0.5 * 2.0, 2.5]


def test_clipped_surrogate_gives_clipped_tokens_no_gradient():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 9.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    clipped_surrogate(ratio, advantages, 0.2, 0.3, delta=4.0).sum().backward()
    assert ratio.grad.tolist() == [0, 1, -1, 0, 0]


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_policy_loss_without_old_logprobs_has_ratio_1(loss_type):
    step = draw()
    options = {"weights": weights_of(step, loss_type), "mask": step.mask, "loss_type": loss_type}
    ours = policy_loss(step.new, None, step.advantages, step.sequences, **options)
    same = policy_loss(step.new, step.new.detach(), step.advantages, step.sequences, **options)
    torch.testing.assert_close(ours.loss, same.loss, atol=0, rtol=0)
    assert ours.ratio.eq(1).all()
    (grad,) = torch.autograd.grad(ours.loss, step.new)
    expected = -options["weights"][step.sequences] * step.advantages[step.sequences] * step.mask
    if loss_type == "rloo":  # each token's gradient is that of the whole completion
        expected = expected * lengths_of(step)[step.sequences]
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_policy_loss_takes_advantages_per_token(loss_type):
    step = draw()
    options = {"weights": weights_of(step, loss_type), "mask": step.mask, "loss_type": loss_type}
    per_completion = policy_loss(step.new, step.old, step.advantages, step.sequences, **options)
    per_token = policy_loss(step.new, step.old, step.advantages[step.sequences], step.sequences, **options)
    torch.testing.assert_close(per_token.loss, per_completion.loss, atol=0, rtol=0)


def cut(step, first, last):
    """The micro-batch of the completions from `first` to before `last`."""
    here = (step.sequences >= first) & (step.sequences < last)
    part = SimpleNamespace(**{name: getattr(step, name)[here] for name in ("new", "old", "ref", "mask")})
    part.sequences = step.sequences[here] - first
    part.advantages = step.advantages[first:last]
    return part


@pytest.mark.parametrize("loss_type", [name for name in POLICY_LOSSES if name != "bnpo"])
@pytest.mark.parametrize("cuts", [[0, 6], [0, 1, 6], [0, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]])
def test_policy_loss_does_not_depend_on_micro_batches(loss_type, cuts):
    step = draw()
    total = {"total_sequences": 6, "total_tokens": step.mask.sum(), "max_new_tokens": MAX_NEW_TOKENS}
    options = {"kl_coef": 0.1, "loss_type": loss_type, "clip_high": 1.3 if loss_type == "cispo" else 0.3}

    def run(part):
        weights = token_weights(loss_type, lengths_of(part), **total)
        return policy_loss(
            part.new,
            part.old,
            part.advantages,
            part.sequences,
            weights=weights,
            mask=part.mask,
            ref_logprobs=part.ref,
            **options,
        )

    whole = run(step)
    parts = [run(cut(step, first, last)) for first, last in itertools.pairwise(cuts)]
    (expected,) = torch.autograd.grad(whole.loss, step.new)
    (grad,) = torch.autograd.grad(sum(part.loss for part in parts), step.new)
    torch.testing.assert_close(grad, expected, atol=1e-14, rtol=1e-12)
    for name in ("loss", "clipped_low", "clipped_high", "kl", "approx_kl", "tokens"):
        total_over_parts = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(total_over_parts, getattr(whole, name), atol=1e-14, rtol=1e-12)


def test_bnpo_is_mean_of_micro_batch_means():
    step = draw(masked=False)
    losses = []
    for first, last in ((0, 2), (2, 6)):
        part = cut(step, first, last)
        weights = token_weights("bnpo", lengths_of(part), total_sequences=6, total_tokens=24)
        ours = policy_loss(part.new, part.old, part.advantages, part.sequences, weights=weights, loss_type="bnpo")
        losses.append(ours.loss.item())
        assert losses[-1] == pytest.approx((last - first) / 6 * ours.per_token.mean().item(), rel=1e-6)
    assert losses[0] != pytest.approx(losses[1])


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_policy_loss_without_tokens_is_zero_with_zero_gradient(loss_type):
    step = draw()
    step.mask[:] = False
    nothing = cut(step, 0, 0)
    for part in (step, nothing):
        lengths = lengths_of(part)
        weights = token_weights(loss_type, lengths, total_sequences=6, total_tokens=0, max_new_tokens=9)
        assert weights.isfinite().all()
        options = {"weights": weights, "mask": part.mask, "ref_logprobs": part.ref, "kl_coef": 0.1}
        ours = policy_loss(part.new, part.old, part.advantages, part.sequences, loss_type=loss_type, **options)
        (grad,) = torch.autograd.grad(ours.loss, part.new)
        assert ours.loss.item() == 0
        assert ours.tokens.item() == 0
        assert not grad.any()


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
@pytest.mark.parametrize("level", LEVELS)
def test_policy_loss_ignores_masked_values(loss_type, level):
    step, corrupted = draw(), draw()
    for name in ("new", "old", "ref"):
        bad = getattr(corrupted, name).detach().clone()
        bad[~step.mask] = torch.tensor([NAN, math.inf, -math.inf, -1e9, NAN])[: int((~step.mask).sum())].double()
        setattr(corrupted, name, bad.requires_grad_(name == "new"))
    corrupted.advantages = torch.where(torch.arange(6) == 4, NAN, step.advantages)
    results, grads = [], []
    for version in (step, corrupted):
        options = {"weights": weights_of(step, loss_type), "mask": step.mask, "ref_logprobs": version.ref}
        options |= {"kl_coef": 0.1, "loss_type": loss_type, "level": level}
        results.append(policy_loss(version.new, version.old, version.advantages, step.sequences, **options))
        grads.append(torch.autograd.grad(results[-1].loss, version.new)[0])
    torch.testing.assert_close(*grads, atol=0, rtol=0)
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=0, rtol=0)


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
@pytest.mark.parametrize("level", LEVELS)
def test_policy_loss_is_finite_for_huge_log_ratios(loss_type, level):
    logprobs = torch.tensor([-1e4, 0.0, -200.0, 0.0], requires_grad=True)
    old, ref = torch.tensor([0.0, -1e4, 0.0, -300.0]), torch.tensor([0.0, -1e4, -1.0, -1e3])
    options = {"weights": torch.ones(3), "ref_logprobs": ref, "kl_coef": 0.1, "loss_type": loss_type, "level": level}
    for sign in (1.0, -1.0):
        advantages = sign * torch.tensor([1.0, -1.0, 1.0])
        ours = policy_loss(logprobs, old, advantages, torch.tensor([0, 0, 1, 2]), **options)
        (grad,) = torch.autograd.grad(ours.loss, logprobs)
        assert grad.isfinite().all()
        assert all(metric.isfinite().all() for metric in ours)


def test_rloo_uses_sequence_ratio_by_default():
    step = draw()
    options = {"weights": weights_of(step, "rloo"), "mask": step.mask, "loss_type": "rloo"}
    default, whole, token = (
        policy_loss(step.new, step.old, step.advantages, step.sequences, level=level, **options).loss
        for level in (None, "sequence_sum", "token")
    )
    assert default == whole != token


def test_cispo_has_its_own_default_bound():
    options = {"weights": torch.ones(1), "loss_type": "cispo"}
    logprobs, old = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -4.0])
    ours = policy_loss(logprobs, old, torch.ones(1), torch.zeros(2, dtype=torch.int64), **options)
    assert ours.per_token.tolist() == pytest.approx([math.e, 5.0])
    assert ours.clipped_high.item() == 1


def test_policy_loss_accepts_one_token_completions():
    """With as many completions as tokens, advantages per completion are advantages per token."""
    new, old = torch.tensor([-1.0, -2.0]), torch.tensor([-1.1, -1.9])
    weights = token_weights("grpo", torch.ones(2, dtype=torch.int64), total_sequences=2, total_tokens=2)
    token, whole = (
        policy_loss(new, old, torch.tensor([1.0, -1.0]), torch.arange(2), weights=weights, level=level).per_token
        for level in ("token", "sequence_sum")
    )
    torch.testing.assert_close(token, whole)
    with pytest.raises(ConfigError, match="could belong to the completions or to the tokens"):
        policy_loss(new, old, torch.tensor([1.0, -1.0]), torch.zeros(2, dtype=torch.int64), weights=weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type='ppo'"),
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"clip_high": -0.1}, "clip_high=-0.1"),
        ({"clip_high": 0.3, "delta": 1.2}, r"above 1 \+ clip_high = 1.3"),
        ({"loss_type": "cispo", "clip_high": 0.0}, "clip_high=0.0"),
        ({"loss_type": "cispo", "delta": 2.0}, "means nothing to cispo"),
        ({"kl_coef": -0.1}, "kl_coef=-0.1"),
    ],
)
def test_policy_loss_rejects_invalid_settings(options, message):
    step = draw()
    with pytest.raises(ConfigError, match=message):
        check_policy_loss(**{"loss_type": "dapo", **options})
    with pytest.raises(ConfigError, match=message):
        policy_loss(step.new, step.old, step.advantages, step.sequences, weights=torch.ones(6), **options)


def test_policy_loss_rejects_mismatched_inputs():
    step = draw()

    def run(advantages=step.advantages, **options):
        return policy_loss(step.new, step.old, advantages, step.sequences, weights=torch.ones(6), **options)

    with pytest.raises(ConfigError, match="needs ref_logprobs"):
        run(kl_coef=0.1)
    with pytest.raises(ConfigError, match=r"mask is torch.int64 \(24,\), expected torch.bool"):
        run(mask=step.mask.long())
    with pytest.raises(ConfigError, match="mask is"):
        importance_ratio(step.new, step.old, step.sequences, 6, step.mask[:3])
    with pytest.raises(ConfigError, match="level='word'"):
        run(level="word")
    with pytest.raises(ConfigError, match="expected one for each completion"):
        run(advantages=torch.zeros(5))
    with pytest.raises(ConfigError, match="dr_grpo needs max_new_tokens"):
        token_weights("dr_grpo", torch.tensor([3]), total_sequences=1, total_tokens=3)
    with pytest.raises(ConfigError, match="loss_type='ppo'"):
        token_weights("ppo", torch.tensor([3]), total_sequences=1, total_tokens=3)
