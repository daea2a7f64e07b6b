"""Generate pretraining documents, each with a new code list, so that only a model that reads the list can code a note.

A document is a conversation: a system turn with a list (`- asthma K274`, one condition per line), then clinic notes and
their codes: `asthma K274, gout B61`, in the order of the note, or `none`. A condition that is denied or that a relative
has gets no code. The conditions of the list, their order and their codes are drawn for each document.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medical_frames import COUNTS, NAMES, PRETRAINING, Frames
from medical_language import CONDITIONS, DAYS, OTHER_CONDITIONS, RELATIVES, RESERVED_CODES, SEEN

Message = dict[str, str]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SYLLABLES = (  # noqa: SIM905
    "ba be bo da de du fa fi ga go ka ke ko la le lo ma me mi na no pa pe po ra re ri sa se so ta te to va ve za zo"
).split()
FILLERS = (  # noqa: SIM905
    "the a an of to in on at by for with from so then there here now soon later still just very really quite yesterday "
    "today tomorrow evening street house train office summer family people little long old small big good new"
).split()
RESERVED = frozenset(name for split in ("train", "validation", "test") for name in NAMES[split])
INSTRUCTIONS = (
    "Code the note. Name each condition of the patient with its code from this list.",
    "You are a medical coder of {place}. Use these codes.",
    "Codes of {place}. Answer with condition and code, or none.",
    "Read the note and list the conditions with their codes. What is denied or in the family is not coded.",
    "Answer with codes from the list.",
    "Every note has conditions. Write each with the code behind it, in the order of the note.",
    "Only code what the patient has. The list:",
    "Medical coding for {place}: condition, code.",
    "Which codes belong to the note? Write none if there is nothing to code.",
)
PLACES = ("Acme", "Nova", "Zenit", "Polar", "Vista", "Terra", "Lumen", "Kappa", "Orion", "Delphi")
NOTHING = "none"


@dataclass(frozen=True)
class Level:
    """Properties of the documents of a curriculum level.

    Args:
        rules: Minimum and maximum number of conditions in the list.
        requests: Minimum and maximum number of notes.
        coded: Weights of notes with 0, 1, 2 and 3 coded conditions.
        distractors: Weights of notes with 0, 1 and 2 conditions that are not coded.
        bare: Share of notes that consist of names of conditions only.
        named: Share of the other notes' conditions that are named rather than described.
        framed: Share of notes that may have an opening, an aside and a closing.
    """

    rules: tuple[int, int]
    requests: tuple[int, int]
    coded: tuple[float, float, float, float]
    distractors: tuple[float, float, float]
    bare: float
    named: float
    framed: float


LEVELS = (
    Level((4, 6), (6, 8), (0.0, 0.7, 0.3, 0.0), (1.0, 0.0, 0.0), bare=0.8, named=1.0, framed=0.0),
    Level((8, 16), (4, 8), (0.05, 0.55, 0.3, 0.1), (0.6, 0.3, 0.1), bare=0.15, named=0.4, framed=0.3),
    Level((24, 30), (3, 5), (0.05, 0.45, 0.35, 0.15), (0.4, 0.4, 0.2), bare=0.02, named=0.08, framed=0.8),
)


def code(rng: random.Random) -> str:
    """Draw a code in the format of ICD-10-CM, `K27` or `K274`, that the dataset doesn't have.

    >>> code(random.Random(0))
    'M97'
    """
    made = f"{rng.choice(LETTERS)}{rng.randint(0, 99):02d}" + (f"{rng.randint(0, 9)}" if rng.random() < 0.8 else "")
    return code(rng) if made in RESERVED_CODES.values() else made


def rules(level: Level, rng: random.Random) -> dict[str, str]:
    """Draw a code for each condition; some codes share their first three characters."""
    count = rng.randint(*level.rules)
    others = rng.sample(OTHER_CONDITIONS, rng.randint(0, count // 8))
    keys = rng.sample(sorted(CONDITIONS), count - len(others)) + others
    rng.shuffle(keys)
    codes: list[str] = []
    while len(codes) < count:
        made = code(rng)
        if codes and rng.random() < 0.08:
            made = f"{rng.choice(codes)[:3]}{rng.randint(0, 9)}"
        if made not in codes and made not in RESERVED_CODES.values():
            codes.append(made)
    return dict(zip(keys, codes, strict=True))


def name(rng: random.Random) -> str:
    """Draw a name that the dataset doesn't have: a common one, or one of syllables."""
    made = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))
    return rng.choice(NAMES["pretraining"]) if rng.random() < 0.5 or made in RESERVED else made


def chatter(rng: random.Random) -> str:
    """Draw meaningless words, so that the model learns to ignore unknown words around statements."""
    return " ".join(rng.choice(FILLERS) if rng.random() < 0.5 else name(rng) for _ in range(rng.randint(2, 6)))


def fill(template: str, rng: random.Random, *, who: Callable[[random.Random], str], ages: Sequence[int]) -> str:
    """Fill a frame with names and numbers; `{x}` remains for the conditions."""
    return (
        template.replace("{name}", who(rng))
        .replace("{age}", str(rng.choice(ages)))
        .replace("{day}", rng.choice(DAYS))
        .replace("{count}", str(rng.choice(COUNTS)))
        .replace("{relative}", rng.choice(RELATIVES))
    )


def listed(wordings: Sequence[str], word: str) -> str:
    """Join several wordings for one statement.

    >>> listed(["a cough", "dizzy spells", "pink eye"], "and")
    'a cough, dizzy spells and pink eye'
    """
    return f" {word} ".join([", ".join(wordings[:-1]), wordings[-1]]) if len(wordings) > 1 else wordings[0]


def statements(coded: Sequence[str], others: Sequence[str], frames: Frames, rng: random.Random) -> list[str]:
    """Draw statements with the wordings; coded conditions stay in order, and some share a statement."""
    groups: list[tuple[Sequence[str], str, Sequence[str]]] = []
    rest = list(coded)
    while rest:
        size = rng.choice((1, 1, 2, 3)) if len(rest) > 1 else 1
        groups.append((frames.present, "and", rest[:size]))
        rest = rest[size:]
    if len(others) == 2 and rng.random() < 0.4:
        groups.insert(rng.randint(0, len(groups)), (frames.denied, "or", others))
    else:
        for wording in others:
            templates = frames.denied if rng.random() < 0.55 else frames.family
            groups.insert(rng.randint(0, len(groups)), (templates, "or", [wording]))
    used: set[str] = set()
    made = []
    for templates, word, wordings in groups:
        template = rng.choice([free for free in templates if free not in used])
        used.add(template)
        text = template.replace("{x}", listed(wordings, word))
        made.append(re.sub(r"\b(no|any) an? ", r"\1 ", text))  # "no a dry cough" is not English
    return made


def add_frames(body: Sequence[str], frames: Frames, aside: str, rng: random.Random) -> list[str]:
    """Add an opening, an aside and a closing to statements; each may be empty."""
    parts = [rng.choice(frames.openings), *body, rng.choice(frames.closings)]
    parts.insert(rng.randint(1, len(parts) - 1), aside)
    return [part for part in parts if part]


def note(
    level: Level, table: Mapping[str, str], rng: random.Random, wordings: Callable[[str], Sequence[str]]
) -> tuple[str, list[str]]:
    """Draw a note, and the conditions of the table that are to be coded, in the order of the note."""
    count = rng.choices(range(4), level.coded)[0]
    distractors = rng.choices(range(3), level.distractors)[0] if count else rng.randint(1, 2)
    drawn = rng.sample(sorted(table), count + distractors)
    coded, others = drawn[:count], drawn[count:]
    if coded and rng.random() < level.bare:
        return listed(coded, "and"), coded

    def describe(key: str) -> str:
        return key if key not in CONDITIONS or rng.random() < level.named else rng.choice(wordings(key))

    parts = statements([describe(key) for key in coded], [describe(key) for key in others], PRETRAINING, rng)
    if rng.random() < level.framed:
        aside = rng.choice(PRETRAINING.asides) if rng.random() < 0.6 else chatter(rng)
        parts = add_frames(parts, PRETRAINING, aside, rng)
    return " ".join(f"{fill(part, rng, who=name, ages=range(20, 90))}." for part in parts), coded


def answer(coded: Sequence[str], table: Mapping[str, str]) -> str:
    """Write the conditions with their codes.

    >>> answer(["gout", "acne"], {"acne": "K274", "gout": "B61"})
    'gout B61, acne K274'
    """
    return ", ".join(f"{key} {table[key]}" for key in coded) or NOTHING


def system_turn(table: Mapping[str, str], instruction: str) -> Message:
    """Write the instruction and the list, one condition per line."""
    lines = (f"- {key} {value}" for key, value in table.items())
    return {"role": "system", "content": "\n".join([instruction, *lines])}


def document(rng: random.Random, level: int) -> list[Message]:
    """Draw a document of level 0, 1 or 2; the last is as hard as the dataset."""
    described = LEVELS[level]
    table = rules(described, rng)
    messages = [system_turn(table, rng.choice(INSTRUCTIONS).format(place=rng.choice(PLACES)))]
    for _ in range(rng.randint(*described.requests)):
        text, coded = note(described, table, rng, lambda key: CONDITIONS[key][:SEEN])
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer(coded, table)})
    return messages
