"""Answers from a model in this process, sampled or greedy, with nothing run through it twice.

Prompts that start with the same system prompt and examples differ in their last few tokens. The prefix is prefilled
with one row, its keys and values are laid into the cache of each batch, each prompt is read once for all its
completions, sequences that share much share a row of the cache, and rows leave their batch as they finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ft.distributed import warn
from lightning_ft.errors import ConfigError, NonFiniteError
from lightning_ft.models.batched_generation import BatchPlan, plan_batches
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, as_forward, base_of, input_device
from lightning_ft.models.lengths import LengthSwitch, length_switch
from lightning_ft.models.load import context_length
from lightning_ft.read_errors import first_line
from lightning_ft.rollout.cache import GrowingCache
from lightning_ft.rollout.decode import Ending, cached_layers, decode, decode_parts, idle_pass, next_logits, read_tokens
from lightning_ft.rollout.fallback import generate_plainly
from lightning_ft.rollout.probe import probe_cache
from lightning_ft.rollout.protocol import Completion, OnAnswered, Rollouts, Sampling, check_request, common_prefix
from lightning_ft.rollout.rank_sync import RankSync
from lightning_ft.rollout.sampling import TokenSampler
from lightning_ft.rollout.shared_rows import read_prompts


def batches_of(
    prompts: Sequence[Sequence[int]], rows: int, group: int, together: BatchPlan | None = None
) -> tuple[list[list[int]], list[int]]:
    """Which prompts are read together, and in parts of which sizes the completions of each are written.

    Args:
        prompts: Token ids.
        rows: Completions at a time.
        group: Completions of each prompt.
        together: Which prompts may share a batch; None for all.

    Example:
        >>> batches_of([[1], [1, 2], [3]], rows=4, group=2), batches_of([[1]], rows=4, group=9)
        (([[1, 0], [2]], [2]), ([[0]], [4, 4, 1]))
        >>> batches_of([[1], [1, 2], [3]], rows=4, group=1, together=BatchPlan((1, 2, 1)))
        ([[1], [0, 2]], [1])
    """
    together = BatchPlan((0,) * len(prompts)) if together is None else together
    rows = 1 if together.alone else rows
    # Longest first: rows of a batch are about as long as each other, and what doesn't fit into memory shows at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = together.batches(max(1, rows // group), order)
    return batches, [min(rows, group - start) for start in range(0, group, rows)]


def slower(name: str, why_not: str | None, shared: int, group: int, together: BatchPlan | None) -> str | None:
    """What to say of prompts that are run more often than they need be; None if there is nothing.

    Args:
        name: Name of the model.
        why_not: Why this project's own loop can't be used; None if it can.
        shared: Tokens that all prompts begin with.
        group: Completions of each prompt.
        together: Which prompts may share a batch.
    """
    often = ["the prompts' common prefix is run once for each prompt"] if why_not and shared else []
    often += ["each prompt is run once for each of its completions"] if why_not and group > 1 else []
    said = [f"{' and '.join(often)}, because {why_not}"] if often else []
    said += [together.why] if together is not None and together.why else []
    return f"{name}: {'; '.join(said)}. The answers are the same, it is only slower." if said else None


@dataclass(frozen=True)
class _Request:
    """What one call of `generate` asks for; `layers` is None where transformers' own loop has to answer."""

    lockstep: RankSync
    sampling: Sampling | None
    ending: Ending
    max_new_tokens: int
    layers: int | None


class LocalEngine:
    """Answers from a transformers model, adapted by PEFT or not, with the weights that it has when asked.

    The penalties that a generation config may hold are not applied. Greedy tokens are, in fp32, those of
    `model.generate(do_sample=False)`.

    Sampling draws from the global random generator of the model's device and from nothing else. Prompts go through in
    batches, longest first (in their order where equally long), a prompt's completions side by side, and each decoding
    step draws once for the rows of its batch. So the same generator state, weights, prompts and `batch_size` give the
    same tokens.

    The ranks of a sharded model all have to call `generate`, each with its own prompts (or none); see
    :class:`~lightning_ft.rollout.rank_sync.RankSync`.

    Args:
        model: In whatever mode; it is put back.
        end_token_ids: Each of them ends an answer.
        pad_token_id: Stands at masked places.
        batch_size: Completions at a time. Those of one prompt stay together where they fit; where they don't, the
            prompt is still read only once.
        share_prefix: Run the tokens that all prompts start with through the model once. The answers are the same.
        tokenizer: Makes text of tokens; needed for stop strings.

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
    ) -> None:
        Ending(end_token_ids)  # refuses none at all
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1.")
        self.model = model
        self.end_token_ids = tuple(end_token_ids)
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.share_prefix = share_prefix
        self.tokenizer = tokenizer
        self._exact: bool | None = None
        self._together = False
        self._why_inexact: str | None = None
        self._told: set[str] = set()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        num_completions: int = 1,
        on_answered: OnAnswered | None = None,
        prefix: int | None = None,
    ) -> Rollouts:
        """Continue each prompt until an end token, a stop string or `max_new_tokens`.

        Args:
            prompts: Token ids, none of them empty.
            max_new_tokens: At most so many for each completion.
            sampling: How tokens are chosen; None for the likeliest one every time.
            num_completions: Completions of each prompt. Greedy ones are computed once and repeated.
            on_answered: Told of progress.
            prefix: Tokens to share, where fewer than the prompts have in common.

        Returns:
            ``len(prompts) * num_completions`` completions, those of one prompt side by side.

        Raises:
            ConfigError: For an empty prompt, a number below 1, a prompt that leaves no room for its completion in the
                model's context, or stop strings without a tokenizer.
            RolloutError: If another rank of a sharded model was asked for something that isn't possible.
        """
        lockstep, problem = RankSync(self.model), None
        try:
            check_request(prompts, max_new_tokens, num_completions, context_length(base_of(self.model)))
            ending = Ending(self.end_token_ids, () if sampling is None else sampling.stop, self.tokenizer)
        except ConfigError as error:
            problem = error
        lockstep.check(problem)
        group = 1 if sampling is None or sampling.greedy else num_completions
        (longest,) = lockstep.agree([max(map(len, prompts), default=0)])
        if not longest:
            return Rollouts((), 0, 0)
        shared = common_prefix(prompts) if self.share_prefix else 0
        shared = shared if prefix is None else min(prefix, shared)
        answers: list[list[Completion]] = [[] for _ in prompts]
        with evaluating(self.model):
            layers, why_not = self._layers(longest + max_new_tokens)
            apart = None
            if why_not is not None:
                apart = plan_batches(
                    self.model,
                    [len(prompt) for prompt in prompts for _ in range(group)],
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self.pad_token_id,
                    synced_ranks=lockstep.needed,
                )
                apart = replace(apart, keys=apart.keys[::group])
            self._warn(slower(type(base_of(self.model)).__name__, why_not, shared, group, apart))
            if sampling is not None and not sampling.greedy:
                self._warn(self._parts_from_scores([len(prompt) for prompt in prompts], max_new_tokens))
            shared = shared if why_not is None else 0
            batches, parts = batches_of(prompts, self.batch_size, group, apart)
            calls = len(batches) * len(parts)
            (most_calls,) = lockstep.agree([calls])
            request = _Request(lockstep, sampling, ending, max_new_tokens, layers if why_not is None else None)
            start = self._read(prompts[0][:shared], request) if shared else None
            for batch in batches:
                done = self._answer([list(prompts[i][shared:]) for i in batch], start, parts, request)
                for i, completions in zip(batch, done, strict=True):
                    answers[i] = completions * (num_completions // group)
                if on_answered is not None:
                    on_answered(len(batch))
            self._wait(most_calls - calls, request)
        once = sum(len(prompt) - shared for prompt in prompts)
        return Rollouts(
            tuple(completion for completions in answers for completion in completions),
            shared,
            shared + once if why_not is None else once * group,
        )

    def sync_weights(self, model: CausalLM) -> None:
        """Do nothing: completions are sampled from the live model itself.

        Args:
            model: The model of this engine.
        """

    def read_prefix(self, prefix: Sequence[int], tokens: int) -> GrowingCache | None:
        """Run a prefix through the model, for rows of at most so many tokens; None where the model can't share it."""
        with evaluating(self.model):
            layers, why_not = self._layers(tokens)
            return None if why_not is not None else read_tokens(self.model, list(prefix), layers)

    def first_token(self, prompt: Sequence[int], prefix: GrowingCache | None = None) -> int:
        """The first new token behind a prompt, or behind what follows a prefix that was read.

        Args:
            prompt: Token ids, without the prefix.
            prefix: What `read_prefix` gave; it can be used again.
        """
        with evaluating(self.model):
            layers, why_not = self._layers(len(prompt) + 1)
            if why_not is not None:
                request = _Request(RankSync(self.model), None, Ending(self.end_token_ids), 1, None)
                return self._plainly([list(prompt)], 1, request)[0].tokens[0]
            cache = GrowingCache(layers, prefix)
            start = cache.get_seq_length()
            positions = torch.arange(start, start + len(prompt))[None]
            return int(next_logits(self.model, torch.tensor([list(prompt)]), cache, positions, None).argmax())

    # ------------------------------------------------------------ one batch

    def _answer(
        self, prompts: list[list[int]], start: GrowingCache | None, parts: list[int], request: _Request
    ) -> list[list[Completion]]:
        """Completions of each prompt of a batch, given behind the prefix."""
        if request.layers is None:
            done = [self._plainly(prompts, size, request) for size in parts]
        else:
            forward = partial(self._forward, request.lockstep)
            sampler = TokenSampler(request.sampling)
            done = decode_parts(
                read_prompts(
                    forward,
                    prompts,
                    start,
                    layers=request.layers,
                    pad_token_id=self.pad_token_id,
                    device=input_device(self.model),
                ),
                parts,
                lambda bundles: decode(forward, bundles, sampler, request.ending, request.max_new_tokens),
                max_new_tokens=request.max_new_tokens,
                width=None if self._together else 1,
            )
        return [
            [c for size, completions in zip(parts, done, strict=True) for c in completions[row * size :][:size]]
            for row in range(len(prompts))
        ]

    def _forward(
        self, lockstep: RankSync, ids: Tensor, cache: GrowingCache, positions: Tensor, mask: Tensor | None, last: int
    ) -> Tensor:
        lockstep.announce()
        return next_logits(self.model, ids, cache, positions, mask, last)

    def _read(self, prefix: Sequence[int], request: _Request) -> GrowingCache:
        assert request.layers is not None
        request.lockstep.announce()
        return read_tokens(self.model, list(prefix), request.layers)

    def _plainly(self, prompts: list[list[int]], size: int, request: _Request) -> list[Completion]:
        self._switch()
        return generate_plainly(
            self.model,
            prompts,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            num_completions=size,
            ending=request.ending,
            pad_token_id=self.pad_token_id,
            synced_ranks=request.lockstep.needed,
        )

    def _wait(self, calls: int, request: _Request) -> None:
        """Run beside the other ranks of a sharded model, of which some call `generate` so many times more."""
        if request.layers is not None:
            request.lockstep.wait(lambda: idle_pass(self.model))
        elif request.lockstep.needed:
            idle = replace(request, sampling=None, max_new_tokens=1)
            for _ in range(calls):
                self._plainly([[self.pad_token_id]], 1, idle)
        request.lockstep.release()

    # ------------------------------------------------------------ what the model can do

    def _layers(self, tokens: int) -> tuple[int, str | None]:
        """Number of layers of the cache, and why this loop can't be used for rows of so many tokens."""
        layers, why_not = cached_layers(self.model, tokens)
        switch = self._switch()
        if why_not is None and switch is not None and tokens > switch.at:
            why_not = f"it {switch.why}, which keys and values that are kept don't follow"
        if why_not is None and not self._is_exact(layers):
            why_not = self._why_inexact or "its output isn't the same with a prefix taken from a cache"
        return layers, why_not

    def _switch(self) -> LengthSwitch | None:
        """Where the positions of a pass change with its longest row; what earlier passes left behind is forgotten."""
        switch: LengthSwitch | None = as_forward(base_of(self.model), length_switch)
        if switch is not None:
            switch.forget()
        return switch

    def _parts_from_scores(self, lengths: Sequence[int], max_new_tokens: int) -> str | None:
        """What to say where a completion may be sampled with other positions than it is scored with."""
        switch = self._switch()
        if switch is None or not any(length <= switch.at < length + max_new_tokens for length in lengths):
            return None
        return (
            f"{type(base_of(self.model)).__name__} {switch.why}: a completion that goes beyond that is scored with "
            "other positions than its first tokens were sampled with, so their log-probabilities differ. Lower "
            "max_new_tokens or shorten the prompts to stay within it."
        )

    def _is_exact(self, layers: int) -> bool:
        if self._exact is None:
            try:
                self._exact, self._together = probe_cache(self.model, layers, self.pad_token_id)
            except torch.OutOfMemoryError:
                raise
            except NonFiniteError as error:
                self._exact, self._why_inexact = False, str(error)
            except Exception as error:  # whatever an architecture raises: transformers' own loop is left
                self._exact = False
                self._why_inexact = f"it fails with a cache of ours ({type(error).__name__}: {first_line(error)})"
        return self._exact

    def _warn(self, said: str | None) -> None:
        """Say once what is run more often than it need be."""
        if said is not None and said not in self._told:
            self._told.add(said)
            warn(said, stacklevel=3)
