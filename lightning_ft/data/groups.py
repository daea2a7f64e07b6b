"""Group rows that belong in the same split, and hold out a share of the groups."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence

from lightning_ft.data.overlap import row_questions
from lightning_ft.data.row_store import ChainedRows, SelectedRows
from lightning_ft.data.row_types import Row, RowT
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import DataError

_EXACT = 8_192
"""Number of rows of a held-out share that are chosen exactly; those before them are taken as drawn."""

_SHOWN = 60  # characters of a question in a message


def group_rows(rows: Sequence[Row]) -> list[list[int]]:
    """Groups of rows that belong in the same split.

    Two rows belong together if they have the same question (see `lightning_ft.data.overlap.question_keys`) or the same
    cluster, if the question of one is the start of the other's conversation, or if both belong together with a third
    row. The time is linear in the number of turns of all rows.

    Args:
        rows: ``n`` checked rows.

    Returns:
        Indices of each group's rows, ``n`` in all, in the order of their first rows.
    """
    roots = list(range(len(rows)))

    def root(i: int) -> int:
        while roots[i] != i:
            roots[i] = roots[roots[i]]
            i = roots[i]
        return i

    questions = [row_questions(row) for row in rows]
    first_row: dict[Hashable, int] = {}  # question to the first row that has it
    of_cluster: dict[str, int] = {}
    for i, (row, keys) in enumerate(zip(rows, questions, strict=True)):
        roots[root(i)] = root(first_row.setdefault(keys[-1], i))
        if row.cluster:
            roots[root(i)] = root(of_cluster.setdefault(row.cluster, i))
    for i, keys in enumerate(questions):
        for key in keys[:-1]:
            if key in first_row:
                roots[root(i)] = root(first_row[key])
    groups: dict[int, list[int]] = {}
    for i in range(len(rows)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def choose_groups(sizes: Sequence[int], share: float, seed: int) -> set[int]:
    """Draw groups whose total number of rows is as close to a share of all rows as possible.

    At least one group is drawn and at least one is left. Of two equally close totals, the smaller one is taken. Where
    every group is one row, it is a plain random sample.

    Args:
        sizes: Number of rows of each group, at least two groups.
        share: Share of all rows to draw, between 0 and 1.
        seed: Seed of the draw.

    Returns:
        Indices of the drawn groups in `sizes`.

    Example:
        >>> sizes = [5, 3, 2, 2]
        >>> sorted(sizes[k] for k in choose_groups(sizes, 0.34, seed=0))
        [2, 2]
    """
    draw, rows = random.Random(seed), sum(sizes)
    first = draw.sample(range(len(sizes)), min(len(sizes) - 1, max(1, round(len(sizes) * share))))
    others = sorted({*range(len(sizes))}.difference(first))
    order = [*first, *draw.sample(others, len(others))]
    left = rows_to_hold_out(rows, share)
    chosen: set[int] = set()
    for k in order:
        if left - sizes[k] >= _EXACT:
            chosen.add(k)
            left -= sizes[k]
    return chosen | _closest(
        {k: sizes[k] for k in order if k not in chosen},
        left,
        most=left + rows - rows_to_hold_out(rows, share) - 1,
        least=0 if chosen else 1,
    )


def rows_to_hold_out(rows: int, share: float) -> int:
    """Number of rows that a share amounts to: at least one, and at least one is left."""
    return min(rows - 1, max(1, round(rows * share)))


def _closest(sizes: dict[int, int], target: int, *, most: int, least: int) -> set[int]:
    """Groups whose sizes add up to a number, or come as close to it as possible.

    `reachable` has bit ``s`` set if some of the groups seen so far have ``s`` rows in all. A group of size ``g`` makes
    ``s + g`` reachable for each such ``s``. The first group to reach a number is kept, and leads back to the groups::

        sizes 3, 2, 2:  {0} -> {0, 3} -> {0, 2, 3, 5} -> {0, 2, 3, 4, 5, 7};  4 = 2 (third) + 2 (second)

    Args:
        sizes: Sizes by group, in the order of preference.
        target: Number of rows.
        most: Maximum number of rows.
        least: Minimum number of rows.
    """
    limit = min(2 * target, most)  # a larger total would be farther away than no row at all
    within, reachable = (1 << (limit + 1)) - 1, 1
    reached_by: dict[int, int] = {}
    for group, size in sizes.items():
        new = (reachable << size) & within & ~reachable if size <= limit else 0
        reachable |= new
        while new:
            lowest = new & -new
            reached_by[lowest.bit_length() - 1] = group
            new ^= lowest
        if reachable >> target & 1:
            break
    below = (reachable & ((1 << (target + 1)) - 1)).bit_length() - 1
    rest = reachable >> (target + 1)
    above = target + (rest & -rest).bit_length() if rest else None
    if below < least and above is None:  # every group is larger than twice the target
        return {min(sizes, key=lambda group: sizes[group])}
    total = below if below >= least and (above is None or target - below <= above - target) else above
    chosen: set[int] = set()
    while total:
        chosen.add(reached_by[total])
        total -= sizes[reached_by[total]]
    return chosen


def describe_group(rows: Sequence[Row]) -> str:
    """What the rows of a group have in common, for a message.

    Args:
        rows: Rows of one group.

    Returns:
        A phrase such as ``the cluster 'x'`` or ``the question 'Where is my parcel?'``.
    """
    clusters = Counter(row.cluster for row in rows if row.cluster)
    if clusters and clusters.most_common(1)[0][1] == len(rows):
        return f"the cluster {_short(next(iter(clusters)))}"
    questions = [row_questions(row) for row in rows]
    if len({keys[-1] for keys in questions}) == 1:
        return f"the question {_question(rows[0])}"
    if len({keys[0] for keys in questions}) == 1:
        return f"the conversation that begins with {_opening(rows[0])}"
    if clusters:
        name, count = clusters.most_common(1)[0]
        return f"clusters and questions that lead from one to the next, such as the cluster {_short(name)} ({count:,})"
    key, count = Counter(keys[0] for keys in questions).most_common(1)[0]
    example = next(row for row, keys in zip(rows, questions, strict=True) if keys[0] == key)
    return f"questions that lead from one to the next, such as {_opening(example)} ({count:,})"


def _users(row: Row) -> list[str]:
    return [str(message["content"]) for message in row.prompt_messages if message["role"] == "user"]


def _question(row: Row) -> str:
    users = _users(row)
    return _short(users[-1]) if users else f"of {row.source}, row {row.row}"


def _opening(row: Row) -> str:
    users = _users(row)
    return _short(users[0]) if users else f"{row.source}, row {row.row}"


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= _SHOWN else flat[: _SHOWN - 3] + "...")


def hold_out(parts: Sequence[Sequence[RowT]], share: float, seed: int) -> tuple[list[Sequence[RowT]], Sequence[RowT]]:
    """Hold out a share of the training rows, keeping those of one question, conversation or cluster together.

    Warns if the share can't be met, or if one group has more rows than are to be held out.

    Args:
        parts: The training rows, by source.
        share: Share of all rows to hold out, between 0 and 1; see `choose_groups`.
        seed: Seed that decides which.

    Returns:
        The remaining rows, by source, and the held-out rows.

    Raises:
        DataError: If all rows belong together.
    """
    rows = ChainedRows(parts)
    groups = group_rows(rows)
    if len(groups) < 2:
        raise DataError(_nothing_to_hold_out(rows, share))
    chosen = choose_groups([len(group) for group in groups], share, seed)
    out = {i for k in chosen for i in groups[k]}
    _warn_of_groups(rows, share, len(out), [rows[i] for i in max(groups, key=len)])
    left: list[Sequence[RowT]] = []
    start = 0
    for part in parts:
        left.append(SelectedRows(part, [i for i in range(len(part)) if start + i not in out]))
        start += len(part)
    return left, SelectedRows(rows, sorted(out))


def _nothing_to_hold_out(rows: Sequence[RowT], share: float) -> str:
    if len({row.key for row in rows}) < 2:
        return f"validation={share} of train: there are fewer than two different rows, too few to hold one out."
    remedy = ", or name another cluster in columns=" if any(row.cluster for row in rows) else ""
    return (
        f"validation={share} of train: all {len(rows):,} rows belong to {describe_group(rows)}, so every "
        f"held-out row would also be trained on. Pass separate rows as validation={remedy}."
    )


def _warn_of_groups(rows: Sequence[RowT], share: float, held: int, largest: Sequence[RowT]) -> None:
    target = rows_to_hold_out(len(rows), share)
    missed = abs(held - target) > max(1, target / 10)
    if not missed and len(largest) <= max(2, target):
        return
    result = f"{held:,} of {len(rows):,} rows are held out" + (f" instead of {target:,}" if missed else "")
    rank_zero_warn(
        f"validation={share} of train: {result}. Rows of one question, conversation or cluster are kept together, and "
        f"{len(largest):,} belong to {describe_group(largest)}. To hold out others, change the share, or pass "
        "separate rows as validation=."
    )
