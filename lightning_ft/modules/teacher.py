"""A frozen model that reads a prompt before each request: its answers, and its next-token distributions on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.data.batches import PromptBatch
from lightning_ft.data.encode import encode_prompt
from lightning_ft.data.layout import Example
from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.data.prompts import Prompt
from lightning_ft.data.tokenizers import pad_token_id
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ConfigError
from lightning_ft.losses.distillation import TeacherLogits
from lightning_ft.models.backbone import accepts, backbone_of
from lightning_ft.models.generate import end_token_ids
from lightning_ft.models.head import CausalLM, as_forward, base_of, frozen_logits, input_device
from lightning_ft.models.load import context_length
from lightning_ft.models.logprob_model import LogProbModel
from lightning_ft.rollout.cache import GrowingCache
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling, common_prefix
from lightning_ft.types import Message

_POSITIONS = 32_768
"""Largest number of positions whose keys and values are in memory at a time, the prompt's included."""


class PromptedTeacher:
    """Answers requests with a prompt, and computes what the answers' tokens are predicted from.

    The tokens that all prompts start with (the system prompt and the examples) go through the model once: their keys
    and values are kept, since the model is frozen.

    Args:
        baseline: The prompt.
        tokenizer: Tokenizer of the model.
        use: Function that returns a context in which the frozen model can be used, in eval mode and without gradients.
        batch_size: Number of answers that are generated at a time.

    Raises:
        ConfigError: If the chat template leaves the prompt out.
    """

    def __init__(
        self,
        baseline: PromptBaseline,
        tokenizer: PreTrainedTokenizerBase,
        use: Callable[[], AbstractContextManager[CausalLM]],
        *,
        batch_size: int,
    ) -> None:
        self.baseline, self.tokenizer, self._use = baseline, tokenizer, use
        with use() as model:
            self._engine = LocalEngine(
                model,
                end_token_ids=end_token_ids(model, tokenizer),
                pad_token_id=pad_token_id(tokenizer),
                batch_size=batch_size,
            )
        self._logprob_model = LogProbModel(pad_token_id(tokenizer))
        first, second = self._encode("a"), self._encode("b")
        if first == encode_prompt(tokenizer, [Message(role="user", content="a")]):
            raise ConfigError(
                "With the prompt the chat template makes the same text of a request as without it, so there is nothing "
                "to learn. Check whether it ignores the system prompt, or has this one by default."
            )
        self._prefix = first[: common_prefix([first, second])]
        self._cache: GrowingCache | None = None
        self._warned = False

    def prompts(self, batch: PromptBatch) -> list[list[int]]:
        """Encode requests after the prompt, whose system prompt ends with a row's `prompt_context`.

        Args:
            batch: The requests.
        """
        contexts = batch.columns.get("prompt_context") or [None] * len(batch)
        requests: list[Any] = batch.prompts
        rows = zip(requests, contexts, batch.template_kwargs, strict=True)
        return [self._encode(request, context, kwargs) for request, context, kwargs in rows]

    def _encode(
        self, request: str | list[Message], context: str | None = None, kwargs: Mapping[str, object] | None = None
    ) -> list[int]:
        turns = [Message(role="user", content=request)] if isinstance(request, str) else request
        return encode_prompt(self.tokenizer, self.baseline.messages(turns, context), kwargs=kwargs)

    def answers(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling | None
    ) -> list[tuple[int, ...]]:
        """Generate an answer to each prompt.

        Args:
            prompts: Token ids of each prompt.
            max_new_tokens: Largest number of tokens per answer.
            sampling: How tokens are chosen; None for the most probable ones.

        Returns:
            Token ids of each answer, the end token included.
        """
        self._check_length(prompts, max_new_tokens)
        with self._use():
            rollouts = self._engine.generate(prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        return [tuple(completion.tokens) for completion in rollouts.completions]

    def states(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states from which the model predicts the tokens of answers.

        Args:
            prompts: Token ids of each prompt.
            answers: Token ids of each answer, none of them empty.

        Returns:
            One state per token of the answers, in their order, ``[n, d]``.
        """
        self._check_length(prompts, max(map(len, answers), default=0))
        with self._use() as model:
            base = base_of(model)
            if not prompts:
                return torch.zeros(0, int(base.config.get_text_config().hidden_size), device=input_device(model))
            if not self._shares(prompts, max(map(len, answers))):
                return self._states_of_whole_prompts(model, prompts, answers)
            cache = cast(GrowingCache, self._cache)
            shared, parts = len(self._prefix), []
            for rows in _row_slices([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]):
                suffixes = [list(p[shared:]) + list(a[:-1]) for p, a in zip(prompts[rows], answers[rows], strict=True)]
                ids = _padded(suffixes, self._engine.pad_token_id)
                hidden = as_forward(base, _cached_states, ids, GrowingCache(len(cache.growing), cache), shared)
                for row, (prompt, answer) in enumerate(zip(prompts[rows], answers[rows], strict=True)):
                    start = len(prompt) - shared - 1
                    parts.append(hidden[row, start : start + len(answer)])
            return torch.cat(parts)

    def logits(self) -> TeacherLogits:
        """Function from hidden states to the logits of the model, ``[c, d]`` to ``fp32 [c, v]``."""
        return frozen_logits(self._use)

    # ---------------------------------------------------------------- helpers

    def check_request(self, row: Prompt, max_new_tokens: int) -> None:
        """Check that a request with the prompt, and its answer, fit the model's context.

        Args:
            row: The request, whose `prompt_context` ends the system prompt.
            max_new_tokens: Largest number of tokens of the answer.

        Raises:
            ConfigError: If they don't.
        """
        context = cast("str | None", row.columns.get("prompt_context"))
        ids = self._encode(row.prompt, context, row.template_kwargs)
        self._check_length([ids], max_new_tokens, f"{row.source}, row {row.row},")

    def _check_length(self, prompts: Sequence[Sequence[int]], new_tokens: int, name: str = "a request") -> None:
        limit, longest = context_length(base_of(self._engine.model)), max(map(len, prompts), default=0)
        if limit is not None and longest + new_tokens > limit:
            raise ConfigError(
                f"With the prompt {name} has {longest:,} tokens and its answer up to {new_tokens:,}, which exceeds "
                f"the context of {limit:,} tokens. Shorten the prompt, leave the request out, or lower max_new_tokens."
            )

    def _shares(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> bool:
        """Keep the keys and values of what all prompts so far start with; False if there is nothing, or no way, to."""
        shared = common_prefix([[*self._prefix, -1], *prompts])
        if self._cache is None or shared < len(self._prefix):
            self._prefix, self._cache = self._prefix[:shared], None
            if not shared or self._warned:
                return False
            longest = max(map(len, prompts)) + new_tokens
            self._cache = self._engine.prefill_prefix(self._prefix, longest)
            if self._cache is None:
                self._warned = True
                rank_zero_warn(
                    f"{type(base_of(self._engine.model)).__name__} can't share the keys and values of a prompt, so the "
                    "teacher reads the whole prompt with each request. The loss is the same, only slower."
                )
        return self._cache is not None

    def _states_of_whole_prompts(
        self, model: CausalLM, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> Tensor:
        completions = [[Example(torch.tensor(answer), torch.ones(len(answer), dtype=torch.bool))] for answer in answers]
        batch = self._logprob_model.lay_out(
            model, [torch.tensor(list(prompt)) for prompt in prompts], completions, share_prompts=False
        )
        return self._logprob_model.states(model, batch)


def _cached_states(base: PreTrainedModel, ids: Tensor, cache: GrowingCache, start: int) -> Tensor:
    """Last hidden states of tokens that follow a cache, ``[b, t, d]``. Padding comes last, so no token sees it."""
    device = input_device(base)
    positions = torch.arange(start, start + ids.shape[1], device=device).expand(len(ids), -1)
    name = "cache" if accepts(base.base_model, "cache") else "past_key_values"  # transformers renamed it in 5.24
    out = backbone_of(base)(
        input_ids=ids.to(device), position_ids=positions, use_cache=True, return_dict=True, **{name: cache}
    )
    return cast(Tensor, out.last_hidden_state)


def _padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])


def _row_slices(lengths: Sequence[int]) -> Iterator[slice]:
    """Slices of rows that have at most `_POSITIONS` positions together, padding included."""
    start, longest = 0, 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > start and longest * (index + 1 - start) > _POSITIONS:
            yield slice(start, index)
            start, longest = index, length
    yield slice(start, len(lengths))
