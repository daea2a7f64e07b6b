"""Choose the prompted baseline that fine-tuning has to beat, on the validation rows, and save it in `baseline.json`.

    python examples/support/choose_baseline.py

Several instructions and orders of the rules are tried zero-shot; with the best one, several numbers and draws of
few-shot examples from the training rows. The test rows are never read.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from lightning_ft.evaluation.scorers import exact_match

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from choosing import choose  # noqa: E402
from generate import COMPANY, rules  # noqa: E402

INSTRUCTIONS = (
    f"You answer requests of {COMPANY}. Name the topic, the code and the team.",
    f"You answer requests of {COMPANY}. Reply with topic, code and team from this list.",
    f"{COMPANY} sends every customer to the right team. Answer with topic, code and team.",
)
EXAMPLES = (2, 4, 8)


def system_prompts() -> list[str]:
    table = rules(seed=0)
    shuffled = random.Random(0).sample(sorted(table), len(table))
    orders = (sorted(table), sorted(table, key=lambda topic: (table[topic], topic)), shuffled)
    return ["\n".join([text, *(f"- {key} {table[key]}" for key in keys)]) for text in INSTRUCTIONS for keys in orders]


if __name__ == "__main__":
    choose(HERE, HERE.parent / "tiny_base", system_prompts(), EXAMPLES, exact_match, max_new_tokens=12)
