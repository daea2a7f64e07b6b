"""Text around the wordings of conditions in a note: statements, openings, asides, closings, names and ages.

`PRETRAINING` has the frames of the base model's documents, `FRAMES` those of the dataset's splits; no two of them share
a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Frames:
    """Templates of the text around the wordings of conditions in a note.

    Args:
        present: Statements that the patient has the condition `{x}`.
        denied: Statements that the patient doesn't have it.
        family: Statements that a `{relative}` has it.
        openings: Beginnings of a note, which may be empty.
        asides: Sentences about something other than conditions, which may be empty.
        closings: Ends of a note, which may be empty.
    """

    present: Sequence[str]
    denied: Sequence[str]
    family: Sequence[str]
    openings: Sequence[str]
    asides: Sequence[str]
    closings: Sequence[str]


PRETRAINING = Frames(
    present=[
        f"{subject} {verb} {{x}} {trailer}".strip()
        for subject in ("", "patient", "the patient", "she", "he", "{name}")
        for verb in (
            "has",
            "reports",
            "complains of",
            "suffers from",
            "came with",
            "presents with",
            "noticed",
            "describes",
            "mentions",
            "is seen for",
            "talks about",
            "comes because of",
        )
        for trailer in ("", "", "", "since {day}", "for {count} days", "again", "this week")
    ]
    + [
        template
        for template in ("{x}", "there is {x}", "{x} was noted", "found {x} today", "diagnosis of {x}", "now {x}")
        for _ in range(40)  # together a third of the statements
    ],
    denied=(
        "no {x}",
        "no sign of {x}",
        "denies {x}",
        "without {x}",
        "never had {x}",
        "does not have {x}",
        "free of {x}",
        "negative for {x}",
        "{x} is absent",
        "there is no {x}",
        "he denies {x}",
        "she has no {x}",
        "not aware of {x}",
        "no history of {x}",
        "{x} is not the case",
        "{name} never had {x}",
        "today no {x} at all",
        "the patient is free of {x}",
        "no more {x} since {day}",
        "could not find {x}",
    ),
    family=(
        "{relative} has {x}",
        "{relative} had {x}",
        "her {relative} has {x}",
        "his {relative} suffers from {x}",
        "the {relative} has {x}",
        "{relative} with {x}",
        "family history of {x} in the {relative}",
        "{x} in the {relative}",
        "the {relative} of {name} has {x}",
        "{relative} complains of {x}",
        "an {relative} had {x} for {count} years",
        "{relative} reports {x}",
        "it was the {relative} who noticed {x} at home",
        "{x} was noted in his {relative}",
    ),
    openings=(
        *("", "", "", "note on {name}", "{name} {age} years", "visit of {name}", "seen on {day}", "clinic note"),
        *(
            "{name} came on {day}",
            "age {age}",
            "doctor {name} writes",
            "new patient",
            "seen by {name}",
            "visit on {day}",
        ),
    ),
    asides=(
        *("", "", "", "", "works in an office", "lives with a dog", "{name} was present", "last visit on {day}"),
        *("came by bus", "sleeps {count} hours", "has two children", "the weather was hot", "slept well", "eats well"),
        *("lives in the city", "married for {count} years", "retired teacher", "name of the nurse is {name}"),
    ),
    closings=(
        *("", "", "", "", "see again in {count} weeks", "advised rest", "blood test ordered", "back on {day}"),
        *("call on {day}", "sent to {name}", "told to drink more water", "will come back", "plan was explained"),
    ),
)
"""Frames of pretraining documents; no row of the dataset has one."""
FRAMES: Mapping[str, Frames] = {
    "train": Frames(
        present=(
            *("the exam shows {x}", "treated for {x}", "main problem {x}", "wants help with {x}", "bothered by {x}"),
            *("we saw {x}", "sent here because of {x}", "the visit is about {x}", "{x} is the reason for coming"),
            *("again with {x}", "came in with {x} on {day}", "lives with {x} for {count} years"),
        ),
        denied=(
            *("no trace of {x}", "did not report {x}", "without any {x}", "{x} is not present", "we found no {x}"),
            *("says no to {x}", "never felt {x}"),
        ),
        family=(
            *("the {relative} was treated for {x}", "{x} on the side of the {relative}", "a {relative} lives with {x}"),
            *("file of the {relative} says {x}", "{relative} takes pills for {x}"),
        ),
        openings=(
            *("",) * 8,
            *("record of {name}", "{name} aged {age}", "today {name} was here", "follow up of {name}"),
            *("morning round on {day}", "{age} year old patient", "first visit", "checked {name} on {day}"),
        ),
        asides=(
            *("",) * 11,
            *("drives a truck", "likes to swim", "lives alone", "smokes after work", "has a small garden"),
            *("speaks some french", "moved here in may", "plays in a band", "on holiday until {day}"),
        ),
        closings=(
            *("",) * 7,
            *("return in {count} weeks", "drink a lot", "letter sent to {name}", "sick leave until {day}"),
            *("all was explained", "next check in {count} days", "lab work on {day}"),
        ),
    ),
    "validation": Frames(
        present=(
            *("exam confirms {x}", "the trouble is {x}", "visit because of {x}", "arrives with {x}", "we treat {x}"),
            "{x} came back on {day}",
        ),
        denied=("no evidence of {x}", "not a case of {x}", "has never known {x}", "{x} was never there"),
        family=("{relative} once had {x}", "{x} known in a {relative}", "her {relative} was here for {x}"),
        openings=(*("",) * 3, "entry for {name}", "{name} is {age}", "short visit", "ward round with {name}"),
        asides=(
            *("",) * 5,
            "is a nurse",
            "reads a lot",
            "has an old cat",
            "was abroad until {day}",
            "lives by the lake",
        ),
        closings=(*("",) * 4, "check in {count} weeks", "take it easy", "phone call on {day}", "report goes to {name}"),
    ),
    "test": Frames(
        present=(
            *("the chart lists {x}", "was admitted with {x}", "asks for help with {x}", "current problem is {x}"),
            *("the doctor notes {x}", "{x} brought the patient here", "troubled by {x}", "{x} began on {day}"),
            "{count} months of {x}",
        ),
        denied=(
            *("no hint of {x}", "did not mention {x}", "never any {x}", "{x} was not seen", "tests show no {x}"),
            "clearly free from {x}",
        ),
        family=(
            *("an older {relative} got {x}", "the {relative} is under care for {x}", "{x} was found in the {relative}"),
            "{relative} came here for {x}",
        ),
        openings=(
            *("",) * 5,
            *("memo about {name}", "{name} at {age}", "evening visit", "dictated on {day}", "case of {name}"),
            "house call at {name}",
        ),
        asides=(
            *("",) * 7,
            *("sings in a choir", "bakes bread", "owns a farm", "rides a bike", "just back from a trip"),
            *("studies law", "shares a flat with {name}"),
        ),
        closings=(
            *("",) * 6,
            *("review in {count} weeks", "keep warm", "copy for {name}", "forms signed", "seen again on {day}"),
            "light food for {count} days",
        ),
    ),
}
"""Frames of the dataset's splits; no two splits share one."""
NAMES: Mapping[str, tuple[str, ...]] = {
    "pretraining": ("anna", "ben", "clara", "david", "emma", "felix", "grace", "henry", "iris", "jack", "kate", "leo"),
    "train": (
        *("alice", "boris", "carla", "derek", "elena", "frank", "gina", "hugo", "irene", "jonas", "karen", "lars"),
        *("mona", "nils", "olga", "peter", "rita", "simon", "tina", "victor"),
    ),
    "validation": ("amos", "bella", "carl", "doris", "edgar", "fiona", "georg", "helen"),
    "test": (
        "adele",
        "bruno",
        "celia",
        "dario",
        "edith",
        "fritz",
        "greta",
        "heinz",
        "ivana",
        "julius",
        "klara",
        "ludwig",
    ),
}
AGES = {"train": range(20, 90, 3), "validation": range(21, 90, 3), "test": range(22, 90, 3)}
COUNTS = range(2, 10)
