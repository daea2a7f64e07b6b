"""Legal citations: a citation as somebody wrote it, the citation as it should be.

    512 F. 2nd 88, Court of Appeals for the Ninth Circuit, 1978  ->  512 F.2d 88 (9th Cir. 1978)

What has to be known is real: the reporters' editions with their variations (reporters-db), and the courts' names with
the strings that cite them (courts-db). Volume, page and year are random numbers, to be copied; the cases don't exist.
The court is always named, also where The Bluebook would leave it out because the reporter implies it.

A state's reporter goes with courts of that state, any other with federal courts. The year is one in which both existed,
as far as the two databases have dates.

- `train`, `validation`, `test`: the same editions, each variation in one split only.
- `test_unseen_editions`: editions that no other split has.

At least half of the courts of each test split are in `train`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from itertools import cycle, islice

from courts import Court, compatible, read_courts
from packages import Domain, PackageFile, Row
from reporters import Edition, read_editions

REPORTERS = PackageFile(
    package="reporters_db",
    path="data/reporters.json",
    sha256="d1dee4057eaf051b3737c720fd0c58cd436f74b69286f521c3601d6aa4d332f1",
    license="BSD",
)
COURTS = PackageFile(
    package="courts_db",
    path="data/courts.json",
    sha256="89bc649f9cf2f99d40eb82577ffb642a734376b712cef8d3ae86daedbb188ac3",
    license="BSD",
)
SOURCES = (REPORTERS, COURTS)
ROWS = {"train": 5000, "validation": 400, "test": 600, "test_unseen_editions": 200}
UNSEEN_EDITIONS = 100
MAX_VOLUME, MAX_PAGE = 599, 1199
CITATION = re.compile(r"(?P<volume>\d+) (?P<reporter>.+?) (?P<page>\d+) \((?P<court>.+) (?P<year>\d{4})\)")
FIELDS = ("volume", "reporter", "page", "court", "year")


def load() -> Domain:
    """Make the domain's data.

    Raises:
        SystemExit: If a package isn't installed or has another file.
    """
    editions, left_out_variations = read_editions(json.loads(REPORTERS.read()))
    courts, left_out_courts = read_courts(json.loads(COURTS.read()))
    published = {
        edition.name: compatible(courts, edition.cite_type, edition.jurisdictions, edition.years)
        for edition in editions
    }
    without_courts = sum(not published[edition.name] for edition in editions)
    variations = _split([edition for edition in editions if published[edition.name]])
    made, known = {}, set()
    for split, pairs in variations.items():
        rng = random.Random(f"{split} 0")
        rows = []
        for number, (edition, written) in enumerate(islice(cycle(pairs), ROWS[split])):
            choice = published[edition.name]
            # Each second court of a test is one that training has, as far as the edition goes with one.
            seen = [court for court in choice if court.citation in known] if number % 2 else []
            rows.append(_row(rng, edition, written, rng.choice(seen or choice)))
        known = known or {_court(row) for row in rows}
        made[split] = rows
    tests = {split: [_court(row) in known for row in rows] for split, rows in made.items() if split != "train"}
    return Domain(
        splits=made,
        left_out=left_out_variations | left_out_courts | {"editions without a court": without_courts},
        facts={
            "editions": {split: len({edition.name for edition, _ in pairs}) for split, pairs in variations.items()},
            "variations": {split: len(pairs) for split, pairs in variations.items()},
            "courts": len({_court(row) for rows in made.values() for row in rows}),
            "courts_known_from_train": {split: round(sum(hits) / len(hits), 4) for split, hits in tests.items()},
        },
    )


def _split(editions: Sequence[Edition]) -> dict[str, list[tuple[Edition, str]]]:
    """Pairs of edition and variation for each split, in random order."""
    rng = random.Random(0)
    unseen = {edition.name for edition in rng.sample(editions, min(UNSEEN_EDITIONS, len(editions) // 4))}
    chosen: dict[str, list[tuple[Edition, str]]] = {split: [] for split in ROWS}
    for edition in editions:
        written = rng.sample(edition.variations, len(edition.variations))
        count = len(written)
        # One variation at least is for training: of two the other is for the test, of three one for validation, too.
        test, validation = (count > 1) * max(count // 3, 1), (count > 2) * max(count // 4, 1)
        parts = {"test": written[:test], "validation": written[test : test + validation]}
        parts["train"] = written[test + validation :]
        for split, names in parts.items() if edition.name not in unseen else [("test_unseen_editions", written)]:
            chosen[split] += [(edition, name) for name in names]
    for pairs in chosen.values():
        rng.shuffle(pairs)
    return chosen


def _row(rng: random.Random, edition: Edition, written: str, court: Court) -> Row:
    volume, page = rng.randint(1, MAX_VOLUME), rng.randint(1, MAX_PAGE)
    year = rng.randint(max(edition.years[0], court.years[0]), min(edition.years[1], court.years[1]))
    return {
        "input": f"{volume} {written} {page}, {rng.choice(court.names)}, {year}",
        "output": f"{volume} {edition.name} {page} ({court.citation} {year})",
        "cluster": edition.name,
    }


def _court(row: Row) -> str:
    return fields(row["output"])["court"]


def fields(citation: str) -> dict[str, str]:
    """Parse a citation; empty if it isn't one.

    Example:
        >>> fields("512 F.2d 88 (9th Cir. 1978)")
        {'volume': '512', 'reporter': 'F.2d', 'page': '88', 'court': '9th Cir.', 'year': '1978'}
    """
    found = CITATION.fullmatch(" ".join(citation.split()))
    return found.groupdict() if found else {}


def score(output: str, reference: str) -> float:
    r"""Grade an answer: 1 if it equals the reference but for whitespace, otherwise 0.

    Args:
        output: Answer of a model.
        reference: Correct citation.

    Example:
        >>> right = "512 F.2d 88 (9th Cir. 1978)"
        >>> score(" 512  F.2d 88 (9th Cir. 1978)\n", right), score("512 F. 2d 88 (9th Cir. 1978)", right)
        (1.0, 0.0)
    """
    return float(output.split() == reference.split())


def metrics(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compute the metrics of all answers.

    Args:
        outputs: Answers, ``n``.
        references: Correct citations, ``n``.

    Returns:
        ``exact``: mean of `score`. ``volume``, ``reporter``, ``page``, ``court``, ``year``: share of answers with this
        field right. ``parsed``: share of answers in which eyecite finds exactly one full case citation.

    Raises:
        ValueError: If there are no answers, or not as many as references.

    Example:
        >>> metrics(["512 F. 2d 88 (9th Cir. 1978)", "?"], ["512 F.2d 88 (9th Cir. 1978)", "1 U.S. 2 (U.S. 1801)"])
        {'exact': 0.0, 'volume': 0.5, 'reporter': 0.0, 'page': 0.5, 'court': 0.5, 'year': 0.5, 'parsed': 0.5}
    """
    if not references or len(outputs) != len(references):
        raise ValueError(
            f"metrics() got {len(outputs)} answers and {len(references)} references; pass one answer per reference."
        )
    pairs = [(fields(output), fields(reference)) for output, reference in zip(outputs, references, strict=True)]
    counts = {"exact": sum(map(score, outputs, references))}
    counts |= {name: sum(answer.get(name) == right.get(name) for answer, right in pairs) for name in FIELDS}
    counts["parsed"] = sum(map(_is_parsed, outputs))
    return {name: count / len(outputs) for name, count in counts.items()}


def _is_parsed(text: str) -> bool:
    from eyecite import get_citations  # only here, since writing the data doesn't need it
    from eyecite.models import FullCaseCitation

    found = get_citations(text) if text.strip() else []  # eyecite refuses an empty text
    return len(found) == 1 and isinstance(found[0], FullCaseCitation)
