"""Cost of a training run: operations, time, memory and parameters, estimated from sampled micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from lightning_ft.atomic_files import write_json
from lightning_ft.document.numbers import format_si
from lightning_ft.errors import ConfigError

MemorySource = Literal["cuda", "resident", "process"]
"""Source of a memory reading, see `ComputeResult.memory_source`."""

_JSON_KEYS = {"memory_source": "memory_kind"}  # fields whose key in JSON differs from their name


@dataclass(frozen=True)
class StepSums:
    """Sums over micro-batches.

    Args:
        micro_batches: Number of micro-batches.
        positions: Number of token positions of their batches, including padding.
        supervised: Number of tokens that are targets of the loss.
        unknown: Number of micro-batches whose token positions aren't known.
        steps: Number of optimizer steps in them.
        seconds: Time of the micro-batches, in seconds.
        flops: Floating-point operations counted in them; 0 if they weren't counted.

    Example:
        >>> a = StepSums(micro_batches=1, positions=64, seconds=0.5)
        >>> (a + a).positions, (a + a - a) == a
        (128, True)
    """

    micro_batches: int = 0
    positions: int = 0
    supervised: int = 0
    unknown: int = 0
    steps: int = 0
    seconds: float = 0.0
    flops: float = 0.0

    def __add__(self, other: StepSums) -> StepSums:
        return StepSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: StepSums) -> StepSums:
        return StepSums(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


def work_share(part: StepSums, whole: StepSums) -> float:
    """Share of the work of `whole` that is in `part`, by token positions, or by micro-batches if those aren't known.

    Example:
        >>> work_share(StepSums(micro_batches=1, positions=30), StepSums(micro_batches=2, positions=40))
        0.75
        >>> work_share(StepSums(micro_batches=1, unknown=1), StepSums(micro_batches=2, unknown=2))
        0.5
    """
    if whole.unknown or not (whole.positions and part.positions):
        return part.micro_batches / whole.micro_batches
    return part.positions / whole.positions


def estimated_flops(counted: StepSums, total: StepSums) -> float:
    """Estimate the operations of all micro-batches from the counted ones, by the ratio estimator ``F_c T / T_c``.

    The estimate is exact if operations are proportional to token positions, as in batches of one shape. Attention's
    share grows with the length of rows, so with mixed lengths it is approximate (W. G. Cochran, Sampling Techniques,
    3rd ed., chapter 6).

    Args:
        counted: Sums over the micro-batches whose operations were counted; at least one.
        total: Sums over all micro-batches, including the counted ones.

    Raises:
        ConfigError: If no micro-batch was counted.

    Example:
        >>> counted = StepSums(micro_batches=1, positions=50, flops=300.0)
        >>> estimated_flops(counted, StepSums(micro_batches=4, positions=200))
        1200.0
    """
    if not counted.micro_batches:
        raise ConfigError("No micro-batch was counted, so operations can't be estimated. Measure at least one.")
    return counted.flops / work_share(counted, total)


def estimated_seconds(slowed: StepSums, total: StepSums) -> float:
    """Estimate the time of all micro-batches without the overhead of counting, from those that weren't counted.

    If all of them were counted, as in runs of a few micro-batches, it is their measured time.

    Args:
        slowed: Sums over the counted micro-batches.
        total: Sums over all micro-batches, including the counted ones.

    Example:
        >>> slowed = StepSums(micro_batches=1, positions=50, seconds=9.0)
        >>> estimated_seconds(slowed, StepSums(micro_batches=4, positions=200, seconds=15.0))
        8.0
        >>> estimated_seconds(slowed, slowed)
        9.0
    """
    others = total - slowed
    if not others.micro_batches or not others.seconds:
        return total.seconds
    return others.seconds / work_share(others, total)


@dataclass(frozen=True)
class ComputeResult:
    """Cost of a training run.

    An operation is a multiplication or an addition in a matrix product, attention or convolution that a training step
    runs: forward, backward, recomputation by gradient checkpointing, and in RLHF the rollouts and the reference model.
    Element-wise work (norms, activations, AdamW) isn't counted, as is usual. Attention counts all pairs of a row,
    whether or not its kernel skips masked ones.

    Args:
        flops: Floating-point operations of training, estimated from the counted micro-batches.
        flops_source: ``"counted"``, or ``"formula"`` if operators can't be counted (compiled code).
        sampled_steps: Number of micro-batches whose operations were counted; 0 with a formula.
        steps: Number of optimizer steps.
        tokens: Number of token positions of the training batches, including padding; a shared prompt counts once. 0 if
            the positions of a batch aren't known.
        supervised_tokens: Number of tokens that are targets of the loss; in RLHF the completion tokens.
        train_seconds: Time in training steps, in seconds, without the overhead of counting. Evaluation, checkpoints and
            data loading are excluded.
        peak_memory_bytes: Most memory in use from the first training step to the last, including validation between
            them.
        memory_source: ``"cuda"``: memory that PyTorch allocated on the GPU; ``"resident"``: resident memory of the
            process since training started, on a CPU; ``"process"``: the same since the process started, if the system
            can't reset its peak.
        memory_at_start_bytes: Memory in use at the start of the first step: mostly the loaded model.
        trainable_parameters: Number of trainable parameters.
        parameters: Number of all parameters.
        available_flops: Peak of one device for `dtype`, in operations per second; None if it isn't known.
        device: Name of the device.
        dtype: Data type of the matrix products.
        uncounted: Operators of attention and matrix products that ran and that no formula counts. If there are any,
            `flops` is too low and must not be compared.
        ranks: Number of processes. Operations and tokens are summed over them; time and memory are the maximum.

    Raises:
        ConfigError: If a value is negative or isn't finite.

    Example:
        >>> result = ComputeResult(
        ...     flops=6e9, flops_source="counted", sampled_steps=3, steps=10, tokens=2000, supervised_tokens=500,
        ...     train_seconds=4.0, peak_memory_bytes=3 * 2**20, memory_source="resident", memory_at_start_bytes=2**20,
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
    memory_source: MemorySource
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
                raise ConfigError(f"ComputeResult: {name}={value}: expected a finite number of at least 0.")

    @property
    def flops_per_token(self) -> float | None:
        """Operations per token position; None if positions aren't known."""
        return self.flops / self.tokens if self.tokens else None

    @property
    def tokens_per_second(self) -> float | None:
        """Token positions per second of training, summed over ranks; None if they or the time aren't known."""
        return self.tokens / self.train_seconds if self.tokens and self.train_seconds else None

    @property
    def mfu(self) -> float | None:
        """Share of the devices' peak that training used; None if the peak isn't known.

        Model FLOPs utilization of Chowdhery et al. 2022 (https://arxiv.org/abs/2204.02311), appendix B, except that
        recomputed activations count as work: with gradient checkpointing it is their hardware FLOPs utilization.
        """
        if not self.available_flops or not self.train_seconds:
            return None
        return self.flops / (self.train_seconds * self.available_flops * self.ranks)

    @property
    def headline(self) -> str:
        """Summary in one line."""
        how = f"counted in {self.sampled_steps:,} micro-batches" if self.flops_source == "counted" else "by formula"
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:,.0f} tokens per second"
        used = "" if self.mfu is None else f", {self.mfu:.1%} of the peak"
        peak, start = self.peak_memory_bytes / 2**30, self.memory_at_start_bytes / 2**30
        return (
            f"Training took {format_si(self.flops, 'FLOP')} ({how}), {self.steps:,} steps, {self.train_seconds:,.1f} s"
            f"{speed}{used}; peak memory {peak:.2f} GiB ({start:.2f} GiB at the start); "
            f"{self.trainable_parameters:,} of {self.parameters:,} parameters trained."
        )

    def metrics(self) -> dict[str, float]:
        """Return the metrics to log by name, without those that aren't known."""
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
        """Convert to JSON types."""
        values = {_JSON_KEYS.get(name, name): value for name, value in asdict(self).items()}
        return {
            "headline": self.headline,  # this and the next three follow from the rest; from_dict ignores them
            "flops_per_token": self.flops_per_token,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            **values,
            "uncounted": list(self.uncounted),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ComputeResult:
        """Restore a result from :meth:`to_dict`."""
        known = {f.name: values[key] for f in fields(cls) if (key := _JSON_KEYS.get(f.name, f.name)) in values}
        return cls(**{**known, "uncounted": tuple(values["uncounted"])})

    def save(self, folder: str | Path) -> Path:
        """Write ``compute.json``.

        Args:
            folder: Folder to write into; it is created if it doesn't exist.

        Returns:
            Path of the file.
        """
        path = Path(folder) / "compute.json"
        write_json(path, self.to_dict())
        return path


def combine_ranks(results: Sequence[ComputeResult]) -> ComputeResult:
    """Combine the results of the ranks of a run: sums of operations and tokens, maxima of time and memory.

    Args:
        results: Result of each rank; at least one.

    Raises:
        ConfigError: If some ranks counted operations and others used a formula.
    """
    first = results[0]
    if len({result.flops_source for result in results}) > 1:
        raise ConfigError(
            "Some ranks counted operations and others used a formula. Compile the model on all ranks or on none."
        )
    largest = max(results, key=lambda result: result.peak_memory_bytes)
    totals: dict[str, Any] = {
        name: sum(getattr(result, name) for result in results)
        for name in ("flops", "sampled_steps", "tokens", "supervised_tokens")
    }
    return replace(
        first,
        **totals,
        steps=max(result.steps for result in results),
        train_seconds=max(result.train_seconds for result in results),
        peak_memory_bytes=largest.peak_memory_bytes,
        memory_at_start_bytes=largest.memory_at_start_bytes,
        uncounted=tuple(sorted({name for result in results for name in result.uncounted})),
        ranks=len(results),
    )
