"""Read, check, hold out and encode the rows of each split, independently of Lightning."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal

from transformers import PreTrainedTokenizerBase

from lightning_ft.data.cache import EncodedRows
from lightning_ft.data.content import remedy_for
from lightning_ft.data.formats import Conversation
from lightning_ft.data.groups import hold_out
from lightning_ft.data.overlap import TrainingIndex
from lightning_ft.data.overlong import OnOverlong
from lightning_ft.data.raw_rows import Problem, raise_problems
from lightning_ft.data.row_mapping import RowFunction
from lightning_ft.data.row_store import SelectedRows, StoredRows
from lightning_ft.data.row_types import PAIRS, Row, RowT, RowType
from lightning_ft.data.rows import OnBadRow, count_duplicates, load_source
from lightning_ft.data.sources import as_sources
from lightning_ft.data.split_report import SplitReport
from lightning_ft.data.templates import ChatTemplate, chat_template
from lightning_ft.data.tokenize import tokenize
from lightning_ft.distributed import rank_zero_info, rank_zero_warn
from lightning_ft.errors import ConfigError, DataError
from lightning_ft.types import Request

SplitName = Literal["train", "validation", "test", "predict"]


@dataclass(frozen=True)
class RowRules:
    """Options for reading and encoding rows.

    Args:
        columns: Field names of the format to those in the data.
        on_bad_row: Treatment of bad rows.
        max_length: Maximum number of tokens per row.
        on_overlong: Treatment of longer rows.
        seed: Seed that decides which rows are held out.
        cache: Folder of the cache of encoded rows; None for no cache.
        template_kwargs: Variables of the chat template for rows that don't set them.
        format: Function, or its import path, that maps each source row to messages or to a row of a known format.
        num_workers: Number of processes that encode rows.
    """

    columns: Mapping[str, str] | None
    on_bad_row: OnBadRow
    max_length: int
    on_overlong: OnOverlong
    seed: int
    cache: Path | None
    template_kwargs: Mapping[str, object] = field(default_factory=dict)
    format: str | RowFunction | None = None
    num_workers: int = 0


class Splits(Generic[RowT]):
    """Rows of each split: `load` reads and checks them, `encode` tokenizes them, each once.

    Args:
        sources: Sources of each split; None for no split, and for validation also the share of train to hold out.
        rules: Options for reading and encoding rows.
        row_type: Type of the rows.

    Example:
        >>> rules = RowRules(None, "error", 64, "error", seed=0, cache=None)
        >>> rows = [{"input": f"{n} + 1?", "output": str(n + 1)} for n in range(10)]
        >>> splits = Splits({"train": rows, "validation": 0.2}, rules)
        >>> splits.load(["train", "validation"])
        >>> {name: report.kept for name, report in splits.report.items()}
        {'train': 8, 'validation': 2}
    """

    def __init__(
        self,
        sources: Mapping[str, object],
        rules: RowRules,
        row_type: RowType[Any] = PAIRS,
    ) -> None:
        self.sources = {name: value for name, value in sources.items() if value is not None}
        self.rules, self.row_type = rules, row_type
        self.report: dict[str, SplitReport] = {}
        self.rows: dict[str, list[Sequence[RowT]]] = {}
        self.encoded: dict[str, list[EncodedRows]] = {}
        self.streamed: set[str] = set()
        """Splits that are read while training, and are not among the rows."""
        self._index: TrainingIndex | None = None
        self._overlap_reported: set[str] = set()
        self.notes_reported: set[str] = set()
        """Notes for which a warning was issued."""

    @property
    def held_out(self) -> float | None:
        """Share of the training rows that is held out for validation; None if validation has its own rows."""
        share = self.sources.get("validation")
        return float(share) if isinstance(share, (int, float)) else None

    def load(self, names: Sequence[str]) -> None:
        """Read and check splits that weren't loaded yet; the bad rows of all of them are reported together.

        Raises:
            DataError: With all bad rows, unless they are skipped.
        """
        required = {name for name in names if name in self.sources}
        if "validation" in required and self.held_out is not None:
            required.add("train")
        new = [name for name in self.sources if name in required and name not in self.rows]
        if self.held_out is not None:
            new = [name for name in new if name != "validation"]
        rows: dict[str, list[Sequence[RowT]]] = {}
        reports: dict[str, SplitReport] = {}
        problems: list[Problem] = []
        for name in new:
            reports[name] = SplitReport()
            rows[name] = []
            for source_name, source in as_sources(self.sources[name], name).items():
                good, bad = load_source(
                    source,
                    source_name,
                    name,
                    columns=self.rules.columns,
                    format=self.rules.format,
                    on_bad_row=self.rules.on_bad_row,
                    answered=name != "predict",
                    report=reports[name],
                    row_type=self.row_type,
                    template_kwargs=self.rules.template_kwargs,
                    store=StoredRows(self.rules.cache),
                )
                rows[name].append(good)
                problems += bad
        raise_problems(problems)
        for name in new:
            rows[name] = self.row_type.complete(name, rows[name], reports[name])
            formats = reports[name].formats.items()
            rank_zero_info(f"{name}: row format " + ", ".join(f"{format} ({source})" for source, format in formats))
        self.rows |= rows
        self.report |= reports
        if "train" in new:
            self._index = None
        if "train" in new and self.held_out is not None:
            self._hold_out(self.held_out)
        for name in self.rows:
            self.report[name].duplicates = count_duplicates(row for part in self.rows[name] for row in part)
        if new:
            self._count_overlap()

    def _hold_out(self, share: float) -> None:
        """Move a share of the training rows to validation, keeping rows that belong together in one split."""
        self.rows["train"], held = hold_out(self.rows["train"], share, self.rules.seed)
        self.rows["validation"] = [held]
        self.report["validation"] = SplitReport(read=len(held), kept=len(held))
        self.report["train"].read -= len(held)
        self.report["train"].kept -= len(held)

    def sample(self, name: str, count: int) -> None:
        """Keep a random sample of a split that was loaded and not yet encoded, drawn with the seed of the rules.

        A smaller sample is a subset of a larger one: a learning curve only adds rows.

        Raises:
            ConfigError: If the split has fewer rows, or is already encoded.

        Example:
            >>> rules = RowRules(None, "error", 64, "error", seed=0, cache=None)
            >>> splits = Splits({"train": [{"input": str(n), "output": "even"} for n in range(9)]}, rules)
            >>> splits.load(["train"])
            >>> splits.sample("train", 4)
            >>> len(splits.rows["train"][0]), splits.report["train"].kept
            (4, 4)
        """
        positions = [(k, i) for k, part in enumerate(self.rows[name]) for i in range(len(part))]
        if name in self.encoded or not 1 <= count <= len(positions):
            raise ConfigError(f"{name}: {count:,} of {len(positions):,} rows can't be drawn before they are encoded.")
        kept = set(random.Random(self.rules.seed).sample(positions, len(positions))[:count])
        self.rows[name] = [
            SelectedRows(part, [i for i in range(len(part)) if (k, i) in kept])
            for k, part in enumerate(self.rows[name])
        ]
        self.report[name].kept = count
        self.report[name].notes["row not drawn"] += len(positions) - count
        self._recount(name)

    def training_index(self) -> TrainingIndex | None:
        """Index of the training rows that are used; None if they weren't loaded."""
        if "train" not in self.rows:
            return None
        if self._index is None:
            self._index = TrainingIndex.of(row for part in self.rows["train"] for row in part)
        return self._index

    def _recount(self, name: str) -> None:
        """Update the counts that depend on the rows of a split, after some were left out."""
        if name == "train":
            self._index = None
        if name in ("train", "validation", "test"):
            self._count_overlap()

    def _count_overlap(self) -> None:
        for name in ("validation", "test"):
            if name not in self.rows or (name == "validation" and self.held_out is not None):
                continue  # held-out rows never overlap with train
            index = self.training_index()
            if index is None:
                return
            report = self.report[name]
            index.count((row for part in self.rows[name] for row in part), report)
            if report.overlap and name not in self._overlap_reported:
                self._overlap_reported.add(name)
                counts = ", ".join(f"{count:,} {what}" for count, what in report.overlap)
                rank_zero_warn(
                    f"{name} has {counts}, of {report.kept:,} in all, so its metrics will look better than they are. "
                    "Remove such rows from one of the two; a share of train (validation=0.1) keeps them together."
                )

    def encode(self, names: str | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        """Tokenize splits that were loaded and not yet encoded; the bad rows of all of them are reported together.

        Args:
            names: Name of a split, or of several.
            tokenizer: The tokenizer.

        Raises:
            DataError: With all rows that can't be encoded within `max_length`, or if no row is left.
        """
        names = [names] if isinstance(names, str) else names
        results = {
            name: [self._tokenize(part, name, tokenizer) for part in self.rows[name]]
            for name in names
            if name in self.rows and name not in self.encoded
        }
        problems = {name: [problem for _, found in parts for problem in found] for name, parts in results.items()}
        self.raise_fatal([problem for found in problems.values() for problem in found])
        for name, parts in results.items():
            self._keep(name, [rows for rows, _ in parts], problems[name])
            self._log_report(name, tokenizer)

    def _tokenize(
        self, part: Sequence[RowT], name: str, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[EncodedRows, list[Problem]]:
        return tokenize(
            part,
            tokenizer,
            max_length=self.rules.max_length,
            on_overlong=self.rules.on_overlong,
            folder=self.rules.cache,
            label=name,
            row_type=self.row_type,
            num_workers=self.rules.num_workers,
        )

    def _keep(self, name: str, encoded: list[EncodedRows], dropped: Sequence[Problem]) -> None:
        """Keep the encoded rows of a split, and count those and the dropped ones."""
        kept = sum(rows.num_rows for rows in encoded)
        if not kept:
            why = dropped[0] if dropped else "all of its rows are held out"
            raise DataError(
                f"{name}: no row is left within max_length={self.rules.max_length:,}; {len(dropped):,} were dropped. "
                f"The first: {why}"
            )
        report = self.report[name]
        report.skip(dropped)
        report.kept = kept
        for rows in encoded:
            report.truncated += sum(rows.truncated[:: rows.per_row])
            report.other_prompt += rows.about["other_prompt"]
            report.mismatch = report.mismatch or rows.about["mismatch"]
            report.notes.update(rows.about["notes"])
            report.lengths.extend(rows.lengths)
            report.supervised.extend(rows.supervised)
        self.encoded[name] = encoded
        before = sum(map(len, self.rows[name]))
        self.rows[name] = [
            part if len(part) == e.num_rows else SelectedRows(part, e.rows[:: e.per_row])
            for part, e in zip(self.rows[name], encoded, strict=True)
        ]
        if kept < before:
            self._recount(name)

    def forget(self) -> None:
        """Forget all rows, so that `load` reads them again and `encode` may use another tokenizer."""
        self.rows, self.encoded, self.report, self._index = {}, {}, {}, None
        self.notes_reported = set()

    def may_drop(self, problem: Problem) -> bool:
        """Whether a row with this problem is left out rather than an error."""
        return (self.rules.on_overlong == "drop") if self._is_overlong(problem) else self.rules.on_bad_row == "skip"

    def _is_overlong(self, problem: Problem) -> bool:
        """Whether `on_overlong` decides about a row with this problem, rather than `on_bad_row`."""
        return problem.reason.startswith("overlong") and self.rules.on_overlong != "truncate_prompt"

    def raise_fatal(self, problems: Sequence[Problem]) -> None:
        """Raise one error for those of the problems whose rows aren't left out.

        Raises:
            DataError: With these problems, and the arguments that would leave them out.
        """
        fatal = [problem for problem in problems if not self.may_drop(problem)]
        remedies = {"on_overlong='drop'" if self._is_overlong(problem) else "on_bad_row='skip'" for problem in fatal}
        raise_problems(fatal, sorted(remedies))

    def _log_report(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Log the summary of an encoded split, and warn of notes that have a remedy."""
        report = self.report[name]
        rank_zero_info(report.summary(name))
        self.warn_of_notes(name, report.notes, chat_template(tokenizer))
        if report.other_prompt and report.mismatch is not None:
            warn_other_prompt(name, f"in {report.other_prompt:,} of {report.kept:,} rows", report.mismatch)
        if max(report.lengths) > tokenizer.model_max_length:
            rank_zero_warn(
                f"{name}: the longest row has {max(report.lengths):,} tokens, but the tokenizer's model_max_length is "
                f"{tokenizer.model_max_length:,}. Lower max_length if that is the model's limit."
            )

    def warn_of_notes(self, name: str, notes: Mapping[str, int], template: ChatTemplate) -> None:
        """Warn of notes that have a remedy, of each once and not for every split."""
        for note, count in notes.items():
            remedy = None if note in self.notes_reported else remedy_for(note, template)
            self.notes_reported.add(note)
            if remedy is not None:
                rank_zero_warn(f"{name}: {count:,} x {note}. {remedy}")

    def kept_rows(self, name: str) -> list[RowT]:
        """The rows of a split.

        Raises:
            ConfigError: If there is no such split, or it wasn't loaded.
        """
        if name not in self.rows:
            reason = "setup() hasn't run for it" if name in self.sources else f"pass {name}="
            if name in self.streamed:
                reason = "they are read while training. Pass streaming=False to read them before"
            raise ConfigError(f"There are no {name} rows: {reason}.")
        return [row for part in self.rows[name] for row in part]

    @staticmethod
    def unique_ids(rows: Sequence[Row]) -> list[str]:
        """A unique id of each row: its own, or its source and number."""
        return _unique([row.id if row.id.strip() else f"{row.source}:{row.row}" for row in rows])

    def requests(self: Splits[Conversation], name: str) -> list[Request]:
        """Pairs of a split as requests with their reference answers.

        Ids are unique: a row without an id gets its source and number, and where several rows have the same id, a free
        one of ``#2``, ``#3``, ... is appended to those after the first.

        Raises:
            ConfigError: If there is no such split, it wasn't loaded, or a row has no question or no answer.
        """
        rows = self.kept_rows(name)
        requests = []
        for unique, row in zip(self.unique_ids(rows), rows, strict=True):
            if not row.prompt_messages or row.messages[-1]["role"] != "assistant":
                missing = "no answer to compare with" if row.prompt_messages else "no question, as a plain text"
                raise ConfigError(
                    f"{name} rows can't be requests: {row.source}, row {row.row}, has {missing}. Pass questions with "
                    "their answers as requests=."
                )
            answer = row.messages[-1]
            whole_answer = answer if {"tool_calls", "reasoning_content"} & answer.keys() else None
            reference, cluster = answer["content"], row.cluster or None
            requests.append(
                Request(
                    unique,
                    row.prompt_messages,
                    reference,
                    cluster,
                    row.template_kwargs,
                    whole_answer,
                    row.prompt_context,
                    row.structured_output,
                )
            )
        return requests


def warn_other_prompt(name: str, where: str, mismatch: tuple[str, str]) -> None:
    """Warn of rows whose tokens before the last answer aren't those that generation starts from.

    Args:
        name: Name of the split.
        where: Which rows.
        mismatch: Text of the first such row, and the text that generation starts from.
    """
    row, prompt = mismatch
    rank_zero_warn(
        f"{name}: {where} the tokens before the last answer aren't those that generation starts from: the first row "
        f"has {row!r} where generation has {prompt!r}. The model would be trained on other prompts than it gets in "
        "use. Where the prompt opens reasoning, add it to the rows (reasoning_content) or switch it off "
        "(chat_template_kwargs={'enable_thinking': False}, if the template reads that). Where only white space "
        "before an earlier answer differs, remove it or pass supervise='last'. Otherwise pass a chat_template= that "
        "writes both the same way."
    )


def _unique(ids: Sequence[str]) -> list[str]:
    """The same ids, with a number appended to repeated ones.

    Example:
        >>> _unique(["a", "a", "a#2", "a"])
        ['a', 'a#3', 'a#2', 'a#4']
    """
    taken, numbers = set(ids), Counter[str]()
    unique: list[str] = []
    for name in ids:
        numbers[name] += 1
        new = name
        if numbers[name] > 1:
            while (new := f"{name}#{numbers[name]}") in taken:
                numbers[name] += 1
            taken.add(new)
        unique.append(new)
    return unique
