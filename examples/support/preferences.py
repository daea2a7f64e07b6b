"""Write what RLHF on the support example starts from: the archive of replies, and pairs of replies that were compared.

    python examples/support/preferences.py    # data/replies_*.jsonl, preferences_*.jsonl, narrow_*.jsonl

`replies`: the messages of `train.jsonl` and `validation.jsonl`, each with a reply as agents wrote them (`replies.py`).
Supervised fine-tuning on them gives the model that RLHF starts from.

`preferences`: two replies to a message, ordered by the rule of `rewards.py`. Both are from the archive, or one has
something wrong that agents never wrote. One training label in twenty is the wrong way round, as people's are;
validation and test labels are clean, so that an accuracy can be read as it is. Replies that the rule finds about equal
are never compared.

`narrow`: pairs by the same rule, all labels clean, of a route with one courtesy and the same route without. A reward
model of them is right about such replies, and knows nothing of routes or of other replies: see `hacked.yaml`.

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
"""Share of training pairs that are the wrong way round."""
SPOILT = 0.4
"""Share of pairs in which one reply is spoilt."""
LEAST_DIFFERENCE = 0.1
"""Of the true rewards of two replies that are compared."""
Pair = tuple[str, str, str]
"""Two replies, and what is between them: `archive`, or what is wrong with the spoilt one."""


def replies(seed: int = 0) -> dict[str, list[Row]]:
    """The messages of the training and validation rows with replies from the archive."""
    archive, rows = Archive(seed), generate(seed)
    splits = {}
    for split in ("train", "validation"):
        rng = random.Random(f"{seed} replies {split}")
        splits[split] = [{**row, "output": archive.reply(row["output"].split()[0], rng)} for row in rows[split]]
    return splits


def compared(archive: Archive, topic: str, rng: random.Random) -> Pair:
    """Two replies from the archive, or one of them spoilt."""
    if rng.random() < SPOILT:
        spoilt, kind = archive.spoilt(topic, rng)
        return archive.reply(topic, rng), spoilt, kind
    return archive.reply(topic, rng), archive.reply(topic, rng), "archive"


def compared_narrowly(archive: Archive, topic: str, rng: random.Random) -> Pair:
    """Two terse replies with the same route."""
    return (*archive.terse(topic, rng), "terse")


def pairs(
    name: str, draw: Callable[[Archive, str, random.Random], Pair], seed: int, wrong_labels: float
) -> dict[str, list[Row]]:
    """All splits of the pairs that `draw` gives, on messages of their own."""
    archive = Archive(seed)
    splits = {}
    for split, size in SIZES[name].items():
        rng = random.Random(f"{seed} {name} {split}")
        rows: list[Row] = []
        while len(rows) < size:
            topic = archive.topics[len(rows) % len(archive.topics)]
            cluster, clause = rng.choice(list(clauses(topic, split).items()))
            one, other, kind = draw(archive, topic, rng)
            reference = f"{topic} {archive.new[topic]}"
            worth = [true_reward(reply, reference) for reply in (one, other)]
            if abs(worth[0] - worth[1]) < LEAST_DIFFERENCE:
                continue
            right = worth[0] > worth[1]
            if split == "train" and rng.random() < wrong_labels:
                right = not right
            chosen, rejected = (one, other) if right else (other, one)
            text = message(clause, split, rng)
            rows.append({"prompt": text, "chosen": chosen, "rejected": rejected, "cluster": cluster, "kind": kind})
        rng.shuffle(rows)
        splits[split] = [{"id": f"{name}-{split}-{number:04d}", **row} for number, row in enumerate(rows)]
    return splits


def everything(seed: int = 0) -> dict[str, list[Row]]:
    """Rows by the name of their file."""
    made = {
        "replies": replies(seed),
        "preferences": pairs("preferences", compared, seed, WRONG_LABELS),
        "narrow": pairs("narrow", compared_narrowly, seed, 0.0),
    }
    return {f"{name}_{split}": rows for name, splits in made.items() for split, rows in splits.items()}


def main() -> None:
    write(everything, __doc__, Path(__file__).parent / "data")


if __name__ == "__main__":
    main()
