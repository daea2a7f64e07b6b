"""Generate the support conversations: 5,000 customer messages, each with the correct reply.

    python examples/support/generate.py    # data/train.jsonl, validation.jsonl, test.jsonl

A message is about one of 36 topics; the correct reply names the topic, the company's code for it and the responsible
team: `refund 417 Harbor`. Codes and teams are the company's own: no pretraining document of the base model has them.

A message is a clause about its topic (from `examples/tiny_base/english.py`) between an opening, an aside and a closing
(from `wording.py`). The splits share no clause, opening, aside or closing, so a test message is new in its wording, not
only in its details. About half of the test messages have clauses that the base model saw in pretraining, the others
have clauses that it never saw. `cluster` names the clause: rows that share it are similar, so confidence intervals
should resample them together.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tiny_base")]

from corpus import RESERVED_TEAMS  # noqa: E402
from english import DAYS, ITEMS, NAMES, TOPICS, UNSEEN  # noqa: E402
from wording import ASIDES, CLOSINGS, OPENINGS  # noqa: E402

COMPANY = "Halden"
SIZES = {"train": 4000, "validation": 400, "test": 600}
CLAUSES = {"train": (0, 1, 2), "validation": (3,), "test": (4, 5)}
"""Indices of a topic's six clauses that a split uses; the test split also uses the two of `UNSEEN`."""
NOT_OFFERED = frozenset({"career", "praise", "roaming", "number"})
"""Topics that this company has no team for; 36 of 40 remain."""
Row = dict[str, str]


def rules(seed: int = 0) -> dict[str, str]:
    """The company's code and team for each topic."""
    rng = random.Random(seed)
    topics = [topic for topic in TOPICS if topic not in NOT_OFFERED]
    codes = rng.sample(range(100, 1000), len(topics))
    teams = sorted(RESERVED_TEAMS)
    return {topic: f"{code} {rng.choice(teams)}" for topic, code in zip(topics, codes, strict=True)}


def clauses(topic: str, split: str) -> dict[str, str]:
    """Clauses of a topic that a split may use, by the name in `cluster`."""
    chosen = {f"{topic}/{number}": TOPICS[topic][number] for number in CLAUSES[split]}
    if split == "test":
        chosen |= {f"{topic}/unseen-{number}": clause for number, clause in enumerate(UNSEEN[topic])}
    return chosen


def message(clause: str, split: str, rng: random.Random) -> str:
    """Draw a message: opening, clause and closing, with an aside before or after the clause."""
    parts = [rng.choice(OPENINGS[split]), clause, rng.choice(CLOSINGS[split])]
    parts.insert(rng.choice((1, 2)), rng.choice(ASIDES[split]))
    text = " ".join(f"{part[0].upper()}{part[1:]}." for part in parts if part)
    return text.format(
        item=rng.choice(ITEMS), digits=rng.randint(1000, 99999), name=rng.choice(NAMES), day=rng.choice(DAYS)
    )


def generate(seed: int = 0) -> dict[str, list[Row]]:
    """Generate all three splits."""
    table = rules(seed)
    splits: dict[str, list[Row]] = {}
    for split, size in SIZES.items():
        rng = random.Random(f"{seed} {split}")

        def row(index: int, split: str = split, rng: random.Random = rng) -> Row:
            topic = list(table)[index % len(table)]  # equally many per topic, up to a remainder
            cluster, clause = rng.choice(list(clauses(topic, split).items()))
            return {"input": message(clause, split, rng), "output": f"{topic} {table[topic]}", "cluster": cluster}

        splits[split] = distinct_rows(split, size, rng, row)
    return splits


def distinct_rows(
    split: str, size: int, rng: random.Random, make: Callable[[int], Row], key: str = "input"
) -> list[Row]:
    """Make the rows of a split, shuffled and numbered, with distinct values of a field.

    Args:
        split: Name of the split, which the ids begin with.
        size: Number of rows.
        rng: Source of randomness for the order; `make` may draw from it too.
        make: Function that makes the row at an index.
        key: Field in which all rows must differ.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < size:
        row = make(len(rows))
        if row[key] not in seen:
            seen.add(row[key])
            rows.append(row)
    rng.shuffle(rows)
    return [{"id": f"{split}-{number:04d}", **row} for number, row in enumerate(rows)]


def write(make: Callable[[int], dict[str, list[Row]]], description: str | None, folder: Path) -> None:
    """Run the command line of a script that writes rows to JSONL files.

    Args:
        make: Function of the seed that returns the rows by file name.
        description: Description of the script in its help.
        folder: Default folder of the files.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the generator")
    parser.add_argument("--folder", type=Path, default=folder, help="folder that the files are written to")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make(arguments.seed).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(generate, __doc__, HERE / "data")
