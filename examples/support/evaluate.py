r"""Measure policies on the test messages: the true reward, what the reward model makes of it, and the KL paid for it.

    python examples/support/evaluate.py sft=runs/support-sft/export/last grpo=runs/support-grpo/export/last \
        --reward-model runs/support-reward/export/last --output runs/support-rlhf.json

The first model is the one that the others started from: KL and differences are to it. Every model answers each message
several times by sampling at temperature 1 and once greedily. Intervals (95%) resample clauses, since messages with the
same clause are alike, and what belongs to a message stays together, so differences are paired.

A reward that was hacked shows as a line whose reward model's score went up while its true reward went down; `kl`,
`tokens`, `courtesies` and `truncated` show how.
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
"""Numbers of each message, by name: sums over its completions."""
Score = Callable[[Sequence[Row], Sequence[str]], list[float]]
"""Messages, each as often as it has replies, and the replies, to the reward model's scores."""
SHOWN = {
    "true_reward": "true reward",
    "gain": "gain",
    "reward_model": "reward model",
    "kl": "KL",
    "kl_per_token": "KL a token",
    "greedy_true_reward": "greedy: true",
    "right_route": "greedy: right route",
    "tokens": "tokens",
    "courtesies": "courtesies",
    "malformed": "malformed",
    "truncated": "truncated",
}


@dataclass(frozen=True)
class Asking:
    """How models are asked.

    Args:
        completions: Samples for each message.
        max_new_tokens: At most so many for each.
        seed: Of the samples.
        batch_size: Completions at a time.
    """

    completions: int = 4
    max_new_tokens: int = 64
    seed: int = 0
    batch_size: int = 128


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], asking: Asking, *, greedy: bool
) -> list[Completion]:
    """Completions of all messages, those of one message side by side: `asking.completions` of each, or a greedy one."""
    engine = LocalEngine(
        model,
        end_token_ids=end_token_ids(model, tokenizer),
        pad_token_id=pad_token_id(tokenizer),
        batch_size=asking.batch_size,
    )
    torch.manual_seed(asking.seed)
    rollouts = engine.generate(
        [encode_prompt(tokenizer, [Message(role="user", content=row["input"])]) for row in rows],
        max_new_tokens=asking.max_new_tokens,
        sampling=None if greedy else Sampling(temperature=1.0),
        num_completions=1 if greedy else asking.completions,
    )
    return list(rollouts.completions)


def logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    completions: Sequence[Completion],
    batch_size: int,
) -> Tensor:
    """Log-probability of each completion (nats, summed over its tokens) of the message that it replies to, ``[c]``."""
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
    asking: Asking,
    score: Score | None = None,
) -> tuple[Columns, list[list[str]]]:
    """Ask a model, and judge what it answers.

    Args:
        model: The policy.
        reference: What its KL is measured to.
        tokenizer: Of both.
        rows: Messages with `input` and the right `output`.
        asking: How they are asked.
        score: The reward model, if there is one.

    Returns:
        Sums over the completions of each message, and the sampled replies of each.
    """
    repeated = [row for row in rows for _ in range(asking.completions)]
    sampled = answers(model, tokenizer, rows, asking, greedy=False)
    greedy = answers(model, tokenizer, rows, asking, greedy=True)
    texts = tokenizer.batch_decode([list(c.tokens) for c in sampled], skip_special_tokens=True)
    certain = tokenizer.batch_decode([list(c.tokens) for c in greedy], skip_special_tokens=True)
    pieces = [repeated, sampled, asking.batch_size]
    ratios = logprobs(model, tokenizer, *pieces) - logprobs(reference, tokenizer, *pieces)  # type: ignore[arg-type]
    judged = list(zip(repeated, sampled, texts, strict=True))
    each: Columns = {
        "true_reward": [true_reward(t, row["output"], truncated=c.truncated) for row, c, t in judged],
        "kl": ratios.tolist(),
        "tokens": [float(len(c.tokens)) for c in sampled],
        "courtesies": [float(sum(text.count(phrase) for phrase in COURTESIES)) for text in texts],
        "malformed": [float(c.truncated or read(text) is None) for _, c, text in judged],
        "truncated": [float(c.truncated) for c in sampled],
        "completions": [1.0] * len(sampled),
    }
    if score is not None:
        each["reward_model"] = score(repeated, texts)
    columns = {name: [sum(numbers) for numbers in _groups(each[name], asking.completions)] for name in each}
    columns["greedy_true_reward"] = [
        true_reward(text, row["output"], truncated=c.truncated)
        for row, c, text in zip(rows, greedy, certain, strict=True)
    ]
    columns["right_route"] = [float(routed_right(text, row["output"])) for row, text in zip(rows, certain, strict=True)]
    columns["spread"] = [
        float(torch.tensor(numbers).std(correction=0)) for numbers in _groups(each["true_reward"], asking.completions)
    ]
    columns["messages"] = [1.0] * len(rows)
    return columns, [list(group) for group in _groups(texts, asking.completions)]


def figures(columns: Mapping[str, list[float]], start: Mapping[str, list[float]], clusters: Sequence[str]):  # type: ignore[no-untyped-def]
    """Figures with intervals, of a policy and of its difference to the model that it started from.

    Args:
        columns: From `measure`, of the policy.
        start: The same of the model it started from, on the same messages.
        clusters: What each message belongs to.

    Returns:
        Intervals by name. `kl` is nats a completion; `spread` is the standard deviation of the true rewards of a
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
    """One column a model, one line a figure."""
    table = Table("", *results)
    for name, title in SHOWN.items():
        found = [result.get(name) for result in results.values()]
        if any(found):
            table.add_row(title, *("" if i is None else f"{i.value:.3f} ({i.lo:.3f} to {i.hi:.3f})" for i in found))
    Console(width=max(100, 24 * (1 + len(results)))).print(table)


def _groups(values: Sequence, size: int) -> list[Sequence]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _scorer(folder: str | None) -> Score | None:
    if folder is None:
        return None
    model = RewardModel.from_pretrained(folder, dtype="float32", batch_size=128)

    def score(rows: Sequence[Row], replies: Sequence[str]) -> list[float]:
        turns = [
            [Message(role="user", content=row["input"]), Message(role="assistant", content=reply)]
            for row, reply in zip(rows, replies, strict=True)
        ]
        return [float(value) for value in model.score_conversations(turns)]

    return score


def _named(argument: str) -> tuple[str, str]:
    name, _, folder = argument.rpartition("=")
    return name or Path(folder).name, folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=_named, metavar="NAME=FOLDER", help="the first is the start")
    parser.add_argument("--reward-model", metavar="FOLDER")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--rows", type=int, help="only so many messages of the split")
    parser.add_argument("--completions", type=int, default=Asking.completions)
    parser.add_argument("--max-new-tokens", type=int, default=Asking.max_new_tokens)
    parser.add_argument("--seed", type=int, default=Asking.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON with every figure and some replies")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with (HERE / "data" / f"{arguments.split}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: arguments.rows]
    asking = Asking(arguments.completions, arguments.max_new_tokens, arguments.seed)
    score = _scorer(arguments.reward_model)
    tokenizer = load_tokenizer(arguments.models[0][1])
    reference = load_causal_lm(arguments.models[0][1], dtype="float32")
    clusters = [row["cluster"] for row in rows]
    start: Columns | None = None
    results, samples = {}, {}
    for name, folder in arguments.models:
        model = load_causal_lm(folder, dtype="float32")
        columns, replies = measure(model, reference, tokenizer, rows, asking, score)
        start = columns if start is None else start
        results[name] = figures(columns, start, clusters)
        samples[name] = [
            {"message": row["input"], "right": row["output"], "replies": texts}
            for row, texts in list(zip(rows, replies, strict=True))[:8]
        ]
    print_table(results)
    if arguments.output is not None:
        found = {name: {key: asdict(interval) for key, interval in result.items()} for name, result in results.items()}
        asked = {**asdict(asking), "split": arguments.split, "messages": len(rows), "models": dict(arguments.models)}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"asked": asked, "figures": found, "samples": samples}, indent=2)
        arguments.output.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
