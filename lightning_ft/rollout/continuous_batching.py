"""Completions by transformers' continuous batching: a waiting prompt takes a finished completion's room at once.

A batch of :class:`~lightning_ft.rollout.local.LocalEngine` shrinks until its longest completion ends. Here it stays
full, and keys and values are in pages (https://arxiv.org/abs/2309.06180). It is made for GPUs with FlashAttention and
many completions of very different lengths; on a CPU the built-in engine is twice as fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerBase,
)
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from lightning_ft.arguments import check_integer, check_values, did_you_mean
from lightning_ft.errors import ConfigError, RolloutError
from lightning_ft.models.exactness import some_tokens
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, as_forward, base_of, input_device
from lightning_ft.models.lengths import length_switch
from lightning_ft.models.load import context_length
from lightning_ft.models.shard import is_sharded
from lightning_ft.rollout.decode import StopChecker
from lightning_ft.rollout.errors import errors_named
from lightning_ft.rollout.kept_state import attention_kept, heap_frozen, random_state_kept, weights_in_autocast_dtype
from lightning_ft.rollout.protocol import Completion, OnAnswered, Rollouts, Sampling, check_request
from lightning_ft.rollout.sampling import refuse_nonfinite_logits

_OWN_SETTINGS = (
    *("seed", "return_logprobs", "max_requests_per_batch"),
    *("max_queue_size", "drop_unsupported_processors"),
)
"""Settings of transformers that the engine sets itself."""
_LARGEST_GAP = 0.1
"""Largest mean difference of log-probabilities from the model's, nats; rounding explains less in every dtype."""
_REMEDY = "Leave out continuous_batching= to use the built-in engine."


class ContinuousBatchingEngine:
    """Generates with transformers' continuous batching in this process, with the model's current weights.

    In fp32, greedy tokens are those of `LocalEngine`. Sampling starts from a seed that is drawn from the global random
    generator of the model's device, so the same generator state, weights and prompts give the same tokens on a CPU.
    Penalties of the model's generation config are not applied.

    Each completion is a request of its own: several return sequences of one request would all start with the same
    token. Whole pages of a prompt that is already in the cache are not run again.

    Under autocast, fp32 weights are held in its dtype while completions are generated, which takes half their memory
    once more.

    Stop strings are found when a completion is complete, so it takes as long as without them.

    A few completions of random tokens come first: a model that transformers runs otherwise in pages, for example
    without the soft caps of its attention, is refused.

    Args:
        model: Model to generate with. It may be in training mode, which is restored afterwards.
        end_token_ids: Ids of the tokens that end a completion.
        batch_size: Largest number of completions in the batch; others wait.
        tokenizer: Tokenizer that decodes completions; required for stop strings.
        settings: Arguments of transformers' `ContinuousBatchingConfig`, such as ``page_size``. ``num_blocks`` is by
            default what `batch_size` of the longest completions need.

    Raises:
        ConfigError: If there is no end token, `batch_size` isn't positive, or a setting is unknown or has no valid
            value.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> engine = ContinuousBatchingEngine(model, end_token_ids=[2], settings={"page_size": 16})
        >>> group = engine.generate([[5, 6, 7]], max_new_tokens=4, sampling=Sampling(), num_completions=3)
        >>> len(group.completions), len(group.completions[0].logprobs) == len(group.completions[0].tokens)
        (3, True)
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        end_token_ids: Sequence[int],
        batch_size: int = 64,
        tokenizer: PreTrainedTokenizerBase | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        StopChecker(end_token_ids)  # refuses an empty list
        check_integer("batch_size", batch_size, 1, ConfigError)
        self.model = model
        self.end_token_ids = tuple(end_token_ids)
        self.batch_size = batch_size
        self.tokenizer = tokenizer
        self.settings = check_settings(settings or {})
        self._probed = False

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
            prompts: Token ids of each prompt, none of them empty.
            max_new_tokens: Largest number of tokens per completion.
            sampling: How tokens are chosen; None for greedy decoding.
            num_completions: Number of completions per prompt. Greedy ones are computed once and repeated.
            on_answered: Function called once with the number of prompts, when all are completed.

        Returns:
            ``len(prompts) * num_completions`` completions, those of a prompt next to each other. They have
            log-probabilities unless top-k, top-p or min-p is set, with which transformers renormalizes them over the
            tokens that are kept. They are NaN for a completion that was sampled from non-finite logits. `prefilled`
            counts all prompt tokens, of which some may have been in the cache.

        Raises:
            ConfigError: For an empty prompt, a number below 1, a prompt that leaves no room for its completion in the
                model's context, stop strings without a tokenizer, a sharded model, or sequences so long that they
                change the others of their pass.
            NonFiniteError: If greedy tokens were chosen from logits that aren't finite.
            RolloutError: If transformers fails, for example for a model without paged attention, or generates with
                other probabilities than the model's.
        """
        if is_sharded(self.model):
            raise ConfigError(
                "Continuous batching doesn't gather sharded weights: leave out continuous_batching=, or train with DDP."
            )
        check_request(prompts, max_new_tokens, num_completions, context_length(base_of(self.model)))
        options = Sampling(temperature=0.0) if sampling is None else sampling
        stop_checker = StopChecker(self.end_token_ids, options.stop, self.tokenizer)
        if not prompts:
            return Rollouts((), 0, 0)
        count = 1 if options.greedy else num_completions
        requests = [list(prompt) for prompt in prompts for _ in range(count)]
        with evaluating(self.model), heap_frozen(), random_state_kept(input_device(self.model)) as seed:
            self._refuse_length_switch(max(map(len, prompts)) + max_new_tokens)
            self._refuse_other_probabilities()
            outputs, finite = self._outputs(requests, max_new_tokens, options, seed)
        if options.greedy:
            refuse_nonfinite_logits(finite)
        completions = [self._completion(output, stop_checker, options, finite) for output in outputs]
        if on_answered is not None:
            on_answered(len(prompts))
        repeated = (completion for completion in completions for _ in range(num_completions // count))
        return Rollouts(tuple(repeated), 0, sum(map(len, requests)))

    def sync_weights(self, model: CausalLM) -> None:
        """Do nothing: completions are sampled from the live model.

        Args:
            model: Model of this engine.
        """

    def _refuse_length_switch(self, longest: int) -> None:
        base = base_of(self.model)
        if (switch := as_forward(base, length_switch)) is None:
            return
        switch.forget()
        if longest > switch.at:
            raise ConfigError(
                f"{type(base).__name__} {switch.why}, and continuous batching puts all sequences into one pass: keep "
                "a prompt and max_new_tokens within that length together, or leave out continuous_batching=."
            )

    def _refuse_other_probabilities(self) -> None:
        """Compare the log-probabilities of a few tokens with those of a pass of the model, once."""
        if self._probed:
            return
        model: Any = self.model
        prompts = [ids.tolist() for ids in some_tokens(base_of(model), (12, 9))]
        outputs, finite = self._outputs(prompts, 8, Sampling(), seed=0)
        if not finite:  # there is nothing to compare with
            return
        gaps: list[Tensor] = []
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens = torch.tensor(output.generated_tokens, device=input_device(model))
            ids = torch.tensor([[*prompt, *output.generated_tokens]], device=tokens.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(tokens) - 1 : -1].float()
            logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            gaps.append((logprobs.cpu() - torch.tensor(output.logprobs)).abs())
        gap = float(torch.cat(gaps).mean())
        if gap > _LARGEST_GAP:
            raise RolloutError(
                f"Continuous batching of {type(base_of(model)).__name__} gives other log-probabilities than the model, "
                f"by {gap:.2g} nats on average: transformers leaves out a part of its attention or of its adapter. "
                f"{_REMEDY}"
            )
        self._probed = True

    def _outputs(
        self, requests: list[list[int]], max_new_tokens: int, sampling: Sampling, seed: int
    ) -> tuple[list[Any], bool]:
        """Run the requests, which transformers does in a thread; also returns whether all logits were finite."""
        base: Any = base_of(self.model)
        size = min(self.batch_size, len(requests))
        generation = GenerationConfig(
            do_sample=not sampling.greedy,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.end_token_ids),
            **({} if sampling.greedy else _filters(sampling)),
        )
        found: dict[str, Any] = {}
        nonfinite = _NonFiniteLogits(self.end_token_ids[0], input_device(base))
        what = f"Continuous batching of {type(base).__name__} failed"
        with errors_named(what, _REMEDY), weights_in_autocast_dtype(base), attention_kept(base):
            config = ContinuousBatchingConfig(
                **{
                    "auto_switch_to_flash": base.dtype != torch.float32,  # FlashAttention takes half precision only
                    "disable_nccl_graph_mixing": False,  # it concerns tensor parallelism, and sets a variable
                    **self.settings,
                    "drop_unsupported_processors": False,  # a filter that is left out would be another distribution
                    "max_requests_per_batch": size,
                    "return_logprobs": not sampling.greedy,
                    "seed": seed,
                }
            )
            if config.num_blocks is None:
                longest = max(map(len, requests)) + max_new_tokens
                config.num_blocks = size * (-(-longest // config.page_size) + 1)
            manager = base.init_continuous_batching(generation, config)
            try:
                manager.logit_processor.logits_processor.insert(0, nonfinite)
                manager.logit_processor.do_processing = True
                # All requests are there when the thread starts, so which of them share a batch isn't left to chance.
                names = manager.add_requests(requests, max_new_tokens=max_new_tokens)
                manager.start()
                while len(found) < len(names):
                    output = manager.get_result(timeout=1)
                    if output is not None and output.is_finished():
                        found[output.request_id] = output
                    elif output is None and not manager.is_running() and manager.output_router.output_queue.empty():
                        break
                failed = [name for name in names if name not in found or found[name].error is not None]
                if (error := manager.background_thread_status.fatal_error) is not None:
                    raise error
                if failed:
                    reason = found[failed[0]].error if failed[0] in found else "the thread ended"
                    raise RuntimeError(f"{len(failed)} of {len(names)} requests, {reason}")
            finally:
                manager.stop(hard_stop=len(found) < len(requests))
                manager.destroy()
        return [found[name] for name in names], not bool(nonfinite.found)

    def _completion(self, output: Any, stop_checker: StopChecker, sampling: Sampling, finite: bool) -> Completion:
        tokens = list(output.generated_tokens)
        length = len(tokens)
        if stop_checker.stop:
            ends = stop_checker([tokens[: i + 1] for i in range(length)])
            length = ends.index(True) + 1 if True in ends else length
        (ended,) = stop_checker([tokens[:length]])
        logprobs = () if sampling.greedy or sampling.filters else tuple(output.logprobs[:length])
        if not finite and tokens[-1] == self.end_token_ids[0] and output.logprobs[-1] == 0:
            logprobs = (math.nan,) * length
        return Completion(tuple(tokens[:length]), truncated=not ended, logprobs=logprobs)


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check arguments of transformers' `ContinuousBatchingConfig`.

    Raises:
        ConfigError: For an unknown one, one that the engine sets itself, or a value of another type or out of range.

    Example:
        >>> check_settings({"page_sise": 16})
        Traceback (most recent call last):
        lightning_ft.errors.ConfigError: continuous_batching: transformers' ContinuousBatchingConfig has no ...
    """
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    for name in settings:
        if name in _OWN_SETTINGS:
            raise ConfigError(f"continuous_batching: {name!r} is set by the engine itself; leave it out.")
        if name not in known:
            raise ConfigError(
                f"continuous_batching: transformers' ContinuousBatchingConfig has no {name!r}."
                f"{did_you_mean(name, known - set(_OWN_SETTINGS))}"
            )
    check_values(ContinuousBatchingConfig, (), settings)
    check_integer("continuous_batching: page_size", settings.get("page_size", 4), 4, ConfigError)
    if (scheduler := settings.get("scheduler_type", "fifo")) not in SCHEDULER_MAPPING:
        raise ConfigError(
            f"continuous_batching: scheduler_type={scheduler!r}: expected {' or '.join(SCHEDULER_MAPPING)}."
        )
    return dict(settings)


def _filters(sampling: Sampling) -> dict[str, Any]:
    filters = {"temperature": float(sampling.temperature), "top_k": sampling.top_k, "top_p": float(sampling.top_p)}
    return filters | ({"min_p": float(sampling.min_p)} if sampling.min_p else {})


class _NonFiniteLogits(LogitsProcessor):
    """Ends sequences whose logits aren't finite: a draw from NaNs ends the thread, and on CUDA the process.

    The end token gets probability 1, whose log-probability of exactly 0 tells these completions from the others.

    Args:
        end_token_id: Id of a token that ends a completion.
        device: Device of the logits.
    """

    supports_continuous_batching = True

    def __init__(self, end_token_id: int, device: torch.device) -> None:
        self.found = torch.zeros((), dtype=torch.bool, device=device)
        """Whether any logits weren't finite."""
        self._end_token_id = end_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        bad = ~scores.amax(-1, keepdim=True).isfinite()  # [b, 1]; NaN where any logit of a row is
        self.found |= bad.any()  # in place, for CUDA graphs
        others = torch.arange(scores.shape[-1], device=scores.device) != self._end_token_id
        return cast(torch.FloatTensor, scores.masked_fill(bad, 0.0).masked_fill(bad & others, -math.inf))
