"""Overhead of ComputeMeter: two trainings of the support example, one of them with it, alternate step by step.

    OMP_NUM_THREADS=1 python benchmarks/compute_meter.py --steps 200 --pairs 5

Whole runs, one after the other, differ by a few percent on most machines even if they are the same. So both trainings
of a pair run in one process and hand each other a baton at every step: a disturbance that lasts longer than a step
affects both. A training's time is the sum over its steps, including the setup in the first one; steps whose operations
aren't counted enter with their median, so that disturbances of single steps don't matter. The report that is written at
the end of training is not included.
"""

from __future__ import annotations

import tempfile
import threading
import time
from statistics import median
from typing import Any

import torch
from harness import Ratio, arguments, quiet
from training import silent_trainer

from lightning_ft import LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Callback
from lightning_ft.callbacks.compute import ComputeMeter
from lightning_ft.evaluation.compute.measurement import is_counted

EVERY = 200  # micro-batches from one whose operations are counted to the next: ComputeMeter's default


class Baton(Callback):
    """Let a training continue only when it is its turn; must be the first callback.

    Args:
        mine: Semaphore that this training waits for and the other one releases.
        theirs: Semaphore that the other training waits for.
    """

    def __init__(self, mine: threading.Semaphore, theirs: threading.Semaphore) -> None:
        super().__init__()
        self._mine, self._theirs = mine, theirs
        self._since: float | None = None
        self.seconds: list[float] = []

    def _pass_on(self) -> None:
        if self._since is not None:
            self.seconds.append(time.perf_counter() - self._since)
            self._theirs.release()
        self._mine.acquire()
        self._since = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        self._pass_on()

    def on_train_epoch_end(self, *_: Any) -> None:  # end of the last step: what follows runs once per training
        if self._since is not None:
            self.seconds.append(time.perf_counter() - self._since)
        self._since = None
        self._theirs.release()


def fit(steps: int, batch_size: int, baton: Baton, metered: bool) -> None:
    module = LoRAFineTuning("examples/tiny_base", dtype="float32", learning_rate=2e-3)
    data = PairDataModule(train="examples/support/data/train.jsonl", batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [baton, ComputeMeter(every_n_steps=EVERY)] if metered else [baton]
        trainer = silent_trainer(max_steps=steps, default_root_dir=folder, callbacks=callbacks)
        trainer.fit(module, data)


def pair(steps: int, batch_size: int, metered_first: bool) -> float:
    """Ratio of the training time with the meter to the time without."""
    turns = threading.Semaphore(1), threading.Semaphore(0)
    batons = Baton(turns[0], turns[1]), Baton(turns[1], turns[0])
    threads = [
        threading.Thread(target=fit, args=(steps, batch_size, baton, metered))
        for baton, metered in zip(batons, (metered_first, not metered_first), strict=True)
    ]
    for thread in threads:
        thread.start()
        time.sleep(2)  # models are loaded one after the other
    for thread in threads:
        thread.join()
    first, second = (training_time(baton.seconds) for baton in batons)
    assert all(len(baton.seconds) == steps for baton in batons), "a training ended early"
    return first / second if metered_first else second / first


def training_time(seconds: list[float]) -> float:
    """Sum of the steps' seconds, where each step that isn't counted enters with the median of those."""
    counted = [value for step, value in enumerate(seconds, 1) if is_counted(step, EVERY)]
    others = [value for step, value in enumerate(seconds, 1) if not is_counted(step, EVERY)]
    return sum(counted) + len(others) * median(others)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps per training")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    pair(3, options.batch_size, True)  # imports, and the data's cache
    ratios = []
    for number in range(options.pairs):
        ratios.append(pair(options.steps, options.batch_size, number % 2 == 0))
        print(f"time with the meter / without: {ratios[-1]:.4f}", flush=True)
    found = Ratio.of(ratios)
    print(f"median: {found.median:.4f} ({found.least:.4f} to {found.largest:.4f}, n = {found.pairs})")


if __name__ == "__main__":
    main()
