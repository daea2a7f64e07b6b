"""Regressions: requests that the tuned arm answered worse than the prompted arm."""

from __future__ import annotations

from lightning_ft.document.blocks import Answers
from lightning_ft.evaluation.savings.result import SavingsResult

MAX_REGRESSIONS = 10


def worst_regressions(result: SavingsResult, *, limit: int = MAX_REGRESSIONS) -> tuple[Answers, ...]:
    """Answers to the requests whose score is lower tuned than prompted, the largest loss first.

    Equal losses are in the order of the requests.

    Args:
        result: The result.
        limit: Maximum number of requests.

    Returns:
        Answers of both arms; empty if there are no regressions, or the answers weren't recorded.

    Example:
        >>> from lightning_ft.evaluation.savings.arithmetic import ArmRecords, token_savings
        >>> def arm(tokens, scores, outputs):
        ...     return ArmRecords(("a", "b"), (tokens, tokens), (2, 2), scores, (False, False), outputs=outputs)
        >>> result = token_savings(
        ...     arm(90, (1.0, 1.0), ("yes", "no")), arm(9, (1.0, 0.0), ("yes", "maybe")), resamples=99
        ... )
        >>> [(found.id, found.prompted, found.tuned) for found in worst_regressions(result)]
        [('b', 'no', 'maybe')]
    """
    prompted, tuned = result.arms["prompted"], result.arms["tuned"]
    if not prompted.outputs or not tuned.outputs:
        return ()
    losses = [before - after for before, after in zip(prompted.scores, tuned.scores, strict=True)]
    worse = sorted((k for k, loss in enumerate(losses) if loss > 0), key=lambda k: (-losses[k], k))
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
        for k in worse[:limit]
    )


def count_regressions(result: SavingsResult) -> int:
    """Number of requests whose score is lower tuned than prompted."""
    pairs = zip(result.arms["prompted"].scores, result.arms["tuned"].scores, strict=True)
    return sum(after < before for before, after in pairs)
