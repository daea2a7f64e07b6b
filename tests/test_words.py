"""Words of the package and its documentation: expressions that the glossary replaced are refused."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lightning_ft").rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "RELEASE.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))

# What may not appear in a line of code or prose, and what to write for it.
PROSE = {
    r"\banew\b": "again, from scratch",
    r"\bbeside\b": "next to",
    r"\bbehind\b": "after, under, of",
    r"\bstands\b": "is, appears, contains",
    r"\bstand for\b": "represent, are",
    r"\bis no number\b": "is not a number",
    r"\bso many\b": "N",
    r"\bleav(?:e|es|ing) away\b|\bleft away\b": "leave out, skip",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\b(?:tokens|nats|operations|FLOPs?|examples|rows) an? (?:token|row|step|request|second|sequence)\b": "per",
    r"^\s+\**\w+(?: \([^)]*\))?: Of (?!course)": "what the value is, for --help prints the line alone",
    r"\b(?:token|normal|initial|optim|general|recogn|summar|quant|organ|minim|serial)is(?:ed?|es|ers?|ing)\b": "-ize",
    r"\b(?:behavi|col|fav|hon|neighb)our": "-or",
}

# Words that no identifier may contain, as a whole between its underscores.
IDENTIFIERS = {
    "asked": "prompt",
    "behind": "completion, after",
    "beside": "next to",
    "bundle": "shared rows",
    "bundles": "shared rows",
    "figures": "metrics; pictures are plots",
    "given": "config, options, or what it is",
    "judge": "compute_loss, grade or reward",
    "judged": "compute_loss, grade or reward",
    "kind": "row_type, loss_type, layer_type, adapter mode",
    "lockstep": "rank_sync",
    "moments": "running statistics",
    "place": "position, span, origin or import path",
    "places": "positions",
    "stands": "is",
    "told": "reported, config",
    "trunk": "activation_cache, frozen_layers",
}

# Names that belong to others: (identifier, what precedes it).
OF_OTHERS = {("kind", ".")}  # inspect.Parameter.kind


def names(text):
    """Each identifier of a Python file as (line, name), but for attributes of other libraries."""
    previous = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and (token.string, previous) not in OF_OTHERS:
            yield token.start[0], token.string
        previous = token.string


def refused_prose(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for pattern, instead in PROSE.items():
            if match := re.search(pattern, line, re.IGNORECASE if "Of" not in pattern else 0):
                yield f"{path.relative_to(ROOT)}:{number}: {match.group().strip()!r}; write: {instead}"


def refused_names(path):
    for number, name in names(path.read_text(encoding="utf-8")):
        for word in IDENTIFIERS.keys() & set(name.lower().split("_")):
            yield f"{path.relative_to(ROOT)}:{number}: {name!r}; write: {IDENTIFIERS[word]}"


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in SOURCES + PAGES])
def test_text_uses_the_words_of_the_field(path):
    path = ROOT / path
    refused = list(refused_prose(path)) + (list(refused_names(path)) if path.suffix == ".py" else [])
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("    rate: Of the optimizer.", "Of"),
        ("it is put beside the model", "beside"),
        ("the behaviour of tokenisers", "tokenisers"),
        ("    rate: Learning rate of the optimizer.", None),
        ("besides, it understands", None),
    ],
)
def test_prose_patterns_match_what_they_name(line, refused):
    found = [match.group() for pattern in PROSE if (match := re.search(pattern, line))]
    assert bool(found) == (refused is not None)
    assert refused is None or any(refused in text for text in found)
