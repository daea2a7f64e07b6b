"""How cost grows: with the length of sequences, with how much they differ, and with how many there are.

    OMP_NUM_THREADS=2 python benchmarks/scaling.py --json scaling.json
    python benchmarks/scaling.py --parts packing --only "batch 32" --pairs 3
    python benchmarks/scaling.py --parts rows --rows 1000,10000,100000
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --small --threads 1 --pairs 1

- ``length``: supervised LoRA steps of equally many tokens, cut into sequences of one length.
- ``packing``: the same for log-normal lengths, by layout. ``packed`` is the project's (`collate_examples`) and
  ``padded`` its other one, a row for each sequence. To compare with, ``row`` lays all sequences side by side in one
  row, ``filled`` fills rows as long as the longest sequence, first fit, and ``sorted`` pads sequences of similar
  lengths (those of all steps in the order of their lengths, so it wouldn't be the same training).
- ``rows``: a JSONL file of generated pairs through PairDataModule, with an empty cache and with a full one, each in a
  fresh process: time, memory that loading takes, and what an epoch of the loader adds to it. Memory-mapped pages of the
  cache that were read count as resident, though the system takes them back at will: they are told apart.

Layouts are measured in turns, each in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import MIB, Ratio, Repeat, arguments, in_turns, machine, quiet
from models import TOKENIZER, Size, lengths, model, rows, tokenizer
from torch.utils.data import DataLoader

from lightning_ft import LoRAFineTuning
from lightning_ft._lightning import Trainer
from lightning_ft.data.layout import Example, Segment, TokenBatch, collate_examples, lay_out
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.report.markdown import markdown_table

SUPERVISED = 35 / 205
"""Share of a row that is supervised where all rows are equally long: that of `models.rows`."""
SAMPLES = 200
"""How often memory is looked at during an epoch."""


@dataclass(frozen=True)
class Case:
    """What is trained on.

    Args:
        size: Of the model.
        layout: ``packed``, ``padded``, ``row``, ``filled`` or ``sorted``.
        batch: Sequences of a step.
        steps: Of a repetition.
        length: Of every sequence; None for log-normal ones.
        spread: Standard deviation of the logarithm of the lengths.
        prompt: Mean length of the prompts of log-normal rows.
        answer: Of their answers.
    """

    size: Size
    layout: str
    batch: int
    steps: int
    length: int | None = None
    spread: float = 0.6
    prompt: int = 170
    answer: int = 35

    def examples(self) -> list[Example]:
        """The rows of a repetition."""
        count = self.batch * self.steps
        if self.length is None:
            return rows(count, self.size.vocabulary, prompt=self.prompt, answer=self.answer, spread=self.spread)
        generator = torch.Generator().manual_seed(0)
        supervised = torch.arange(self.length) >= round(self.length * (1 - SUPERVISED))
        return [
            Example(torch.randint(2, self.size.vocabulary, (self.length,), generator=generator), supervised)
            for _ in range(count)
        ]

    def batches(self) -> list[TokenBatch]:
        """The same, laid out."""
        examples = self.examples()
        if self.layout == "sorted":
            examples = sorted(examples, key=len)
        parts = [examples[start : start + self.batch] for start in range(0, len(examples), self.batch)]
        if self.layout == "filled":
            return [filled(part) for part in parts]
        if self.layout == "row":
            return [lay_out([[Segment(example, group=i) for i, example in enumerate(part)]]) for part in parts]
        return [collate_examples(part, packing=self.layout == "packed", pad_token_id=1) for part in parts]


def filled(examples: Sequence[Example]) -> TokenBatch:
    """Rows as long as the longest example, filled first fit, the longest first."""
    capacity = max(map(len, examples))
    made: list[list[Segment]] = []
    room: list[int] = []
    for group in sorted(range(len(examples)), key=lambda i: -len(examples[i])):
        size = len(examples[group])
        place = next((i for i, left in enumerate(room) if left >= size), None)
        if place is None:
            place = len(room)
            made.append([])
            room.append(capacity)
        made[place].append(Segment(examples[group], group=group))
        room[place] -= size
    return lay_out(made, pad_token_id=1)


def training(case: Case) -> Repeat:
    """Supervised LoRA steps under a Lightning Trainer; the learning rate is as good as 0: all repetitions are alike."""
    module = _Recording(
        model(case.size), tokenizer=tokenizer(), dtype="float32", learning_rate=1e-30, lr_schedule="constant"
    )
    module.configure_model()
    batches = case.batches()

    def repeat() -> dict[str, Any]:
        module.losses = []
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        places = sum(batch.input_ids.numel() for batch in batches)
        tokens = sum(batch.num_tokens for batch in batches)
        return {"loss": sum(module.losses), "tokens": tokens, "places": places}

    return repeat


class _Recording(LoRAFineTuning):
    """Keeps each step's summed loss."""

    losses: list[float]

    def training_step(self, batch: TokenBatch, batch_idx: int) -> torch.Tensor:
        """As ever."""
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


@dataclass(frozen=True)
class Cost:
    """What training on a layout costs.

    Args:
        case: What was trained on.
        seconds: Of a token, median.
        against: Time of the first layout to that of this one.
        flops: Of a token.
        excess: Peak resident bytes beyond the built module.
        padding: Share of places that hold no token.
        tokens: Of a step.
    """

    case: Case
    seconds: float
    against: Ratio
    flops: float
    excess: int
    padding: float
    tokens: float


def costs(cases: Sequence[Case], pairs: int, threads: int) -> list[Cost]:
    """Measure layouts of the same rows in turns.

    Raises:
        SystemExit: If they don't give the same loss.
    """
    measured = in_turns({case.layout: (training, case) for case in cases}, pairs=pairs, threads=threads)
    first = measured[cases[0].layout]
    found = []
    for case in cases:
        one = measured[case.layout]
        if abs(one.values["loss"] / first.values["loss"] - 1) > 1e-5 or one.values["tokens"] != first.values["tokens"]:
            raise SystemExit(f"{case}: {one.values}, but {cases[0].layout} gave {first.values}.")
        tokens = one.values["tokens"]
        found.append(
            Cost(
                case,
                median(one.seconds) / tokens,
                Ratio.of([a / b for a, b in zip(first.seconds, one.seconds, strict=True)]),
                one.flops / tokens,
                one.excess,
                1 - tokens / one.values["places"],
                tokens / case.steps,
            )
        )
    return found


def length_part(options: Any, size: Size) -> list[Cost]:
    """Cost of a token against the length of the sequences."""
    found: list[Cost] = []
    for length in options.lengths:
        case = Case(size, "packed", batch=max(1, options.tokens // length), steps=options.steps, length=length)
        if options.only in f"{length:,}":
            layouts = ("packed", "row") if case.batch > 1 else ("packed",)  # one sequence: the two are the same
            found += costs([replace(case, layout=name) for name in layouts], options.pairs, options.threads)
    print(f"\n## Length of sequences\n\n{size}, LoRA, {options.tokens:,} tokens a step, {options.threads} threads\n")
    table = [
        [
            f"{cost.case.length:,} {cost.case.layout}",
            f"{cost.case.batch}",
            f"{1e6 * cost.seconds:,.1f}",
            f"{cost.flops / 1e6:,.2f}",
            f"{cost.flops / cost.seconds / 1e9:.1f}",
            f"{cost.excess / MIB:,.0f}",
            str(cost.against) if cost.case.layout != "packed" else "",
        ]
        for cost in found
    ]
    head = ["length", "sequences", "us a token", "MFLOP a token", "GFLOP/s", "excess MiB", "speed against packed"]
    print("\n".join(markdown_table(head, table)), flush=True)
    return found


def packing_part(options: Any, size: Size) -> list[Cost]:
    """Speed of layouts for lengths that differ."""
    found: list[Cost] = []
    base = Case(size, "packed", 8, options.steps)
    if options.small:
        base = replace(base, prompt=40, answer=10)
    for batch in options.batches:
        for spread in options.spreads:
            case = replace(base, batch=batch, spread=spread)
            if options.only in f"batch {batch}, spread {spread}":
                layouts = ("packed", "padded", "row", "filled", "sorted")
                found += costs([replace(case, layout=name) for name in layouts], options.pairs, options.threads)
    print(
        f"\n## Packing\n\n{size}, LoRA, log-normal lengths: prompts of {base.prompt}, answers of {base.answer}, "
        f"{options.steps} steps, {options.threads} threads\n"
    )
    table = [
        [
            f"{cost.case.batch} sequences, spread {cost.case.spread:g}, {cost.case.layout}",
            f"{cost.tokens:,.0f}",
            f"{cost.padding:.1%}",
            f"{1 / cost.seconds:,.0f}",
            str(cost.against) if cost.case.layout != "packed" else "",
            f"{cost.flops / 1e6:,.2f}",
            f"{cost.excess / MIB:,.0f}",
        ]
        for cost in found
    ]
    head = ["batch", "tokens a step", "padding", "tokens/s", "speed against packed", "MFLOP a token", "excess MiB"]
    print("\n".join(markdown_table(head, table)), flush=True)
    return found


# ---------------------------------------------------------------- rows


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
class RowsCase:
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


def write_rows(case: RowsCase, mean: tuple[float, float] = (60, 12)) -> None:
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


def passage(case: RowsCase) -> Passage:
    """Read, tokenise, and go through the loader once; in a process that did nothing before."""
    quiet()
    torch.set_num_threads(1)
    cache = Path(case.folder) / f"cache {case.rows}"
    cached = cache.exists()
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        return _passage(case, cache, cached)


def _passage(case: RowsCase, cache: Path, cached: bool) -> Passage:
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


def rows_part(options: Any) -> list[Passage]:
    """The data path against the number of rows."""
    found: list[Passage] = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for count in options.rows:
            if options.only not in f"{count:,}":
                continue
            case = RowsCase(folder, count, options.batches[0], options.workers)
            write_rows(case)
            for _ in ("with an empty cache", "with a full one"):
                with context.Pool(1) as pool:
                    found.append(pool.apply(passage, (case,)))
    print(f"\n## Number of rows\n\nBatches of {options.batches[0]}, {options.workers} workers\n")

    def mib(count: float) -> str:
        return f"{count / MIB:,.1f}"

    times = [
        [
            f"{one.rows:,} rows, {'cached' if one.cached else 'cold'}",
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
            f"{one.rows:,} rows, {'cached' if one.cached else 'cold'}",
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


# ---------------------------------------------------------------- main


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = arguments(__doc__)
    parser.add_argument("--parts", default="length,packing,rows", help="which to measure")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step of the first part")
    parser.add_argument("--lengths", type=numbers, default=[256, 512, 1024, 2048, 4096], help="of its sequences")
    parser.add_argument(
        "--batches", type=numbers, default=[8, 32], help="sequences of a batch (of the last part, the first)"
    )
    parser.add_argument(
        "--spreads", type=lambda text: list(map(float, text.split(","))), default=[0.6, 1.0], help="of lengths"
    )
    parser.add_argument("--steps", type=int, default=2, help="of a repetition")
    parser.add_argument("--rows", type=numbers, default=[1_000, 10_000, 100_000], help="of the last part")
    parser.add_argument("--workers", type=int, default=0, help="of the loader")
    parser.add_argument("--small", action="store_true", help="sizes that only show whether it works")
    options = parser.parse_args()
    size = Size()
    if options.small:
        size = Size(2000, 64, 2)
        options.tokens, options.lengths, options.rows = 512, [128, 512], [200, 2000]
        options.batches, options.spreads = [4, 8], [0.6]
    wanted = options.parts.split(",")
    results: dict[str, Any] = {"machine": machine(options.threads)}
    for name, measure in (
        ("length", lambda: length_part(options, size)),
        ("packing", lambda: packing_part(options, size)),
        ("rows", lambda: rows_part(options)),
    ):
        if name in wanted:
            results[name] = [asdict(one) for one in measure()]
            if options.json is not None:  # after each: a later one may need more memory than there is
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
