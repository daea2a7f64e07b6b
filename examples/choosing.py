"""Choose the prompted baseline that fine-tuning has to beat, on validation rows; used by choose_baseline scripts."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ft import PromptBaseline
from lightning_ft.data.encode import encode_prompt
from lightning_ft.models.generate import end_token_ids
from lightning_ft.rollout.local import LocalEngine

Row = dict[str, str]
DRAWS = 4


def with_examples(system: str, train: Sequence[Row], count: int, draw: int) -> PromptBaseline:
    """Draw a few-shot prompt with examples from the training rows."""
    chosen = random.Random(f"{count} {draw}").sample(train, count)
    return PromptBaseline(system, [{key: row[key] for key in ("input", "output")} for row in chosen])


def choose(
    folder: Path,
    base: Path,
    systems: Sequence[str],
    examples: Sequence[int],
    scorer: Callable[[str, str], float],
    *,
    max_new_tokens: int,
    draw: Callable[[str, Sequence[Row], int, int], PromptBaseline] = with_examples,
) -> None:
    """Try system prompts zero-shot, then few-shot prompts with the best one, and write the winner to `baseline.json`.

    The test rows are never read.

    Args:
        folder: Folder of the example, which contains `data`.
        base: Folder of the base model.
        systems: System prompts to try.
        examples: Numbers of few-shot examples to try, each with `DRAWS` draws.
        scorer: Function of an answer and its reference that returns a number from 0 to 1.
        max_new_tokens: Maximum number of tokens per answer.
        draw: Function that draws a few-shot prompt from the system prompt, the training rows, the number of examples
            and the number of the draw.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    torch.set_num_threads(parser.parse_args().threads)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    engine = LocalEngine(model, end_token_ids=end_token_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id)
    train, validation = read(folder, "train"), read(folder, "validation")

    def quality(baseline: PromptBaseline) -> float:
        conversations = (baseline.messages([{"role": "user", "content": row["input"]}]) for row in validation)
        prompts = [encode_prompt(tokenizer, turns) for turns in conversations]
        found = engine.generate(prompts, max_new_tokens=max_new_tokens).completions
        answers = tokenizer.batch_decode([list(c.tokens) for c in found], skip_special_tokens=True)
        return sum(scorer(a, row["output"]) for a, row in zip(answers, validation, strict=True)) / len(validation)

    search(systems, examples, train, quality, folder / "baseline.json", draw=draw)


def search(
    systems: Sequence[str],
    examples: Sequence[int],
    train: Sequence[Row],
    quality: Callable[[PromptBaseline], float],
    output: Path,
    *,
    draws: int = DRAWS,
    draw: Callable[[str, Sequence[Row], int, int], PromptBaseline] = with_examples,
) -> None:
    """Try system prompts zero-shot, then few-shot prompts with the best one, and write the winner.

    Args:
        systems: System prompts to try.
        examples: Numbers of few-shot examples to try.
        train: Training rows, from which examples are drawn.
        quality: Function that measures a prompt on validation rows.
        output: JSON file to write.
        draws: Number of draws of each number of examples.
        draw: Function that draws a few-shot prompt, see :func:`choose`.
    """
    tried = []
    for system in systems:
        tried.append((quality(PromptBaseline(system)), PromptBaseline(system)))
        print(f"{tried[-1][0]:.3f}  no examples  {'  '.join(system.splitlines()[:2])} ...", flush=True)
    system = max(tried, key=lambda pair: pair[0])[1].system
    for count in examples:
        for number in range(draws):
            baseline = draw(system, train, count, number)
            tried.append((quality(baseline), baseline))
            print(f"{tried[-1][0]:.3f}  {count} examples, draw {number}", flush=True)
    best, baseline = max(tried, key=lambda pair: pair[0])
    content = json.dumps({"system": baseline.system, "few_shot": baseline.few_shot}, indent=1)
    output.parent.mkdir(exist_ok=True)
    output.write_text(content + "\n", encoding="utf-8", newline="\n")
    print(f"{output.name}: {best:.3f} of the validation rows")


def read(folder: Path, split: str) -> list[Row]:
    """Read the rows of a split."""
    with (folder / "data" / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
