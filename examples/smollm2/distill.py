"""Trains a prompt that SmolLM2 follows into its weights, from requests without answers, and measures what that costs.

    python examples/smollm2/distill.py

Several prompts that ask for a style are tried on validation requests, and the one that is followed most often more than
without it is taken. Requests are the questions of `api_calls`, without their functions. Quality is the share of answers
in that style; agreement the share of answers that are the prompted model's, to the last token.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch

from lightning_ft import LoRAFineTuning, PromptBaseline
from lightning_ft.evaluation.savings.arms import run_arm
from lightning_ft.evaluation.savings.plan import MeasurementPlan, answer_plan, measurement_plan
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.types import Request

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from distilling import Comparison, Task  # noqa: E402

BASE = str(HERE / "model")
DATA = HERE / "data" / "api_calls"
MAX_NEW_TOKENS = 40

FRENCH = re.compile(r"\b(le|la|les|des?|du|un|une|est|et|pour|vous|je|dans|que|qui|sur|avec|votre|peux|ne|pas)\b", re.I)
ENGLISH = re.compile(r"\b(the|a|an|of|is|and|to|you|i|in|that|for|on|with|your|can|not|it|are)\b", re.I)


def in_french(output: str, reference: str = "") -> float:
    """Grade an answer: 1 if it has more of the commonest French words than of the commonest English ones.

    Example:
        >>> in_french("Je ne peux pas vous aider."), in_french("I can not help you.")
        (1.0, 0.0)
    """
    return float(len(FRENCH.findall(output)) > len(ENGLISH.findall(output)))


def one_sentence(output: str, reference: str = "") -> float:
    """Grade an answer: 1 if it is one sentence of at most 20 words.

    Example:
        >>> one_sentence("It is sunny today."), one_sentence("It is sunny. Go out."), one_sentence("It is")
        (1.0, 0.0, 0.0)
    """
    text = output.strip()
    ends = len(re.findall(r"[.!?](?=\s|$)", text))
    return float(ends == 1 and text[-1:] in (".", "!", "?") and "\n" not in text and len(text.split()) <= 20)


def numbered(output: str, reference: str = "") -> float:
    r"""Grade an answer: 1 if it starts with the first number of a list.

    Example:
        >>> numbered("1. Open the map.\n2. Search."), numbered("Open the map.")
        (1.0, 0.0)
    """
    return float(re.match(r"\s*1[.)]\s", output) is not None)


def upper_case(output: str, reference: str = "") -> float:
    """Grade an answer: 1 if it has letters, all of them capital.

    Example:
        >>> upper_case("NO."), upper_case("No."), upper_case("1")
        (1.0, 0.0, 0.0)
    """
    return float(output.isupper())


def thankful(output: str, reference: str = "") -> float:
    """Grade an answer: 1 if it starts with thanks.

    Example:
        >>> thankful("Thank you for your question. It is sunny."), thankful("It is sunny. Thank you.")
        (1.0, 0.0)
    """
    return float(output.strip().lower().startswith("thank you for"))


STYLES: dict[str, Callable[[str, str], float]] = {
    "You answer only in French, whatever the language of the question. Réponds toujours en français.": in_french,
    "Answer every question in French.": in_french,
    "Answer with one short sentence of at most fifteen words, and nothing else.": one_sentence,
    'Always answer with a numbered list of steps. Start with "1." and write nothing before it.': numbered,
    "WRITE THE WHOLE ANSWER IN CAPITAL LETTERS. NEVER USE LOWER CASE.": upper_case,
    'Begin every answer with the words "Thank you for your question."': thankful,
}
"""System prompts to try, each with what grades whether it was followed."""


def requests(split: str, count: int) -> list[Request]:
    """The first questions of a split, without the functions that could answer them."""
    lines = (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    return [Request(row["id"], ({"role": "user", "content": row["input"]},), "") for row in rows]


def choose(count: int) -> tuple[PromptBaseline, Callable[[str, str], float]]:
    """The prompt that changes most answers to validation requests as it says, and its grade."""
    base = LoRAFineTuning(BASE, dtype="float32")
    base.configure_model()
    asked = requests("validation", count)

    def answers(arm: str, plan: MeasurementPlan) -> ArmRecords:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run_arm(arm, base.model, base.tokenizer, plan, timed_requests=0, batch_size=64, progress=False)

    untuned = answers("untuned", answer_plan(base.tokenizer, asked, max_new_tokens=MAX_NEW_TOKENS)).outputs
    tried = []
    for system, grade in STYLES.items():
        prompt = PromptBaseline(system)
        plan = measurement_plan(base.tokenizer, asked, prompt, scorer=grade, max_new_tokens=MAX_NEW_TOKENS)
        followed, without = answers("prompted", plan).quality, fmean(grade(output, "") for output in untuned)
        tried.append((followed - without, prompt, grade))
        print(f"{followed:.3f}, without it {without:.3f}: {system}", flush=True)
    _, prompt, grade = max(tried, key=lambda found: found[0])
    return prompt, grade


def main() -> None:
    """Choose a prompt, and compare both ways to train it in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--requests", type=int, nargs=3, default=[48, 400, 200], help="for choosing, training and test")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2/distill.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tried, trained, tested = options.requests
    prompt, grade = choose(tried)
    task = Task(
        model=BASE,
        prompt=prompt,
        train=requests("train", trained),
        test=requests("test", tested),
        scorer=grade,
        max_new_tokens=MAX_NEW_TOKENS,
        epochs=options.epochs,
        batch_size=8,
        learning_rate=5e-4,
        texts=str(HERE / "data" / "general" / "texts.jsonl"),
        max_texts=48,
        trainer={"precision": "bf16-mixed"},
    )
    Comparison(task, options.output).run(options.seeds)


if __name__ == "__main__":
    main()
