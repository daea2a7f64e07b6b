"""Metrics of the codes of clinic notes.

    lightning-ft compare --config examples/medical_coding/lora.yaml --methods prompted,full,lora \
        --metrics examples/medical_coding/medical_metrics.py:metrics --output runs/compare/medical_coding

An answer names conditions with their codes, `asthma J459, gout M109`, or says `none`. Only the set of its codes
counts: not their order, nor the names before them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from medical_language import RESERVED_CODES
from torch import Tensor
from torchmetrics.functional.classification import multilabel_exact_match, multilabel_f1_score

NOTHING = "none"
CODE = re.compile(r"(?<![\w.])[A-Z]\d[0-9A-Z](?:\.?[0-9A-Z]{1,4})?(?!\.?\w)")
"""A code in the format of ICD-10-CM, whether it exists or not."""
CATEGORY = 3
"""Number of characters of a code that name its category: J459 belongs to J45, asthma."""


def codes(text: str) -> frozenset[str]:
    """Find the codes in an answer, without dots.

    >>> sorted(codes("asthma J459, gout M10.9, asthma J459; J4599999 and XJ45.9 are none"))
    ['J459', 'M109']
    """
    return frozenset(code.replace(".", "") for code in CODE.findall(text))


def parse(text: str) -> frozenset[str]:
    """Parse an answer: its codes, or `none` if it says so; empty if it has neither.

    >>> parse("None."), parse("I don't know")
    (frozenset({'none'}), frozenset())
    """
    nothing = re.sub(r"\W", "", text).lower() == NOTHING
    return codes(text) or (frozenset({NOTHING}) if nothing else frozenset())


def score(output: str, reference: str) -> float:
    """Grade an answer: 1 if it has exactly the codes of the reference, or both say `none`; otherwise 0.

    Args:
        output: Answer of a model.
        reference: Correct answer.

    Raises:
        ValueError: If the reference has no code and doesn't say `none`.

    Example:
        >>> score("gout M109, asthma J459", "asthma J459, gout M109"), score("asthma J459", "asthma J451")
        (1.0, 0.0)
        >>> score("none", "none"), score("", "none")
        (1.0, 0.0)
    """
    return float(parse(output) == _parse_reference(reference))


def metrics(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compute the metrics of all answers.

    Args:
        outputs: Answers, ``n``.
        references: Correct answers, ``n``.

    Returns:
        ``set_exact_match``: mean of `score`. ``micro_f1`` over the codes and ``category_f1`` over their categories; a
        code that isn't in the list is wrong. ``invalid_code_rate``: share of the answers' codes that aren't in the
        list. The last three are 0 if there is no code to count.

    Raises:
        ValueError: If there are no answers, not as many as references, or a reference can't be parsed.

    Example:
        >>> found = metrics(["asthma J459, gout M101", "none"], ["asthma J459, gout M109", "none"])
        >>> found["set_exact_match"], found["micro_f1"], found["category_f1"], found["invalid_code_rate"]
        (0.5, 0.5, 1.0, 0.5)
    """
    if not references or len(outputs) != len(references):
        raise ValueError(
            f"metrics() got {len(outputs)} answers and {len(references)} references; pass one answer per reference."
        )
    predictions, targets = [parse(text) for text in outputs], [_parse_reference(text) for text in references]
    all_codes = [code for answer in predictions for code in answer - {NOTHING}]
    predicted, target = _indicators(predictions, targets)
    exact = multilabel_exact_match(predicted, target, num_labels=target.shape[1])
    invalid = sum(code not in RESERVED_CODES.values() for code in all_codes)
    return {
        "set_exact_match": float(exact),
        "micro_f1": _micro_f1([a - {NOTHING} for a in predictions], [a - {NOTHING} for a in targets]),
        "category_f1": _micro_f1(_categories(predictions), _categories(targets)),
        "invalid_code_rate": invalid / len(all_codes) if all_codes else 0.0,
    }


def _parse_reference(reference: str) -> frozenset[str]:
    found = parse(reference)
    if not found:
        raise ValueError(f"The reference {reference!r} has neither a code nor {NOTHING!r}.")
    return found


def _categories(answers: Iterable[frozenset[str]]) -> list[frozenset[str]]:
    return [frozenset(code[:CATEGORY] for code in answer - {NOTHING}) for answer in answers]


def _micro_f1(predictions: Sequence[frozenset[str]], targets: Sequence[frozenset[str]]) -> float:
    predicted, target = _indicators(predictions, targets)
    return float(multilabel_f1_score(predicted, target, num_labels=target.shape[1], average="micro"))


def _indicators(predictions: Sequence[frozenset[str]], targets: Sequence[frozenset[str]]) -> tuple[Tensor, Tensor]:
    """Indicators of the labels of each answer and each reference, both ``int64 [n, labels]``."""
    columns = {label: column for column, label in enumerate(sorted(frozenset[str]().union(*predictions, *targets)))}
    both = torch.zeros(
        2, len(targets), max(len(columns), 2), dtype=torch.int64
    )  # torchmetrics needs at least two labels
    for side, answers in enumerate((predictions, targets)):
        for row, answer in enumerate(answers):
            both[side, row, [columns[label] for label in answer]] = 1
    return both[0], both[1]
