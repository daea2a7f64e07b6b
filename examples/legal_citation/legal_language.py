"""English of mentions of cases: wordings of parties, locations in a reporter and years, and the text around them.

The meaning of `SEEN` wordings is the general knowledge of the base model ("sued by" precedes the plaintiff). The
dataset's splits share no wording. `UNSEEN` wordings appear in the test split only, and in no pretraining document; the
`FRAMES` of a split appear in that split only. No pretraining document has the firm's words for reporters (`TABLE`).
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Wordings:
    """Wordings of the three parts of a mention.

    Args:
        parties: Templates with `{p}` for the plaintiff and `{d}` for the defendant.
        locations: Templates with `{v}` for the volume, `{r}` for the word for a reporter and `{n}` for the page.
        years: Templates with `{y}` for the year.
    """

    parties: tuple[str, ...]
    locations: tuple[str, ...]
    years: tuple[str, ...]


@dataclass(frozen=True)
class Frames:
    """Text around a mention; asides may contain an unrelated year `{o}` or number `{k}`."""

    openings: tuple[str, ...]
    asides: tuple[str, ...]
    closings: tuple[str, ...]


SEEN: dict[str, Wordings] = {
    "train": Wordings(
        parties=(
            "{p} v {d}",
            "{p} versus {d}",
            "{p} sued {d}",
            "{d} was sued by {p}",
            "plaintiff {p}, defendant {d}",
            "{p} took {d} to court",
            "the suit of {p} against {d}",
            "{d} as defendant and {p} as plaintiff",
            "{p} filed a case on {d}",
        ),
        locations=(
            "{v} {r} {n}",
            "{r} {v} page {n}",
            "volume {v} of {r} at page {n}",
            "page {n} of {r} {v}",
            "{r} volume {v}, page {n}",
            "page {n}, volume {v}, {r}",
            "{r} book {v}, {n}",
            "{v} of the {r} reports, from page {n}",
            "in {r}, vol {v}, pg {n}",
            "starting at {n} in volume {v} of the {r}",
        ),
        years=("({y})", "from {y}", "decided in {y}", "of the year {y}", "{y}"),
    ),
    "validation": Wordings(
        parties=("{p} vs {d}", "{d} was the defendant and {p} the plaintiff", "{p} brought suit on {d}"),
        locations=("{v} {r} at {n}", "pg {n} of the {r}, volume {v}", "the {r}, number {v}, page {n}"),
        years=("year {y}", "a decision of {y}"),
    ),
    "test": Wordings(
        parties=(
            "{p} v. {d}",
            "defendant {d}, plaintiff {p}",
            "{d} was taken to court by {p}",
            "a claim of {p} against {d}",
            "{p} as plaintiff with {d} as defendant",
            "the plaintiff was {p} and the defendant was {d}",
            "{p} against {d}",
            "{d}, sued by {p}",
            "the case that {p} brought against {d}",
            "{d} lost to the plaintiff {p}",
            "{p} on one side and {d} on the other side",
            "{d} had to answer in court to {p}",
        ),
        locations=(
            "{v} {r} page {n}",
            "{r} vol {v} at {n}",
            "vol {v} {r}, page {n}",
            "at page {n} of volume {v} in {r}",
            "{r} reports {v}, {n}",
            "from page {n} of the {r}, book {v}",
            "{n} in {v} {r}",
            "{r} {v} {n}",
            "the {r} volume {v} from page {n} on",
            "book {v} of {r}, {n}",
            "volume {v}, {r}, {n}",
            "the page is {n}, the volume is {v}, {r}",
        ),
        years=(
            "in {y}",
            "handed down in {y}",
            "[{y}]",
            "it was {y}",
            "back in {y}",
            "year of decision {y}",
        ),
    ),
}
"""Wordings that the base model saw in pretraining, by the split that uses them."""

UNSEEN = Wordings(
    parties=(
        "{p} suing {d}",
        "{d}, which {p} sued",
        "{p} in court with {d}",
        "the defendant {d} and the plaintiff {p}",
        "the case by {p} on {d}",
        "the suit against {d} by {p}",
        "{p} had {d} in court",
        "{d} under suit by {p}",
        "{d} is the defendant of the plaintiff {p}",
    ),
    locations=(
        "{r}, the volume is {v}, see page {n}",
        "the {r} at {n}, volume {v}",
        "{n} is the page and {v} the volume of {r}",
        "volume {v}, page {n}, all in {r}",
        "{r}, number {v}, on page {n}",
        "at {n} in the {r}, vol {v}",
        "volume {v} in the {r}, {n} the page",
        "page {n}, in volume {v} of the {r}",
        "{v}, that is the volume of {r}, page {n}",
    ),
    years=("the decision was in {y}", "the court decided it in {y}", "its year is {y}"),
)
"""Wordings of the test split that no pretraining document and no other split has."""

FRAMES: dict[str, Frames] = {
    "pretraining": Frames(
        openings=(
            "",
            "",
            "",
            "cite",
            "please cite",
            "I need",
            "find the case",
            "citation for",
            "the case is",
            "we want to cite",
            "write this as it should be:",
            "look up",
            "my note says",
            "put this in order:",
            "I have this from a letter:",
            "can you cite",
        ),
        asides=(
            "",
            "",
            "Overruled in {o}",
            "It was cited again in {o}",
            "The appeal was in {o}",
            "A new law came in {o}",
            "{who} asked for it",
            "It is for file {k}",
            "We need it on {day}",
            "I found it on my desk",
            "The judge knows it",
            "It is in box {k}",
            "{who} has a copy of {o}",
            "The letter is of {day}",
            "Nobody read it since {o}",
        ),
        closings=(
            "",
            "",
            "",
            "thanks",
            "thank you",
            "please hurry",
            "for the brief",
            "it is for court",
            "kind regards",
            "is that right",
            "I wait for it",
            "best, {who}",
            "that is all I know",
        ),
    ),
    "train": Frames(
        openings=(
            "",
            "",
            "for the brief:",
            "we cite",
            "please write out",
            "the citation of",
            "this one next:",
            "here is a case:",
            "the judge wants",
            "from my notes:",
            "next we have",
            "could you cite",
        ),
        asides=(
            "",
            "",
            "It was overruled in {o}",
            "A law of {o} is about it",
            "{who} read it on {day}",
            "It goes in file {k}",
            "The hearing is on {day}",
            "We cited it in {o} too",
            "The other side has it",
            "My copy is from {o}",
            "{who} wrote it down",
            "It is on a list of {k}",
        ),
        closings=(
            "",
            "",
            "many thanks",
            "I need it on {day}",
            "regards, {who}",
            "please look at it",
            "it is for a letter",
            "thanks for your help",
            "that is the case",
            "write it soon",
        ),
    ),
    "validation": Frames(
        openings=("", "next:", "please find", "the letter names", "to be cited:", "I was told of"),
        asides=(
            "",
            "The law changed in {o}",
            "{who} wants it on {day}",
            "It is number {k} on my list",
            "The judge cited it in {o}",
            "I have no copy",
        ),
        closings=("", "thanks again", "yours, {who}", "I hope you find it", "it is for the judge"),
    ),
    "test": Frames(
        openings=(
            "",
            "as citation:",
            "please put down",
            "the note on my desk says",
            "one more case:",
            "we rely on",
            "how do I cite",
            "in the letter I read",
        ),
        asides=(
            "",
            "The rule was changed in {o}",
            "A judge asked about it in {o}",
            "{who} found it in box {k}",
            "It was read in court on {day}",
            "The copy of {o} is lost",
            "My list has {k} of them",
            "{who} is sure of it",
        ),
        closings=(
            "",
            "thank you very much",
            "greetings, {who}",
            "please find it",
            "it has to be right",
            "we file on {day}",
            "it is the last one",
        ),
    ),
}

REPORTERS = (
    *("U.S.", "S. Ct.", "L. Ed. 2d", "F.2d", "F.3d", "F. Supp.", "F. Supp. 2d", "B.R.", "P.2d", "P.3d", "A.2d", "A.3d"),
    *("N.E.2d", "N.W.2d", "S.E.2d", "S.W.2d", "S.W.3d", "So. 2d", "Cal. Rptr.", "N.Y.S.2d", "Mass.", "Mich."),
    *("Conn.", "Kan.", "Neb.", "Ohio St. 3d", "Ill. 2d", "Wis. 2d", "Ga.", "Wash. 2d"),
)
"""Reporters in their canonical abbreviation."""
NICKNAMES = (  # noqa: SIM905
    "owl fox bear wolf hawk crow swan deer lion goat green blue red gray white black brown gold silver amber copper "
    "maple cedar oak pine elm birch willow river lake hill stone sand cloud rain snow storm north south east west lamp "
    "clock wheel anchor bridge tower castle garden candle mirror ladder basket button pepper sugar honey lemon apple "
    "cherry plum peach federal pacific atlantic supreme district circuit central county"
).split()
"""Words that lawyers of a firm may use for a reporter."""
TABLE = {
    "amber": "Mass.",
    "anchor": "So. 2d",
    "atlantic": "A.2d",
    "bear": "Cal. Rptr.",
    "birch": "Mich.",
    "blue": "F.2d",
    "candle": "Ga.",
    "cedar": "P.2d",
    "circuit": "F.2d",
    "clock": "B.R.",
    "copper": "Conn.",
    "district": "F. Supp.",
    "federal": "F.3d",
    "fox": "Kan.",
    "garden": "N.Y.S.2d",
    "gold": "U.S.",
    "hawk": "Wis. 2d",
    "honey": "Ill. 2d",
    "ladder": "L. Ed. 2d",
    "lake": "Ohio St. 3d",
    "maple": "Neb.",
    "north": "N.E.2d",
    "pacific": "P.2d",
    "plum": "Wash. 2d",
    "river": "S.W.2d",
    "stone": "S. Ct.",
    "supreme": "U.S.",
    "tower": "B.R.",
}
"""The firm's reporter for each word. No pretraining document has any of these pairs."""
FIRM = "Marlow"
FIRMS = ("Acme", "Nova", "Zenit", "Polar", "Vista", "Terra", "Lumen", "Kappa", "Orion", "Delphi")
"""Firms in pretraining documents."""

SYLLABLES = (  # noqa: SIM905
    "ba be bo da de du fa fi ga go ka ke ko la le lo ma me mi na no pa pe po ra re ri sa se so ta te to va ve za zo"
).split()
SECOND_WORDS = (  # noqa: SIM905
    "Steel Bank Trust Press Motors Foods Lines Works Mills Energy Railway Union Hotel Paper Oil Glass"
).split()
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday")
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo")
YEARS = range(1950, 2010)
NUMBERS = range(100, 1000)
"""Volumes and pages."""
OWNERS = (*("pretraining",) * 6, *("train",) * 2, "validation", "test")

NOT_NAMES = ("kate", "name")
"""Words that syllables can form, but that have another use in the texts."""


def owner(stem: str) -> str:
    """The owner of a made-up name: pretraining, or one of the dataset's splits.

    >>> owner("bakoze")
    'train'
    """
    return OWNERS[zlib.crc32(stem.encode()) % len(OWNERS)]


def party(rng: random.Random, split: str, second: float = 0.35) -> str:
    """Draw a made-up name that belongs to `split`; with probability `second` it has a second word.

    >>> party(random.Random(0), "test")
    'Kozadu'
    """
    while True:
        stem = "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3))))
        if owner(stem) == split and stem not in NOT_NAMES:
            break
    return f"{stem.capitalize()} {rng.choice(SECOND_WORDS)}" if rng.random() < second else stem.capitalize()
