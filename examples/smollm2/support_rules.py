"""What support needs no model for: `python examples/smollm2/support_rules.py`.

Three answers that a fine-tuned model has to beat, each made from the training rows: the commonest one, that of the most
similar ticket, and one rule for each action: take it if the ticket has the line that goes with it most often.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from packages import DATA
from support import parse, score

Row = Mapping[str, str]


def lines(ticket: str) -> frozenset[str]:
    r"""The readings of a ticket, and the sentences of its text.

    Example:
        >>> sorted(lines("No signal. Bill paid.\n\nMobile data: OFF"))
        ['Bill paid', 'Mobile data: OFF', 'No signal']
    """
    return frozenset(part for part in (part.strip(" .") for part in re.split(r"\n|\. ", ticket)) if part)


def rule_per_action(rows: Sequence[Row]) -> dict[str, str]:
    """For each action, the line whose tickets agree best (F1) with those that need it.

    Example:
        >>> rows = [{"input": f"Data: {s}", "output": a} for s, a in (("OFF", "toggle_data"), ("ON", "reboot"))]
        >>> rule_per_action(rows)
        {'reboot': 'Data: ON', 'toggle_data': 'Data: OFF'}
    """
    tickets = [lines(row["input"]) for row in rows]
    answers = [parse(row["output"]) for row in rows]
    having = Counter(line for ticket in tickets for line in ticket)
    rules = {}
    for action in sorted({action for answer in answers for action in answer}):
        needing = [ticket for ticket, answer in zip(tickets, answers, strict=True) if action in answer]
        both = Counter(line for ticket in needing for line in ticket)
        rules[action] = max(sorted(both), key=lambda line: 2 * both[line] / (having[line] + len(needing)))
    return rules


def main() -> None:
    """Print the share of test tickets that each of them answers right."""
    train, test = (
        [json.loads(line) for line in (DATA / "support" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "test")
    )
    ((commonest, _),) = Counter(row["output"] for row in train).most_common(1)
    tickets, rules = [lines(row["input"]) for row in train], rule_per_action(train)

    def most_similar(ticket: str) -> str:
        found = lines(ticket)
        best = max(range(len(train)), key=lambda i: len(found & tickets[i]) / len(found | tickets[i]))
        return str(train[best]["output"])

    def by_rules(ticket: str) -> str:
        found = lines(ticket)
        return ", ".join(action for action, line in rules.items() if line in found)

    answers: dict[str, Callable[[str], str]] = {
        "the commonest answer": lambda ticket: commonest,
        "that of the most similar ticket": most_similar,
        "one rule per action": by_rules,
    }
    for name, answer in answers.items():
        right = [score(answer(row["input"]), row["output"]) for row in test]
        print(f"{name}: {sum(right) / len(right):.1%} of {len(right)} right")


if __name__ == "__main__":
    main()
