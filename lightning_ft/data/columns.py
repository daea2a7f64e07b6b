"""Detect the format of rows by their columns, and explain how to pass `columns=` where they have other names."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_ft.arguments import did_you_mean
from lightning_ft.data.column_advice import (
    TEXT_FIELDS,
    Column,
    Proposal,
    describe,
    inspect_columns,
    named_for,
    propose,
    role_of,
)
from lightning_ft.data.keys import FOREIGN_COLUMNS
from lightning_ft.data.turns import RowError
from lightning_ft.errors import ConfigError

OPTIONAL = ("id", "cluster", "system", "tools", "chat_template_kwargs")
"""Optional fields of every row format."""

_NO_FORMAT = "no row format has these columns"
_MAX_LISTED = 20  # columns that an error lists


@dataclass(frozen=True)
class Formats:
    """Row formats that differ in their fields.

    Args:
        required: Formats to their required fields, the prompt first and the answer last, in the order of detection.
        extra: Formats to optional fields that not every format has.
    """

    required: Mapping[str, tuple[str, ...]]
    extra: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def fields(self, name: str) -> tuple[str, ...]:
        """All fields of a format."""
        return (*self.required[name], *self.extra.get(name, ()), *OPTIONAL)

    def detect(
        self, rows: Sequence[Mapping[str, object]], columns: Mapping[str, str] | None, *, answered: bool = True
    ) -> str:
        """The format whose fields most rows have.

        Args:
            rows: First rows of a source.
            columns: Field names of the format to those in the data; formats without one of these fields are excluded.
            answered: Whether rows must have an answer.

        Raises:
            ConfigError: If no format has all fields of `columns`.
            RowError: If no row has the fields of a format, or they can be read in two ways. It proposes `columns`.

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
        if answered and not set(self.required[name]) & set(columns or {}):
            self._check_one_meaning(rows, name, columns or {})
        return name

    def _check_named(self, rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> None:
        """Refuse a misspelled column. One that no row has may be in another split.

        Raises:
            RowError: If no row has it, and rows have one with a similar name.
        """
        present = dict.fromkeys(str(key) for row in rows for key in row)
        for field, column in columns.items():
            near = [] if column in present else difflib.get_close_matches(column, present, n=1, cutoff=0.75)
            if near and near[0] not in columns.values():
                fix = f"Did you mean columns={dict(columns) | {field: near[0]}!r}?"
                raise RowError(
                    None, f"columns= names {column!r}, which no row has", f"columns: {', '.join(present)}", fix
                )

    def _propose(
        self, names: Sequence[str], present: Sequence[Column], columns: Mapping[str, str], answered: bool = True
    ) -> Proposal:
        required = {name: self.required[name] if answered else self.required[name][:1] for name in names}
        extra = {name: (*self.extra.get(name, ()), *OPTIONAL) for name in names}
        return propose(required, extra, present, columns)

    def _no_format(
        self, rows: Sequence[Mapping[str, object]], names: Sequence[str], columns: Mapping[str, str], answered: bool
    ) -> RowError:
        """The error for rows that have the fields of no format."""
        present = inspect_columns(rows)
        detail, names_present = _listed(present), {column.name for column in present}
        absent = next((column for column in columns.values() if column not in names_present), None)
        if absent is not None:
            detail = f"columns= names {absent!r}, which no row has; {detail}"
        preferences = names_present & {"rejected", "rejected_response", "non_preferred_output"}
        if preferences and not any("rejected" in fields for fields in self.required.values()):
            return RowError(None, _NO_FORMAT, detail, "Preferences are for a PreferenceDataModule.")
        best = self._propose(names, present, columns, answered)
        if not best.complete and (foreign := [name for name in FOREIGN_COLUMNS if name in names_present]):
            return RowError(None, _NO_FORMAT, detail, FOREIGN_COLUMNS[foreign[0]])
        if not answered and best.complete and (other := [f for f in best.columns if f in columns]):
            old, new = best.columns[other[0]], columns[other[0]]
            fix = f"Rename {old!r} to {new!r}: columns= holds for the rows of all splits."
            return RowError(None, _NO_FORMAT, detail, fix)
        fix = f"Pass {best.argument(columns)}"
        if best.guessed:
            fix += ", if " + " and ".join(f"{c!r} holds the {describe(field)}" for field, c in best.columns.items())
        fix += "."
        for field, column in best.columns.items():
            if column is None and (unfit := named_for(field, present, set(best.columns.values()))):
                write = "true or false" if role_of(field) == "label" else "it as text"
                wrong_type = f"contains {unfit.content_type}: write {write}"
                problem = wrong_type if unfit.is_filled else "is empty in many rows"
                fix += f" {unfit.name!r} has a fitting name, but {problem}."
        taken = {*best.columns.values(), *columns.values(), *OPTIONAL, *self.extra.get(best.format, ())}
        unused = [c.name for c in present if c.content_type == "text" and not c.is_identifier and c.name not in taken]
        if best.complete and unused:
            fix += f" It leaves out {', '.join(map(repr, unused[:5]))}."
        if not best.complete:
            fix += f" Known formats: {', '.join(' + '.join(fields) for fields in self.required.values())}."
        return RowError(None, _NO_FORMAT, detail, fix)

    def _check_one_meaning(self, rows: Sequence[Mapping[str, object]], name: str, columns: Mapping[str, str]) -> None:
        """Refuse rows whose other columns show that they mean more than the format they have.

        Raises:
            RowError: If there is an answer next to a text, or a prompt next to two completions.
        """
        fields, present = self.required[name], inspect_columns(rows)
        if fields == ("text",):
            best = self._propose([other for other in self.required if other != name], present, columns)
            sure = best.complete and not best.guessed
            answer = named_for("output", present, {"text"})
            if sure or answer is not None:
                other = str([*best.columns.values()][-1]) if answer is None else answer.name
                learn = f"Pass {best.argument(columns)} to learn answers" if sure else f"Write {other!r} as text"
                fix = f"{learn}, or remove {other!r} to learn all of 'text'."
                raise RowError(None, "'text' may be a text to learn, or a prompt", _listed(present), fix)
        if fields == ("chosen", "rejected"):
            best = self._propose(
                [other for other in self.required if "prompt" in self.required[other]], present, columns
            )
            if best.complete and not best.guessed and not _contain_prompt(rows, str(best.columns["prompt"])):
                fix = f"Pass {best.argument(columns)}."
                raise RowError(None, "the prompt has a column of its own", _listed(present), fix)

    def _candidates(self, columns: Mapping[str, str] | None) -> dict[str, list[str]]:
        """Formats that have all fields of `columns`, with their required fields as the data names them."""
        columns = columns or {}
        known = {known for name in self.required for known in self.fields(name)}
        for field in columns:
            if field not in known:
                column = columns[field]
                swapped = isinstance(column, str) and column in known
                hint = f" Write the format's name first: {{{column!r}: {field!r}}}." if swapped else ""
                hint = hint or did_you_mean(field, known)
                raise ConfigError(f"columns: no format has a field {field!r}.{hint} Known: {', '.join(sorted(known))}.")
        possible = {
            name: [columns.get(field, field) for field in fields]
            for name, fields in self.required.items()
            if set(columns) <= set(self.fields(name))
        }
        if not possible:
            named = ", ".join(sorted(set(columns) - set(OPTIONAL)))
            raise ConfigError(f"columns: no format has all of the fields {named}.")
        return possible

    def missing(self, row: Mapping[str, object], name: str, field: str, columns: Mapping[str, str]) -> RowError:
        """The error for a missing field.

        Args:
            row: The row.
            name: Format of the rows.
            field: Field of the format.
            columns: Field names of the format to those in the data.
        """
        column = columns.get(field, field)
        detail = f"fields: {', '.join(map(str, row)) or 'none'}"
        for format, fields in self.required.items():
            if field in self.required[name] and all(columns.get(other, other) in row for other in fields):
                fix = f"The row has the format {format}, most have {name}: put such rows into a source of their own."
                return RowError(column, "missing field", detail, fix)
        used = {columns.get(known, known) for known in self.fields(name)}
        types = (list,) if role_of(field) == "conversation" else (str, list) if field in TEXT_FIELDS else (object,)
        spare = [str(key) for key in row if key not in used and isinstance(row[key], types)]
        near = difflib.get_close_matches(column, spare, n=1, cutoff=0.5)
        fix = f"Rename {near[0]!r} to {column!r}, as in other rows." if near else "Add it, or remove the row."
        return RowError(column, "missing field", detail, fix)


def _listed(columns: Sequence[Column]) -> str:
    more = f", and {len(columns) - _MAX_LISTED} more" if len(columns) > _MAX_LISTED else ""
    return f"columns: {', '.join(column.label for column in columns[:_MAX_LISTED]) or 'none'}{more}"


def _contain_prompt(rows: Sequence[Mapping[str, object]], column: str) -> bool:
    """Whether both completions of most rows contain the prompt: within their text, or as their first turn."""
    held = 0
    for row in rows:
        prompt, chosen, rejected = (row.get(name) for name in (column, "chosen", "rejected"))
        if isinstance(chosen, list) and isinstance(rejected, list):
            held += len(chosen) > 1 and chosen[:1] == rejected[:1]
        elif isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
            held += prompt.strip() in chosen and prompt.strip() in rejected
    return held * 2 > len(rows)
