"""Technical support by phone: a ticket and the device's readings, the actions that solve it as the answer.

    ... Airplane mode: ON / SIM card missing: Yes ...  ->  reseat_sim_card, toggle_airplane_mode

The rows are the telecom tasks of tau2-bench, where an agent finds the faults by calling tools, turn by turn. Here the
readings are already in the input, so that one answer solves a task: results can't be compared with the benchmark's.
The output is the benchmark's own list of actions, sorted, with the arguments that differ between tasks. What to do is
said by the benchmark's policy and its troubleshooting workflow: they go to `policy.txt`, and into the prompt of an
application without fine-tuning, `baseline.json`. `baselines/support.json` has its wording, with `{policy}`
   for the text.

Each set of faults is in one split only, so that a test has new combinations of faults that training has one by one.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from packages import Domain, PackageFile, Row
from phone import readings

FOLDER = "tau2/data/domains/telecom"
TASKS = PackageFile(
    package="inspect_evals",
    path=f"{FOLDER}/tasks.json.gz",
    sha256="5c0b9203cda0c1f8842ff7b8c618ab870cef578adcd9f60934f398362b092282",
    license="MIT",
)
POLICY = PackageFile(
    package="inspect_evals",
    path=f"{FOLDER}/main_policy_solo.txt",
    sha256="346f3587c1b6e3bb20e543ab70685892d0162f088fc1362dc8e21462f40ef673",
    license="MIT",
)
WORKFLOW = PackageFile(
    package="inspect_evals",
    path=f"{FOLDER}/tech_support_workflow_solo.txt",
    sha256="77f093cc09271971a274ab3937c10586cbe2ad0208f7b36bbd1cc2f4bac178c8",
    license="MIT",
)
SOURCES = (TASKS, POLICY, WORKFLOW)
CHOICE = Path(__file__).parent / "baselines" / "support.json"
"""The prompt that `choose_prompt.py` chose."""
SHARES = {"test": 0.2, "validation": 0.1}
"""Shares of the sets of faults; the others are for training."""


def load() -> Domain:
    """Make the domain's data.

    Raises:
        SystemExit: If the package isn't installed or has another file.
    """
    tasks = json.loads(gzip.decompress(TASKS.read()))
    varying = _varying_arguments(tasks)
    by_input: dict[str, list[Row]] = defaultdict(list)
    for task in tasks:
        row = _row(task, varying)
        by_input[row["input"]].append(row)
    groups = list(by_input.values())
    contradicting = [row for same in groups for row in same if len({row["output"] for row in same}) > 1]
    rows = [same[0] for same in groups if len({row["output"] for row in same}) == 1]
    left_out = {
        "tasks with the same ticket and readings as another": len(tasks) - len(contradicting) - len(rows),
        "tasks whose ticket and readings another has with other actions": len(contradicting),
    }
    actions = sorted({action for row in rows for action in parse(row["output"])})
    policy = "\n\n".join(file.read().decode("utf-8").strip() for file in (POLICY, WORKFLOW)) + "\n"
    choice = json.loads(CHOICE.read_text(encoding="utf-8"))
    baseline = choice | {"system": fill(choice["system"], {"policy": policy, "actions": ", ".join(actions)})}
    return Domain(
        splits=_split(rows),
        left_out=left_out,
        facts={"tasks": len(tasks), "actions": actions, "policy_in_characters": len(policy)},
        files={"policy.txt": policy, "baseline.json": json.dumps(baseline, indent=1) + "\n"},
    )


def fill(prompt: str, texts: Mapping[str, str]) -> str:
    """Replace the names of texts by the texts.

    Example:
        >>> fill("{policy} Actions: {actions}.", {"policy": "Be {kind}.", "actions": "toggle_data"})
        'Be {kind}. Actions: toggle_data.'
    """
    return re.sub("|".join(rf"{{{name}}}" for name in texts), lambda found: texts[found[0][1:-1]], prompt)


def _varying_arguments(tasks: Sequence[dict]) -> set[tuple[str, str]]:
    """Pairs of action and argument for which tasks have different values."""
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for task in tasks:
        for action in task["evaluation_criteria"]["actions"]:
            for argument, value in action["arguments"].items():
                values[action["name"], argument].add(json.dumps(value))
    return {key for key, found in values.items() if len(found) > 1}


def _row(task: dict, varying: set[tuple[str, str]]) -> Row:
    actions = {
        " ".join(
            [action["name"]]
            + [str(value) for name, value in action["arguments"].items() if (action["name"], name) in varying]
        )
        for action in task["evaluation_criteria"]["actions"]
    }
    return {
        "input": f"{task['ticket']}\n\n{readings(task['initial_state']['initialization_actions'])}",
        "output": ", ".join(sorted(actions)),
        "cluster": faults(task["id"]),
    }


def faults(task_id: str) -> str:
    """The faults that a task's ID names.

    Example:
        >>> faults("[mms_issue]bad_wifi_calling|data_mode_off[PERSONA:Easy]")
        'bad_wifi_calling|data_mode_off'
    """
    return re.sub(r"\[[^]]*\]", "", task_id)


def _split(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each split in random order, those with the same set of faults in the same split."""
    rng = random.Random(0)
    clusters = sorted({row["cluster"] for row in rows})
    rng.shuffle(clusters)
    split_of = dict.fromkeys(clusters, "train")
    start = 0
    for split, share in SHARES.items():
        end = start + round(share * len(clusters))
        split_of |= dict.fromkeys(clusters[start:end], split)
        start = end
    shuffled = rng.sample(rows, len(rows))
    names = ("train", "validation", "test")
    return {split: [row for row in shuffled if split_of[row["cluster"]] == split] for split in names}


def parse(text: str) -> frozenset[str]:
    r"""Parse an answer: the actions between commas or on lines of their own.

    Example:
        >>> sorted(parse("toggle_data, grant_app_permission  storage.\n- Toggle_data"))
        ['grant_app_permission storage', 'toggle_data']
    """
    parts = (" ".join(part.strip(" \t.-*`").lower().split()) for part in re.split(r"[,\n]", text))
    return frozenset(part for part in parts if part)


def score(output: str, reference: str) -> float:
    """Grade an answer: 1 if it has exactly the actions of the reference, in any order, otherwise 0.

    Args:
        output: Answer of a model.
        reference: Correct actions.

    Example:
        >>> score("toggle_data, reseat_sim_card", "reseat_sim_card, toggle_data"), score("", "toggle_data")
        (1.0, 0.0)
    """
    return float(parse(output) == parse(reference))


def metrics(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compute the metrics of all answers.

    Args:
        outputs: Answers, ``n``.
        references: Correct actions, ``n``.

    Returns:
        ``set_exact_match``: mean of `score`. ``micro_f1`` over the actions. ``over_treatment_rate``: share of answers
        with an action that isn't needed. ``under_treatment_rate``: share of answers in which one is missing.

    Raises:
        ValueError: If there are no answers, or not as many as references.

    Example:
        >>> right = ["toggle_data", "toggle_data, disconnect_vpn"]
        >>> found = metrics(["toggle_data, reboot_device", "toggle_data"], right)
        >>> found["micro_f1"], found["over_treatment_rate"], found["under_treatment_rate"]
        (0.6666666666666666, 0.5, 0.5)
    """
    if not references or len(outputs) != len(references):
        raise ValueError(
            f"metrics() got {len(outputs)} answers and {len(references)} references; pass one answer per reference."
        )
    pairs = [(parse(output), parse(reference)) for output, reference in zip(outputs, references, strict=True)]
    count = len(pairs)
    return {
        "set_exact_match": sum(answer == right for answer, right in pairs) / count,
        "micro_f1": 2 * sum(len(answer & right) for answer, right in pairs) / sum(len(a) + len(r) for a, r in pairs),
        "over_treatment_rate": sum(bool(answer - right) for answer, right in pairs) / count,
        "under_treatment_rate": sum(bool(right - answer) for answer, right in pairs) / count,
    }
