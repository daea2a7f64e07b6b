"""Columns of rows and keys of messages: which are read, and which are refused by name.

Names that are in none of these tables are ignored, and reported once. A name that isn't read, but would change what is
trained, is refused with a remedy, so that no row is trained on as something else than it says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
"""Names of roles (in OpenAI, ShareGPT, LLaMA-Factory, ms-swift and Open Assistant data) to the roles they mean."""

CALL_ROLES = ("function_call", "tool_call")
"""Roles whose content is the JSON text of a tool call."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message for the reasoning before an answer."""

TRAINED = ("train", "training", "weight", "loss")
"""Keys of a message that say whether the turn is trained on: 0 or 1, false or true."""

READ_KEYS = ("role", "from", "content", "value", "tool_calls", "name", "tool_call_id", *REASONING, *TRAINED)
"""Keys of a message that are read."""

MEDIA = ("image", "images", "image_url", "audio", "audios", "video", "videos", "media", "pixel_values")
"""Columns with content other than text."""


def is_nonempty(value: object) -> bool:
    """Whether a value is more than an empty cell or a false flag.

    Example:
        >>> [is_nonempty(value) for value in ("a", 0, None, " ", [None], {"a": None}, float("nan"), False)]
        [True, True, False, False, False, False, False, False]
    """
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list):
        return any(is_nonempty(item) for item in value)
    if isinstance(value, Mapping):
        return any(is_nonempty(item) for item in value.values())
    return value is not None and value is not False and value == value


def _is_present(value: object) -> bool:
    """Whether there is a value, which may be false or 0."""
    return value is not None and value == value


def _is_verdict(value: object) -> bool:
    """Whether a value means good or bad, and isn't the name of a class."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "false", "0", "1")  # all values of a CSV file are texts
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def _is_prose(value: object) -> bool:
    """Whether a value is a text of several words, unlike a mode such as "on"."""
    return isinstance(value, str) and len(value.split()) > 1


@dataclass(frozen=True)
class Refusal:
    """A column or key that is refused rather than ignored.

    Args:
        fix: What to do about it.
        when: Whether a value is refused.
    """

    fix: str
    when: Callable[[object], bool] = is_nonempty


_WRITE_CALLS = "Write it as tool_calls: [{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}]."
_MARK_TURNS = "Remove it, and give each message 'train': true or false."
_WHOLE = "An unfinished answer can't be trained on: write the whole answer, and remove the key."
_ONLY_TEXT = "Only text can be trained on: remove it, or the row."

REFUSED_KEYS: Mapping[str, Refusal] = {
    **dict.fromkeys((*MEDIA, "attachments", "input_audio"), Refusal(_ONLY_TEXT)),
    **dict.fromkeys(("function_call", "function_calls", "recipient"), Refusal(_WRITE_CALLS)),
    **dict.fromkeys(("tools", "functions"), Refusal("Move them to the column 'tools' of the row.")),
    **dict.fromkeys(("prefix", "partial", "prefill"), Refusal(_WHOLE)),
    **dict.fromkeys(("loss_mask", "mask", "masked"), Refusal(_MARK_TURNS, _is_present)),
    **dict.fromkeys(
        ("thought", "thoughts", "think", "thinking_blocks", "reasoning_details", "reasoning_text"),
        Refusal("Write the reasoning as text, in 'reasoning_content'."),
    ),
    "train_detail": Refusal("Parts of a turn can't be masked: remove it, and mark whole turns with 'train'."),
    "loss_scale": Refusal("A turn is trained on or it isn't: remove it, and give 'train': true or false.", _is_present),
    "refusal": Refusal("Write the refusal as the content, and remove the key."),
    "channel": Refusal("Write what precedes the final answer into its 'reasoning_content', and remove the key."),
    "tool_plan": Refusal("Write it at the start of the content, and remove the key."),
}
"""Keys of a message that would change what is trained, but aren't read."""

_WEIGHT = "Rows can't be weighted: remove the column; repeat or remove rows, or mark turns with 'train': true or false."
_TOKENS = "Rows are tokenized from their text: remove the column."
_PREFERENCE = "Rows with a rejected answer are preferences: pass them to a PreferenceDataModule."

REFUSED_COLUMNS: Mapping[str, Refusal] = {
    **dict.fromkeys(MEDIA, Refusal("Only text can be trained on: remove the column, or such rows.")),
    "functions": Refusal("Pass columns={'tools': 'functions'}, or rename the column."),
}
"""Columns that no type of row may have: they would change what is trained."""

FOREIGN_COLUMNS: Mapping[str, str] = {
    "segments": "Parts of a text can't be masked: write each row as messages, with 'train': false in answers that "
    "aren't to be learned.",
    "contents": "Write them as messages: [{'role': ..., 'content': ...}].",
    "completions": "Write each completion as a row of its own, with its prompt and, for preferences, its label.",
    "rejected_messages": "Write the two conversations as 'chosen' and 'rejected'.",
    "rejected_response": "Write the turns before the last answer as 'prompt', that answer as 'chosen', and pass "
    "columns={'rejected': 'rejected_response'}.",
}
"""Columns of unsupported formats, with what to write instead."""

_TEMPLATE_VARIABLES = ("documents", "enable_thinking", "reasoning_effort", "thinking_mode", "custom_instructions")

REFUSED_IN_CONVERSATIONS: Mapping[str, Refusal] = {
    **REFUSED_COLUMNS,
    **{
        name: Refusal(f"Pass columns={{'system': {name!r}}}, with what columns= already names, or remove the column.")
        for name in ("system_prompt", "system_message", "system_instruction")
    },
    **{
        name: Refusal(f"Write it into the row's chat_template_kwargs, as {{{name!r}: ...}}, or remove the column.")
        for name in _TEMPLATE_VARIABLES
    },
    **dict.fromkeys(
        REASONING,
        Refusal("Write it with the answer, as [{'role': 'assistant', 'reasoning_content': ..., 'content': ...}], or "
                "remove the column.", _is_prose),
    ),
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight"), Refusal(_WEIGHT, _is_present)),
    **dict.fromkeys(("input_ids", "completion_mask", "assistant_masks"), Refusal(_TOKENS)),
    "labels": Refusal(_TOKENS, lambda value: isinstance(value, list)),
    "history": Refusal("Write the earlier turns into the messages, and remove the column."),
    "suffix": Refusal("Text after the answer isn't supported: write it into the question, and remove the column."),
}  # fmt: skip
"""Further columns that rows with answers may not have."""

_VERDICT = Refusal(
    "Rows with a label for good or bad are preferences: pass them to a PreferenceDataModule. Otherwise remove the "
    "column, or, to train on it as the answer, write it as text and name it as the output in columns=.",
    _is_verdict,
)

REFUSED_IN_PAIRS: Mapping[str, Refusal] = {
    **REFUSED_IN_CONVERSATIONS,
    **dict.fromkeys(("label", "kto_tag"), _VERDICT),
    **dict.fromkeys(("rejected", "rejected_response", "rejected_messages"), Refusal(_PREFERENCE)),
    "non_preferred_output": Refusal(_PREFERENCE),
}
"""Further columns that pairs may not have."""
