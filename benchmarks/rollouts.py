"""Sampling of eight completions per prompt, by this project's engine, by transformers' `generate` and by TRL.

    OMP_NUM_THREADS=2 python benchmarks/rollouts.py --pairs 5
    OMP_NUM_THREADS=1 python benchmarks/rollouts.py --small --pairs 1 --threads 1

All sample at temperature 1 from the same random Llama in fp32, with an end token that the model can't generate, so all
generate the same number of tokens. Here a prompt is prefilled once and its completions share its keys and values; the
others prefill it once per completion. A case with one new token shows the cost of the prefill alone, whose operations
are expected to have a ratio of 1/8. Sampled tokens can't be compared, so before the timed part each side generates
greedily, and those tokens must be the same.
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
    """Model, prompts and completions of a measurement.

    Args:
        prompt: Number of tokens per prompt.
        completion: Number of tokens per completion.
        size: Shape of the model.
        group: Number of completions per prompt.
        prompts: Number of prompts.
        lora: Whether the model has an adapter; `grpo_trainer` needs the field.
        seed: Seed of the random prompts.
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
    """Draw prompts of random tokens."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.prompts, case.prompt)
    return torch.randint(FIRST_TOKEN, case.size.vocabulary, shape, generator=generator).tolist()


def outputs(case: Case, greedy: list[list[int]], sampled: list[list[int]]) -> dict[str, Any]:
    """Values that all contenders must agree on: the greedy tokens, and the number of sampled ones."""
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
    return lambda: outputs(case, greedy, answer(Sampling(), case.group))


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
    return lambda: outputs(case, greedy, answer(do_sample=True, num_return_sequences=case.group))


def trl(case: Case) -> Repeat:
    trainer = grpo_trainer(case, max_steps=1, generation_kwargs={"eos_token_id": case.size.no_token})
    trainer.eos_token_ids = [case.size.no_token]  # it cuts completions at them, too
    repeated = [ids for ids in prompts(case) for _ in range(case.group)]  # TRL's sampler repeats rows in this order
    trainer.generation_config.do_sample = trainer.generation_kwargs["do_sample"] = False
    greedy = trainer._generate_single_turn(repeated[:: case.group], None, {}, 1)[0]
    trainer.generation_config.do_sample = trainer.generation_kwargs["do_sample"] = True

    return lambda: outputs(case, greedy, trainer._generate_single_turn(repeated, None, {}, case.group)[0])


PEERS: dict[str, Build] = {"transformers": plain_generate, "TRL": trl}
CASES = [Case(512, 1), Case(512, 64), Case(128, 1), Case(128, 128)]
SMALL = {"size": Size(vocabulary=1000, hidden=64, layers=2, tied=False), "group": 4}


def small(case: Case) -> Case:
    """Shrink a case for a quick check."""
    return replace(case, prompt=case.prompt // 8, completion=-(-case.completion // 8), **SMALL)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="small sizes, as a quick check that everything runs")
    options = parser.parse_args()
    cases = (small(case) if options.small else case for case in CASES)
    compare_each("rollouts", cases, ours, PEERS, options, agree=lambda case: {"greedy": 0, "lengths": 0})


if __name__ == "__main__":
    main()
