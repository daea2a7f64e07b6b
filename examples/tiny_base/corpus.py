"""Generated documents whose rules are new in every one of them, so that only reading the context gives the right answer.

A document is a conversation: a system turn with rules (`topic team code`, one a line), then requests that are about a topic
and answers that restate the topic and copy its team and code. Teams, codes and which topics have a rule are drawn anew for each
document. A few documents are plain text: small stories and sums.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from english import (
    DAYS,
    ITEMS,
    NAMES,
    PRETRAINING_ASIDES,
    PRETRAINING_CLOSINGS,
    PRETRAINING_OPENINGS,
    TOPICS,
)

Message = dict[str, str]

RESERVED_TEAMS = frozenset({"Harbor", "Lantern", "Orchard", "Summit", "Anchor", "Meadow", "Bridge", "Beacon"})
"""Team names of the support example: never in a document here."""
TEAM_WORDS = (
    "Billing Logistics Care Sales Returns Tech Legal Account Finance Product Privacy Quality Field Desk Alpha Delta Sigma Omega "
    "North South East West River Forest Stone Falcon Eagle Tiger Maple Cedar Copper Silver Amber Coral Violet Scarlet Castle "
    "Garden Island Valley Canyon Desert Glacier Comet Orbit Rocket Pixel Vector Matrix Cobalt Indigo Saffron Willow Juniper"
).split()
SYLLABLES = "ba be bo da de du fa fi ga go ka ke ko la le lo ma me mi na no pa pe po ra re ri sa se so ta te to va ve za zo".split()
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
INSTRUCTIONS = (
    "You answer requests of {company}. Name the topic, the team and the code.",
    "Sort each message. Reply with topic, team and code from this list.",
    "You are the desk of {company}. Use these rules.",
    "Rules of {company}: topic, team, code.",
    "Every request has a topic. Answer with the topic and what stands behind it.",
    "Follow the list. Answer in one line.",
)
GENERIC_CLAUSES = (
    "I have a question about {key}", "please help me with {key}", "this is about {key}", "what about the {key}", "{key} please",
    "I need someone for {key}", "my problem is {key}", "there is an issue with {key}", "tell me more about {key}",
)
COMPANY_WORDS = ("Acme", "Nova", "Zenit", "Polar", "Vista", "Terra", "Lumen", "Kappa", "Orion", "Delphi")


@dataclass(frozen=True)
class Stage:
    """What documents of a part of the curriculum look like.

    Args:
        steps: Optimizer steps it lasts.
        rules: Fewest and most rules in a document.
        queries: Fewest and most requests in a document.
        bare: Share of requests that are the topic's name alone.
        generic: Share that name the topic in a generic clause; the rest are real clauses that may not name it.
        framed: Share of clauses with greetings, asides and closings around them.
        codes: Share of rules that have a code behind the team.
        plain_text: Share of documents that are stories and sums.
        tokens: Tokens in a batch.
    """

    steps: int
    rules: tuple[int, int]
    queries: tuple[int, int]
    bare: float
    generic: float
    framed: float
    codes: float = 1.0
    plain_text: float = 0.0
    tokens: int = 2048


CURRICULUM = (
    Stage(600, (4, 8), (12, 12), bare=1.0, generic=0.0, framed=0.0, codes=0.0),
    Stage(400, (4, 12), (12, 12), bare=0.7, generic=0.3, framed=0.0, codes=0.7),
    Stage(500, (8, 24), (8, 12), bare=0.3, generic=0.3, framed=0.5),
    Stage(800, (8, 24), (8, 12), bare=0.1, generic=0.2, framed=0.5, tokens=4096),
    Stage(800, (12, 40), (6, 12), bare=0.05, generic=0.15, framed=0.8, plain_text=0.05, tokens=4096),
    Stage(800, (20, 40), (4, 12), bare=0.02, generic=0.1, framed=0.9, plain_text=0.05, tokens=6144),
)


def word(rng: random.Random, syllables: int = 3) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(syllables))


def team(rng: random.Random) -> str:
    return rng.choice(TEAM_WORDS) if rng.random() < 0.6 else word(rng, rng.randint(2, 3)).capitalize()


def code(rng: random.Random) -> str:
    letters = "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 2)))
    return f"{letters}-{rng.randint(10, 999)}"


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "." if text else ""


def fill(text: str, rng: random.Random) -> str:
    return text.format(
        item=rng.choice(ITEMS),
        digits=rng.randint(1000, 99999),
        name=rng.choice(NAMES),
        day=rng.choice(DAYS),
    )


def request(key: str, stage: Stage, rng: random.Random) -> str:
    """A request about `key`; topics have clauses of their own, other keys are named in a generic one."""
    style = rng.random()
    if style < stage.bare:
        return key
    if style < stage.bare + stage.generic or key not in TOPICS:
        clause = rng.choice(GENERIC_CLAUSES).format(key=key)
    else:
        clause = fill(rng.choice(TOPICS[key]), rng)
    if rng.random() >= stage.framed:
        return clause
    parts = [rng.choice(PRETRAINING_OPENINGS), "", clause, "", rng.choice(PRETRAINING_CLOSINGS)]
    parts[rng.choice((1, 3))] = rng.choice(PRETRAINING_ASIDES)
    return " ".join(sentence(fill(part, rng)) for part in parts if part)


def rules(stage: Stage, rng: random.Random) -> dict[str, str]:
    """Topics and made-up words, each with a team and a code drawn for this document."""
    count = rng.randint(*stage.rules)
    made_up = rng.randint(0, count // 3) if rng.random() < 0.5 else 0
    keys = rng.sample(sorted(TOPICS), min(count - made_up, len(TOPICS))) + [word(rng) for _ in range(made_up)]
    keys = list(dict.fromkeys(keys))
    rng.shuffle(keys)
    teams = [team(rng) for _ in range(rng.randint(3, 10) if stage.codes else count)]
    values = (rng.choice(teams) + (f" {code(rng)}" if rng.random() < stage.codes else "") for _ in keys)
    return dict(zip(keys, values, strict=True))


def system_turn(table: dict[str, str], rng: random.Random) -> Message:
    instruction = rng.choice(INSTRUCTIONS).format(company=rng.choice(COMPANY_WORDS))
    return {"role": "system", "content": "\n".join([instruction, *(f"{k} {v}" for k, v in table.items())])}


def rule_document(stage: Stage, rng: random.Random) -> list[Message]:
    table = rules(stage, rng)
    messages = [system_turn(table, rng)]
    for _ in range(rng.randint(*stage.queries)):
        key = rng.choice(sorted(table))
        messages.append({"role": "user", "content": request(key, stage, rng)})
        messages.append({"role": "assistant", "content": f"{key} {table[key]}"})
    return messages


def plain_document(rng: random.Random) -> list[Message]:
    """A small story about things bought and sold, with a sum in it."""
    lines = []
    for _ in range(rng.randint(3, 6)):
        name, item, day = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(DAYS)
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        lines.append(
            rng.choice(
                (
                    f"On {day} {name} went to the shop and bought a {item}.",
                    f"{name} had {a} coins and found {b} more, so now there were {a + b}.",
                    f"The {item} was old, but {name} liked it.",
                    f"{name} wanted a {item}, and on {day} there was one in the window.",
                    f"{name} gave the {item} to a friend on {day}.",
                )
            )
        )
    return [{"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": " ".join(lines)}]


def document(stage: Stage, rng: random.Random) -> list[Message]:
    """One document of the curriculum."""
    return plain_document(rng) if rng.random() < stage.plain_text else rule_document(stage, rng)
