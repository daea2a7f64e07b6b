"""Completions from a vLLM server, which is sent the weights of the model in training.

Start the server yourself, on GPUs of its own, with the model that training starts from:

```
VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen3-0.6B \
    --weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs
```

It has not been run with a real vLLM server: it is tested with a mock server that answers the requests of
`trl.generation.vllm_client.VLLMClient`, with the NCCL transfer replaced by a recorder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ft.distributed import on_rank_zero, rank_and_world_size
from lightning_ft.errors import ConfigError, LightningFTError, MissingDependencyError, RolloutError
from lightning_ft.models.head import CausalLM, input_device
from lightning_ft.models.shard import is_sharded
from lightning_ft.rollout.decode import StopChecker
from lightning_ft.rollout.errors import errors_named
from lightning_ft.rollout.merged_weights import MergedWeights
from lightning_ft.rollout.protocol import Completion, OnAnswered, Rollouts, Sampling, check_request
from lightning_ft.rollout.vllm_sampling import sampling_parameters, stop_parameters

_START = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\' '
    "--logprobs-mode processed_logprobs"
)
"""Command that starts the server."""


class VLLMEngine:
    """Generates on a vLLM server; see this module's docstring for how to start it.

    The server uses the weights that it was sent last: call `sync_weights` after they have changed. It samples with its
    own random generators, so a resumed run does not repeat the completions of an uninterrupted one.

    Log-probabilities are the server's, computed by other kernels and in its dtype: they differ slightly from those of
    the model in training. A policy loss takes `old_logprobs` from the training model and uses these only to correct for
    the difference (`sampling_correction` of the modules). With top-k, top-p or min-p the server renormalizes them over
    the tokens that are kept, which isn't what :class:`~lightning_ft.rollout.protocol.Completion` promises, so with such
    filters there are none.

    Every rank of a run calls it, with its own prompts; only rank 0 talks to the server, for all ranks. It connects on
    first use.

    Args:
        base_url: URL of the server.
        end_token_ids: Ids of the tokens that end a completion; the server's own end tokens don't.
        tokenizer: Tokenizer that decodes completions; required for stop strings.
        group_port: Port of the process group that weights are sent over.
        connection_timeout: Number of seconds to wait for the server to be up.

    Raises:
        MissingDependencyError: If vLLM, whose client sends the weights, is not installed.
        ConfigError: If there is no end token.

    Example:
        >>> VLLMEngine("http://gpu-7:8000", end_token_ids=[2])  # doctest: +SKIP
    """

    def __init__(
        self,
        base_url: str = "http://localhost:8000",
        *,
        end_token_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
        group_port: int = 51216,
        connection_timeout: float = 240.0,
    ) -> None:
        from trl import import_utils

        if not import_utils.is_vllm_available():
            raise MissingDependencyError(
                "Sampling on a vLLM server needs vllm on this side too, to send the weights: "
                "pip install 'lightning-ft[vllm]'."
            )
        StopChecker(end_token_ids)  # refuses an empty list
        self.base_url = base_url
        self.end_token_ids = tuple(end_token_ids)
        self.tokenizer = tokenizer
        self.group_port = group_port
        self.connection_timeout = connection_timeout
        self._client: Any = None
        self._connected = False  # whether the process group for weights exists
        self._logprobs_mode: str | None = None
        self._dtype: torch.dtype | None = None  # of the server's weights, if it is half precision

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
            prompts: Token ids of each prompt, none of them empty; an empty list on a rank without prompts.
            max_new_tokens: Largest number of tokens per completion; the same on all ranks.
            sampling: How tokens are chosen, the same on all ranks; None for greedy decoding.
            num_completions: Number of completions per prompt, the same on all ranks. Greedy ones are requested once
                and repeated.
            on_answered: Function called once with the number of prompts, when all are completed.

        Returns:
            ``len(prompts) * num_completions`` completions, those of a prompt next to each other. `prefilled` counts the
            prompt tokens sent, of which the server may have had some in its cache.

        Raises:
            ConfigError: For an empty prompt, a number below 1, or stop strings without a tokenizer.
            RolloutError: If the server can't be reached, or its response doesn't match the request.
        """
        problem = None
        try:
            check_request(prompts, max_new_tokens, num_completions)
            StopChecker(self.end_token_ids, () if sampling is None else sampling.stop, self.tokenizer)
        except ConfigError as error:
            problem = error
        options = Sampling(temperature=0.0) if sampling is None else sampling

        def generate_for(ranks: list[tuple[list[list[int]], ConfigError | None]]) -> list[tuple[Completion, ...]]:
            for _, error in ranks:
                if error is not None:
                    raise error
            all_prompts = [prompt for rank_prompts, _ in ranks for prompt in rank_prompts]
            completions = iter(self._request_completions(all_prompts, max_new_tokens, options, num_completions))
            return [
                tuple(next(completions) for _ in range(len(rank_prompts) * num_completions))
                for rank_prompts, _ in ranks
            ]

        completions = on_rank_zero(generate_for, ([list(prompt) for prompt in prompts], problem))
        if on_answered is not None and prompts:
            on_answered(len(prompts))
        return Rollouts(completions, 0, sum(map(len, prompts)))

    def sync_weights(self, model: CausalLM) -> None:
        """Send the server the current weights of a model, and reset the server's prefix cache.

        Adapters are merged into copies of the weights: the model itself doesn't change by a bit. Every rank must call
        it; the ranks of a sharded model gather its weights together.

        Args:
            model: Model in training, on a GPU.

        Raises:
            ModelError: If the model's weights aren't those of a plain model (see `MergedWeights`).
            RolloutError: If the server can't be reached or fails.
        """
        weights = MergedWeights(model)
        stream = iter(weights)
        problem: LightningFTError | None = None
        if rank_and_world_size()[0] == 0:
            try:
                self._send(model, weights.metadata, stream)
                if weights.problem is not None:
                    raise RolloutError(f"An adapter can't be merged into its weights: {weights.problem}")
            except LightningFTError as error:
                problem = error
        if is_sharded(model):
            for _ in stream:  # after an error, too: other ranks wait for this rank's shard of each weight
                pass

        def outcome(problems: list[LightningFTError | None]) -> list[None]:
            if problems[0] is not None:
                raise problems[0]
            return [None] * len(problems)

        on_rank_zero(outcome, problem)

    # ------------------------------------------------------------ rank 0

    def _request_completions(
        self, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling, num_completions: int
    ) -> list[Completion]:
        if not prompts:
            return []
        n = 1 if sampling.greedy else num_completions  # vLLM refuses several greedy completions
        wants_logprobs = not sampling.greedy and not sampling.filters
        self._check_logprobs_mode(sampling, wants_logprobs)
        with self._server_errors("generate"):
            output = self._connection().generate(
                prompts,
                **sampling_parameters(sampling, max_new_tokens, n),
                generation_kwargs=stop_parameters(sampling, self.end_token_ids),
            )
        stop_checker = StopChecker(self.end_token_ids, sampling.stop, self.tokenizer)
        completions = self._completions(output, prompts, n, wants_logprobs, stop_checker)
        return [c for c in completions for _ in range(num_completions // n)]

    def _completions(
        self, output: dict[str, Any], prompts: list[list[int]], n: int, wants_logprobs: bool, stop_checker: StopChecker
    ) -> list[Completion]:
        tokens: list[list[int]] = output["completion_ids"]
        if len(tokens) != len(prompts) * n:
            raise RolloutError(
                f"The vLLM server at {self.base_url} returned {len(tokens)} completions of {len(prompts)} prompts: "
                f"expected {n} per prompt, {len(prompts) * n} in total."
            )
        if output["prompt_ids"] != prompts:
            raise RolloutError(f"The vLLM server at {self.base_url} completed other prompts than it was sent.")
        logprobs: list[tuple[float, ...]] = [()] * len(tokens)
        if wants_logprobs:
            logprobs = [
                self._token_logprobs(ids, *candidates)
                for ids, *candidates in zip(
                    tokens, output["logprob_token_ids"] or [], output["logprobs"] or [], strict=False
                )
            ]
            if [len(values) for values in logprobs] != [len(ids) for ids in tokens]:
                raise RolloutError(
                    f"The vLLM server at {self.base_url} returned no log-probabilities for some tokens, though they "
                    "were requested."
                )
        ended = stop_checker(tokens)
        return [
            Completion(tuple(ids), truncated=not end, logprobs=values)
            for ids, end, values in zip(tokens, ended, logprobs, strict=True)
        ]

    def _token_logprobs(
        self, tokens: list[int], candidates: list[list[int]], logprobs: list[list[float | None]]
    ) -> tuple[float, ...]:
        """Look up the log-probability of each token among those of its candidates.

        Args:
            tokens: Token ids of a completion.
            candidates: Token ids with a log-probability at each position.
            logprobs: Log-probabilities of the candidates at each position, nats.
        """
        values = []
        for token, ids, position_logprobs in zip(tokens, candidates, logprobs, strict=False):
            value = dict(zip(ids, position_logprobs, strict=True)).get(token)
            if value is None:
                raise RolloutError(f"The vLLM server at {self.base_url} returned no log-probability of token {token}.")
            values.append(value)
        return tuple(values)

    def _check_logprobs_mode(self, sampling: Sampling, wants_logprobs: bool) -> None:
        if wants_logprobs and sampling.temperature != 1 and self._logprobs_mode not in (None, "processed_logprobs"):
            raise RolloutError(
                f"The vLLM server at {self.base_url} returns {self._logprobs_mode}, which ignore the temperature: "
                f"start it with --logprobs-mode processed_logprobs ({_START})."
            )

    def _send(
        self, model: CausalLM, metadata: list[tuple[str, str, list[int]]], stream: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        with self._server_errors("update its weights"):
            client = self._connection()
            if not self._connected:
                client.init_communicator(device=input_device(model))
                self._connected = True
                served = client.get_server_info().get("model_config") or {}
                self._logprobs_mode, self._dtype = served.get("logprobs_mode"), _half_precision(served.get("dtype"))
            client.update_named_params(*_in_dtype(metadata, stream, self._dtype))
            client.reset_prefix_cache()

    def _connection(self) -> Any:
        if self._client is None:
            import requests
            from trl.generation.vllm_client import VLLMClient

            try:
                self._client = VLLMClient(
                    base_url=self.base_url.rstrip("/"),
                    group_port=self.group_port,
                    connection_timeout=self.connection_timeout,
                )
            except requests.ConnectionError as error:
                raise RolloutError(
                    f"No vLLM server answered at {self.base_url} within {self.connection_timeout:g} s. Start it with "
                    f"\n  {_START}\nand pass its address as base_url."
                ) from error
        return self._client

    def _server_errors(self, action: str) -> AbstractContextManager[None]:
        return errors_named(f"The vLLM server at {self.base_url} failed to {action}")


def _half_precision(name: object) -> torch.dtype | None:
    """The dtype that a server names, such as ``torch.bfloat16``; None if it isn't half precision or isn't known."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name).removeprefix("torch."))


def _in_dtype(
    metadata: list[tuple[str, str, list[int]]], stream: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype | None
) -> tuple[list[tuple[str, str, list[int]]], Iterator[tuple[str, torch.Tensor]]]:
    """Round fp32 weights to the server's dtype, which it would do itself, so that half as many bytes are sent."""
    if dtype is None:
        return metadata, stream
    name = str(dtype).removeprefix("torch.")
    return (
        [(key, name if own == "float32" else own, shape) for key, own, shape in metadata],
        ((key, tensor.to(dtype) if tensor.dtype == torch.float32 else tensor) for key, tensor in stream),
    )
