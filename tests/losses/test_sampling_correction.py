"""Weights that correct a policy gradient for the engine that sampled."""

import math

import pytest
import torch

from lightning_ft.errors import ConfigError
from lightning_ft.losses.policy import policy_loss, token_weights
from lightning_ft.losses.sampling_correction import CORRECTION_MODES, sampling_correction

OLD = [-1.0, -0.2, -2.0, -0.7, -0.1, -3.0]
SAMPLED = [-1.3, -1.9, -2.0, -0.2, -0.1, -2.4]
SEQUENCES = [0, 0, 1, 1, 1, 2]


def literal(mode, largest, smallest, mask):
    """The weights token by token, as the definition says."""
    found = []
    for token, sequence in enumerate(SEQUENCES):
        tokens = [token] if mode.startswith("token") else [t for t, s in enumerate(SEQUENCES) if s == sequence]
        ratio = math.exp(sum(OLD[t] - SAMPLED[t] for t in tokens if mask[t]))
        if mode.endswith("truncate"):
            ratio = max(
                min(ratio, math.inf if largest is None else largest), -math.inf if smallest is None else smallest
            )
        elif (largest is not None and ratio > largest) or (smallest is not None and ratio < smallest):
            ratio = 0.0
        found.append(ratio)
    return found


@pytest.mark.parametrize("mode", CORRECTION_MODES)
@pytest.mark.parametrize(("largest", "smallest"), [(3.0, None), (3.0, 0.9), (None, 0.9), (None, None)])
@pytest.mark.parametrize("masked", [(), (1,), (3, 5)])
def test_sampling_correction_is_the_bounded_ratio(mode, largest, smallest, masked):
    mask = [token not in masked for token in range(6)]
    weights, out_of_bounds = sampling_correction(
        torch.tensor(OLD),
        torch.tensor(SAMPLED),
        torch.tensor(SEQUENCES),
        3,
        torch.tensor(mask),
        mode=mode,
        largest=largest,
        smallest=smallest,
    )
    expected = literal(mode, largest, smallest, mask)
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    unbounded = literal(mode, None, None, mask)
    assert out_of_bounds.tolist() == [abs(a - b) > 1e-12 for a, b in zip(expected, unbounded, strict=True)]


def test_sampling_correction_is_one_without_difference():
    old = torch.tensor(OLD)
    for mode in CORRECTION_MODES:
        weights, out_of_bounds = sampling_correction(old, old, torch.tensor(SEQUENCES), 3, mode=mode)
        assert weights.tolist() == [1.0] * 6
        assert not out_of_bounds.any()


def test_sampling_correction_without_tokens():
    nothing = torch.zeros(0)
    weights, out_of_bounds = sampling_correction(nothing, nothing, nothing.long(), 0)
    assert len(weights) == len(out_of_bounds) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tokens"}, "sampling_correction='tokens'"),
        ({"largest": 0.5}, r"sampling_ratio_max=0\.5"),
        ({"smallest": 1.5}, r"sampling_ratio_min=1\.5"),
        ({"smallest": -0.1}, r"sampling_ratio_min=-0\.1"),
    ],
)
def test_sampling_correction_refuses_wrong_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        sampling_correction(torch.tensor(OLD), torch.tensor(SAMPLED), torch.tensor(SEQUENCES), 3, **options)


def test_policy_loss_weights_the_surrogate_but_not_the_kl():
    logprobs = torch.tensor(OLD, requires_grad=True)
    sequences, reference = torch.tensor(SEQUENCES), torch.tensor(OLD) - 0.3
    weights = token_weights("dapo", torch.tensor([2, 3, 1]), total_sequences=3, total_tokens=6)
    correction = sampling_correction(torch.tensor(OLD), torch.tensor(SAMPLED), sequences, 3, mode="token_mask").weights
    advantages = torch.tensor([1.0, -0.5, 2.0])

    def loss(factor, kl_coef):
        return policy_loss(
            logprobs,
            None,
            advantages,
            sequences,
            weights=weights,
            ref_logprobs=reference,
            kl_coef=kl_coef,
            correction=factor,
        )

    surrogate, with_kl = loss(None, 0.0).per_token, loss(None, 0.2).per_token
    torch.testing.assert_close(loss(correction, 0.2).per_token, correction * surrogate + (with_kl - surrogate))
    (grad,) = torch.autograd.grad(loss(correction, 0.0).loss, logprobs)
    torch.testing.assert_close(grad, -advantages[sequences] * correction / 6)
    assert 0 in correction


def test_correction_makes_the_gradient_unbiased():
    """The expected gradient under the engine's distribution, weighted, is that under the model's own."""
    generator = torch.Generator().manual_seed(0)
    logits, difference = torch.randn(5, generator=generator), 0.4 * torch.randn(5, generator=generator)
    rewards = torch.randn(5, generator=generator)
    model, engine = logits.log_softmax(0), (logits + difference).log_softmax(0)

    def expected_gradient(sampled_from, correct):
        parameters = logits.clone().requires_grad_()
        logprobs, sequences = parameters.log_softmax(0), torch.arange(5)
        factor = sampling_correction(logprobs, engine, sequences, 5, largest=None).weights if correct else None
        weights = sampled_from.exp()  # in place of a mean over samples
        policy_loss(logprobs, None, rewards, sequences, weights=weights, correction=factor).loss.backward()
        return parameters.grad

    right = expected_gradient(model, correct=False)
    torch.testing.assert_close(expected_gradient(engine, correct=True), right, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(expected_gradient(engine, correct=False), right, atol=1e-2)
