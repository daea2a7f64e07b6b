"""Generated documents in which words for reporters are new: only who reads the list can cite.

A document is a conversation: a system turn with a list (`- owl F.2d`, one word a line), then messy mentions of cases
and their citations: `owl F.2d 483 : Bako v. Tiremo Steel, 347 F.2d 483 (1954)`. The answer names the word, what the
list has behind it and the page, and then cites. Words, reporters, parties and numbers are drawn for each document.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from legal_language import (
    AROUND,
    DAYS,
    FIRMS,
    NICKNAMES,
    NUMBERS,
    PEOPLE,
    REPORTERS,
    SECOND_WORDS,
    SEEN,
    TABLE,
    YEARS,
    Around,
    Wordings,
    party,
)

Message = dict[str, str]
INSTRUCTIONS = (
    "Write the citation of each case. The list says which reporter is meant.",
    "You cite cases for {firm}. Use these words for reporters.",
    "Words of {firm} for reporters. Answer with the word, its reporter and the citation.",
    "Cite the case.",
    "Every message is about a case. Name the word and its reporter, then cite the case.",
    "Put mentions of cases in order: plaintiff, defendant, volume, reporter, page, year.",
    "Citations of {firm}: word, reporter, citation.",
    "Our lawyers have their own words for reporters. Cite with the reporter from this list.",
    "Turn notes of lawyers of {firm} into citations.",
)
BARE_INSTRUCTIONS = (
    "Name the reporter of each word.",
    "Which reporter is meant? Answer with the word and its reporter.",
    "Words of {firm} for reporters.",
)
PRETRAINING = Wordings(
    parties=tuple(wording for seen in SEEN.values() for wording in seen.parties),
    places=tuple(wording for seen in SEEN.values() for wording in seen.places),
    years=tuple(wording for seen in SEEN.values() for wording in seen.years),
)
SIMPLE = Wordings(("{p} v {d}", "{p} versus {d}", "{p} against {d}"), ("{v} {r} {n}", "{r} {v} {n}"), ("({y})", "{y}"))


@dataclass(frozen=True)
class Level:
    """What documents of a level look like.

    Args:
        rules: Fewest and most words in the list.
        requests: Fewest and most mentions.
        bare: Share of documents that ask for the reporter of a word alone.
        plain: Share of parties that are a plain word, one token.
        second: Share of made-up parties with a second word.
        wordings: Ways to put the parts.
        shuffled: Share of mentions whose parts aren't in the order of a citation.
        framed: Share of mentions with something around them.
    """

    rules: tuple[int, int]
    requests: tuple[int, int]
    bare: float
    plain: float
    second: float
    wordings: Wordings
    shuffled: float
    framed: float


LEVELS = (
    Level((4, 6), (6, 8), bare=0.4, plain=0.7, second=0.0, wordings=SIMPLE, shuffled=0.0, framed=0.0),
    Level((8, 16), (4, 6), bare=0.05, plain=0.2, second=0.2, wordings=PRETRAINING, shuffled=0.4, framed=0.2),
    Level((24, 30), (3, 4), bare=0.0, plain=0.05, second=0.35, wordings=PRETRAINING, shuffled=0.6, framed=0.8),
)


@dataclass(frozen=True)
class Case:
    """A case, and the word by which its reporter is called."""

    plaintiff: str
    defendant: str
    volume: int
    word: str
    page: int
    year: int

    def mention(self, parties: str, place: str, year: str) -> list[str]:
        """The three parts of a mention in the wordings given."""
        return [
            parties.replace("{p}", self.plaintiff).replace("{d}", self.defendant),
            place.replace("{v}", str(self.volume)).replace("{r}", self.word).replace("{n}", str(self.page)),
            year.replace("{y}", str(self.year)),
        ]

    def answer(self, table: Mapping[str, str]) -> str:
        """The word, its reporter, the page and the citation.

        >>> Case("Bako", "Tiremo Steel", 347, "owl", 483, 1954).answer({"owl": "F.2d"})
        'owl F.2d 483 : Bako v. Tiremo Steel, 347 F.2d 483 (1954)'
        """
        reporter = table[self.word]
        parties = f"{self.plaintiff} v. {self.defendant}"
        return f"{self.word} {reporter} {self.page} : {parties}, {self.volume} {reporter} {self.page} ({self.year})"


def framed(mention: str, around: Around, case: Case, rng: random.Random) -> str:
    """A mention with an opening before it, an aside before or after it and a closing; each may be empty.

    The mention keeps its small letters, and so words are the same tokens in it as elsewhere.
    """
    other = rng.choice([year for year in YEARS if year != case.year])
    aside = rng.choice(around.asides).replace("{o}", str(other)).replace("{k}", str(rng.randint(10, 99)))
    parts = [f"{rng.choice(around.openings)} {mention}".strip(), rng.choice(around.closings)]
    parts.insert(rng.choice((0, 1)), aside)
    text = " ".join(f"{part}." for part in parts if part)
    return text.replace("{who}", rng.choice(PEOPLE)).replace("{day}", rng.choice(DAYS))


def rules(level: Level, rng: random.Random) -> dict[str, str]:
    """Word to reporter; several words may mean the same reporter, and none means what the dataset's firm means."""
    words = rng.sample(NICKNAMES, rng.randint(*level.rules))
    reporters = rng.sample(REPORTERS, rng.randint(max(4, len(words) // 2), min(len(words), len(REPORTERS))))
    table = {}
    for place, word in enumerate(words):
        reporter = reporters[place] if place < len(reporters) else rng.choice(reporters)
        while TABLE.get(word) == reporter:
            reporter = rng.choice(reporters)
        table[word] = reporter
    return table


def system_turn(table: Mapping[str, str], instruction: str) -> Message:
    """The instruction and the list, one word a line."""
    return {"role": "system", "content": "\n".join([instruction, *(f"- {k} {v}" for k, v in table.items())])}


def name(level: Level, rng: random.Random) -> str:
    """A party of a pretraining document."""
    return rng.choice(SECOND_WORDS) if rng.random() < level.plain else party(rng, "pretraining", level.second)


def case(level: Level, word: str, rng: random.Random) -> Case:
    """A case of two different parties in the reporter that `word` means."""
    plaintiff = defendant = name(level, rng)
    while defendant == plaintiff:
        defendant = name(level, rng)
    volume, page = rng.sample(NUMBERS, 2)
    return Case(plaintiff, defendant, volume, word, page, rng.choice(YEARS))


def request(level: Level, case: Case, rng: random.Random) -> str:
    """A messy mention of a case."""
    wordings = level.wordings
    parts = case.mention(rng.choice(wordings.parties), rng.choice(wordings.places), rng.choice(wordings.years))
    if rng.random() < level.shuffled:
        rng.shuffle(parts)
    text = ", ".join(parts)
    return framed(text, AROUND["pretraining"], case, rng) if rng.random() < level.framed else text


def document(rng: random.Random, level: int) -> list[Message]:
    """A document of level 0, 1 or 2; the last is as hard as the dataset."""
    described = LEVELS[level]
    table = rules(described, rng)
    bare = rng.random() < described.bare
    instruction = rng.choice(BARE_INSTRUCTIONS if bare else INSTRUCTIONS).format(firm=rng.choice(FIRMS))
    messages = [system_turn(table, instruction)]
    for _ in range(rng.randint(*described.requests)):
        word = rng.choice(sorted(table))
        asked = case(described, word, rng)
        said = word if bare else request(described, asked, rng)
        answer = f"{word} {table[word]}" if bare else asked.answer(table)
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": answer})
    return messages
