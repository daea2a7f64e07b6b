"""How cost grows with the length of sequences, with the spread of lengths, and with the number of rows.

    OMP_NUM_THREADS=2 python benchmarks/scaling.py --json scaling.json
    python benchmarks/scaling.py --parts packing --only "batch 32" --pairs 3
    python benchmarks/scaling.py --parts rows --rows 1000,10000,100000
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --small --threads 1 --pairs 1

- ``length``: supervised LoRA steps with a fixed number of tokens, split into sequences of equal length.
- ``packing``: supervised LoRA steps with log-normal lengths, by layout. ``packed`` is this project's default
  (`collate_examples`) and ``padded`` its alternative, one row per sequence. For comparison, ``row`` concatenates all
  sequences in one row, ``filled`` fills rows as long as the longest sequence by first fit, and ``sorted`` pads
  sequences of similar lengths (sorted over all steps, so it wouldn't be the same training).
- ``rows``: a JSONL file of generated pairs through PairDataModule, with an empty and with a full cache, each in a fresh
  process: time, memory that loading takes, and memory that an epoch of the loader adds. Memory-mapped pages of the
  cache count as resident once they are read, although the system can reclaim them, so they are listed separately.

Layouts are measured alternately, each in its own process.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from harness import arguments, machine, write_json
from models import Size
from scaling_length import by_length
from scaling_packing import by_layout
from scaling_rows import by_rows


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = arguments(__doc__)
    parser.add_argument("--parts", default="length,packing,rows", help="parts to measure, separated by commas")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step in the part `length`")
    parser.add_argument(
        "--lengths", type=numbers, default=[256, 512, 1024, 2048, 4096], help="sequence lengths in the part `length`"
    )
    parser.add_argument(
        "--batches",
        type=numbers,
        default=[8, 32],
        help="sequences per batch in the part `packing`; the part `rows` uses the first",
    )
    parser.add_argument(
        "--spreads",
        type=lambda text: list(map(float, text.split(","))),
        default=[0.6, 1.0],
        help="standard deviations of the lengths' logarithm in the part `packing`",
    )
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps per repetition")
    parser.add_argument(
        "--rows", type=numbers, default=[1_000, 10_000, 100_000], help="numbers of rows in the part `rows`"
    )
    parser.add_argument("--workers", type=int, default=0, help="worker processes of the loader in the part `rows`")
    parser.add_argument("--small", action="store_true", help="small sizes, as a quick check that everything runs")
    options = parser.parse_args()
    size = Size()
    if options.small:
        size = Size(2000, 64, 2)
        options.tokens, options.lengths, options.rows = 512, [128, 512], [200, 2000]
        options.batches, options.spreads = [4, 8], [0.6]
    wanted = options.parts.split(",")
    results: dict[str, Any] = {"machine": machine(options.threads)}
    for name, measure in (
        ("length", lambda: by_length(options, size)),
        ("packing", lambda: by_layout(options, size)),
        ("rows", lambda: by_rows(options)),
    ):
        if name in wanted:
            results[name] = [asdict(one) for one in measure()]
            write_json(results, options.json)  # after each part: a later one may run out of memory


if __name__ == "__main__":
    main()
