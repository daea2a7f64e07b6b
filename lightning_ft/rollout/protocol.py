"""The interface of engines: sampling options, completions and the `RolloutEngine` protocol."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from lightning_ft.arguments import check_integer
from lightning_ft.errors import ConfigError, RolloutError
from lightning_ft.models.head import CausalLM

OnAnswered = Callable[[int], None]
"""Function called with the number of prompts completed since its last call."""


@dataclass(frozen=True)
class Sampling:
    """How each next token is chosen.

    The filters apply in this order, each to the tokens that the previous one kept, as in transformers' `generate`:
    temperature, top-k, top-p (https://arxiv.org/abs/1904.09751), min-p (https://arxiv.org/abs/2407.01082).

    Args:
        temperature: Divisor of the logits. 0 is greedy decoding, for which the filters make no difference.
        top_p: Total probability of the most likely tokens that are kept; 1 keeps all.
        top_k: Number of the most likely tokens that are kept; 0 keeps all.
        min_p: Smallest probability of a kept token, relative to that of the most likely token; 0 keeps all.
        stop: Strings that end a completion, with the token that completes one of them in its text. The completion
            isn't cut: its last token may contain text after the string.

    Raises:
        ConfigError: For a value outside its range, or an empty stop string.

    Example:
        >>> Sampling(temperature=0.8, top_p=0.95).greedy, Sampling(temperature=0.0).greedy
        (False, True)
        >>> Sampling(top_p=0.0)
        Traceback (most recent call last):
        lightning_ft.errors.ConfigError: top_p=0.0: expected a number above 0 and at most 1.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature!r}: expected a number of at least 0 (greedy).")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p!r}: expected a number above 0 and at most 1.")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k!r}: expected a whole number of at least 0 (all tokens).")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p!r}: expected a number from 0 to 1.")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise ConfigError(f"stop={self.stop!r}: expected a tuple of strings, none of them empty.")

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy: the most likely token every time."""
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """Whether some tokens may be excluded from sampling."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Completion:
    """Tokens that a model generated after a prompt.

    Args:
        tokens: Token ids, including the end token (or the token that completed a stop string) if there is one, and
            nothing after it.
        truncated: Whether it reached the limit of new tokens before an end token or a stop string.
        logprobs: Log-probability of each token in nats, under ``softmax(logits / temperature)`` over the whole
            vocabulary, regardless of top-p, top-k and min-p; empty for greedy tokens.
    """

    tokens: tuple[int, ...]
    truncated: bool
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rollouts:
    """Completions of a list of prompts.

    Args:
        completions: Completions of each prompt, in the order of the prompts.
        shared_prefix: Number of tokens that all prompts start with and that were run through the model only once; 0
            if none were shared.
        prefilled: Number of prompt tokens that were run through the model in total, padding excluded.
    """

    completions: tuple[Completion, ...]
    shared_prefix: int
    prefilled: int


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions of prompts: the built-in engines, or one of your own as ``GRPO(engine=...)``.

    Before each rollout, in training and in validation, a module calls `sync_weights` and then `generate`, on every
    rank and in the same order. A rank without prompts left calls both too, `generate` with no prompts, so an engine
    may use collectives.

    Seeds: an engine that draws from the global generator of the model's device repeats its completions in a resumed
    run, since a checkpoint contains the state of that generator, and validation sets its seed. An engine with a random
    generator of its own doesn't.

    Modes: after each of these calls the module restores the train or eval mode of every submodule of the model.

    Errors: what an engine raises stops the run. `lightning_ft.errors.RolloutError` is meant for it.

    Example:
        >>> class Echo:
        ...     def generate(self, prompts, *, max_new_tokens, sampling=None, num_completions=1, on_answered=None):
        ...         echoes = [Completion(tuple(ids[:max_new_tokens]), truncated=True) for ids in prompts]
        ...         return Rollouts(tuple(echo for echo in echoes for _ in range(num_completions)), 0, 0)
        ...
        ...     def sync_weights(self, model):
        ...         pass
        >>> isinstance(Echo(), RolloutEngine)
        True
    """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        num_completions: int = 1,
        on_answered: OnAnswered | None = None,
    ) -> Rollouts:
        """Continue each prompt until an end token, a stop string or `max_new_tokens`.

        Args:
            prompts: Token ids of each prompt, complete: the engine adds and removes none.
            max_new_tokens: Largest number of tokens per completion.
            sampling: How tokens are chosen; None for greedy decoding.
            num_completions: Number of completions per prompt. Greedy ones are identical.
            on_answered: Function called with the number of prompts completed since its last call; modules pass None.

        Returns:
            ``len(prompts) * num_completions`` completions, those of a prompt next to each other, each of 1 to
            `max_new_tokens` tokens of the model's vocabulary, none of them after an end token, with as many
            log-probabilities or none.
        """
        ...

    def sync_weights(self, model: CausalLM) -> Any:  # not None, which jsonargparse compares as it is written
        """Take over the weights that a model has now.

        Args:
            model: The model in training, an adapter around it included; sharded where the strategy shards it. An
                engine that samples from the model itself keeps a reference to it, or does nothing. It may be in
                training mode: see `lightning_ft.models.generate.evaluating`.
        """
        ...


def check_engine(engine: object) -> None:
    """Check that an engine has the methods of `RolloutEngine`, and that they take the arguments that modules pass.

    Args:
        engine: Value of the argument `engine` of a module.

    Raises:
        ConfigError: For a class instead of an object, a missing method, or parameters that don't take the arguments.

    Example:
        >>> class Mine:
        ...     def generate(self, prompts): ...
        ...
        ...     def sync_weights(self, model): ...
        >>> check_engine(Mine())
        Traceback (most recent call last):
        lightning_ft.errors.ConfigError: engine= got an object of type Mine, whose generate(prompts) can't be called ...
    """
    if isinstance(engine, type):
        name = engine.__name__
        raise ConfigError(f"engine= got the class {name} instead of an object: pass engine={name}(...).")
    found = f"engine= got an object of type {type(engine).__name__}"
    missing = [name for name in ("generate", "sync_weights") if not callable(getattr(engine, name, None))]
    if missing:
        raise ConfigError(
            f"{found}, which has no {' and no '.join(missing)}. Give it the methods of "
            "lightning_ft.rollout.protocol.RolloutEngine."
        )
    passed: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "generate": (("prompts",), ("max_new_tokens", "sampling", "num_completions")),
        "sync_weights": (("model",), ()),
    }
    for name, (positional, keywords) in passed.items():
        try:
            signature = inspect.signature(getattr(engine, name))
        except (TypeError, ValueError):  # a callable without a signature, such as one written in C
            continue
        try:
            signature.bind(*positional, **dict.fromkeys(keywords))
        except TypeError as error:
            call = ", ".join([*positional, *(f"{keyword}=..." for keyword in keywords)])
            parameters = signature.replace(return_annotation=inspect.Signature.empty)
            raise ConfigError(
                f"{found}, whose {name}{parameters} can't be called as {name}({call}): {error}. Give it the parameters "
                f"of lightning_ft.rollout.protocol.RolloutEngine.{name}."
            ) from None


def check_rollouts(
    rollouts: object,
    engine: str,
    *,
    expected: int,
    max_new_tokens: int,
    vocabulary: int,
    end_token_ids: Collection[int],
    finite: bool,
) -> None:
    """Check that what an engine returned is what the protocol promises.

    Args:
        rollouts: What the engine returned.
        engine: Name of the engine, for errors.
        expected: Number of completions that were requested.
        max_new_tokens: Largest number of tokens per completion.
        vocabulary: Number of embeddings of the model.
        end_token_ids: Ids of the tokens that end a completion.
        finite: Whether log-probabilities must be finite.

    Raises:
        RolloutError: For another type, count or length, a token or log-probability that can't be one, or tokens after
            an end token.

    Example:
        >>> rollouts = Rollouts((Completion((5, 40), truncated=False),), 0, 0)
        >>> limits = {"max_new_tokens": 8, "vocabulary": 32, "end_token_ids": [2]}
        >>> check_rollouts(rollouts, "Mine", expected=1, finite=True, **limits)
        Traceback (most recent call last):
        lightning_ft.errors.RolloutError: The engine Mine returned token 40 in completion 0, but the model has 32 ...
    """
    if not isinstance(rollouts, Rollouts):
        raise RolloutError(
            f"The engine {engine} returned a {type(rollouts).__name__}: `generate` returns a "
            "lightning_ft.rollout.protocol.Rollouts."
        )
    if not isinstance(rollouts.completions, (tuple, list)):
        raise RolloutError(
            f"The engine {engine} returned Rollouts whose completions are of type "
            f"{type(rollouts.completions).__name__}: expected a tuple of lightning_ft.rollout.protocol.Completion."
        )
    if (count := len(rollouts.completions)) != expected:
        raise RolloutError(
            f"The engine {engine} returned {count} completions instead of {expected}: `generate` returns "
            "num_completions for each prompt, those of a prompt next to each other."
        )
    ends = frozenset(end_token_ids)
    for index, completion in enumerate(rollouts.completions):
        if not isinstance(completion, Completion):
            raise RolloutError(
                f"The engine {engine} returned an object of type {type(completion).__name__} as completion {index}: "
                "expected a lightning_ft.rollout.protocol.Completion."
            )
        if (problem := _problem_of(completion, max_new_tokens, vocabulary, ends, finite)) is not None:
            start, remedy = problem
            raise RolloutError(f"The engine {engine} returned {start} in completion {index}{remedy}")


_LOGPROB_TOLERANCE = 1e-3  # rounding error of a log-probability of nearly 0 in float32, with room to spare


def _problem_of(
    completion: Completion, max_new_tokens: int, vocabulary: int, ends: frozenset[int], finite: bool
) -> tuple[str, str] | None:
    """Return what is wrong with a completion and what is expected, the two halves of a message; None if it is valid."""
    types = {"tokens": "ints", "logprobs": "floats, empty if there are none"}
    for name, items in types.items():
        if not isinstance(values := getattr(completion, name), (tuple, list)):
            return f"{name} of type {type(values).__name__}", f": expected a tuple of {items}."
    if not isinstance(completion.truncated, bool):
        return f"truncated={completion.truncated!r:.80}", ": expected True or False."
    return _problem_of_tokens(completion.tokens, max_new_tokens, vocabulary, ends) or _problem_of_logprobs(
        completion.logprobs, len(completion.tokens), finite
    )


def _problem_of_tokens(
    tokens: Sequence[int], max_new_tokens: int, vocabulary: int, ends: frozenset[int]
) -> tuple[str, str] | None:
    if not 1 <= len(tokens) <= max_new_tokens:
        return f"{len(tokens)} tokens", f": expected 1 to max_new_tokens={max_new_tokens}, the end token included."
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool):
            return f"{token!r:.80}, a {type(token).__name__}, as a token", ": expected ints."
        if not 0 <= token < vocabulary:
            return f"token {token}", f", but the model has {vocabulary:,} embeddings: does it use another tokenizer?"
    for token in tokens[:-1]:
        if token in ends:
            return (
                f"tokens after the end token {token}",
                f": cut each completion after its first end token (any of {sorted(ends)}), so that padding isn't "
                "trained on.",
            )
    return None


def _problem_of_logprobs(logprobs: Sequence[float], count: int, finite: bool) -> tuple[str, str] | None:
    if logprobs and len(logprobs) != count:
        return f"{len(logprobs)} log-probabilities for {count} tokens", ": expected one per token, or none at all."
    for logprob in logprobs:
        if not isinstance(logprob, Real) or isinstance(logprob, bool):
            return f"{logprob!r:.80}, a {type(logprob).__name__}, as a log-probability", ": expected floats."
        if math.isfinite(logprob) and logprob > _LOGPROB_TOLERANCE:
            return (
                f"the log-probability {logprob:g}",
                ", which is above 0: expected natural logarithms of probabilities, under the softmax over the whole "
                "vocabulary.",
            )
    if finite and not all(math.isfinite(logprob) for logprob in logprobs):
        return (
            "a log-probability that is not finite",
            ": are its weights and logits finite? With on_nonfinite='skip' such rollouts are skipped.",
        )
    return None


def check_request(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, num_completions: int, context: int | None = None
) -> None:
    """Check that prompts can be completed.

    Args:
        prompts: Token ids of each prompt.
        max_new_tokens: Largest number of tokens per completion.
        num_completions: Number of completions per prompt.
        context: Context length of the model in tokens; None if it has no limit or isn't known.

    Raises:
        ConfigError: For a prompt without tokens or without room for its completions, or a number that isn't an integer
            of at least 1.

    Example:
        >>> check_request([[5, 6], []], max_new_tokens=8, num_completions=1)
        Traceback (most recent call last):
        lightning_ft.errors.ConfigError: Prompt 1 has no tokens.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("num_completions", num_completions)):
        check_integer(name, value, 1, ConfigError)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"Prompt {number} has no tokens.")
        if context is not None and len(prompt) + max_new_tokens > context:
            raise ConfigError(
                f"Prompt {number} has {len(prompt):,} tokens; with max_new_tokens={max_new_tokens:,} that exceeds the "
                f"model's context of {context:,}. Prompts are never cut: leave it out, or lower max_new_tokens."
            )


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens that all prompts start with, leaving at least one token of each prompt.

    The first new token is predicted from that remaining token.

    Example:
        >>> common_prefix([[5, 6, 7, 8], [5, 6, 9]]), common_prefix([[5, 6], [5, 6]]), common_prefix([[5, 6]])
        (2, 1, 1)
    """
    if not prompts:
        return 0
    # Whatever the first and the last in sorted order start with, all prompts between them start with, too.
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))
    limit = min(len(prompt) for prompt in prompts) - 1
    for position, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b or position >= limit:
            return position
    return max(0, limit)
