"""Generated documents whose rules are new in each of them: only who reads the context can be right.

A document is a conversation: a system turn with rules (`- topic code team`, one a line), then requests that are about a
topic and answers that restate the topic and copy its code and team: `refund 417 Falcon`. Teams, codes and which topics
have a rule are drawn anew for each document; earlier requests with their answers are few-shot examples to later ones. A
few documents are plain text: small stories and sums.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
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
Clauses = Mapping[str, Sequence[str]]

RESERVED_TEAMS = frozenset({"Korima", "Loteka", "Pesoba", "Minoto", "Vedama", "Tenozo", "Golapa", "Sarede"})
"""Team names of the support example: never in a document here."""
TEAM_WORDS = (  # noqa: SIM905  # as in the other word lists, split for being read
    "Billing Logistics Care Sales Returns Tech Legal Account Finance Product Privacy Quality Field Desk Alpha Delta "
    "Sigma Omega North South East West River Forest Stone Falcon Eagle Tiger Maple Cedar Copper Silver Amber Coral "
    "Violet Scarlet Castle Garden Island Valley Canyon Desert Glacier Comet Orbit Rocket Pixel Vector Matrix Cobalt "
    "Indigo Saffron Willow Juniper"
).split()
SYLLABLES = (  # noqa: SIM905
    "ba be bo da de du fa fi ga go ka ke ko la le lo ma me mi na no pa pe po ra re ri sa se so ta te to va ve za zo"
).split()
OTHER_KEYS = (  # noqa: SIM905
    "contract museum parking voting weather kitchen travel music medicine library harvest traffic energy banking "
    "cleaning"
).split()
"""Keys that no clause is about: they are asked for by name."""
INSTRUCTIONS = (
    "You answer requests of {company}. Name the topic, the code and the team.",
    "Sort each message. Reply with topic, code and team from this list.",
    "You are the desk of {company}. Use these rules.",
    "Rules of {company}: topic, code, team.",
    "Every request has a topic. Answer with the topic and what stands behind it.",
    "Follow the list. Answer in one line.",
)
GENERIC_CLAUSES = (
    "I have a question about {key}",
    "please help me with {key}",
    "this is about {key}",
    "what about the {key}",
    "{key} please",
    "I need someone for {key}",
    "my problem is {key}",
    "there is an issue with {key}",
    "tell me more about {key}",
)
COMPANY_WORDS = ("Acme", "Nova", "Zenit", "Polar", "Vista", "Terra", "Lumen", "Kappa", "Orion", "Delphi")
FILLERS = (  # noqa: SIM905
    "the a an of to in on at by for with from and or but so then there here now soon later still just very really "
    "quite yesterday today tomorrow morning evening street house train office summer winter family people little long "
    "short new old"
).split()


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
        made_up: Share of team names that are new words, spelt in pieces.
        plain_text: Share of documents that are stories and sums.
        tokens: Tokens in a batch.
    """

    steps: int
    rules: tuple[int, int]
    queries: tuple[int, int]
    bare: float
    generic: float
    framed: float
    made_up: float = 0.5
    plain_text: float = 0.0
    tokens: int = 2048


CURRICULUM = (
    Stage(250, (4, 8), (12, 12), bare=1.0, generic=0.0, framed=0.0, made_up=0.0),
    Stage(200, (4, 12), (12, 12), bare=0.6, generic=0.4, framed=0.0),
    Stage(350, (8, 24), (8, 12), bare=0.2, generic=0.3, framed=0.5),
    Stage(500, (12, 40), (8, 12), bare=0.05, generic=0.15, framed=0.7, plain_text=0.05, tokens=3072),
    Stage(700, (24, 40), (4, 12), bare=0.02, generic=0.08, framed=0.9, plain_text=0.05, tokens=4096),
)


def word(rng: random.Random, syllables: int = 3) -> str:
    made = "".join(rng.choice(SYLLABLES) for _ in range(syllables))
    return word(rng, syllables) if made.capitalize() in RESERVED_TEAMS else made


def team(rng: random.Random, made_up: float) -> str:
    return word(rng, rng.randint(2, 3)).capitalize() if rng.random() < made_up else rng.choice(TEAM_WORDS)


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "." if text else ""


def fill(text: str, rng: random.Random) -> str:
    return text.format(
        item=rng.choice(ITEMS),
        digits=rng.randint(1000, 99999),
        name=rng.choice(NAMES),
        day=rng.choice(DAYS),
    )


def chatter(rng: random.Random) -> str:
    """Words that have nothing to do with anything, so that unknown ones around a clause don't confuse."""
    return " ".join(rng.choice(FILLERS) if rng.random() < 0.5 else word(rng) for _ in range(rng.randint(2, 7)))


def request(key: str, stage: Stage, rng: random.Random, clauses: Clauses = TOPICS) -> str:
    """A request about `key`; topics have clauses of their own, other keys are named in a generic one."""
    style = rng.random()
    if style < stage.bare:
        return key
    if style < stage.bare + stage.generic or key not in clauses:
        clause = rng.choice(GENERIC_CLAUSES).format(key=key)
    else:
        clause = fill(rng.choice(clauses[key]), rng)
    if rng.random() >= stage.framed:
        return clause
    parts = [rng.choice(PRETRAINING_OPENINGS), "", clause, "", rng.choice(PRETRAINING_CLOSINGS)]
    parts[rng.choice((1, 3))] = rng.choice(PRETRAINING_ASIDES) if rng.random() < 0.6 else chatter(rng)
    return " ".join(sentence(fill(part, rng)) for part in parts if part)


def rules(stage: Stage, rng: random.Random) -> dict[str, str]:
    """Topics (and now and then other words), each with a code of its own and a team, drawn for this document."""
    count = rng.randint(*stage.rules)
    others = rng.sample(OTHER_KEYS, rng.randint(0, count // 4)) if rng.random() < 0.5 else []
    keys = rng.sample(sorted(TOPICS), min(count - len(others), len(TOPICS))) + others
    rng.shuffle(keys)
    teams = [team(rng, stage.made_up) for _ in range(rng.randint(3, 10))]
    codes = rng.sample(range(100, 1000), len(keys))
    return {key: f"{code} {rng.choice(teams)}" for key, code in zip(keys, codes, strict=True)}


def system_turn(table: dict[str, str], rng: random.Random) -> Message:
    instruction = rng.choice(INSTRUCTIONS).format(company=rng.choice(COMPANY_WORDS))
    return {"role": "system", "content": "\n".join([instruction, *(f"- {k} {v}" for k, v in table.items())])}


def rule_document(stage: Stage, rng: random.Random, clauses: Clauses = TOPICS) -> list[Message]:
    """Rules, then requests about them; with other clauses than those of the corpus for an evaluation."""
    table = rules(stage, rng)
    messages = [system_turn(table, rng)]
    for _ in range(rng.randint(*stage.queries)):
        key = rng.choice(sorted(table))
        messages.append({"role": "user", "content": request(key, stage, rng, clauses)})
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
