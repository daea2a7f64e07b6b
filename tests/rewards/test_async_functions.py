"""Async functions as rewards: concurrency, running event loops and failures."""

import asyncio
import functools
import threading
import warnings

import pytest
from reward_cases import IDS, PROMPTS, TEXTS, compute_rewards, correct, slowly

from lightning_ft.errors import RewardError
from lightning_ft.rewards.functions import RewardFunctions


def rendezvous(parties):
    """Coroutine functions that end only after all of them have started: called one after the other, they would hang."""
    arrived, everyone = [], asyncio.Event()

    async def reward(completions, **kwargs):
        arrived.append(1)
        if len(arrived) == parties:
            everyone.set()
        await asyncio.wait_for(everyone.wait(), timeout=30)
        return [1.0] * len(completions)

    return [reward] * parties


def test_async_rewards_run_concurrently():
    assert compute_rewards(rendezvous(3)).total.tolist() == [3.0] * 3


def test_async_rewards_work_inside_a_running_loop():
    async def notebook():
        return compute_rewards([slowly, *rendezvous(2)])

    assert asyncio.run(notebook()).total.tolist() == [2.25, 2.0, 2.0]


def test_async_objects_partials_and_lambdas_are_awaited():
    class Judge:
        async def __call__(self, completions, **kwargs):
            return [1.0] * len(completions)

    rewards = compute_rewards([Judge(), functools.partial(slowly), lambda completions: slowly(completions)])
    assert rewards.names == ("Judge", "slowly", "reward")
    assert rewards.per_function[0].tolist() == [1.0, 0.25, 0.25]


def test_async_rewards_use_one_loop_for_all_batches():
    """Clients keep connections that belong to the loop in which they were opened."""
    loops = []

    async def client(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    functions = RewardFunctions(client)
    for _ in range(2):
        functions.compute(PROMPTS, TEXTS, IDS)
    assert loops[0] is loops[1]
    assert not loops[0].is_closed()


def test_background_loop_ends_with_its_reward_functions():
    threads = []

    async def client(completions):
        threads.append(threading.current_thread())
        return [0.0] * len(completions)

    compute_rewards(client)  # no reference to the RewardFunctions remains
    threads[0].join(timeout=30)
    assert threads[0] is not threading.main_thread()
    assert not threads[0].is_alive()


def test_async_failure_names_reward_and_completion():
    async def judge(completions):
        await asyncio.sleep(0)
        if "five" in completions:
            raise KeyError("verdict")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'judge' failed on completion 1 \('five'\) with KeyError: 'verdict'") as got:
        compute_rewards([correct, judge, slowly])
    assert isinstance(got.value.__cause__, KeyError)


def test_async_exit_names_reward_and_completion():
    """Raised in the background loop it would end that loop, and training would wait forever."""

    async def judge(completions):
        await asyncio.sleep(0)
        if "five" in completions:
            raise SystemExit(1)
        return [0.0] * len(completions)

    caught = []

    def compute():
        with pytest.raises(RewardError) as error:
            compute_rewards([judge, slowly])
        caught.append(str(error.value))

    waiting = threading.Thread(target=compute, daemon=True)
    waiting.start()
    waiting.join(timeout=30)
    assert "'judge' failed on completion 1 ('five') with SystemExit: 1" in caught[0]


def test_failure_of_another_reward_leaves_no_coroutine_unawaited():
    def fails(completions):
        raise ValueError("no")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RewardError, match="'fails'"):
            compute_rewards([slowly, fails])
