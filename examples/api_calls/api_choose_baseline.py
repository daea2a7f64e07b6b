"""Choose the prompted baseline that fine-tuning has to beat, on the validation rows, and save it in `baseline.json`.

    python examples/api_calls/api_choose_baseline.py

Several instructions and orders of the functions are tried zero-shot; with the best one, several numbers and draws of
few-shot examples from the training rows. The test rows are never read.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_ft import PromptBaseline

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from api_company import COMPANY, functions  # noqa: E402
from api_metrics import score  # noqa: E402
from choosing import Row, choose  # noqa: E402

INSTRUCTIONS = (
    f"Call the right function of {COMPANY} with the values of the request.",
    f"You turn requests into calls of the {COMPANY} API. These are its functions and their parameters.",
    f"You are the assistant of {COMPANY}. Answer with one JSON call of these functions and all of its parameters.",
)
EXAMPLES = (1, 2, 4)
"""Numbers of examples; with more, the prompt would exceed the longest document that the base was trained on."""


def system_prompts() -> list[str]:
    """Each instruction with the functions sorted by key, sorted by parameters, and shuffled."""
    api = functions()
    shuffled = random.Random(0).sample(sorted(api), len(api))
    orders = (sorted(api), sorted(api, key=lambda key: (api[key].parameters, key)), shuffled)
    return ["\n".join([text, *(api[key].line() for key in keys)]) for text in INSTRUCTIONS for keys in orders]


def with_examples(system: str, train: Sequence[Row], count: int, draw: int) -> PromptBaseline:
    """Draw a few-shot prompt whose examples each call a different function."""
    rng = random.Random(f"{count} {draw}")
    chosen: dict[str, Row] = {}
    while len(chosen) < count:
        row = rng.choice(train)
        chosen.setdefault(row["cluster"].split("/")[0], row)
    return PromptBaseline(system, [{key: row[key] for key in ("input", "output")} for row in chosen.values()])


if __name__ == "__main__":
    choose(HERE, HERE.parent / "domain_base", system_prompts(), EXAMPLES, score, max_new_tokens=48, draw=with_examples)
