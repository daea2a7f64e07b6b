"""Against TRL on SmolLM2-135M-Instruct: supervised fine-tuning on real rows, DPO and GRPO steps, and rollouts.

    make smollm2 && python benchmarks/real.py --pairs 3
    python benchmarks/real.py --only "SFT" --json real.json

Supervised fine-tuning takes the citations of `examples/smollm2` as the chat template renders them, in fp32 and in
``bf16-mixed``. Pairs and groups have random tokens, in as many as those rows have on average: they say what a step of
that size costs. Everything else is as in `sft.py`, `pairs.py`, `grpo.py` and `rollouts.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import grpo
import pairs
import rollouts
import sft
from harness import Build, Result, arguments, compare, save
from models import Size

from lightning_ft import PairDataModule
from lightning_ft.data.layout import Example
from lightning_ft.data.tokenizers import load_tokenizer

FOLDER = "examples/smollm2/model"
ROWS = "examples/smollm2/data/legal_citation/train.jsonl"
PROMPT, ANSWER = 56, 28
"""Mean numbers of tokens of a prompt and of an answer of these rows."""
COUNT = 256
"""Number of rows that are encoded."""


@cache
def real_rows(folder: str) -> list[Example]:
    """The rows as training sees them."""
    data = PairDataModule(train=ROWS, tokenizer=load_tokenizer(folder))
    data.setup("fit")
    rows: Any = data.train_dataloader().dataset
    return [examples[0] for _, examples in rows[range(COUNT)]]


@dataclass(frozen=True)
class RealRows(sft.Case):
    """Supervised fine-tuning on real rows."""

    def rows(self) -> list[Example]:
        """The first rows of the file."""
        return real_rows(self.size.folder)[: self.batch * self.steps]


def cases(size: Size) -> list[tuple[str, Any, Build, Build, dict[str, float]]]:
    """Name, case, both build functions and allowed differences of each comparison."""
    found: list[tuple[str, Any, Build, Build, dict[str, float]]] = []
    for precision in ("32-true", "bf16-mixed"):
        for lora in (True, False):
            case = RealRows(size, lora, prompt=PROMPT, answer=ANSWER, batch=8, steps=2, precision=precision)
            found.append(("SFT", case, sft.ours, sft.trl, sft.agree(case)))
    pair = pairs.Case("dpo", lora=True, size=size, prompt=PROMPT, answer=ANSWER, batch=4, steps=1)
    found.append(("DPO", pair, pairs.ours, pairs.trl, pairs.AGREE["dpo"]))
    update = grpo.Case(lora=True, kl=0.0, size=size, prompt=PROMPT, completion=ANSWER, prompts=1, steps=1)
    agree = {**grpo.AGREE, "logprobs": 1e-4}  # trained weights have larger logits than random ones
    found.append(("GRPO update", update, grpo.ours, grpo.trl, agree))
    rollout = rollouts.Case(PROMPT, 48, size=size, prompts=2)
    found.append(("rollouts", rollout, rollouts.ours, rollouts.trl, {"greedy": 0.0, "lengths": 0.0}))
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default=FOLDER, help="folder of the model")
    options = parser.parse_args()
    results: list[Result] = []
    for name, case, ours, peer, agree in cases(Size.of(options.model)):
        if options.only in f"{name} {case}":
            results.append(compare(name, case, ours, peer, pairs=options.pairs, threads=options.threads, agree=agree))
            save(results, options.json)


if __name__ == "__main__":
    main()
