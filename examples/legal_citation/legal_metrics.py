"""Metrics of citations, whose fields are parsed by eyecite.

    lightning-ft compare --config examples/legal_citation/lora.yaml --methods prompted,full,lora \
        --metrics examples/legal_citation/legal_metrics.py:metrics --output runs/compare/legal

An answer names the firm's word with its reporter and the page, and then cites:
`owl F.2d 483 : Bako v. Tiremo, 347 F.2d 483 (1954)`. The text before ` : ` is not graded; it helps the model to
write the citation, but not the user.
"""

from __future__ import annotations

from collections.abc import Sequence

from eyecite import get_citations
from eyecite.models import FullCaseCitation

FIELDS = ("plaintiff", "defendant", "volume", "reporter", "page", "year")


def citation(answer: str) -> str:
    """The citation in an answer: the text after the last ` : `, or all of it.

    Example:
        >>> citation("owl F.2d 483 : Bako v. Tiremo, 347 F.2d 483 (1954)")
        'Bako v. Tiremo, 347 F.2d 483 (1954)'
    """
    return answer.rpartition(" : ")[2]


def score(output: str, reference: str) -> float:
    """Grade an answer: 1 if its citation equals the reference's character by character, otherwise 0.

    Args:
        output: Answer of a model.
        reference: Correct answer.

    Example:
        >>> right = "owl F.2d 483 : Bako v. Tiremo, 347 F.2d 483 (1954)"
        >>> score(right, right), score("owl F.2d 483 : Tiremo v. Bako, 347 F.2d 483 (1954)", right)
        (1.0, 0.0)
    """
    return float(citation(output) == citation(reference))


def fields(answer: str) -> dict[str, str]:
    """Parse the fields of an answer's citation; empty unless eyecite finds exactly one full case citation.

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
    """Compute the metrics of all answers.

    Args:
        outputs: Answers, `n`.
        references: Correct answers, `n`.

    Returns:
        `parsed_rate`: share of answers in which eyecite finds exactly one full case citation. `field_f1`: micro-F1
        over plaintiff, defendant, volume, reporter, page and year; a wrong field is both a false positive and a false
        negative, a missing one is a false negative only. `reporter_accuracy`: share of answers with the correct
        reporter, the field that requires the firm's table. `exact_match`: mean of `score`.

    Raises:
        ValueError: If there are no answers, or not as many as references.

    Example:
        >>> right = ["Bako v. Tiremo, 347 F.2d 483 (1954)"] * 2
        >>> metrics(["Bako v. Tiremo, 347 F.3d 483 (1954)", "none"], right)
        {'parsed_rate': 0.5, 'field_f1': 0.5555555555555556, 'reporter_accuracy': 0.0, 'exact_match': 0.0}
    """
    if not outputs:
        raise ValueError("metrics() got no answers; pass at least one.")
    predicted, target = [fields(output) for output in outputs], [fields(reference) for reference in references]
    pairs = list(zip(predicted, target, strict=True))
    correct = {field: sum(field in t and p.get(field) == t[field] for p, t in pairs) for field in FIELDS}
    num_predicted, num_target = sum(map(len, predicted)), sum(map(len, target))
    return {
        "parsed_rate": sum(map(bool, predicted)) / len(pairs),
        "field_f1": 2 * sum(correct.values()) / (num_predicted + num_target),
        "reporter_accuracy": correct["reporter"] / len(pairs),
        "exact_match": sum(map(score, outputs, references)) / len(pairs),
    }
