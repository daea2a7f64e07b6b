"""Time to the first token of an answer: with the whole prompt to read, and with its common prefix already read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch

from lightning_ft.models.generate import evaluating
from lightning_ft.rollout.cache import GrowingCache
from lightning_ft.rollout.local import LocalEngine


def first_token_seconds(
    engine: LocalEngine, prompts: Sequence[Sequence[int]], shared: int, *, rounds: int = 3
) -> dict[str, float]:
    """Median time from a prompt to its first new token, one request at a time.

    Args:
        engine: Holds the model.
        prompts: Prompts of one arm.
        shared: Tokens they all start with.
        rounds: How many of the prompts are timed, after one that isn't.

    Returns:
        Seconds, ``cold`` with nothing cached and ``warm`` with the shared prefix in the cache. Without a prefix to
        share, or for a model whose cache can't be shared, there is no ``warm``.
    """
    chosen = [list(prompt) for prompt in prompts[:rounds]]
    with evaluating(engine.model):
        engine.first_token(chosen[0])  # the first pass of a model allocates and compiles
        seconds = {"cold": median([_timed(engine, prompt, None) for prompt in chosen])}
        if shared and (cached := engine.read_prefix(chosen[0][:shared], max(map(len, chosen)) + 1)) is not None:
            seconds["warm"] = median([_timed(engine, prompt[shared:], cached) for prompt in chosen])
    return seconds


def _timed(engine: LocalEngine, prompt: Sequence[int], prefix: GrowingCache | None) -> float:
    _wait()
    start = time.perf_counter()
    engine.first_token(prompt, prefix)  # an int on this side, so the device has finished
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
