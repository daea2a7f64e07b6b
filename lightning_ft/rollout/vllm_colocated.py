"""Completions from a vLLM engine in the training process, on the same GPU, which sleeps while the model trains.

Each rank has an engine of its own for its own prompts. While it sleeps it holds neither weights nor cache in the GPU's
memory (sleep level 2). The calls are those of TRL's `VLLMGeneration`. It has not been run with a real vLLM: it is
tested with a mock of `vllm.LLM` that generates with a transformers model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ft.distributed import rank_and_world_size
from lightning_ft.errors import ConfigError, MissingDependencyError, RolloutError
from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.rollout.decode import StopChecker
from lightning_ft.rollout.errors import errors_named
from lightning_ft.rollout.kept_state import process_kept
from lightning_ft.rollout.merged_weights import MergedWeights
from lightning_ft.rollout.protocol import Completion, OnAnswered, Rollouts, Sampling, check_request
from lightning_ft.rollout.vllm_sampling import sampling_parameters, stop_parameters

_OWN_SETTINGS = (
    *("model", "seed", "distributed_executor_backend", "tensor_parallel_size", "logprobs_mode"),
    *("gpu_memory_utilization", "enable_sleep_mode"),
)
"""Arguments of `vllm.LLM` that the engine sets itself."""
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that vLLM reads when it starts."""


def check_colocated(gpu_memory_utilization: float = 0.3, settings: object = None, **others: object) -> None:
    """Check arguments of `ColocatedVLLMEngine`.

    Args:
        gpu_memory_utilization: Share of the GPU's memory.
        settings: Further arguments of `vllm.LLM`.
        others: Other arguments, which aren't checked.

    Raises:
        ConfigError: For a value out of range, or a setting that the engine sets itself.

    Example:
        >>> check_colocated(settings={"seed": 3})
        Traceback (most recent call last):
        lightning_ft.errors.ConfigError: vllm settings: 'seed' is set by the engine itself; leave it out.
    """
    if not 0 < gpu_memory_utilization < 1:
        raise ConfigError(f"gpu_memory_utilization={gpu_memory_utilization}: expected a share between 0 and 1.")
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(f"vllm settings={settings!r:.80}: expected a dict of arguments of vllm.LLM.")
    if own := [name for name in settings or {} if name in _OWN_SETTINGS]:
        raise ConfigError(f"vllm settings: {own[0]!r} is set by the engine itself; leave it out.")


class ColocatedVLLMEngine:
    """Generates with vLLM in this process; see this module's docstring.

    It samples with its own random generator, so a resumed run does not repeat the completions of an uninterrupted one.
    Log-probabilities are vLLM's; with top-k, top-p or min-p there are none, as for a server (see
    :class:`~lightning_ft.rollout.vllm.VLLMEngine`).

    Args:
        end_token_ids: Ids of the tokens that end a completion.
        tokenizer: Tokenizer that decodes completions; required for stop strings.
        gpu_memory_utilization: Share of the GPU's memory for vLLM's weights and cache while it is awake.
        sleep: Whether it gives that memory back between rollouts.
        settings: Further arguments of `vllm.LLM`, such as ``max_model_len``. ``dtype`` is by default that of the model,
            or bfloat16 if its weights are fp32.

    Raises:
        MissingDependencyError: If vLLM is not installed.
        ConfigError: If there is no end token, or a setting is one that the engine sets itself.

    Example:
        >>> ColocatedVLLMEngine(end_token_ids=[2], gpu_memory_utilization=0.4)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        end_token_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
        gpu_memory_utilization: float = 0.3,
        sleep: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        from trl import import_utils

        if not import_utils.is_vllm_available():
            raise MissingDependencyError(
                "vllm={'mode': 'colocated'} needs vLLM in this environment: pip install 'lightning-ft[vllm]'."
            )
        StopChecker(end_token_ids)  # refuses an empty list
        check_colocated(gpu_memory_utilization, settings)
        self.end_token_ids = tuple(end_token_ids)
        self.tokenizer = tokenizer
        self.gpu_memory_utilization = gpu_memory_utilization
        self.sleep = sleep
        self.settings = dict(settings or {})
        self._llm: Any = None
        self._has_weights = False

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
            ``len(prompts) * num_completions`` completions, those of a prompt next to each other.

        Raises:
            ConfigError: For an empty prompt, a number below 1, or stop strings without a tokenizer.
            RolloutError: If vLLM fails, or `sync_weights` wasn't called since the last rollout.
        """
        check_request(prompts, max_new_tokens, num_completions)
        options = Sampling(temperature=0.0) if sampling is None else sampling
        stop_checker = StopChecker(self.end_token_ids, options.stop, self.tokenizer)
        if not self._has_weights:
            raise RolloutError("vLLM has no weights: call sync_weights(model) before each rollout.")
        count = 1 if options.greedy else num_completions  # vLLM refuses several greedy completions
        completions: list[Completion] = []
        with errors_named("vLLM failed to generate"):
            if self.sleep:
                self._llm.wake_up(tags=["kv_cache"])
            if prompts:
                parameters = sampling_parameters(options, max_new_tokens, count)
                parameters |= stop_parameters(options, self.end_token_ids)
                completions = self._completions(prompts, parameters, stop_checker)
            if self.sleep:
                self._llm.sleep(level=2)
                self._has_weights = False
        if len(completions) != len(prompts) * count:
            raise RolloutError(f"vLLM returned {len(completions)} completions: expected {len(prompts) * count}.")
        if on_answered is not None and prompts:
            on_answered(len(prompts))
        repeated = (completion for completion in completions for _ in range(num_completions // count))
        return Rollouts(tuple(repeated), 0, sum(map(len, prompts)))

    def sync_weights(self, model: CausalLM) -> None:
        """Copy the current weights of a model into vLLM's, with adapters merged into the copies.

        Args:
            model: Model in training, on a GPU. The ranks of a sharded model gather its weights together.

        Raises:
            ConfigError: For a model that was loaded from no folder or hub name, which vLLM reads its configuration
                from.
            ModelError: If the model's weights aren't those of a plain model (see `MergedWeights`).
            RolloutError: If vLLM fails.
        """
        weights = MergedWeights(model)
        if self._llm is None:
            self._llm = self._start(model)
        with errors_named("vLLM failed to take over the weights"):
            if self.sleep:
                torch.cuda.empty_cache()
                self._llm.wake_up(tags=["weights"])
            target = self._llm.llm_engine.model_executor.driver_worker.model_runner.model
            for name, tensor in weights:
                target.load_weights([(name, tensor)])
            self._llm.reset_prefix_cache()
        if weights.problem is not None:
            raise RolloutError(f"An adapter can't be merged into its weights: {weights.problem}")
        self._has_weights = True

    def _start(self, model: CausalLM) -> Any:
        from trl.trainer.utils import ensure_master_addr_port
        from vllm import LLM

        base = base_of(model)
        name = getattr(base, "name_or_path", "") or ""
        if not name:
            raise ConfigError(
                "vLLM reads the configuration of a model from its folder or hub name, and this model has neither: pass "
                "one of them as model=."
            )
        rank, world_size = rank_and_world_size()
        dtype = torch.bfloat16 if base.dtype == torch.float32 else base.dtype
        # Lightning takes a process with LOCAL_RANK for one that it launched, and vLLM seeds the global generators.
        with errors_named("vLLM failed to start"), process_kept(input_device(base), _VARIABLES):
            os.environ.setdefault("LOCAL_RANK", "0")
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
            ensure_master_addr_port()
            llm = LLM(
                **{
                    "dtype": str(dtype).removeprefix("torch."),
                    # vLLM's profiler takes the default, 32,768, for memory that isn't there.
                    "max_num_batched_tokens": 4096,
                    **self.settings,
                    "model": name,
                    "gpu_memory_utilization": self.gpu_memory_utilization,
                    "enable_sleep_mode": self.sleep,
                    "tensor_parallel_size": 1,
                    "distributed_executor_backend": "external_launcher",
                    "seed": rank,
                    "logprobs_mode": "processed_logprobs",
                }
            )
            if self.sleep:
                llm.sleep(level=2)
        return llm

    def _completions(
        self, prompts: Sequence[Sequence[int]], parameters: Mapping[str, Any], stop_checker: StopChecker
    ) -> list[Completion]:
        from vllm import SamplingParams

        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = [
            output
            for request in self._llm.generate(inputs, sampling_params=SamplingParams(**parameters), use_tqdm=False)
            for output in request.outputs
        ]
        ended = stop_checker([list(output.token_ids) for output in found])
        return [
            Completion(tuple(output.token_ids), truncated=not end, logprobs=_logprobs(output))
            for output, end in zip(found, ended, strict=True)
        ]


def _logprobs(output: Any) -> tuple[float, ...]:
    """Log-probabilities of the tokens of one of vLLM's completions, in nats; none if they weren't requested."""
    if output.logprobs is None:
        return ()
    return tuple(
        float(candidates[token].logprob) for token, candidates in zip(output.token_ids, output.logprobs, strict=True)
    )
