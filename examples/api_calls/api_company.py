"""The API of a company, Norvik: names of its functions and parameters, and JSON schemas of valid calls.

No pretraining document has any of its functions. The prompted arm reads the functions in its system turn; the tuned
model has learned them.
"""

from __future__ import annotations

import random
from typing import Any

from api_language import DAYS, INTENTS, RESERVED_FUNCTIONS, VALUE_TYPES
from api_pretraining import Function, vocabulary

COMPANY = "Norvik"
NOT_OFFERED = frozenset({"hire", "teach", "open", "charge", "delay", "alarm"})
"""Intents that this company has no function for; 18 of 24 remain."""
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
"""JSON schema of each value type."""


def functions(seed: int = 0) -> dict[str, Function]:
    """The company's functions, by key."""
    rng = random.Random(f"{COMPANY} {seed}")
    called, names = vocabulary(rng), rng.sample(RESERVED_FUNCTIONS, len(RESERVED_FUNCTIONS))
    keys = [key for key in INTENTS if key not in NOT_OFFERED]
    return {
        key: Function(
            key,
            name,
            tuple(
                (called[value_type], value_type) for value_type in VALUE_TYPES if value_type in INTENTS[key].value_types
            ),
        )
        for key, name in zip(keys, names, strict=True)
    }


def schemas(seed: int = 0) -> dict[str, dict[str, Any]]:
    """A JSON schema per function, by the value of `call`: all parameters are required, and no others allowed."""
    made = {}
    for function in functions(seed).values():
        call = f"{function.key} {function.name}"
        properties = {"call": {"const": call}} | {name: VALUES[value_type] for name, value_type in function.parameters}
        made[call] = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    return made
