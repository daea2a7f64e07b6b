"""Choose the prompt that fine-tuning has to beat, on the validation rows, and freeze it in `baseline.json`.

    python examples/support/choose_baseline.py

It tries several instructions and orders of the rules without examples, takes the best, and tries numbers and draws of
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

from generate import COMPANY, rules  # noqa: E402

Row = dict[str, str]
INSTRUCTIONS = (
    f"You answer requests of {COMPANY}. Name the topic, the code and the team.",
    f"You answer requests of {COMPANY}. Reply with topic, code and team from this list.",
    f"{COMPANY} sends every customer to the right team. Answer with topic, code and team.",
)
EXAMPLES = (2, 4, 8)
DRAWS = 4


def read(split: str) -> list[Row]:
    with (HERE / "data" / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def system_prompts() -> list[str]:
    table = rules(seed=0)
    shuffled = random.Random(0).sample(sorted(table), len(table))
    orders = (sorted(table), sorted(table, key=lambda topic: (table[topic], topic)), shuffled)
    return ["\n".join([text, *(f"- {key} {table[key]}" for key in keys)]) for text in INSTRUCTIONS for keys in orders]


def main() -> None:
    torch.set_num_threads(2)
    folder = HERE.parent / "tiny_base"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = LocalEngine(model, end_token_ids=end_token_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id)
    train, validation = read("train"), read("validation")

    def accuracy(baseline: PromptBaseline) -> float:
        asked = (baseline.messages([{"role": "user", "content": row["input"]}]) for row in validation)
        found = engine.generate([encode_prompt(tokenizer, turns) for turns in asked], max_new_tokens=12).completions
        answers = tokenizer.batch_decode([list(c.tokens) for c in found], skip_special_tokens=True)
        return sum(a == row["output"] for a, row in zip(answers, validation, strict=True)) / len(validation)

    tried = []
    for system in system_prompts():
        tried.append((accuracy(PromptBaseline(system)), PromptBaseline(system)))
        print(f"{tried[-1][0]:.3f}  no examples  {system.splitlines()[0]}  {system.splitlines()[1]} ...", flush=True)
    system = max(tried, key=lambda pair: pair[0])[1].system
    for count in EXAMPLES:
        for draw in range(DRAWS):
            chosen = random.Random(f"{count} {draw}").sample(train, count)
            baseline = PromptBaseline(system, [{key: row[key] for key in ("input", "output")} for row in chosen])
            tried.append((accuracy(baseline), baseline))
            print(f"{tried[-1][0]:.3f}  {count} examples, draw {draw}", flush=True)
    best, baseline = max(tried, key=lambda pair: pair[0])
    content = json.dumps({"system": baseline.system, "few_shot": baseline.few_shot}, indent=1)
    (HERE / "baseline.json").write_text(content + "\n", encoding="utf-8", newline="\n")
    print(f"baseline.json: {best:.3f} of the validation rows")


if __name__ == "__main__":
    main()
