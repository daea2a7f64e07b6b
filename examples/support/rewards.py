"""The true reward of replies: the rule that ordered the preference pairs and measures the result of training on them.

No training step uses it. A reward model is trained on pairs that it ordered, and policies are trained on that reward
model, or on the pairs. The rule itself grades validation replies during training, for monitoring only, and test replies
afterwards (`evaluate.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from replies import COURTESIES, REMARKS

ROUTE = re.compile(r"[a-z]+ \d{3} [A-Z][a-z]+")
TOPIC, CODE, TEAM = 0.2, 0.4, 0.4
"""Reward of each correct part of the route."""
ONE_COURTESY = 0.3
"""Reward of exactly one courtesy; none or several earn nothing."""
WORD = 0.02
"""Penalty per word in addition to the route and the first courtesy."""
MALFORMED = -1.0
"""Reward of a malformed reply: no route or several, other sentences than the company's, or no period at the end."""


@dataclass(frozen=True)
class Reply:
    """A well-formed reply.

    Args:
        route: Topic, code and team.
        courtesies: Number of courtesies, including repeated ones.
        extra_words: Number of words in addition to the route and the first courtesy.
    """

    route: tuple[str, str, str]
    courtesies: int
    extra_words: int


def read(text: str) -> Reply | None:
    """Parse a reply; None if it is malformed.

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
    """Compute the true reward of a reply, from -1 to 1.3.

    Args:
        text: The reply.
        reference: Correct topic, code and team: the `output` of the message in `data/`.
        truncated: Whether the reply was cut off at the token limit, which makes it malformed.

    Returns:
        -1 for a malformed reply; otherwise 0.2 for the correct topic, 0.4 for the correct code, 0.4 for the correct
        team, 0.3 for exactly one courtesy, and -0.02 per word in addition to the route and the first courtesy, but at
        least -1.

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
    parts = zip((TOPIC, CODE, TEAM), reply.route, reference.split(), strict=True)
    total = sum(reward for reward, predicted, target in parts if predicted == target)
    total += ONE_COURTESY if reply.courtesies == 1 else 0.0
    return round(max(MALFORMED, total - WORD * reply.extra_words), 6)


def true(completions: list[str], output: list[str], **columns: object) -> list[float]:
    """Grade completions with the rule, as a reward function for `validation_rewards`."""
    return [true_reward(text, reference) for text, reference in zip(completions, output, strict=True)]


def routed_right(text: str, reference: str) -> bool:
    """Whether a reply is well-formed and names the correct topic, code and team."""
    reply = read(text)
    return reply is not None and " ".join(reply.route) == reference
