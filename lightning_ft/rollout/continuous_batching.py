"""Completions by transformers' continuous batching: a waiting prompt takes a finished completion's room at once.

A batch of :class:`~lightning_ft.rollout.local.LocalEngine` shrinks until its longest completion ends. Here it stays
full, and keys and values are in pages (https://arxiv.org/abs/2309.06180). It is made for GPUs with FlashAttention and
many completions of very different lengths; on a CPU the built-in engine is twice as fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.arguments import did_you_mean
from lightning_ft.errors import ConfigError
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.models.load import context_length
from lightning_ft.models.shard import is_sharded
from lightning_ft.rollout.decode import StopChecker
from lightning_ft.rollout.errors import errors_named
from lightning_ft.rollout.protocol import Completion, OnAnswered, Rollouts, Sampling, check_request

_OWN_SETTINGS = ("seed", "return_logprobs", "max_requests_per_batch")
"""Settings of transformers that the engine makes from its own arguments."""


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

    Args:
        model: Model to generate with. It may be in training mode, which is restored afterwards.
        end_token_ids: Ids of the tokens that end a completion.
        batch_size: Largest number of completions in the batch; others wait.
        tokenizer: Tokenizer that decodes completions; required for stop strings.
        settings: Arguments of transformers' `ContinuousBatchingConfig`, such as ``page_size``. ``num_blocks`` is by
            default what `batch_size` of the longest completions need.

    Raises:
        ConfigError: If there is no end token, `batch_size` isn't positive, or a setting is unknown.

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
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1.")
        self.model = model
        self.end_token_ids = tuple(end_token_ids)
        self.batch_size = batch_size
        self.tokenizer = tokenizer
        self.settings = check_settings(settings or {})

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
            tokens that are kept. `prefilled` counts all prompt tokens, of which some may have been in the cache.

        Raises:
            ConfigError: For an empty prompt, a number below 1, a prompt that leaves no room for its completion in the
                model's context, stop strings without a tokenizer, or a sharded model.
            RolloutError: If transformers fails, for example for a model without paged attention.
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
        with evaluating(self.model), _random_state_kept(input_device(self.model)) as seed:
            outputs = self._outputs(requests, max_new_tokens, options, seed)
        wants_logprobs = not options.greedy and not options.filters
        completions = [_completion(output, stop_checker, wants_logprobs) for output in outputs]
        if on_answered is not None:
            on_answered(len(prompts))
        repeated = (completion for completion in completions for _ in range(num_completions // count))
        return Rollouts(tuple(repeated), 0, sum(map(len, requests)))

    def sync_weights(self, model: CausalLM) -> None:
        """Do nothing: completions are sampled from the live model.

        Args:
            model: Model of this engine.
        """

    def _outputs(self, requests: list[list[int]], max_new_tokens: int, sampling: Sampling, seed: int) -> list[Any]:
        """Run the requests; transformers does it in a thread."""
        base: Any = base_of(self.model)
        size = min(self.batch_size, len(requests))
        config = ContinuousBatchingConfig(
            **{
                "num_blocks": self._blocks(max(map(len, requests)) + max_new_tokens, size),
                "drop_unsupported_processors": False,  # a filter that is left out would be another distribution
                **self.settings,
                "max_requests_per_batch": size,
                "return_logprobs": not sampling.greedy,
                "seed": seed,
            }
        )
        generation = GenerationConfig(
            do_sample=not sampling.greedy,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.end_token_ids),
            **({} if sampling.greedy else _filters(sampling)),
        )
        found: dict[str, Any] = {}
        what = f"Continuous batching of {type(base).__name__} failed"
        with (
            errors_named(what, "Leave out continuous_batching= to use the built-in engine."),
            _weights_in_autocast_dtype(base),
        ):
            manager = base.init_continuous_batching(generation, config)
            try:
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
        return [found[name] for name in names]

    def _blocks(self, tokens: int, size: int) -> int:
        """Number of blocks of the cache that `size` sequences of `tokens` tokens need."""
        page_size = self.settings.get("page_size") or ContinuousBatchingConfig().page_size
        return size * (-(-tokens // page_size) + 1)


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check arguments of transformers' `ContinuousBatchingConfig`.

    Raises:
        ConfigError: For an unknown one, or one that the engine sets itself.

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
    return dict(settings)


def _filters(sampling: Sampling) -> dict[str, Any]:
    filters = {"temperature": float(sampling.temperature), "top_k": sampling.top_k, "top_p": float(sampling.top_p)}
    return filters | ({"min_p": float(sampling.min_p)} if sampling.min_p else {})


def _completion(output: Any, stop_checker: StopChecker, wants_logprobs: bool) -> Completion:
    tokens = list(output.generated_tokens)
    length = len(tokens)
    if stop_checker.stop:
        ends = stop_checker([tokens[: i + 1] for i in range(length)])
        length = ends.index(True) + 1 if True in ends else length
    (ended,) = stop_checker([tokens[:length]])
    logprobs = tuple(output.logprobs[:length]) if wants_logprobs else ()
    return Completion(tuple(tokens[:length]), truncated=not ended, logprobs=logprobs)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[int]:
    """Draw a seed, and let the block, which seeds all global generators, leave no other trace in them."""
    seed = int(torch.randint(2**31, (), device=device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield seed


@contextmanager
def _weights_in_autocast_dtype(model: PreTrainedModel) -> Iterator[None]:
    """Hold fp32 weights in autocast's dtype for the block, if it is under autocast; the fp32 ones return unchanged.

    Autocast itself doesn't reach the thread that generates, and its products don't fit a cache in the weights' dtype.
    """
    device = input_device(model).type
    if not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    kept_names = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    own = [
        (parameter, parameter.data)
        for name, parameter in model.named_parameters()
        if parameter.dtype == torch.float32 and not any(kept in name.split(".") for kept in kept_names)
    ]
    try:
        for parameter, values in own:
            parameter.data = values.to(dtype)
        yield
    finally:
        for parameter, values in own:
            parameter.data = values
