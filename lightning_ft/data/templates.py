"""Chat templates: which one a tokenizer's conversations are rendered with, and where the answers stand in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from lightning_ft.data.request import Message
from lightning_ft.errors import ConfigError, TokenizerError

PLAIN_TEMPLATE = (
    "{{- bos_token if bos_token else '' -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "{{- 'Assistant:\n' -}}{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}{{- '\n' -}}"
    "{%- elif message.role == 'user' -%}{{- 'User:\n' + message.content + '\n' -}}"
    "{%- elif message.role == 'system' -%}{{- message.content + '\n' -}}"
    "{%- else -%}{{- raise_exception('unknown role: ' + message.role) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:\n' -}}{%- endif -%}"
)
"""What a tokenizer without a chat template gets: ``User:`` and ``Assistant:`` on lines of their own, the answer ended
by EOS.

The answer starts on a new line because tokenizers merge a space, but not a line break, with the word behind it: so the
tokens of the prompt are the same with and without an answer."""

TEXT_TEMPLATE = (
    "{{- bos_token if bos_token else '' -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- message.content -}}{%- endif -%}"
    "{%- endfor -%}"
)
"""No markup at all: prompt, completion, EOS, for models that are used to continue a text."""

NAMED = {"plain": PLAIN_TEMPLATE, "text": TEXT_TEMPLATE}
"""Templates that can be asked for by name."""


@dataclass(frozen=True)
class ChatTemplate:
    """How a tokenizer's conversations are rendered.

    Args:
        inference: The template that prompts are rendered with, as a server would.
        training: The one with generation markers, or None where there is none and renderings are compared.
    """

    inference: str
    training: str | None


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give a tokenizer another chat template, which it is then also asked and exported with.

    Args:
        tokenizer: It is changed.
        template: ``"plain"`` (:data:`PLAIN_TEMPLATE`), ``"text"`` (:data:`TEXT_TEMPLATE`), a ``.jinja`` file, or Jinja
            itself.

    Raises:
        ConfigError: If it is none of these.
    """
    if template in NAMED:
        tokenizer.chat_template = NAMED[template]
    elif "{" in template:
        tokenizer.chat_template = template
    elif Path(template).is_file():
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    else:
        raise ConfigError(
            f"chat_template={template!r}: expected 'plain', 'text', a file that exists, or a Jinja template."
        )


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The templates of a tokenizer; one without any is given :data:`PLAIN_TEMPLATE`, so that it is exported with it.

    Raises:
        TokenizerError: If the tokenizer has no EOS token, or several templates and none of them named "default".
    """
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"{type(tokenizer).__name__} has no EOS token, so an answer could never be ended. Set tokenizer.eos_token "
            "to the token that ends a turn."
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise TokenizerError(f"{error} Pass chat_template=.") from error
    if has_generation_markers(template):
        return ChatTemplate(template, template)
    try:
        return ChatTemplate(template, get_training_chat_template(tokenizer))
    except (ValueError, TemplateError):  # TRL doesn't know this template
        return ChatTemplate(template, None)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: ChatTemplate) -> str:
    """The text that a model continues to answer a conversation.

    Raises:
        TokenizerError: If the template refuses the conversation.
    """
    return _render(tokenizer, messages, template.inference, prompt=True)[0]


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: ChatTemplate
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and start and stop of each assistant turn in it.

    Raises:
        TokenizerError: If the template refuses the conversation.
    """
    if template.training is not None:
        return _render(tokenizer, messages, template.training, spans=True)
    text = _render(tokenizer, messages, template.inference)[0]
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(tokenizer, messages[:i], template.inference, prompt=True)[0]
            through = _render(tokenizer, messages[: i + 1], template.inference)[0]
            start, stop = _common(before, text), _common(through, text)
            if stop > start:
                spans.append((start, stop))
    return text, spans


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: str,
    *,
    prompt: bool = False,
    spans: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    # What `apply_chat_template` does before it tokenises; that itself doesn't tell where in the text the answers stand.
    variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
    rendered: Any
    try:
        rendered = render_jinja_template(
            [[dict(message) for message in messages]],
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans,
            **variables,
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise TokenizerError(f"the chat template refuses a conversation of {roles}: {error}") from error
    texts, generated = rendered  # one conversation each
    return texts[0], [(int(start), int(stop)) for start, stop in generated[0]] if spans else []


def _common(left: str, right: str) -> int:
    """How many characters two texts start with in common."""
    if right.startswith(left):
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
