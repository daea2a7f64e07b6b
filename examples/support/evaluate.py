r"""Measure policies on the test messages: true reward, reward model's reward, and KL divergence from the start model.

    python examples/support/evaluate.py sft=runs/support-sft/export/last grpo=runs/support-grpo/export/last \
        --reward-model runs/support-reward/export/last --output runs/support-rlhf.json

The first model is the one that the others started from; KL divergences and differences are relative to it. Each model
answers each message several times by sampling at temperature 1, and once greedily. Intervals (95%) resample clauses,
since messages with the same clause are similar; all values of a message stay together, so differences are paired.

Reward hacking shows as a higher reward from the reward model together with a lower true reward; `kl`, `tokens`,
`courtesies` and `truncated` show how the replies changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.data.encode import encode_prompt
from lightning_ft.data.layout import Example
from lightning_ft.data.shared_prompts import lay_out_completions
from lightning_ft.data.tokenizers import load_tokenizer, pad_token_id
from lightning_ft.evaluation.bootstrap import Interval, bootstrap_intervals
from lightning_ft.models.generate import end_token_ids, evaluating
from lightning_ft.models.head import completion_logprobs
from lightning_ft.models.load import load_causal_lm
from lightning_ft.rewards.model import RewardModel
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Completion, Sampling
from lightning_ft.types import Message

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tiny_base")]

from replies import COURTESIES  # noqa: E402
from rewards import read, routed_right, true_reward  # noqa: E402

Row = dict[str, str]
Columns = dict[str, list[float]]
"""Values of each message by name, summed over its completions."""
RewardFunction = Callable[[Sequence[Row], Sequence[str]], list[float]]
"""Function of messages (repeated per reply) and replies that returns the reward model's rewards."""
SHOWN = {
    "true_reward": "true reward",
    "gain": "gain",
    "reward_model": "reward model",
    "kl": "KL",
    "kl_per_token": "KL per token",
    "greedy_true_reward": "greedy: true",
    "right_route": "greedy: correct route",
    "tokens": "tokens",
    "courtesies": "courtesies",
    "malformed": "malformed",
    "truncated": "truncated",
}


@dataclass(frozen=True)
class GenerationOptions:
    """Options of generation.

    Args:
        completions: Number of samples per message.
        max_new_tokens: Maximum number of tokens per completion.
        seed: Seed of the samples.
        batch_size: Number of completions per batch.
    """

    completions: int = 4
    max_new_tokens: int = 64
    seed: int = 0
    batch_size: int = 128


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    options: GenerationOptions,
    *,
    greedy: bool,
) -> list[Completion]:
    """Generate `options.completions` completions per message, or a greedy one, in the order of the messages."""
    engine = LocalEngine(
        model,
        end_token_ids=end_token_ids(model, tokenizer),
        pad_token_id=pad_token_id(tokenizer),
        batch_size=options.batch_size,
    )
    torch.manual_seed(options.seed)
    rollouts = engine.generate(
        [encode_prompt(tokenizer, [Message(role="user", content=row["input"])]) for row in rows],
        max_new_tokens=options.max_new_tokens,
        sampling=None if greedy else Sampling(temperature=1.0),
        num_completions=1 if greedy else options.completions,
    )
    return list(rollouts.completions)


def logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    completions: Sequence[Completion],
    batch_size: int,
) -> Tensor:
    """Compute the log-probability of each completion given its message, in nats, summed over its tokens, ``[c]``."""
    sums = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        prompts = [
            torch.tensor(encode_prompt(tokenizer, [Message(role="user", content=row["input"])])) for row in rows[part]
        ]
        examples = [
            [Example(torch.tensor(c.tokens), torch.ones(len(c.tokens), dtype=torch.bool))] for c in completions[part]
        ]
        batch = lay_out_completions(prompts, examples, shared=False, packing=False)
        with evaluating(model):
            found = completion_logprobs(model, batch).logprobs  # [n]
        sums.append(found.new_zeros(batch.num_groups).index_add(0, batch.groups, found))
    return torch.cat(sums)


def measure(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    options: GenerationOptions,
    reward_model: RewardFunction | None = None,
) -> tuple[Columns, list[list[str]]]:
    """Generate replies with a model, and grade them.

    Args:
        model: The policy.
        reference: Model that the KL divergence is measured from.
        tokenizer: Tokenizer of both models.
        rows: Messages with `input` and the correct `output`.
        options: Options of generation.
        reward_model: Function that computes the reward model's rewards, or None.

    Returns:
        Sums over the completions of each message, and the sampled replies of each message.
    """
    repeated = [row for row in rows for _ in range(options.completions)]
    sampled = answers(model, tokenizer, rows, options, greedy=False)
    greedy = answers(model, tokenizer, rows, options, greedy=True)
    texts = tokenizer.batch_decode([list(c.tokens) for c in sampled], skip_special_tokens=True)
    greedy_texts = tokenizer.batch_decode([list(c.tokens) for c in greedy], skip_special_tokens=True)
    policy_logprobs = logprobs(model, tokenizer, repeated, sampled, options.batch_size)
    ref_logprobs = logprobs(reference, tokenizer, repeated, sampled, options.batch_size)
    log_ratios = policy_logprobs - ref_logprobs  # [c]
    replies = list(zip(repeated, sampled, texts, strict=True))
    each: Columns = {
        "true_reward": [true_reward(t, row["output"], truncated=c.truncated) for row, c, t in replies],
        "kl": log_ratios.tolist(),
        "tokens": [float(len(c.tokens)) for c in sampled],
        "courtesies": [float(sum(text.count(phrase) for phrase in COURTESIES)) for text in texts],
        "malformed": [float(c.truncated or read(text) is None) for _, c, text in replies],
        "truncated": [float(c.truncated) for c in sampled],
        "completions": [1.0] * len(sampled),
    }
    if reward_model is not None:
        each["reward_model"] = reward_model(repeated, texts)
    columns = {name: [sum(numbers) for numbers in _groups(each[name], options.completions)] for name in each}
    columns["greedy_true_reward"] = [
        true_reward(text, row["output"], truncated=c.truncated)
        for row, c, text in zip(rows, greedy, greedy_texts, strict=True)
    ]
    columns["right_route"] = [
        float(routed_right(text, row["output"])) for row, text in zip(rows, greedy_texts, strict=True)
    ]
    columns["spread"] = [
        float(torch.tensor(numbers).std(correction=0)) for numbers in _groups(each["true_reward"], options.completions)
    ]
    columns["messages"] = [1.0] * len(rows)
    return columns, [list(group) for group in _groups(texts, options.completions)]


def compute_metrics(columns: Mapping[str, list[float]], start: Mapping[str, list[float]], clusters: Sequence[str]):  # type: ignore[no-untyped-def]
    """Compute the metrics of a policy and its gains over the start model, with confidence intervals.

    Args:
        columns: Values of the policy, from `measure`.
        start: Values of the start model on the same messages.
        clusters: Cluster of each message.

    Returns:
        Intervals by name. `kl` is in nats per completion; `spread` is the standard deviation of the true rewards of a
        message's completions; `gain` and `right_route_gain` are differences.
    """
    table = {**columns, "start": start["true_reward"], "start_right": start["right_route"]}

    def mean(name: str, of: str = "completions"):  # type: ignore[no-untyped-def]
        return lambda sums: sums[name] / sums[of]

    statistics = {name: mean(name) for name in columns if name not in ("completions", "messages")}
    for name in ("greedy_true_reward", "right_route", "spread"):
        statistics[name] = mean(name, "messages")
    statistics["kl_per_token"] = mean("kl", "tokens")
    statistics["gain"] = lambda sums: (sums["true_reward"] - sums["start"]) / sums["completions"]
    statistics["right_route_gain"] = lambda sums: (sums["right_route"] - sums["start_right"]) / sums["messages"]
    return bootstrap_intervals(table, statistics, clusters=list(clusters))


def print_table(results: Mapping[str, Mapping[str, Interval]]) -> None:
    """Print one column per model and one line per metric."""
    table = Table("", *results)
    for name, title in SHOWN.items():
        found = [result.get(name) for result in results.values()]
        if any(found):
            table.add_row(title, *("" if i is None else f"{i.value:.3f} ({i.lo:.3f} to {i.hi:.3f})" for i in found))
    Console(width=max(100, 24 * (1 + len(results)))).print(table)


def _groups(values: Sequence, size: int) -> list[Sequence]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _load_reward_model(folder: str | None) -> RewardFunction | None:
    if folder is None:
        return None
    model = RewardModel.from_pretrained(folder, dtype="float32", batch_size=128)

    def compute_rewards(rows: Sequence[Row], replies: Sequence[str]) -> list[float]:
        turns = [
            [Message(role="user", content=row["input"]), Message(role="assistant", content=reply)]
            for row, reply in zip(rows, replies, strict=True)
        ]
        return [float(value) for value in model.score_conversations(turns)]

    return compute_rewards


def _named(argument: str) -> tuple[str, str]:
    name, _, folder = argument.rpartition("=")
    return name or Path(folder).name, folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", type=_named, metavar="NAME=FOLDER", help="models to measure; the first is the start model"
    )
    parser.add_argument("--reward-model", metavar="FOLDER", help="export of a reward model")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="split of the messages")
    parser.add_argument("--rows", type=int, help="number of messages, from the start of the split")
    parser.add_argument("--completions", type=int, default=GenerationOptions.completions, help="samples per message")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=GenerationOptions.max_new_tokens,
        help="maximum number of tokens per completion",
    )
    parser.add_argument("--seed", type=int, default=GenerationOptions.seed, help="seed of the samples")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file for all metrics and some replies")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with (HERE / "data" / f"{arguments.split}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: arguments.rows]
    options = GenerationOptions(arguments.completions, arguments.max_new_tokens, arguments.seed)
    reward_model = _load_reward_model(arguments.reward_model)
    tokenizer = load_tokenizer(arguments.models[0][1])
    reference = load_causal_lm(arguments.models[0][1], dtype="float32")
    clusters = [row["cluster"] for row in rows]
    start: Columns | None = None
    results, samples = {}, {}
    for name, folder in arguments.models:
        model = load_causal_lm(folder, dtype="float32")
        columns, replies = measure(model, reference, tokenizer, rows, options, reward_model)
        start = columns if start is None else start
        results[name] = compute_metrics(columns, start, clusters)
        samples[name] = [
            {"message": row["input"], "right": row["output"], "replies": texts}
            for row, texts in list(zip(rows, replies, strict=True))[:8]
        ]
    print_table(results)
    if arguments.output is not None:
        found = {name: {key: asdict(interval) for key, interval in result.items()} for name, result in results.items()}
        settings = {
            **asdict(options),
            "split": arguments.split,
            "messages": len(rows),
            "models": dict(arguments.models),
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"asked": settings, "figures": found, "samples": samples}, indent=2)
        arguments.output.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
