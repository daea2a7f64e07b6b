"""Generate pretraining documents, each about a different API, so that only a model that reads the prompt can call it.

A document is a conversation: a system turn that lists functions, one per line, each with its key, its name and its
parameters (`- "ship volo", "site", "units"`), then requests with their calls:
`{"call": "ship volo", "site": "oslo", "units": [12]}`. Names of functions and parameters are drawn for each document; a
company uses the same parameter name for a value type in all functions. Quantities and hours are lists of one number: a
model this small learns to copy the number after a bracket within 100 steps, and didn't learn it after a colon in 800.
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
    OTHER_KEYS,
    PEOPLE,
    PLACES,
    REFS,
    RESERVED_FUNCTIONS,
    RESERVED_NAMES,
    VALUE_TYPES,
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
        key: Word for its intent.
        name: Name that the company gives it.
        parameters: Name and value type of each parameter, in the order of a call.
    """

    key: str
    name: str
    parameters: tuple[tuple[str, str], ...]

    def line(self) -> str:
        """The function's line in a prompt."""
        return "- " + ", ".join(f'"{text}"' for text in (f"{self.key} {self.name}", *dict(self.parameters)))

    def call(self, values: Mapping[str, Value]) -> str:
        """Write the call with a request's values, which are passed by type."""
        arguments = {name: values[value_type] for name, value_type in self.parameters}
        listed = {name: [value] if isinstance(value, int) else value for name, value in arguments.items()}
        return json.dumps({"call": f"{self.key} {self.name}"} | listed)


@dataclass(frozen=True)
class Level:
    """Properties of the documents of a curriculum level.

    Args:
        functions: Minimum and maximum number of functions.
        requests: Minimum and maximum number of requests.
        bare: Share of requests that consist of the key and the values only.
        framed: Share of the other requests that have an opening, an aside and a closing.
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
    """Draw a made-up word that is neither a name of the dataset nor English."""
    made = made_up(rng)
    return word(rng) if made in RESERVED else made


def pretraining_value(value_type: str, rng: random.Random) -> Value:
    """Draw a value of a type: a number, a day, or a name that the dataset doesn't have."""
    if value_type == "day":
        return rng.choice(DAYS)
    if value_type == "ref":
        return str(rng.choice(REFS))
    if value_type in ("count", "hour"):
        return rng.choice(COUNTS if value_type == "count" else HOURS)
    known = PEOPLE if VALUE_TYPES[value_type].mark == "@" else PLACES
    return rng.choice(known) if rng.random() < 0.3 else word(rng)


def vocabulary(rng: random.Random) -> dict[str, str]:
    """Draw a company's parameter name for each value type."""
    return {value_type: rng.choice(described.parameters) for value_type, described in VALUE_TYPES.items()}


def functions(level: Level, rng: random.Random) -> list[Function]:
    """Draw an API: a function for each of some keys, with the same parameter names throughout."""
    count = rng.randint(*level.functions)
    others = rng.sample(OTHER_KEYS, rng.randint(0, count // 5))
    keys = rng.sample(sorted(INTENTS), count - len(others)) + others
    rng.shuffle(keys)
    called, names = vocabulary(rng), set[str]()
    made = []
    for key in keys:
        value_types = INTENTS[key].value_types if key in INTENTS else rng.sample(sorted(VALUE_TYPES), rng.randint(1, 3))
        name = word(rng)
        while name in names:
            name = word(rng)
        names.add(name)
        made.append(
            Function(
                key,
                name,
                tuple((called[value_type], value_type) for value_type in VALUE_TYPES if value_type in value_types),
            )
        )
    return made


def sentence(text: str) -> str:
    """Add a period; the first letter stays lower-case, so that a word is the same token everywhere."""
    return f"{text} ." if text else ""


def framed(clause: str, value_types: Sequence[str], frames: Sequence[Sequence[str]], rng: random.Random) -> str:
    """Add an opening, an aside and a closing to a clause; the aside has no value of a type that the clause has."""
    openings, asides, closings = frames
    marks = {"#" for value_type in value_types if VALUE_TYPES[value_type].mark == "#"} | {
        f"{{{value_type}}}" for value_type in value_types
    }
    fitting = [aside for aside in asides if not any(mark in aside for mark in marks)]
    parts = [rng.choice(openings), clause, rng.choice(closings)]
    parts.insert(rng.choice((1, 2)), rng.choice(fitting))
    return " ".join(sentence(part) for part in parts if part)


def request(function: Function, level: Level, rng: random.Random) -> tuple[str, dict[str, Value]]:
    """Draw a request for a function, and its values by type."""
    key = function.key
    value_types = (
        INTENTS[key].value_types if key in INTENTS else tuple(value_type for _, value_type in function.parameters)
    )
    values: dict[str, Value] = {}
    for value_type in VALUE_TYPES:  # also types that the intent doesn't have, for asides
        values[value_type] = pretraining_value(value_type, rng)
    if rng.random() < level.bare or key not in INTENTS:
        text = " ".join(
            [key, *(VALUE_TYPES[value_type].phrase for value_type in rng.sample(value_types, len(value_types)))]
        )
    else:
        text = rng.choice(INTENTS[key].seen)
        if rng.random() < level.framed:
            text = framed(text, value_types, (PRETRAINING_OPENINGS, PRETRAINING_ASIDES, PRETRAINING_CLOSINGS), rng)
    return text.format(**values), {value_type: values[value_type] for value_type in value_types}


def system_turn(api: Sequence[Function], instruction: str) -> Message:
    """Write the instruction and the functions, one per line."""
    return {"role": "system", "content": "\n".join([instruction, *(function.line() for function in api)])}


def document(rng: random.Random, level: int) -> list[Message]:
    """Draw a document of level 0, 1 or 2; the last is as hard as the dataset."""
    described = LEVELS[level]
    api = functions(described, rng)
    messages = [system_turn(api, rng.choice(INSTRUCTIONS).format(company=rng.choice(COMPANIES)))]
    for _ in range(rng.randint(*described.requests)):
        function = rng.choice(api)
        text, values = request(function, described, rng)
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": function.call(values)})
    return messages
