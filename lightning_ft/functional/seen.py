"""Requests that also appear in the training rows: how a verdict counts them, and what they do to it."""

from __future__ import annotations

from collections.abc import Collection
from statistics import fmean

from lightning_ft.functional.records import ArmRecords


def overlap_text(count: int, n: int) -> str:
    """How many requests appear in the training rows too, in words; empty where none does.

    Args:
        count: Those that do.
        n: All requests.

    Example:
        >>> overlap_text(4, 8), overlap_text(0, 8)
        ('4 of 8 requests (50%) also appear in the training rows', '')
    """
    if not count:
        return ""
    permille = 1000 * count // n  # never rounded up to all of them
    share = f"{permille / 10:g}%" if permille else "under 0.1%"
    return f"{count:,} of {n:,} requests ({share}) also appear{'s' if count == 1 else ''} in the training rows"


def overlap_warnings(in_training: Collection[str], prompted: ArmRecords, tuned: ArmRecords) -> list[str]:
    """What a reader has to know of such requests: how many there are, and quality on all others.

    Args:
        in_training: Ids of the requests that appear in the training rows.
        prompted: Answers of the original weights with the baseline's prompt.
        tuned: Those of the trained weights, to the same requests in the same order.
    """
    if not in_training:
        return []
    seen = frozenset(in_training)
    new = [i for i, name in enumerate(prompted.ids) if name not in seen]
    found = [
        f"{overlap_text(len(seen), len(prompted.ids))}: the tuned model may have learned their answers by heart, so "
        "its quality on new requests may be lower. Remove them from the training rows or from the requests, and "
        "measure again."
    ]
    if new:
        quality = [fmean(arm.scores[i] for i in new) for arm in (tuned, prompted)]
        found.append(
            f"On the {len(new):,} requests that don't appear in the training rows, quality is {quality[0]:.3f} tuned "
            f"against {quality[1]:.3f} prompted."
        )
    return found
