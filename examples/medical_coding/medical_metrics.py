"""What the codes of a clinic note are worth.

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
"""A code in the form of ICD-10-CM, whether there is such a code or not."""
CATEGORY = 3
"""Characters of a code that name its category: J459 is a kind of J45, asthma."""


def codes(text: str) -> frozenset[str]:
    """The codes that stand in an answer, without the dot that some write.

    >>> sorted(codes("asthma J459, gout M10.9, asthma J459; J4599999 and XJ45.9 are none"))
    ['J459', 'M109']
    """
    return frozenset(code.replace(".", "") for code in CODE.findall(text))


def said(text: str) -> frozenset[str]:
    """The codes of an answer, or `none` where it says so; empty where it says neither.

    >>> said("None."), said("I don't know")
    (frozenset({'none'}), frozenset())
    """
    nothing = re.sub(r"\W", "", text).lower() == NOTHING
    return codes(text) or (frozenset({NOTHING}) if nothing else frozenset())


def score(output: str, reference: str) -> float:
    """1 where the answer has exactly the codes of the reference; without a code, where it says `none` as that does.

    Args:
        output: An answer.
        reference: The right one.

    Raises:
        ValueError: If the reference has no code and doesn't say `none`.

    Example:
        >>> score("gout M109, asthma J459", "asthma J459, gout M109"), score("asthma J459", "asthma J451")
        (1.0, 0.0)
        >>> score("none", "none"), score("", "none")
        (1.0, 0.0)
    """
    return float(said(output) == _right(reference))


def metrics(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Figures of all answers.

    Args:
        outputs: Answers, ``n``.
        references: Right answers, ``n``.

    Returns:
        ``set_exact_match``, the mean of `score`. ``micro_f1`` over the codes and ``category_f1`` over their categories;
        a code that isn't in the list is a wrong one. ``invalid_code_rate``: codes that aren't in the list, of all that
        were given. The last three are 0 where there is no code to count.

    Raises:
        ValueError: If there are no answers, not as many as references, or a reference can't be read.

    Example:
        >>> found = metrics(["asthma J459, gout M101", "none"], ["asthma J459, gout M109", "none"])
        >>> found["set_exact_match"], found["micro_f1"], found["category_f1"], found["invalid_code_rate"]
        (0.5, 0.5, 1.0, 0.5)
    """
    if not references or len(outputs) != len(references):
        raise ValueError(f"{len(outputs)} answers to {len(references)} references: expected as many, at least one.")
    given, right = [said(text) for text in outputs], [_right(text) for text in references]
    all_codes = [code for answer in given for code in answer - {NOTHING}]
    predicted, target = _indicators(given, right)
    exact = multilabel_exact_match(predicted, target, num_labels=target.shape[1])
    invalid = sum(code not in RESERVED_CODES.values() for code in all_codes)
    return {
        "set_exact_match": float(exact),
        "micro_f1": _micro_f1([a - {NOTHING} for a in given], [a - {NOTHING} for a in right]),
        "category_f1": _micro_f1(_categories(given), _categories(right)),
        "invalid_code_rate": invalid / len(all_codes) if all_codes else 0.0,
    }


def _right(reference: str) -> frozenset[str]:
    found = said(reference)
    if not found:
        raise ValueError(f"The reference {reference!r} has no code and doesn't say {NOTHING!r}.")
    return found


def _categories(answers: Iterable[frozenset[str]]) -> list[frozenset[str]]:
    return [frozenset(code[:CATEGORY] for code in answer - {NOTHING}) for answer in answers]


def _micro_f1(given: Sequence[frozenset[str]], right: Sequence[frozenset[str]]) -> float:
    predicted, target = _indicators(given, right)
    return float(multilabel_f1_score(predicted, target, num_labels=target.shape[1], average="micro"))


def _indicators(given: Sequence[frozenset[str]], right: Sequence[frozenset[str]]) -> tuple[Tensor, Tensor]:
    """Which label each answer has, and each reference, both int64 ``[n, labels]``."""
    places = {label: place for place, label in enumerate(sorted(frozenset[str]().union(*given, *right)))}
    both = torch.zeros(2, len(right), max(len(places), 2), dtype=torch.int64)  # torchmetrics wants two labels at least
    for side, answers in enumerate((given, right)):
        for row, answer in enumerate(answers):
            both[side, row, [places[label] for label in answer]] = 1
    return both[0], both[1]
