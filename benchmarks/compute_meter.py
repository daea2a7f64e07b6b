"""What ComputeMeter costs: the support example with it and without it, in turns.

    OMP_NUM_THREADS=1 python benchmarks/compute_meter.py --steps 200 --pairs 5

Each run has a Trainer, a model and data of its own. A pair's ratio is the time of `trainer.fit` with the meter to that
without; which of the two comes first alternates. The median of the ratios is the figure, with the least and largest;
for time on the clock, and for time of the processor, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from statistics import median

import torch

from lightning_ft import LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer
from lightning_ft.callbacks.compute import ComputeMeter


def fit(steps: int, batch_size: int, metered: bool) -> tuple[float, float]:
    """Seconds that a training run takes, on the clock and of the processor."""
    torch.manual_seed(0)
    module = LoRAFineTuning("examples/tiny_base", dtype="float32", learning_rate=2e-3)
    data = PairDataModule(train="examples/support/data/train.jsonl", batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[ComputeMeter()] if metered else [],
        )
        started = time.perf_counter(), time.process_time()
        trainer.fit(module, data)
        return time.perf_counter() - started[0], time.process_time() - started[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    fit(2, options.batch_size, True)  # imports, and the data's cache
    ratios = []
    for pair in range(options.pairs):
        order = (False, True) if pair % 2 == 0 else (True, False)
        seconds = {metered: fit(options.steps, options.batch_size, metered) for metered in order}
        ratios.append([a / b for a, b in zip(seconds[True], seconds[False], strict=True)])
        clock, processor = ratios[-1]
        print(f"{seconds[False][0]:.1f} s without: clock {clock:.4f}, processor {processor:.4f}", flush=True)
    for name, of in zip(("clock", "processor"), zip(*ratios, strict=True), strict=True):
        print(f"with to without, {name}: median {median(of):.4f} ({min(of):.4f} to {max(of):.4f}, n = {len(of)})")


if __name__ == "__main__":
    main()
