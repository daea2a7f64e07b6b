"""Process that measures a few training steps: `python -m lightning_ft.planning.probe FOLDER [STEPS]`.

The folder contains `config.yaml`, a configuration of `lightning-ft fit`; the probe writes `probe.json`. It trains on
batches of a real epoch: the largest one, which decides about memory, and others evenly spread over the sizes. It is a
process of its own, so that the memory it measures is that of the training alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_ft.atomic_files import write_text
from lightning_ft.callbacks.compute import ComputeMeter
from lightning_ft.cli import FineTuningCLI
from lightning_ft.compare.run_files import CONFIG
from lightning_ft.data.layout import TokenBatch
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.errors import ComparisonError, LightningFTError
from lightning_ft.evaluation.forecast import Resources

RESULT = "probe.json"
STEPS, STEPS_ON_CPU = 8, 24
"""Numbers of micro-batches that are measured by default. oneDNN, which multiplies matrices on a CPU, keeps code for
each size that it meets, up to 1,024 primitives: 0.5 GiB for 135M parameters in bf16. Eight batches measured a sixth too
little."""


def measure_steps(folder: Path, steps: int | None = None) -> Resources:
    """Measure a few steps of the run that a folder configures, and extrapolate to the whole run.

    Args:
        folder: Folder with the run's configuration.
        steps: Number of micro-batches to measure; by default `STEPS`, or `STEPS_ON_CPU`.

    Raises:
        ComparisonError: If the run has no end, or its data are no batches of tokens.
    """
    cli = FineTuningCLI(["--config", str(folder / CONFIG)], run=False, save_config=False)
    data: PairDataModule = cli.datamodule
    data.require_rows("A forecast")
    data.load_rows()
    data.share_tokenizer(cli.model)
    data.setup("fit")
    epoch = [batch for batch in data.train_dataloader() if isinstance(batch, TokenBatch)]
    if not epoch:
        raise ComparisonError("The training rows make no batches of tokens, so no step can be measured.")
    trainer: Any = cli.trainer
    if steps is None:
        steps = STEPS_ON_CPU if trainer.strategy.root_device.type == "cpu" else STEPS
    accumulation = int(trainer.accumulate_grad_batches)
    micro_batches = _micro_batches(trainer, _limited(trainer, len(epoch)), accumulation)
    chosen = choose_batches(epoch, max(steps, 2 * accumulation))
    # Operations of every third step are counted, and the time of the others; the first step does work only once.
    meter = ComputeMeter(output_dir=False, every_n_steps=3)
    trainer.callbacks = [meter, *trainer.callbacks]
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 1, -1
    trainer.limit_train_batches, trainer.overfit_batches, trainer.limit_val_batches = 1.0, 0, 0
    # A generator of its own: the loader would draw from the stream that initializes the adapter.
    trainer.fit(cli.model, DataLoader(chosen, batch_size=None, generator=torch.Generator()))  # type: ignore[arg-type]
    result = meter.result
    if result is None or meter.undefined:
        raise ComparisonError(f"The steps could not be measured: {meter.undefined or 'training was interrupted'}.")
    of_epoch = sum(batch.input_ids.numel() for batch in epoch)
    positions = round(of_epoch / len(epoch) * micro_batches)
    # What is computed once: cached layers for each row, and the original model for each text of an anchor.
    once, seconds = float(getattr(cli.model, "frozen_flops", 0)) * trainer.world_size, 0.0
    growth = min(of_epoch, positions) / result.tokens
    if (anchor := cli.model.anchor) is not None:
        growth, seconds = anchor.growth(micro_batches), anchor.seconds
    return Resources(
        rows=data.report["train"].kept,
        tokens=positions,
        seconds=(result.train_seconds - seconds) / result.tokens * positions + seconds * growth,
        flops=(result.flops - once) / result.tokens * positions + once * growth,
        peak_memory_bytes=result.peak_memory_bytes,
        measured_steps=len(chosen),
        device=result.device,
    )


def choose_batches(epoch: Sequence[TokenBatch], count: int) -> list[TokenBatch]:
    """Choose batches of all sizes, short and long ones in turn, the largest second to last.

    By then the optimizer's state exists and memory is as fragmented as in training, which draws lengths in any order:
    in ascending order, peak memory on a CPU was a seventh too low.

    Args:
        epoch: Batches of an epoch.
        count: Number of batches; all of them if there are fewer.

    Example:
        >>> from lightning_ft.data.layout import Example, collate_examples
        >>> examples = [Example(torch.arange(n), torch.ones(n, dtype=torch.bool)) for n in range(2, 22)]
        >>> chosen = choose_batches([collate_examples([example]) for example in examples], 5)
        >>> [batch.input_ids.numel() for batch in chosen]
        [3, 11, 7, 21, 15]
    """
    by_size = sorted(epoch, key=lambda batch: batch.input_ids.numel())
    if count >= len(by_size):
        spread = by_size[:-1]
    else:
        share = (len(by_size) - 1) / count
        spread = [by_size[int((i + 0.5) * share)] for i in range(count - 1)]
    middle = len(spread) // 2
    mixed = [batch for pair in zip_longest(spread[:middle], spread[middle:]) for batch in pair if batch is not None]
    return [*mixed[:-1], by_size[-1], *mixed[-1:]]


def _limited(trainer: Any, of_epoch: int) -> int:
    """Number of batches of an epoch that the Trainer uses."""
    for limit in (trainer.overfit_batches, trainer.limit_train_batches):
        if isinstance(limit, int) and limit:
            return min(of_epoch, limit)
        if isinstance(limit, float) and 0 < limit < 1:
            return max(1, int(of_epoch * limit))
    return of_epoch


def _micro_batches(trainer: Any, of_epoch: int, accumulation: int) -> int:
    """Number of micro-batches of the whole run."""
    steps, epochs = int(trainer.max_steps), trainer.max_epochs
    limits = []
    if epochs is not None and epochs >= 0:
        limits.append(of_epoch * int(epochs))
    if steps >= 0:
        limits.append(steps * accumulation)
    if not limits:
        raise ComparisonError("The run has no end: set trainer.max_epochs or trainer.max_steps.")
    return min(limits)


def main() -> None:
    """Measure, and write the result."""
    folder, steps = Path(sys.argv[1]), [int(number) for number in sys.argv[2:]]
    try:
        resources = measure_steps(folder, *steps)
    except LightningFTError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    write_text(folder / RESULT, json.dumps(vars(resources)) + "\n")


if __name__ == "__main__":
    main()
