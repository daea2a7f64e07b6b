r"""Compare trained models on a domain's test rows: share of right answers, the gain over the first, and KL divergences.

    python examples/smollm2/policies.py legal_citation sft=runs/sft/export/last grpo=runs/grpo/export/last

The first model is the one that the others started from. Answers are greedy; gains are paired, and their intervals (95%)
resample clusters. `kl` is that of the policy from the first model on answers sampled at temperature 1, in nats per
answer: what the gain was paid with. `kl_general` is that from the untuned base on general texts, in nats per token.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from lightning_ft import LoRAFineTuning, PairDataModule
from lightning_ft.data.layout import Example
from lightning_ft.data.shared_prompts import lay_out_completions
from lightning_ft.data.texts import load_texts
from lightning_ft.data.tokenizers import pad_token_id
from lightning_ft.evaluation.bootstrap import bootstrap_intervals
from lightning_ft.evaluation.retention.measurement import measure_retention
from lightning_ft.evaluation.savings.arms import run_arm
from lightning_ft.evaluation.savings.plan import MeasurementPlan, answer_plan
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.models.generate import end_token_ids, evaluating
from lightning_ft.models.head import CausalLM, completion_logprobs
from lightning_ft.modules.base import FineTuning
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Completion, Sampling

HERE = Path(__file__).parent


def load(folder: str) -> LoRAFineTuning:
    """Load an exported adapter with its base."""
    module = LoRAFineTuning(folder, dtype="float32")
    module.configure_model()
    module.eval()
    return module


def domain_plan(
    domain: str, tokenizer: PreTrainedTokenizerBase, *, test: str | None = None, max_requests: int | None = None
) -> MeasurementPlan:
    """The test requests of a domain, answered and graded as its configuration says.

    Args:
        domain: Name of the configuration.
        tokenizer: Tokenizer of the model that answers.
        test: Another file of test rows than the configuration's.
        max_requests: Largest number of requests; None for all.
    """
    config = yaml.safe_load((HERE / f"{domain}.yaml").read_text(encoding="utf-8"))
    savings = config["trainer"]["callbacks"][0]["init_args"]
    rows = config["data"]["init_args"] | ({} if test is None else {"test": test})
    data = PairDataModule(**rows, tokenizer=tokenizer)
    data.load_rows()
    return answer_plan(
        tokenizer,
        data.requests("test"),
        scorer=savings["scorer"],
        max_new_tokens=savings["max_new_tokens"],
        max_requests=max_requests,
        structured_outputs=savings.get("structured_outputs", False),
    )


def answers_of(module: FineTuning, plan: MeasurementPlan) -> ArmRecords:
    """Greedy answers to the requests of a plan, in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return run_arm("tuned", module.model, module.tokenizer, plan, timed_requests=0, batch_size=64, progress=False)


def quality_and_forgetting(module: FineTuning, plan: MeasurementPlan, **retention: Any) -> dict[str, Any]:
    """Share of right answers, and how far the model is from its base on general texts, each with its interval.

    Args:
        module: The trained module.
        plan: The requests.
        **retention: Arguments of `measure_retention`.
    """
    arm = answers_of(module, plan)
    quality = bootstrap_intervals(
        {"score": list(arm.scores), "n": [1.0] * len(arm.scores)},
        {"quality": lambda sums: sums["score"] / sums["n"]},
        clusters=list(arm.clusters) or None,
    )["quality"]
    kept = measure_retention(module.model, module.tokenizer, progress=False, **retention)
    found = {"quality": quality, "kl_general": kept.kl_general, "ppl_ratio": kept.ppl_ratio}
    return {name: asdict(interval) for name, interval in found.items()}


def sample(module: LoRAFineTuning, prompts: list[list[int]], plan: MeasurementPlan, count: int) -> list[Completion]:
    """Sample answers at temperature 1, those of a prompt next to each other."""
    tokenizer = module.tokenizer
    ends = end_token_ids(module.model, tokenizer)
    engine = LocalEngine(module.model, end_token_ids=ends, pad_token_id=pad_token_id(tokenizer), batch_size=64)
    torch.manual_seed(0)
    options = {"max_new_tokens": plan.max_new_tokens, "sampling": Sampling(temperature=1.0), "num_completions": count}
    return list(engine.generate(prompts, **options).completions)


def log_likelihoods(
    model: CausalLM, prompts: list[list[int]], answers: list[Completion], batch: int = 32
) -> list[float]:
    """Log-probability of each answer after its prompt, in nats, summed over its tokens."""
    found: list[float] = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        examples = [
            [Example(torch.tensor(a.tokens), torch.ones(len(a.tokens), dtype=torch.bool))] for a in answers[part]
        ]
        laid_out = lay_out_completions(list(map(torch.tensor, prompts[part])), examples, shared=False, packing=False)
        with evaluating(model):
            logprobs = completion_logprobs(model, laid_out).logprobs
        found += logprobs.new_zeros(laid_out.num_groups).index_add(0, laid_out.groups, logprobs).tolist()
    return found


def main() -> None:
    """Measure every model and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain")
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="exported adapters; the first is the start")
    parser.add_argument("--kl-prompts", type=int, default=100, help="number of requests that answers are sampled for")
    parser.add_argument("--samples", type=int, default=2, help="number of samples for each of them")
    parser.add_argument("--test", help="another file of test rows than the configuration's")
    parser.add_argument("--texts", help="JSONL file of general texts; leaves kl_general out by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    named = dict(model.split("=", 1) for model in options.models)
    start, *_ = named
    first = load(named[start])
    plan = domain_plan(options.domain, first.tokenizer, test=options.test)
    prompts = [list(prompt) for prompt in plan.bare.prompts[: options.kl_prompts]]
    repeated = [prompt for prompt in prompts for _ in range(options.samples)]
    texts = None if options.texts is None else load_texts(options.texts)
    results: dict[str, dict[str, object]] = {}
    start_scores: list[float] = []
    for name, folder in named.items():
        module = first if name == start else load(folder)
        arm = answers_of(module, plan)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answers = sample(module, prompts, plan, options.samples)
        start_scores = start_scores or list(arm.scores)
        ratios = [
            policy - reference
            for policy, reference in zip(
                log_likelihoods(module.model, repeated, answers),
                log_likelihoods(first.model, repeated, answers),
                strict=True,
            )
        ]
        quality = bootstrap_intervals(
            {"score": list(arm.scores), "start": start_scores, "n": [1.0] * len(arm.scores)},
            {
                "quality": lambda sums: sums["score"] / sums["n"],
                "gain": lambda sums: (sums["score"] - sums["start"]) / sums["n"],
            },
            clusters=list(arm.clusters) or None,
        )
        spent = bootstrap_intervals(
            {
                "kl": [
                    sum(ratios[i : i + options.samples]) / options.samples
                    for i in range(0, len(ratios), options.samples)
                ],
                "n": [1.0] * len(prompts),
            },
            {"kl": lambda sums: sums["kl"] / sums["n"]},
        )
        results[name] = {key: asdict(interval) for key, interval in {**quality, **spent}.items()}
        if texts is not None:
            kept = measure_retention(module.model, module.tokenizer, texts=texts, progress=False)
            results[name] |= {"kl_general": asdict(kept.kl_general), "ppl_ratio": asdict(kept.ppl_ratio)}
        print(json.dumps({name: results[name]}), flush=True)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
