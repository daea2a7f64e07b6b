"""How right an answer is: functions of the answer and the reference that give a number from 0 to 1."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from lightning_ft.errors import SavingsError
from lightning_ft.importing import import_object

Scorer = Callable[[str, str], float]
"""Answer and reference to a score from 0 (wrong) to 1 (right)."""

_TRAILING = ".,;:!?…。！？"  # noqa: RUF001  # full-width marks end sentences too


def exact_match(output: str, reference: str) -> float:
    """1 where the answer is the reference, character by character.

    Example:
        >>> exact_match("B-417", "B-417"), exact_match("b-417", "B-417")
        (1.0, 0.0)
    """
    return float(output == reference)


def normalized_match(output: str, reference: str) -> float:
    """1 where both are the same apart from case, white space, Unicode form (NFKC) and punctuation at the end.

    Example:
        >>> normalized_match(" Yes,  please. ", "yes, please"), normalized_match("no", "yes")
        (1.0, 0.0)
    """
    return float(normalized(output) == normalized(reference))


def normalized(text: str) -> str:
    """Text in NFKC, case folded, white space collapsed, without punctuation at the end.

    Example:
        >>> normalized("  The  CAT sat!? ")
        'the cat sat'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split()).rstrip(_TRAILING + " ")


class LabelMatch:
    """1 where the first label that stands in the answer, as words of its own, is the reference's.

    Args:
        labels: All there are.

    Raises:
        SavingsError: If there are none.

    Example:
        >>> score = LabelMatch(["refund", "invoice", "late invoice"])
        >>> score("I would call this a Late Invoice.", "late invoice"), score("invoice or refund?", "refund")
        (1.0, 0.0)
    """

    def __init__(self, labels: Iterable[str]) -> None:
        found = sorted({normalized(label) for label in labels} - {""}, key=lambda label: (-len(label), label))
        if not found:
            raise SavingsError("LabelMatch has no labels.")
        self.labels = tuple(found)
        either = "|".join(map(re.escape, found))  # the longest first: "late invoice" before "invoice"
        self._pattern = re.compile(rf"(?<!\w)(?:{either})(?!\w)")

    def __call__(self, output: str, reference: str) -> float:
        """Score an answer.

        Raises:
            SavingsError: If the reference isn't one of the labels.
        """
        right = normalized(reference)
        if right not in self.labels:
            raise SavingsError(f"the reference {reference!r} isn't one of the labels: {', '.join(self.labels[:10])}.")
        found = self._pattern.search(normalized(output))
        return float(found is not None and found.group() == right)


def json_equal(output: str, reference: str) -> float:
    """1 where the answer is JSON that means the same as the reference.

    Order of keys and white space don't count, types do. A Markdown fence around the answer is taken off.

    Raises:
        ValueError: If the reference isn't JSON.

    Example:
        >>> json_equal('{"b": 1.0, "a": [true]}', '{"a": [true], "b": 1}'), json_equal('{"a": 1}', '{"a": true}')
        (1.0, 0.0)
    """
    right = _parse(reference)
    try:
        return float(_same(_parse(_unfenced(output)), right))
    except ValueError:
        return 0.0


def _parse(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} isn't JSON")

    return json.loads(text, parse_constant=refuse)


def _unfenced(text: str) -> str:
    fenced = re.fullmatch(r"\s*```[\w-]*\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    return fenced.group(1) if fenced else text


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)  # in Python True == 1


NAMED: dict[str, Scorer] = {"exact": exact_match, "normalized": normalized_match, "json": json_equal}
"""Scorers that can be asked for by name; ``"label"`` is `LabelMatch` over the references."""


def resolve_scorer(scorer: str | Scorer, references: Sequence[str]) -> tuple[str, Scorer]:
    """A scorer's name and the scorer.

    Args:
        scorer: ``"exact"``, ``"normalized"``, ``"label"``, ``"json"``, a function, or where to import one from, as
            ``"package.module.function"``, ``"package.module:function"`` or ``"path/to/file.py:function"``.
        references: Whose labels ``"label"`` takes.

    Raises:
        SavingsError: If there is no such scorer.

    Example:
        >>> resolve_scorer("exact", [])[0], resolve_scorer("operator:eq", [])[1]("a", "a")
        ('exact', True)
    """
    if callable(scorer):
        return str(getattr(scorer, "__qualname__", type(scorer).__qualname__)), scorer
    if scorer == "label":
        return scorer, LabelMatch(references)
    if scorer in NAMED:
        return scorer, NAMED[scorer]
    is_import_path = "." in scorer or ":" in scorer
    found: Any = import_object(scorer, argument="scorer", error=SavingsError) if is_import_path else None
    if not callable(found):
        names = ", ".join(map(repr, [*NAMED, "label"]))
        raise SavingsError(f"scorer={scorer!r}: expected {names}, a function, or where to import one from.")
    return scorer, cast(Scorer, found)


def grade_answers(
    name: str, scorer: Scorer, ids: Sequence[str], outputs: Sequence[str], references: Sequence[str]
) -> tuple[float, ...]:
    """Score every answer.

    Raises:
        SavingsError: If the scorer raises or gives anything but a number from 0 to 1; names scorer and request.

    Example:
        >>> grade_answers("exact", exact_match, ["1", "2"], ["a", "b"], ["a", "c"])
        (1.0, 0.0)
    """
    scores = []
    for i, output, reference in zip(ids, outputs, references, strict=True):
        try:
            score: Any = scorer(output, reference)
        except (Exception, SystemExit) as error:  # whatever it is, the request it failed on must be told
            raise SavingsError(f"Scorer {name!r} failed on request {i!r}: {type(error).__name__}: {error}") from error
        try:
            number = float(score) if not isinstance(score, str) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= 1:
            raise SavingsError(f"Scorer {name!r} gave {score!r} for request {i!r}: expected a number from 0 to 1.")
        scores.append(number)
    return tuple(scores)
