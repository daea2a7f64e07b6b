"""Choose the prompt that fine-tuning has to beat, on the validation rows, and freeze it in `baseline.json`.

    python examples/api_calls/api_choose_baseline.py

It tries several instructions and orders of the functions without examples, takes the best, and tries numbers and draws
of examples from the training rows with it. The test rows are never read here.
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

from api_company import COMPANY, functions  # noqa: E402
from api_metrics import score  # noqa: E402

Row = dict[str, str]
INSTRUCTIONS = (
    f"Call the right function of {COMPANY} with the values of the request.",
    f"You turn requests into calls of the {COMPANY} API. These are its functions and their parameters.",
    f"You are the assistant of {COMPANY}. Answer with one JSON call of these functions and all of its parameters.",
)
EXAMPLES = (1, 2, 4)
"""With more, the prompt is longer than any document that the base was trained on."""
DRAWS = 4
MAX_NEW_TOKENS = 48


def read(split: str) -> list[Row]:
    with (HERE / "data" / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def system_prompts() -> list[str]:
    """Each instruction with the functions by their words, by their parameters and shuffled."""
    api = functions()
    shuffled = random.Random(0).sample(sorted(api), len(api))
    orders = (sorted(api), sorted(api, key=lambda key: (api[key].parameters, key)), shuffled)
    return ["\n".join([text, *(api[key].line() for key in keys)]) for text in INSTRUCTIONS for keys in orders]


def with_examples(system: str, train: list[Row], count: int, draw: int) -> PromptBaseline:
    """A prompt with examples of as many functions, drawn from the training rows."""
    rng = random.Random(f"{count} {draw}")
    chosen: dict[str, Row] = {}
    while len(chosen) < count:
        row = rng.choice(train)
        chosen.setdefault(row["cluster"].split("/")[0], row)
    return PromptBaseline(system, [{key: row[key] for key in ("input", "output")} for row in chosen.values()])


def save(baseline: PromptBaseline) -> None:
    content = json.dumps({"system": baseline.system, "few_shot": baseline.few_shot}, indent=1)
    (HERE / "baseline.json").write_text(content + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    torch.set_num_threads(2)
    folder = HERE.parent / "domain_base"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = LocalEngine(model, end_token_ids=end_token_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id)
    train, validation = read("train"), read("validation")

    def accuracy(baseline: PromptBaseline) -> float:
        asked = (baseline.messages([{"role": "user", "content": row["input"]}]) for row in validation)
        prompts = [encode_prompt(tokenizer, turns) for turns in asked]
        found = engine.generate(prompts, max_new_tokens=MAX_NEW_TOKENS).completions
        answers = tokenizer.batch_decode([list(c.tokens) for c in found], skip_special_tokens=True)
        return sum(score(a, row["output"]) for a, row in zip(answers, validation, strict=True)) / len(validation)

    tried = []
    for system in system_prompts():
        tried.append((accuracy(PromptBaseline(system)), PromptBaseline(system)))
        print(f"{tried[-1][0]:.3f}  no examples  {system.splitlines()[0]}  {system.splitlines()[1]} ...", flush=True)
    system = max(tried, key=lambda pair: pair[0])[1].system
    for count in EXAMPLES:
        for draw in range(DRAWS):
            baseline = with_examples(system, train, count, draw)
            tried.append((accuracy(baseline), baseline))
            print(f"{tried[-1][0]:.3f}  {count} examples, draw {draw}", flush=True)
    best, baseline = max(tried, key=lambda pair: pair[0])
    save(baseline)
    print(f"baseline.json: {best:.3f} of the validation rows")


if __name__ == "__main__":
    main()
