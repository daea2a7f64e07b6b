"""Rebuild the tiny base model: tokenizer, weights, and the held-out figures of its README.

    python examples/tiny_base/build.py             # half an hour
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
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from corpus import CURRICULUM, Clauses, Stage, document, rule_document
from english import TOPICS, UNSEEN
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
TEXT_SHARE, TEXT_WEIGHT = 0.2, 0.1
EMBEDDING_STD = 0.06
PEAK_LEARNING_RATE = 3e-3


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """3,072 tokens, among them every word of the corpus and every number of three digits."""
    rng = random.Random(seed)
    texts = [turn["content"] for _ in range(6000) for turn in document(CURRICULUM[-1], rng)]
    return train_tokenizer(texts + [f" {number}" for number in range(100, 1000)] * 20, size=3072)


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the chat template.

    A space is put before what follows a special token (and taken off in decoding), so that a word is the same token in
    a rule, at the start of a message and at the start of an answer. A model this small couldn't learn that they are
    alike.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
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
    """Batches of as many tokens as the stage says, with a weight per target: answers count, some text a little."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        draw: Callable[[Any, random.Random], list[dict[str, str]]] = document,
    ) -> None:
        self.core, self.draw = tokenizer.backend_tokenizer, draw
        self.rng = random.Random(seed)
        self.assistant, self.end = (tokenizer.convert_tokens_to_ids(t) for t in (ASSISTANT, END))

    def next(self, stage: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and weights, both `[rows, longest row]`."""
        rows: list[list[int]] = []
        while not rows or (len(rows) + 1) * max(map(len, rows)) <= stage.tokens:
            rows.append(self.core.encode(render(self.draw(stage, self.rng))).ids)
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        weights = torch.zeros(len(rows), longest)
        for r, row in enumerate(rows):
            ids[r, : len(row)] = torch.tensor(row)
            answering, text = False, TEXT_WEIGHT if self.rng.random() < TEXT_SHARE else 0.0
            for t, token in enumerate(row):
                weights[r, t] = 1.0 if answering else text
                answering = (answering or token == self.assistant) and token != self.end
        return ids, weights


@torch.no_grad()
def start_with_induction(model: LlamaForCausalLM, seed: int) -> None:
    """Initial weights under which "what followed this word before?" is already asked.

    Copying by induction (https://arxiv.org/abs/2209.11895) takes two heads that must find one another: one that looks
    at the token before, and one in a later layer that looks for the place whose token before is the present token. From
    random weights this model didn't find them in 4,000 steps; started like this, it follows eight rules after 250. The
    head of layer 0 peaks at distance one by the phases of its rotary frequencies; the head of layer 1 compares, on the
    slow frequencies only, the present token with what the first head wrote. All other branches start at zero, and all
    weights are trained.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, size = model.config.hidden_size, model.config.head_dim
    half, fast = size // 2, 6
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight.normal_(0, hidden**-0.5, generator=generator)
        attention.o_proj.weight.zero_()
        mlp.down_proj.weight.zero_()
    basis = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0]
    shared, token, written, copied = (
        basis[:, 0],
        basis[:, 1 : 1 + size],
        basis[:, 33 : 33 + size],
        basis[:, 65 : 65 + size],
    )
    model.model.embed_tokens.weight.add_(0.7 * EMBEDDING_STD * math.sqrt(hidden) * shared)

    previous, induction = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    query, key = torch.zeros(size, hidden), torch.zeros(size, hidden)
    for pair in range(fast):
        angle = model.model.rotary_emb.inv_freq[pair].item()
        query[pair], query[pair + half], key[pair] = math.cos(angle) * shared, -math.sin(angle) * shared, shared
    sharpness = 3.6 * size**0.25 / (0.57 * math.sqrt(hidden))
    previous.q_proj.weight[:size], previous.k_proj.weight[:size] = sharpness * query, sharpness * key
    previous.v_proj.weight[:size], previous.o_proj.weight[:, :size] = token.T, 1.6 * EMBEDDING_STD * written

    slow = torch.ones(size, 1)
    slow[:fast] = slow[half : half + fast] = 0.0
    slow *= 2.0  # so that one place among several hundred stands out
    induction.q_proj.weight[:size], induction.k_proj.weight[:size] = slow * token.T, slow * written.T
    induction.v_proj.weight[:size], induction.o_proj.weight[:, :size] = copied.T, 5.0 * EMBEDDING_STD * copied


def learning_rate(step: int, total: int, peak: float = PEAK_LEARNING_RATE) -> float:
    warmup = 50
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (total - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(tokenizer: PreTrainedTokenizerFast, seed: int, scale: float) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(configuration(tokenizer)).train()
    start_with_induction(model, seed)
    plan = [stage for stage in CURRICULUM for _ in range(int(stage.steps * scale))]
    return run(model, Batches(tokenizer, seed), plan, lambda: evaluate(model, tokenizer, documents=12))


def configuration(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=EMBEDDING_STD,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def run(
    model: LlamaForCausalLM,
    batches: Batches,
    plan: Sequence[Any],
    figures: Callable[[], dict[str, float]],
    peak: float = PEAK_LEARNING_RATE,
) -> LlamaForCausalLM:
    """Train through a plan that names the stage of each step, printing held-out figures now and then."""
    print(f"{model.num_parameters():,} parameters, {model.config.vocab_size} tokens", flush=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
    started, shown = time.perf_counter(), 0.0
    for step, stage in enumerate(plan):
        ids, weights = batches.next(stage)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(plan), peak)
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        counts = weights[:, 1:] > 0
        targets, weight = ids[:, 1:][counts], weights[:, 1:][counts]
        losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[counts]), targets, reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        answers = losses.detach()[weight == 1.0].mean().item()
        shown = answers if step == 0 else 0.9 * shown + 0.1 * answers
        if step % 50 == 49 or step + 1 == len(plan):
            elapsed = time.perf_counter() - started
            left = elapsed / (step + 1) * (len(plan) - step - 1)
            print(f"step {step + 1}/{len(plan)}  answer loss {shown:.3f}  {elapsed:.0f}s, {left:.0f}s left", flush=True)
            if step % 250 == 249 and (step + 1) < len(plan):
                print("  ", json.dumps(figures()), flush=True)
                model.train()
    return model.eval()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: int = 60) -> dict[str, float]:
    """Share of answers that greedy decoding gets right to the last token, in documents that were never trained on."""
    model.eval()
    real = Stage(0, (36, 36), (8, 8), bare=0.0, generic=0.0, framed=0.8)
    kinds: dict[str, tuple[Stage, Clauses]] = {
        "12 rules, topic named": (Stage(0, (12, 12), (8, 8), bare=0.0, generic=1.0, framed=0.5), TOPICS),
        "24 rules, real requests": (replace(real, rules=(24, 24)), TOPICS),
        "36 rules, real requests": (real, TOPICS),
        "36 rules, first request": (replace(real, queries=(1, 1)), TOPICS),
        "36 rules, unseen clauses": (real, UNSEEN),
        "36 rules, first request, unseen clause": (replace(real, queries=(1, 1)), UNSEEN),
    }
    result = {}
    for name, (stage, clauses) in kinds.items():
        rng = random.Random(10_000_019)
        count = documents * 8 // stage.queries[0]
        result[name] = share_right(model, tokenizer, [rule_document(stage, rng, clauses) for _ in range(count)])
    return result


@torch.no_grad()
def share_right(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[list[dict[str, str]]]
) -> float:
    """Share of the documents' answers that greedy decoding gets right to the last token."""
    core = tokenizer.backend_tokenizer
    assistant, end = (tokenizer.convert_tokens_to_ids(t) for t in (ASSISTANT, END))
    right = asked = 0
    for messages in documents:
        ids = core.encode(render(messages)).ids
        predicted = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        for start in [i for i, token in enumerate(ids) if token == assistant]:
            stop = ids.index(end, start)
            asked += 1  # right wherever the right tokens stand before it, so greedy decoding takes this very path
            right += predicted[start:stop] == ids[start + 1 : stop + 1]
    return round(right / asked, 4)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, place: Path = HERE) -> None:
    """In bf16, which halves the file; written aside and moved, so a reader never sees half of it."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in Path(folder).iterdir():
            shutil.move(file, place / file.name)


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
