"""What an answer to a mention of a case is worth: the citation, and its fields as eyecite reads them.

    lightning-ft compare --config examples/legal_citation/lora.yaml --methods prompted,full,lora \
        --metrics examples/legal_citation/legal_metrics.py:metrics --output runs/compare/legal

An answer names the firm's word with its reporter and the page, and then cites:
`owl F.2d 483 : Bako v. Tiremo, 347 F.2d 483 (1954)`. What stands before the ` : ` is not scored; it helps whoever
writes the citation, not whoever uses it.
"""

from __future__ import annotations

from collections.abc import Sequence

from eyecite import get_citations
from eyecite.models import FullCaseCitation

FIELDS = ("plaintiff", "defendant", "volume", "reporter", "page", "year")


def citation(answer: str) -> str:
    """The citation of an answer: what stands behind the last ` : `, or all of it.

    Example:
        >>> citation("owl F.2d 483 : Bako v. Tiremo, 347 F.2d 483 (1954)")
        'Bako v. Tiremo, 347 F.2d 483 (1954)'
    """
    return answer.rpartition(" : ")[2]


def score(output: str, reference: str) -> float:
    """1 where the citation is the reference's, character by character, so that all six fields are right.

    Args:
        output: An answer.
        reference: The right answer.

    Example:
        >>> right = "owl F.2d 483 : Bako v. Tiremo, 347 F.2d 483 (1954)"
        >>> score(right, right), score("owl F.2d 483 : Tiremo v. Bako, 347 F.2d 483 (1954)", right)
        (1.0, 0.0)
    """
    return float(citation(output) == citation(reference))


def fields(answer: str) -> dict[str, str]:
    """The fields of an answer's citation that eyecite finds; none unless it is exactly one full case citation.

    Example:
        >>> fields("owl F.2d 483 : Bako v. Tiremo, 347 F.2d 483")
        {'plaintiff': 'Bako', 'defendant': 'Tiremo', 'volume': '347', 'reporter': 'F.2d', 'page': '483'}
        >>> fields("Bako v. Tiremo, 347 owl 483 (1954)")
        {}
    """
    text = citation(answer)
    found = get_citations(text) if text.strip() else []  # eyecite refuses an empty text
    if len(found) != 1 or not isinstance(found[0], FullCaseCitation):
        return {}
    about = found[0].metadata
    known = {"plaintiff": about.plaintiff, "defendant": about.defendant, **found[0].groups, "year": about.year}
    return {field: known[field] for field in FIELDS if known.get(field)}


def metrics(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Figures of all answers.

    Args:
        outputs: Answers, `n`.
        references: Right answers, `n`.

    Returns:
        `parsed_rate`: answers in which eyecite finds exactly one full case citation. `field_f1`: micro-F1 over
        plaintiff, defendant, volume, reporter, page and year; a field that is wrong is both a false positive and a
        false negative, one that is missing the latter only. `reporter_accuracy` of all answers: the field that needs
        the firm's table. `exact_match`: the mean of `score`.

    Raises:
        ValueError: If there are none, or not as many of the one as of the other.

    Example:
        >>> right = ["Bako v. Tiremo, 347 F.2d 483 (1954)"] * 2
        >>> metrics(["Bako v. Tiremo, 347 F.3d 483 (1954)", "none"], right)
        {'parsed_rate': 0.5, 'field_f1': 0.5555555555555556, 'reporter_accuracy': 0.0, 'exact_match': 0.0}
    """
    if not outputs:
        raise ValueError("metrics() got no answers: there must be at least one.")
    predicted, target = [fields(output) for output in outputs], [fields(reference) for reference in references]
    pairs = list(zip(predicted, target, strict=True))
    right = {field: sum(field in t and p.get(field) == t[field] for p, t in pairs) for field in FIELDS}
    given, wanted = sum(map(len, predicted)), sum(map(len, target))
    return {
        "parsed_rate": sum(map(bool, predicted)) / len(pairs),
        "field_f1": 2 * sum(right.values()) / (given + wanted),
        "reporter_accuracy": right["reporter"] / len(pairs),
        "exact_match": sum(map(score, outputs, references)) / len(pairs),
    }
