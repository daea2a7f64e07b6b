"""Choose the prompted baseline that fine-tuning has to beat, on the validation rows, and save it in `baseline.json`.

    python examples/legal_citation/legal_choose_baseline.py

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
from legal_language import FIRM, TABLE  # noqa: E402
from legal_metrics import score  # noqa: E402
from legal_pretraining import system_turn  # noqa: E402

INSTRUCTIONS = (
    f"You cite cases for {FIRM}. Use these words for reporters.",
    f"Words of {FIRM} for reporters. Answer with the word, its reporter and the citation.",
    f"Put notes of lawyers of {FIRM} in order. Name the word and its reporter from this list, then cite the case.",
)
EXAMPLES = (1, 2, 4)


def system_prompts() -> list[str]:
    """Each instruction with the list sorted by word, sorted by reporter, and shuffled."""
    words = sorted(TABLE)
    orders = (words, sorted(words, key=lambda word: (TABLE[word], word)), random.Random(0).sample(words, len(words)))
    tables = [{word: TABLE[word] for word in order} for order in orders]
    return [system_turn(table, text)["content"] for text in INSTRUCTIONS for table in tables]


if __name__ == "__main__":
    choose(HERE, HERE.parent / "domain_base", system_prompts(), EXAMPLES, score, max_new_tokens=48)
