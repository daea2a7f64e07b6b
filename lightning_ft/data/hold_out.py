"""A share of the training rows, held out for validation."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ft.data.groups import choose_groups, describe_group, group_rows, wanted_rows
from lightning_ft.data.kinds import RowT
from lightning_ft.errors import DataError
from lightning_ft.rank_zero import rank_zero_warn


def hold_out(parts: Sequence[Sequence[RowT]], share: float, seed: int) -> tuple[list[list[RowT]], list[RowT]]:
    """Hold out a share of the training rows, those of one question, conversation or cluster together.

    Warns if the share can't be met, and if there are more rows of one group than were asked for.

    Args:
        parts: The training rows, by source.
        share: The share of all rows to hold out, between 0 and 1; see `lightning_ft.data.groups.choose_groups`.
        seed: Decides which.

    Returns:
        The rows that are left, by source, and those held out.

    Raises:
        DataError: If all rows belong together.
    """
    rows = [row for part in parts for row in part]
    groups = group_rows(rows)
    if len(groups) < 2:
        raise DataError(_nothing_to_hold_out(rows, share))
    chosen = choose_groups([len(group) for group in groups], share, seed)
    out = {i for k in chosen for i in groups[k]}
    _tell(rows, share, len(out), [rows[i] for i in max(groups, key=len)])
    positions = iter(range(len(rows)))
    left = [[row for row in part if next(positions) not in out] for part in parts]
    return left, [rows[i] for i in sorted(out)]


def _nothing_to_hold_out(rows: Sequence[RowT], share: float) -> str:
    if len({row.key for row in rows}) < 2:
        return f"validation={share} of train: there are fewer than two different rows to share out."
    remedy = ", or let columns= name another cluster" if any(row.cluster for row in rows) else ""
    return (
        f"validation={share} of train: all {len(rows):,} rows belong to {describe_group(rows)}, so none can be held "
        f"out that isn't trained on in another row. Pass validation= rows of their own{remedy}."
    )


def _tell(rows: Sequence[RowT], share: float, held: int, largest: Sequence[RowT]) -> None:
    wanted = wanted_rows(len(rows), share)
    missed = abs(held - wanted) > max(1, wanted / 10)
    if not missed and len(largest) <= max(2, wanted):
        return
    found = f"{held:,} of {len(rows):,} rows are held out" + (f", {wanted:,} were asked for" if missed else "")
    rank_zero_warn(
        f"validation={share} of train: {found}. Rows of one question, conversation or cluster are kept together, and "
        f"{len(largest):,} belong to {describe_group(largest)}. To hold out others, change the share, or pass "
        "validation= rows of their own."
    )
