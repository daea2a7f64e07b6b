"""Generate pretraining documents, each with new words for reporters, so that only a model that reads the list can cite.

A document is a conversation: a system turn with a list (`- owl F.2d`, one word per line), then messy mentions of cases
and their citations: `owl F.2d 483 : Bako v. Tiremo Steel, 347 F.2d 483 (1954)`. The answer names the word, its reporter
from the list and the page, and then cites. Words, reporters, parties and numbers are drawn for each document.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from legal_language import (
    DAYS,
    FIRMS,
    FRAMES,
    NICKNAMES,
    NUMBERS,
    PEOPLE,
    REPORTERS,
    SECOND_WORDS,
    SEEN,
    TABLE,
    YEARS,
    Frames,
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
    locations=tuple(wording for seen in SEEN.values() for wording in seen.locations),
    years=tuple(wording for seen in SEEN.values() for wording in seen.years),
)
SIMPLE = Wordings(("{p} v {d}", "{p} versus {d}", "{p} against {d}"), ("{v} {r} {n}", "{r} {v} {n}"), ("({y})", "{y}"))


@dataclass(frozen=True)
class Level:
    """Properties of the documents of a curriculum level.

    Args:
        rules: Minimum and maximum number of words in the list.
        requests: Minimum and maximum number of mentions.
        bare: Share of documents that only ask for the reporters of words.
        plain: Share of parties that are a plain word of one token.
        second: Share of made-up parties with a second word.
        wordings: Wordings of the parts of a mention.
        shuffled: Share of mentions whose parts aren't in the order of a citation.
        framed: Share of mentions with an opening, an aside and a closing.
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
    """A case, with the firm's word for its reporter."""

    plaintiff: str
    defendant: str
    volume: int
    word: str
    page: int
    year: int

    def mention(self, parties: str, location: str, year: str) -> list[str]:
        """Write the three parts of a mention in the wordings that are passed."""
        return [
            parties.replace("{p}", self.plaintiff).replace("{d}", self.defendant),
            location.replace("{v}", str(self.volume)).replace("{r}", self.word).replace("{n}", str(self.page)),
            year.replace("{y}", str(self.year)),
        ]

    def answer(self, table: Mapping[str, str]) -> str:
        """Write the word, its reporter, the page and the citation.

        >>> Case("Bako", "Tiremo Steel", 347, "owl", 483, 1954).answer({"owl": "F.2d"})
        'owl F.2d 483 : Bako v. Tiremo Steel, 347 F.2d 483 (1954)'
        """
        reporter = table[self.word]
        parties = f"{self.plaintiff} v. {self.defendant}"
        return f"{self.word} {reporter} {self.page} : {parties}, {self.volume} {reporter} {self.page} ({self.year})"


def framed(mention: str, frames: Frames, case: Case, rng: random.Random) -> str:
    """Add an opening, an aside before or after the mention, and a closing; each may be empty.

    The mention stays in lower case, so that its words are the same tokens as elsewhere.
    """
    other = rng.choice([year for year in YEARS if year != case.year])
    aside = rng.choice(frames.asides).replace("{o}", str(other)).replace("{k}", str(rng.randint(10, 99)))
    parts = [f"{rng.choice(frames.openings)} {mention}".strip(), rng.choice(frames.closings)]
    parts.insert(rng.choice((0, 1)), aside)
    text = " ".join(f"{part}." for part in parts if part)
    return text.replace("{who}", rng.choice(PEOPLE)).replace("{day}", rng.choice(DAYS))


def rules(level: Level, rng: random.Random) -> dict[str, str]:
    """Draw the reporter of each word; words may share a reporter, and no word has the dataset's reporter."""
    words = rng.sample(NICKNAMES, rng.randint(*level.rules))
    reporters = rng.sample(REPORTERS, rng.randint(max(4, len(words) // 2), min(len(words), len(REPORTERS))))
    table = {}
    for index, word in enumerate(words):
        reporter = reporters[index] if index < len(reporters) else rng.choice(reporters)
        while TABLE.get(word) == reporter:
            reporter = rng.choice(reporters)
        table[word] = reporter
    return table


def system_turn(table: Mapping[str, str], instruction: str) -> Message:
    """Write the instruction and the list, one word per line."""
    return {"role": "system", "content": "\n".join([instruction, *(f"- {k} {v}" for k, v in table.items())])}


def name(level: Level, rng: random.Random) -> str:
    """Draw a party of a pretraining document."""
    return rng.choice(SECOND_WORDS) if rng.random() < level.plain else party(rng, "pretraining", level.second)


def case(level: Level, word: str, rng: random.Random) -> Case:
    """Draw a case of two different parties in the reporter of `word`."""
    plaintiff = defendant = name(level, rng)
    while defendant == plaintiff:
        defendant = name(level, rng)
    volume, page = rng.sample(NUMBERS, 2)
    return Case(plaintiff, defendant, volume, word, page, rng.choice(YEARS))


def request(level: Level, case: Case, rng: random.Random) -> str:
    """Draw a messy mention of a case."""
    wordings = level.wordings
    parts = case.mention(rng.choice(wordings.parties), rng.choice(wordings.locations), rng.choice(wordings.years))
    if rng.random() < level.shuffled:
        rng.shuffle(parts)
    text = ", ".join(parts)
    return framed(text, FRAMES["pretraining"], case, rng) if rng.random() < level.framed else text


def document(rng: random.Random, level: int) -> list[Message]:
    """Draw a document of level 0, 1 or 2; the last is as hard as the dataset."""
    described = LEVELS[level]
    table = rules(described, rng)
    bare = rng.random() < described.bare
    instruction = rng.choice(BARE_INSTRUCTIONS if bare else INSTRUCTIONS).format(firm=rng.choice(FIRMS))
    messages = [system_turn(table, instruction)]
    for _ in range(rng.randint(*described.requests)):
        word = rng.choice(sorted(table))
        cited = case(described, word, rng)
        text = word if bare else request(described, cited, rng)
        answer = f"{word} {table[word]}" if bare else cited.answer(table)
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer})
    return messages
