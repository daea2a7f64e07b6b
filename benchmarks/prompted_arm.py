"""TokenSavings' prompted arm: generation for requests that start with the same system prompt and examples.

    OMP_NUM_THREADS=2 python benchmarks/prompted_arm.py --pairs 5
    OMP_NUM_THREADS=1 python benchmarks/prompted_arm.py --small --pairs 1 --threads 1

The engine computes the prefix that all prompts share only once. It is compared with the same engine without sharing,
and with transformers' `generate` in batches of the same size. Answers are greedy and have no end token; all contenders
must generate the same ones.
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
    """Model and requests of a measurement.

    Args:
        size: Shape of the model.
        requests: Number of requests.
        prefix: Number of tokens that all prompts start with.
        least: Minimum number of tokens after the prefix.
        most: Maximum number of tokens after the prefix.
        answer: Number of tokens per answer.
        batch_size: Number of requests per batch; TokenSavings' default.
        seed: Seed of the random prompts.
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
            f"{self.size}, {self.requests} requests, prefix {self.prefix}, requests {self.least} to {self.most}, "
            f"answers {self.answer}"
        )


def prompts(case: Case) -> list[list[int]]:
    """Draw prompts of random tokens with a common prefix."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(count: int) -> list[int]:
        return torch.randint(2, case.size.vocabulary, (count,), generator=generator).tolist()

    prefix = draw(case.prefix)
    own = torch.randint(case.least, case.most + 1, (case.requests,), generator=generator).tolist()
    return [[*prefix, *draw(count)] for count in own]


def with_engine(case: Case, share_prefix: bool) -> Repeat:
    engine = LocalEngine(
        model(case.size).eval(),
        end_token_ids=[case.size.no_token],
        pad_token_id=PAD,
        batch_size=case.batch_size,
        share_prefix=share_prefix,
    )
    token_ids = prompts(case)

    def repeat() -> dict[str, Any]:
        rollouts = engine.generate(token_ids, max_new_tokens=case.answer)
        expected = case.prefix if share_prefix else 0
        if rollouts.shared_prefix != expected:
            raise RuntimeError(f"The engine shared a prefix of {rollouts.shared_prefix} tokens; expected {expected}.")
        return {"answers": [list(completion.tokens) for completion in rollouts.completions]}

    return repeat


def ours(case: Case) -> Repeat:
    return with_engine(case, share_prefix=True)


def unshared(case: Case) -> Repeat:
    return with_engine(case, share_prefix=False)


def plain_generate(case: Case) -> Repeat:
    policy = model(case.size).eval()
    token_ids = prompts(case)
    config = GenerationConfig(
        max_new_tokens=case.answer, do_sample=False, eos_token_id=case.size.no_token, pad_token_id=PAD
    )

    @torch.no_grad()
    def repeat() -> dict[str, Any]:
        answers: list[list[int]] = []
        for start in range(0, len(token_ids), case.batch_size):
            ids, mask = left_padded(token_ids[start : start + case.batch_size], PAD)
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
    parser.add_argument("--small", action="store_true", help="a small size, as a quick check that everything runs")
    options = parser.parse_args()
    case = replace(Case(), **SMALL) if options.small else Case()
    compare_each("prompted arm", [case], ours, PEERS, options, agree=lambda case: {"answers": 0})


if __name__ == "__main__":
    main()
