"""Requests that the tuned arm answered worse, or better, than the prompted arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_ft.document.blocks import Answers, Block, SideBySide
from lightning_ft.evaluation.savings.gate import NO_SUCCESS
from lightning_ft.evaluation.savings.result import SavingsResult

MAX_CHANGES = 10
"""Number of requests of each direction that a report shows with their answers."""
Direction = Literal["worse", "better"]
"""Whether the score of a request is lower tuned than prompted, or higher."""


def changed_answers(result: SavingsResult, direction: Direction, *, limit: int = MAX_CHANGES) -> tuple[Answers, ...]:
    """Answers to the requests whose score is lower, or higher, tuned than prompted: the largest change first.

    Equal changes are in the order of the requests.

    Args:
        result: The result.
        direction: ``worse`` or ``better``.
        limit: Maximum number of requests.

    Returns:
        Answers of both arms; empty if no score changed in this direction, or the answers weren't recorded.

    Example:
        >>> from lightning_ft.evaluation.savings.arithmetic import ArmRecords, token_savings
        >>> def arm(tokens, scores, outputs):
        ...     return ArmRecords(("a", "b"), (tokens, tokens), (2, 2), scores, (False, False), outputs=outputs)
        >>> result = token_savings(
        ...     arm(90, (1.0, 0.0), ("yes", "no")), arm(9, (0.5, 1.0), ("maybe", "yes")), resamples=99
        ... )
        >>> [(found.id, found.prompted, found.tuned) for found in changed_answers(result, "worse")]
        [('a', 'yes', 'maybe')]
        >>> [(found.id, found.prompted, found.tuned) for found in changed_answers(result, "better")]
        [('b', 'no', 'yes')]
    """
    changes = _changes(result, direction)
    largest = sorted((k for k, change in enumerate(changes) if change > 0), key=lambda k: (-changes[k], k))
    return _answers(result, largest[:limit])


def _answers(result: SavingsResult, indices: Sequence[int]) -> tuple[Answers, ...]:
    """Answers of both arms to the requests with these indices; empty if the answers weren't recorded."""
    prompted, tuned = result.arms["prompted"], result.arms["tuned"]
    if not prompted.outputs or not tuned.outputs:
        return ()
    return tuple(
        Answers(
            id=prompted.ids[k],
            request=result.requests[k] if result.requests else "",
            reference=result.references[k] if result.references else None,
            prompted=prompted.outputs[k],
            tuned=tuned.outputs[k],
            prompted_score=prompted.scores[k],
            tuned_score=tuned.scores[k],
        )
        for k in indices
    )


def count_changed(result: SavingsResult, direction: Direction) -> int:
    """Number of requests whose score is lower (``worse``) or higher (``better``) tuned than prompted."""
    return sum(change > 0 for change in _changes(result, direction))


def change_blocks(result: SavingsResult) -> tuple[Block, ...]:
    """Blocks of a report: how many answers scored lower and higher, and those to the requests that changed most.

    Where no answer was right, the first ones are shown, so that a reader sees why.

    Args:
        result: The result.
    """
    worse, better, n = count_changed(result, "worse"), count_changed(result, "better"), result.n
    counts = (
        f"Of {n:,} answers, {worse:,} ({worse / n:.1%}) scored lower tuned than prompted, "
        f"{better:,} ({better / n:.1%}) scored higher, and {n - worse - better:,} the same."
    )
    found = (*_side_by_side(result, "worse", "loss"), *_side_by_side(result, "better", "gain"))
    if result.gate.void == NO_SUCCESS and (answers := _answers(result, range(min(MAX_CHANGES, n)))):
        found = (SideBySide(answers, f"None was right: the first {len(answers):,} of {n:,}."),)
    if worse + better and not found:
        return (f"{counts} The answers weren't recorded.",)
    return (counts, *found)


def _side_by_side(result: SavingsResult, direction: Direction, change: str) -> tuple[SideBySide, ...]:
    answers = changed_answers(result, direction)
    if not answers:
        return ()
    count = count_changed(result, direction)
    shown = f"all {count:,}" if count == len(answers) else f"{len(answers)} of {count:,}"
    return (SideBySide(answers, f"{direction.capitalize()}: {shown}, the largest {change} first."),)


def _changes(result: SavingsResult, direction: Direction) -> list[float]:
    """By how much the score of each request changed in a direction; negative if it changed in the other."""
    sign = 1.0 if direction == "better" else -1.0
    pairs = zip(result.arms["prompted"].scores, result.arms["tuned"].scores, strict=True)
    return [sign * (after - before) for before, after in pairs]
