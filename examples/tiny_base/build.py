"""Rebuild the tiny base model: tokenizer, weights, and the held-out figures of its README.

    python examples/tiny_base/build.py             # about an hour on two cores
    python examples/tiny_base/build.py --evaluate  # the figures only

Deterministic for one machine and one number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch
from corpus import CURRICULUM, Stage, document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SYSTEM, USER, ASSISTANT, END, PAD = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "{{- '<|assistant|>' -}}{%- generation -%}{{- message.content + '<|end|>' -}}{%- endgeneration -%}"
    "{%- elif message.role in ['system', 'user'] -%}"
    "{{- '<|' + message.role + '|>' + message.content + '<|end|>' -}}"
    "{%- else -%}{{- raise_exception('unknown role: ' + message.role) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
TEXT_WEIGHT = 0.03
PEAK_LEARNING_RATE = 3e-3


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1,536 tokens; digits stand alone, so codes are copied digit by digit."""
    rng = random.Random(seed)
    texts = [turn["content"] for _ in range(6000) for turn in document(CURRICULUM[-1], rng)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1536,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def render(messages: list[dict[str, str]]) -> str:
    return "".join(f"<|{turn['role']}|>{turn['content']}{END}" for turn in messages)


class Batches:
    """Batches of as many tokens as the stage says, with a weight per target: answers count, the rest counts a little."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.core = tokenizer.backend_tokenizer
        self.rng = random.Random(seed)
        self.assistant, self.end = (tokenizer.convert_tokens_to_ids(t) for t in (ASSISTANT, END))

    def next(self, stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
        rows: list[list[int]] = []
        while not rows or (len(rows) + 1) * max(map(len, rows)) <= stage.tokens:
            rows.append(self.core.encode(render(document(stage, self.rng))).ids)
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        weights = torch.zeros(len(rows), longest)
        for r, row in enumerate(rows):
            ids[r, : len(row)] = torch.tensor(row)
            answering = False
            for t, token in enumerate(row):
                weights[r, t] = 1.0 if answering else TEXT_WEIGHT
                answering = (answering or token == self.assistant) and token != self.end
        return ids, weights


def learning_rate(step: int, total: int) -> float:
    warmup = 50
    if step < warmup:
        return PEAK_LEARNING_RATE * (step + 1) / warmup
    progress = (step - warmup) / (total - warmup)
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(tokenizer: PreTrainedTokenizerFast, seed: int, scale: float) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.06,  # 0.02 is for wide models; at this width copying would take thousands of steps longer
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).train()
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    batches = Batches(tokenizer, seed)
    plan = [stage for stage in CURRICULUM for _ in range(int(stage.steps * scale))]
    started, shown = time.perf_counter(), 0.0
    for step, stage in enumerate(plan):
        ids, weights = batches.next(stage)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(plan))
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        losses = torch.nn.functional.cross_entropy(
            model.lm_head(hidden).flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        answers = losses.detach()[weight == 1.0].mean().item()
        shown = answers if step == 0 else 0.95 * shown + 0.05 * answers
        if step % 50 == 49 or step + 1 == len(plan):
            elapsed = time.perf_counter() - started
            left = elapsed / (step + 1) * (len(plan) - step - 1)
            print(f"step {step + 1}/{len(plan)}  answer loss {shown:.3f}  {elapsed:.0f}s, {left:.0f}s left", flush=True)
            if step % 250 == 249 and (step + 1) < len(plan):
                print("  ", json.dumps(evaluate(model, tokenizer, documents=12)), flush=True)
                model.train()
    return model.eval()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: int = 60) -> dict[str, float]:
    """Exact answers (every token, argmax given the right ones before it) on documents that were never trained on."""
    model.eval()
    kinds = {
        "12 rules, topic named": Stage(0, (12, 12), (8, 8), bare=0.0, generic=1.0, framed=0.5),
        "24 rules, real requests": Stage(0, (24, 24), (8, 8), bare=0.0, generic=0.0, framed=0.8),
        "36 rules, real requests": Stage(0, (36, 36), (8, 8), bare=0.0, generic=0.0, framed=0.8),
        "36 rules, one request": Stage(0, (36, 36), (1, 1), bare=0.0, generic=0.0, framed=0.8),
    }
    core = tokenizer.backend_tokenizer
    assistant, end = (tokenizer.convert_tokens_to_ids(t) for t in (ASSISTANT, END))
    result = {}
    for name, stage in kinds.items():
        rng = random.Random(10_000_019)
        right = asked = 0
        for _ in range(documents * (4 if "one request" in name else 1)):
            ids = core.encode(render(document(stage, rng))).ids
            predicted = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
            for start in [i for i, token in enumerate(ids) if token == assistant]:
                stop = ids.index(end, start)
                asked += 1
                right += predicted[start:stop] == ids[start + 1 : stop + 1]
        result[name] = round(right / asked, 4)
    return result


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """In bf16, which halves the file; written aside and moved, so a reader never sees half of it."""
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in Path(folder).iterdir():
            shutil.move(file, HERE / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluate", action="store_true", help="print the held-out figures of the saved model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of steps")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.evaluate:
        tokenizer = build_tokenizer(arguments.seed)
        save(train(tokenizer, arguments.seed, arguments.scale), tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    model = AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32)
    print(json.dumps(evaluate(model, tokenizer), indent=1))


if __name__ == "__main__":
    main()
