"""The prompted arm of TokenSavings: requests that start with the same system prompt and examples.

    OMP_NUM_THREADS=2 python benchmarks/prompted_arm.py --pairs 5
    OMP_NUM_THREADS=1 python benchmarks/prompted_arm.py --small --pairs 1 --threads 1

The engine that answers them reads what all prompts start with once. It is compared with itself where it may not share,
and with transformers' `generate` in batches of the same size; the answers, greedy and without an end, must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import Build, Repeat, arguments, compare_each
from models import UNTIED, Size, model
from transformers import GenerationConfig

from lightning_ft.models.batched_generation import left_padded
from lightning_ft.rollout.local import LocalEngine

PAD = 1


@dataclass(frozen=True)
class Case:
    """What is asked.

    Args:
        size: Of the model.
        requests: How many.
        prefix: Tokens that all prompts start with.
        least: Fewest tokens of a request's own.
        most: Most of them.
        answer: Tokens of an answer.
        batch_size: Requests at a time; TokenSavings' default.
        seed: Of the prompts.
    """

    size: Size = UNTIED
    requests: int = 200
    prefix: int = 400
    least: int = 20
    most: int = 40
    answer: int = 16
    batch_size: int = 32
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.size}, {self.requests} requests, prefix {self.prefix}, own part {self.least} to {self.most}, "
            f"answers {self.answer}"
        )


def prompts(case: Case) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(count: int) -> list[int]:
        return torch.randint(2, case.size.vocabulary, (count,), generator=generator).tolist()

    prefix = draw(case.prefix)
    own = torch.randint(case.least, case.most + 1, (case.requests,), generator=generator).tolist()
    return [[*prefix, *draw(count)] for count in own]


def by_engine(case: Case, share_prefix: bool) -> Repeat:
    engine = LocalEngine(
        model(case.size).eval(),
        end_token_ids=[case.size.no_token],
        pad_token_id=PAD,
        batch_size=case.batch_size,
        share_prefix=share_prefix,
    )
    asked = prompts(case)

    def repeat() -> dict[str, Any]:
        rollouts = engine.generate(asked, max_new_tokens=case.answer)
        expected = case.prefix if share_prefix else 0
        if rollouts.shared_prefix != expected:
            raise RuntimeError(f"{rollouts.shared_prefix} tokens were shared, not {expected}.")
        return {"answers": [list(completion.tokens) for completion in rollouts.completions]}

    return repeat


def ours(case: Case) -> Repeat:
    return by_engine(case, share_prefix=True)


def unshared(case: Case) -> Repeat:
    return by_engine(case, share_prefix=False)


def plain_generate(case: Case) -> Repeat:
    policy = model(case.size).eval()
    asked = prompts(case)
    config = GenerationConfig(
        max_new_tokens=case.answer, do_sample=False, eos_token_id=case.size.no_token, pad_token_id=PAD
    )

    @torch.no_grad()
    def repeat() -> dict[str, Any]:
        answers: list[list[int]] = []
        for start in range(0, len(asked), case.batch_size):
            ids, mask = left_padded(asked[start : start + case.batch_size], PAD)
            out = policy.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            answers += out[:, ids.shape[1] :].tolist()
        return {"answers": answers}

    return repeat


PEERS: dict[str, Build] = {"without sharing": unshared, "transformers": plain_generate}
SMALL = {
    "size": Size(vocabulary=1000, hidden=64, layers=2, tied=False),
    "requests": 12,
    "prefix": 60,
    "least": 4,
    "most": 9,
    "answer": 6,
    "batch_size": 5,
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="a size that only shows whether it works")
    options = parser.parse_args()
    case = replace(Case(), **SMALL) if options.small else Case()
    compare_each("prompted arm", [case], ours, PEERS, options, agree=lambda case: {"answers": 0})


if __name__ == "__main__":
    main()
