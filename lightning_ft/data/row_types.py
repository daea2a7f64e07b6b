"""Kinds of rows: how a DataModule's rows are read, and what tokens they become."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from lightning_ft.data.encode import Encoded, encode, encode_text
from lightning_ft.data.fields import FieldReader
from lightning_ft.data.formats import Conversation, RowFormat, detect_format
from lightning_ft.data.split_report import SplitReport
from lightning_ft.data.templates import ChatTemplate
from lightning_ft.data.turns import RowError
from lightning_ft.types import Message

Self = TypeVar("Self")
Supervise = Literal["all", "last"]


class Row(Protocol):
    """A checked row of any kind."""

    @property
    def source(self) -> str:
        """Where it stands."""

    @property
    def row(self) -> int:
        """Its line or number there."""

    @property
    def cluster(self) -> str | None:
        """What it belongs together with, if the row says so."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows duplicates of each other, and all that their tokens depend on; strings and tuples."""

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The turns before the answer; those of the user among them may be cut."""

    @property
    def template_kwargs(self) -> Mapping[str, Any]:
        """What the chat template is given besides the messages."""

    def with_prompt(self: Self, messages: Sequence[Message]) -> Self:
        """The same row with other turns before the answer."""


RowT = TypeVar("RowT", bound=Row)


class RowType(ABC, Generic[RowT]):
    """What the rows of a DataModule are.

    Args:
        name: Stands in the names of cache entries.
    """

    name: ClassVar[str]

    @abstractmethod
    def reader(
        self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None, *, answered: bool
    ) -> FieldReader[RowT]:
        """What reads the rows of a source.

        Args:
            rows: Its first rows, to tell their format.
            columns: The format's field names to those in the data.
            answered: Whether rows must have an answer.

        Raises:
            ConfigError: For `columns` that no format has.
        """

    @abstractmethod
    def encode(self, tokenizer: PreTrainedTokenizerBase, row: RowT, template: ChatTemplate) -> Encoded:
        """The tokens of a row.

        Raises:
            TokenizerError: If the chat template refuses the row.
            AnswerLostError: If it drops or changes an answer.
        """

    def texts(self, row: RowT) -> list[Sequence[Message]]:
        """The conversations that a row holds, each with its answer."""
        return [row.prompt_messages]

    def is_markup(self, row: RowT) -> bool:
        """Whether control tokens in the row's text are meant as such."""
        return False

    def check_encoded(self, encoded: Encoded) -> None:
        """Refuse a row for the tokens it became.

        Raises:
            RowError: If it can't be trained on.
        """

    def complete(self, name: str, parts: list[list[RowT]], report: SplitReport) -> list[list[RowT]]:
        """Look at the rows of a split together.

        Args:
            name: Name of the split.
            parts: Its rows, by source.
            report: Takes notes.

        Returns:
            The rows, changed where one depends on the others.

        Raises:
            DataError: If they don't go together.
        """
        return parts


class Pairs(RowType[Conversation]):
    """Conversations whose answers are learned from, and texts all of which is learned.

    Args:
        supervise: ``"all"`` answers, or the ``"last"`` one of each conversation only.
    """

    def __init__(self, supervise: Supervise = "all") -> None:
        self.supervise = supervise

    @property
    def name(self) -> str:  # type: ignore[override]
        """See `RowType`."""
        return f"pairs, {self.supervise}"

    def reader(
        self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None, *, answered: bool
    ) -> FieldReader[Conversation]:
        """See `RowType`."""
        return RowFormat(detect_format(rows, columns, answered=answered), columns, answered=answered)

    def encode(self, tokenizer: PreTrainedTokenizerBase, row: Conversation, template: ChatTemplate) -> Encoded:
        """See `RowType`."""
        if row.is_text:
            return encode_text(tokenizer, row.messages[0]["content"])
        last_only = self.supervise == "last"
        return encode(tokenizer, row.messages, template, row.template_kwargs, last_only=last_only)

    def texts(self, row: Conversation) -> list[Sequence[Message]]:
        """See `RowType`."""
        return [row.messages]

    def is_markup(self, row: Conversation) -> bool:
        """See `RowType`."""
        return row.is_text

    def check_encoded(self, encoded: Encoded) -> None:
        """See `RowType`."""
        if not bool(encoded.example.supervised.any()):
            fix = "The last answer has weight 0, and supervise='last' takes no other: leave the row out."
            raise RowError(None, "nothing is trained on", f"{len(encoded.example):,} tokens", fix)


PAIRS = Pairs()
"""The kind of `PairDataModule`."""
