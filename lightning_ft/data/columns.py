"""Row formats, told apart by their columns, and what to say where columns have other names."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_ft.data.turns import RowError
from lightning_ft.errors import ConfigError

OPTIONAL = ("id", "cluster", "system")
"""Fields that a row of any format may have."""


@dataclass(frozen=True)
class Formats:
    """Row formats that are told apart by their fields.

    Args:
        needed: Format to the fields it needs, what is asked first and what answers it last, in the order they are
            looked for.
        extra: Format to the fields that only it may have besides.
    """

    needed: Mapping[str, tuple[str, ...]]
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def fields(self, name: str) -> tuple[str, ...]:
        """All fields that a format knows."""
        return (*self.needed[name], *self.extra.get(name, ()), *OPTIONAL)

    def detect(
        self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None, *, answered: bool = True
    ) -> str:
        """The format most rows have the fields of; where no row has them all, the one they come closest to.

        Args:
            rows: The first rows of a source.
            columns: The format's field names to those in the data; naming a field excludes formats that don't have it.
            answered: Whether rows must have an answer.

        Raises:
            ConfigError: For a field that no format has, or fields of no one format.

        Example:
            >>> formats = Formats({"pair": ("input", "output"), "text": ("text",)})
            >>> formats.detect([{"question": "2+2?", "output": "4"}], {"input": "question"})
            'pair'
        """
        candidates = self._candidates(columns)
        votes: Counter[str] = Counter()
        for row in rows:
            for name, fields in candidates.items():
                if all(field in row for field in fields):
                    votes[name] += 1
                    break
            else:
                votes.update(name for name, fields in candidates.items() if not answered and fields[0] in row)
        if votes:
            return max(candidates, key=lambda name: votes[name])

        def closeness(name: str) -> float:
            found = {str(key) for row in rows[:1] for key in row}
            best = [
                max((difflib.SequenceMatcher(None, f, key).ratio() for key in found), default=0.0)
                for f in candidates[name]
            ]
            return sum(best) / len(best)

        return max(candidates, key=closeness)

    def _candidates(self, columns: Mapping[str, str] | None) -> dict[str, list[str]]:
        """Formats that `columns` leaves possible, with the fields they need as the data names them."""
        columns = columns or {}
        known = {field for name in self.needed for field in self.fields(name)}
        for given in columns:
            if given not in known:
                near = difflib.get_close_matches(given, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"columns: no format has a field {given!r}.{hint} Known: {', '.join(sorted(known))}.")
        possible = {
            name: [columns.get(field, field) for field in fields]
            for name, fields in self.needed.items()
            if set(columns) <= set(self.fields(name))
        }
        if not possible:
            named = ", ".join(sorted(set(columns) - set(OPTIONAL)))
            raise ConfigError(f"columns: no one format has the fields {named}.")
        return possible

    def missing(self, row: Mapping[str, Any], name: str, wanted: str, columns: Mapping[str, str]) -> RowError:
        """What to say of a field that isn't there.

        Args:
            row: The row.
            name: The format that rows have.
            wanted: The field of the format.
            columns: The format's field names to those in the data.
        """
        column = columns.get(wanted, wanted)
        used = {columns.get(known, known) for known in self.fields(name)}
        spare = [str(key) for key in row if key not in used]
        near = difflib.get_close_matches(column, spare, n=1, cutoff=0.5)
        fix = f"Rename {near[0]!r}, or pass" if near else "Add it, or pass"
        fix += f" columns={{{wanted!r}: {near[0]!r}}}." if near else f" columns={{{wanted!r}: ...}}."
        return RowError(column, "missing field", f"fields: {', '.join(map(str, row)) or 'none'}", fix)
