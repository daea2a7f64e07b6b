"""Operations that are counted elsewhere aren't counted twice, and counts add up over runs."""

import pytest
import torch
from tiny import make_model

from lightning_ft.evaluation.compute.measurement import ComputeMeasurement
from lightning_ft.models.flops import OperationCounter, counted_separately

A, B = torch.ones(2, 3), torch.ones(3, 5)
PRODUCT = 2 * 2 * 3 * 5


def test_nested_counters_count_separately():
    with OperationCounter() as outer:
        A @ B
        with counted_separately(), OperationCounter() as inner:
            A @ B
            with counted_separately(), OperationCounter() as innermost:
                A @ B
                A @ B
            A @ B
        A @ B
    assert (outer.flops, inner.flops, innermost.flops) == (2 * PRODUCT, 2 * PRODUCT, 2 * PRODUCT)


def test_counter_counts_again_after_an_error():
    with OperationCounter() as counter:
        with pytest.raises(ZeroDivisionError), counted_separately():
            1 / (A @ B)[0, 0].sub(3).item()
        A @ B
    assert counter.flops == PRODUCT


def test_paused_counter_names_no_operators():
    query = torch.ones(1, 1, 4, 8)
    with OperationCounter() as outer, counted_separately(), OperationCounter() as inner:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert (outer.saw_attention, inner.saw_attention) == (False, True)


def test_counter_does_not_change_results():
    model, ids = make_model(), torch.arange(3, 12)[None]
    plain = model(ids).logits
    with OperationCounter(), counted_separately(), OperationCounter():
        assert torch.equal(model(ids).logits, plain)


class Counts(torch.nn.Module):
    """A module that counts some of its operations itself."""

    def __init__(self, already=0):
        super().__init__()
        self.layer = torch.nn.Linear(3, 5)
        self.frozen_flops = already

    def forward(self, batch):
        with counted_separately():
            self.layer(batch)
        self.frozen_flops += 1000
        return self.layer(batch)


def steps(measurement, module, count):
    for _ in range(count):
        with measurement.step(batch_tokens=2):
            module(A).sum().backward()
    return measurement.result().flops


A_STEP = 2 * PRODUCT  # forward, and the weight's gradient


def test_counter_adds_own_counts_of_modules_unscaled():
    module, measurement = Counts(already=10**6), ComputeMeasurement()
    measurement.start(module)
    assert steps(measurement, module, 4) == 4 * A_STEP + 4 * 1000


def test_counter_adds_up_over_runs():
    module, first = Counts(), ComputeMeasurement()
    first.start(module)
    steps(first, module, 2)
    second, later = ComputeMeasurement(), Counts(already=77)
    second.load_state_dict(first.state_dict())
    second.start(later)
    assert steps(second, later, 3) == 5 * A_STEP + 5 * 1000
    second.start(later)  # the same module continues
    assert steps(second, later, 1) == 6 * A_STEP + 6 * 1000
