"""Generate requests to Norvik's API: 6,000 messages, each with its call.

    python examples/api_calls/api_generate.py    # data/train.jsonl, validation.jsonl, test.jsonl

A message is a wording of one of 18 intents; one in five has an opening, an aside and a closing. The splits share no
wording, opening, aside or closing, no name of a place or person, and no number of an order or a door; quantities,
hours and days are too few to keep apart. About half of the test messages have wordings that the base model saw in
pretraining, the others have wordings that it never saw. `cluster` names the wording.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

from api_company import functions  # noqa: E402
from api_frames import ASIDES, CLOSINGS, OPENINGS  # noqa: E402
from api_language import COUNTS, DAYS, HOURS, INTENTS, REFS, RESERVED_NAMES, VALUE_TYPES  # noqa: E402
from api_pretraining import Value, framed  # noqa: E402
from generate import Row, distinct_rows, write  # noqa: E402

SIZES = {"train": 5000, "validation": 400, "test": 600}
WORDINGS = {"train": (0, 1, 2), "validation": (3,), "test": (4, 5)}
"""Indices of the six seen wordings that a split uses; the test split also uses the two unseen ones."""
LAST_DIGITS = {"train": "0123456", "validation": "7", "test": "89"}
"""Last digits of the numbers of orders and doors, by split."""
FRAMED = 0.2


def wordings(key: str, split: str) -> dict[str, str]:
    """Wordings of an intent that a split may use, by the name in `cluster`."""
    chosen = {f"{key}/{number}": INTENTS[key].seen[number] for number in WORDINGS[split]}
    if split == "test":
        chosen |= {f"{key}/unseen-{number}": text for number, text in enumerate(INTENTS[key].unseen)}
    return chosen


def value(value_type: str, split: str, rng: random.Random) -> Value:
    """Draw a value of a type for a split."""
    if value_type == "day":
        return rng.choice(DAYS)
    if value_type == "ref":
        return rng.choice([str(number) for number in REFS if str(number)[-1] in LAST_DIGITS[split]])
    if value_type in ("count", "hour"):
        return rng.choice(COUNTS if value_type == "count" else HOURS)
    return rng.choice(RESERVED_NAMES[split][VALUE_TYPES[value_type].mark])


def message(wording: str, key: str, split: str, rng: random.Random) -> tuple[str, dict[str, Value]]:
    """Draw a message with a wording, and its values by type."""
    values = {value_type: value(value_type, split, rng) for value_type in VALUE_TYPES}
    while values["origin"] == values["target"]:
        values["target"] = value("target", split, rng)
    frames = (OPENINGS[split], ASIDES[split], CLOSINGS[split])
    text = framed(wording, INTENTS[key].value_types, frames, rng) if rng.random() < FRAMED else wording
    return text.format(**values), values


def generate(seed: int = 0) -> dict[str, list[Row]]:
    """Generate all three splits."""
    api = functions(seed)
    splits: dict[str, list[Row]] = {}
    for split, size in SIZES.items():
        rng = random.Random(f"{seed} {split}")

        def row(index: int, split: str = split, rng: random.Random = rng) -> Row:
            key = list(api)[index % len(api)]  # equally many per function, up to a remainder
            cluster, wording = rng.choice(list(wordings(key, split).items()))
            text, values = message(wording, key, split, rng)
            return {"input": text, "output": api[key].call(values), "cluster": cluster}

        splits[split] = distinct_rows(split, size, rng, row)
    return splits


if __name__ == "__main__":
    write(generate, __doc__, HERE / "data")
