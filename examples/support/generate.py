"""Write the support conversations: 5,000 messages of customers, each with the reply that this company wants.

    python examples/support/generate.py    # data/train.jsonl, validation.jsonl, test.jsonl

A message is about one of 36 topics; the right reply names the topic, this company's code for it and the team that has
it: `refund 417 Harbor`. Codes and teams are the company's own: no pretraining document of the base model has them.

A message is a clause about its topic (from `examples/tiny_base/english.py`) between an opening, an aside and a closing
(from `wording.py`). The splits share no clause, opening, aside or closing, so a test message is new in its wording and
not only in its details. About half of the test messages have clauses that the base model saw in pretraining, the others
have clauses that it never saw. `cluster` names the clause: rows that share it are alike, so an interval should resample
them together.
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
"""Which of a topic's six clauses a split has; the test has the two of `UNSEEN` besides."""
NOT_OFFERED = frozenset({"career", "praise", "roaming", "number"})
"""Topics this company has no desk for: 36 of 40 are left."""
Row = dict[str, str]


def rules(seed: int = 0) -> dict[str, str]:
    """Topic to the code and the team that this company answers with."""
    rng = random.Random(seed)
    topics = [topic for topic in TOPICS if topic not in NOT_OFFERED]
    codes = rng.sample(range(100, 1000), len(topics))
    teams = sorted(RESERVED_TEAMS)
    return {topic: f"{code} {rng.choice(teams)}" for topic, code in zip(topics, codes, strict=True)}


def clauses(topic: str, split: str) -> dict[str, str]:
    """Clauses of a topic that a split may use, by the names that `cluster` gives them."""
    chosen = {f"{topic}/{number}": TOPICS[topic][number] for number in CLAUSES[split]}
    if split == "test":
        chosen |= {f"{topic}/unseen-{number}": clause for number, clause in enumerate(UNSEEN[topic])}
    return chosen


def message(clause: str, split: str, rng: random.Random) -> str:
    """Opening, clause and closing, with an aside before or after the clause."""
    parts = [rng.choice(OPENINGS[split]), clause, rng.choice(CLOSINGS[split])]
    parts.insert(rng.choice((1, 2)), rng.choice(ASIDES[split]))
    text = " ".join(f"{part[0].upper()}{part[1:]}." for part in parts if part)
    return text.format(
        item=rng.choice(ITEMS), digits=rng.randint(1000, 99999), name=rng.choice(NAMES), day=rng.choice(DAYS)
    )


def generate(seed: int = 0) -> dict[str, list[Row]]:
    """All three splits."""
    table = rules(seed)
    splits: dict[str, list[Row]] = {}
    for split, size in SIZES.items():
        rng = random.Random(f"{seed} {split}")

        def row(place: int, split: str = split, rng: random.Random = rng) -> Row:
            topic = list(table)[place % len(table)]  # as many of each, but for a remainder
            cluster, clause = rng.choice(list(clauses(topic, split).items()))
            return {"input": message(clause, split, rng), "output": f"{topic} {table[topic]}", "cluster": cluster}

        splits[split] = distinct_rows(split, size, rng, row)
    return splits


def distinct_rows(
    split: str, size: int, rng: random.Random, make: Callable[[int], Row], key: str = "input"
) -> list[Row]:
    """So many rows of a split, shuffled and numbered, no two alike.

    Args:
        split: Begins their ids.
        size: How many.
        rng: Shuffles them; `make` may draw from it.
        make: Makes the row for a place.
        key: The field in which no two may be alike.
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
    """The command of a script that writes rows, given by a function of the seed, to files by their name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=folder)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make(arguments.seed).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(generate, __doc__, HERE / "data")
