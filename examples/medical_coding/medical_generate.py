"""Generate clinic notes: 6,000 notes, each with its codes from the clinic's list.

    python examples/medical_coding/medical_generate.py    # data/train.jsonl, validation.jsonl, test.jsonl

A note describes up to three conditions of a patient in lay wordings, and may mention conditions that were denied or
that a relative has; the answer names each condition of the patient with its code, in the order of the note:
`asthma J459, gout M109`, or `none`. Codes are from ICD-10-CM; no pretraining document of the base model has
one of them.

The splits share no wording of a condition, no statement around it, no opening, aside or closing, no name, no age and no
set of two or three conditions, so neither a note nor an answer with several codes can be memorized. About half of the
test notes have only wordings that appear in pretraining, the others have only wordings that don't. `cluster` names the
wording of a note's first coded condition (or of another, if none is coded): rows that share it are similar.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

from generate import Row, distinct_rows, write  # noqa: E402
from medical_frames import AGES, FRAMES, NAMES  # noqa: E402
from medical_language import CONDITIONS, RESERVED_CODES, SEEN, SPLITS  # noqa: E402
from medical_pretraining import add_frames, answer, fill, statements  # noqa: E402

SIZES = {"train": 5000, "validation": 400, "test": 600}
WORDINGS = {"train": (0, 1, 2), "validation": (3,), "test": (4, 5)}
"""Indices of a condition's seen wordings that a split uses; half of the test notes use the unseen ones instead."""
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
"""Share of the sets of several conditions that each split gets."""
CODED = (0.06, 0.59, 0.26, 0.09)
"""Weights of notes with no, one, two and three conditions to code."""
DISTRACTORS = (0.55, 0.33, 0.12)
"""Weights of notes with no, one and two conditions that are denied or a relative's."""


def split_of(conditions: Iterable[str], seed: int = 0) -> str:
    """The split that a set of two or three conditions belongs to.

    >>> split_of(["gout", "acne"]) == split_of(["acne", "gout"])
    True
    """
    rng = random.Random(f"{seed} {' '.join(sorted(conditions))}")
    return rng.choices(SPLITS, [SHARES[split] for split in SPLITS])[0]


def wordings(split: str, *, unseen: bool = False) -> dict[str, dict[str, str]]:
    """Wordings that a split may use, by condition and by the name in `cluster`."""
    if unseen:
        return {key: {f"unseen-{n}": text for n, text in enumerate(CONDITIONS[key][SEEN:])} for key in RESERVED_CODES}
    return {key: {str(n): CONDITIONS[key][n] for n in WORDINGS[split]} for key in RESERVED_CODES}


def drawn(first: str, split: str, seed: int, rng: random.Random) -> tuple[list[str], list[str]]:
    """Draw conditions to code and others, starting with `first` unless several are to be coded."""
    keys = list(RESERVED_CODES)
    count = rng.choices(range(4), CODED)[0]
    others = rng.choices(range(3), DISTRACTORS)[0] if count else rng.randint(1, 2)
    if count < 2:
        chosen = [first, *rng.sample([key for key in keys if key != first], count + others - 1)]
    else:
        chosen = rng.sample(keys, count + others)
        while split_of(chosen[:count], seed) != split:  # without `first`, which may be in no set of this split
            chosen = rng.sample(keys, count + others)
    return chosen[:count], chosen[count:]


def row(first: str, split: str, seed: int, rng: random.Random) -> Row:
    """Draw a note about the condition `first` and others."""
    known = wordings(split, unseen=split == "test" and rng.random() < 0.5)
    coded, others = drawn(first, split, seed, rng)
    numbers = {key: rng.choice(list(known[key])) for key in (*coded, *others)}
    texts = {key: known[key][number] for key, number in numbers.items()}
    frames = FRAMES[split]
    parts = statements([texts[key] for key in coded], [texts[key] for key in others], frames, rng)
    parts = add_frames(parts, frames, rng.choice(frames.asides), rng)
    text = " ".join(f"{fill(part, rng, who=lambda r: r.choice(NAMES[split]), ages=AGES[split])}." for part in parts)
    main = (coded or others)[0]
    return {"input": text, "output": answer(coded, RESERVED_CODES), "cluster": f"{main}/{numbers[main]}"}


def generate(seed: int = 0) -> dict[str, list[Row]]:
    """Generate all three splits."""
    splits: dict[str, list[Row]] = {}
    for split, size in SIZES.items():
        rng = random.Random(f"{seed} {split}")

        def make(index: int, split: str = split, rng: random.Random = rng) -> Row:
            return row(list(RESERVED_CODES)[index % len(RESERVED_CODES)], split, seed, rng)

        splits[split] = distinct_rows(split, size, rng, make)
    return splits


if __name__ == "__main__":
    write(generate, __doc__, HERE / "data")
