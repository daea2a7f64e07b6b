"""Completions from a model in this process, sampled or greedy, with no token run through it twice.

Prompts that start with the same system prompt and examples differ only in their last tokens. Their common prefix is
prefilled once, and its keys and values are copied into the cache of each batch. Each prompt is prefilled once for all
its completions, completions of a long prompt share a row of the cache, and sequences leave the batch as they finish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ft.arguments import check_integer
from lightning_ft.distributed import warn
from lightning_ft.errors import ConfigError, NonFiniteError
from lightning_ft.models.autocast import weights_cast_once
from lightning_ft.models.batched_generation import BatchPlan, plan_batches
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, as_forward, base_of, input_device
from lightning_ft.models.lengths import LengthSwitch, length_switch
from lightning_ft.models.load import context_length
from lightning_ft.read_errors import first_line
from lightning_ft.rollout.cache import GrowingCache
from lightning_ft.rollout.decode import (
    StopChecker,
    cache_support,
    decode,
    decode_parts,
    idle_pass,
    next_logits,
    prefill_tokens,
)
from lightning_ft.rollout.fallback import generate_with_transformers
from lightning_ft.rollout.merged_adapter import merged_adapter
from lightning_ft.rollout.probe import probe_cache
from lightning_ft.rollout.protocol import Completion, OnAnswered, Rollouts, Sampling, check_request, common_prefix
from lightning_ft.rollout.rank_sync import RankSync
from lightning_ft.rollout.sampling import TokenSampler
from lightning_ft.rollout.shared_rows import prefill_prompts
from lightning_ft.rollout.structured import GrammarMask, GrammarMasks

_STEP_TOKENS = {"cpu": 16, "other": 1024}
"""Number of prompt tokens that are prefilled in the time of a decoding step of a small batch, which is what reading
the weights takes (a CPU prefilled 400 tokens per second and took 40 ms per step with 135M parameters)."""


def split_by_length(lengths: Sequence[int], step_tokens: int) -> list[int]:
    """Split a batch of prompts where padding would cost more than the decoding steps of one more batch.

    Args:
        lengths: Number of tokens of each prompt, the longest first.
        step_tokens: Cost of all decoding steps of a batch, as a number of prefilled tokens.

    Returns:
        Number of prompts of each part, which cost least together.

    Example:
        >>> split_by_length([2000, 100, 90, 80], step_tokens=500), split_by_length([200, 100, 90, 80], step_tokens=500)
        ([1, 3], [4])
    """
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first prompts, and the start of their last part
    for end in range(1, len(lengths) + 1):
        best.append(min((best[i][0] + lengths[i] * (end - i) + step_tokens, i) for i in range(end)))
    parts, end = [], len(lengths)
    while end:
        parts.append(end - best[end][1])
        end = best[end][1]
    return parts[::-1]


def split_into_batches(
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    num_completions: int,
    plan: BatchPlan | None = None,
    *,
    shared: int = 0,
    step_tokens: int | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Split prompts into batches, and the completions of each prompt into parts.

    Args:
        prompts: Token ids of each prompt.
        batch_size: Number of completions decoded at a time.
        num_completions: Number of completions per prompt.
        plan: Which prompts may share a batch; None if all may.
        shared: Number of tokens that all prompts start with, which are prefilled once.
        step_tokens: Cost of all decoding steps of a batch, as a number of prefilled tokens: batches are split where
            padding costs more. None to never split them.

    Returns:
        Indices of the prompts that are prefilled together, and the sizes of the parts in which the completions of
        each prompt are decoded.

    Example:
        >>> split_into_batches([[1], [1, 2], [3]], batch_size=4, num_completions=2)
        ([[1, 0], [2]], [2])
        >>> split_into_batches([[1]], batch_size=4, num_completions=9)
        ([[0]], [4, 4, 1])
        >>> split_into_batches([[1], [1, 2], [3]], batch_size=4, num_completions=1, plan=BatchPlan((1, 2, 1)))
        ([[1], [0, 2]], [1])
    """
    plan = BatchPlan((0,) * len(prompts)) if plan is None else plan
    size = 1 if plan.alone else batch_size
    # Longest first: prompts of a batch are of about the same length, and a lack of memory shows in the first batch.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = plan.batches(max(1, size // num_completions), order)
    if step_tokens is not None:
        batches = [part for batch in batches for part in _parts(batch, prompts, shared, step_tokens)]
    return batches, [min(size, num_completions - start) for start in range(0, num_completions, size)]


def _parts(
    batch: Sequence[int], prompts: Sequence[Sequence[int]], shared: int, step_tokens: int
) -> Iterator[list[int]]:
    start = 0
    for count in split_by_length([len(prompts[i]) - shared for i in batch], step_tokens):
        yield list(batch[start : start + count])
        start += count


def slowdown_warning(
    name: str, why_not: str | None, shared: int, num_completions: int, plan: BatchPlan | None
) -> str | None:
    """Return a warning about prompts that are run more often than necessary; None if there are none.

    Args:
        name: Name of the model's class.
        why_not: Why the decoding loop of this package can't be used; None if it can.
        shared: Number of tokens that all prompts start with.
        num_completions: Number of completions per prompt.
        plan: Which prompts may share a batch; None if all may.
    """
    repeated = ["the prompts' common prefix is run once per prompt"] if why_not and shared else []
    repeated += ["each prompt is run once per completion"] if why_not and num_completions > 1 else []
    reasons = [f"{' and '.join(repeated)}, because {why_not}"] if repeated else []
    reasons += [plan.why] if plan is not None and plan.why else []
    return f"{name}: {'; '.join(reasons)}. The completions are the same; this is only slower." if reasons else None


@dataclass(frozen=True)
class _Request:
    """Options of one call of `generate`; `layers` is None where transformers' own loop has to be used."""

    rank_sync: RankSync
    sampling: Sampling | None
    stop_checker: StopChecker
    max_new_tokens: int
    layers: int | None


class LocalEngine:
    """Generates with a transformers model in this process, with or without a PEFT adapter, with its current weights.

    Penalties of the model's generation config are not applied. In fp32, greedy tokens are those of
    `model.generate(do_sample=False)`.

    Sampling draws only from the global random generator of the model's device. Prompts are processed in batches,
    longest first (prompts of equal length in their original order), with a prompt's completions next to each other,
    and each decoding step draws once for the sequences of its batch. So the same generator state, weights, prompts and
    `batch_size` give the same tokens.

    All ranks of a sharded model have to call `generate`, each with its own prompts (or none); see
    :class:`~lightning_ft.rollout.rank_sync.RankSync`.

    Args:
        model: Model to generate with. It may be in training mode, which is restored afterwards.
        end_token_ids: Ids of the tokens that end a completion.
        pad_token_id: Token id at masked positions.
        batch_size: Number of completions decoded at a time. The completions of a prompt stay together where they fit;
            where they don't, the prompt is still run only once.
        share_prefix: Whether the tokens that all prompts start with are run through the model only once. The
            completions are the same.
        tokenizer: Tokenizer that decodes completions; required for stop strings.
        merge_adapter: Whether to generate with the adapter merged into copies of the weights, see
            :func:`~lightning_ft.rollout.merged_adapter.merged_adapter`.

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
        >>> group = engine.generate([[5, 6, 7]], max_new_tokens=4, sampling=Sampling(), num_completions=3)
        >>> len(group.completions), group.prefilled
        (3, 3)
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        end_token_ids: Sequence[int],
        pad_token_id: int = 0,
        batch_size: int = 32,
        share_prefix: bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
        merge_adapter: bool = False,
    ) -> None:
        StopChecker(end_token_ids)  # refuses an empty list
        check_integer("batch_size", batch_size, 1, ConfigError)
        self.model = model
        self.end_token_ids = tuple(end_token_ids)
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.share_prefix = share_prefix
        self.tokenizer = tokenizer
        self.merge_adapter = merge_adapter
        self._exact: bool | None = None
        self._can_share_rows = False
        self._why_inexact: str | None = None
        self._warned: set[str] = set()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        num_completions: int = 1,
        on_answered: OnAnswered | None = None,
        prefix: int | None = None,
        grammars: GrammarMasks | None = None,
    ) -> Rollouts:
        """Continue each prompt until an end token, a stop string or `max_new_tokens`.

        Args:
            prompts: Token ids of each prompt, none of them empty.
            max_new_tokens: Largest number of tokens per completion.
            sampling: How tokens are chosen; None for greedy decoding.
            num_completions: Number of completions per prompt. Greedy ones are computed once and repeated.
            on_answered: Function called after each batch with the number of its prompts.
            prefix: Largest number of common tokens to share; None shares all.
            grammars: Structured outputs of each prompt; None restricts none.

        Returns:
            ``len(prompts) * num_completions`` completions, those of a prompt next to each other.

        Raises:
            ConfigError: For an empty prompt, a number below 1, a prompt that leaves no room for its completion in the
                model's context, or stop strings without a tokenizer.
            RolloutError: If the request of another rank of a sharded model is invalid.
        """
        rank_sync, problem = RankSync(self.model), None
        try:
            check_request(prompts, max_new_tokens, num_completions, context_length(base_of(self.model)))
            stop_checker = StopChecker(self.end_token_ids, () if sampling is None else sampling.stop, self.tokenizer)
        except ConfigError as error:
            problem = error
        rank_sync.check(problem)
        group = 1 if sampling is None or sampling.greedy else num_completions
        (longest,) = rank_sync.agree([max(map(len, prompts), default=0)])
        if not longest:
            return Rollouts((), 0, 0)
        shared = common_prefix(prompts) if self.share_prefix else 0
        shared = shared if prefix is None else min(prefix, shared)
        by_prompt: list[list[Completion]] = [[] for _ in prompts]
        merged = merged_adapter(self.model) if self.merge_adapter else nullcontext()
        with evaluating(self.model), merged, weights_cast_once(self.model), rank_sync.gathered():
            layers, why_not = self._layers(longest + max_new_tokens)
            plan = None
            if why_not is not None:
                plan = plan_batches(
                    self.model,
                    [len(prompt) for prompt in prompts for _ in range(group)],
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self.pad_token_id,
                    synced_ranks=rank_sync.needed,
                )
                plan = replace(plan, keys=plan.keys[::group])
            self._warn(slowdown_warning(type(base_of(self.model)).__name__, why_not, shared, group, plan))
            if sampling is not None and not sampling.greedy:
                self._warn(self._position_mismatch([len(prompt) for prompt in prompts], max_new_tokens))
            shared = shared if why_not is None else 0
            step_tokens = _STEP_TOKENS["cpu" if input_device(self.model).type == "cpu" else "other"] * max_new_tokens
            batches, part_sizes = split_into_batches(
                prompts, self.batch_size, group, plan, shared=shared, step_tokens=None if plan else step_tokens
            )
            calls = len(batches) * len(part_sizes)
            (most_calls,) = rank_sync.agree([calls])
            request = _Request(rank_sync, sampling, stop_checker, max_new_tokens, layers if why_not is None else None)
            prefix_cache = self._prefill(prompts[0][:shared], request) if shared else None
            for batch in batches:
                suffixes = [list(prompts[i][shared:]) for i in batch]
                new_mask = (lambda _: None) if grammars is None else partial(grammars.start, batch)
                groups = self._complete_batch(suffixes, prefix_cache, part_sizes, request, new_mask)
                for i, completions in zip(batch, groups, strict=True):
                    by_prompt[i] = completions * (num_completions // group)
                if on_answered is not None:
                    on_answered(len(batch))
            self._wait_for_ranks(most_calls - calls, request)
        unshared = sum(len(prompt) - shared for prompt in prompts)
        return Rollouts(
            tuple(completion for completions in by_prompt for completion in completions),
            shared,
            shared + unshared if why_not is None else unshared * group,
        )

    def sync_weights(self, model: CausalLM) -> None:
        """Do nothing: completions are sampled from the live model.

        Args:
            model: Model of this engine.
        """

    def prefill_prefix(self, prefix: Sequence[int], tokens: int) -> GrowingCache | None:
        """Run a prefix of prompts through the model.

        Args:
            prefix: Token ids of the prefix.
            tokens: Largest number of tokens in a row that will start with it.

        Returns:
            Cache of the prefix; None if the model can't share it.
        """
        with evaluating(self.model):
            layers, why_not = self._layers(tokens)
            return None if why_not is not None else prefill_tokens(self.model, list(prefix), layers)

    def first_token(self, prompt: Sequence[int], prefix: GrowingCache | None = None) -> int:
        """Return the greedy first token after a prompt.

        Args:
            prompt: Token ids of the prompt, the prefix excluded.
            prefix: Cache that `prefill_prefix` returned; it can be used again. None if `prompt` is complete.
        """
        with evaluating(self.model):
            layers, why_not = self._layers(len(prompt) + 1)
            if why_not is not None:
                request = _Request(RankSync(self.model), None, StopChecker(self.end_token_ids), 1, None)
                return self._generate_with_transformers([list(prompt)], 1, request)[0].tokens[0]
            cache = GrowingCache(layers, prefix)
            start = cache.get_seq_length()
            positions = torch.arange(start, start + len(prompt))[None]
            return int(next_logits(self.model, torch.tensor([list(prompt)]), cache, positions, None).argmax())

    # ------------------------------------------------------------ one batch

    def _complete_batch(
        self,
        prompts: list[list[int]],
        prefix: GrowingCache | None,
        part_sizes: list[int],
        request: _Request,
        new_mask: Callable[[int], GrammarMask | None],
    ) -> list[list[Completion]]:
        """Generate the completions of each prompt of a batch; the prompts' tokens are those after the prefix."""
        if request.layers is None:
            parts = [self._generate_with_transformers(prompts, size, request, new_mask(size)) for size in part_sizes]
        else:
            forward = partial(self._forward, request.rank_sync)
            sampler = TokenSampler(request.sampling)
            parts = decode_parts(
                prefill_prompts(  # not in a variable, which would keep the memory that decode_parts frees
                    forward,
                    prompts,
                    prefix,
                    layers=request.layers,
                    pad_token_id=self.pad_token_id,
                    device=input_device(self.model),
                ),
                part_sizes,
                lambda shared_rows: decode(
                    forward,
                    shared_rows,
                    sampler,
                    request.stop_checker,
                    request.max_new_tokens,
                    new_mask(len(shared_rows.logits) // len(prompts)),
                ),
                max_new_tokens=request.max_new_tokens,
                sequences_per_row=None if self._can_share_rows else 1,
            )
        return [
            [c for size, part in zip(part_sizes, parts, strict=True) for c in part[index * size :][:size]]
            for index in range(len(prompts))
        ]

    def _forward(
        self,
        rank_sync: RankSync,
        ids: Tensor,
        cache: GrowingCache,
        positions: Tensor,
        mask: Tensor | None,
        logits_to_keep: int,
    ) -> Tensor:
        rank_sync.announce()
        return next_logits(self.model, ids, cache, positions, mask, logits_to_keep)

    def _prefill(self, prefix: Sequence[int], request: _Request) -> GrowingCache:
        assert request.layers is not None
        request.rank_sync.announce()
        return prefill_tokens(self.model, list(prefix), request.layers)

    def _generate_with_transformers(
        self, prompts: list[list[int]], num_completions: int, request: _Request, mask: GrammarMask | None = None
    ) -> list[Completion]:
        self._length_switch()
        return generate_with_transformers(
            self.model,
            prompts,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            num_completions=num_completions,
            stop_checker=request.stop_checker,
            pad_token_id=self.pad_token_id,
            synced_ranks=request.rank_sync.needed,
            grammar_mask=mask,
        )

    def _wait_for_ranks(self, calls: int, request: _Request) -> None:
        """Run idle passes until the other ranks of a sharded model have finished.

        Args:
            calls: Number of calls of transformers' `generate` by which this rank is short of the busiest one.
            request: Options of this call.
        """
        if request.layers is not None:
            request.rank_sync.wait(lambda: idle_pass(self.model))
        elif request.rank_sync.needed:
            idle = replace(request, sampling=None, max_new_tokens=1)
            for _ in range(calls):
                self._generate_with_transformers([[self.pad_token_id]], 1, idle)
        request.rank_sync.release()

    # ------------------------------------------------------------ what the model supports

    def _layers(self, tokens: int) -> tuple[int, str | None]:
        """Return the number of layers of the cache, and why rows of `tokens` tokens can't use it (None if they can)."""
        layers, why_not = cache_support(self.model, tokens)
        switch = self._length_switch()
        if why_not is None and switch is not None and tokens > switch.at:
            why_not = f"it {switch.why}, while cached keys keep the positions that they were computed with"
        if why_not is None and not self._is_exact(layers):
            why_not = self._why_inexact or "its output differs when a prefix is taken from a cache"
        return layers, why_not

    def _length_switch(self) -> LengthSwitch | None:
        """Return the length from which positions of a pass change, and reset what earlier passes left in the model."""
        switch: LengthSwitch | None = as_forward(base_of(self.model), length_switch)
        if switch is not None:
            switch.forget()
        return switch

    def _position_mismatch(self, lengths: Sequence[int], max_new_tokens: int) -> str | None:
        """Return a warning if completions may be sampled with other positions than their log-probabilities."""
        switch = self._length_switch()
        if switch is None or not any(length <= switch.at < length + max_new_tokens for length in lengths):
            return None
        return (
            f"{type(base_of(self.model)).__name__} {switch.why}: the log-probabilities of a longer completion are "
            "computed with other positions than its first tokens were sampled with, so they differ. Lower "
            "max_new_tokens or shorten the prompts to stay within that length."
        )

    def _is_exact(self, layers: int) -> bool:
        if self._exact is None:
            try:
                self._exact, self._can_share_rows = probe_cache(self.model, layers, self.pad_token_id)
            except torch.OutOfMemoryError:
                raise
            except NonFiniteError as error:
                self._exact, self._why_inexact = False, str(error)
            except Exception as error:  # whatever an architecture raises, transformers' own loop remains
                self._exact = False
                self._why_inexact = f"it fails with this package's cache ({type(error).__name__}: {first_line(error)})"
        return self._exact

    def _warn(self, message: str | None) -> None:
        """Show each warning once."""
        if message is not None and message not in self._warned:
            self._warned.add(message)
            warn(message, stacklevel=3)
