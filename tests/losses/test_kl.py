"""KL estimators and the adaptive KL coefficient."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from lightning_ft.errors import ConfigError
from lightning_ft.losses.kl import AdaptiveKL, k1, k3


def test_k1_and_k3_match_their_definitions():
    policy, reference = [-0.1, -2.0, -5.0], [-0.5, -2.0, -1.0]
    log_p, log_q = (torch.tensor(x, dtype=torch.float64) for x in (policy, reference))
    for p, q, first, third in zip(policy, reference, k1(log_p, log_q), k3(log_p, log_q), strict=True):
        r = math.exp(q) / math.exp(p)  # the note's r is target over sampler
        assert first.item() == pytest.approx(-math.log(r), abs=1e-14)
        assert third.item() == pytest.approx((r - 1) - math.log(r), abs=1e-12)


def test_k1_and_k3_are_unbiased():
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    for estimate in (k1, k3):
        torch.testing.assert_close((p * estimate(p.log(), q.log())).sum(), exact)


def test_k3_is_finite_for_huge_ratios():
    logprobs = torch.tensor([-1e4, -1.0, 0.0], requires_grad=True)
    k3(logprobs, torch.tensor([0.0, -1.0, -1e4])).sum().backward()
    assert logprobs.grad.isfinite().all()
    assert k3(logprobs, torch.tensor([0.0, -1.0, -1e4])).isfinite().all()


def test_k3_gradient_matches_finite_differences():
    logprobs = torch.tensor([-0.3, -4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: k3(x, torch.tensor([-1.0, -0.5], dtype=torch.float64)), logprobs)


def test_adaptive_kl_matches_its_paper():
    kl, beta = AdaptiveKL(coef=0.1, target=2.0, horizon=500), 0.1
    for measured, steps in [(5.0, 64), (2.1, 64), (1.0, 32), (-0.5, 64), (1.95, 8)]:
        error = max(-0.2, min(0.2, (measured - 2.0) / 2.0))
        beta = beta * (1 + error * steps / 500)
        kl = kl.update(measured, steps)
        assert kl.coef == pytest.approx(beta, rel=1e-14)
    assert AdaptiveKL(**json.loads(json.dumps(asdict(kl)))) == kl


def test_adaptive_kl_rejects_invalid_settings():
    for bad in ({"coef": 0.0}, {"target": -1.0}, {"horizon": 0}, {"clip": math.nan}, {"coef": math.inf}):
        with pytest.raises(ConfigError, match=f"AdaptiveKL: {next(iter(bad))}="):
            AdaptiveKL(**bad)
    with pytest.raises(ConfigError, match=r"negative\. Pass a horizon above 20"):
        AdaptiveKL(horizon=20).update(1.0, steps=100)
    with pytest.raises(ConfigError, match="kl=nan"):
        AdaptiveKL().update(math.nan, steps=1)
