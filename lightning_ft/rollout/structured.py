"""Structured outputs: completions that are one of some choices, match a regular expression, or fit a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_ft.errors import ConfigError, MissingDependencyError


@dataclass(frozen=True)
class StructuredOutputs:
    """Format that every completion must have, as servers offer it (``guided_choice``, ``response_format`` and so on).

    Exactly one of the fields is set.

    Args:
        choices: The completions that are allowed.
        json_schema: JSON schema of the completion.
        regex: Regular expression that the whole completion matches, in the syntax of Rust's crate ``regex``.

    Raises:
        ConfigError: If not exactly one field is set, or it has the wrong type; if `choices` is empty, or a choice is.

    Example:
        >>> StructuredOutputs(choices=["yes", "no"]).choices
        ('yes', 'no')
    """

    choices: Sequence[str] | None = None
    json_schema: Mapping[str, Any] | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        set_fields = [name for name in ("choices", "json_schema", "regex") if getattr(self, name) is not None]
        if len(set_fields) != 1:
            found = " and ".join(set_fields) or "none of them"
            raise ConfigError(f"StructuredOutputs takes one of choices, json_schema and regex; got {found}.")
        if self.choices is not None:
            choices = None if isinstance(self.choices, (str, Mapping)) else _as_tuple(self.choices)
            if not choices or not all(isinstance(choice, str) and choice for choice in choices):
                quoted = " Quote words such as yes, no, on and off in YAML." if _has_bool(choices) else ""
                found = repr(self.choices if choices is None else list(choices))[:80]
                raise ConfigError(f"choices={found}: expected a list of strings that aren't empty.{quoted}")
            object.__setattr__(self, "choices", choices)  # an iterator could be read only once
        if isinstance(self.json_schema, str):
            object.__setattr__(self, "json_schema", _parsed_schema(self.json_schema))
        if not isinstance(self.json_schema, (Mapping, type(None))):
            raise ConfigError(f"json_schema is a {type(self.json_schema).__name__}: expected a JSON schema as a dict.")
        if not isinstance(self.regex, (str, type(None))):
            raise ConfigError(f"regex={self.regex!r:.80}: expected a string.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StructuredOutputs:
        """Convert ``{"choices": [...]}`` and the like.

        Raises:
            ConfigError: If a key is unknown, and as the constructor.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"Structured outputs are a {type(values).__name__}: expected an object, such as {{'choices': [...]}}."
            )
        if unknown := set(values) - {"choices", "json_schema", "regex"}:
            raise ConfigError(
                f"Structured outputs have no {min(unknown)!r}: expected one of choices, json_schema and regex."
            )
        return cls(**values)

    def grammar(self) -> str:
        """The format as a grammar of llguidance.

        Raises:
            MissingDependencyError: If llguidance isn't installed, for a schema or a regular expression.
        """
        matcher = _llguidance().LLMatcher
        if self.choices is not None:
            # One expression, since a grammar may have 2,000 items at most.
            return str(matcher.grammar_from_regex("|".join(map(_escaped, self.choices))))
        if self.json_schema is not None:
            # Otherwise any number of spaces and line breaks may follow each token, and some models write nothing else.
            schema = {"x-guidance": {"whitespace_flexible": False}, **self.json_schema}
            return str(matcher.grammar_from_json_schema(json.dumps(schema)))
        return str(matcher.grammar_from_regex(self.regex))


def check_grammar(grammar: str) -> None:
    """Check that a grammar can be matched, without a tokenizer.

    Args:
        grammar: Grammar from :meth:`StructuredOutputs.grammar`.

    Raises:
        ConfigError: If it is invalid.
        MissingDependencyError: If llguidance isn't installed.
    """
    if error := _llguidance().LLMatcher.validate_grammar(grammar):
        raise ConfigError(f"Structured outputs can't be matched: {_reason(error)}")


def _as_tuple(values: Any) -> tuple[Any, ...] | None:
    try:
        return tuple(values)
    except TypeError:
        return None


def _has_bool(choices: tuple[Any, ...] | None) -> bool:
    return any(isinstance(choice, bool) for choice in choices or ())


def _parsed_schema(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"json_schema={text!r:.80} isn't JSON: {error}. Pass a dict, or JSON text.") from error


def _escaped(choice: str) -> str:
    r"""A regular expression for a text, in the syntax of Rust's crate ``regex``.

    Example:
        >>> _escaped("a.b c")
        'a\\.b c'
    """
    return "".join(
        f"\\{c}" if c in r"\.+*?()|[]{}^$#&-~/" else c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in choice
    )


def _reason(error: str) -> str:
    """The first line of an error of llguidance, without its position in our text."""
    return error.strip().splitlines()[0]


class GrammarMasks:
    """Restricts the next token of each sequence to those that its grammar allows.

    A grammar is matched token by token in the tokenizer's own tokenization of the text, and the end token is allowed
    once the text is complete.

    Args:
        grammars: Grammar of each prompt, from :meth:`StructuredOutputs.grammar`.
        tokenizer: Fast tokenizer of the model.
        end_token_ids: Ids of the tokens that end a completion.
        vocabulary: Number of logits of the model.

    Raises:
        MissingDependencyError: If llguidance isn't installed.
        ConfigError: If the tokenizer isn't a fast one, or a grammar is invalid.
    """

    def __init__(
        self,
        grammars: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        end_token_ids: Sequence[int],
        vocabulary: int,
    ) -> None:
        library = _llguidance()
        import llguidance.hf

        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigError(
                f"Structured outputs need a fast tokenizer, and {type(tokenizer).__name__} is a slow one: load it "
                "with use_fast=True, or leave structured outputs out."
            )
        known = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(end_token_ids))
        compiled: dict[str, Any] = {}
        for grammar in grammars:
            if grammar not in compiled:
                compiled[grammar] = library.LLMatcher(known, grammar)
                if error := compiled[grammar].get_error():
                    raise ConfigError(f"Structured outputs can't be matched: {_reason(error)}")
        self._compiled, self._grammars = compiled, tuple(grammars)
        self._end_token_ids, self._vocabulary = tuple(end_token_ids), vocabulary

    def start(self, prompts: Sequence[int], num_completions: int = 1) -> GrammarMask:
        """Begin a batch.

        Args:
            prompts: Index of each prompt of the batch among the grammars.
            num_completions: Number of completions per prompt, next to each other.
        """
        matchers = [self._compiled[self._grammars[i]].deep_copy() for i in prompts for _ in range(num_completions)]
        return GrammarMask(matchers, self._end_token_ids, self._vocabulary)


class GrammarMask:
    """The masks of one batch.

    Args:
        matchers: A matcher of llguidance per completion, at the start of its grammar.
        end_token_ids: Ids of the tokens that end a completion.
        vocabulary: Number of logits, `v`.
    """

    def __init__(self, matchers: Sequence[Any], end_token_ids: Sequence[int], vocabulary: int) -> None:
        self._matchers, self._end_token_ids, self._vocabulary = matchers, list(end_token_ids), vocabulary
        self._consumed = [0] * len(matchers)

    def apply(self, logits: Tensor, batch: Sequence[int], completions: Sequence[Sequence[int]]) -> Tensor:
        """Set the logits of tokens that aren't allowed to minus infinity, in place.

        Args:
            logits: Logits of the next tokens, ``fp32 [b, v]``.
            batch: Index of the completion that each row belongs to, ``b`` of them.
            completions: Tokens of each completion so far. One that has ended is not restricted.

        Returns:
            The logits.
        """
        import llguidance.torch

        bits = llguidance.torch.allocate_token_bitmask(len(batch), self._vocabulary)  # int32 [b, v / 32], all set
        complete: list[int] = []  # rows whose text is complete and has no end token yet
        for row, index in enumerate(batch):
            matcher = self._matchers[index]
            for token in completions[index][self._consumed[index] :]:
                if not matcher.is_stopped():
                    matcher.consume_token(token)
            self._consumed[index] = len(completions[index])
            if error := matcher.get_error():
                raise ConfigError(f"Structured outputs can't be matched: {_reason(error)}")
            if not matcher.is_stopped():
                llguidance.torch.fill_next_token_bitmask(matcher, bits, row)
            elif not completions[index] or completions[index][-1] not in self._end_token_ids:
                complete.append(row)  # nothing can follow, and the matcher has no mask for it
        allowed = (bits[:, :, None] >> torch.arange(32, dtype=torch.int32)) & 1  # [b, v / 32, 32]
        forbidden = allowed.flatten(1)[:, : self._vocabulary] == 0  # [b, v]
        for row in complete:
            forbidden[row] = True
            forbidden[row, self._end_token_ids] = False
        return logits.masked_fill_(forbidden.to(logits.device), -torch.inf)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingDependencyError(
            "Structured outputs need llguidance: pip install 'lightning-ft[structured]'."
        ) from error
    return llguidance
