"""Assignment of rows to batches."""

from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from lightning_ft.data.sampler import BatchPlan, mixed_epoch
from lightning_ft.errors import ConfigError


def plans(sizes=(23,), weights=(1.0,), world_size=1, batch_size=4, shuffle=True, epoch=0, seed=0):
    made = [
        BatchPlan(sizes, weights, batch_size=batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for plan in made:
        plan.set_epoch(epoch)
    return made


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 7, 8, 23, 24, 25, 64])
def test_sampler_yields_every_row_once_and_equal_numbers_of_batches(rows, world_size):
    made = plans((rows,), world_size=world_size)
    batches = [list(plan) for plan in made]
    assert {len(b) for b in batches} == {len(made[0])}
    seen = Counter(row for b in batches for batch in b for row in batch)
    assert seen == Counter(range(rows))
    assert all(len(batch) <= 4 for b in batches for batch in b)


def test_sampler_on_two_ranks_matches_one_rank_with_twice_the_batch():
    (one,) = plans(batch_size=8)
    two = plans(batch_size=4, world_size=2)
    assert [sorted(b) for b in one] == [sorted([*a, *b]) for a, b in zip(*two, strict=True)]


def test_sampler_order_depends_on_seed_and_epoch():
    def order(**options):
        return [row for batch in plans(**options)[0] for row in batch]

    assert order() == order()
    assert order(epoch=1) != order()
    assert order(seed=1) != order()
    assert order(shuffle=False, epoch=3) == list(range(23))


def test_sampler_mixes_sources_by_weight():
    sizes, weights = (10, 40), (2.0, 0.25)
    (plan,) = plans(sizes, weights)
    seen = Counter(row for batch in plan for row in batch)
    assert all(seen[row] == 2 for row in range(10))
    assert sum(seen[row] for row in range(10, 50)) == 10
    assert max(seen[row] for row in range(10, 50)) == 1
    assert len(plan) == len(list(plan)) == 8
    (other,) = plans(sizes, weights, epoch=1)
    assert {r for b in other for r in b} != set(seen)  # the fraction is drawn again


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_sampler_length_is_the_number_of_batches(weight, size):
    (plan,) = plans((size, 5), (weight, 1.0), batch_size=2)
    assert len(plan) == len(list(plan))
    assert len(mixed_epoch([size], [weight], np.random.default_rng(0))) == round(size * weight)


def test_sampler_is_not_replaced_by_the_trainer():
    assert isinstance(plans()[0], DistributedSampler)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (0.0, 0.0)])
def test_sampler_rejects_invalid_weights(weights):
    with pytest.raises(ConfigError, match="mixing="):
        plans((3, 4), weights)
