"""Answers from a model in this process, greedily, the prompts' common prefix run through it only once.

Prompts that start with the same system prompt and examples differ in their last few tokens. The prefix is prefilled
with one row, its keys and values are laid into the cache of each batch, and rows leave their batch as they finish.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lightning_ft.errors import ConfigError
from lightning_ft.models.generate import evaluating, left_padded
from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.rollout.cache import GrowingCache, cache_layers
from lightning_ft.rollout.protocol import Completion, OnAnswered, Rollouts, common_prefix

_PROBE_TOKENS = 12


class LocalEngine:
    """Greedy answers from a transformers model, adapted by PEFT or not.

    Each token is the likeliest one; the penalties that a generation config may hold are not applied. In fp32 the
    tokens are those of `model.generate(do_sample=False)`.

    Args:
        model: In whatever mode; it is put back.
        end_token_ids: Each of them ends an answer.
        pad_token_id: Stands at masked places.
        batch_size: Prompts at a time.
        share_prefix: Run the tokens that all prompts start with through the model once. The answers are the same.

    Raises:
        ConfigError: If there is no end token, or `batch_size` isn't positive.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> config = LlamaConfig(vocab_size=32, **sizes)
        >>> engine = LocalEngine(LlamaForCausalLM(config), end_token_ids=[2])
        >>> rollouts = engine.generate([[5, 6, 7, 8], [5, 6, 9]], max_new_tokens=4)
        >>> len(rollouts.completions), rollouts.shared_prefix, rollouts.prefilled
        (2, 2, 5)
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        end_token_ids: Sequence[int],
        pad_token_id: int = 0,
        batch_size: int = 32,
        share_prefix: bool = True,
    ) -> None:
        if not end_token_ids:
            raise ConfigError("No end token: an answer would never end.")
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1.")
        self.model = model
        self.end_token_ids = tuple(end_token_ids)
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.share_prefix = share_prefix
        self._exact: bool | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        on_answered: OnAnswered | None = None,
        prefix: int | None = None,
    ) -> Rollouts:
        """Continue each prompt until an end token or `max_new_tokens`.

        Args:
            prompts: Token ids, none of them empty.
            max_new_tokens: At most so many for each.
            on_answered: Told of progress.
            prefix: Tokens to share, where fewer than the prompts have in common.

        Raises:
            ConfigError: For an empty prompt.
        """
        if not all(map(len, prompts)):
            raise ConfigError(f"Prompt {next(i for i, p in enumerate(prompts) if not len(p))} has no tokens.")
        if not prompts:
            return Rollouts((), 0, 0)
        shared = common_prefix(prompts) if prefix is None else min(prefix, common_prefix(prompts))
        shared = shared if self.share_prefix else 0
        answers: list[Completion | None] = [None] * len(prompts)
        # Longest first: rows of a batch are about as long as each other, and what doesn't fit into memory shows at
        # once.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        with evaluating(self.model):
            layers, why_not = self._layers(max(map(len, prompts)) + max_new_tokens)
            if why_not is not None:
                if shared:
                    warnings.warn(
                        f"{type(base_of(self.model)).__name__}: the prompts' common prefix is run once for each "
                        f"prompt, because {why_not}. The answers are the same, only slower.",
                        stacklevel=2,
                    )
                shared = 0
            start = self._prefill(prompts[0][:shared], layers) if shared else None
            for batch in batches:
                part = [list(prompts[i]) for i in batch]
                if why_not is None:
                    done = self._decode([p[shared:] for p in part], start, shared, layers, max_new_tokens)
                else:
                    done = self._transformers(part, max_new_tokens)
                for i, completion in zip(batch, done, strict=True):
                    answers[i] = completion
                if on_answered is not None:
                    on_answered(len(batch))
        completions = tuple(answer for answer in answers if answer is not None)
        return Rollouts(completions, shared, shared + sum(len(p) - shared for p in prompts))

    def read_prefix(self, prefix: Sequence[int], tokens: int) -> GrowingCache | None:
        """Run a prefix through the model, for rows of at most so many tokens; None where the model can't share it."""
        with evaluating(self.model):
            layers, why_not = self._layers(tokens)
            return None if why_not is not None else self._prefill(prefix, layers)

    def first_token(self, prompt: Sequence[int], prefix: GrowingCache | None = None) -> int:
        """The first new token behind a prompt, or behind what follows a prefix that was read.

        Args:
            prompt: Token ids, without the prefix.
            prefix: What `read_prefix` gave; it can be used again.
        """
        with evaluating(self.model):
            layers, why_not = self._layers(len(prompt) + 1)
            if why_not is not None:
                return self._transformers([list(prompt)], 1)[0].tokens[0]
            cache = GrowingCache(layers, prefix)
            start = cache.get_seq_length()
            positions = torch.arange(start, start + len(prompt))[None]
            return int(self._logits(torch.tensor([list(prompt)]), cache, positions, None).argmax())

    # ------------------------------------------------------------ this loop

    def _prefill(self, prefix: Sequence[int], layers: int) -> GrowingCache:
        cache = GrowingCache(layers)
        self._logits(torch.tensor([list(prefix)]), cache, torch.arange(len(prefix))[None], None)
        return cache

    def _logits(self, ids: Tensor, cache: GrowingCache, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Logits behind the last place of each row, ``fp32 [b, vocabulary]``; `ids` and `positions` are ``[b, t]``."""
        base = base_of(self.model)
        device = input_device(self.model)
        options = {_cache_argument(base): cache}
        out = base(  # the base and not the PEFT wrapper, around which FSDP2 would not gather the weights
            input_ids=ids.to(device),
            attention_mask=None if mask is None else mask.to(device),
            position_ids=positions.to(device),
            use_cache=True,
            logits_to_keep=1,
            **options,
        )
        last: Tensor = out.logits[:, -1].float()
        return last

    def _decode(
        self, prompts: list[list[int]], start: GrowingCache | None, shared: int, layers: int, max_new_tokens: int
    ) -> list[Completion]:
        """Answer one batch of prompts, given behind the prefix."""
        cache = GrowingCache(layers, start)
        longest = max(map(len, prompts))
        ids, mask = left_padded(prompts, self.pad_token_id)
        mask = torch.cat([mask.new_ones(len(prompts), shared), mask], dim=1)  # [b, p + s]
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # [b, p + s]
        padded = not bool(mask.all())  # without a mask attention is faster
        written: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # which prompt each row of the batch answers; -1 once it has ended
        logits = self._logits(ids, cache, positions[:, -longest:], mask if padded else None)
        last = positions[:, -1:]
        for step in range(max_new_tokens):
            tokens = logits.argmax(-1)  # [b]
            for r, token in enumerate(tokens.tolist()):
                if rows[r] >= 0:
                    written[rows[r]].append(token)
                    if token in self.end_token_ids:
                        rows[r] = -1
            going = [r for r, row in enumerate(rows) if row >= 0]
            if not going or step == max_new_tokens - 1:
                break
            if len(going) <= 0.75 * len(rows):  # copying the cache pays once a quarter of it is no longer read
                cache.keep(going)
                tokens, mask, last, rows = tokens[going], mask[going], last[going], [rows[r] for r in going]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            last = last + 1
            logits = self._logits(tokens[:, None], cache, last, mask if padded else None)
        return [self._completion(tokens) for tokens in written]

    def _completion(self, tokens: Sequence[int]) -> Completion:
        return Completion(tuple(tokens), truncated=not tokens or tokens[-1] not in self.end_token_ids)

    # ------------------------------------------------------------ models that it can't run

    def _transformers(self, prompts: list[list[int]], max_new_tokens: int) -> list[Completion]:
        """The same by transformers' own loop, with the cache that the architecture asks for."""
        ids, mask = left_padded(prompts, self.pad_token_id)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self.end_token_ids),
            pad_token_id=self.pad_token_id,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        model: Any = self.model
        out = model.generate(
            input_ids=ids.to(input_device(self.model)),
            attention_mask=mask.to(input_device(self.model)),
            generation_config=config,
        )
        completions = []
        for row in out[:, ids.shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in self.end_token_ids), len(row) - 1)
            completions.append(self._completion(row[: end + 1]))
        return completions

    def _layers(self, tokens: int) -> tuple[int, str | None]:
        """Number of layers of the cache, and why this loop can't be used for rows of so many tokens."""
        base = base_of(self.model)
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            return 0, "its adapter puts tokens of its own before every prompt"
        accepted = inspect.signature(base.forward).parameters
        for name in ("position_ids", _cache_argument(base), "logits_to_keep"):
            if name not in accepted:
                return 0, f"its forward pass takes no {name}"
        layers, why_not = cache_layers(base.config, tokens)
        if why_not is None and not self._is_exact(layers):
            why_not = "its output isn't the same with a prefix taken from a cache"
        return layers, why_not

    def _is_exact(self, layers: int) -> bool:
        """Ask the model itself, on a few tokens: architectures differ in more than a list of names could hold."""
        if self._exact is None:
            base = base_of(self.model)
            vocabulary = base.config.get_text_config().vocab_size
            ids = torch.randint(0, vocabulary, (2, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
            ids[1, :5] = ids[0, :5]
            short = _PROBE_TOKENS - 3  # the second prompt is shorter, so that its row has a hole behind the prefix
            alone = [
                base(input_ids=prompt[None].to(input_device(self.model)), use_cache=False)
                for prompt in (ids[0], ids[1, :short])
            ]
            want = torch.cat([out.logits[:, -1].float() for out in alone])
            start = self._prefill(ids[0, :5].tolist(), layers)
            rest, mask = left_padded([ids[0, 5:].tolist(), ids[1, 5:short].tolist()], self.pad_token_id)
            mask = torch.cat([mask.new_ones(2, 5), mask], dim=1)
            positions = (mask.cumsum(1) - 1)[:, 5:]
            got = self._logits(rest, GrowingCache(layers, start), positions, mask)
            rounds = base.dtype != torch.float32 or torch.is_autocast_enabled(input_device(self.model).type)
            tolerance = 5e-2 if rounds or getattr(base, "is_quantized", False) else 1e-4
            self._exact = bool((got - want).abs().max() <= tolerance * want.abs().max().clamp(min=1.0))
        return self._exact


def _cache_argument(base: PreTrainedModel) -> str:
    """What the model's forward pass calls its cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
