"""Arguments that every module takes: typed once and checked.

A public module names its own arguments and passes the others on as ``**options: Unpack[FineTuningOptions]`` (PEP 692),
so a type checker knows all of them. `lightning_ft.signatures.complete` adds them to the signature and the docstring of
the class, which `help` and `inspect.signature` show; ``--help`` of the command line follows ``**options`` to the
constructors themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from peft import LoraConfig
from transformers import PreTrainedTokenizerBase
from typing_extensions import Required

from lightning_ft.errors import ConfigError
from lightning_ft.losses.sampling_correction import CorrectionMode
from lightning_ft.models.load import quantization_options, resolve_dtype
from lightning_ft.models.model_card import BaseOptions
from lightning_ft.models.optim import ADAMW, OptimizerLike, Schedule
from lightning_ft.modules.anchor import AnchorOptions
from lightning_ft.rewards.function import OnNonFinite
from lightning_ft.rollout.protocol import RolloutEngine

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:

    class Unpack:
        """For type checkers only: jsonargparse would stop at the TypedDict, which has neither defaults nor texts."""

        def __class_getitem__(cls, options: type) -> Any:
            return Any


class CommonOptions(TypedDict, total=False):
    """Arguments of `lightning_ft.modules.base.FineTuning`, which documents them and has their defaults."""

    tokenizer: str | PreTrainedTokenizerBase | None
    weight_decay: float
    betas: tuple[float, float]
    lr_schedule: Schedule
    warmup_ratio: float
    optimizer: OptimizerLike
    attn_implementation: str | None
    gradient_checkpointing: bool
    torch_compile: bool | dict[str, Any]
    generation: dict[str, Any] | None
    on_nonfinite: OnNonFinite
    revision: str | None
    trust_remote_code: bool
    seed: int


class FineTuningOptions(CommonOptions, total=False):
    """The same, with those whose default depends on the kind of training."""

    learning_rate: float | None
    dtype: str | None


class SupervisedOptions(FineTuningOptions, total=False):
    """Arguments of `lightning_ft.modules.sft.SupervisedFineTuning`."""

    anchor: AnchorOptions | dict[str, Any] | None


class AdaptedOptions(FineTuningOptions, total=False):
    """Arguments of `lightning_ft.modules.adapted.AdaptedFineTuning`."""

    lora: dict[str, Any] | LoraConfig | bool | None
    quantization: str | dict[str, Any] | None
    disable_dropout: bool
    share_prompts: bool


class DistillationOptions(AdaptedOptions, total=False):
    """Arguments that `lightning_ft.modules.distillation.PromptDistillation` passes on."""

    anchor: AnchorOptions | dict[str, Any] | None


class SampledOptions(AdaptedOptions, total=False):
    """Arguments of `lightning_ft.modules.sampled.SampledCompletions`, without `num_completions`."""

    rewards: Required[Any]
    reward_weights: list[float] | None
    validation_rewards: Any
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop: str | list[str] | None
    rollout_batch_size: int
    vllm: bool | dict[str, Any]
    continuous_batching: bool | dict[str, Any]
    merge_adapter: bool
    engine: RolloutEngine | None


class SamplingOptions(SampledOptions, total=False):
    """The same, with the number of completions, for which PPO has a default of its own."""

    num_completions: int


class CriticOptions(SampledOptions, total=False):
    """Arguments of `lightning_ft.modules.policy.PolicyOptimization` that `PPO` has no default of its own for."""

    steps_per_rollout: int
    micro_batch_size: int | None
    max_grad_norm: float | None
    mask_truncated: bool
    sampling_correction: CorrectionMode | Literal["auto"] | None
    sampling_ratio_max: float | None
    sampling_ratio_min: float | None


class PolicyOptions(CriticOptions, total=False):
    """Arguments of `lightning_ft.modules.policy.PolicyOptimization`, without `kl_coef`."""

    num_completions: int
    epochs_per_rollout: int


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded.

    Args:
        dtype: Dtype of the weights, or ``"auto"`` for the checkpoint's; None for the default of the module.
        attn_implementation: Name of the attention implementation in transformers; None for its default.
        quantization: Quantization of a frozen base: ``"4bit"``, ``"8bit"`` or arguments of `BitsAndBytesConfig`.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        torch_compile: Whether the backbone is compiled, or arguments of `torch.compile`.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code of the model's repository may run.
        seed: Seed of weights that are initialized at random.

    Raises:
        ConfigError: For a dtype or quantization that doesn't exist.
    """

    dtype: str | None = None
    attn_implementation: str | None = None
    quantization: str | dict[str, Any] | None = None
    gradient_checkpointing: bool = False
    torch_compile: bool | dict[str, Any] = False
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype is not None:
            resolve_dtype(self.dtype)
        if self.quantization is not None:
            quantization_options(self.quantization)

    def card_options(self) -> BaseOptions:
        """Arguments with which the code of a model card loads the base."""
        options: BaseOptions = {}
        if self.revision:
            options["revision"] = self.revision
        if self.trust_remote_code:
            options["trust_remote_code"] = True
        if self.dtype not in (None, "auto"):
            options["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.quantization is not None:
            options["quantization"] = quantization_options(self.quantization)
        return options


@dataclass(frozen=True)
class OptimizerOptions:
    """The default optimizer and its schedule.

    Args:
        learning_rate: Learning rate at the peak of the schedule.
        weight_decay: Weight decay of matrices.
        betas: Decay rates of AdamW's running averages.
        lr_schedule: Shape of the schedule after the warm-up.
        warmup_ratio: Share of all optimizer steps that warm up.
        on_nonfinite: What happens to a step whose loss or gradients are not finite.
        optimizer: Name or class of the optimizer.

    Raises:
        ConfigError: For a number out of its range.
    """

    learning_rate: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    lr_schedule: Schedule = "cosine"
    warmup_ratio: float = 0.03
    on_nonfinite: OnNonFinite = "error"
    optimizer: OptimizerLike = ADAMW

    def __post_init__(self) -> None:
        if self.on_nonfinite not in ("error", "skip"):
            raise ConfigError(f"on_nonfinite={self.on_nonfinite!r}: expected 'error' or 'skip'.")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate}: expected a finite number above 0.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas}: expected two numbers of at least 0 and below 1.")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay={self.weight_decay}: expected 0 or more.")
