"""Rows that belong in the same split, and which of them are held out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence

from lightning_ft.data.overlap import row_questions
from lightning_ft.data.row_types import Row, RowT
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import DataError

_EXACT = 8_192
"""The last so many rows of a held-out share are chosen exactly, those before them as they are drawn."""

_SHOWN = 60  # characters of a question in a message


def group_rows(rows: Sequence[Row]) -> list[list[int]]:
    """Which rows belong in the same split.

    Two rows do if they have the same question (see `lightning_ft.data.overlap.question_keys`) or the same cluster, or
    if the question of one is the start of the other's conversation; and so do two that both belong with a third.
    Linear in the number of turns of all rows.

    Args:
        rows: Checked rows, ``n``.

    Returns:
        The positions of each group's rows, ``n`` in all, in the order of their first rows.
    """
    roots = list(range(len(rows)))

    def root(i: int) -> int:
        while roots[i] != i:
            roots[i] = roots[roots[i]]
            i = roots[i]
        return i

    questions = [row_questions(row) for row in rows]
    asking: dict[Hashable, int] = {}  # a question to the first row that asks it
    of_cluster: dict[str, int] = {}
    for i, (row, keys) in enumerate(zip(rows, questions, strict=True)):
        roots[root(i)] = root(asking.setdefault(keys[-1], i))
        if row.cluster:
            roots[root(i)] = root(of_cluster.setdefault(row.cluster, i))
    for i, keys in enumerate(questions):
        for key in keys[:-1]:
            if key in asking:
                roots[root(i)] = root(asking[key])
    groups: dict[int, list[int]] = {}
    for i in range(len(rows)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def choose_groups(sizes: Sequence[int], share: float, seed: int) -> set[int]:
    """Draw groups whose rows come as close to a share of all rows as the groups allow.

    At least one group is drawn and at least one is left. Of two equally close numbers of rows it is the smaller one.
    Where every group is one row, it is a plain draw of so many rows.

    Args:
        sizes: Rows of each group, at least two groups.
        share: The share of all rows to draw, between 0 and 1.
        seed: Of the draw.

    Returns:
        Positions in `sizes`.

    Example:
        >>> sizes = [5, 3, 2, 2]
        >>> sorted(sizes[k] for k in choose_groups(sizes, 0.34, seed=0))
        [2, 2]
    """
    draw, rows = random.Random(seed), sum(sizes)
    first = draw.sample(range(len(sizes)), min(len(sizes) - 1, max(1, round(len(sizes) * share))))
    others = sorted({*range(len(sizes))}.difference(first))
    order = [*first, *draw.sample(others, len(others))]
    left = wanted_rows(rows, share)
    chosen: set[int] = set()
    for k in order:
        if left - sizes[k] >= _EXACT:
            chosen.add(k)
            left -= sizes[k]
    return chosen | _closest(
        {k: sizes[k] for k in order if k not in chosen},
        left,
        most=left + rows - wanted_rows(rows, share) - 1,
        least=0 if chosen else 1,
    )


def wanted_rows(rows: int, share: float) -> int:
    """The number of rows that a share asks for: at least one, and one is left."""
    return min(rows - 1, max(1, round(rows * share)))


def _closest(sizes: dict[int, int], wanted: int, *, most: int, least: int) -> set[int]:
    """Groups whose sizes add up to a number, or as close to it as they can.

    `reachable` has bit ``s`` set if some of the groups seen so far have ``s`` rows in all. A group of size ``g`` makes
    ``s + g`` reachable for each such ``s``; who made a number reachable first is kept, and leads back to the groups::

        sizes 3, 2, 2:  {0} -> {0, 3} -> {0, 2, 3, 5} -> {0, 2, 3, 4, 5, 7};  4 = 2 (third) + 2 (second)

    Args:
        sizes: By group, in the order in which they are preferred.
        wanted: Rows.
        most: They may be no more.
        least: They must be at least.
    """
    limit = min(2 * wanted, most)  # nothing beyond is closer than no row at all
    within, reachable = (1 << (limit + 1)) - 1, 1
    by: dict[int, int] = {}
    for group, size in sizes.items():
        new = (reachable << size) & within & ~reachable if size <= limit else 0
        reachable |= new
        while new:
            lowest = new & -new
            by[lowest.bit_length() - 1] = group
            new ^= lowest
        if reachable >> wanted & 1:
            break
    below = (reachable & ((1 << (wanted + 1)) - 1)).bit_length() - 1
    rest = reachable >> (wanted + 1)
    above = wanted + (rest & -rest).bit_length() if rest else None
    if below < least and above is None:  # every group is larger than twice what is wanted
        return {min(sizes, key=lambda group: sizes[group])}
    total = below if below >= least and (above is None or wanted - below <= above - wanted) else above
    chosen: set[int] = set()
    while total:
        chosen.add(by[total])
        total -= sizes[by[total]]
    return chosen


def describe_group(rows: Sequence[Row]) -> str:
    """What the rows of a group have in common, for a message.

    Args:
        rows: Of one group.

    Returns:
        Such as ``cluster 'x'``, ``the question 'Where is my parcel?'``.
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
    some = next(row for row, keys in zip(rows, questions, strict=True) if keys[0] == key)
    return f"questions that lead from one to the next, such as {_opening(some)} ({count:,})"


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
