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
        ("length", lambda: by_length(options, size)),
        ("packing", lambda: by_layout(options, size)),
        ("rows", lambda: by_rows(options)),
    ):
        if name in wanted:
            results[name] = [asdict(one) for one in measure()]
            write_json(results, options.json)  # after each: a later one may need more memory than there is


if __name__ == "__main__":
    main()
