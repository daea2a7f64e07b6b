"""The API of one company, Norvik: what its functions and their parameters are called, and what a valid call is.

No document of the pretraining has a function of it. The prompted arm is given the functions in its system turn; the
tuned model has learnt them.
"""

from __future__ import annotations

import random
from typing import Any

from api_language import DAYS, INTENTS, KINDS, RESERVED_FUNCTIONS
from api_pretraining import Function, vocabulary

COMPANY = "Norvik"
NOT_OFFERED = frozenset({"hire", "teach", "open", "charge", "delay", "alarm"})
"""Intents that this company has no function for: 18 of 24 are left."""
NUMBER = {"type": "array", "minItems": 1, "maxItems": 1}
NAME = {"type": "string", "pattern": "^[a-z]+$"}
VALUES: dict[str, dict[str, Any]] = {
    "place": NAME,
    "origin": NAME,
    "target": NAME,
    "person": NAME,
    "ref": {"type": "string", "pattern": "^[0-9]{3}$"},
    "day": {"enum": list(DAYS)},
    "count": {**NUMBER, "items": {"type": "integer", "minimum": 1}},
    "hour": {**NUMBER, "items": {"type": "integer", "minimum": 0, "maximum": 23}},
}
"""JSON schema of a value of each kind."""


def functions(seed: int = 0) -> dict[str, Function]:
    """The company's functions, by the word that each is for."""
    rng = random.Random(f"{COMPANY} {seed}")
    called, names = vocabulary(rng), rng.sample(RESERVED_FUNCTIONS, len(RESERVED_FUNCTIONS))
    keys = [key for key in INTENTS if key not in NOT_OFFERED]
    return {
        key: Function(key, name, tuple((called[kind], kind) for kind in KINDS if kind in INTENTS[key].kinds))
        for key, name in zip(keys, names, strict=True)
    }


def schemas(seed: int = 0) -> dict[str, dict[str, Any]]:
    """A JSON schema for each function, by the `call` of its calls: all parameters required, no others allowed."""
    made = {}
    for function in functions(seed).values():
        call = f"{function.key} {function.name}"
        properties = {"call": {"const": call}} | {name: VALUES[kind] for name, kind in function.parameters}
        made[call] = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    return made
