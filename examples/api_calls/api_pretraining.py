"""Generated documents about APIs that are new in each of them: only who reads the prompt can call them.

A document is a conversation: a system turn that lists functions, one a line, each with the word that it is for, its
name and its parameters (`- "ship volo", "site", "units"`), then requests and the call that each of them is:
`{"call": "ship volo", "site": "oslo", "units": [12]}`. What functions and their parameters are called is drawn for each
document; a company calls the parameters for a kind of value alike in all functions. Quantities and hours are lists of
one number: after a bracket, a model this small finds the number in 100 steps, and after a colon it didn't in 800.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from api_frames import PRETRAINING_ASIDES, PRETRAINING_CLOSINGS, PRETRAINING_OPENINGS
from api_language import (
    COUNTS,
    DAYS,
    ENGLISH,
    HOURS,
    INTENTS,
    KINDS,
    OTHER_KEYS,
    PEOPLE,
    PLACES,
    REFS,
    RESERVED_FUNCTIONS,
    RESERVED_NAMES,
    made_up,
)

Message = dict[str, str]
Value = int | str
RESERVED = frozenset({*RESERVED_FUNCTIONS, *ENGLISH}).union(
    *(names for split in RESERVED_NAMES.values() for names in split.values())
)
INSTRUCTIONS = (
    "You turn requests into calls of the {company} API. These are its functions and their parameters.",
    "Answer with one JSON call. Take it from this list.",
    "You are the assistant of {company}. Use these functions.",
    "Functions of {company}: name, then parameters.",
    "Every request is a call of a function. Write the call as JSON with the function and its arguments.",
    "Reply in JSON and nothing else. The functions are:",
    "Call the right function of {company} with the values of the request.",
    "API of {company}.",
    "Read the message, choose a function and fill in all of its parameters.",
)
COMPANIES = ("Acme", "Nova", "Zenit", "Polar", "Vista", "Terra", "Lumen", "Kappa", "Orion", "Delphi")


@dataclass(frozen=True)
class Function:
    """A function of an API.

    Args:
        key: The word that it is for.
        name: What the company calls it.
        parameters: Its parameters with their kinds of value, in the order of a call.
    """

    key: str
    name: str
    parameters: tuple[tuple[str, str], ...]

    def line(self) -> str:
        """As it stands in a prompt."""
        return "- " + ", ".join(f'"{text}"' for text in (f"{self.key} {self.name}", *dict(self.parameters)))

    def call(self, values: Mapping[str, Value]) -> str:
        """The call with a request's values, given by their kinds."""
        given = {name: values[kind] for name, kind in self.parameters}
        listed = {name: [value] if isinstance(value, int) else value for name, value in given.items()}
        return json.dumps({"call": f"{self.key} {self.name}"} | listed)


@dataclass(frozen=True)
class Level:
    """What documents of a level look like.

    Args:
        functions: Fewest and most functions.
        requests: Fewest and most requests.
        bare: Share of requests that are the key and the values.
        framed: Share of the others that have words around them.
    """

    functions: tuple[int, int]
    requests: tuple[int, int]
    bare: float
    framed: float


LEVELS = (
    Level((4, 6), (5, 8), bare=0.9, framed=0.0),
    Level((8, 16), (4, 8), bare=0.3, framed=0.3),
    Level((16, 18), (3, 5), bare=0.05, framed=0.8),
)


def word(rng: random.Random) -> str:
    """A made-up word that is neither one of the dataset's nor English."""
    made = made_up(rng)
    return word(rng) if made in RESERVED else made


def pretraining_value(kind: str, rng: random.Random) -> Value:
    """A value of a kind: a number, or a name that isn't one of the dataset's."""
    if kind == "day":
        return rng.choice(DAYS)
    if kind == "ref":
        return str(rng.choice(REFS))
    if kind in ("count", "hour"):
        return rng.choice(COUNTS if kind == "count" else HOURS)
    known = PEOPLE if KINDS[kind].mark == "@" else PLACES
    return rng.choice(known) if rng.random() < 0.3 else word(rng)


def vocabulary(rng: random.Random) -> dict[str, str]:
    """What a company calls the parameters of each kind."""
    return {kind: rng.choice(described.parameters) for kind, described in KINDS.items()}


def functions(level: Level, rng: random.Random) -> list[Function]:
    """An API: a function for each of some keys, whose parameters are called alike throughout."""
    count = rng.randint(*level.functions)
    others = rng.sample(OTHER_KEYS, rng.randint(0, count // 5))
    keys = rng.sample(sorted(INTENTS), count - len(others)) + others
    rng.shuffle(keys)
    called, names = vocabulary(rng), set[str]()
    made = []
    for key in keys:
        kinds = INTENTS[key].kinds if key in INTENTS else rng.sample(sorted(KINDS), rng.randint(1, 3))
        name = word(rng)
        while name in names:
            name = word(rng)
        names.add(name)
        made.append(Function(key, name, tuple((called[kind], kind) for kind in KINDS if kind in kinds)))
    return made


def sentence(text: str) -> str:
    """With a full stop; the first letter stays, so that a word is the same token everywhere."""
    return f"{text} ." if text else ""


def framed(clause: str, kinds: Sequence[str], frames: Sequence[Sequence[str]], rng: random.Random) -> str:
    """A clause with an opening, an aside and a closing; an aside has no value of a kind that the clause has."""
    openings, asides, closings = frames
    marks = {"#" for kind in kinds if KINDS[kind].mark == "#"} | {f"{{{kind}}}" for kind in kinds}
    fitting = [aside for aside in asides if not any(mark in aside for mark in marks)]
    parts = [rng.choice(openings), clause, rng.choice(closings)]
    parts.insert(rng.choice((1, 2)), rng.choice(fitting))
    return " ".join(sentence(part) for part in parts if part)


def request(function: Function, level: Level, rng: random.Random) -> tuple[str, dict[str, Value]]:
    """A request for a function, and its values by kind."""
    key = function.key
    kinds = INTENTS[key].kinds if key in INTENTS else tuple(kind for _, kind in function.parameters)
    values: dict[str, Value] = {}
    for kind in KINDS:  # kinds that the intent hasn't too: an aside may have them
        values[kind] = pretraining_value(kind, rng)
    if rng.random() < level.bare or key not in INTENTS:
        text = " ".join([key, *(KINDS[kind].phrase for kind in rng.sample(kinds, len(kinds)))])
    else:
        text = rng.choice(INTENTS[key].seen)
        if rng.random() < level.framed:
            text = framed(text, kinds, (PRETRAINING_OPENINGS, PRETRAINING_ASIDES, PRETRAINING_CLOSINGS), rng)
    return text.format(**values), {kind: values[kind] for kind in kinds}


def system_turn(api: Sequence[Function], instruction: str) -> Message:
    """The instruction and the functions, one a line."""
    return {"role": "system", "content": "\n".join([instruction, *(function.line() for function in api)])}


def document(rng: random.Random, level: int) -> list[Message]:
    """A document of level 0, 1 or 2; the last is as hard as the dataset."""
    described = LEVELS[level]
    api = functions(described, rng)
    messages = [system_turn(api, rng.choice(INSTRUCTIONS).format(company=rng.choice(COMPANIES)))]
    for _ in range(rng.randint(*described.requests)):
        function = rng.choice(api)
        text, values = request(function, described, rng)
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": function.call(values)})
    return messages
