"""Measure what training costs around any training loop: start, a context for each micro-batch, stop."""

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
    StepSums,
    estimated_flops,
    estimated_seconds,
    over_ranks,
)
from lightning_ft.evaluation.compute.batch_size import rows_of, tokens_of
from lightning_ft.evaluation.compute.memory import PeakMemory
from lightning_ft.models.flops import (
    OperationCounter,
    attention_kernel,
    formula_flops_per_token,
    is_compiled,
    known_peak,
)
from lightning_ft.models.unwrap import unwrapped

_SEEN_KERNELS = (None, "eager", "sdpa")  # whose operators PyTorch dispatches


def is_counted(micro_batch: int, every: int) -> bool:
    """Whether the operations of a micro-batch, numbered from 1, are counted: 1, 8, 64, ... and each `every`-th.

    Counting costs so much an operator, whatever its size: two fifths of a step of a model of 2 million weights with 8
    short rows on a CPU, a quarter with 32 rows. One step in 200 is then a few thousandths of a long run at most.

    Example:
        >>> [n for n in range(1, 700) if is_counted(n, 200)]
        [1, 8, 64, 200, 400, 600]
    """
    power = micro_batch & (micro_batch - 1) == 0 and micro_batch.bit_length() % 3 == 1
    return micro_batch % every == 0 or (micro_batch < every and power)


class ComputeMeasurement:
    """Operations, time and memory of training steps.

    Operations are counted in a few micro-batches (see :func:`is_counted`) and scaled up by token places. Counted ones
    are slower, so the time of the others stands for them. The first micro-batch's operations are used only until a
    second one is counted: modules do some things once (`lightning_ft` tries out what a model can do).

    Time is `time.perf_counter` on a CPU. On CUDA it is that between two events in the stream, before and after the
    step, which makes nothing wait until the figures are read.

    Args:
        every_n_steps: Count the operations of each so many-th micro-batch, besides some early ones.
        peak_flops: Operations a second that one device could do. None: what is known of it, if anything.

    Raises:
        ConfigError: For numbers that can't be.

    Example:
        A loop written by hand. All of a micro-batch belongs inside: forward, backward, and the optimizer's step where
        it takes one::

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
            raise ConfigError(f"peak_flops={peak_flops}: expected operations a second, more than 0.")
        self.every_n_steps, self.peak_flops = every_n_steps, peak_flops
        self._total, self._slowed, self._counted = StepSums(), StepSums(), StepSums()
        self._provisional = False
        self._uncounted: set[str] = set()
        self._saw_attention = False
        self._memory: PeakMemory | None = None
        self._peak = (0, 0, "resident")  # bytes, those at the start, kind; of the part of the run with the largest
        self._rows = 0  # of all batches, for the mean length that the formula takes
        self._module: nn.Module | None = None
        self._open: _OpenStep | None = None
        self._events: list[tuple[Any, Any, bool]] = []  # start, end, slowed
        self._targets: Tensor | None = None  # counted on the device, not yet read
        self._beside_before = self._beside_at_start = 0.0  # operations that the module counts itself
        self._read_at = StepSums()  # micro-batches up to the last `recent_tokens_per_second`

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._total.steps

    def start(self, module: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """Get ready for training steps; what was measured before, or loaded, is added to.

        Args:
            module: The model, or a module that holds it, on the device that it trains on.
            dtype: That matrices are multiplied in where it isn't the weights' (autocast).

        Raises:
            ConfigError: For a compiled model that no formula fits.
        """
        self.abandon_step()
        self._beside_before = self._beside()
        self._module = module
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._dtype = dtype or _weights_dtype(module)
        self._compiled = is_compiled(module)
        if self._compiled:
            formula_flops_per_token(module, 1)  # fail now and not at the end
        self._memory = None
        self._beside_at_start = _frozen_flops(module)

    @contextmanager
    def step(
        self, batch: Any = None, *, batch_tokens: int | None = None, supervised_tokens: int = 0, rows: int = 1
    ) -> Iterator[None]:
        """Around one micro-batch.

        Args:
            batch: What :func:`lightning_ft.evaluation.compute.batch_size.tokens_of` knows how to count.
            batch_tokens: Its token places, where it doesn't.
            supervised_tokens: Those that are targets of the loss, with `batch_tokens`.
            rows: Of the batch, with `batch_tokens`; only formulas want to know.

        Raises:
            ConfigError: Before :meth:`start`.
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
        """What `step` does before a micro-batch.

        Raises:
            ConfigError: Before :meth:`start`.
        """
        if self._module is None:
            raise ConfigError("ComputeMeasurement hasn't been started: call start(model) ahead of the first step.")
        self.abandon_step()
        if self._memory is None:  # here and not in `start`, after which others may still generate or evaluate
            self._memory = PeakMemory(self._device)
        counted = not self._compiled and is_counted(self._total.micro_batches + 1, self.every_n_steps)
        self._open = _OpenStep(OperationCounter() if counted else None, self._now())

    def end_step(
        self, batch: Any = None, rollout: Any = None, *, tokens: tuple[int, int] | None = None, rows: int | None = None
    ) -> None:
        """What `step` does after a micro-batch.

        Args:
            batch: See :meth:`step`.
            rollout: See :func:`lightning_ft.evaluation.compute.batch_size.tokens_of`.
            tokens: Places and supervised tokens, instead of a batch.
            rows: Of the batch.

        Raises:
            ConfigError: Where no micro-batch was begun, or a formula needs places that aren't known.
        """
        if self._open is None:
            raise ConfigError("end_step without begin_step.")
        end, opened = self._now(), self._open
        self._open = None
        counter = opened.close()
        known = tokens if tokens is not None else tokens_of(batch, rollout)
        if known is None:
            self._unknown(batch)
        places, supervised = known or (0, 0)
        if isinstance(supervised, Tensor):
            self._targets = supervised if self._targets is None else self._targets + supervised
            supervised = 0
        self._rows += rows_of(batch) if rows is None else rows
        slowed = counter is not None
        done = StepSums(1, places, supervised, int(known is None), opened.optimizer_steps)
        if self._device.type != "cuda":
            done = replace(done, seconds=end - opened.began)
        else:
            self._events.append((opened.began, end, slowed))
            self._read_events(wait=False)
        first = not self._total.micro_batches
        self._total += done
        if counter is not None:
            self._slowed += done
            if self._provisional:  # the first micro-batch's, until there is another
                self._counted = StepSums()
            self._provisional = first
            self._counted += replace(done, flops=float(counter.flops))
            self._uncounted |= set(counter.uncounted)
            self._saw_attention |= counter.saw_attention

    def abandon_step(self) -> None:
        """Forget a micro-batch that was begun and won't end: it failed, or the rest of an epoch was skipped."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def read_memory(self) -> None:
        """Take the peak so far: what others do after the last reading isn't in it."""
        if self._memory is not None:
            self._peak = max(self._peak, (self._memory.peak(), self._memory.at_start, self._memory.kind))

    def recent_tokens_per_second(self) -> float | None:
        """Token places in a second since the last call, of micro-batches that weren't slowed; None where none was."""
        self._read_pending()
        now = self._total - self._slowed
        since, self._read_at = now - self._read_at, now
        return since.places / since.seconds if since.places and since.seconds and not now.unknown else None

    def result(self) -> ComputeResult:
        """What this process has measured so far.

        Raises:
            ConfigError: If there was no training step.
        """
        if self._module is None or not self._total.micro_batches:
            raise ConfigError("Nothing was measured: there was no training step between start and stop.")
        self._read_pending()
        total = self._total
        if self._compiled:
            per_token = formula_flops_per_token(self._module, total.places / max(1, self._rows))
            flops = per_token * total.places
        else:
            flops = estimated_flops(self._counted, total) + self._beside()
        sizes = [(_size(p), p.requires_grad) for p in self._module.parameters()]
        peak, at_start, kind = self._peak
        return ComputeResult(
            flops=flops,
            flops_source="formula" if self._compiled else "counted",
            sampled_steps=0 if self._compiled else self._counted.micro_batches,
            steps=total.steps,
            tokens=0 if total.unknown else total.places,
            supervised_tokens=0 if total.unknown else total.supervised,
            train_seconds=estimated_seconds(self._slowed, total),
            peak_memory_bytes=peak,
            memory_kind=cast(Any, kind),
            memory_at_start_bytes=at_start,
            trainable_parameters=sum(size for size, trained in sizes if trained),
            parameters=sum(size for size, _ in sizes),
            available_flops=self.peak_flops or known_peak(self._device, self._dtype),
            device=torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type,
            dtype=str(self._dtype).removeprefix("torch."),
            uncounted=self._missed(),
        )

    def stop(self, *, read_memory: bool = True) -> ComputeResult:
        """The result of all ranks; each of them must call it.

        Args:
            read_memory: Take the peak now; not where something else ran since the last step, and it was taken before.

        Raises:
            ConfigError: If there was no training step.
        """
        self.abandon_step()
        if read_memory or not self._peak[0]:
            self.read_memory()
        result = self.result()
        if len(every := all_gather_objects(result)) > 1:
            result = over_ranks(every)
        if result.uncounted:
            _warn(
                f"Training ran {', '.join(result.uncounted)}, whose operations no formula counts: the figure is too "
                "low. Use attn_implementation='sdpa' or 'eager' for a figure that can be compared."
            )
        return result

    def state_dict(self) -> dict[str, Any]:
        """Sums so far as JSON types, so that a resumed run goes on adding."""
        self._read_pending()
        self.read_memory()
        return {
            "total": asdict(self._total),
            "slowed": asdict(self._slowed),
            "counted": asdict(self._counted),
            "provisional": self._provisional,
            "rows": self._rows,
            "beside": self._beside(),
            "peak": list(self._peak),
            "uncounted": sorted(self._uncounted),
            "saw_attention": self._saw_attention,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Trainers keep the first rank's state: on several ranks each goes on from that one's sums.
        """
        self._total, self._slowed, self._counted = (StepSums(**state[k]) for k in ("total", "slowed", "counted"))
        self._provisional, self._rows = bool(state["provisional"]), int(state["rows"])
        self._peak = cast(Any, tuple(state["peak"]))
        self._beside_before = float(state.get("beside", 0.0))
        self._read_at = self._total - self._slowed
        self._uncounted, self._saw_attention = set(state["uncounted"]), bool(state["saw_attention"])

    # ---------------------------------------------------------------- what they do

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
            began, end, slowed = self._events.pop(0)
            took = StepSums(seconds=began.elapsed_time(end) / 1000)
            self._total += took
            if slowed:
                self._slowed += took

    def _read_pending(self) -> None:
        self._read_events(wait=True)
        if self._targets is not None:
            self._total += StepSums(supervised=int(self._targets))
            self._targets = None

    def _beside(self) -> float:
        """Operations within steps that don't grow with their tokens, so that no sample stands for them."""
        now = 0.0 if self._module is None else _frozen_flops(self._module)
        return self._beside_before + now - self._beside_at_start

    def _missed(self) -> tuple[str, ...]:
        missed = set(self._uncounted)
        kernel = attention_kernel(cast(nn.Module, self._module))
        if not self._compiled and kernel not in _SEEN_KERNELS and not self._saw_attention:
            missed.add(str(kernel))  # a library that PyTorch's dispatcher doesn't see
        return tuple(sorted(missed))

    def _unknown(self, batch: Any) -> None:
        what = f"the token places of a {type(batch).__name__} aren't known"
        if self._compiled:
            raise ConfigError(
                f"The model is compiled, so its operations follow from a formula by token place, and {what}: give "
                "batches with input_ids, or switch torch.compile off."
            )
        if not self._total.unknown:
            _warn(
                f"Figures by token are left out, since {what}; operations are scaled up by micro-batch. Give batches "
                "with input_ids, or batch_tokens= to ComputeMeasurement.step."
            )


class _OpenStep:
    """A micro-batch that was begun: its counter, when it began, and the optimizer steps taken in it."""

    def __init__(self, counter: OperationCounter | None, began: Any) -> None:
        self.began, self.optimizer_steps = began, 0
        self._counter = counter
        self._hook = register_optimizer_step_post_hook(self._stepped)
        if counter is not None:
            counter.__enter__()

    def _stepped(self, *_: Any) -> None:
        self.optimizer_steps += 1

    def close(self) -> OperationCounter | None:
        self._hook.remove()
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
        return self._counter


def _frozen_flops(module: nn.Module) -> float:
    """What a module of this package computed once for each row, see `CachedFineTuning`."""
    return float(getattr(unwrapped(module), "frozen_flops", 0))


def _warn(message: str) -> None:
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        warn(message, stacklevel=3)


def _size(parameter: nn.Parameter) -> int:
    count = parameter.numel()
    if type(parameter).__name__ == "Params4bit":  # two numbers a byte
        count *= 2 * cast(Any, parameter).quant_storage.itemsize
    return count


def _weights_dtype(module: nn.Module) -> torch.dtype:
    """Of most of the weights: adapters in float32 don't make a bfloat16 model one of float32."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.get_default_dtype())
