"""Time and memory from a file to batches, by the number of rows (see `scaling.py`)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import MIB, quiet
from models import TOKENIZER, lengths, tokenizer

from lightning_ft.data.pairs import PairDataModule
from lightning_ft.document.markdown import markdown_table

SAMPLES = 200
"""Number of memory samples per epoch."""


@dataclass(frozen=True)
class Memory:
    """Resident bytes of this process.

    Args:
        anonymous: Private memory, in bytes.
        file: Pages of memory-mapped caches and libraries, in bytes.
    """

    anonymous: int
    file: int

    @classmethod
    def now(cls) -> Memory:
        """Read the current values from the system."""
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        anonymous, file = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
        return cls(anonymous, file)


@dataclass(frozen=True)
class Case:
    """A file and how it is loaded.

    Args:
        folder: Folder of the file and the cache.
        rows: Number of rows.
        batch: Number of rows per batch.
        workers: Number of worker processes of the loader.
    """

    folder: str
    rows: int
    batch: int
    workers: int

    @property
    def file(self) -> Path:
        """Path of the file."""
        return Path(self.folder) / f"{self.rows}.jsonl"


@dataclass(frozen=True)
class LoadingCost:
    """Cost of loading a file in a fresh process; memory is private memory unless noted, in bytes.

    Args:
        rows: Number of rows.
        cached: Whether the rows had been tokenized before.
        bytes: Size of the file.
        stored: Size of the cache entry.
        tokens: Number of tokens of all rows.
        read: Seconds to read and check the rows.
        tokenize: Seconds to tokenize the rows, or to find them in the cache.
        text: Memory of the rows as text.
        encoded: Memory that tokenizing, or opening the cache, added.
        first: Seconds until the first batch.
        epoch: Seconds per epoch of the loader.
        batches: Number of batches per epoch.
        growth: Largest memory that the epoch added while it ran.
        left: Memory that the epoch added and didn't release.
        mapped: Memory-mapped pages that the epoch added.
    """

    rows: int
    cached: bool
    bytes: int
    stored: int
    tokens: int
    read: float
    tokenize: float
    text: int
    encoded: int
    first: float
    epoch: float
    batches: int
    growth: int
    left: int
    mapped: int

    def __str__(self) -> str:
        return f"{self.rows:,} rows, {'cached' if self.cached else 'cold'}"


def write_rows(case: Case, mean: tuple[float, float] = (60, 12)) -> None:
    """Write distinct pairs of words that the tokenizer was trained on, with log-normal lengths."""
    text = Path(TOKENIZER, "general.jsonl").read_text()
    words = sorted({word for line in text.splitlines() for word in json.loads(line)["text"].split() if word.isalpha()})
    generator = torch.Generator().manual_seed(case.rows)
    prompt_lengths, answer_lengths = (lengths(case.rows, count, 0.6, generator) for count in mean)
    with case.file.open("w") as file:
        for number, (prompt, answer) in enumerate(zip(prompt_lengths, answer_lengths, strict=True)):
            drawn = torch.randint(len(words), (prompt + answer,), generator=generator).tolist()
            row = {
                "input": f"{number} " + " ".join(words[i] for i in drawn[:prompt]),
                "output": " ".join(words[i] for i in drawn[prompt:]),
            }
            file.write(json.dumps(row) + "\n")


def measure_loading(case: Case) -> LoadingCost:
    """Read, tokenize and iterate over the loader once; to be called in a fresh process."""
    quiet()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        return _measure_loading(case)


def _measure_loading(case: Case) -> LoadingCost:
    cache = Path(case.folder) / f"cache {case.rows}"
    cached = cache.exists()
    data = PairDataModule(
        str(case.file),
        tokenizer=tokenizer(),
        batch_size=case.batch,
        num_workers=case.workers,
        cache_dir=str(cache),
    )
    warm_up(Path(case.folder))
    before = _settled()
    started = time.perf_counter()
    data.load_rows()
    read = time.perf_counter() - started
    loaded = _settled()
    started = time.perf_counter()
    data.setup("fit")
    tokenize = time.perf_counter() - started
    encoded = _settled()

    loader = data.train_dataloader()
    every = max(1, len(loader) // SAMPLES)
    start = _settled()
    most = start.anonymous
    first, batches = 0.0, 0
    began = time.perf_counter()
    for number, _batch in enumerate(loader):
        if not number:
            first = time.perf_counter() - began
        if number % every == 0:
            most = max(most, Memory.now().anonymous)
        batches += 1
    epoch = time.perf_counter() - began
    del _batch
    end = _settled()
    report = data.report["train"]
    data.teardown()
    return LoadingCost(
        rows=case.rows,
        cached=cached,
        bytes=case.file.stat().st_size,
        stored=sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()),
        tokens=sum(report.lengths),
        read=read,
        tokenize=tokenize,
        text=loaded.anonymous - before.anonymous,
        encoded=encoded.anonymous - loaded.anonymous,
        first=first,
        epoch=epoch,
        batches=batches,
        growth=most - start.anonymous,
        left=end.anonymous - start.anonymous,
        mapped=end.file - start.file,
    )


def warm_up(folder: Path) -> None:
    """Use the data module once, so that what libraries load at first use doesn't count as the rows' cost."""
    few = [{"input": f"{n} + 1?", "output": str(n + 1)} for n in range(16)]
    data = PairDataModule(few, tokenizer=tokenizer(), cache_dir=str(folder / f"warm {time.time_ns()}"))
    data.setup("fit")
    for _ in data.train_dataloader():
        pass
    data.teardown()


def _settled() -> Memory:
    """Current memory after freed blocks are returned to the system, which new rows would reuse unnoticed."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    return Memory.now()


def by_rows(options: Any) -> list[LoadingCost]:
    """Measure and print the cost of loading for each number of rows."""
    found: list[LoadingCost] = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for count in options.rows:
            if options.only not in f"{count:,}":
                continue
            case = Case(folder, count, options.batches[0], options.workers)
            write_rows(case)
            for _ in ("empty cache", "full cache"):
                with context.Pool(1) as pool:
                    found.append(pool.apply(measure_loading, (case,)))
    print(f"\n## Number of rows\n\nBatches of {options.batches[0]}, {options.workers} workers\n")

    def mib(count: float) -> str:
        return f"{count / MIB:,.1f}"

    times = [
        [
            str(one),
            mib(one.bytes),
            f"{one.tokens:,}",
            f"{one.read:.2f}",
            f"{one.tokenize:.2f}",
            f"{one.rows / (one.read + one.tokenize):,.0f}",
            f"{1e3 * one.first:.1f}",
            f"{one.batches / one.epoch:,.0f}",
        ]
        for one in found
    ]
    head = ["", "file MiB", "tokens", "read and check s", "tokenize s", "rows/s", "first batch ms", "batches/s"]
    print("\n".join(markdown_table(head, times)))
    print("\nMemory of the process, MiB:\n")
    memory = [
        [
            str(one),
            mib(one.text),
            f"{one.text / one.bytes:.1f}",
            mib(one.encoded),
            mib(one.stored),
            mib(one.growth),
            mib(one.left),
            mib(one.mapped),
        ]
        for one in found
    ]
    head = [
        "",
        "rows as text",
        "relative to file",
        "added by tokenizing",
        "cache on disk",
        "peak added by an epoch",
        "left after it",
        "mapped by it",
    ]
    print("\n".join(markdown_table(head, memory)), flush=True)
    return found
