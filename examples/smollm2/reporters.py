"""Editions of reporters-db, with the variations in which they are written."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from courts import years

CASE_REPORTERS = ("federal", "state", "state_regional", "specialty", "scotus_early")
"""Types of reporters of decisions; the others are databases and courts' own numbers."""


@dataclass(frozen=True)
class Edition:
    """An edition of a reporter with the variations that mean it and nothing else."""

    name: str
    years: tuple[int, int]
    variations: tuple[str, ...]
    cite_type: str
    jurisdictions: tuple[str, ...]


def read_editions(reporters: dict[str, list[dict]]) -> tuple[list[Edition], dict[str, int]]:
    """Read the editions of case reporters that have variations.

    Args:
        reporters: Content of `reporters.json`.

    Returns:
        The editions, and how many variations were left out, by reason.

    Example:
        >>> dates = {"start": "1924-01-01T00:00:00", "end": "1993-12-31T00:00:00"}
        >>> federal = {"cite_type": "federal", "mlz_jurisdiction": [], "editions": {"F.2d": dates}}
        >>> read_editions({"F.": [federal | {"variations": {"F. 2nd": "F.2d"}}]})[0][0].years
        (1924, 1993)
    """
    entries = [entry for group in reporters.values() for entry in group]
    meanings: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        for written, edition in [*entry["variations"].items(), *zip(entry["editions"], entry["editions"], strict=True)]:
            meanings[written].add(edition)
    found: dict[str, Edition] = {}
    other = "variations in other publications than case reporters"
    ambiguous = "variations of several editions"
    repeated = "variations of an edition that another reporter has, too"
    left_out = dict.fromkeys((other, ambiguous, repeated), 0)
    for entry in entries:
        by_edition: dict[str, list[str]] = defaultdict(list)
        for written, edition in entry["variations"].items():
            if entry["cite_type"] not in CASE_REPORTERS or "cite_format" in entry:
                left_out[other] += 1
            elif len(meanings[written]) > 1:
                left_out[ambiguous] += 1
            elif edition in found:
                left_out[repeated] += 1
            else:
                by_edition[edition].append(written)
        for edition, written in by_edition.items():
            dates = entry["editions"][edition]
            found[edition] = Edition(
                name=edition,
                years=years(dates["start"], dates["end"]),
                variations=tuple(written),
                cite_type=entry["cite_type"],
                jurisdictions=tuple(entry["mlz_jurisdiction"]),
            )
    return list(found.values()), left_out
