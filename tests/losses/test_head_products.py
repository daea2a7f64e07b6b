"""Products of the head: their dtype, sums in fp32, and what a GPU would compute."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ft.losses import head_products
from lightning_ft.losses.distillation import linear_distillation
from lightning_ft.losses.head_products import HeadGradients, logits_buffer, product_dtype, raw_products
from lightning_ft.losses.logprobs import linear_logprob_sum, linear_logprobs

N, D, V = 300, 16, 64


class Products(TorchDispatchMode):
    """Counts matrix products by the dtype of their factors."""

    def __init__(self):
        super().__init__()
        self.dtypes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            self.dtypes[[a for a in args if isinstance(a, torch.Tensor)][-1].dtype] += 1
        return function(*args, **(kwargs or {}))


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    weight = (0.3 * torch.randn(V, D, generator=generator)).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, V, (N,), generator=generator)


def summed(hidden, weight, bias, targets):
    return linear_logprob_sum(hidden, weight, targets, bias=bias).logprobs / len(targets)


def selected(hidden, weight, bias, targets):
    return linear_logprobs(hidden, weight, targets, bias=bias).logprobs.mean()


def distilled(hidden, weight, bias, targets):
    teacher = torch.randn(N, D, generator=torch.Generator().manual_seed(1))

    def logits(states):
        with torch.autocast("cpu", enabled=False):
            return states @ weight.detach().float().T

    return linear_distillation(hidden, weight, teacher, logits, targets, bias=bias, ce_coef=0.1).loss / len(targets)


@pytest.mark.parametrize("loss", [summed, selected, distilled])
def test_products_run_in_the_dtype_of_autocast(loss, monkeypatch):
    """On a CPU where logits may be rounded; with a stand-in for a GPU everywhere."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", loss is not summed)
    monkeypatch.setattr(head_products, "_wide", lambda weight: False)
    results = []
    for enabled in (False, True):
        hidden, weight, bias, targets = inputs()
        with Products() as products:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                value = loss(hidden, weight, bias, targets)
            value.backward()
        mine = products.dtypes[torch.bfloat16 if enabled else torch.float32]
        other = products.dtypes[torch.float32 if enabled else torch.bfloat16]
        assert mine >= 9  # three products for each of three chunks
        assert other == (3 if enabled and loss is distilled else 0)  # the teacher's
        assert weight.grad.dtype == hidden.grad.dtype == torch.float32
        results.append((value.detach(), hidden.grad, weight.grad, bias.grad))
    for exact, rounded in zip(*results, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


def test_gradients_of_half_precision_weights_are_summed_in_fp32():
    """Rounding each partial sum to bf16 would lose what is less than 1/256 of it."""
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16)
    grads = HeadGradients(hidden, weight, torch.zeros(2, dtype=torch.bfloat16), (True, True, True))
    for start in range(1024):
        grads.add(torch.ones(1, 2), hidden[:1], weight, start)
    _, of_weight, of_bias = grads.results(weight, torch.zeros(2, dtype=torch.bfloat16))
    assert of_weight.dtype == of_bias.dtype == torch.bfloat16
    assert of_weight.flatten().tolist() == of_bias.tolist() == [1024.0, 1024.0]


def test_products_follow_the_weight_without_autocast():
    weight = torch.zeros(3, 2)
    assert product_dtype(weight, rounded=True) == torch.float32
    assert product_dtype(weight.bfloat16()) == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product_dtype(weight, rounded=True) == torch.bfloat16
        assert product_dtype(weight) == torch.float32  # a CPU's products would round the logits
        assert product_dtype(weight.double(), rounded=True) == torch.float64


def test_differences_of_log_probabilities_are_not_rounded_on_a_cpu():
    hidden, weight, bias, targets = inputs()
    expected = linear_logprobs(hidden, weight, targets, bias=bias).logprobs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_logprobs(hidden, weight, targets, bias=bias).logprobs
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_logits_leave_the_product_in_fp32_on_a_gpu(bias, monkeypatch):
    """With tensors without values, as if on a GPU: only dtypes and shapes are computed."""
    monkeypatch.setattr(head_products, "_wide", lambda weight: weight.dtype == torch.bfloat16)
    with torch.device("meta"):
        states, weight = torch.empty(5, D, dtype=torch.bfloat16), torch.empty(V, D, dtype=torch.bfloat16)
        offset = torch.empty(V) if bias else None
        assert logits_buffer(states, weight, 4).shape == (0, V)
        logits = raw_products(states[:4], weight, offset)
        assert (logits.dtype, logits.shape) == (torch.float32, (4, V))
        grads = HeadGradients(states, torch.empty(V, D), offset, (True, True, bias))
        grads.add(logits, states[:4], weight, 0)
    assert grads.weight.dtype == torch.float32
    assert grads.hidden.dtype == torch.bfloat16
