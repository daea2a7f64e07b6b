"""Generate the data for RLHF on the support example: archived replies, and preference pairs.

    python examples/support/preferences.py    # data/replies_*.jsonl, preferences_*.jsonl, narrow_*.jsonl

`replies`: the messages of `train.jsonl` and `validation.jsonl`, each with a reply from the agents' archive
(`replies.py`). Supervised fine-tuning on them gives the model that RLHF starts from.

`preferences`: two replies to a message, ordered by the rule of `rewards.py`. Both are from the archive, or one has a
flaw that agents' replies never have. One training label in twenty is flipped, like errors of human labelers; validation
and test labels are clean, so that accuracies need no correction. Replies of nearly equal reward are never paired.

`narrow`: pairs by the same rule, with clean labels, of a route with one courtesy and the same route without. A reward
model that is trained on them is right about such replies, but can't grade routes or other replies: see `hacked.yaml`.

The messages of a split have the clauses, openings, asides and closings of that split only (`generate.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from generate import Row, clauses, generate, message, write
from replies import Archive
from rewards import true_reward

SIZES = {
    "preferences": {"train": 4000, "validation": 400, "test": 1000},
    "narrow": {"train": 2000, "validation": 400},
}
WRONG_LABELS = 0.05
"""Share of training pairs whose label is flipped."""
FLAWED = 0.4
"""Share of pairs in which one reply has a flaw that agents' replies never have."""
LEAST_DIFFERENCE = 0.1
"""Minimum difference of the true rewards of a pair."""
Pair = tuple[str, str, str]
"""Two replies and the type of pair: `archive`, `terse`, or the flaw of the flawed reply."""


def replies(seed: int = 0) -> dict[str, list[Row]]:
    """Generate the training and validation messages with replies from the archive."""
    archive, rows = Archive(seed), generate(seed)
    splits = {}
    for split in ("train", "validation"):
        rng = random.Random(f"{seed} replies {split}")
        splits[split] = [{**row, "output": archive.reply(row["output"].split()[0], rng)} for row in rows[split]]
    return splits


def compare(archive: Archive, topic: str, rng: random.Random) -> Pair:
    """Draw two replies from the archive, or one and a flawed one."""
    if rng.random() < FLAWED:
        flawed, flaw = archive.flawed(topic, rng)
        return archive.reply(topic, rng), flawed, flaw
    return archive.reply(topic, rng), archive.reply(topic, rng), "archive"


def compare_narrowly(archive: Archive, topic: str, rng: random.Random) -> Pair:
    """Draw two terse replies with the same route."""
    return (*archive.terse(topic, rng), "terse")


def pairs(
    name: str, draw: Callable[[Archive, str, random.Random], Pair], seed: int, wrong_labels: float
) -> dict[str, list[Row]]:
    """Generate all splits of the pairs that `draw` returns, each with a message of its own."""
    archive = Archive(seed)
    splits = {}
    for split, size in SIZES[name].items():
        rng = random.Random(f"{seed} {name} {split}")
        rows: list[Row] = []
        while len(rows) < size:
            topic = archive.topics[len(rows) % len(archive.topics)]
            cluster, clause = rng.choice(list(clauses(topic, split).items()))
            one, other, pair_type = draw(archive, topic, rng)
            reference = f"{topic} {archive.new[topic]}"
            true_rewards = [true_reward(reply, reference) for reply in (one, other)]
            if abs(true_rewards[0] - true_rewards[1]) < LEAST_DIFFERENCE:
                continue
            in_order = true_rewards[0] > true_rewards[1]
            if split == "train" and rng.random() < wrong_labels:
                in_order = not in_order
            chosen, rejected = (one, other) if in_order else (other, one)
            text = message(clause, split, rng)
            rows.append({"prompt": text, "chosen": chosen, "rejected": rejected, "cluster": cluster, "kind": pair_type})
        rng.shuffle(rows)
        splits[split] = [{"id": f"{name}-{split}-{number:04d}", **row} for number, row in enumerate(rows)]
    return splits


def everything(seed: int = 0) -> dict[str, list[Row]]:
    """Generate all rows, by file name."""
    made = {
        "replies": replies(seed),
        "preferences": pairs("preferences", compare, seed, WRONG_LABELS),
        "narrow": pairs("narrow", compare_narrowly, seed, 0.0),
    }
    return {f"{name}_{split}": rows for name, splits in made.items() for split, rows in splits.items()}


def main() -> None:
    write(everything, __doc__, Path(__file__).parent / "data")


if __name__ == "__main__":
    main()
