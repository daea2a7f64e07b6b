"""Courts of courts-db, and which of them a reporter publishes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

STATES = dict(
    line.split("-", 1)
    for line in """
al-Alabama,ak-Alaska,as-American Samoa,az-Arizona,ar-Arkansas,ca-California,co-Colorado,ct-Connecticut,
de-Delaware,dc-Washington D.C.,fl-Florida,ga-Georgia,gu-Guam,hi-Hawaii,id-Idaho,il-Illinois,in-Indiana,
ia-Iowa,ks-Kansas,ky-Kentucky,la-Louisiana,me-Maine,md-Maryland,ma-Massachusetts,mi-Michigan,mn-Minnesota,
ms-Mississippi,mo-Missouri,mt-Montana,ne-Nebraska,nv-Nevada,nh-New Hampshire,nj-New Jersey,nm-New Mexico,
ny-New York,nc-North Carolina,nd-North Dakota,mp-Northern Mariana Islands,oh-Ohio,ok-Oklahoma,or-Oregon,
pa-Pennsylvania,pr-Puerto Rico,ri-Rhode Island,sc-South Carolina,sd-South Dakota,tn-Tennessee,tx-Texas,
ut-Utah,vt-Vermont,vi-Virgin Islands,va-Virginia,wa-Washington,wv-West Virginia,wi-Wisconsin,wy-Wyoming""".replace(
        "\n", ""
    ).split(",")
)
"""Location of a court in courts-db by its code in a reporter's jurisdictions, `us:al`."""
LOCATIONS = {"Washignton D.C.": "Washington D.C.", "D.C.": "Washington D.C.", "DC": "Washington D.C."}
"""Other spellings of locations in courts-db."""
ATTORNEY_GENERAL = "ag"
"""Type of what courts-db lists but decides no case."""
FIRST_YEAR, LAST_YEAR = 1789, 2025
"""Years of what has no date; a start in 1750 means the same in reporters-db."""


@dataclass(frozen=True)
class Court:
    """A court that can be cited."""

    citation: str
    """How it is cited: `9th Cir.`"""
    names: tuple[str, ...]
    """Its name and others found in decisions."""
    location: str
    system: str
    """`state`, `federal` or another."""
    years: tuple[int, int]


def years(start: str | None, end: str | None) -> tuple[int, int]:
    """First and last year between two dates.

    Example:
        >>> years("1891-03-03", None), years("1750-01-01T00:00:00", "1900-12-31")
        ((1891, 2025), (1789, 1900))
    """
    return max(int(start[:4]) if start else FIRST_YEAR, FIRST_YEAR), int(end[:4]) if end else LAST_YEAR


def read_courts(courts: Sequence[dict]) -> tuple[list[Court], dict[str, int]]:
    """Read the courts that can be cited and told apart by name.

    Args:
        courts: Content of `courts.json`.

    Returns:
        The courts, and how many courts or names were left out, by reason.

    Example:
        >>> ninth = {"name": "Ninth Circuit", "examples": ["9th Circuit"], "citation_string": "9th Cir.", "dates": []}
        >>> ninth |= {"system": "federal", "location": "California", "type": "appellate"}
        >>> read_courts([ninth, ninth | {"name": "Tenth Circuit", "citation_string": "10th Cir."}])[0][0].names
        ('Ninth Circuit',)
    """
    meanings: dict[str, set[str]] = defaultdict(set)
    for court in courts:
        for name in _names(court):
            meanings[name.lower()].add(court["citation_string"])
    found, ambiguous = [], 0
    for court in courts:
        if not court["citation_string"] or court["type"] == ATTORNEY_GENERAL:
            continue
        names = tuple(name for name in _names(court) if len(meanings[name.lower()]) == 1)
        ambiguous += len(_names(court)) - len(names)
        dates = court["dates"] or [{"start": None, "end": None}]
        span = years(dates[0]["start"], dates[-1]["end"])
        if names:
            location = LOCATIONS.get(court["location"], court["location"])
            found.append(Court(court["citation_string"], names, location, court["system"], span))
    left_out = {
        "courts without a citation string": sum(not court["citation_string"] for court in courts),
        "attorneys general": sum(court["type"] == ATTORNEY_GENERAL for court in courts if court["citation_string"]),
        "names of several courts": ambiguous,
    }
    return found, left_out


def _names(court: dict) -> list[str]:
    return list(dict.fromkeys(" ".join(name.split()) for name in (court["name"], *(court.get("examples") or ()))))


def states(jurisdictions: Sequence[str]) -> set[str]:
    """Locations of the state courts among a reporter's jurisdictions.

    Example:
        >>> sorted(states(["us:ny;supreme.court", "us:oh:d6;court.appeals", "us:c9:ca.cd;district.court"]))
        ['New York', 'Ohio']
    """
    codes = (re.match(r"us:([a-z]{2})(?=[:;]|$)", jurisdiction) for jurisdiction in jurisdictions)
    return {STATES[code[1]] for code in codes if code and code[1] in STATES}


def compatible(
    courts: Sequence[Court], cite_type: str, jurisdictions: Sequence[str], span: tuple[int, int]
) -> list[Court]:
    """Courts that a reporter may publish: a state's reporter those of the state, others federal ones.

    Args:
        courts: All courts.
        cite_type: Type of the reporter in reporters-db.
        jurisdictions: Jurisdictions of the reporter.
        span: First and last year of the edition; a court must have existed in one of them.
    """
    located = states(jurisdictions) if cite_type.startswith("state") else set()
    return [
        court
        for court in courts
        if (court.system == "state" and court.location in located if located else court.system == "federal")
        and max(court.years[0], span[0]) <= min(court.years[1], span[1])
    ]
