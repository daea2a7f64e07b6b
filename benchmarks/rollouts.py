"""Completions of one prompt, eight at a time, by this project's engine, by transformers' `generate` and by TRL.

    OMP_NUM_THREADS=2 python benchmarks/rollouts.py --pairs 5
    OMP_NUM_THREADS=1 python benchmarks/rollouts.py --small --pairs 1 --threads 1

All sample at temperature 1 from the same random Llama in fp32, and none knows an end token that the model could write,
so all write equally many tokens. Here a prompt is read once and its keys and values are copied for its completions;
the others read it once for each. A case with one new token shows what reading alone costs; its operations are the ones
that a ratio of 1/8 is expected of. Sampled tokens can't be compared, so before it is timed each side answers greedily,
and those tokens must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from grpo import grpo_trainer
from harness import Build, Repeat, arguments, compare_each
from models import UNTIED, Size, model
from pairs import FIRST_TOKEN
from transformers import GenerationConfig

from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling


@dataclass(frozen=True)
class Case:
    """What is answered.

    Args:
        prompt: Tokens of a prompt.
        completion: Tokens of a completion.
        size: Of the model.
        group: Completions of a prompt.
        prompts: How many prompts.
        lora: An adapter over the model; for TRL's trainer, which asks.
        seed: Of the prompts.
    """

    prompt: int
    completion: int
    size: Size = UNTIED
    group: int = 8
    prompts: int = 2
    lora: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.size}, prompt {self.prompt}, completion {self.completion}, {self.prompts} prompts in groups of "
            f"{self.group}"
        )


def prompts(case: Case) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.prompts, case.prompt)
    return torch.randint(FIRST_TOKEN, case.size.vocabulary, shape, generator=generator).tolist()


def written(case: Case, greedy: list[list[int]], sampled: list[list[int]]) -> dict[str, Any]:
    """What all sides must agree on: the greedy tokens, and how many are sampled."""
    return {"greedy": greedy, "lengths": [len(ids) for ids in sampled]}


def ours(case: Case) -> Repeat:
    engine = LocalEngine(
        model(case.size).eval(),
        end_token_ids=[case.size.no_token],
        pad_token_id=1,
        batch_size=case.prompts * case.group,
    )

    def answer(sampling: Sampling | None, count: int) -> list[list[int]]:
        rollouts = engine.generate(
            prompts(case), max_new_tokens=case.completion, sampling=sampling, num_completions=count
        )
        return [list(completion.tokens) for completion in rollouts.completions]

    greedy = answer(None, 1)
    return lambda: written(case, greedy, answer(Sampling(), case.group))


def plain_generate(case: Case) -> Repeat:
    policy = model(case.size).eval()
    ids = torch.tensor(prompts(case))

    def answer(**options: Any) -> list[list[int]]:
        config = GenerationConfig(
            max_new_tokens=case.completion, eos_token_id=case.size.no_token, pad_token_id=1, top_k=0, **options
        )
        with torch.no_grad():
            out = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return out[:, case.prompt :].tolist()

    greedy = answer(do_sample=False)
    return lambda: written(case, greedy, answer(do_sample=True, num_return_sequences=case.group))


def trl(case: Case) -> Repeat:
    trainer = grpo_trainer(case, max_steps=1, generation_kwargs={"eos_token_id": case.size.no_token})
    repeated = [ids for ids in prompts(case) for _ in range(case.group)]  # as its sampler repeats the rows
    trainer.generation_config.do_sample = trainer.generation_kwargs["do_sample"] = False
    greedy = trainer._generate_single_turn(repeated[:: case.group], None, {}, 1)[0]
    trainer.generation_config.do_sample = trainer.generation_kwargs["do_sample"] = True

    return lambda: written(case, greedy, trainer._generate_single_turn(repeated, None, {}, case.group)[0])


PEERS: dict[str, Build] = {"transformers": plain_generate, "TRL": trl}
CASES = [Case(512, 1), Case(512, 64), Case(128, 1), Case(128, 128)]
SMALL = {"size": Size(vocabulary=1000, hidden=64, layers=2, tied=False), "group": 4}


def small(case: Case) -> Case:
    """The same where it only shows whether it works."""
    return replace(case, prompt=case.prompt // 8, completion=-(-case.completion // 8), **SMALL)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="sizes that only show whether it works")
    options = parser.parse_args()
    cases = (small(case) if options.small else case for case in CASES)
    compare_each("rollouts", cases, ours, PEERS, options, agree=lambda case: {"greedy": 0, "lengths": 0})


if __name__ == "__main__":
    main()
