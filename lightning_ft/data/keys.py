"""What the columns of rows and the keys of messages mean: which are read, and which are refused by name.

A name that is in no table here means nothing and is reported once as ignored. One that would change what is trained,
and isn't read, is refused with what to do instead: no row is trained on as something else than it says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""Roles as they are written (by OpenAI, ShareGPT, LLaMA-Factory, ms-swift, Open Assistant) to what they mean."""

CALL_ROLES = ("function_call", "tool_call")
"""Roles whose content is the JSON text of a tool call."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that the reasoning before an answer has in a message."""

TRAINED = ("train", "training", "weight", "loss")
"""Names of whether a turn is trained on: 0 or 1, false or true."""

READ_KEYS = ("role", "from", "content", "value", "tool_calls", "name", "tool_call_id", *REASONING, *TRAINED)
"""Keys of a message that are read."""

MEDIA = ("image", "images", "image_url", "audio", "audios", "video", "videos", "media", "pixel_values")
"""Columns of what isn't text."""


def says_something(value: Any) -> bool:
    """Whether a value is more than an empty cell or a switch that is off.

    Example:
        >>> [says_something(value) for value in ("a", 0, None, " ", [None], {"a": None}, float("nan"), False)]
        [True, True, False, False, False, False, False, False]
    """
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list):
        return any(says_something(item) for item in value)
    if isinstance(value, Mapping):
        return any(says_something(item) for item in value.values())
    return value is not None and value is not False and value == value


def _is_given(value: Any) -> bool:
    """Whether there is a value, false and 0 included."""
    return value is not None and value == value


def _is_verdict(value: Any) -> bool:
    """Whether a value says that something is good or bad, and isn't the name of a class."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "false")
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def _is_prose(value: Any) -> bool:
    """Whether a value is a text of several words, and no mode such as "on"."""
    return isinstance(value, str) and len(value.split()) > 1


@dataclass(frozen=True)
class Refusal:
    """Why a column or key can't be left out, and what to do about it.

    Args:
        fix: What to do.
        when: Of which values.
    """

    fix: str
    when: Callable[[Any], bool] = says_something


_WRITE_CALLS = "Write it as tool_calls: [{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}]."
_MARK_TURNS = "Remove it, and give each message 'train': true or false."
_WHOLE = "An answer that is to be continued can't be trained on: write the whole answer and remove the key."
_ONLY_TEXT = "Only text can be trained on: remove it, or the row."

REFUSED_KEYS: Mapping[str, Refusal] = {
    **dict.fromkeys((*MEDIA, "attachments", "input_audio"), Refusal(_ONLY_TEXT)),
    **dict.fromkeys(("function_call", "function_calls", "recipient"), Refusal(_WRITE_CALLS)),
    **dict.fromkeys(("tools", "functions"), Refusal("Give them to the row, as its column 'tools'.")),
    **dict.fromkeys(("prefix", "partial", "prefill"), Refusal(_WHOLE)),
    **dict.fromkeys(("loss_mask", "mask", "masked"), Refusal(_MARK_TURNS, _is_given)),
    **dict.fromkeys(
        ("thought", "thoughts", "think", "thinking_blocks", "reasoning_details", "reasoning_text"),
        Refusal("Give the reasoning as text, as 'reasoning_content'."),
    ),
    "train_detail": Refusal("Parts of a turn can't be masked: remove it, and mark whole turns with 'train'."),
    "loss_scale": Refusal("A turn is trained on or it isn't: remove it, and give 'train': true or false.", _is_given),
    "refusal": Refusal("Write the refusal as the content, and remove the key."),
    "channel": Refusal("Give what comes before the final answer as its 'reasoning_content', and remove the key."),
    "tool_plan": Refusal("Write it at the start of the content, and remove the key."),
}
"""Keys of a message that would change what is trained, and aren't read."""

_WEIGHT = "Rows can't be weighted: remove the column; repeat or remove rows, or mark turns with 'train': true or false."
_TOKENS = "Rows are tokenized here, from their text: remove the column."
_PREFERENCE = "Rows with a rejected answer are preferences: give them to a PreferenceDataModule."

REFUSED_COLUMNS: Mapping[str, Refusal] = {
    **dict.fromkeys(MEDIA, Refusal("Only text can be trained on: remove the column, or such rows.")),
    "functions": Refusal("Pass columns={'tools': 'functions'}, or rename the column."),
}
"""Columns that rows of no kind may have: they would change what is trained."""

FOREIGN_COLUMNS: Mapping[str, str] = {
    "segments": "Parts of a text can't be masked: write each row as messages, with 'train': false in answers that "
    "aren't to be learned.",
    "contents": "Write them as messages: [{'role': ..., 'content': ...}].",
    "completions": "Give each completion a row of its own, with its prompt and, for preferences, its label.",
    "rejected_messages": "Write the two conversations as 'chosen' and 'rejected'.",
    "rejected_response": "Write the turns before the last answer as 'prompt', that answer as 'chosen', and pass "
    "columns={'rejected': 'rejected_response'}.",
}
"""Columns of formats that aren't read, with what to write instead."""

_OF_TEMPLATES = ("documents", "enable_thinking", "reasoning_effort", "thinking_mode", "custom_instructions")

REFUSED_OF_CONVERSATIONS: Mapping[str, Refusal] = {
    **REFUSED_COLUMNS,
    **{
        name: Refusal(f"Pass columns={{'system': {name!r}}}, together with what columns= has, or remove the column.")
        for name in ("system_prompt", "system_message", "system_instruction")
    },
    **{
        name: Refusal(f"Write it into the row's chat_template_kwargs, as {{{name!r}: ...}}, or remove the column.")
        for name in _OF_TEMPLATES
    },
    **dict.fromkeys(
        REASONING,
        Refusal("Give it with the answer, as [{'role': 'assistant', 'reasoning_content': ..., 'content': ...}], or "
                "remove the column.", _is_prose),
    ),
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight"), Refusal(_WEIGHT, _is_given)),
    **dict.fromkeys(("input_ids", "completion_mask", "assistant_masks"), Refusal(_TOKENS)),
    "labels": Refusal(_TOKENS, lambda value: isinstance(value, list)),
    "history": Refusal("Write the earlier turns into the messages, and remove the column."),
    "suffix": Refusal("Text after the answer can't be given: write it into the question, and remove the column."),
}  # fmt: skip
"""Columns that rows with answers may not have either."""

_VERDICT = Refusal(
    "Rows with a verdict are preferences: give them to a PreferenceDataModule. Else remove the column, or, to train on "
    "it as the answer, write it as text and name it as the output in columns=.",
    _is_verdict,
)

REFUSED_OF_PAIRS: Mapping[str, Refusal] = {
    **REFUSED_OF_CONVERSATIONS,
    **dict.fromkeys(("label", "kto_tag"), _VERDICT),
    **dict.fromkeys(("rejected", "rejected_response", "rejected_messages"), Refusal(_PREFERENCE)),
    "non_preferred_output": Refusal(_PREFERENCE),
}
"""Columns that pairs may not have either."""
