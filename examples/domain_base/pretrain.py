"""Rebuild the base model of the medical, legal and API examples, and the texts that measure forgetting.

    python examples/domain_base/pretrain.py             # about an hour
    python examples/domain_base/pretrain.py --evaluate  # the held-out metrics only
    python examples/domain_base/pretrain.py --texts     # general.jsonl here and of the tiny base only

Training continues from `examples/tiny_base`: its layers, and the embeddings of tokens that both tokenizers have.
Documents are from the three examples' `*_pretraining.py`, and some from the tiny base's own generator; company-specific
facts are drawn again for each document. The result is deterministic for a given machine and number of threads.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
TINY = HERE.parent / "tiny_base"
sys.path[:0] = [str(HERE.parent / name) for name in ("tiny_base", "medical_coding", "legal_citation", "api_calls")]

import api_pretraining  # noqa: E402
import corpus  # noqa: E402
import legal_pretraining  # noqa: E402
import medical_pretraining  # noqa: E402
from build import Batches, configuration, render, run, save, share_right, train_tokenizer  # noqa: E402

Messages = list[dict[str, str]]
VOCABULARY = 5120
EMBEDDING_STEPS, EMBEDDING_LEARNING_RATE = 200, 3e-3
"""At first only the embeddings are trained, so that new tokens can use what the layers have learned. When all weights
were trained at once, the layers forgot it within 250 steps."""
PEAK_LEARNING_RATE = 1e-3
HELD_OUT = 10_000_019
"""Seed of held-out documents."""


def routing(rng: random.Random, level: int) -> Messages:
    """Draw a document of the tiny base, against forgetting."""
    return corpus.document(corpus.CURRICULUM[(1, 2, 4)[level]], rng)


TASKS: dict[str, Callable[[random.Random, int], Messages]] = {
    "medical": medical_pretraining.document,
    "legal": legal_pretraining.document,
    "api": api_pretraining.document,
    "routing": routing,
}
SHARES = {"medical": 0.3, "legal": 0.3, "api": 0.3, "routing": 0.1}


@dataclass(frozen=True)
class Stage:
    """A stage of the curriculum.

    Args:
        steps: Number of optimizer steps.
        levels: Levels of documents, from which one is drawn per document.
        tokens: Number of tokens per batch.
    """

    steps: int
    levels: tuple[int, ...]
    tokens: int


CURRICULUM = (
    Stage(300, (0,), 2048),
    Stage(500, (0, 1, 1), 3072),
    Stage(1500, (1, 2, 2, 2, 2), 4096),
)


def document(stage: Stage, rng: random.Random) -> Messages:
    """Draw a document of one of the tasks."""
    task = rng.choices(list(SHARES), list(SHARES.values()))[0]
    return TASKS[task](rng, rng.choice(stage.levels))


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer on all tasks' words, and on every three-digit number after a space and after a letter."""
    rng = random.Random(seed)
    texts = [turn["content"] for _ in range(12000) for turn in document(CURRICULUM[-1], rng)]
    texts += [f" {number}" for number in range(100, 1000)] * 40
    return train_tokenizer(texts + [f"J{number:03d}" for number in range(1000)] * 40, size=VOCABULARY)


@torch.no_grad()
def load_with_vocabulary(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Load the tiny base with a new vocabulary.

    Embeddings of new tokens start as the mean over the old tokens that spell them, those of numbers as the embedding of
    the same number.
    """
    tiny = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    old = AutoTokenizer.from_pretrained(TINY).backend_tokenizer
    model = LlamaForCausalLM(configuration(tokenizer)).train()
    model.model.layers.load_state_dict(tiny.model.layers.state_dict())
    model.model.norm.load_state_dict(tiny.model.norm.state_dict())
    known, pieces = tiny.model.embed_tokens.weight, tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    for token_id, piece in enumerate(pieces):
        same = old.token_to_id(
            f"\u0120{piece}" if piece.isdigit() and len(piece) == 3 else piece
        )  # with its leading space
        parts = [same] if same is not None else [t.id for t in old.model.tokenize(piece)]
        model.model.embed_tokens.weight[token_id] = known[parts].mean(0)
    return model


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: int = 100) -> dict[str, float]:
    """Share of answers that are entirely correct in held-out documents, by task and level."""
    model.eval()
    found = {}
    for name, task in TASKS.items():
        for level in (0, 1, 2):
            rng = random.Random(HELD_OUT + level)
            share = share_right(model, tokenizer, [task(rng, level) for _ in range(documents)])
            found[f"{name}, level {level}"] = share
    return found


def general_texts(tasks: Sequence[Callable[[random.Random, int], Messages]], count: int = 64) -> list[dict[str, str]]:
    """Render held-out documents of all tasks, as a sample of the base's general abilities."""
    rng = random.Random(HELD_OUT + 1)
    return [{"text": render(tasks[number % len(tasks)](rng, 2))} for number in range(count)]


def write_texts() -> None:
    """Write the general texts of both bases."""
    for folder, tasks in ((HERE, list(TASKS.values())), (TINY, [routing])):
        lines = "".join(json.dumps(row) + "\n" for row in general_texts(tasks))
        (folder / "general.jsonl").write_text(lines, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="only print the held-out metrics of the saved model")
    parser.add_argument("--texts", action="store_true", help="write the general texts only")
    parser.add_argument("--seed", type=int, default=0, help="seed of documents and weights")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of steps")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.texts:
        write_texts()
        return
    if not arguments.evaluate:
        torch.manual_seed(arguments.seed)
        tokenizer = build_tokenizer(arguments.seed)
        model = load_with_vocabulary(tokenizer)
        batches = Batches(tokenizer, arguments.seed, document)

        def metrics() -> dict[str, float]:
            return evaluate(model, tokenizer, documents=12)

        model.model.layers.requires_grad_(False)
        first = [CURRICULUM[0]] * int(EMBEDDING_STEPS * arguments.scale)
        run(model, batches, first, metrics, peak=EMBEDDING_LEARNING_RATE)
        print(json.dumps(metrics()), flush=True)
        model.model.layers.requires_grad_(True)
        plan = [stage for stage in CURRICULUM for _ in range(int(stage.steps * arguments.scale))]
        run(model, batches, plan, metrics, peak=PEAK_LEARNING_RATE)
        arguments.output.mkdir(parents=True, exist_ok=True)
        save(model, tokenizer, arguments.output)
        write_texts()
    tokenizer = AutoTokenizer.from_pretrained(arguments.output)
    model = AutoModelForCausalLM.from_pretrained(arguments.output, dtype=torch.float32)
    print(json.dumps(evaluate(model, tokenizer), indent=1))


if __name__ == "__main__":
    main()
