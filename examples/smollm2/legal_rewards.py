"""Rewards of citations that need no reward model: for `legal_grpo.yaml`."""

from __future__ import annotations

from legal_citation import FIELDS, fields, score


def exact(completions: list[str], output: list[str], **columns: object) -> list[float]:
    """Reward the right citation with 1 and any other answer with 0.

    Args:
        completions: Answers, ``n``.
        output: Correct citation for each of them.
        columns: Other columns of the rows; not used.

    Example:
        >>> right = "512 F.2d 88 (9th Cir. 1978)"
        >>> exact([right, "512 F. 2d 88 (9th Cir. 1978)"], [right, right])
        [1.0, 0.0]
    """
    return [score(text, reference) for text, reference in zip(completions, output, strict=True)]


def share_of_fields(completions: list[str], output: list[str], **columns: object) -> list[float]:
    """Reward each of volume, reporter, page, court and year with a fifth, to watch during validation.

    Example:
        >>> share_of_fields(["512 F. 2d 88 (9th Cir. 1978)", "?"], ["512 F.2d 88 (9th Cir. 1978)"] * 2)
        [0.8, 0.0]
    """
    pairs = [(fields(text), fields(reference)) for text, reference in zip(completions, output, strict=True)]
    return [sum(answer.get(name) == right[name] for name in FIELDS) / len(FIELDS) for answer, right in pairs]
