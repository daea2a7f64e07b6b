"""Sampling options in vLLM's words, the same for a server and for an engine in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_ft.rollout.protocol import Sampling


def sampling_parameters(sampling: Sampling, max_new_tokens: int, count: int) -> dict[str, Any]:
    """How tokens are chosen.

    Args:
        sampling: Sampling options.
        max_new_tokens: Largest number of tokens per completion.
        count: Number of completions per prompt; 1 if they are greedy.

    Example:
        >>> found = sampling_parameters(Sampling(temperature=0.0, top_p=0.9), max_new_tokens=8, count=1)
        >>> found["temperature"], found["top_p"], found["logprobs"]
        (0.0, 1.0, None)
    """
    greedy = sampling.greedy
    return {
        "n": count,
        "temperature": float(sampling.temperature),
        "top_p": 1.0 if greedy else float(sampling.top_p),
        "top_k": 0 if greedy else sampling.top_k,
        "min_p": 0.0 if greedy else float(sampling.min_p),
        "max_tokens": max_new_tokens,
        # With filters vLLM renormalizes them over the tokens that are kept, which isn't what a completion promises.
        "logprobs": None if greedy or sampling.filters else 0,
    }


def stop_parameters(sampling: Sampling, end_token_ids: Sequence[int]) -> dict[str, Any]:
    """What ends a completion.

    Args:
        sampling: Sampling options.
        end_token_ids: Ids of the tokens that end one.
    """
    return {
        "stop": list(sampling.stop),
        "stop_token_ids": list(end_token_ids),
        "ignore_eos": True,  # only `stop_token_ids` end a completion
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # stop strings may contain some
    }
