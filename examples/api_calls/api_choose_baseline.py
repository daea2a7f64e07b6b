"""Choose the prompt that fine-tuning has to beat, on the validation rows, and freeze it in `baseline.json`.

    python examples/api_calls/api_choose_baseline.py

It tries several instructions and orders of the functions without examples, takes the best, and tries numbers and draws
of examples from the training rows with it. The test rows are never read here.
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
"""With more, the prompt is longer than any document that the base was trained on."""


def system_prompts() -> list[str]:
    """Each instruction with the functions by their words, by their parameters and shuffled."""
    api = functions()
    shuffled = random.Random(0).sample(sorted(api), len(api))
    orders = (sorted(api), sorted(api, key=lambda key: (api[key].parameters, key)), shuffled)
    return ["\n".join([text, *(api[key].line() for key in keys)]) for text in INSTRUCTIONS for keys in orders]


def with_examples(system: str, train: Sequence[Row], count: int, draw: int) -> PromptBaseline:
    """A prompt with examples of as many functions, drawn from the training rows."""
    rng = random.Random(f"{count} {draw}")
    chosen: dict[str, Row] = {}
    while len(chosen) < count:
        row = rng.choice(train)
        chosen.setdefault(row["cluster"].split("/")[0], row)
    return PromptBaseline(system, [{key: row[key] for key in ("input", "output")} for row in chosen.values()])


if __name__ == "__main__":
    choose(HERE, HERE.parent / "domain_base", system_prompts(), EXAMPLES, score, max_new_tokens=48, draw=with_examples)
