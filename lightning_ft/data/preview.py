"""Prints what a model would be trained on, before training: `lightning-ft preview`.

It reads, checks and tokenizes the rows as `fit` would, without loading weights. Supervised text is between ``«`` and
``»`` (``>>`` and ``<<`` if the terminal can't show those), so that it is recognizable without color too. Text of rows
is printed with its control characters escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.content import NOTES_WITH_REMEDY, remedy_for
from lightning_ft.data.layout import Example
from lightning_ft.data.loader import SplitRows
from lightning_ft.data.module import RowDataModule
from lightning_ft.data.preference_rows import Preference, split_shared
from lightning_ft.data.prompts import Prompt
from lightning_ft.data.raw_rows import SHOWN, Problem
from lightning_ft.data.row_types import Row, RowT
from lightning_ft.data.split_report import SplitReport
from lightning_ft.data.splits import Splits
from lightning_ft.data.templates import chat_template
from lightning_ft.printable import printable

_SUPERVISED, _CONTEXT = "bold green", "dim"
_BINS = 12
_BAR = 40  # characters of the longest bar


def preview(
    datamodule: RowDataModule,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    examples: int = 3,
    console: Console | None = None,
) -> dict[str, SplitReport]:
    """Print examples with their supervised tokens, token lengths, and the rows that would be cut or dropped, and why.

    Bad and overlong rows are listed instead of raised, whatever the settings of the DataModule.

    Args:
        datamodule: DataModule with the rows.
        tokenizer: Tokenizer that replaces the DataModule's; the DataModule's `chat_template` is set on it.
        examples: Number of rows to show per split.
        console: Console to print on.

    Returns:
        Counts of the rows in each split: read, kept, dropped, truncated, and why.

    Raises:
        DataError: If a source can't be read at all, or none of its rows can be used.
        ConfigError: If there is no tokenizer.
    """
    console = console or Console()
    if tokenizer is not None:
        datamodule.tokenizer = tokenizer
    tokenizer, rules = datamodule.tokenizer, datamodule.rules
    lenient = replace(
        rules, on_bad_row="skip", on_overlong="drop" if rules.on_overlong == "error" else rules.on_overlong
    )
    sources = dict(datamodule.splits.sources)
    if datamodule.stream is not None:
        first = [raw.fields for raw in datamodule.stream.head() if raw.problem is None]
        lenient = replace(lenient, format=None)  # it was applied to them
        console.print(f"train is streamed: its first {len(first):,} rows are shown.")
        sources = {"train": first, **sources}
    splits: Splits[Any] = Splits(sources, lenient, datamodule.row_type)
    splits.notes_reported |= set(NOTES_WITH_REMEDY)  # they are printed below
    names = [name for name in ("train", "validation", "test") if name in splits.sources]
    splits.load(names)
    for name in names:
        splits.encode(name, tokenizer)
        console.rule(f"[bold]{name}")
        report = splits.report[name]
        _print_examples(splits, name, tokenizer, examples, console)
        unit = "row" if len(report.lengths) == report.kept else "completion with its prompt"
        histogram = length_histogram(report.lengths, rules.max_length, unit=unit, fancy=_is_fancy(console))
        console.print(histogram, markup=False, highlight=False)
        console.print(_counts(report))
        _print_notes(report, tokenizer, console)
        stops = [p for p in report.problems if not datamodule.splits.may_drop(p)]
        _print_problems(report.problems, stops, console)
    return splits.report


def supervised_text(tokenizer: PreTrainedTokenizerBase, example: Example, *, fancy: bool = True) -> Text:
    """The text of an example with supervised parts colored and between marks, control characters escaped.

    Args:
        tokenizer: Tokenizer that decodes the tokens.
        example: An encoded row.
        fancy: Whether marks may be other than ASCII.
    """
    before, after = ("«", "»") if fancy else (">>", "<<")
    text = Text()
    pairs = zip(example.input_ids.tolist(), example.supervised.tolist(), strict=True)
    for supervised, run in groupby(pairs, key=lambda pair: pair[1]):
        decoded = printable(str(tokenizer.decode([token for token, _ in run])))
        if supervised:
            text.append(f"{before}{decoded}{after}", style=_SUPERVISED)
        else:
            text.append(decoded, style=_CONTEXT)
    return text


def length_histogram(lengths: Sequence[int], max_length: int, *, unit: str = "row", fancy: bool = True) -> str:
    """A histogram of rows by their number of tokens.

    Args:
        lengths: Number of tokens of each row.
        max_length: Limit that the title names.
        unit: Word for what each length belongs to.
        fancy: Whether bars may be other than ASCII.

    Example:
        >>> print(length_histogram([3, 4, 9], 16, fancy=False))
        tokens per row (longest 9, max_length 16)
         1-2 |  0
         3-4 | ######################################## 2
         5-6 |  0
         7-8 |  0
        9-10 | #################### 1
    """
    width = max(2, -(-max(lengths) // _BINS))
    counts = Counter((length - 1) // width for length in lengths)
    labels = [f"{i * width + 1:,}-{(i + 1) * width:,}" for i in range(max(counts) + 1)]
    lines = [f"tokens per {unit} (longest {max(lengths):,}, max_length {max_length:,})"]
    for i, label in enumerate(labels):
        bar = ("█" if fancy else "#") * -(-_BAR * counts[i] // max(counts.values()))
        lines.append(f"{label:>{max(map(len, labels))}} | {bar} {counts[i]:,}")
    return "\n".join(lines)


def _is_fancy(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _print_examples(
    splits: Splits[RowT], name: str, tokenizer: PreTrainedTokenizerBase, examples: int, console: Console
) -> None:
    parts = splits.encoded[name]
    indices = [(part, i) for part, rows in enumerate(parts) for i in range(rows.num_rows)]
    for number, (part, i) in enumerate(indices[:examples]):
        row = splits.rows[name][part][i]
        ((_, encoded),) = SplitRows(parts)[[number]]
        tokens, supervised = (sum(len(e) for e in encoded), sum(int(e.supervised.sum()) for e in encoded))
        title = f"{row.source}, row {row.row}: {tokens:,} tokens, {supervised:,} supervised"
        if parts[part].truncated[i * parts[part].per_row]:
            title += ", prompt cut"
        text = _row_text(row, encoded, tokenizer, fancy=_is_fancy(console))
        console.print(Panel(text, title=Text(printable(title, one_line=True)), title_align="left"))


def _row_text(row: Row, encoded: tuple[Example, ...], tokenizer: PreTrainedTokenizerBase, *, fancy: bool) -> Text:
    """The text of a row, with its labeled completions, margin, columns for rewards and template variables below."""
    if not isinstance(row, Preference):
        text = supervised_text(tokenizer, encoded[0], fancy=fancy)
        for name, value in (row.columns if isinstance(row, Prompt) else row.template_kwargs).items():
            _append(text, name, repr(value))
        if unsupervised := sum(not message.get("train", True) for message in row.prompt_messages):
            _append(text, "answers not trained on", f"{unsupervised:,}")
        return text
    names = ("chosen", "rejected") if len(row.labels) > 1 else ("good" if row.labels[0] else "bad",)
    prompt, completions = split_shared(encoded)
    text = supervised_text(tokenizer, Example(prompt, torch.zeros_like(prompt, dtype=torch.bool)), fancy=fancy)
    for label, completion in zip(names, completions, strict=True):
        _append(text, label, supervised_text(tokenizer, completion, fancy=fancy))
    if row.margin is not None:
        _append(text, "margin", f"{row.margin:g}")
    for name, value in row.template_kwargs.items():
        _append(text, name, repr(value))
    return text


def _append(text: Text, name: str, value: str | Text) -> None:
    line_break = "" if text.plain.endswith("\n") else "\n"
    text.append(f"{line_break}{printable(name, one_line=True)}: ", style="bold")
    text.append(value if isinstance(value, Text) else printable(value))


def _counts(report: SplitReport) -> Table:
    table = Table(show_header=False)
    table.add_column(justify="right")
    table.add_column()
    tokens = sum(report.lengths)
    counts = [
        (report.read, "rows read"),
        (report.kept, "rows used"),
        *((count, f"left out: {reason}") for reason, count in report.skipped.most_common()),
        (report.truncated, "prompts cut to max_length"),
        (report.duplicates, "duplicates of an earlier row"),
        *report.overlap,
        (report.other_prompt, "rows whose prompt differs from what generation starts from"),
        *((count, note) for note, count in report.notes.items()),
        (tokens, "tokens"),
        (sum(report.supervised), f"supervised tokens ({sum(report.supervised) / max(1, tokens):.0%})"),
    ]
    for count, label in counts:
        if count or label in ("rows read", "rows used"):
            table.add_row(f"{count:,}", Text(printable(label, one_line=True)))
    return table


def _print_notes(report: SplitReport, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print the remedies for the notes, and the ignored columns."""
    template = chat_template(tokenizer)
    for note in report.notes:
        if (remedy := remedy_for(note, template)) is not None:
            console.print(Text(printable(f"{note}: {remedy}"), style="yellow"))
    if report.ignored:
        console.print(Text(printable(f"ignored columns: {', '.join(report.ignored)}", one_line=True)))


def _print_problems(problems: Sequence[Problem], stops: Sequence[Problem], console: Console) -> None:
    for problem in problems[:SHOWN]:
        console.print(Text(f"left out: {problem}", style="yellow"))
    if len(problems) > SHOWN:
        console.print(f"... and {len(problems) - SHOWN:,} more")
    if stops:
        settings = "on_bad_row to skip (on_overlong for rows that are too long)"
        console.print(
            Text(f"fit would stop at {len(stops):,} of these rows: fix them, or set {settings}.", style="bold red")
        )
