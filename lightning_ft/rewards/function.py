"""A Python function as a reward."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ft.data.batches import RESERVED
from lightning_ft.errors import RewardError
from lightning_ft.rewards.batch import RewardBatch

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Arguments:
    """The arguments of a function, by name.

    Args:
        name: Of the function, for errors.
        function: The function.

    Raises:
        RewardError: If it has arguments that can't be given by name.

    Example:
        >>> def correct(completions, answer):
        ...     return [float(c == a) for c, a in zip(completions, answer)]
        >>> arguments = Arguments("correct", correct)
        >>> arguments.chosen({"prompts": ["2+2?"], "completions": ["4"], "answer": ["4"]})
        {'completions': ['4'], 'answer': ['4']}
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # written in C, without a signature
            parameters = [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
        self.takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self.named = frozenset(p.name for p in parameters if p.kind in _BY_NAME)
        self.required = tuple(p.name for p in parameters if p.kind in _BY_NAME and p.default is inspect.Parameter.empty)
        if by_place := [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]:
            raise RewardError(
                f"Reward {name!r} takes {by_place[0]!r} by its place, but rewards are called by name: "
                "f(prompts, completions, completion_ids, **columns)."
            )

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check that there is everything that the function can't do without.

        Raises:
            RewardError: With what is missing and what there is.
        """
        columns = list(columns)
        if missing := [name for name in self.required if name not in RESERVED and name not in columns]:
            there = ", ".join(map(repr, columns)) or "none"
            raise RewardError(
                f"Reward {self.name!r} needs {missing[0]!r}, which is neither a column of the rows (these are: {there})"
                f" nor one of {', '.join(RESERVED)}."
            )

    def chosen(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What of `given` the function takes."""
        return {name: value for name, value in given.items() if self.takes_all or name in self.named}


class BackgroundLoop:
    """Runs coroutines in a thread of their own, also where this thread runs a loop already, as notebooks do.

    The loop stays the same from call to call: clients keep connections that belong to the loop they were opened in.

    Example:
        >>> async def answer():
        ...     return 42
        >>> BackgroundLoop().gather([answer(), answer()])
        [42, 42]
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def gather(self, awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
        """Wait for all of them at once.

        Returns:
            Their results in order; of one that failed the exception itself.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_serve, args=(self._loop,), name="lightning_ft-rewards", daemon=True)
            thread.start()
            weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
        future = asyncio.run_coroutine_threadsafe(_gathered(awaitables), self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl+C here must stop what runs there
            future.cancel()
            raise


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _gathered(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.gather(*awaitables, return_exceptions=True))


OnNonFinite = Literal["error", "skip"]
"""What to do where a number isn't finite."""

_LARGEST = torch.finfo(torch.float32).max


def as_rewards(
    name: str, returned: Any, completions: Sequence[str], *, nonfinite: OnNonFinite = "error"
) -> tuple[Tensor, int]:
    """Numbers from what a reward function returned.

    Args:
        name: Of the function, for errors.
        returned: A list, tuple, 1-D tensor or 1-D array; in it numbers, truth values, or None for "doesn't apply".
        completions: What was judged, `c`.
        nonfinite: What to do with a number that isn't finite: refuse it, or count it and take it for None.

    Returns:
        NaN for None, ``float32 [c]``, and how many numbers weren't finite.

    Raises:
        RewardError: For anything else; names function and completion.

    Example:
        >>> as_rewards("correct", [True, 0.5, None], ["a", "b", "c"])
        (tensor([1.0000, 0.5000,    nan]), 0)
    """
    wanted = f"expected {len(completions)} numbers or None, one for each completion"
    if hasattr(returned, "tolist") and getattr(returned, "ndim", None) == 1:  # a tensor or an array
        values = returned.tolist()
    elif isinstance(returned, (list, tuple)):
        values = list(returned)
    else:
        shape = f" of shape {tuple(returned.shape)}" if hasattr(returned, "shape") else ""
        raise RewardError(f"Reward {name!r} returned a {type(returned).__name__}{shape}; {wanted}.")
    if len(values) != len(completions):
        raise RewardError(f"Reward {name!r} returned {len(values)} rewards; {wanted}.")
    numbers = [_number(name, i, value, text) for i, (value, text) in enumerate(zip(values, completions, strict=True))]
    wrong = [i for i, number in enumerate(numbers) if number is not None and not abs(number) <= _LARGEST]  # NaN too
    if wrong and nonfinite == "error":
        raise RewardError(
            f"Reward {name!r} gave {values[wrong[0]]!r:.80} for {quoted(wrong[0], completions[wrong[0]])}; expected a "
            "finite number, or None where it doesn't apply."
        )
    left_out = dict.fromkeys(wrong, math.nan)
    given = [left_out.get(i, math.nan if number is None else float(number)) for i, number in enumerate(numbers)]
    return torch.tensor(given, dtype=torch.float32), len(wrong)


def quoted(index: int, completion: str) -> str:
    """How errors name a completion.

    Example:
        >>> quoted(3, "a" * 90) == f"completion 3 ('{'a' * 80}...)"
        True
    """
    shown = repr(completion[:80])
    return f"completion {index} ({shown if len(completion) <= 80 else shown[:-1] + '...'})"


def _number(name: str, index: int, value: Any, completion: str) -> Any:
    if value is None:
        return None
    number: Any = value
    if not isinstance(number, Real) and getattr(number, "ndim", None) == 0 and hasattr(number, "item"):
        number = number.item()  # a scalar of torch or numpy
    if not isinstance(number, Real):
        raise RewardError(
            f"Reward {name!r} gave {value!r:.80}, a {type(value).__name__}, for {quoted(index, completion)}; expected "
            "a number, or None where it doesn't apply."
        )
    return number


class FunctionReward:
    """Calls a function with what it takes.

    Args:
        name: What it is called by.
        function: With TRL's signature, ``f(prompts, completions, completion_ids, **columns)``, or any part of it; async
            or not.

    Raises:
        RewardError: If it can't be called by name.

    Example:
        >>> reward = FunctionReward("short", lambda completions: [-len(c) for c in completions])
        >>> reward(RewardBatch(["2+2?"], ["four"], [[17]], {}))
        [-4]
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.arguments = Arguments(name, function.forward if isinstance(function, nn.Module) else function)

    def __call__(self, batch: RewardBatch, **log: Callable[..., None]) -> Any:
        """What the function returns: rewards, or an awaitable of them.

        Each completion has copies of its prompt, messages and columns that are the function's own, so that it may
        change what it gets: the completions of a prompt share one row, which other rewards and epochs read too.
        """
        per_completion: dict[str, list[Any]] = {
            "prompts": batch.prompts,
            "completions": batch.completions,
            "completion_ids": batch.completion_ids,
            **batch.columns,
        }
        chosen = self.arguments.chosen(per_completion)
        copies = {name: [deepcopy(value) for value in values] for name, values in chosen.items()}
        return self.function(**copies, **self.arguments.chosen({"trainer_state": batch.state, **log}))
