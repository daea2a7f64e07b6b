"""GRPO's update, by this project's module and by TRL's trainer, on the same precomputed completions.

    OMP_NUM_THREADS=2 python benchmarks/grpo.py --pairs 5
    OMP_NUM_THREADS=1 python benchmarks/grpo.py --small --pairs 1 --threads 1

Nothing is generated: both sides get the same completions where they would sample, and do the rest of the training step
with their real trainers: rewards and advantages, log-probabilities under the reference (if the KL divergence is part of
the loss) and under the policy, loss, backward pass, clipping, and optimizer step.
The completions of a group follow the same prompt: here the prompt is computed once, in TRL once per completion.
Completions of equal length are the case that favors TRL, which pads. Weights are reset before each repetition.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import Repeat, arguments, compare_each
from models import Size, model, tokenizer
from pairs import FIRST_TOKEN, Logged, Recorded, optimization, same_adapter, trl_settings
from training import InitialWeights, fit, reward

from lightning_ft.data.batches import PromptBatch
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.modules.grpo import GRPO
from lightning_ft.modules.rollout_batch import PolicyBatch
from lightning_ft.rollout.protocol import Completion, Rollouts

SIZE = Size()
AGREE = {"logprobs": 1e-5, "losses": 1e-4, "log_gradient_norm": 1e-4, "rewards": 1e-6}


@dataclass(frozen=True)
class Case:
    """Model, rollouts and loss of a measurement.

    Args:
        lora: Whether the default adapter is trained, rather than all weights.
        kl: Weight of the KL divergence from the reference in the loss; TRL's beta.
        size: Shape of the model.
        prompt: Number of tokens per prompt.
        completion: Number of tokens per completion.
        group: Number of completions per prompt.
        prompts: Number of prompts per step.
        steps: Number of rollouts per repetition, each followed by one optimizer step.
        seed: Seed of the random tokens.
    """

    lora: bool
    kl: float
    size: Size = SIZE
    prompt: int = 512
    completion: int = 64
    group: int = 8
    prompts: int = 1
    steps: int = 2
    seed: int = 0

    def __str__(self) -> str:
        weights, kl = "LoRA" if self.lora else "full", f"KL {self.kl:g}" if self.kl else "no KL"
        return (
            f"{weights}, {kl}, {self.size}, prompt {self.prompt}, completions {self.completion}, group {self.group}, "
            f"{self.prompts} prompts per step, {self.steps} steps"
        )


@dataclass(frozen=True)
class RecordedRollout:
    """The tokens of one rollout.

    Args:
        prompts: Ids of each prompt.
        completions: Ids of each completion, grouped by prompt.
    """

    prompts: list[list[int]]
    completions: list[list[int]]


def rollouts(case: Case) -> list[RecordedRollout]:
    """Random prompts and completions for each step."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(rows: int, length: int) -> list[list[int]]:
        return torch.randint(FIRST_TOKEN, case.size.vocabulary, (rows, length), generator=generator).tolist()

    return [
        RecordedRollout(draw(case.prompts, case.prompt), draw(case.prompts * case.group, case.completion))
        for _ in range(case.steps)
    ]


def metrics(steps: Sequence[dict[str, float]], logprobs: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Values that both sides must agree on.

    Gradient norms are compared by their logarithms, so that the difference is relative. The losses of the first step
    are 0 except for rounding, since the advantages of completions of equal length sum to 0; the gradients aren't 0, and
    the log-probabilities of the following steps show what was learned.
    """
    return {
        "logprobs": torch.stack(list(logprobs)),  # [steps, completions, tokens]
        "losses": [step["loss"] for step in steps],
        "log_gradient_norm": [math.log(step["grad_norm"]) for step in steps],
        "rewards": [step["reward"] for step in steps],
    }


# ---------------------------------------------------------------- ours


class ReplayEngine:
    """Rollout engine whose n-th call returns the n-th recorded rollout."""

    def __init__(self, recorded: Sequence[RecordedRollout]) -> None:
        self._rollouts = [
            Rollouts(tuple(Completion(tuple(ids), truncated=True) for ids in each.completions), 0, 0)
            for each in recorded
        ]
        self.calls = 0

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> Rollouts:
        """Return the next rollout, whatever the prompts are."""
        self.calls += 1
        return self._rollouts[self.calls - 1]


class RecordingGRPO(Logged, GRPO):
    """GRPO that records the log-probabilities of each step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.logprobs: list[torch.Tensor] = []

    def compute_loss(self, batch: PolicyBatch) -> Any:
        """Compute the loss as GRPO does, and record the log-probabilities."""
        self.logprobs.append(batch.logprobs.detach().view(len(batch.weights), -1))
        return super().compute_loss(batch)


def ours(case: Case) -> Repeat:
    recorded = rollouts(case)
    batches = [
        PromptBatch([""] * case.prompts, [torch.tensor(ids) for ids in each.prompts], columns={}) for each in recorded
    ]
    module = RecordingGRPO(
        model(case.size),
        rewards=reward,
        num_completions=case.group,
        max_new_tokens=case.completion,
        kl_coef=case.kl,
        **optimization(case.lora),
    )
    module.configure_model()
    initial = InitialWeights(module.model)

    def repeat() -> dict[str, Any]:
        initial.restore()
        module.steps.clear()
        module.logprobs.clear()
        module._engine = ReplayEngine(recorded)
        fit(module, batches)
        return metrics(module.steps, module.logprobs)

    return repeat


# ---------------------------------------------------------------- TRL


class ReplayedRollouts(Recorded):
    """Mixin for a TRL trainer: takes recorded completions instead of sampling."""

    recorded: Sequence[RecordedRollout]
    calls = 0

    def _tokenize_prompts(self, prompts: Sequence[Any]) -> Any:
        each = self.recorded[self.calls]
        group = len(each.completions) // len(each.prompts)
        return [ids for ids in each.prompts for _ in range(group)], None, {}

    def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.recorded[self.calls - 1].completions, None

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **options: Any
    ) -> Any:
        selected = super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
            model, input_ids, attention_mask, logits_to_keep, **options
        )
        if selected[0].requires_grad:  # under the policy: TRL has shuffled the completions
            rows = [tuple(ids) for ids in input_ids[:, -logits_to_keep:].tolist()]
            order = [rows.index(tuple(ids)) for ids in self.recorded[self.calls - 1].completions]
            self.logprobs.append(selected[0].detach()[order])
        return selected

    def retrain(self) -> list[dict[str, float]]:
        """Train as in `Recorded`, starting with the first rollout."""
        self.calls, self.logprobs = 0, []
        self._step, self._buffered_inputs = 0, None
        return super().retrain()


def grpo_trainer(case: Any, *mixed_in: type, **more: Any) -> Any:
    """Build TRL's GRPOTrainer.

    Args:
        case: Object with `lora`, `size`, `prompts`, `group` and `completion`.
        mixed_in: Mixins, which precede GRPOTrainer among the base classes.
        more: Further arguments of GRPOConfig.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        policy = model(case.size)
        policy.save_pretrained(folder)
        policy.config._name_or_path = folder  # TRL loads the reference model from here, if it needs one
        return type("TrlGRPO", (*mixed_in, GRPOTrainer), {})(
            model=policy,
            processing_class=tokenizer(),
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": [""] * case.prompts}),
            peft_config=lora_config(True) if case.lora else None,
            args=GRPOConfig(
                **trl_settings(
                    case.lora,
                    per_device_train_batch_size=case.prompts * case.group,
                    num_generations=case.group,
                    max_completion_length=case.completion,
                    shuffle_dataset=False,
                    **more,
                )
            ),
        )


def trl(case: Case) -> Repeat:
    trainer = grpo_trainer(case, ReplayedRollouts, beta=case.kl, max_steps=case.steps, logging_steps=1)
    trainer.recorded = rollouts(case)
    if case.lora:
        same_adapter(trainer.model, add_lora(model(case.size), lora_config(True), seed=0))
    initial = InitialWeights(trainer.model)

    def repeat() -> dict[str, Any]:
        initial.restore()
        steps = trainer.retrain()
        return metrics(steps, trainer.logprobs)

    return repeat


# ---------------------------------------------------------------- cases

CASES = [*(Case(lora, kl) for lora in (True, False) for kl in (0.0, 0.05)), Case(lora=True, kl=0.05, prompts=2)]
SMALL = {"size": Size(vocabulary=1000, hidden=64, layers=2), "prompt": 48, "completion": 8, "group": 4, "steps": 3}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="small sizes, as a quick check that everything runs")
    options = parser.parse_args()
    cases = (replace(case, **SMALL) if options.small else case for case in CASES)
    compare_each("GRPO update", cases, ours, {"TRL": trl}, options, agree=lambda case: AGREE)


if __name__ == "__main__":
    main()
