"""Write the mentions of cases: 6,000 messy notes of lawyers, each with the citation that one firm wants.

    python examples/legal_citation/legal_generate.py    # data/train.jsonl, validation.jsonl, test.jsonl

A note says who was against whom, where the case stands and when it was decided, in any order and in the firm's words:
`(1984), volume 347 of blue at page 483, Bako sued Tiremo`. The answer names the word and the reporter that the firm
means by it, and cites: `blue F.2d 483 : Bako v. Tiremo, 347 F.2d 483 (1984)`. What the firm means is its own: no
pretraining document of the base model has one of its pairs.

The splits share no wording of parties, place or year, nothing that stands around a mention, no name of a party, no
volume and no page. All wordings of a test note are among those that pretraining has, or none is: half of the notes
each. `cluster` names the wordings of the parties and of the place: rows that share both are alike.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

from generate import Row, distinct_rows, write  # noqa: E402
from legal_language import AROUND, NUMBERS, SEEN, TABLE, UNSEEN, YEARS, party  # noqa: E402
from legal_pretraining import PRETRAINING, Case, framed  # noqa: E402

SIZES = {"train": 5000, "validation": 400, "test": 600}
LAST_DIGITS = {"train": range(7), "validation": (7,), "test": (8, 9)}
"""Of the volumes and pages that a split has."""
SHUFFLED = 0.6
"""Share of notes whose parts aren't in the order of a citation."""
FRAMED = 0.4
"""Share of notes with something around the mention."""


def case(word: str, split: str, rng: random.Random) -> Case:
    """A case of two different parties, with names and numbers of the split."""
    plaintiff = defendant = party(rng, split)
    while defendant.split()[0] == plaintiff.split()[0]:
        defendant = party(rng, split)
    volume, page = rng.sample([number for number in NUMBERS if number % 10 in LAST_DIGITS[split]], 2)
    return Case(plaintiff, defendant, volume, word, page, rng.choice(YEARS))


def cluster(parties: str, place: str) -> str:
    """The name of a pair of wordings.

    >>> cluster("{p} versus {d}", "{v} {r} {n}"), cluster("{p} suing {d}", "{r}, number {v}, on page {n}")
    ('1/0', 'unseen-0/4')
    """
    if parties in UNSEEN.parties:
        return f"unseen-{UNSEEN.parties.index(parties)}/{UNSEEN.places.index(place)}"
    return f"{PRETRAINING.parties.index(parties)}/{PRETRAINING.places.index(place)}"


def row(word: str, split: str, rng: random.Random, *, unseen: bool) -> Row:
    """A note about a case in the reporter that the word means."""
    wordings = UNSEEN if unseen else SEEN[split]
    parties, place = rng.choice(wordings.parties), rng.choice(wordings.places)
    asked = case(word, split, rng)
    parts = asked.mention(parties, place, rng.choice(wordings.years))
    if rng.random() < SHUFFLED:
        rng.shuffle(parts)
    text = ", ".join(parts)
    if rng.random() < FRAMED:
        text = framed(text, AROUND[split], asked, rng)
    return {"input": text, "output": asked.answer(TABLE), "cluster": cluster(parties, place)}


def generate(seed: int = 0) -> dict[str, list[Row]]:
    """All three splits."""
    words = list(TABLE)
    splits: dict[str, list[Row]] = {}
    for split, size in SIZES.items():
        rng = random.Random(f"{seed} {split}")

        def made(place: int, split: str = split, size: int = size, rng: random.Random = rng) -> Row:
            return row(words[place % len(words)], split, rng, unseen=split == "test" and place >= size // 2)

        splits[split] = distinct_rows(split, size, rng, made, key="output")
    return splits


if __name__ == "__main__":
    write(generate, __doc__, HERE / "data")
