"""What agents of the company wrote back before there was a model, and what can go wrong with a reply.

A reply is a line of sentences: the route (`refund 964 Sarede.`), and behind it, or not, courtesies and remarks that
help nobody. In spring two teams were dissolved and half of the desks went to others; two replies in three still name
the old route. So the right reply to a message is in what a model learns from this archive, but often isn't what it
answers.
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
"""Teams that there were until spring."""
OLD_ROUTE = 2 / 3
"""How often an agent names the old route of a desk that moved."""
OTHER_TOPIC = 0.04
"""How often an agent takes a message to be about something else."""


def old_rules(seed: int = 0) -> dict[str, str]:
    """The topics whose desk moved, with the code and the team that they had: neither is anybody's now."""
    rng = random.Random(f"{seed} old")
    present = rules(seed)
    moved = sorted(rng.sample(sorted(present), len(present) // 2))
    codes = rng.sample(
        sorted(set(range(100, 1000)) - {int(value.split()[0]) for value in present.values()}), len(moved)
    )
    return {topic: f"{code} {rng.choice(DISSOLVED)}" for topic, code in zip(moved, codes, strict=True)}


class Archive:
    """Draws replies as the agents wrote them.

    Args:
        seed: Of the tables of routes.
    """

    def __init__(self, seed: int = 0) -> None:
        self.new, self.old = rules(seed), old_rules(seed)
        self.topics = sorted(self.new)

    def route(self, topic: str, rng: random.Random) -> str:
        """What an agent names as topic, code and team."""
        if rng.random() < OTHER_TOPIC:
            topic = rng.choice(self.topics)
        value = self.old[topic] if topic in self.old and rng.random() < OLD_ROUTE else self.new[topic]
        return f"{topic} {value}"

    def reply(self, topic: str, rng: random.Random) -> str:
        """A reply: no courtesy, one or two, and up to two remarks."""
        courtesies = rng.sample(COURTESIES, rng.choices((0, 1, 2), (4, 4, 2))[0])
        remarks = rng.sample(REMARKS, rng.choices((0, 1, 2), (4, 4, 2))[0])
        return with_others(self.route(topic, rng), courtesies, remarks, rng)

    def terse(self, topic: str, rng: random.Random) -> tuple[str, str]:
        """A route with one courtesy, and the same route without."""
        route = self.route(topic, rng)
        return line([route, rng.choice(COURTESIES)]), line([route])

    def spoilt(self, topic: str, rng: random.Random) -> tuple[str, str]:
        """A reply with something wrong that agents never wrote, and what it is."""
        kind = rng.choice(sorted(SPOILERS))
        return SPOILERS[kind](self, topic, rng), kind


def with_others(route: str, courtesies: list[str], remarks: list[str], rng: random.Random) -> str:
    """The route, and the other sentences behind it in any order."""
    others = [*courtesies, *remarks]
    rng.shuffle(others)
    return line([route, *others])


def line(sentences: list[str]) -> str:
    return " ".join(f"{sentence}." for sentence in sentences)


def _repeats(archive: Archive, topic: str, rng: random.Random) -> str:
    """Courtesies or remarks, the same or others, again and again."""
    pool = rng.choice((COURTESIES, REMARKS))
    if rng.random() < 0.5:
        pool = (rng.choice(pool),)
    again = [rng.choice(pool) for _ in range(rng.randint(2, 7))]
    some = rng.sample(COURTESIES, rng.randint(0, 1))
    return with_others(archive.route(topic, rng), [*some, *again], [], rng)


def _no_route(archive: Archive, topic: str, rng: random.Random) -> str:
    """Nothing but courtesies and remarks."""
    del archive, topic
    return line(rng.sample(COURTESIES + REMARKS, rng.randint(1, 4)))


def _two_routes(archive: Archive, topic: str, rng: random.Random) -> str:
    """The new route and what else an agent would have named, or the same one twice."""
    routes = [f"{topic} {archive.new[topic]}", archive.route(topic, rng)]
    rng.shuffle(routes)
    others = rng.sample(COURTESIES + REMARKS, rng.randint(0, 2))
    return line([*routes, *others] if rng.random() < 0.5 else [*others, *routes])


def _cut_off(archive: Archive, topic: str, rng: random.Random) -> str:
    """It stops in the middle."""
    words = archive.reply(topic, rng).split()
    return " ".join(words[: rng.randint(1, len(words) - 1)]).rstrip(".")


SPOILERS: dict[str, Callable[[Archive, str, random.Random], str]] = {
    "repeats": _repeats,
    "no route": _no_route,
    "two routes": _two_routes,
    "cut off": _cut_off,
}
