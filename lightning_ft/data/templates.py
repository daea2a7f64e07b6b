"""Renders conversations with a tokenizer's chat template.

A template is code by the publisher of the checkpoint. It runs in transformers' sandbox, and here within limits of time
and size; whatever it raises becomes an error of this package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lightning_ft.data.time_limit import MemoryLimitError, TimeLimitError, within
from lightning_ft.errors import ConfigError, TokenizerError
from lightning_ft.types import Message

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
"""Template for a tokenizer without one: ``User:`` and ``Assistant:`` on lines of their own, and EOS after the answer.

The answer starts on a new line because tokenizers merge a space, but not a line break, with the word after it, so the
tokens of the prompt are the same with and without an answer."""

TEXT_TEMPLATE = (
    "{{- bos_token if bos_token else '' -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- message.content -}}{%- endif -%}"
    "{%- endfor -%}"
)
"""Template without any markup: prompt, completion, EOS, for models that continue a text."""

NAMED = {"plain": PLAIN_TEMPLATE, "text": TEXT_TEMPLATE}
"""Templates that can be chosen by name."""

MAX_SECONDS = 10.0
"""Time limit in seconds for rendering one conversation."""

MAX_CHARACTERS = 50_000_000
"""Maximum number of characters in one rendered conversation."""

MAX_MEMORY = 2_000_000_000
"""Maximum number of bytes by which the process may grow while it renders a conversation."""

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_KEYS = ("role", "content", "tool_calls", "reasoning_content", "name", "tool_call_id")


class ChatTemplate:
    """The present chat template of a tokenizer.

    Args:
        tokenizer: The tokenizer. One without a template gets :data:`PLAIN_TEMPLATE`, and is exported with it.

    Raises:
        TokenizerError: If the tokenizer has no EOS token, or several templates and none of them named "default".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise TokenizerError(
                f"{type(tokenizer).__name__} has no EOS token, so no answer could ever end. Set tokenizer.eos_token "
                "to the token that ends a turn."
            )
        if not tokenizer.chat_template:
            tokenizer.chat_template = PLAIN_TEMPLATE
        try:
            self.source: str = tokenizer.get_chat_template()
            self._with_tools: str = tokenizer.get_chat_template(tools=[{}])
        except ValueError as error:
            raise TokenizerError(f"{error} Pass chat_template=.") from error
        self.tokenizer = tokenizer
        self._variables: dict[str, object] = dict(tokenizer.special_tokens_map)
        self._forms: dict[str, _Form] = {}
        self.cached: dict[Hashable, Any] = {}
        """Facts about the template that were found by rendering conversations, by key."""

    @property
    def sources(self) -> list[str]:
        """The Jinja source, and the one for rows with tools if it differs."""
        return [self.source] if self._with_tools == self.source else [self.source, self._with_tools]

    @property
    def is_markup_free(self) -> bool:
        """Whether the template writes nothing but the messages, so that rows may hold markup of their own."""
        return self.source == TEXT_TEMPLATE

    @property
    def has_markers(self) -> bool:
        """Whether the template marks generated text itself."""
        return any(_MARKERS.search(source) for source in self.sources)

    @cached_property
    def reads(self) -> frozenset[str]:
        """Names of the variables that the template reads."""
        environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
        names: set[str] = set()
        for source in self.sources:
            try:
                names |= meta.find_undeclared_variables(environment.parse(_without_markers(source)))
            except Exception as error:  # TemplateError, or RecursionError for deep nesting
                raise TokenizerError(f"the chat template is not valid Jinja: {error}") from error
        return frozenset(names)

    @property
    def reads_the_date(self) -> bool:
        """Whether its text depends on the date."""
        return "strftime_now" in self.reads

    def today(self) -> str:
        """Today's date as a template reads it."""
        return _run("{{ strftime_now('%Y-%m-%d') }}", [], {})[0]

    def render(
        self, messages: Sequence[Message], kwargs: Mapping[str, object] | None = None, *, prompt: bool = False
    ) -> str:
        """Render a conversation.

        Args:
            messages: The conversation.
            kwargs: Variables in addition to the messages: `tools`, `enable_thinking`, ...
            prompt: Whether the text ends with the generation prompt, which a model continues.

        Raises:
            TokenizerError: If the template refuses the conversation, fails, or takes too long.
        """
        return self._render(messages, kwargs or {}, prompt=prompt)[0]

    def marked(self, messages: Sequence[Message], kwargs: Mapping[str, object] | None = None) -> list[tuple[int, int]]:
        """Spans of characters that the template's own markers declare as generated, in the text of a conversation."""
        return self._render(messages, kwargs or {}, marked=True)[1] if self.has_markers else []

    def _render(
        self, messages: Sequence[Message], kwargs: Mapping[str, object], *, prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        source = self._with_tools if kwargs.get("tools") else self.source
        options = {**self._variables, **kwargs, "add_generation_prompt": prompt, "return_assistant_tokens_mask": marked}
        calls = any(message.get("tool_calls") for message in messages)
        if not calls and not self._wants_parts(source):
            return _run(source, [_STRINGS(message) for message in messages], options)
        key = f"{source}{prompt}"
        proven = [self._forms[key]] if key in self._forms else []
        failed: list[TokenizerError] = []
        for form in [*proven, *(_FORMS if calls else _FORMS[-1:])]:
            try:
                rendered = _run(source, [form(message) for message in messages], options)
            except TokenizerError as error:
                failed.append(error)
                continue
            contents = " ".join(message["content"] for message in messages)
            if all(_is_written(message, rendered[0], contents) for message in messages):
                self._forms[key] = form
                return rendered
            leaves_out = (
                "the chat template leaves out tool calls, or their arguments. Pass a chat_template= that "
                "writes tool_calls, or write the calls into the content as the model should"
            )
            failed.insert(0, TokenizerError(leaves_out))
        raise failed[0]

    def _wants_parts(self, source: str) -> bool:
        """Whether contents have to be lists of parts, as in some templates of models that read images too."""
        key = ("parts", source)
        if isinstance(cached := self.cached.get(key), TokenizerError):
            raise cached
        if cached is None:
            mark, options = "905316", {**self._variables, "add_generation_prompt": True}
            written = []
            for form in (_STRINGS, _PARTS):
                try:
                    text = _run(source, [form(Message(role="user", content=mark))], options)[0]
                except TokenizerError as error:
                    if isinstance(error.__cause__, (TimeLimitError, MemoryLimitError)):
                        self.cached[key] = error  # every row would fail in the same way
                        raise
                    text = ""
                written.append(mark in text)
            self.cached[key] = written == [False, True]
        return bool(self.cached[key])


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The chat template of a tokenizer, see `ChatTemplate`.

    Raises:
        TokenizerError: If the tokenizer has no EOS token, or several templates and none of them named "default".
    """
    return ChatTemplate(tokenizer)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Set the chat template of a tokenizer, which generation and export then use too.

    Args:
        tokenizer: Tokenizer to change.
        template: ``"plain"`` (:data:`PLAIN_TEMPLATE`), ``"text"`` (:data:`TEXT_TEMPLATE`), a ``.jinja`` file, or Jinja
            source.

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


# ---------------------------------------------------------------- forms of tool calls

_Form = Callable[[Message], dict[str, Any]]
"""Converts a message for a template. Templates expect tool calls in different forms: arguments as an
object or as JSON text, and empty content or none. The first form whose parts all appear in the text is used."""


def _form(*, as_text: bool = False, empty: bool = True, parts: bool = False) -> _Form:
    def form(message: Message) -> dict[str, Any]:
        fields = {key: message[key] for key in _TEMPLATE_KEYS if key in message}  # type: ignore[literal-required]
        if parts:
            fields["content"] = [{"type": "text", "text": fields["content"]}] if fields["content"] else []
        if not fields.get("tool_calls"):
            return fields
        if not fields["content"] and not empty:
            del fields["content"]
        if as_text:
            fields["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
                for call in fields["tool_calls"]
            ]
        return fields

    return form


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_STRINGS, _PARTS = _form(), _form(parts=True)
_FORMS = [_form(as_text=as_text, empty=empty) for as_text in (False, True) for empty in (False, True)] + [_PARTS]


def _is_written(message: Message, text: str, contents: str) -> bool:
    """Whether a text contains the tool calls of a message, and not as Python would print them.

    Args:
        message: A turn.
        text: Rendered text of the conversation.
        contents: Contents of the turns, which may happen to look like a printed call.
    """
    for call in message.get("tool_calls", []):
        arguments = call["function"]["arguments"]
        if call["function"]["name"] not in text:
            return False
        printed = str(arguments) if isinstance(arguments, dict) and arguments else ""
        if printed and text.count(printed) > contents.count(printed):
            return False
        values = arguments.values() if isinstance(arguments, dict) else []
        if not all(_bare(str(value)) in text for value in values if isinstance(value, str) or type(value) is int):
            return False
    return True


def _bare(value: str) -> str:
    """The start of a text, up to the first character that quoting could change."""
    return re.split(r"[^A-Za-z0-9 ]", value, maxsplit=1)[0].strip()


# ---------------------------------------------------------------- running a template


def _run(source: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    roles = ", ".join(str(message["role"]) for message in messages)
    rendered: Any
    try:
        with within(MAX_SECONDS, MAX_MEMORY):
            rendered = render_jinja_template([messages], chat_template=source, **options)
    except TimeLimitError as error:
        raise TokenizerError(f"the chat template took over {MAX_SECONDS:g} s for a conversation of {roles}") from error
    except MemoryLimitError as error:
        raise TokenizerError(
            f"the chat template took over {MAX_MEMORY / 1e9:g} GB of memory for a conversation of {roles}"
        ) from error
    except TemplateError as error:
        raise TokenizerError(f"the chat template refuses a conversation of {roles}: {error}") from error
    except Exception as error:  # a template may fail in any way
        raise TokenizerError(
            f"the chat template fails on a conversation of {roles}, with {type(error).__name__}: {error}"
        ) from error
    texts, generated = rendered  # lists of one conversation
    if len(texts[0]) > MAX_CHARACTERS:
        raise TokenizerError(
            f"the chat template makes {len(texts[0]):,} characters of a conversation of {roles}, more than "
            f"{MAX_CHARACTERS:,}"
        )
    marked = options.get("return_assistant_tokens_mask")
    return texts[0], [(int(start), int(stop)) for start, stop in generated[0]] if marked else []


def _without_markers(source: str) -> str:
    """Jinja source without the generation markers, which a plain environment can't parse."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
