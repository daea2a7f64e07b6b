"""Python functions as rewards: which arguments they get, async ones, and what they may return."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from numbers import Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_ft.data.batches import RESERVED
from lightning_ft.errors import RewardError
from lightning_ft.rewards.batch import RewardBatch

T = TypeVar("T")
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Arguments:
    """The arguments that a reward function accepts by name.

    Args:
        name: Name of the reward, for errors.
        function: Reward function.

    Raises:
        RewardError: If it has positional-only arguments.

    Example:
        >>> def correct(completions, answer):
        ...     return [float(c == a) for c, a in zip(completions, answer)]
        >>> arguments = Arguments("correct", correct)
        >>> arguments.select({"prompts": ["2+2?"], "completions": ["4"], "answer": ["4"]})
        {'completions': ['4'], 'answer': ['4']}
    """

    def __init__(self, name: str, function: Callable[..., object]) -> None:
        self.name = name
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # written in C, without a signature
            parameters = [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
        self.takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self.named = frozenset(p.name for p in parameters if p.kind in _BY_NAME)
        self.required = tuple(p.name for p in parameters if p.kind in _BY_NAME and p.default is inspect.Parameter.empty)
        if positional := [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]:
            raise RewardError(
                f"Reward {name!r} has the positional-only argument {positional[0]!r}, but rewards are called with "
                "keyword arguments: f(prompts, completions, completion_ids, **columns). Remove the `/`."
            )

    def check_columns(self, columns: Iterable[str], rows: str = "rows") -> None:
        """Check that every required argument is available.

        Args:
            columns: Names of the columns of the rows, the prompt excluded.
            rows: Name of the rows, for the error.

        Raises:
            RewardError: If an argument is missing; the message names it and the columns.
        """
        columns = list(columns)
        if missing := [name for name in self.required if name not in RESERVED and name not in columns]:
            available = ", ".join(map(repr, columns)) or "none"
            raise RewardError(
                f"Reward {self.name!r} needs {missing[0]!r}, which is neither a column of the {rows} "
                f"(columns: {available}) nor one of {', '.join(RESERVED)}."
            )

    def select(self, available: Mapping[str, T]) -> dict[str, T]:
        """Return those of the available arguments that the function accepts."""
        return {name: value for name, value in available.items() if self.takes_all or name in self.named}


class BackgroundLoop:
    """Runs coroutines in a background thread, so that it works where this thread already runs a loop, as in notebooks.

    All calls use the same loop, since connections of clients belong to the loop that they were opened in.

    Example:
        >>> async def compute():
        ...     return 42
        >>> BackgroundLoop().gather([compute(), compute()])
        [42, 42]
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def gather(self, awaitables: Sequence[Awaitable[T]]) -> list[T | BaseException]:
        """Run awaitables concurrently and wait for all of them.

        Returns:
            Their results in order, or exceptions where they failed.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_serve, args=(self._loop,), name="lightning_ft-rewards", daemon=True)
            thread.start()
            weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
        future = asyncio.run_coroutine_threadsafe(_gathered(awaitables), self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl+C in this thread must stop the coroutines in the other one
            future.cancel()
            raise


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _gathered(awaitables: Sequence[Awaitable[T]]) -> list[T | BaseException]:
    return list(await asyncio.gather(*map(_result, awaitables), return_exceptions=True))


async def _result(awaitable: Awaitable[T]) -> T | BaseException:
    """What an awaitable returns; an exit is returned, too, since raised it would end the loop that others wait for."""
    try:
        return await awaitable
    except SystemExit as error:
        return error


OnNonFinite = Literal["error", "skip"]
"""What to do with a reward that isn't finite."""

_LARGEST = torch.finfo(torch.float32).max


def as_rewards(
    name: str, returned: object, completions: Sequence[str], *, nonfinite: OnNonFinite = "error"
) -> tuple[Tensor, int]:
    """Convert what a reward function returned to a tensor.

    Args:
        name: Name of the reward, for errors.
        returned: List, tuple, 1-D tensor or 1-D array of numbers, booleans, or None for "doesn't apply".
        completions: Text of each completion, `c` in total.
        nonfinite: Whether a number that isn't finite is an error, or counted and treated as None (``"skip"``).

    Returns:
        Rewards, NaN for None, ``float32 [c]``, and how many numbers weren't finite.

    Raises:
        RewardError: If something else was returned; the message names the reward and the completion.

    Example:
        >>> as_rewards("correct", [True, 0.5, None], ["a", "b", "c"])
        (tensor([1.0000, 0.5000,    nan]), 0)
    """
    expected = f"expected {len(completions)} numbers or None, one per completion"
    if hasattr(returned, "tolist") and getattr(returned, "ndim", None) == 1:  # a tensor or an array
        values = returned.tolist()
    elif isinstance(returned, (list, tuple)):
        values = list(returned)
    else:
        shape = f" of shape {tuple(returned.shape)}" if hasattr(returned, "shape") else ""
        raise RewardError(f"Reward {name!r} returned a {type(returned).__name__}{shape}; {expected}.")
    if len(values) != len(completions):
        raise RewardError(f"Reward {name!r} returned {len(values)} rewards; {expected}.")
    numbers = [_number(name, i, value, text) for i, (value, text) in enumerate(zip(values, completions, strict=True))]
    invalid = {i for i, number in enumerate(numbers) if number is not None and not abs(number) <= _LARGEST}  # NaN too
    if invalid and nonfinite == "error":
        first = min(invalid)
        raise RewardError(
            f"Reward {name!r} returned {values[first]!r:.80} for {quoted(first, completions[first])}; expected a "
            "finite number, or None where it doesn't apply."
        )
    rewards = [math.nan if number is None or i in invalid else float(number) for i, number in enumerate(numbers)]
    return torch.tensor(rewards, dtype=torch.float32), len(invalid)


def quoted(index: int, completion: str) -> str:
    """Return how errors name a completion.

    Example:
        >>> quoted(3, "a" * 90) == f"completion 3 ('{'a' * 80}...)"
        True
    """
    shown = repr(completion[:80])
    return f"completion {index} ({shown if len(completion) <= 80 else shown[:-1] + '...'})"


def _number(name: str, index: int, value: object, completion: str) -> Any:
    if value is None:
        return None
    number = value
    if not isinstance(number, Real) and getattr(number, "ndim", None) == 0 and hasattr(number, "item"):
        number = number.item()  # a PyTorch or NumPy scalar
    if not isinstance(number, Real):
        raise RewardError(
            f"Reward {name!r} returned {value!r:.80}, a {type(value).__name__}, for {quoted(index, completion)}; "
            "expected a number, or None where it doesn't apply."
        )
    return number


class FunctionReward:
    """Calls a reward function with the arguments that it accepts.

    Args:
        name: Name of the reward, for errors.
        function: Function with TRL's signature, ``f(prompts, completions, completion_ids, **columns)``, or any subset
            of it; async or not.

    Raises:
        RewardError: If it has positional-only arguments.

    Example:
        >>> reward = FunctionReward("short", lambda completions: [-len(c) for c in completions])
        >>> reward(RewardBatch(["2+2?"], ["four"], [[17]], {}))
        [-4]
    """

    def __init__(self, name: str, function: Callable[..., object]) -> None:
        self.function = function
        self.arguments = Arguments(name, function.forward if isinstance(function, nn.Module) else function)

    def __call__(self, batch: RewardBatch, **log: Callable[..., None]) -> object:
        """Return what the function returns: rewards, or an awaitable of them.

        The function gets copies of prompts, messages and columns, one per completion, so that it may modify them: the
        completions of a prompt share one row, which other rewards and later epochs read, too.
        """
        per_completion: dict[str, Sequence[object]] = {
            "prompts": batch.prompts,
            "completions": batch.completions,
            "completion_ids": batch.completion_ids,
            **batch.columns,
        }
        selected = self.arguments.select(per_completion)
        copies = {name: [deepcopy(value) for value in values] for name, values in selected.items()}
        return self.function(**copies, **self.arguments.select({"trainer_state": batch.state, **log}))
