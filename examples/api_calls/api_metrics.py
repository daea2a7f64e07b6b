"""Metrics of the API example.

`score` decides the gate: the same function with the same arguments, of the same types. `metrics` shows what is wrong
with the other answers.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

sys.path[:0] = [str(Path(__file__).parent)]

from api_company import schemas  # noqa: E402


def read(output: str) -> Any:
    """Parse an answer that is JSON and nothing else; None if it isn't, or if it has a duplicate key.

    Example:
        >>> read('{"call": "ship tolefi"}'), read('Sure! {"call": "ship tolefi"}'), read('{"a": 1, "a": 2}')
        ({'call': 'ship tolefi'}, None, None)
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not valid JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("an object has a duplicate key")
        return dict(pairs)

    try:
        return json.loads(output, parse_constant=refuse, object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None


@cache
def _validators() -> dict[str, Draft202012Validator]:
    return {call: Draft202012Validator(schema) for call, schema in schemas().items()}


def valid(answer: Any) -> bool:
    """Whether a parsed answer is a call that the API accepts, correct or not.

    Example:
        >>> valid({"call": "audit dufaso", "site": "oslo", "weekday": "monday"})
        True
        >>> valid({"call": "audit dufaso", "site": "oslo", "weekday": "someday"}), valid({"call": "audit"}), valid([])
        (False, False, False)
    """
    call = answer.get("call") if isinstance(answer, dict) else None
    return isinstance(call, str) and call in _validators() and _validators()[call].is_valid(answer)


def _text(value: Any) -> str:
    """Canonical text of a JSON value, whatever the order of keys; `2`, `2.0`, `"2"` and `true` all differ."""
    return json.dumps(value, sort_keys=True)


def _arguments(answer: Any) -> Counter[tuple[str, str, str]]:
    """Call, name and value of each argument; arguments of different functions differ."""
    if not isinstance(answer, dict):
        return Counter()
    call = _text(answer.get("call"))
    return Counter((call, name, _text(value)) for name, value in answer.items() if name != "call")


def score(output: str, reference: str) -> float:
    """Grade an answer: 1 for the same call with the same arguments in any order, otherwise 0.

    Raises:
        ValueError: If the reference isn't JSON.

    Example:
        >>> right = '{"call": "print mebako", "count": [2], "ref": "417"}'
        >>> score('{"ref": "417", "call": "print mebako", "count": [2]}', right)
        1.0
        >>> score('{"call": "print mebako", "count": [2], "ref": 417}', right), score("print mebako", right)
        (0.0, 0.0)
    """
    right = read(reference)
    if right is None:
        raise ValueError(f"The reference {reference!r} is not valid JSON.")
    return float(_text(read(output)) == _text(right))


def metrics(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compute the metrics of all answers.

    Args:
        outputs: Answers of a model, ``n``.
        references: Correct calls in the same order, ``n``.

    Returns:
        Shares of answers: ``exact`` (see `score`), ``parsed`` (JSON and nothing else), ``schema_valid`` (a call that
        the API accepts), ``function`` (the correct function), and ``arguments_exact`` (the correct function with all
        of the correct arguments and no others). ``arguments_{precision,recall,f1}`` are over all arguments of all
        answers; arguments of a wrong function are wrong. Answers that can't be parsed have no function and no
        arguments. Without any arguments in the answers, the precision is 0.

    Raises:
        ValueError: If there are no answers, not as many as references, or a reference isn't a valid call.

    Example:
        >>> right = '{"call": "print mebako", "count": [2], "ref": "417"}'
        >>> found = metrics(['{"call": "print mebako", "count": [3], "ref": "417"}', "?"], [right, right])
        >>> found["parsed"], found["schema_valid"], found["function"], found["arguments_recall"]
        (0.5, 0.5, 0.5, 0.25)
    """
    if not references or len(outputs) != len(references):
        raise ValueError(
            f"metrics() got {len(outputs)} answers and {len(references)} references; pass one answer per reference."
        )
    answers, rights = [read(output) for output in outputs], [read(reference) for reference in references]
    for reference, right in zip(references, rights, strict=True):
        if not valid(right):
            raise ValueError(f"The reference {reference!r} is not a call that the API accepts.")
    pairs = list(zip(answers, rights, strict=True))
    function = [isinstance(answer, dict) and answer.get("call") == right["call"] for answer, right in pairs]
    arguments = [(_arguments(answer), _arguments(right)) for answer, right in pairs]
    same = sum((ours & theirs).total() for ours, theirs in arguments)
    predicted, target = (sum(both[side].total() for both in arguments) for side in (0, 1))
    counts = {
        "exact": sum(map(score, outputs, references)),
        "parsed": sum(answer is not None for answer in answers),
        "schema_valid": sum(map(valid, answers)),
        "function": sum(function),
        "arguments_exact": sum(
            right and ours == theirs for right, (ours, theirs) in zip(function, arguments, strict=True)
        ),
    }
    return {name: count / len(outputs) for name, count in counts.items()} | {
        "arguments_precision": same / predicted if predicted else 0.0,
        "arguments_recall": same / target,
        "arguments_f1": 2 * same / (predicted + target),
    }
