"""Row formats, told apart by their columns, and what to say where columns have other names."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_ft.data.column_advice import OF_TEXT, Column, Proposal, does, look_at, named_for, propose
from lightning_ft.data.keys import FOREIGN_COLUMNS
from lightning_ft.data.turns import RowError
from lightning_ft.errors import ConfigError

OPTIONAL = ("id", "cluster", "system", "tools", "chat_template_kwargs")
"""Fields that a row of any format may have."""

_NO_FORMAT = "no row format has these columns"
_LISTED = 20  # columns that an error lists


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
        """The format most rows have the fields of.

        Args:
            rows: The first rows of a source.
            columns: The format's field names to those in the data; naming a field excludes formats that don't have it.
            answered: Whether rows must have an answer.

        Raises:
            ConfigError: For a field that no format has, or fields of no one format.
            RowError: If no row has the fields of a format, or they can be read in two ways; it proposes `columns`.

        Example:
            >>> formats = Formats({"pair": ("input", "output"), "text": ("text",)})
            >>> formats.detect([{"question": "2+2?", "output": "4"}], {"input": "question"})
            'pair'
        """
        candidates = self._candidates(columns)
        if answered:
            self._check_named(rows, columns or {})
        votes: Counter[str] = Counter()
        for row in rows:
            for name, fields in candidates.items():
                if all(field in row for field in fields):
                    votes[name] += 1
                    break
            else:
                votes.update(name for name, fields in candidates.items() if not answered and fields[0] in row)
        if not rows:
            return next(iter(candidates))
        if not votes:
            raise self._no_format(rows, list(candidates), columns or {}, answered)
        name = max(candidates, key=lambda name: votes[name])
        if answered and not set(self.needed[name]) & set(columns or {}):
            self._check_one_meaning(rows, name, columns or {})
        return name

    def _check_named(self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
        """Refuse a misspelt column; one that is in no row may still be in another split.

        Raises:
            RowError: If no row has it, and they have one of nearly its name.
        """
        present = dict.fromkeys(str(key) for row in rows for key in row)
        for wanted, column in columns.items():
            near = [] if column in present else difflib.get_close_matches(column, present, n=1, cutoff=0.75)
            if near and near[0] not in columns.values():
                fix = f"Did you mean columns={dict(columns) | {wanted: near[0]}!r}?"
                raise RowError(
                    None, f"columns= names {column!r}, which no row has", f"columns: {', '.join(present)}", fix
                )

    def _propose(
        self, names: Sequence[str], found: Sequence[Column], columns: Mapping[str, str], answered: bool = True
    ) -> Proposal:
        needed = {name: self.needed[name] if answered else self.needed[name][:1] for name in names}
        extra = {name: (*self.extra.get(name, ()), *OPTIONAL) for name in names}
        return propose(needed, extra, found, columns)

    def _no_format(
        self, rows: Sequence[Mapping[str, Any]], names: Sequence[str], columns: Mapping[str, str], answered: bool
    ) -> RowError:
        """What to say of rows that have the fields of no format."""
        found = look_at(rows)
        detail, present = _listed(found), {column.name for column in found}
        absent = next((column for column in columns.values() if column not in present), None)
        if absent is not None:
            detail = f"columns= names {absent!r}, which no row has; {detail}"
        of_preferences = present & {"rejected", "rejected_response", "non_preferred_output"}
        if of_preferences and not any("rejected" in fields for fields in self.needed.values()):
            return RowError(None, _NO_FORMAT, detail, "Preferences are for a PreferenceDataModule.")
        best = self._propose(names, found, columns, answered)
        if not best.complete and (foreign := [name for name in FOREIGN_COLUMNS if name in present]):
            return RowError(None, _NO_FORMAT, detail, FOREIGN_COLUMNS[foreign[0]])
        fix = f"Pass {best.argument(columns)}"
        if best.guessed:
            fix += ", if " + " and ".join(f"{column!r} {does(field)}" for field, column in best.columns.items())
        fix += "."
        for wanted, column in best.columns.items():
            if column is None and (unfit := named_for(wanted, found, set(best.columns.values()))):
                problem = f"holds {unfit.holds}: write it as text" if unfit.complete else "is empty in many rows"
                fix += f" {unfit.name!r} is named for it, but {problem}."
        taken = {*best.columns.values(), *columns.values(), *OPTIONAL, *self.extra.get(best.format, ())}
        unused = [c.name for c in found if c.holds == "text" and not c.identifies and c.name not in taken]
        if best.complete and unused:
            fix += f" It leaves out {', '.join(map(repr, unused[:5]))}."
        if not best.complete:
            fix += f" Known formats: {', '.join(' + '.join(fields) for fields in self.needed.values())}."
        return RowError(None, _NO_FORMAT, detail, fix)

    def _check_one_meaning(self, rows: Sequence[Mapping[str, Any]], name: str, columns: Mapping[str, str]) -> None:
        """Refuse rows whose columns say that they mean more than the format they were taken for.

        Raises:
            RowError: If a text has a column next to it that answers, or two completions have one that asks.
        """
        fields, found = self.needed[name], look_at(rows)
        if fields == ("text",):
            best = self._propose([other for other in self.needed if other != name], found, columns)
            sure = best.complete and not best.guessed
            answer = named_for("output", found, {"text"})
            if sure or answer is not None:
                other = str([*best.columns.values()][-1]) if answer is None else answer.name
                learn = f"Pass {best.argument(columns)} to learn answers" if sure else f"Write {other!r} as text"
                fix = f"{learn}, or remove {other!r} to learn all of 'text'."
                raise RowError(None, "'text' may be a text to learn, or a question", _listed(found), fix)
        if fields == ("chosen", "rejected"):
            best = self._propose([other for other in self.needed if "prompt" in self.needed[other]], found, columns)
            if best.complete and not best.guessed and not _hold_the_prompt(rows, str(best.columns["prompt"])):
                fix = f"Pass {best.argument(columns)}."
                raise RowError(None, "the prompt has a column of its own", _listed(found), fix)

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
        detail = f"fields: {', '.join(map(str, row)) or 'none'}"
        for other, fields in self.needed.items():
            if wanted in self.needed[name] and all(columns.get(field, field) in row for field in fields):
                fix = f"It is a row of the format {other}, most are {name}: put such rows into a source of their own."
                return RowError(column, "missing field", detail, fix)
        used = {columns.get(known, known) for known in self.fields(name)}
        may_hold = (list,) if does(wanted) == "is a conversation" else (str, list) if wanted in OF_TEXT else (object,)
        spare = [str(key) for key in row if key not in used and isinstance(row[key], may_hold)]
        near = difflib.get_close_matches(column, spare, n=1, cutoff=0.5)
        fix = f"Rename {near[0]!r} to {column!r}, as in other rows." if near else "Add it, or remove the row."
        return RowError(column, "missing field", detail, fix)


def _listed(found: Sequence[Column]) -> str:
    more = f", and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return f"columns: {', '.join(column.shown for column in found[:_LISTED]) or 'none'}{more}"


def _hold_the_prompt(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Whether both completions of most rows contain the prompt: as a text, or as the turn they start with."""
    held = 0
    for row in rows:
        prompt, chosen, rejected = (row.get(name) for name in (column, "chosen", "rejected"))
        if isinstance(chosen, list) and isinstance(rejected, list):
            held += len(chosen) > 1 and chosen[:1] == rejected[:1]
        elif isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
            held += prompt.strip() in chosen and prompt.strip() in rejected
    return held * 2 > len(rows)
