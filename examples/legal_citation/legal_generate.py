"""Generate mentions of cases: 6,000 messy notes of a firm's lawyers, each with its citation.

    python examples/legal_citation/legal_generate.py    # data/train.jsonl, validation.jsonl, test.jsonl

A note names the parties, the location in a reporter and the year, in any order and in the firm's words: `(1984), volume
347 of blue at page 483, Bako sued Tiremo`. The answer names the word and its reporter, and cites: `blue F.2d 483 : Bako
v. Tiremo, 347 F.2d 483 (1984)`. The words are the firm's own: no pretraining document of the base model has one of its
pairs.

The splits share no wording of parties, location or year, no opening, aside or closing, no name of a party, no volume
and no page. Half of the test notes have only wordings that appear in pretraining, half have only wordings that don't.
`cluster` names the wordings of the parties and of the location: rows that share both are similar.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

from generate import Row, distinct_rows, write  # noqa: E402
from legal_language import FRAMES, NUMBERS, SEEN, TABLE, UNSEEN, YEARS, party  # noqa: E402
from legal_pretraining import PRETRAINING, Case, framed  # noqa: E402

SIZES = {"train": 5000, "validation": 400, "test": 600}
LAST_DIGITS = {"train": range(7), "validation": (7,), "test": (8, 9)}
"""Last digits of volumes and pages, by split."""
SHUFFLED = 0.6
"""Share of notes whose parts aren't in the order of a citation."""
FRAMED = 0.4
"""Share of notes with an opening, an aside and a closing."""


def case(word: str, split: str, rng: random.Random) -> Case:
    """Draw a case of two different parties, with names and numbers of the split."""
    plaintiff = defendant = party(rng, split)
    while defendant.split()[0] == plaintiff.split()[0]:
        defendant = party(rng, split)
    volume, page = rng.sample([number for number in NUMBERS if number % 10 in LAST_DIGITS[split]], 2)
    return Case(plaintiff, defendant, volume, word, page, rng.choice(YEARS))


def cluster(parties: str, location: str) -> str:
    """Name a pair of wordings.

    >>> cluster("{p} versus {d}", "{v} {r} {n}"), cluster("{p} suing {d}", "{r}, number {v}, on page {n}")
    ('1/0', 'unseen-0/4')
    """
    if parties in UNSEEN.parties:
        return f"unseen-{UNSEEN.parties.index(parties)}/{UNSEEN.locations.index(location)}"
    return f"{PRETRAINING.parties.index(parties)}/{PRETRAINING.locations.index(location)}"


def row(word: str, split: str, rng: random.Random, *, unseen: bool) -> Row:
    """Draw a note about a case in the reporter of the word."""
    wordings = UNSEEN if unseen else SEEN[split]
    parties, location = rng.choice(wordings.parties), rng.choice(wordings.locations)
    cited = case(word, split, rng)
    parts = cited.mention(parties, location, rng.choice(wordings.years))
    if rng.random() < SHUFFLED:
        rng.shuffle(parts)
    text = ", ".join(parts)
    if rng.random() < FRAMED:
        text = framed(text, FRAMES[split], cited, rng)
    return {"input": text, "output": cited.answer(TABLE), "cluster": cluster(parties, location)}


def generate(seed: int = 0) -> dict[str, list[Row]]:
    """Generate all three splits."""
    words = list(TABLE)
    splits: dict[str, list[Row]] = {}
    for split, size in SIZES.items():
        rng = random.Random(f"{seed} {split}")

        def make(index: int, split: str = split, size: int = size, rng: random.Random = rng) -> Row:
            return row(words[index % len(words)], split, rng, unseen=split == "test" and index >= size // 2)

        splits[split] = distinct_rows(split, size, rng, make, key="output")
    return splits


if __name__ == "__main__":
    write(generate, __doc__, HERE / "data")
