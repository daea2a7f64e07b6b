import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.savings.arithmetic import ArmRecords, Prices, token_savings
from lightning_ft.evaluation.savings.metric import TokenSavingsMetric

PRICES = Prices(0.15, 0.6, 0.015, training=5, currency="USD", date="2026-01-31")
OPTIONS = {"prices": PRICES, "resamples": 199, "margin": 0.05}


def make_arm(tokens, seed):
    draw, n = random.Random(seed), 60
    return ArmRecords(
        ids=tuple(f"r{i}" for i in range(n)),
        input_tokens=tuple(draw.randint(tokens, tokens + 20) for _ in range(n)),
        output_tokens=tuple(draw.randint(5, 9) for _ in range(n)),
        scores=tuple(draw.random() for _ in range(n)),
        truncated=tuple(draw.random() < 0.1 for _ in range(n)),
        cached_prefix_tokens=(tokens // 2,) * n,
        clusters=tuple(f"c{i // 3}" for i in range(n)),
    )


ARMS = {"prompted": make_arm(500, 0), "tuned": make_arm(50, 1), "untuned": make_arm(50, 2)}


def feed(metric, which, size=7):
    """Add the requests with the indices `which` to each arm, in batches."""
    for name, arm in ARMS.items():
        for start in range(0, len(which), size):
            rows = which[start : start + size]

            def take(values, rows=rows):
                return [values[i] for i in rows]

            metric.update(
                name,
                take(arm.ids),
                take(arm.input_tokens),
                take(arm.output_tokens),
                take(arm.scores),
                truncated=take(arm.truncated),
                cached_prefix_tokens=take(arm.cached_prefix_tokens),
                clusters=take(arm.clusters),
            )


def expected():
    return token_savings(ARMS["prompted"], ARMS["tuned"], ARMS["untuned"], **OPTIONS).metrics()


def check(metric):
    computed = {name: float(value) for name, value in metric.compute().items()}
    assert computed == pytest.approx(expected(), rel=1e-6)


def test_metric_matches_the_function_for_batches_in_any_order():
    metric = TokenSavingsMetric(**OPTIONS)
    feed(metric, random.Random(3).sample(range(60), 60))
    check(metric)
    assert metric.result().metrics() == pytest.approx(expected(), rel=1e-12)
    metric.reset()
    with pytest.raises(SavingsError, match="No requests were added to the prompted and the tuned arm"):
        metric.compute()


@pytest.mark.parametrize("array", [torch.tensor, np.array])
def test_metric_takes_tensors_and_arrays(array):
    metric = TokenSavingsMetric(**OPTIONS)
    for name, arm in ARMS.items():
        columns = (arm.input_tokens, arm.output_tokens, arm.scores, arm.truncated, arm.cached_prefix_tokens)
        *numbers, _, truncated, cached = map(array, columns)
        scores = array(arm.scores, dtype=torch.float64 if array is torch.tensor else np.float64)
        metric.update(
            name, arm.ids, *numbers, scores, truncated=truncated, cached_prefix_tokens=cached, clusters=arm.clusters
        )
    check(metric)


def two_ranks(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    metric = TokenSavingsMetric(**OPTIONS)
    feed(metric, list(range(rank * 25, 25 + rank * 35)))  # 25 requests and 35
    check(metric)
    assert metric.result().n == 60
    dist.destroy_process_group()


def test_metric_combines_ranks(tmp_path):
    mp.start_processes(two_ranks, (tmp_path / "store",), nprocs=2, start_method="fork")


def test_metric_refuses_invalid_updates():
    metric = TokenSavingsMetric()
    with pytest.raises(SavingsError, match="arm='other'"):
        metric.update("other", ["a"], [1], [1], [1.0])
    with pytest.raises(SavingsError, match="'a' has a score of nan"):
        metric.update("tuned", ["a"], [1], [1], [float("nan")])
    with pytest.raises(SavingsError, match="margin=2"):
        TokenSavingsMetric(margin=2)
    for _ in range(2):
        metric.update("prompted", ["a"], [1], [1], [1.0])
    metric.update("tuned", ["a"], [1], [1], [1.0])
    with pytest.raises(SavingsError, match="more than once"):
        metric.compute()


def test_metric_states_and_values_have_torchmetrics_types():
    metric = TokenSavingsMetric(**OPTIONS)
    feed(metric, list(range(60)))
    state = metric.metric_state
    assert all(isinstance(value, list) for value in state.values())
    assert all(isinstance(value, torch.Tensor) for value in metric.compute().values())
