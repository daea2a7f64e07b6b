"""What an engine that answers prompts takes and gives back, whichever engine it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

OnAnswered = Callable[[int], None]
"""Called with the number of prompts answered since the last call."""


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    Args:
        tokens: Its ids, the end token included where it wrote one.
        truncated: Whether it was stopped by the limit of new tokens, before an end token.
    """

    tokens: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True)
class Rollouts:
    """The answers to a list of prompts, in its order.

    Args:
        completions: One for each prompt.
        shared_prefix: Tokens that all prompts start with and that were run through the model only once; 0 where
            nothing was shared.
        prefilled: Prompt tokens that were run through the model in all, padding not counted.
    """

    completions: tuple[Completion, ...]
    shared_prefix: int
    prefilled: int


class RolloutEngine(Protocol):
    """Answers prompts."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, on_answered: OnAnswered | None = None
    ) -> Rollouts:
        """Continue each prompt until an end token or `max_new_tokens`.

        Args:
            prompts: Token ids, as they are: no token is added, none cut.
            max_new_tokens: At most so many for each.
            on_answered: Told of progress.
        """
        ...


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts start with in common, at least one token of each prompt left over.

    The left-over token is what the first new token is predicted from.

    Example:
        >>> common_prefix([[5, 6, 7, 8], [5, 6, 9]]), common_prefix([[5, 6], [5, 6]]), common_prefix([[5, 6]])
        (2, 1, 1)
    """
    if not prompts:
        return 0
    # What the first and the last in order have in common, all between them have.
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))
    limit = min(len(prompt) for prompt in prompts) - 1
    for place, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b or place >= limit:
            return place
    return max(0, limit)
