"""What a reward function returned, checked to be one finite number or None for each completion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ft.errors import RewardError

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
