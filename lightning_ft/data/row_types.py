"""Row types: how the rows of a DataModule are read and encoded."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

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
    """A checked row of any type."""

    @property
    def source(self) -> str:
        """Source of the row."""

    @property
    def row(self) -> int:
        """Line or number of the row in its source."""

    @property
    def id(self) -> str:
        """Id of the row, or its source and number."""

    @property
    def cluster(self) -> str | None:
        """Group that the row belongs to, if it names one."""

    @property
    def key(self) -> tuple[object, ...]:
        """All that the tokens depend on, so duplicates have equal keys; strings and tuples."""

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """Turns before the answer; the user turns among them may be cut."""

    @property
    def template_kwargs(self) -> Mapping[str, object]:
        """Variables for the chat template in addition to the messages."""

    def with_prompt(self: Self, messages: Sequence[Message]) -> Self:
        """A copy of the row with other turns before the answer."""


RowT = TypeVar("RowT", bound=Row)


def row_digest(row: Row) -> bytes:
    """16 bytes that are equal for duplicate rows, to remember a row by."""
    return blake2b(json.dumps(row.key).encode(), digest_size=16).digest()


class RowType(ABC, Generic[RowT]):
    """Base of the row types.

    Args:
        name: Name of the type, a part of the keys of cache entries.
    """

    name: ClassVar[str]

    @abstractmethod
    def reader(
        self, rows: Sequence[Mapping[str, object]], columns: Mapping[str, str] | None, *, answered: bool
    ) -> FieldReader[RowT]:
        """The reader for the rows of a source.

        Args:
            rows: First rows of the source, to detect their format.
            columns: Mapping from field names of the format to columns of the data.
            answered: Whether rows must have an answer.

        Raises:
            ConfigError: For `columns` that no format has.
        """

    @abstractmethod
    def encode(self, tokenizer: PreTrainedTokenizerBase, row: RowT, template: ChatTemplate) -> Encoded:
        """Encode a row.

        Raises:
            TokenizerError: If the chat template refuses the row.
            AnswerLostError: If the template drops or changes an answer.
        """

    def texts(self, row: RowT) -> list[Sequence[Message]]:
        """Conversations in a row, each with its answer."""
        return [row.prompt_messages]

    def is_markup(self, row: RowT) -> bool:
        """Whether control tokens in the row's text are intended."""
        return False

    def check_encoded(self, encoded: Encoded) -> None:
        """Refuse a row whose tokens can't be trained on.

        Raises:
            RowError: With the reason.
        """

    def complete(self, name: str, parts: list[Sequence[RowT]], report: SplitReport) -> list[Sequence[RowT]]:
        """Check and complete the rows of a split together.

        Args:
            name: Name of the split.
            parts: Rows of the split, by source.
            report: Report that notes are added to.

        Returns:
            The rows, changed where a row depends on the others.

        Raises:
            DataError: If the rows don't fit together.
        """
        return parts

    def follow(self, name: str, first: Sequence[RowT]) -> Callable[[RowT], RowT]:
        """What `complete` does, for rows of which only the first are known: those of a stream.

        Args:
            name: Name of the split.
            first: The first rows, at least one.

        Returns:
            A function that checks and completes each row, and raises a `RowError` if it doesn't fit the first ones.

        Raises:
            DataError: If the first rows don't fit together.
        """
        return unchanged


def unchanged(row: RowT) -> RowT:
    """Return a row as it is."""
    return row


class Pairs(RowType[Conversation]):
    """Conversations with supervised answers, and texts that are supervised as a whole.

    Args:
        supervise: Supervised answers of each conversation: ``"all"``, or only the ``"last"``.
    """

    def __init__(self, supervise: Supervise = "all") -> None:
        self.supervise = supervise

    @property
    def name(self) -> str:  # type: ignore[override]
        """See `RowType`."""
        return f"pairs, {self.supervise}"

    def reader(
        self, rows: Sequence[Mapping[str, object]], columns: Mapping[str, str] | None, *, answered: bool
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
            fix = (
                "The last answer has weight 0, and there is no other, supervise='last' leaves it out, or its whole "
                "question was cut to max_length: leave the row out."
            )
            raise RowError(None, "no supervised token", f"{len(encoded.example):,} tokens", fix)


PAIRS = Pairs()
"""The row type of `PairDataModule`."""
