"""Function calls: what a user says, the call that does it as JSON.

    Order 5 burgers from McDonald's  ->  {"name":"uber.eat.order","arguments":{"restaurant":"McDonald's",...}}

The rows are questions that users of a public service asked, with the functions that they offered and the calls that
people found right: the live single-call sets of the Berkeley Function Calling Leaderboard. Here a model is trained on a
part of them, answers as JSON, and is graded by the scorer below, which accepts what the alternatives accept but is
another program. So the results are not BFCL scores, and may never be called so.

- `train`, `validation`, `test`: the same functions. Each function that a test row calls, and each set of functions that
  it may choose from, is in `train`, with other questions.
- `test_unseen_functions`: sets of functions that are held out as a whole; no other split calls any of theirs.

The column `functions` has the row's set of functions: the prompt of an application without fine-tuning.
`structured_output` has their schema, which a server enforces in strict calls and which costs no tokens.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from calls import agree, compact, first_values, is_allowed, parse
from packages import DATA, INSTALL, Domain, PackageFile, Row
from schemas import call_schema

QUESTIONS = (
    ("data/BFCL_v4_live_simple.json", "1af2ac87dca47556db7b7e37e51e28b459a38b594e3c7b3c792b4903598ca0c4"),
    ("data/BFCL_v4_live_multiple.json", "fd8ccfad4d911420d0e3341dbe2fff77d1d341da934248b9bb2bda24ab3a10c8"),
)
ANSWERS = (
    (
        "data/possible_answer/BFCL_v4_live_simple.json",
        "fec9cfa9744a936f9126981e85a2023da1e63e273eafebc81923a1162fad70ce",
    ),
    (
        "data/possible_answer/BFCL_v4_live_multiple.json",
        "97e90d59c5bd76c55a2920ce93e5566e9046307d3f558578f085f9d3a56c3084",
    ),
)
SOURCES = tuple(PackageFile("bfcl_eval", path, sha256, "Apache-2.0") for path, sha256 in (*QUESTIONS, *ANSWERS))
TEST_ROWS, VALIDATION_ROWS = 250, 120
UNSEEN_ROWS = 200
"""Largest number of rows whose functions are held out."""
ALTERNATIVES = DATA / "api_calls" / "alternatives.json"
BROKEN = "answers that don't fit their function, or allow no value"
REPEATED = "questions that another row has"
CONTRADICTING = "questions that another row has with another answer"
CONFLICTING = "answers that another row has with other alternatives"


def load() -> Domain:
    """Make the domain's data.

    Raises:
        SystemExit: If the package isn't installed or has another file.
    """
    contents = [[json.loads(line) for line in file.read().splitlines()] for file in SOURCES]
    count = len(QUESTIONS)
    questions = [entry for content in contents[:count] for entry in content]
    answers = {entry["id"]: entry["ground_truth"][0] for content in contents[count:] for entry in content}
    rows, alternatives, left_out = _rows(questions, answers)
    chosen = _split(rows)
    return Domain(
        splits=chosen,
        left_out=left_out,
        facts={
            "function_sets": {split: len({row["cluster"] for row in part}) for split, part in chosen.items()},
            "functions_called": {split: len(set(map(_called, part))) for split, part in chosen.items()},
            "longest_function_set_in_characters": max(len(row["functions"]) for row in rows),
        },
        files={ALTERNATIVES.name: json.dumps(alternatives, ensure_ascii=False, indent=0) + "\n"},
    )


def _rows(questions: Sequence[dict], answers: dict[str, dict]) -> tuple[list[Row], dict[str, dict], dict[str, int]]:
    """Rows, the alternatives of each reference, and how many questions were left out, by reason."""
    rows: dict[str, Row] = {}
    alternatives: dict[str, dict] = {}
    left_out = dict.fromkeys((BROKEN, REPEATED, CONTRADICTING, CONFLICTING), 0)
    for entry in questions:
        ((name, allowed),) = answers[entry["id"]].items()
        functions = {function["name"]: function for function in entry["function"]}
        required = functions[name]["parameters"].get("required", [])
        text = "\n\n".join(turn["content"] for turn in entry["question"][0])
        if not _fits(functions[name], allowed):
            left_out[BROKEN] += 1
            continue
        reference = compact({"name": name, "arguments": first_values(allowed, required)})
        details = {"required": [argument for argument in required if argument in allowed], "allowed": allowed}
        if text in rows:
            left_out[REPEATED if rows[text]["output"] == reference else CONTRADICTING] += 1
        elif alternatives.setdefault(reference, details) != details:
            left_out[CONFLICTING] += 1
        else:
            rows[text] = {
                "input": text,
                "output": reference,
                "cluster": ", ".join(sorted(functions)),
                "functions": compact(entry["function"]),
                "structured_output": {"json_schema": call_schema(entry["function"])},
            }
    return list(rows.values()), alternatives, left_out


def _fits(function: dict, allowed: dict[str, list]) -> bool:
    """Whether an answer has known arguments only, all required ones, and a value for each."""
    parameters = function["parameters"]
    required = parameters.get("required", [])
    return allowed.keys() <= parameters["properties"].keys() and {*required} <= {*allowed} and all(allowed.values())


def _split(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each split, in random order."""
    rng = random.Random(0)
    unseen = _unseen(rows, rng)
    pool = [row for row in rows if row["cluster"] not in unseen]
    rng.shuffle(pool)
    remaining = Counter(key for row in pool for key in (row["cluster"], (_called(row),)))
    chosen: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    test_rows, validation_rows = min(TEST_ROWS, len(pool) // 4), min(VALIDATION_ROWS, len(pool) // 8)
    for row in pool:
        keys = (row["cluster"], (_called(row),))
        free = all(remaining[key] > 1 for key in keys)
        if free and len(chosen["test"]) < test_rows:
            split = "test"
        elif free and len(chosen["validation"]) < validation_rows:
            split = "validation"
        else:
            split = "train"
        chosen[split].append(row)
        remaining.subtract(keys if split != "train" else ())
    chosen["test_unseen_functions"] = [row for row in rows if row["cluster"] in unseen]
    return chosen


def _unseen(rows: Sequence[Row], rng: random.Random) -> set[str]:
    """Sets of functions to hold out: of those that share a called function all or none."""
    groups: dict[str, set[str]] = {}
    by_function: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        by_function[_called(row)].add(row["cluster"])
    for clusters in by_function.values():
        merged = set(clusters).union(*(groups.get(cluster, set()) for cluster in clusters))
        groups |= dict.fromkeys(merged, merged)
    sizes = Counter(row["cluster"] for row in rows)
    unseen: set[str] = set()
    for cluster in rng.sample(sorted(groups), len(groups)):
        union = unseen | groups[cluster]
        if sum(sizes[name] for name in union) <= min(UNSEEN_ROWS, len(rows) // 5):
            unseen = union
    return unseen


def _called(row: Row) -> str:
    return json.loads(row["output"])["name"]


def score(output: str, reference: str) -> float:
    """Grade an answer: 1 if it is one call with the right function and allowed values only, otherwise 0.

    Args:
        output: Answer of a model, with one JSON object in it.
        reference: The call as the data have it; its alternatives are in the file that `data.py` wrote.

    Raises:
        ValueError: If the file has no alternatives of the reference.
        FileNotFoundError: If there is no such file.
    """
    call, right = parse(output), alternatives_of(reference)
    if call is None or call["name"] != json.loads(reference)["name"]:
        return 0.0
    return float(agree(call["arguments"], right["allowed"], right["required"]))


def metrics(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compute the metrics of all answers.

    Args:
        outputs: Answers, ``n``.
        references: Calls, ``n``.

    Returns:
        ``accuracy``: mean of `score`. ``parsed``: share of answers with one call. ``function``: share of answers with
        the right function. ``arguments_recall``: share of the references' arguments with an allowed value in the
        answer, if its function is right; 1 without any arguments.

    Raises:
        ValueError: If there are no answers, not as many as references, or a reference has no alternatives.
    """
    if not references or len(outputs) != len(references):
        raise ValueError(
            f"metrics() got {len(outputs)} answers and {len(references)} references; pass one answer per reference."
        )
    answers = [parse(output) for output in outputs]
    found, total, functions = 0, 0, 0
    for call, reference in zip(answers, references, strict=True):
        right, allowed = json.loads(reference), alternatives_of(reference)["allowed"]
        same = call is not None and call["name"] == right["name"]
        arguments = call["arguments"] if same else {}
        functions += same
        total += len(right["arguments"])
        found += sum(name in arguments and is_allowed(arguments[name], allowed[name]) for name in right["arguments"])
    return {
        "accuracy": sum(map(score, outputs, references)) / len(outputs),
        "parsed": sum(call is not None for call in answers) / len(outputs),
        "function": functions / len(outputs),
        "arguments_recall": found / total if total else 1.0,
    }


def alternatives_of(reference: str) -> dict[str, Any]:
    """Allowed values and required arguments of a call in the data.

    Raises:
        ValueError: If the call isn't in the data.
        FileNotFoundError: If the data haven't been written.
    """
    known = _alternatives(ALTERNATIVES)
    if reference not in known:
        raise ValueError(f"{ALTERNATIVES} has no alternatives of {reference!r}. Is the row from the same data?")
    return known[reference]


@cache
def _alternatives(file: Path) -> dict[str, dict]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} doesn't exist. Write it: {INSTALL}; python examples/smollm2/data.py api_calls")
    return json.loads(file.read_text(encoding="utf-8"))
