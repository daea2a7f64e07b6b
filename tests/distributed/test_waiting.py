"""Ranks wait for each other's rewards beyond the timeout of their process group."""

import datetime
import time

import pytest
import torch
import torch.distributed as dist
from ranks import free_port, run_ranks

from lightning_ft.errors import RewardError
from lightning_ft.modules.waiting import PatientRanks

TIMEOUT, LONGER = 2, 5


def one_rank(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    ranks, found = PatientRanks(), {}

    def slow():
        time.sleep(LONGER * rank)
        return rank

    found["slow"] = ranks.run(slow)
    both = torch.tensor(float(rank))
    dist.all_reduce(both)
    found["together"] = float(both)

    def own_collective():  # as a sharded reward model does
        value = torch.ones(())
        dist.all_reduce(value)
        return float(value)

    found["collective"] = ranks.run(own_collective)

    def fails():
        if rank:
            raise ZeroDivisionError
        return 1

    try:
        ranks.run(fails)
    except (RewardError, ZeroDivisionError) as error:
        found["failed"] = type(error).__name__
    torch.save(found, f"{folder}/{rank}.pt")


def test_patient_ranks_wait_beyond_the_timeout(tmp_path):
    run_ranks(one_rank, (free_port(), str(tmp_path)))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [f["slow"] for f in found] == [0, 1]
    assert [f["together"] for f in found] == [1.0, 1.0]
    assert [f["collective"] for f in found] == [2.0, 2.0]
    assert [f["failed"] for f in found] == ["RewardError", "ZeroDivisionError"]


def test_patient_ranks_need_no_process_group():
    with pytest.raises(ZeroDivisionError):
        PatientRanks().run(lambda: 1 / 0)
