"""Scorers: functions of an answer and its reference that return a number from 0 (wrong) to 1 (right)."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from lightning_ft.arguments import did_you_mean
from lightning_ft.errors import SavingsError
from lightning_ft.importing import import_object, is_file_path, not_importable

Scorer = Callable[[str, str], float]
"""Function of an answer and its reference that returns a score from 0 (wrong) to 1 (right)."""

_TRAILING = ".,;:!?…。！？"  # noqa: RUF001  # full-width marks end sentences too


def exact_match(output: str, reference: str) -> float:
    """Return 1.0 if the answer equals the reference character by character, else 0.0.

    Example:
        >>> exact_match("B-417", "B-417"), exact_match("b-417", "B-417")
        (1.0, 0.0)
    """
    return float(output == reference)


def normalized_match(output: str, reference: str) -> float:
    """Return 1.0 if both are equal up to case, white space, Unicode form (NFKC) and final punctuation, else 0.0.

    Example:
        >>> normalized_match(" Yes,  please. ", "yes, please"), normalized_match("no", "yes")
        (1.0, 0.0)
    """
    return float(normalize_text(output) == normalize_text(reference))


def normalize_text(text: str) -> str:
    """Convert a text to NFKC, fold its case, collapse its white space and strip final punctuation.

    Example:
        >>> normalize_text("  The  CAT sat!? ")
        'the cat sat'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split()).rstrip(_TRAILING + " ")


class LabelMatch:
    """Scorer that compares the first label in the answer with the reference.

    A label counts where it appears as whole words; of several that begin at the same character, the longest.

    Args:
        labels: All labels of the task; they are compared after :func:`normalize_text`.

    Raises:
        SavingsError: If there are no labels.

    Example:
        >>> scorer = LabelMatch(["refund", "invoice", "late invoice"])
        >>> scorer("I would call this a Late Invoice.", "late invoice"), scorer("invoice or refund?", "refund")
        (1.0, 0.0)
    """

    def __init__(self, labels: Iterable[str]) -> None:
        found = sorted({normalize_text(label) for label in labels} - {""}, key=lambda label: (-len(label), label))
        if not found:
            raise SavingsError("LabelMatch has no labels. Pass at least one that isn't blank or punctuation.")
        self.labels = tuple(found)
        either = "|".join(map(re.escape, found))  # the longest first: "late invoice" before "invoice"
        self._pattern = re.compile(rf"(?<!\w)(?:{either})(?!\w)")

    def __call__(self, output: str, reference: str) -> float:
        """Return 1.0 if the first label in the answer is the reference, else 0.0.

        Raises:
            SavingsError: If the reference isn't one of the labels.
        """
        expected = normalize_text(reference)
        if expected not in self.labels:
            raise SavingsError(f"the reference {reference!r} isn't one of the labels: {', '.join(self.labels[:10])}.")
        found = self._pattern.search(normalize_text(output))
        return float(found is not None and found.group() == expected)


def json_equal(output: str, reference: str) -> float:
    """Return 1.0 if the answer is JSON with the same value as the reference, else 0.0.

    The order of keys and white space are ignored, types are not. A Markdown code fence around the answer is removed.

    Raises:
        ValueError: If the reference isn't JSON.

    Example:
        >>> json_equal('{"b": 1.0, "a": [true]}', '{"a": [true], "b": 1}'), json_equal('{"a": 1}', '{"a": true}')
        (1.0, 0.0)
    """
    expected = _parse(reference)
    try:
        return float(_same(_parse(_unfenced(output)), expected))
    except (ValueError, RecursionError):  # the latter for an answer that opens brackets only
        return 0.0


def is_json(text: str) -> bool:
    """Whether a text is JSON, without NaN and infinite numbers, which JSON lacks.

    Example:
        >>> is_json('{"a": 1}'), is_json("a: 1"), is_json("[NaN]")
        (True, False, False)
    """
    try:
        _parse(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str) -> object:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} isn't valid JSON")

    return json.loads(text, parse_constant=refuse)


def _unfenced(text: str) -> str:
    fenced = re.fullmatch(r"\s*```[\w-]*\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    return fenced.group(1) if fenced else text


def _same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)  # in Python True == 1


SCORERS: dict[str, Scorer] = {"exact": exact_match, "normalized": normalized_match, "json": json_equal}
"""Scorers by name. The name ``"label"`` is resolved to a `LabelMatch` over the references."""


def resolve_scorer(scorer: str | Scorer, references: Sequence[str]) -> tuple[str, Scorer]:
    """Return the name of a scorer and the scorer itself.

    Args:
        scorer: ``"exact"``, ``"normalized"``, ``"label"``, ``"json"``, a function, or its import path:
            ``"package.module.function"``, ``"package.module:function"`` or ``"path/to/file.py:function"``.
        references: Reference answers, which are the labels of ``"label"``.

    Raises:
        SavingsError: If no scorer has this name or import path.

    Example:
        >>> resolve_scorer("exact", [])[0], resolve_scorer("operator:eq", [])[1]("a", "a")
        ('exact', True)
    """
    if callable(scorer):
        return str(getattr(scorer, "__qualname__", type(scorer).__qualname__)), scorer
    if scorer == "label":
        return scorer, LabelMatch(references)
    if scorer in SCORERS:
        return scorer, SCORERS[scorer]
    imported: object = import_object(scorer, argument="scorer", error=SavingsError) if _is_import_path(scorer) else None
    if not callable(imported):
        raise _no_scorer(scorer)
    return scorer, cast(Scorer, imported)


def check_scorer(scorer: object) -> None:
    """Check a scorer without running code of its author: that its name exists, or its file or package.

    Args:
        scorer: Scorer, name or import path, see :func:`resolve_scorer`.

    Raises:
        SavingsError: If there is certainly no such scorer.

    Example:
        >>> check_scorer("label"), check_scorer("operator.eq"), check_scorer(max)
        (None, None, None)
    """
    if callable(scorer) or scorer == "label" or (isinstance(scorer, str) and scorer in SCORERS):
        return
    if not isinstance(scorer, str) or not _is_import_path(scorer):
        raise _no_scorer(scorer)
    file, _, name = scorer.rpartition(":" if ":" in scorer else ".")
    if is_file_path(scorer):
        if not Path(file).is_file():
            raise SavingsError(
                f"scorer={scorer!r}: there is no file {file!r} (looked for {str(Path(file).resolve())!r})."
            )
        return
    package = file.partition(".")[0]
    if not name or not package or not _is_package(package):
        raise SavingsError(not_importable("scorer", scorer, f"No module named {package!r}"))


def _is_package(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # `__main__` of a script has no spec
        return True


def _is_import_path(scorer: str) -> bool:
    return "." in scorer or ":" in scorer


def _no_scorer(scorer: object) -> SavingsError:
    names = [*SCORERS, "label"]
    hint = did_you_mean(scorer, names) if isinstance(scorer, str) else ""
    return SavingsError(
        f"scorer={scorer!r}: expected {', '.join(map(repr, names))}, a function, or the import path of one.{hint}"
    )


def grade_answers(
    name: str, scorer: Scorer, ids: Sequence[str], outputs: Sequence[str], references: Sequence[str]
) -> tuple[float, ...]:
    """Grade each answer against its reference.

    Args:
        name: Name of the scorer, for errors.
        scorer: Scorer to apply.
        ids: Id of each request, for errors.
        outputs: Answer to each request.
        references: Reference answer of each request.

    Returns:
        Score of each answer, from 0 to 1.

    Raises:
        SavingsError: If the scorer raises, or returns anything but a number from 0 to 1. The message contains the names
            of the scorer and the request.

    Example:
        >>> grade_answers("exact", exact_match, ["1", "2"], ["a", "b"], ["a", "c"])
        (1.0, 0.0)
    """
    scores = []
    for i, output, reference in zip(ids, outputs, references, strict=True):
        try:
            score: Any = scorer(output, reference)
        except (Exception, SystemExit) as error:  # whatever it is, the message must name the request
            raise SavingsError(f"Scorer {name!r} failed on request {i!r}: {type(error).__name__}: {error}") from error
        try:
            number = float(score) if not isinstance(score, str) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= 1:
            raise SavingsError(f"Scorer {name!r} returned {score!r} for request {i!r}: expected a number from 0 to 1.")
        scores.append(number)
    return tuple(scores)
