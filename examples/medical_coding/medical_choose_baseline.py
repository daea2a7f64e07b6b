"""Choose the prompt that fine-tuning has to beat, on the validation rows, and freeze it in `baseline.json`.

    python examples/medical_coding/medical_choose_baseline.py

It tries several instructions and orders of the list without examples, takes the best, and tries numbers and draws of
examples from the training rows with it. The test rows are never read here.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ft import PromptBaseline
from lightning_ft.data.encode import encode_prompt
from lightning_ft.models.generate import end_token_ids
from lightning_ft.rollout.local import LocalEngine

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from medical_language import RESERVED_CODES  # noqa: E402
from medical_metrics import score  # noqa: E402
from medical_pretraining import system_turn  # noqa: E402

Row = dict[str, str]
CLINIC = "Marlen"
INSTRUCTIONS = (
    f"Codes of {CLINIC}. Answer with condition and code, or none.",
    f"You are a medical coder of {CLINIC}. Name each condition of the patient with its code from this list.",
    "Read the note and list the conditions with their codes. What is denied or in the family is not coded.",
)
EXAMPLES = (2, 4, 6)
DRAWS = 4


def read(split: str) -> list[Row]:
    with (HERE / "data" / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def system_prompts() -> list[str]:
    keys = list(RESERVED_CODES)
    orders = (sorted(keys), sorted(keys, key=RESERVED_CODES.__getitem__), random.Random(0).sample(keys, len(keys)))
    tables = [{key: RESERVED_CODES[key] for key in order} for order in orders]
    return [system_turn(table, text)["content"] for text in INSTRUCTIONS for table in tables]


def with_examples(system: str, count: int, draw: int, train: list[Row]) -> PromptBaseline:
    chosen = random.Random(f"{count} {draw}").sample(train, count)
    return PromptBaseline(system, [{key: row[key] for key in ("input", "output")} for row in chosen])


def freeze(baseline: PromptBaseline) -> None:
    content = json.dumps({"system": baseline.system, "few_shot": baseline.few_shot}, indent=1)
    (HERE / "baseline.json").write_text(content + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    torch.set_num_threads(2)
    folder = HERE.parent / "domain_base"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = LocalEngine(model, end_token_ids=end_token_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id)
    train, validation = read("train"), read("validation")

    def quality(baseline: PromptBaseline) -> float:
        asked = (baseline.messages([{"role": "user", "content": row["input"]}]) for row in validation)
        found = engine.generate([encode_prompt(tokenizer, turns) for turns in asked], max_new_tokens=24).completions
        answers = tokenizer.batch_decode([list(c.tokens) for c in found], skip_special_tokens=True)
        return sum(score(a, row["output"]) for a, row in zip(answers, validation, strict=True)) / len(validation)

    tried = []
    for system in system_prompts():
        tried.append((quality(PromptBaseline(system)), PromptBaseline(system)))
        print(f"{tried[-1][0]:.3f}  no examples  {system.splitlines()[0]}  {system.splitlines()[1]} ...", flush=True)
    system = max(tried, key=lambda pair: pair[0])[1].system
    for count in EXAMPLES:
        for draw in range(DRAWS):
            tried.append((quality(baseline := with_examples(system, count, draw, train)), baseline))
            print(f"{tried[-1][0]:.3f}  {count} examples, draw {draw}", flush=True)
    best, baseline = max(tried, key=lambda pair: pair[0])
    freeze(baseline)
    print(f"baseline.json: {best:.3f} of the validation rows")


if __name__ == "__main__":
    main()
