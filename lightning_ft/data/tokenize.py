"""Encodes rows, or reads them from the cache, with a progress bar for many rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import track
from transformers import PreTrainedTokenizerBase

from lightning_ft.atomic_files import write_failure
from lightning_ft.data import cache
from lightning_ft.data.overlong import OnOverlong, RowEncoder
from lightning_ft.data.raw_rows import Problem
from lightning_ft.data.row_outcomes import outcomes
from lightning_ft.data.row_types import PAIRS, RowT, RowType
from lightning_ft.data.rows import is_rank_zero
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import LightningFTError

_SHOW_FROM = 2000  # number of rows from which a progress bar is shown


def tokenize(
    rows: Sequence[RowT],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    on_overlong: OnOverlong,
    folder: Path | None,
    label: str,
    row_type: RowType[Any] = PAIRS,
    num_workers: int = 0,
) -> tuple[cache.EncodedRows, list[Problem]]:
    """Encode rows.

    Args:
        rows: Rows to encode.
        tokenizer: The tokenizer.
        max_length: Maximum number of tokens per row.
        on_overlong: What happens to longer rows, see `PairDataModule`.
        folder: Folder of the cache; None for no cache.
        label: Text of the progress bar.
        row_type: Type of the rows.
        num_workers: Number of processes that encode rows; the result is the same with any.

    Returns:
        The encoded rows, and the problems of the others. ``about["other_prompt"]`` counts the encoded rows whose prompt
        differs from what generation starts from, ``about["mismatch"]`` shows the first of them, and ``about["notes"]``
        counts what the chat template changed.
    """
    key = cache.content_key(rows, tokenizer, row_type=row_type.name, max_length=max_length, on_overlong=on_overlong)
    encoded = cache.load(folder, key) if folder is not None else None
    if encoded is None:
        encoder = RowEncoder[RowT](tokenizer, max_length, on_overlong, row_type)
        try:
            encoded = _encode_all(rows, encoder, folder, key, label, num_workers)
        except OSError as error:
            if folder is None or isinstance(error, LightningFTError):
                raise
            rank_zero_warn(
                f"Tokenized rows can't be written to {str(folder)!r} ({write_failure(error) or error}), so they are "
                "kept in memory and tokenized again in the next run. Free some space, or pass another cache_dir=."
            )
            encoded = _encode_all(rows, encoder, None, key, label, num_workers)
    return encoded, [
        Problem(**{**problem, "source": rows[index].source, "row": rows[index].row})
        for index, problem in encoded.about["problems"]  # the origin of a row may have changed since it was cached
    ]


def _encode_all(
    rows: Sequence[RowT], encoder: RowEncoder[RowT], folder: Path | None, key: str, label: str, num_workers: int
) -> cache.EncodedRows:
    problems: list[tuple[int, Problem]] = []
    other_prompt, mismatch = 0, None
    notes: Counter[str] = Counter()
    progress = track(
        outcomes(rows, encoder, num_workers),
        description=f"Tokenizing {label}",
        total=len(rows),
        disable=len(rows) < _SHOW_FROM or not is_rank_zero(),
    )
    with cache.new_entry(folder, key) as entry:
        for index, result in enumerate(progress):
            if isinstance(result, Problem):
                problems.append((index, result))
                continue
            encoded, truncated = result
            other_prompt += not encoded.prompt_matches
            mismatch = mismatch or encoded.mismatch
            notes.update(encoded.notes)
            for example in encoded.examples:
                entry.writer.write(example, row=index, truncated=truncated)
        entry.about = {
            "problems": [[index, asdict(problem)] for index, problem in problems],
            "other_prompt": other_prompt,
            "mismatch": mismatch,
            "notes": notes,
        }
    assert entry.result is not None  # set at the end of the block
    return entry.result
