"""The rule by which replies are judged: it made the preferences, and it measures what training on them brought.

No training step sees it. A reward model is trained on pairs that it ordered, and the policies on that reward model, or
on the pairs. The rule itself judges validation replies while they train, to be looked at, and test replies afterwards
(`evaluate.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from replies import COURTESIES, REMARKS

ROUTE = re.compile(r"[a-z]+ \d{3} [A-Z][a-z]+")
TOPIC, CODE, TEAM = 0.2, 0.4, 0.4
"""What each right part of the route is worth."""
ONE_COURTESY = 0.3
"""What one courtesy is worth; none is worth nothing, and so are two."""
WORD = 0.02
"""What each word costs besides the route and the first courtesy."""
MALFORMED = -1.0
"""For what can't be read: no route or several, other sentences than the company's, no full stop at the end."""


@dataclass(frozen=True)
class Reply:
    """A reply that can be read.

    Args:
        route: Topic, code and team.
        courtesies: How many, repeated ones counted again.
        extra_words: Words besides the route and the first courtesy.
    """

    route: tuple[str, str, str]
    courtesies: int
    extra_words: int


def read(text: str) -> Reply | None:
    """Read a reply; None if it is malformed.

    Example:
        >>> read("We are happy to help. refund 964 Sarede. This can take a week.")
        Reply(route=('refund', '964', 'Sarede'), courtesies=1, extra_words=5)
        >>> read("We are happy to help.") is None, read("refund 964 Sarede") is None
        (True, True)
    """
    text = text.strip()
    if not text.endswith("."):
        return None
    sentences = text[:-1].split(". ")
    routes = [sentence for sentence in sentences if ROUTE.fullmatch(sentence)]
    courtesies = [sentence for sentence in sentences if sentence in COURTESIES]
    remarks = [sentence for sentence in sentences if sentence in REMARKS]
    if len(routes) != 1 or len(routes) + len(courtesies) + len(remarks) != len(sentences):
        return None
    topic, code, team = routes[0].split()
    extra = sum(len(sentence.split()) for sentence in [*courtesies[1:], *remarks])
    return Reply((topic, code, team), len(courtesies), extra)


def true_reward(text: str, reference: str, *, truncated: bool = False) -> float:
    """What a reply is worth, from -1 to 1.3.

    Args:
        text: The reply.
        reference: The right topic, code and team: the `output` of the message in `data/`.
        truncated: Whether it was stopped by the limit of tokens, which makes it malformed.

    Returns:
        -1 for a malformed reply; else 0.2 for the right topic, 0.4 for the right code, 0.4 for the right team, 0.3 for
        exactly one courtesy, and -0.02 for each word besides the route and the first courtesy, but never less than -1.

    Example:
        >>> true_reward("We are happy to help. refund 964 Sarede.", "refund 964 Sarede")
        1.3
        >>> true_reward("refund 964 Korima. This can take a week.", "refund 964 Sarede")
        0.5
        >>> true_reward("We are happy to help. We are happy to help.", "refund 964 Sarede")
        -1.0
    """
    reply = None if truncated else read(text)
    if reply is None:
        return MALFORMED
    right = [given == wanted for given, wanted in zip(reply.route, reference.split(), strict=True)]
    worth = sum(part for part, is_right in zip((TOPIC, CODE, TEAM), right, strict=True) if is_right)
    worth += ONE_COURTESY if reply.courtesies == 1 else 0.0
    return round(max(MALFORMED, worth - WORD * reply.extra_words), 6)


def true(completions: list[str], output: list[str], **columns: object) -> list[float]:
    """The rule as a reward function, for `validation_rewards`."""
    return [true_reward(text, reference) for text, reference in zip(completions, output, strict=True)]


def routed_right(text: str, reference: str) -> bool:
    """Whether a reply can be read and names the right topic, code and team."""
    reply = read(text)
    return reply is not None and " ".join(reply.route) == reference
