"""Which rows are in a batch, for messages: they are found again from the plan of batches, so no batch carries them."""

from __future__ import annotations

from typing import Any

from lightning_ft.data.loader import TokenLoader
from lightning_ft.data.splits import SplitName, Splits

_SHOWN = 20


def name_rows(loader: TokenLoader, splits: Splits[Any], split: SplitName, epoch: int, batch: int) -> str:
    """The rows of a batch of this rank, by their sources.

    Args:
        loader: Gave the batch.
        splits: The rows.
        split: Which of them the loader gives.
        epoch: The epoch of the loader's order.
        batch: Number of the batch in the epoch.

    Example:
        >>> from lightning_ft import PairDataModule
        >>> from transformers import AutoTokenizer
        >>> rows = [{"input": f"{n} + 1?", "output": str(n + 1)} for n in range(5)]
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/tiny_base")
        >>> data = PairDataModule(rows, tokenizer=tokenizer, shuffle=False, batch_size=2, cache_dir=False)
        >>> data.setup("fit")
        >>> name_rows(data.train_dataloader(), data.splits, "train", epoch=0, batch=1)
        'rows 3, 4 of train'
    """
    rows = loader.plan.rows(loader.plan.order(epoch), batch)
    origins = [row for part in splits.rows.get(split, []) for row in part]
    sources: dict[str, list[str]] = {}
    for number in rows[:_SHOWN]:
        origin = origins[number]
        sources.setdefault(origin.source, []).append(f"{origin.row:,}")
    named = "; ".join(f"rows {', '.join(numbers)} of {source}" for source, numbers in sources.items())
    return named + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
