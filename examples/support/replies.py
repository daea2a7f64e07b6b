"""Archive of replies that the company's agents wrote before there was a model, and flaws that replies can have.

A reply is a line of sentences: the route (`refund 964 Sarede.`), which courtesies and useless remarks may follow. In
spring, two teams were dissolved and half of the topics went to other teams; two replies in three still name the old
route. So a model that is trained on this archive has seen the correct reply to each message, but often doesn't answer
with it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from generate import rules

COURTESIES = (
    "Thank you for your message",
    "Many thanks for your mail",
    "We are happy to help",
    "Please write again",
    "Have a good day",
    "Kind regards from us",
)
REMARKS = (
    "This is about your order",
    "We look into it now",
    "A colleague has your file",
    "There is no need to call",
    "Your number is in our list",
    "This can take a week",
    "We have many mails today",
    "It is the same for all",
)
DISSOLVED = ("Falcon", "Cobalt")
"""Teams that existed until spring."""
OLD_ROUTE = 2 / 3
"""Probability that an agent names the old route of a topic that moved."""
OTHER_TOPIC = 0.04
"""Probability that an agent mistakes the topic of a message."""


def old_rules(seed: int = 0) -> dict[str, str]:
    """Former code and team of each topic that moved; neither is in use now."""
    rng = random.Random(f"{seed} old")
    present = rules(seed)
    moved = sorted(rng.sample(sorted(present), len(present) // 2))
    codes = rng.sample(
        sorted(set(range(100, 1000)) - {int(value.split()[0]) for value in present.values()}), len(moved)
    )
    return {topic: f"{code} {rng.choice(DISSOLVED)}" for topic, code in zip(moved, codes, strict=True)}


class Archive:
    """Draws replies in the style of the agents.

    Args:
        seed: Seed of the tables of routes.
    """

    def __init__(self, seed: int = 0) -> None:
        self.new, self.old = rules(seed), old_rules(seed)
        self.topics = sorted(self.new)

    def route(self, topic: str, rng: random.Random) -> str:
        """Draw the topic, code and team that an agent names."""
        if rng.random() < OTHER_TOPIC:
            topic = rng.choice(self.topics)
        value = self.old[topic] if topic in self.old and rng.random() < OLD_ROUTE else self.new[topic]
        return f"{topic} {value}"

    def reply(self, topic: str, rng: random.Random) -> str:
        """Draw a reply with up to two courtesies and up to two remarks."""
        courtesies = rng.sample(COURTESIES, rng.choices((0, 1, 2), (4, 4, 2))[0])
        remarks = rng.sample(REMARKS, rng.choices((0, 1, 2), (4, 4, 2))[0])
        return compose(self.route(topic, rng), courtesies, remarks, rng)

    def terse(self, topic: str, rng: random.Random) -> tuple[str, str]:
        """Draw a route with one courtesy, and the same route without."""
        route = self.route(topic, rng)
        return line([route, rng.choice(COURTESIES)]), line([route])

    def flawed(self, topic: str, rng: random.Random) -> tuple[str, str]:
        """Draw a reply with a flaw that agents' replies never have, and the name of the flaw."""
        flaw = rng.choice(sorted(FLAWS))
        return FLAWS[flaw](self, topic, rng), flaw


def compose(route: str, courtesies: list[str], remarks: list[str], rng: random.Random) -> str:
    """Join the route and the other sentences, which follow it in random order."""
    others = [*courtesies, *remarks]
    rng.shuffle(others)
    return line([route, *others])


def line(sentences: list[str]) -> str:
    return " ".join(f"{sentence}." for sentence in sentences)


def _repeats(archive: Archive, topic: str, rng: random.Random) -> str:
    """Draw a reply with repetitive courtesies or remarks."""
    pool = rng.choice((COURTESIES, REMARKS))
    if rng.random() < 0.5:
        pool = (rng.choice(pool),)
    again = [rng.choice(pool) for _ in range(rng.randint(2, 7))]
    some = rng.sample(COURTESIES, rng.randint(0, 1))
    return compose(archive.route(topic, rng), [*some, *again], [], rng)


def _no_route(archive: Archive, topic: str, rng: random.Random) -> str:
    """Draw a reply of courtesies and remarks only."""
    del archive, topic
    return line(rng.sample(COURTESIES + REMARKS, rng.randint(1, 4)))


def _two_routes(archive: Archive, topic: str, rng: random.Random) -> str:
    """Draw a reply with the new route and another that an agent might name, which may be the same one."""
    routes = [f"{topic} {archive.new[topic]}", archive.route(topic, rng)]
    rng.shuffle(routes)
    others = rng.sample(COURTESIES + REMARKS, rng.randint(0, 2))
    return line([*routes, *others] if rng.random() < 0.5 else [*others, *routes])


def _cut_off(archive: Archive, topic: str, rng: random.Random) -> str:
    """Draw a reply that stops in the middle."""
    words = archive.reply(topic, rng).split()
    return " ".join(words[: rng.randint(1, len(words) - 1)]).rstrip(".")


FLAWS: dict[str, Callable[[Archive, str, random.Random], str]] = {
    "repeats": _repeats,
    "no route": _no_route,
    "two routes": _two_routes,
    "cut off": _cut_off,
}
