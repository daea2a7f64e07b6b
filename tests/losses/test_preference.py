"""Preference losses, KTO and the reward model's loss against the formulas of their papers, and custom losses."""

import functools
import math

import pytest
import torch

from lightning_ft.errors import ConfigError
from lightning_ft.losses.kto import kto_kl, kto_loss
from lightning_ft.losses.pairwise import bradley_terry_loss
from lightning_ft.losses.preference import (
    PREFERENCE_LOSSES,
    PreferenceLoss,
    SequenceLogProbs,
    check_preference_losses,
    implicit_rewards,
    preference_loss,
    resolve_preference_losses,
    weighted_preference_loss,
)

CHOSEN = [(-3.0, -4.0, 5), (-20.0, -12.5, 9), (-0.7, -0.7, 1), (-31.0, -30.0, 16)]  # log p, log p_ref, length
REJECTED = [(-9.0, -6.0, 7), (-11.0, -14.0, 4), (-2.3, -1.1, 1), (-25.0, -33.0, 12)]
OPTIONS = {"beta": 0.3, "label_smoothing": 0.2, "gamma": 0.7}


def side(rows, dtype=torch.float64):
    logprobs, reference, lengths = zip(*rows, strict=True)
    return SequenceLogProbs(
        torch.tensor(logprobs, dtype=dtype), torch.tensor(reference, dtype=dtype), torch.tensor(lengths)
    )


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def literal(loss, chosen, rejected, beta, label_smoothing, gamma):
    (c, c_ref, c_len), (r, r_ref, r_len) = chosen, rejected
    gap = (c - c_ref) - (r - r_ref)
    wrong = label_smoothing
    if loss == "sigmoid":
        return -(1 - wrong) * math.log(sigmoid(beta * gap)) - wrong * math.log(sigmoid(-beta * gap))
    if loss == "robust":
        loss = -(1 - wrong) * math.log(sigmoid(beta * gap)) + wrong * math.log(sigmoid(-beta * gap))
        return loss / (1 - 2 * wrong)
    if loss == "hinge":
        return max(0.0, 1 - beta * gap)
    if loss == "ipo":
        return ((c - c_ref) / c_len - (r - r_ref) / r_len - 1 / (2 * beta)) ** 2
    if loss == "simpo":
        reward = beta * (c / c_len - r / r_len) - gamma
        return -(1 - wrong) * math.log(sigmoid(reward)) - wrong * math.log(sigmoid(-reward))
    p, q = math.exp(c / c_len), math.exp(r / r_len)
    if loss == "orpo":
        return -c / c_len - beta * math.log(sigmoid(math.log((p / (1 - p)) / (q / (1 - q)))))
    assert loss == "sft"
    return -c / c_len


def options_of(loss):
    return OPTIONS if loss in ("sigmoid", "robust", "simpo") else {**OPTIONS, "label_smoothing": 0.0}


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_preference_loss_matches_its_paper(loss):
    options = options_of(loss)
    ours = preference_loss(loss, side(CHOSEN), side(REJECTED), **options)
    expected = [literal(loss, c, r, **options) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    assert ours.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_preference_loss_gradients_match_finite_differences(loss):
    lengths = torch.tensor([5, 2])
    reference = torch.tensor([-4.0, -2.0], dtype=torch.float64)
    chosen = torch.tensor([-3.0, -1.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-6.0, -0.5], dtype=torch.float64, requires_grad=True)

    def computed(c, r):
        sides = SequenceLogProbs(c, reference, lengths), SequenceLogProbs(r, reference - 1, lengths)
        return preference_loss(loss, *sides, **options_of(loss))

    assert torch.autograd.gradcheck(computed, (chosen, rejected))


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
@pytest.mark.parametrize("far", [1e4, -1e4])
def test_preference_loss_is_finite_for_huge_log_ratios(loss, far):
    logprobs = torch.tensor([-2e4 + far, -1e-9, 0.0], requires_grad=True)
    lengths = torch.tensor([1, 1, 3])
    chosen = SequenceLogProbs(logprobs, torch.full((3,), -2e4), lengths)
    rejected = SequenceLogProbs(logprobs.flip(0), torch.full((3,), -10.0), lengths)
    for first, second in ((chosen, rejected), (rejected, chosen)):
        losses = preference_loss(loss, first, second, **options_of(loss))
        assert losses.isfinite().all()
        (grad,) = torch.autograd.grad(losses.sum(), logprobs)
        assert grad.isfinite().all()


def test_orpo_is_accurate_for_tiny_and_large_probabilities():
    lengths = torch.tensor([1])
    even = SequenceLogProbs(torch.tensor([0.5], dtype=torch.float64).log(), None, lengths)  # log odds 0
    for average in (-1e-9, -1e-3, -math.log(2), -5.0, -40.0):
        other = SequenceLogProbs(torch.tensor([average], dtype=torch.float64), None, lengths)
        odds = average - math.log(-math.expm1(average))
        for chosen, rejected, sign in ((other, even, 1), (even, other, -1)):
            expected = -chosen.logprobs.item() + math.log1p(math.exp(-sign * odds))
            assert preference_loss("orpo", chosen, rejected, beta=1.0).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_preference_loss_needs_reference_as_declared(loss):
    sides = [side(rows)._replace(ref_logprobs=None) for rows in (CHOSEN, REJECTED)]
    if PREFERENCE_LOSSES[loss].needs_reference:
        with pytest.raises(ConfigError, match="needs ref_logprobs, got None"):
            preference_loss(loss, *sides)
    else:
        with_reference = preference_loss(loss, side(CHOSEN), side(REJECTED))
        torch.testing.assert_close(preference_loss(loss, *sides), with_reference)


def test_weighted_preference_loss_sums_terms():
    sides = side(CHOSEN), side(REJECTED)
    expected = 0.8 * preference_loss("sigmoid", *sides, **OPTIONS) + 0.3 * preference_loss("sft", *sides)
    ours = weighted_preference_loss({"sigmoid": 0.8, "sft": 0.3}, *sides, **OPTIONS)
    torch.testing.assert_close(ours, expected)


def test_robust_without_smoothing_equals_sigmoid():
    sides = side(CHOSEN), side(REJECTED)
    torch.testing.assert_close(preference_loss("robust", *sides), preference_loss("sigmoid", *sides))


def test_sigmoid_equals_bradley_terry_on_implicit_rewards():
    sides = side(CHOSEN), side(REJECTED)
    ours = bradley_terry_loss(*(implicit_rewards(s, beta=0.3) for s in sides))
    torch.testing.assert_close(ours, preference_loss("sigmoid", *sides, beta=0.3))
    assert implicit_rewards(sides[0], beta=0.3).tolist() == pytest.approx([0.3, -2.25, 0.0, -0.3])
    free = sides[0]._replace(ref_logprobs=None)
    assert implicit_rewards(free, beta=2.0).tolist() == pytest.approx([-1.2, -40 / 9, -1.4, -62 / 16])


def test_preference_loss_accepts_no_pairs_and_no_tokens():
    empty = SequenceLogProbs(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    nothing = SequenceLogProbs(torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    for loss in PREFERENCE_LOSSES:
        assert preference_loss(loss, empty, empty).shape == (0,)
        assert preference_loss(loss, nothing, nothing).isfinite().all()


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        ({"dpo": 1.0}, {}, "'dpo': expected one of sigmoid, ipo"),
        ({}, {}, "`loss` is empty"),
        ({"sigmoid": -1.0}, {}, "Weight -1.0 of loss 'sigmoid'"),
        ({"sigmoid": math.nan}, {}, "Weight nan of loss 'sigmoid': expected a finite number of at least 0"),
        ({"sigmoid": math.inf}, {}, "Weight inf of loss 'sigmoid': expected a finite number of at least 0"),
        ({"sigmoid": 0}, {}, "The weights of sigmoid are all 0"),
        ({"sigmoid": 0, "sft": 0.0}, {}, "The weights of sigmoid, sft are all 0"),
        ({"sigmoid": 1.0}, {"beta": 0.0}, "beta=0.0"),
        ({"sigmoid": 1.0}, {"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"robust": 1.0}, {"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"hinge": 1.0, "sft": 1.0}, {"label_smoothing": 0.1}, "has no meaning for hinge, sft"),
    ],
)
def test_preference_loss_rejects_invalid_settings(losses, options, message):
    with pytest.raises(ConfigError, match=message):
        check_preference_losses(losses, **options)
    with pytest.raises(ConfigError, match=message):
        weighted_preference_loss(losses, side(CHOSEN), side(REJECTED), **options)


def test_kto_loss_matches_its_paper():
    logratios, labels, kl = [3.0, -1.0, 0.2, 8.0], [True, False, False, True], 0.6
    expected = []
    for logratio, good in zip(logratios, labels, strict=True):
        value = sigmoid(0.3 * (logratio - kl)) if good else sigmoid(0.3 * (kl - logratio))
        expected.append((1.5 if good else 0.5) * (1 - value))
    x = torch.tensor(logratios, dtype=torch.float64, requires_grad=True)
    arguments = (torch.tensor(labels), torch.tensor(kl, dtype=torch.float64))
    options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    assert kto_loss(x, *arguments, **options).tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, *arguments, **options), x)
    assert kto_loss(torch.tensor([1e5, -1e5]), torch.tensor([True, True]), torch.tensor(0.0)).tolist() == [0, 1]


def test_kto_kl_is_clamped_mean_without_gradient():
    x = torch.tensor([1.0, -0.5, 2.0], requires_grad=True)
    assert kto_kl(x).item() == pytest.approx(2.5 / 3)
    assert not kto_kl(x).requires_grad
    assert kto_kl(-x).item() == 0
    with pytest.raises(ConfigError, match="at least one mismatched"):
        kto_kl(torch.zeros(0))
    with pytest.raises(ConfigError, match="expected bool"):
        kto_loss(x, torch.ones(3), torch.tensor(0.0))


@pytest.mark.parametrize("margins", [None, [0.5, -1.0, 3.0]])
@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_bradley_terry_loss_matches_its_formula(margins, centering):
    chosen, rejected = [2.0, -1.0, 0.0], [1.0, 3.0, 0.0]
    expected = [
        -math.log(sigmoid(c - r - (margins[i] if margins else 0))) + centering * (c + r) ** 2
        for i, (c, r) in enumerate(zip(chosen, rejected, strict=True))
    ]
    x, y = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (chosen, rejected))
    m = None if margins is None else torch.tensor(margins, dtype=torch.float64)
    assert bradley_terry_loss(x, y, m, centering).tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x, y: bradley_terry_loss(x, y, m, centering), (x, y))
    assert bradley_terry_loss(torch.tensor([-1e5]), torch.tensor([1e5])).isfinite()


def margin_loss(chosen, rejected, *, beta):
    return (1 - beta * (chosen.average - rejected.average)).relu()


def test_preference_loss_takes_custom_function(tmp_path):
    sides = side(CHOSEN), side(REJECTED)
    expected = (1 - 0.3 * (sides[0].average - sides[1].average)).relu()
    torch.testing.assert_close(weighted_preference_loss(margin_loss, *sides, beta=0.3), expected)
    mixed = weighted_preference_loss({margin_loss: 2.0, "sft": 0.5}, *sides, beta=0.3)
    torch.testing.assert_close(mixed, 2.0 * expected - 0.5 * sides[0].average)
    file = tmp_path / "losses.py"
    file.write_text(
        "def margin_loss(chosen, rejected, *, beta):\n    return beta * (rejected.average - chosen.average)\n"
    )
    ((by_path, weight),) = resolve_preference_losses(f"{file}:margin_loss")
    assert (by_path.name, by_path.needs_reference, weight) == (f"{file}:margin_loss", True, 1.0)
    torch.testing.assert_close(by_path(*sides, beta=0.3, gamma=1.0), 0.3 * (sides[1].average - sides[0].average))


def test_preference_loss_declares_reference_and_smoothing():
    def smoothed(chosen, rejected, label_smoothing):
        return chosen.logprobs * label_smoothing

    ((loss, _),) = resolve_preference_losses(smoothed)
    assert (loss.needs_reference, loss.takes_label_smoothing) == (True, True)
    ((loss, _),) = resolve_preference_losses(PreferenceLoss(smoothed, needs_reference=False))
    assert (loss.needs_reference, loss.takes_label_smoothing) == (False, False)
    assert loss.name.endswith("smoothed")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("sigmoyd", "Did you mean 'sigmoid'"),
        (3, "expected a name, a function, or a dict"),
        (["sigmoid"], "expected a name, a function, or a dict"),
        (
            lambda chosen, rejected: chosen.logprobs.sum(),
            r"torch.float64 \(\): expected one float per pair",
        ),
        (lambda chosen, rejected: None, "returned NoneType"),
        ("math.pi", "is of type float: expected a function"),
        (lambda chosen, rejected, alpha: chosen.logprobs, "missing a required argument: 'alpha'"),
        ("losses:margin", "can't be imported"),
    ],
)
def test_preference_loss_rejects_invalid_loss(loss, message):
    with pytest.raises(ConfigError, match=message):
        preference_loss(loss, side(CHOSEN), side(REJECTED))


def scaled(chosen, rejected, *, beta, label_smoothing=0.0):
    return beta * (rejected.average - chosen.average) + 0 * label_smoothing


def all_settings(chosen, rejected, **settings):
    return chosen.average * settings["beta"] + settings["gamma"]


def test_partial_keeps_the_settings_it_binds():
    sides = side(CHOSEN), side(REJECTED)
    bound = functools.partial(scaled, beta=3.0)
    torch.testing.assert_close(preference_loss(bound, *sides, beta=0.1), 3.0 * preference_loss(scaled, *sides, beta=1))
    bound = functools.partial(all_settings, beta=3.0)
    torch.testing.assert_close(preference_loss(bound, *sides, gamma=0.7), 3.0 * sides[0].average + 0.7)
    named = PreferenceLoss(functools.partial(scaled, beta=3.0), name="scaled")
    torch.testing.assert_close(preference_loss(named, *sides), 3.0 * preference_loss(scaled, *sides, beta=1))


def test_partial_that_binds_label_smoothing_does_not_take_it():
    ((loss, _),) = resolve_preference_losses(functools.partial(scaled, label_smoothing=0.2))
    assert (loss.takes_label_smoothing, loss.name) == (False, f"partial({__name__}.scaled)")
    with pytest.raises(ConfigError, match=r"label_smoothing=0\.1 has no meaning for partial"):
        check_preference_losses(loss, label_smoothing=0.1)


class Margin(torch.nn.Module):
    """A loss that uses no setting."""

    def forward(self, chosen, rejected):
        return rejected.average - chosen.average


class ScaledMargin(Margin):
    """A loss that uses `beta`."""

    def forward(self, chosen, rejected, *, beta):
        return beta * super().forward(chosen, rejected)


@pytest.mark.parametrize(
    "wrap",
    [lambda module: module, functools.partial, functools.partial(torch.compile, backend="eager")],
    ids=["module", "partial", "compiled"],
)
def test_module_as_loss_gets_the_settings_that_forward_names(wrap):
    sides = side(CHOSEN), side(REJECTED)
    expected = sides[1].average - sides[0].average
    torch.testing.assert_close(preference_loss(wrap(Margin()), *sides), expected)
    torch.testing.assert_close(preference_loss(wrap(ScaledMargin()), *sides, beta=0.3), 0.3 * expected)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda chosen, rejected, alpha: chosen.logprobs, "loss='x' can't be called .* argument: 'alpha'"),
        (lambda chosen: chosen.logprobs, "loss='x' can't be called .* too many positional arguments"),
        (3, "loss='x' is of type int: expected a function"),
    ],
)
def test_preference_loss_checks_signature_at_construction(compute, message):
    with pytest.raises(ConfigError, match=message):
        PreferenceLoss(compute, name="x")


@pytest.mark.parametrize(
    "losses",
    [
        {lambda chosen, rejected: chosen.logprobs: 1.0, lambda chosen, rejected: rejected.logprobs: 1.0},
        {PreferenceLoss(margin_loss, name="x"): 1.0, PreferenceLoss(scaled, name="x"): 1.0},
        {"sigmoid": 1.0, PreferenceLoss(margin_loss, name="sigmoid"): 1.0},
        {functools.partial(scaled, beta=1.0): 1.0, functools.partial(scaled, beta=2.0): 1.0},
    ],
)
def test_losses_of_one_name_are_refused(losses):
    with pytest.raises(ConfigError, match=r"Two losses are named .* Give each a name of its own"):
        resolve_preference_losses(losses)


def test_loss_without_gradient_is_refused_by_name():
    chosen, rejected = side(CHOSEN), side(REJECTED)
    detached = PreferenceLoss(lambda chosen, rejected: (rejected.average - chosen.average).detach(), name="detached")
    assert preference_loss(detached, chosen, rejected).shape == (4,)
    for one in (chosen, rejected):
        one.logprobs.requires_grad_()
    with torch.no_grad():  # validation
        assert preference_loss(detached, chosen, rejected).shape == (4,)
    with pytest.raises(ConfigError, match="Loss 'detached' returned losses without gradient"):
        preference_loss(detached, chosen, rejected)
    with pytest.raises(ConfigError, match="Loss 'detached' returned losses without gradient"):
        weighted_preference_loss({"sigmoid": 1.0, detached: 1.0}, chosen, rejected)


def test_hparams_name_is_a_registered_name_for_registered_losses_only(monkeypatch):
    for name, loss in PREFERENCE_LOSSES.items():
        assert loss.hparams_name == name
    assert PreferenceLoss(margin_loss, name="sigmoid").hparams_name == "custom sigmoid"
    margin = PreferenceLoss(margin_loss, name="margin")
    assert margin.hparams_name == "custom margin"
    monkeypatch.setitem(PREFERENCE_LOSSES, "margin", margin)
    monkeypatch.setitem(PREFERENCE_LOSSES, "unnamed", PreferenceLoss(margin_loss))
    assert [loss.hparams_name for loss, _ in resolve_preference_losses({"margin": 1, "unnamed": 1})] == [
        "margin",
        "unnamed",
    ]
