"""Which arguments a reward function takes: with ``**kwargs`` everything, else what it names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_ft.data.batches import RESERVED
from lightning_ft.errors import RewardError

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
