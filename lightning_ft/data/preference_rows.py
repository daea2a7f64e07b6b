"""Read and encode rows of preferences: pairs of completions, or completions with a label."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.columns import Formats
from lightning_ft.data.encode import Encoded, encode
from lightning_ft.data.fields import CONVERSATIONS, FieldReader, Origin
from lightning_ft.data.formats import kwargs_key, turns_key
from lightning_ft.data.keys import REFUSED_IN_CONVERSATIONS, Refusal, is_nonempty
from lightning_ft.data.layout import Example
from lightning_ft.data.row_store import MappedRows
from lightning_ft.data.row_types import RowType
from lightning_ft.data.shared_prompts import shared_text, shared_turns
from lightning_ft.data.split_report import SplitReport
from lightning_ft.data.templates import ChatTemplate
from lightning_ft.data.turns import RowError, check_field, check_order
from lightning_ft.errors import DataError
from lightning_ft.types import Message

_PROMPTS = (
    "messages",
    "conversations",
    "instruction",
    "input",
)
"""Fields for the prompt next to `chosen` and `rejected`, in the formats of other trainers."""

FORMATS = Formats(
    required={
        "prompt_chosen_rejected": ("prompt", "chosen", "rejected"),
        **{f"{name}_chosen_rejected": (name, "chosen", "rejected") for name in _PROMPTS},
        "input_preferred_output": ("input", "preferred_output", "non_preferred_output"),
        "chosen_rejected": ("chosen", "rejected"),
        "prompt_completion_label": ("prompt", "completion", "label"),
        "instruction_output_label": ("instruction", "output", "label"),
        "messages_label": ("messages", "label"),
        "conversations_label": ("conversations", "label"),
    },
    extra={
        "prompt_chosen_rejected": ("margin", "history"),
        "messages_chosen_rejected": ("margin",),
        "conversations_chosen_rejected": ("margin",),
        "instruction_chosen_rejected": ("margin", "input", "history"),
        "input_chosen_rejected": ("margin", "history"),
        "input_preferred_output": ("margin",),
        "chosen_rejected": ("margin",),
        "instruction_output_label": ("input", "history"),
    },
)
"""Row formats of preferences in TRL, LLaMA-Factory, axolotl and OpenAI's files."""

_SAME = "There is no preference to learn: remove the row."


@dataclass(frozen=True)
class Preference:
    """A checked preference.

    Args:
        prompt: Turns before all completions, system turn (if any) first.
        completions: Turns after the prompt, each with an assistant turn last: (chosen, rejected), or one completion.
        labels: Whether each completion is desirable.
        source: File, hub name, or the name of an argument.
        row: Line or number of the row in the source.
        id: The row's `id` field, or ``source:row``.
        cluster: The row's `cluster` field, if any.
        margin: By how much the chosen completion is better; None if the row doesn't say.
        template_kwargs: Variables of the chat template besides the messages: `tools`, `enable_thinking`, ...
    """

    prompt: tuple[Message, ...]
    completions: tuple[tuple[Message, ...], ...]
    labels: tuple[bool, ...]
    source: str
    row: int
    id: str
    cluster: str | None = None
    margin: float | None = None
    template_kwargs: Mapping[str, object] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for duplicate rows."""
        completions = tuple(turns_key(completion) for completion in self.completions)
        return (turns_key(self.prompt), completions, self.labels, *kwargs_key(self.template_kwargs))

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The prompt."""
        return self.prompt

    def with_prompt(self, messages: Sequence[Message]) -> Preference:
        """The same row with another prompt."""
        return replace(self, prompt=tuple(messages))


class PreferenceFormat(FieldReader[Preference]):
    """Reads rows of one format as preferences.

    Args:
        name: One of :data:`FORMATS`.
        columns: Field names of the format to those in the data, where they differ.

    Example:
        >>> row = PreferenceFormat("chosen_rejected").read({"chosen": "2+2? 4", "rejected": "2+2? 5"}, "train", 1)
        >>> row.prompt[0]["content"], [completion[0]["content"] for completion in row.completions]
        ('2+2?', [' 4', ' 5'])
    """

    refused: ClassVar[Mapping[str, Refusal]] = REFUSED_IN_CONVERSATIONS

    def __init__(self, name: str, columns: Mapping[str, str] | None = None) -> None:
        super().__init__(FORMATS, name, columns)
        fields = FORMATS.required[name]
        self.paired = "label" not in fields
        self.answers = tuple(field for field in fields if field != "label")[-2 if self.paired else -1 :]
        """Fields of the completions; for a conversation with a label, the conversation."""

    def _read(self, row: Mapping[str, object], origin: Origin) -> Preference:
        self._check_not_mixed(row)
        row = self._without_nesting(row)
        if self.name == "chosen_rejected":
            prompt, sides = self._implicit(row)
        elif not self.paired and self.answers[0] in CONVERSATIONS:
            prompt, sides = self._labeled_conversation(row)
        else:
            prompt = self.read_prompt(row)
            sides = [self.side(row, name, "assistant") for name in self.answers]
            if prompt == sides[0] and isinstance(row[self.column(self.answers[0])], list):
                prompt, sides = self._implicit(row)  # the chosen conversation again, as a column of its own
            prompt, sides = _without_repeated_prompt(prompt, sides)
        prompt = self.with_system(row, prompt)
        self._check_turns(prompt, sides)
        template_kwargs = self.template_kwargs(row)
        return Preference(
            prompt=self.with_known_arguments(prompt, template_kwargs),
            completions=tuple(self.with_known_arguments(side, template_kwargs) for side in sides),
            labels=(True, False) if self.paired else (self._label(row),),
            margin=self._margin(row) if self.paired else None,
            template_kwargs=template_kwargs,
            **origin,
        )

    def _without_nesting(self, row: Mapping[str, object]) -> Mapping[str, object]:
        """The row with a nested ``input`` of ``{messages, tools}`` (OpenAI's files) unpacked."""
        column = self.column(self.formats.required[self.name][0])
        nested = row.get(column)
        if not isinstance(nested, Mapping) or not isinstance(nested.get("messages"), list):
            return row
        others = {key: value for key, value in nested.items() if key not in ("messages", "tools")}
        self.ignored.update(f"{column}.{key}" for key, value in others.items() if is_nonempty(value))
        tools = {self.column("tools"): nested["tools"]} if is_nonempty(nested.get("tools")) else {}
        return {**row, **tools, column: nested["messages"]}

    def _labeled_conversation(self, row: Mapping[str, object]) -> tuple[list[Message], list[list[Message]]]:
        """The prompt and the labeled last turn of a conversation."""
        turns = self.side(row, self.answers[0], None)
        if not turns or turns[-1]["role"] != "assistant":
            roles = f"roles: {', '.join(turn['role'] for turn in turns) or 'none'}"
            fix = "The label is for the last answer of the conversation: add the answer, or remove the row."
            raise RowError(self.column(self.answers[0]), "no answer to the last turn", roles, fix)
        return turns[:-1], [turns[-1:]]

    def _check_not_mixed(self, row: Mapping[str, object]) -> None:
        own, other = (self.answers[0], "label") if self.paired else ("label", "chosen")
        if self.column(own) not in row and self.column(other) in row:
            detail = f"fields: {', '.join(map(str, row))}"
            fix = "Pairs and completions with a label can't be mixed: put them into separate DataModules."
            raise RowError(None, f"not {'a pair' if self.paired else 'a completion with a label'}", detail, fix)

    def _implicit(self, row: Mapping[str, object]) -> tuple[list[Message], list[list[Message]]]:
        """The prompt that two whole conversations or texts share at the start, and the rest of each."""
        columns = self.column("chosen"), self.column("rejected")
        values = self.value(row, "chosen"), self.value(row, "rejected")
        if all(isinstance(value, str) for value in values):
            prompt, left, right = shared_text(
                *(check_field(v, c, "assistant") for v, c in zip(values, columns, strict=True))
            )
            turns = [Message(role="user", content=prompt)] if prompt.strip() else []
            sides = [[Message(role="assistant", content=t)] if t.strip() else [] for t in (left, right)]
        elif all(isinstance(value, list) for value in values):
            turns, *sides = shared_turns(*(self.side(row, name, None) for name in ("chosen", "rejected")))
        else:
            types = " and ".join(type(value).__name__ for value in values)
            fix = "Expected two strings or two lists of messages."
            raise RowError(columns[1], "wrong type", f"found {types}", fix)
        if values[0] == values[1]:
            raise RowError(columns[1], "chosen and rejected are the same", "", _SAME)
        if not turns:
            fix = "Without a prompt column both must start with the same prompt."
            raise RowError(None, "no shared prompt", f"fields: {', '.join(map(str, row))}", fix)
        for column, side in zip(columns, sides, strict=True):
            if not side:
                detail = "the other one starts with all of it"
                fix = "Write the prompt into a column of its own, or remove the row."
                raise RowError(column, "nothing left after the shared prompt", detail, fix)
        return turns, sides

    def _check_turns(self, prompt: list[Message], sides: list[list[Message]]) -> None:
        if not any(message["role"] == "user" for message in prompt):
            roles = f"roles: {', '.join(message['role'] for message in prompt) or 'none'}"
            field = None if self.name == "chosen_rejected" else self.column(self.formats.required[self.name][0])
            raise RowError(field, "no question in the prompt", roles, "Add a user turn to the prompt.")
        if prompt[-1]["role"] == "assistant" and any(side[:1] and side[0]["role"] == "assistant" for side in sides):
            fix = "End it with the turn to answer; if chosen and rejected are whole conversations, remove the column."
            raise RowError(self.column(self.formats.required[self.name][0]), "prompt ends with an answer", "", fix)
        for name, side in zip(self.answers, sides, strict=True):
            try:
                if not side:
                    raise RowError(None, "empty output", "", "Fill it in or remove the row.")
                check_order([*prompt, *side], answered=True)
                if not side[-1].get("train", True):
                    fix = "Only the last turn is trained on: remove the row, or the mark."
                    raise RowError(None, "completion that isn't to be trained on", "", fix)
            except RowError as error:
                raise RowError(error.field or self.column(name), error.reason, error.detail, error.fix) from None
        if self.paired and sides[0] == sides[1]:
            raise RowError(self.column(self.answers[1]), "chosen and rejected are the same", "", _SAME)

    def _label(self, row: Mapping[str, object]) -> bool:
        value = self.value(row, "label")
        if isinstance(value, str):  # from a CSV file
            value = {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower(), value)
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowError(
                self.column("label"), "label isn't a boolean", repr(value)[:40], "Expected true, false, 1 or 0."
            )
        return bool(value)

    def _margin(self, row: Mapping[str, Any]) -> float | None:
        column = self.column("margin")
        if "margin" in self.columns and column not in row:
            raise self.missing(row, "margin")
        value = row.get(column)
        if value is None or (isinstance(value, str) and not value):  # an empty cell of a CSV file
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            fix = "Expected a finite number: by how much the chosen completion is better."
            raise RowError(column, "margin isn't a finite number", repr(value)[:40], fix)
        return number


def _without_repeated_prompt(
    prompt: list[Message], sides: list[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """Remove the prompt from sides that all start with it: some datasets have both it and whole conversations."""
    system = sides[0][:1] if sides[0][:1] and sides[0][0]["role"] == "system" and prompt[:1] != sides[0][:1] else []
    whole = [*system, *prompt]
    if prompt and all(_stripped(side[: len(whole)]) == _stripped(whole) for side in sides):
        return whole, [side[len(whole) :] for side in sides]
    return prompt, sides


def _stripped(messages: Sequence[Message]) -> list[dict[str, object]]:
    """Messages without the white space around them, in which copies of a prompt differ."""
    return [{**message, "content": message["content"].strip()} for message in messages]


class Preferences(RowType[Preference]):
    """Pairs of completions or labeled completions, of which only the last turn is supervised."""

    name = "preferences"

    def reader(
        self, rows: Sequence[Mapping[str, object]], columns: Mapping[str, str] | None, *, answered: bool
    ) -> FieldReader[Preference]:
        """See `RowType`."""
        return PreferenceFormat(FORMATS.detect(rows, columns), columns)

    def encode(self, tokenizer: PreTrainedTokenizerBase, row: Preference, template: ChatTemplate) -> Encoded:
        """See `RowType`."""
        sides = [
            encode(tokenizer, [*row.prompt, *completion], template, row.template_kwargs, last_only=True)
            for completion in row.completions
        ]
        different = next((side.mismatch for side in sides if side.mismatch is not None), None)
        notes = tuple(dict.fromkeys(note for side in sides for note in side.notes))
        return Encoded(tuple(side.example for side in sides), different is None, notes, different)

    def texts(self, row: Preference) -> list[Sequence[Message]]:
        """See `RowType`."""
        return [[*row.prompt, *completion] for completion in row.completions]

    def check_encoded(self, encoded: Encoded) -> None:
        """See `RowType`."""
        first, *others = (example.input_ids.tolist() for example in encoded.examples)
        if first in others:
            fix = "The chat template removes their difference: remove the row, or pass another chat_template=."
            raise RowError(None, "chosen and rejected become the same tokens", f"{len(first):,} tokens", fix)
        if not len(split_shared(encoded.examples)[0]):
            fix = "The chat template starts them differently: pass another chat_template=."
            raise RowError(None, "no token is shared before the answers", "", fix)

    def complete(self, name: str, parts: list[Sequence[Preference]], report: SplitReport) -> list[Sequence[Preference]]:
        """Refuse a mix of pairs and single completions. Where only some have a margin, others get 0 and a note."""
        first_rows = {len(row.completions): row for part in reversed(parts) for row in reversed(part)}
        if len(first_rows) > 1:
            pair, single = (f"{first_rows[n].source}, row {first_rows[n].row}" for n in (2, 1))
            raise DataError(
                f"{name} mixes pairs ({pair}) with completions that have a label ({single}): they have different "
                "losses. Put them into separate DataModules."
            )
        without = sum(row.margin is None for part in parts for row in part)
        if not without or without == sum(map(len, parts)):
            return parts
        report.notes["no margin, treated as 0"] += without
        return [MappedRows(part, _with_margin) for part in parts]

    def follow(self, name: str, first: Sequence[Preference]) -> Callable[[Preference], Preference]:
        """Pairs or single completions, with or without a margin, as the first rows are."""
        self.complete(name, [list(first)], SplitReport())
        return partial(_as_first, len(first[0].completions), any(row.margin is not None for row in first))


def _with_margin(row: Preference) -> Preference:
    return row if row.margin is not None else replace(row, margin=0.0)


def _as_first(completions: int, has_margin: bool, row: Preference) -> Preference:
    if len(row.completions) != completions:
        found, expected = (
            ("a pair", "completions with a label") if completions == 1 else ("a single completion", "pairs")
        )
        fix = "They have different losses: put them into separate DataModules."
        raise RowError(None, f"{found} in a stream of {expected}", "", fix)
    if row.margin is not None and not has_margin:
        fix = "Give the first rows a margin, too, such as 0, or remove the column."
        raise RowError("margin", "a margin in a stream whose first rows have none", f"{row.margin}", fix)
    return _with_margin(row) if has_margin else row


PREFERENCES = Preferences()
"""Row type of `PreferenceDataModule`."""


def split_shared(examples: Sequence[Example]) -> tuple[Tensor, tuple[Example, ...]]:
    """Split encoded conversations into the tokens that all of them start with, and the rest of each.

    All supervised tokens are in the rest.

    Args:
        examples: One example per completion, prompt included.

    Returns:
        The shared tokens, ``int64 [t]``, and the completions.

    Example:
        >>> examples = [
        ...     Example(torch.tensor(ids), torch.tensor([False, False, True, True]))
        ...     for ids in ([5, 6, 7, 8], [5, 6, 7, 9])
        ... ]
        >>> prompt, (chosen, rejected) = split_shared(examples)
        >>> prompt.tolist(), chosen.input_ids.tolist(), rejected.input_ids.tolist()
        ([5, 6], [7, 8], [7, 9])
    """
    most = min(int(example.supervised.int().argmax()) for example in examples)
    first = examples[0].input_ids[:most]
    same = torch.stack([example.input_ids[:most] == first for example in examples]).all(0)
    shared = int(same.int().cumprod(0).sum())
    return first[:shared], tuple(
        Example(example.input_ids[shared:], example.supervised[shared:]) for example in examples
    )


__all__ = ["FORMATS", "PREFERENCES", "Preference", "PreferenceFormat", "Preferences", "split_shared"]
