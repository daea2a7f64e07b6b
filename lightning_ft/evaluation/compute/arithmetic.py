"""What training cost: operations, time, memory and parameters, estimated from sampled micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from lightning_ft.atomic_files import write_json
from lightning_ft.errors import ConfigError

MemoryKind = Literal["cuda", "resident", "process"]


@dataclass(frozen=True)
class StepSums:
    """Sums over micro-batches.

    Args:
        micro_batches: How many.
        places: Token places of their batches, padding included.
        supervised: Tokens that are targets of the loss.
        unknown: How many of the micro-batches hold something whose token places aren't known.
        steps: Optimizer steps taken in them.
        seconds: Time they took.
        flops: Operations counted in them; 0 where they weren't counted.

    Example:
        >>> a = StepSums(micro_batches=1, places=64, seconds=0.5)
        >>> (a + a).places, (a + a - a) == a
        (128, True)
    """

    micro_batches: int = 0
    places: int = 0
    supervised: int = 0
    unknown: int = 0
    steps: int = 0
    seconds: float = 0.0
    flops: float = 0.0

    def __add__(self, other: StepSums) -> StepSums:
        return StepSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: StepSums) -> StepSums:
        return StepSums(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


def share_of(part: StepSums, whole: StepSums) -> float:
    """How much of the work of `whole` is in `part`: by token places, or by micro-batches where places aren't known.

    Example:
        >>> share_of(StepSums(micro_batches=1, places=30), StepSums(micro_batches=2, places=40))
        0.75
        >>> share_of(StepSums(micro_batches=1, unknown=1), StepSums(micro_batches=2, unknown=2))
        0.5
    """
    if whole.unknown or not (whole.places and part.places):
        return part.micro_batches / whole.micro_batches
    return part.places / whole.places


def estimated_flops(counted: StepSums, total: StepSums) -> float:
    """Operations of all micro-batches from those of the counted ones: the ratio estimator ``F_c T / T_c``.

    It is exact where operations are proportional to token places, as in batches of one shape. The part of attention
    grows with the length of rows; batches of mixed lengths make it an estimate (W. G. Cochran, Sampling Techniques,
    3rd ed., chapter 6).

    Args:
        counted: The micro-batches whose operations were counted; at least one.
        total: All micro-batches, those included.

    Raises:
        ConfigError: If none was counted.

    Example:
        >>> counted = StepSums(micro_batches=1, places=50, flops=300.0)
        >>> estimated_flops(counted, StepSums(micro_batches=4, places=200))
        1200.0
    """
    if not counted.micro_batches:
        raise ConfigError("No micro-batch was counted, so there is nothing to estimate operations from.")
    return counted.flops / share_of(counted, total)


def estimated_seconds(slowed: StepSums, total: StepSums) -> float:
    """Time of all micro-batches as if none had been slowed by counting: the others' time, scaled up by places.

    Where all of them were counted (runs of a few micro-batches), it is the time that they took.

    Args:
        slowed: The micro-batches that were counted.
        total: All micro-batches, those included.

    Example:
        >>> slowed = StepSums(micro_batches=1, places=50, seconds=9.0)
        >>> estimated_seconds(slowed, StepSums(micro_batches=4, places=200, seconds=15.0))
        8.0
        >>> estimated_seconds(slowed, slowed)
        9.0
    """
    others = total - slowed
    if not others.micro_batches or not others.seconds:
        return total.seconds
    return others.seconds / share_of(others, total)


@dataclass(frozen=True)
class ComputeResult:
    """What a training run cost.

    An operation is a multiplication or an addition of a matrix product, of attention or of a convolution, run in a
    training step: forward, backward, what gradient checkpointing computes again, and in RLHF the rollouts and the
    reference. Element-wise work (norms, activations, AdamW) isn't counted, as is usual. Attention counts all pairs of a
    row, whether its kernel skips masked ones or not.

    Args:
        flops: Operations of training, estimated from the counted micro-batches.
        flops_source: ``"counted"``, or ``"formula"`` where operators can't be counted (compiled code).
        sampled_steps: Micro-batches that the figure comes from; 0 with a formula.
        steps: Optimizer steps.
        tokens: Token places of the training batches, padding included; a shared prompt counts once. 0 where the batches
            are of a kind whose places aren't known.
        supervised_tokens: Those that are targets of the loss; in RLHF the tokens of completions.
        train_seconds: Inside training steps, as if none had been slowed by counting. Evaluation, checkpoints and
            loading of data aren't in it.
        peak_memory_bytes: The most memory in use from the first training step to the last, validation between them
            included.
        memory_kind: ``"cuda"``, memory that PyTorch allocated on the GPU; ``"resident"``, memory of the process on the
            CPU since training started; ``"process"``, the same since the process started, where the system can't tell
            since when.
        memory_at_start_bytes: In use as the first step began: mostly the loaded model.
        trainable_parameters: Numbers that are trained.
        parameters: All of them.
        available_flops: Peak of one device for `dtype`, operations a second; None where it isn't known.
        device: Its name.
        dtype: That matrices are multiplied in.
        uncounted: Operators of attention and matrix products that were seen and that no formula counts; where there are
            any, `flops` is too low and must not be compared.
        ranks: Processes; operations and tokens are summed over them, time and memory are those of the largest.

    Raises:
        ConfigError: For figures that can't be.

    Example:
        >>> result = ComputeResult(
        ...     flops=6e9, flops_source="counted", sampled_steps=3, steps=10, tokens=2000, supervised_tokens=500,
        ...     train_seconds=4.0, peak_memory_bytes=3 * 2**20, memory_kind="resident", memory_at_start_bytes=2**20,
        ...     trainable_parameters=100, parameters=1000, available_flops=3e9, device="cpu", dtype="float32",
        ... )
        >>> result.flops_per_token, result.tokens_per_second, result.mfu
        (3000000.0, 500.0, 0.5)
        >>> ComputeResult.from_dict(result.to_dict()) == result
        True
    """

    flops: float
    flops_source: Literal["counted", "formula"]
    sampled_steps: int
    steps: int
    tokens: int
    supervised_tokens: int
    train_seconds: float
    peak_memory_bytes: int
    memory_kind: MemoryKind
    memory_at_start_bytes: int
    trainable_parameters: int
    parameters: int
    available_flops: float | None
    device: str
    dtype: str
    uncounted: tuple[str, ...] = ()
    ranks: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"ComputeResult: {name}={value}: expected a finite number that isn't negative.")

    @property
    def flops_per_token(self) -> float | None:
        """Operations for each token place; None where there are none."""
        return self.flops / self.tokens if self.tokens else None

    @property
    def tokens_per_second(self) -> float | None:
        """Token places in a second of training, all ranks together; None where they or the time aren't known."""
        return self.tokens / self.train_seconds if self.tokens and self.train_seconds else None

    @property
    def mfu(self) -> float | None:
        """Share of the devices' peak that training used; None where the peak isn't known.

        Model FLOPs utilization of Chowdhery et al. 2022 (https://arxiv.org/abs/2204.02311), appendix B, except that
        computing activations again counts as work: with gradient checkpointing it is their hardware utilization.
        """
        if not self.available_flops or not self.train_seconds:
            return None
        return self.flops / (self.train_seconds * self.available_flops * self.ranks)

    @property
    def headline(self) -> str:
        """One line."""
        how = f"counted in {self.sampled_steps:,} micro-batches" if self.flops_source == "counted" else "by formula"
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:,.0f} tokens a second"
        used = "" if self.mfu is None else f", {self.mfu:.1%} of the peak"
        peak, start = self.peak_memory_bytes / 2**30, self.memory_at_start_bytes / 2**30
        return (
            f"Training took {self.flops:.3g} operations ({how}), {self.steps:,} steps, {self.train_seconds:,.1f} s"
            f"{speed}{used}; peak memory {peak:.2f} GiB ({start:.2f} GiB at its start); "
            f"{self.trainable_parameters:,} of {self.parameters:,} parameters trained."
        )

    def metrics(self) -> dict[str, float]:
        """What is logged, name to number; without those that aren't known."""
        names = (
            "flops",
            "flops_per_token",
            "tokens_per_second",
            "mfu",
            "train_seconds",
            "tokens",
            "peak_memory_bytes",
            "memory_at_start_bytes",
            "trainable_parameters",
        )
        values = {name: getattr(self, name) for name in names}
        return {name: float(value) for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "headline": self.headline,  # for readers; from_dict passes over it and what else follows from the rest
            "flops_per_token": self.flops_per_token,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            **asdict(self),
            "uncounted": list(self.uncounted),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ComputeResult:
        """Back from :meth:`to_dict`."""
        given = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        return cls(**{**given, "uncounted": tuple(values["uncounted"])})

    def save(self, folder: str | Path) -> Path:
        """Write ``compute.json``.

        Args:
            folder: It is made where there is none.

        Returns:
            The file.
        """
        path = Path(folder) / "compute.json"
        write_json(path, self.to_dict())
        return path


def over_ranks(results: Sequence[ComputeResult]) -> ComputeResult:
    """One result of the ranks of a run: sums of work, the slowest rank's time, the largest memory.

    Args:
        results: One of each rank; at least one.

    Raises:
        ConfigError: If ranks counted in different ways.
    """
    first = results[0]
    if len({result.flops_source for result in results}) > 1:
        raise ConfigError("Some ranks counted operations and some took a formula: compile the model on all or on none.")
    largest = max(results, key=lambda result: result.peak_memory_bytes)
    total = {
        name: sum(getattr(result, name) for result in results)
        for name in ("flops", "sampled_steps", "tokens", "supervised_tokens")
    }
    return replace(
        first,
        **cast(Any, total),
        steps=max(result.steps for result in results),
        train_seconds=max(result.train_seconds for result in results),
        peak_memory_bytes=largest.peak_memory_bytes,
        memory_at_start_bytes=largest.memory_at_start_bytes,
        uncounted=tuple(sorted({name for result in results for name in result.uncounted})),
        ranks=len(results),
    )
