"""What the rows of a batch cost on a device, by which layouts are chosen.

Matrix products cost the same for each position. Attention under a mask computes every pair of positions of a row, and
masks what isn't seen, so that a long row of several sequences costs more than short ones:

    2 rows of 1,000      2 x 1,000 x (square + 1,000)
    1 row of 2,000       1 x 2,000 x (square + 2,000)

where `square` is the length at which a position costs as much in attention as in products. It depends on the device and
on the width of the model. Kernels that compute only what is seen (FlashAttention with boundaries, FlexAttention with a
block mask) have no such cost: one row without padding is best.
"""

from __future__ import annotations

from dataclasses import dataclass

SQUARE = 1500
"""Number of positions that cost as much in attention as one position costs in matrix products, where neither the device
nor the width of the model is known; measured on a CPU at width 256."""

SQUARE_PER_WIDTH: dict[str, float] = {"cpu": 6.0}
"""The same, divided by the width of the model, by type of device. Set that of your device if you have measured it, as
`make gpu-check` does on a GPU."""

COUNTED_PER_WIDTH = 6.0
"""The same for devices on which it hasn't been measured: products of a layer take about ``24 d^2`` operations per
position of width `d`, and attention ``4 d`` per position and position that it sees. (A CPU's is the same.)"""

MULTIPLE: dict[str, int] = {"cuda": 16}
"""Number of positions that the length of rows under a dense mask is a multiple of, by type of device. On CUDA, SDPA
would copy a mask of another length into a padded one in every layer."""


@dataclass(frozen=True)
class RowCosts:
    """Constants that layouts depend on.

    Args:
        square: Number of positions that cost as much in attention as one position costs in products; None if attention
            computes only what each token sees.
        multiple: Number of positions that the length of masked rows is a multiple of.
    """

    square: int | None = SQUARE
    multiple: int = 1

    @classmethod
    def of(cls, device_type: str, attention: str | None, width: int | None) -> RowCosts:
        """Constants of a device and a model.

        Args:
            device_type: Type of the device, such as ``cuda``.
            attention: Attention implementation, by transformers' name; None if unknown.
            width: Width of the model's hidden states; None if unknown.

        Example:
            >>> RowCosts.of("cpu", "sdpa", 1024)
            RowCosts(square=6144, multiple=1)
            >>> RowCosts.of("cuda", "sdpa", 1024).multiple
            16
            >>> RowCosts.of("cuda", "flex_attention", 1024)
            RowCosts(square=None, multiple=1)
        """
        if computes_seen_only(attention):
            return cls(None)
        per_width = SQUARE_PER_WIDTH.get(device_type, COUNTED_PER_WIDTH)
        square = SQUARE if width is None else round(per_width * width)
        return cls(square, MULTIPLE.get(device_type, 1) if attention == "sdpa" else 1)


def computes_seen_only(attention: str | None) -> bool:
    """Whether an attention implementation computes only what each token sees.

    Example:
        >>> computes_seen_only("flash_attention_2"), computes_seen_only("sdpa")
        (True, False)
    """
    return attention is not None and (attention == "flex_attention" or "flash" in attention)


def rows_cost(count: int, length: int, square: int | None = SQUARE) -> int:
    """Cost of `count` rows of `length` positions in a forward pass: that of products plus that of attention.

    Args:
        count: Number of rows.
        length: Number of positions of a row.
        square: See :class:`RowCosts`.
    """
    return count * length if square is None else count * length * (square + length)
