"""Choose the prompted baseline that fine-tuning has to beat, on the validation rows, and save it in `baseline.json`.

    python examples/medical_coding/medical_choose_baseline.py

Several instructions and orders of the list are tried zero-shot; with the best one, several numbers and draws of
few-shot examples from the training rows. The test rows are never read.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from choosing import choose  # noqa: E402
from medical_language import RESERVED_CODES  # noqa: E402
from medical_metrics import score  # noqa: E402
from medical_pretraining import system_turn  # noqa: E402

CLINIC = "Marlen"
INSTRUCTIONS = (
    f"Codes of {CLINIC}. Answer with condition and code, or none.",
    f"You are a medical coder of {CLINIC}. Name each condition of the patient with its code from this list.",
    "Read the note and list the conditions with their codes. What is denied or in the family is not coded.",
)
EXAMPLES = (2, 4, 6)


def system_prompts() -> list[str]:
    keys = list(RESERVED_CODES)
    orders = (sorted(keys), sorted(keys, key=RESERVED_CODES.__getitem__), random.Random(0).sample(keys, len(keys)))
    tables = [{key: RESERVED_CODES[key] for key in order} for order in orders]
    return [system_turn(table, text)["content"] for text in INSTRUCTIONS for table in tables]


if __name__ == "__main__":
    choose(HERE, HERE.parent / "domain_base", system_prompts(), EXAMPLES, score, max_new_tokens=24)
