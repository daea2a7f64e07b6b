"""Measure the cost of any training loop: start, a context manager around each micro-batch, stop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_ft.distributed import all_gather_objects, warn
from lightning_ft.errors import ConfigError
from lightning_ft.evaluation.compute.arithmetic import (
    ComputeResult,
    MemorySource,
    StepSums,
    combine_ranks,
    estimated_flops,
    estimated_seconds,
)
from lightning_ft.evaluation.compute.batch_size import HasLengths, count_rows, count_tokens
from lightning_ft.evaluation.compute.memory import PeakMemory
from lightning_ft.models.flops import (
    OperationCounter,
    attention_kernel,
    formula_flops_per_token,
    is_compiled,
    known_peak,
)
from lightning_ft.models.parts import weight_counts
from lightning_ft.models.unwrap import unwrapped

_DISPATCHED_KERNELS = (None, "eager", "sdpa")  # attention whose operators PyTorch dispatches


def is_counted(micro_batch: int, every: int) -> bool:
    """Return whether the operations of a micro-batch are counted: in the 1st, 8th, 64th, ... and each `every`-th.

    Counting adds a constant time per operator: two fifths of a step of a model of 2 million weights with 8 short rows
    on a CPU, a quarter with 32 rows. With one step in 200 that is at most a few thousandths of a long run.

    Args:
        micro_batch: Number of the micro-batch, from 1.
        every: Number of micro-batches between counts.

    Example:
        >>> [n for n in range(1, 700) if is_counted(n, 200)]
        [1, 8, 64, 200, 400, 600]
    """
    power = micro_batch & (micro_batch - 1) == 0 and micro_batch.bit_length() % 3 == 1
    return micro_batch % every == 0 or (micro_batch < every and power)


class ComputeMeasurement:
    """Operations, time and memory of training steps.

    Operations are counted in a few micro-batches (see :func:`is_counted`) and scaled up by token positions. Counting
    slows a micro-batch down, so its time is replaced by that of the others. The operations of the first micro-batch are
    used only until a second one is counted, since modules do some work once (`lightning_ft` probes what a model
    supports).

    Time is `time.perf_counter` on a CPU. On CUDA it is the time between two events in the stream, before and after the
    step, which synchronizes only when results are read.

    Args:
        every_n_steps: Number of micro-batches between counts of operations, besides the 1st, 8th, 64th, ...
        peak_flops: Peak of one device in operations per second. None takes the known peak of the device, if any.

    Raises:
        ConfigError: If an argument is out of its range.

    Example:
        A custom training loop. All work of a micro-batch belongs inside the context: forward, backward, and the
        optimizer's step if it takes one::

            measurement = ComputeMeasurement()
            measurement.start(model)
            for batch in batches:
                with measurement.step(batch):  # or step(batch_tokens=..., supervised_tokens=...)
                    model(**batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            result = measurement.stop()
    """

    def __init__(self, *, every_n_steps: int = 200, peak_flops: float | None = None) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"every_n_steps={every_n_steps}: expected at least 1.")
        if peak_flops is not None and peak_flops <= 0:
            raise ConfigError(f"peak_flops={peak_flops}: expected operations per second, more than 0.")
        self.every_n_steps, self.peak_flops = every_n_steps, peak_flops
        self._total, self._slowed, self._counted = StepSums(), StepSums(), StepSums()
        self._provisional = False
        self._uncounted: set[str] = set()
        self._saw_attention = False
        self._memory: PeakMemory | None = None
        self._peak: tuple[int, int, MemorySource] = (
            0,
            0,
            "resident",
        )  # bytes, bytes at the start, source; of the part of the run with the highest peak
        self._rows = 0  # of all batches, for the mean length in the formula
        self._module: nn.Module | None = None
        self._open: _OpenStep | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event, bool]] = []  # start, end, slowed
        self._targets: Tensor | None = None  # counted on the device, not yet read
        self._frozen_flops_before = self._frozen_flops_at_start = 0.0  # operations that the module counts itself
        self._read_at = StepSums()  # sums at the last `recent_tokens_per_second`

    @property
    def steps(self) -> int:
        """Number of optimizer steps so far."""
        return self._total.steps

    def start(self, module: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """Prepare for training steps; earlier measurements, measured or loaded, are kept and added to.

        Args:
            module: Model, or a module that contains it, on the device that it trains on.
            dtype: Data type of the matrix products if it differs from that of the weights (autocast).

        Raises:
            ConfigError: If the model is compiled and no formula fits it.
        """
        self.abandon_step()
        self._frozen_flops_before = self._frozen_flops()
        self._module = module
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._dtype = dtype or _weights_dtype(module)
        self._compiled = is_compiled(module)
        if self._compiled:
            formula_flops_per_token(module, 1)  # fail now rather than at the end
        self._memory = None
        self._frozen_flops_at_start = _frozen_flops(module)

    @contextmanager
    def step(
        self, batch: object = None, *, batch_tokens: int | None = None, supervised_tokens: int = 0, rows: int = 1
    ) -> Iterator[None]:
        """Context manager around one micro-batch.

        Args:
            batch: Batch of a type that :func:`lightning_ft.evaluation.compute.batch_size.count_tokens` can count.
            batch_tokens: Number of token positions, for batches of other types.
            supervised_tokens: Number of tokens that are targets of the loss, with `batch_tokens`.
            rows: Number of rows of the batch, with `batch_tokens`; only the formula for compiled models needs it.

        Raises:
            ConfigError: If :meth:`start` wasn't called.
        """
        self.begin_step()
        try:
            yield
        except BaseException:
            self.abandon_step()
            raise
        if batch_tokens is not None:
            self.end_step(tokens=(batch_tokens, supervised_tokens), rows=rows)
        else:
            self.end_step(batch)

    def begin_step(self) -> None:
        """Begin a micro-batch, as `step` does.

        Raises:
            ConfigError: If :meth:`start` wasn't called.
        """
        if self._module is None:
            raise ConfigError("ComputeMeasurement hasn't been started. Call start(model) before the first step.")
        self.abandon_step()
        if self._memory is None:  # not in `start`, after which others may still generate or evaluate
            self._memory = PeakMemory(self._device)
        counted = not self._compiled and is_counted(self._total.micro_batches + 1, self.every_n_steps)
        self._open = _OpenStep(OperationCounter() if counted else None, self._now())

    def end_step(
        self,
        batch: object = None,
        rollout: HasLengths | None = None,
        *,
        tokens: tuple[int, int] | None = None,
        rows: int | None = None,
    ) -> None:
        """End a micro-batch, as `step` does.

        Args:
            batch: See :meth:`step`.
            rollout: See :func:`lightning_ft.evaluation.compute.batch_size.count_tokens`.
            tokens: Numbers of token positions and supervised tokens, instead of a batch.
            rows: Number of rows of the batch.

        Raises:
            ConfigError: If no micro-batch was begun, or a formula needs token positions that aren't known.
        """
        if self._open is None:
            raise ConfigError("end_step was called without begin_step. Call begin_step before each micro-batch.")
        end, opened = self._now(), self._open
        self._open = None
        counter = opened.close()
        known = tokens if tokens is not None else count_tokens(batch, rollout)
        if known is None:
            self._report_unknown(batch)
        positions, supervised = known or (0, 0)
        if isinstance(supervised, Tensor):
            self._targets = supervised if self._targets is None else self._targets + supervised
            supervised = 0
        self._rows += count_rows(batch) if rows is None else rows
        slowed = counter is not None
        done = StepSums(1, positions, supervised, int(known is None), opened.optimizer_steps)
        if self._device.type != "cuda":
            done = replace(done, seconds=end - opened.start)
        else:
            self._events.append((opened.start, end, slowed))
            self._read_events(wait=False)
        first = not self._total.micro_batches
        self._total += done
        if counter is not None:
            self._slowed += done
            if self._provisional:  # replace the first micro-batch's
                self._counted = StepSums()
            self._provisional = first
            self._counted += replace(done, flops=float(counter.flops))
            self._uncounted |= set(counter.uncounted)
            self._saw_attention |= counter.saw_attention

    def abandon_step(self) -> None:
        """Discard a micro-batch that was begun and won't end, since it failed or the rest of the epoch was skipped."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def read_memory(self) -> None:
        """Record the peak memory so far; memory that others use after the last reading isn't included."""
        if self._memory is not None:
            self._peak = max(self._peak, (self._memory.peak(), self._memory.at_start, self._memory.source))

    def recent_tokens_per_second(self) -> float | None:
        """Token positions per second since the last call, over micro-batches that weren't counted; None without any."""
        self._read_pending()
        now = self._total - self._slowed
        since, self._read_at = now - self._read_at, now
        return since.positions / since.seconds if since.positions and since.seconds and not now.unknown else None

    def result(self) -> ComputeResult:
        """Return the result of this process so far.

        Raises:
            ConfigError: If there was no training step.
        """
        if self._module is None or not self._total.micro_batches:
            raise ConfigError(
                "Nothing was measured, since there was no training step between start and stop. Wrap each in step()."
            )
        self._read_pending()
        total = self._total
        if self._compiled:
            per_token = formula_flops_per_token(self._module, total.positions / max(1, self._rows))
            flops = per_token * total.positions
        else:
            flops = estimated_flops(self._counted, total) + self._frozen_flops()
        counts = weight_counts(self._module)
        sizes = [(counts[name], p.requires_grad) for name, p in self._module.named_parameters()]
        peak, at_start, source = self._peak
        return ComputeResult(
            flops=flops,
            flops_source="formula" if self._compiled else "counted",
            sampled_steps=0 if self._compiled else self._counted.micro_batches,
            steps=total.steps,
            tokens=0 if total.unknown else total.positions,
            supervised_tokens=0 if total.unknown else total.supervised,
            train_seconds=estimated_seconds(self._slowed, total),
            peak_memory_bytes=peak,
            memory_source=source,
            memory_at_start_bytes=at_start,
            trainable_parameters=sum(size for size, trained in sizes if trained),
            parameters=sum(size for size, _ in sizes),
            available_flops=self.peak_flops or known_peak(self._device, self._dtype),
            device=torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type,
            dtype=str(self._dtype).removeprefix("torch."),
            uncounted=self._uncounted_operators(),
        )

    def stop(self, *, read_memory: bool = True) -> ComputeResult:
        """Return the combined result of all ranks, each of which must call this method.

        Args:
            read_memory: Whether to record the peak memory now. False if other work has run since the last step and
                :meth:`read_memory` was called before it.

        Raises:
            ConfigError: If there was no training step.
        """
        self.abandon_step()
        if read_memory or not self._peak[0]:
            self.read_memory()
        result = self.result()
        if len(every := all_gather_objects(result)) > 1:
            result = combine_ranks(every)
        if result.uncounted:
            _warn(
                f"Training ran {', '.join(result.uncounted)}, whose operations no formula counts, so the FLOPs are too "
                "low. Use attn_implementation='sdpa' or 'eager' for a number that can be compared."
            )
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far as JSON types, so that a resumed run adds to them."""
        self._read_pending()
        self.read_memory()
        return {
            "total": asdict(self._total),
            "slowed": asdict(self._slowed),
            "counted": asdict(self._counted),
            "provisional": self._provisional,
            "rows": self._rows,
            "frozen_flops": self._frozen_flops(),
            "peak": list(self._peak),
            "uncounted": sorted(self._uncounted),
            "saw_attention": self._saw_attention,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Trainers keep the state of rank 0, so that each rank continues from its sums.
        """
        self._total, self._slowed, self._counted = (StepSums(**state[k]) for k in ("total", "slowed", "counted"))
        self._provisional, self._rows = bool(state["provisional"]), int(state["rows"])
        self._peak = tuple(state["peak"])
        self._frozen_flops_before = float(state.get("frozen_flops", 0.0))
        self._read_at = self._total - self._slowed
        self._uncounted, self._saw_attention = set(state["uncounted"]), bool(state["saw_attention"])

    # ---------------------------------------------------------------- implementation

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read_events(self, *, wait: bool) -> None:
        if wait and self._events:
            self._events[-1][1].synchronize()
        while self._events and self._events[0][1].query():
            start, end, slowed = self._events.pop(0)
            elapsed = StepSums(seconds=start.elapsed_time(end) / 1000)
            self._total += elapsed
            if slowed:
                self._slowed += elapsed

    def _read_pending(self) -> None:
        self._read_events(wait=True)
        if self._targets is not None:
            self._total += StepSums(supervised=int(self._targets))
            self._targets = None

    def _frozen_flops(self) -> float:
        """Operations in steps that aren't proportional to their tokens, so that they can't be sampled."""
        now = 0.0 if self._module is None else _frozen_flops(self._module)
        return self._frozen_flops_before + now - self._frozen_flops_at_start

    def _uncounted_operators(self) -> tuple[str, ...]:
        uncounted = set(self._uncounted)
        kernel = attention_kernel(cast(nn.Module, self._module))
        if not self._compiled and kernel not in _DISPATCHED_KERNELS and not self._saw_attention:
            uncounted.add(str(kernel))  # a library that bypasses PyTorch's dispatcher
        return tuple(sorted(uncounted))

    def _report_unknown(self, batch: object) -> None:
        what = f"the token positions of a {type(batch).__name__} aren't known"
        if self._compiled:
            raise ConfigError(
                f"The model is compiled, so its operations follow from a formula per token position, and {what}. Use "
                "batches with input_ids, or turn torch.compile off."
            )
        if not self._total.unknown:
            _warn(
                f"Metrics per token are left out, since {what}; operations are scaled up by micro-batch. Use batches "
                "with input_ids, or pass batch_tokens= to ComputeMeasurement.step."
            )


class _OpenStep:
    """A micro-batch in progress: its counter, its start time, and the optimizer steps taken in it."""

    def __init__(self, counter: OperationCounter | None, start: Any) -> None:
        self.start, self.optimizer_steps = start, 0
        self._counter = counter
        self._hook = register_optimizer_step_post_hook(self._count_step)
        if counter is not None:
            counter.__enter__()

    def _count_step(self, *_: object) -> None:
        self.optimizer_steps += 1

    def close(self) -> OperationCounter | None:
        self._hook.remove()
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
        return self._counter


def _frozen_flops(module: nn.Module) -> float:
    """Operations that a module of this package spent on its activation cache, see `SupervisedFineTuning`."""
    return float(getattr(unwrapped(module), "frozen_flops", 0))


def _warn(message: str) -> None:
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        warn(message, stacklevel=3)


def _weights_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of most of the weights: a bfloat16 model with float32 adapters counts as bfloat16."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.get_default_dtype())
