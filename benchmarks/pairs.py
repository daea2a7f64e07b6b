"""Training steps on preference pairs (DPO and reward modeling), by this project's modules and by TRL's trainers.

    OMP_NUM_THREADS=2 python benchmarks/pairs.py --pairs 5
    OMP_NUM_THREADS=1 python benchmarks/pairs.py --small --pairs 1 --threads 1

Both sides train with their real trainers: the same random Llama in fp32, the same adapter, the same tokens in the same
order, AdamW with the same learning rate, and weights that are reset before each repetition. The two answers of a pair
follow the same prompt: here it is computed once for both, in TRL once for each. TRL's gradient checkpointing, which is
on by default and costs a second forward pass, is switched off (its padding-free layout is off in 1.16); neither side
precomputes the reference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import Repeat, arguments, compare_each
from models import Size, lengths, model, tokenizer
from torch.utils.data import SequentialSampler
from training import InitialWeights, fit
from transformers import LlamaForSequenceClassification, PreTrainedModel, PrinterCallback

from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.data.layout import Example
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.modules.dpo import DPO
from lightning_ft.modules.preferences import PreferenceLearning
from lightning_ft.modules.reward import RewardModeling

SIZE = Size()
FIRST_TOKEN = 16
"""Smallest id of a random token. Lower ids may be special; rewards are read at the last token before padding."""
LEARNING_RATES = {True: 3e-3, False: 1e-3}
"""Learning rates with and without an adapter, high enough for a step to show in the losses of the next."""
METRICS = {"dpo": ("logps/chosen", "logps/rejected"), "reward": ("margin", "accuracy")}
"""Metrics that both sides log per step, under the same names."""
AGREE = {"dpo": {"losses": 1e-4, "metrics": 1e-5}, "reward": {"losses": 1e-4, "metrics": 3e-4}}


@dataclass(frozen=True)
class Case:
    """Model, pairs and loss of a measurement.

    Args:
        task: ``dpo`` or ``reward``.
        lora: Whether the default adapter is trained, rather than all weights.
        size: Shape of the model.
        prompt: Number of tokens per prompt.
        answer: Mean number of tokens per answer.
        spread: Standard deviation of the logarithm of the answers' lengths.
        batch: Number of pairs per step.
        steps: Number of optimizer steps per repetition.
        seed: Seed of the random tokens.
    """

    task: str
    lora: bool
    size: Size = SIZE
    prompt: int = 512
    answer: int = 64
    spread: float = 0.0
    batch: int = 4
    steps: int = 2
    seed: int = 0

    def __str__(self) -> str:
        weights = "LoRA" if self.lora else "full"
        answers = f"{self.answer}" if not self.spread else f"{self.answer} on average"
        return (
            f"{self.task} {weights}, {self.size}, prompt {self.prompt}, answers {answers}, "
            f"{self.batch} pairs per step, {self.steps} steps"
        )


# ---------------------------------------------------------------- data and initial weights of both sides


def rows(case: Case) -> list[dict[str, list[int]]]:
    """Pairs of random tokens, with TRL's column names."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(count: int) -> list[int]:
        return torch.randint(FIRST_TOKEN, case.size.vocabulary, (count,), generator=generator).tolist()

    count = case.batch * case.steps
    answers = iter(lengths(2 * count, case.answer, case.spread, generator))
    return [
        {"prompt_ids": draw(case.prompt), "chosen_ids": draw(next(answers)), "rejected_ids": draw(next(answers))}
        for _ in range(count)
    ]


def base(case: Case) -> PreTrainedModel:
    """Build the model with its initial weights."""
    made = model(case.size)
    if case.task == "dpo":
        return made
    made.config.num_labels = 1
    torch.manual_seed(0)
    return LlamaForSequenceClassification(made.config)


# ---------------------------------------------------------------- ours


class Logged:
    """Mixin for a module: collects the metrics of each training step, unrounded, in `steps`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps: list[dict[str, float]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start to collect the metrics of a step."""
        super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]
        self.steps.append({})

    def log(self, name: str, value: Any, **options: Any) -> None:
        """Collect a metric."""
        self.steps[-1][name.removeprefix("train/")] = float(value)

    def log_dict(self, metrics: dict[str, Any], **options: Any) -> None:
        """Collect several metrics."""
        for name, value in metrics.items():
            self.log(name, value)


class LoggedDPO(Logged, DPO):
    """DPO that collects its metrics."""


class LoggedReward(Logged, RewardModeling):
    """Reward modeling that collects its metrics."""


def optimization(lora: bool) -> dict[str, Any]:
    """Arguments of this project's modules that match :func:`trl_settings`."""
    return {
        "lora": lora or None,
        "dtype": "float32",
        "tokenizer": tokenizer(),
        "learning_rate": LEARNING_RATES[lora],
        "lr_schedule": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "betas": (0.9, 0.999),
    }


def ours(case: Case) -> Repeat:
    def example(ids: list[int]) -> Example:
        return Example(torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool))

    pairs = rows(case)
    batches = []
    for start in range(0, len(pairs), case.batch):
        part = pairs[start : start + case.batch]
        batches.append(
            PreferenceBatch(
                [torch.tensor(row["prompt_ids"]) for row in part],
                [(example(row["chosen_ids"]), example(row["rejected_ids"])) for row in part],
                torch.tensor([True, False] * len(part)),
                None,
                torch.arange(start, start + len(part)),
            )
        )
    module: PreferenceLearning = {"dpo": LoggedDPO, "reward": LoggedReward}[case.task](
        base(case), **optimization(case.lora)
    )
    module.configure_model()
    initial = InitialWeights(module.model)

    def repeat() -> dict[str, Any]:
        initial.restore()
        module.steps.clear()
        fit(module, batches)
        return metrics(case, [step["loss"] for step in module.steps], module.steps)

    return repeat


def metrics(case: Case, losses: list[float], steps: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Values that both sides must agree on: the loss of each step, and the other metrics that are logged.

    Log-probabilities of answers are divided by the answers' length, in nats per token. They are compared too, since the
    loss of DPO's first step is ``log 2`` whatever they are.
    """
    scale = case.answer if case.task == "dpo" else 1
    logged = [[step[name] / scale for name in METRICS[case.task]] for step in steps]
    return {"losses": losses, "metrics": logged}


# ---------------------------------------------------------------- TRL


def trl_settings(lora: bool, **more: Any) -> dict[str, Any]:
    """Arguments of TRL's configurations: the fastest ones on a CPU, with the optimizer that ours has."""
    return {
        "output_dir": tempfile.gettempdir(),  # nothing is written
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": LEARNING_RATES[lora],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **more,
    }


class Recorded:
    """Mixin for a TRL trainer: collects the loss and metrics of each step, unrounded, in `steps`."""

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """Collect the loss and the metrics that are logged with it."""
        loss = super().training_step(*args, **options)  # type: ignore[misc]
        logged = {name: values[-1] for name, values in self._metrics["train"].items() if values}
        self.steps.append({**logged, "loss": loss.item()})
        return loss

    def log(self, logs: dict[str, float], *more: Any, **options: Any) -> None:
        """Collect the gradient norm, which is known only after the step."""
        if "grad_norm" in logs:
            self.steps[-1]["grad_norm"] = logs["grad_norm"]
        super().log(logs, *more, **options)  # type: ignore[misc]

    def retrain(self) -> list[dict[str, float]]:
        """Train from the current weights with a new optimizer, and return the metrics of each step."""
        self.remove_callback(PrinterCallback)
        self.optimizer = self.lr_scheduler = None
        self.steps: list[dict[str, float]] = []
        self.train()
        return self.steps


class Pretokenized(Recorded):
    """Mixin for a TRL trainer on pairs: keeps rows that are tokenized already, in their order."""

    def _prepare_dataset(self, dataset: Any, *more: Any, **options: Any) -> Any:
        return dataset

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)


def same_adapter(trained: torch.nn.Module, twin: torch.nn.Module) -> None:
    """Copy an adapter's initial weights from another; TRL initializes its own unless it gets an adapted model.

    With an adapted model, TRL would keep a second adapter as the reference and compute it, which is slower than
    switching the adapter off.
    """
    weights = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    theirs = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    if weights.keys() != theirs.keys():
        raise ValueError(f"The two models train different parameters: {sorted(weights.keys() ^ theirs.keys())[:4]}")
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(weights[name])


def trl(case: Case) -> Repeat:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    pairs = rows(case)
    adapter = {"task_type": "SEQ_CLS"} if case.task == "reward" else {}
    options: dict[str, Any] = {
        "processing_class": tokenizer(),
        "peft_config": lora_config(adapter) if case.lora else None,
    }
    settings = trl_settings(
        case.lora,
        per_device_train_batch_size=case.batch,
        max_steps=case.steps,
        max_grad_norm=0.0,
        max_length=None,
    )
    if case.task == "dpo":
        trainer = type("TrlDPO", (Pretokenized, DPOTrainer), {})(
            model=base(case),
            ref_model=None if case.lora else base(case),
            train_dataset=Dataset.from_list(pairs),
            args=DPOConfig(**settings),
            **options,
        )
    else:
        whole = [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in pairs]
        trainer = type("TrlReward", (Pretokenized, RewardTrainer), {})(
            model=base(case), train_dataset=Dataset.from_list(whole), args=RewardConfig(**settings), **options
        )
    if case.lora:
        same_adapter(trainer.model, add_lora(base(case), lora_config(adapter), seed=0))
    initial = InitialWeights(trainer.model)

    def repeat() -> dict[str, Any]:
        initial.restore()
        steps = trainer.retrain()
        return metrics(case, [step["loss"] for step in steps], steps)

    return repeat


# ---------------------------------------------------------------- cases

CASES = [
    Case("dpo", lora=True),
    Case("dpo", lora=False),
    Case("dpo", lora=True, spread=0.5),
    Case("reward", lora=True),
    Case("reward", lora=False),
]
SMALL = {"size": Size(vocabulary=1000, hidden=64, layers=2), "prompt": 48, "answer": 8, "batch": 3, "steps": 3}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="small sizes, as a quick check that everything runs")
    options = parser.parse_args()
    cases = (replace(case, **SMALL) if options.small else case for case in CASES)
    compare_each("training steps on pairs", cases, ours, {"TRL": trl}, options, agree=lambda case: AGREE[case.task])


if __name__ == "__main__":
    main()
