"""What rows cost on their way from a file to batches, by their number (see `scaling.py`)."""

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
"""How often memory is looked at during an epoch."""


@dataclass(frozen=True)
class Memory:
    """Resident bytes of this process.

    Args:
        anonymous: Its own.
        file: Pages of files: of memory-mapped caches, and of libraries.
    """

    anonymous: int
    file: int

    @classmethod
    def now(cls) -> Memory:
        """As the system tells it."""
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        anonymous, file = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
        return cls(anonymous, file)


@dataclass(frozen=True)
class Case:
    """A file.

    Args:
        folder: Holds the file and the cache.
        rows: How many.
        batch: Rows of a batch.
        workers: Of the loader.
    """

    folder: str
    rows: int
    batch: int
    workers: int

    @property
    def file(self) -> Path:
        """The rows."""
        return Path(self.folder) / f"{self.rows}.jsonl"


@dataclass(frozen=True)
class Passage:
    """What a file cost in a fresh process.

    Args:
        rows: How many.
        cached: Whether they had been tokenised before.
        bytes: Of the file.
        stored: Of the cache's entry.
        tokens: Of all rows.
        read: Seconds to read and check the rows.
        tokenise: Seconds to tokenise them, or to find them in the cache.
        text: Own memory that the rows took.
        encoded: Own memory that tokenising them, or the cache, added.
        first: Seconds until the first batch.
        epoch: Seconds of an epoch of the loader.
        batches: Of it.
        growth: The most own memory that it added while it ran.
        left: What of it was left at its end.
        mapped: Pages of files that it added.
    """

    rows: int
    cached: bool
    bytes: int
    stored: int
    tokens: int
    read: float
    tokenise: float
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
    """Pairs of words that the tokenizer was trained on, with log-normal lengths, no two of them the same."""
    text = Path(TOKENIZER, "general.jsonl").read_text()
    words = sorted({word for line in text.splitlines() for word in json.loads(line)["text"].split() if word.isalpha()})
    generator = torch.Generator().manual_seed(case.rows)
    asked, answered = (lengths(case.rows, count, 0.6, generator) for count in mean)
    with case.file.open("w") as file:
        for number, (prompt, answer) in enumerate(zip(asked, answered, strict=True)):
            drawn = torch.randint(len(words), (prompt + answer,), generator=generator).tolist()
            row = {
                "input": f"{number} " + " ".join(words[i] for i in drawn[:prompt]),
                "output": " ".join(words[i] for i in drawn[prompt:]),
            }
            file.write(json.dumps(row) + "\n")


def passage(case: Case) -> Passage:
    """Read, tokenise, and go through the loader once; in a process that did nothing before."""
    quiet()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        return _passage(case)


def _passage(case: Case) -> Passage:
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
    tokenise = time.perf_counter() - started
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
    return Passage(
        rows=case.rows,
        cached=cached,
        bytes=case.file.stat().st_size,
        stored=sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()),
        tokens=sum(report.lengths),
        read=read,
        tokenise=tokenise,
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
    """Load whatever libraries load at first use, so that it isn't counted as the rows'."""
    few = [{"input": f"{n} + 1?", "output": str(n + 1)} for n in range(16)]
    data = PairDataModule(few, tokenizer=tokenizer(), cache_dir=str(folder / f"warm {time.time_ns()}"))
    data.setup("fit")
    for _ in data.train_dataloader():
        pass
    data.teardown()


def _settled() -> Memory:
    """Memory without what was freed already: else rows would seem to take none while they fill the gaps."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    return Memory.now()


def by_rows(options: Any) -> list[Passage]:
    """The data path against the number of rows."""
    found: list[Passage] = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for count in options.rows:
            if options.only not in f"{count:,}":
                continue
            case = Case(folder, count, options.batches[0], options.workers)
            write_rows(case)
            for _ in ("with an empty cache", "with a full one"):
                with context.Pool(1) as pool:
                    found.append(pool.apply(passage, (case,)))
    print(f"\n## Number of rows\n\nBatches of {options.batches[0]}, {options.workers} workers\n")

    def mib(count: float) -> str:
        return f"{count / MIB:,.1f}"

    times = [
        [
            str(one),
            mib(one.bytes),
            f"{one.tokens:,}",
            f"{one.read:.2f}",
            f"{one.tokenise:.2f}",
            f"{one.rows / (one.read + one.tokenise):,.0f}",
            f"{1e3 * one.first:.1f}",
            f"{one.batches / one.epoch:,.0f}",
        ]
        for one in found
    ]
    head = ["", "file MiB", "tokens", "read and check s", "tokenise s", "rows/s", "first batch ms", "batches/s"]
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
        "of the file",
        "tokenising added",
        "cache on disk",
        "most added by an epoch",
        "left of it",
        "mapped by it",
    ]
    print("\n".join(markdown_table(head, memory)), flush=True)
    return found
