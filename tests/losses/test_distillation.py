"""Distillation: values and gradients against a literal implementation, in chunks and with every kind of head."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from lightning_ft.errors import ConfigError
from lightning_ft.losses.distillation import (
    check_divergence,
    linear_distillation,
    module_distillation,
    token_divergence,
)
from lightning_ft.losses.logprobs import LogitTransform

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
N, D, D_TEACHER, V = 13, 6, 5, 17


def literal(student, teacher, divergence, beta):
    """Sums over the vocabulary, as the definitions are written."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = beta * p + (1 - beta) * q
    kl = {
        "forward_kl": [(1, p, q)],
        "reverse_kl": [(1, q, p)],
        "jsd": [(beta, p, m), (1 - beta, q, m)],
    }[divergence]
    return sum(share * (a * (a / b).log()).sum(-1) for share, a, b in kl)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": make(N, D).requires_grad_(),
        "weight": make(V, D).requires_grad_(),
        "bias": make(V).requires_grad_(),
        "teacher": make(N, D_TEACHER),
        "teacher_weight": make(V + 3, D_TEACHER),
        "targets": torch.randint(0, V, (N,), generator=generator),
    }


def gradients(loss, tensors):
    inputs = [tensors[name] for name in ("hidden", "weight", "bias")]
    return torch.autograd.grad(3.0 * loss, inputs, retain_graph=True)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("ce_coef", [0.0, 0.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_are_those_of_a_literal_implementation(tensors, divergence, ce_coef, softcap):
    transform, beta = LogitTransform(0.5, softcap), 0.3
    logits = 0.5 * (tensors["hidden"] @ tensors["weight"].T + tensors["bias"])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    teacher = tensors["teacher"] @ tensors["teacher_weight"][:V].T
    expected = literal(logits, teacher, divergence, beta)
    loss = expected.sum() + ce_coef * cross_entropy(logits, tensors["targets"], reduction="sum")

    heads = torch.nn.Linear(D, V).double()
    with torch.no_grad():
        heads.weight.copy_(tensors["weight"])
        heads.bias.copy_(tensors["bias"])
    options = {"transform": transform, "divergence": divergence, "beta": beta, "ce_coef": ce_coef, "chunk": 4}
    arguments = tensors["teacher"], lambda states: states @ tensors["teacher_weight"].T, tensors["targets"]
    found = linear_distillation(tensors["hidden"], tensors["weight"], *arguments, bias=tensors["bias"], **options)
    by_module = module_distillation(tensors["hidden"], heads, *arguments, **options)

    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert by_module.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(found.divergence.double(), expected.detach(), atol=1e-6, rtol=1e-5)
    assert found.agreed.tolist() == (logits.argmax(-1) == teacher.argmax(-1)).tolist() == by_module.agreed.tolist()
    for ours, theirs in zip(gradients(found.loss, tensors), gradients(loss, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    by_module.loss.backward()
    expected_weight = gradients(loss, tensors)[1] / 3.0
    torch.testing.assert_close(heads.weight.grad, expected_weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_token_divergence_is_zero_for_equal_distributions_and_differentiable(divergence):
    logits = torch.randn(5, 9, dtype=torch.float64)
    assert token_divergence(logits, logits + 2.0, divergence).abs().max() < 1e-6
    student = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)

    def loss(values):
        return literal(values, logits, divergence, 0.25).sum()

    (found,) = torch.autograd.grad(token_divergence(student, logits, divergence, beta=0.25).sum(), student)
    (expected,) = torch.autograd.grad(loss(student), student)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_forward_kl_is_that_of_torch_and_ignores_tokens_that_the_teacher_excludes():
    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    expected = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(token_divergence(student, teacher), expected)
    teacher[:, 2] = -math.inf
    assert token_divergence(student, teacher).isfinite().all()
    hidden, weight = torch.eye(4), student.T.contiguous()
    found = linear_distillation(hidden, weight, teacher, lambda states: states, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(found.divergence, token_divergence(student, teacher))


@pytest.mark.parametrize("module", [False, True])
def test_no_positions_give_zero_with_gradients(module):
    hidden, head = torch.randn(0, D, requires_grad=True), torch.nn.Linear(D, V)
    arguments = torch.randn(0, D), lambda states: states, torch.zeros(0, dtype=torch.int64)
    if module:
        found = module_distillation(hidden, head, *arguments)
    else:
        found = linear_distillation(hidden, head.weight, *arguments, bias=head.bias)
    found.loss.backward()
    assert found.loss.item() == 0
    assert head.weight.grad.abs().sum() == 0
    assert found.divergence.shape == found.agreed.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kl", 0.5, 0.0), "divergence='kl': expected one of forward_kl, reverse_kl, jsd"),
        (("jsd", 1.0, 0.0), r"beta=1.0: expected a number between 0 and 1"),
        (("jsd", 0.5, -1.0), r"ce_coef=-1.0: expected a number of at least 0"),
    ],
)
def test_check_divergence_names_the_argument(arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_divergence(*arguments)
