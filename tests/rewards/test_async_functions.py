"""Async functions as rewards: run at once, in whatever loop, and how they fail."""

import asyncio
import functools
import threading
import warnings

import pytest
from reward_cases import IDS, PROMPTS, TEXTS, correct, score, slowly

from lightning_ft.errors import RewardError
from lightning_ft.rewards.functions import RewardFunctions


def meeting(parties):
    """Coroutine functions of which none ends before all have begun: one after the other they would hang."""
    arrived, everyone = [], asyncio.Event()

    async def reward(completions, **kwargs):
        arrived.append(1)
        if len(arrived) == parties:
            everyone.set()
        await asyncio.wait_for(everyone.wait(), timeout=30)
        return [1.0] * len(completions)

    return [reward] * parties


def test_async_rewards_run_at_once():
    assert score(meeting(3)).total.tolist() == [3.0] * 3


def test_async_rewards_inside_a_running_loop():
    async def notebook():
        return score([slowly, *meeting(2)])

    assert asyncio.run(notebook()).total.tolist() == [2.25, 2.0, 2.0]


def test_async_objects_partials_and_functions_that_return_coroutines():
    class Judge:
        async def __call__(self, completions, **kwargs):
            return [1.0] * len(completions)

    rewards = score([Judge(), functools.partial(slowly), lambda completions: slowly(completions)])
    assert rewards.names == ("Judge", "slowly", "reward")
    assert rewards.per_function[0].tolist() == [1.0, 0.25, 0.25]


def test_one_loop_for_all_batches():
    """Clients keep connections that belong to the loop in which they were opened."""
    loops = []

    async def client(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    functions = RewardFunctions(client)
    for _ in range(2):
        functions.score(PROMPTS, TEXTS, IDS)
    assert loops[0] is loops[1]
    assert not loops[0].is_closed()


def test_the_loop_ends_with_its_rewards():
    threads = []

    async def client(completions):
        threads.append(threading.current_thread())
        return [0.0] * len(completions)

    score(client)  # nobody keeps the RewardFunctions
    threads[0].join(timeout=30)
    assert threads[0] is not threading.main_thread()
    assert not threads[0].is_alive()


def test_an_async_reward_that_fails():
    async def judge(completions):
        await asyncio.sleep(0)
        if "five" in completions:
            raise KeyError("verdict")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'judge' failed on completion 1 \('five'\) with KeyError: 'verdict'") as got:
        score([correct, judge, slowly])
    assert isinstance(got.value.__cause__, KeyError)


def test_a_failure_beside_async_rewards_leaves_none_unawaited():
    def fails(completions):
        raise ValueError("no")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RewardError, match="'fails'"):
            score([slowly, fails])
