"""Answers from a vLLM server, whose weights follow the model that trains.

The server is started by hand, on GPUs of its own, with the model that training starts from:

```
VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen3-0.6B \
    --weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs
```

No run against a real vLLM server has been made: this file has been tested against a stand-in that answers the requests
of `trl.generation.vllm_client.VLLMClient`, with the transfer by NCCL replaced by a recorder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ft.distributed import on_rank_zero, rank_and_world_size
from lightning_ft.errors import ConfigError, LightningFTError, MissingDependencyError, RolloutError
from lightning_ft.models.head import CausalLM, input_device
from lightning_ft.models.shard import is_sharded
from lightning_ft.rollout.decode import Ending
from lightning_ft.rollout.protocol import Completion, OnAnswered, Rollouts, Sampling, check_request
from lightning_ft.rollout.vllm_weights import ServedWeights

_START = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\' '
    "--logprobs-mode processed_logprobs"
)
"""How the server is started."""


class VLLMEngine:
    """Answers from a vLLM server; see this module's docstring for how to start it.

    It answers with the weights that it was last sent: call `sync_weights` after they have changed. The server draws
    from random generators of its own, so a resumed run does not repeat the completions of one that went on.

    Log-probabilities are the server's, computed by other kernels and in its dtype: they differ a little from those of
    the model that trains. A policy loss takes `old_logprobs` from the training model and uses these only to correct
    for the difference. The server's are renormalised over the tokens that top-k, top-p and min-p left, which is
    another quantity than :class:`~lightning_ft.rollout.protocol.Completion` promises, so with such filters there are
    none.

    Every rank of a run calls it, with prompts of its own; rank 0 alone talks to the server, for all of them. The
    connection is made when it is first needed.

    Args:
        base_url: Where the server is.
        end_token_ids: Each of them ends an answer, and no other token does.
        tokenizer: Makes text of tokens; needed for stop strings.
        group_port: Port of the process group over which weights are sent.
        connection_timeout: Seconds to wait for the server to be up.

    Raises:
        MissingDependencyError: Without vLLM, whose client side sends the weights.
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
                "Sampling on a vLLM server needs vllm here too, to send it weights: pip install 'lightning-ft[vllm]'."
            )
        Ending(end_token_ids)  # refuses none at all
        self.base_url = base_url
        self.end_token_ids = tuple(end_token_ids)
        self.tokenizer = tokenizer
        self.group_port = group_port
        self.connection_timeout = connection_timeout
        self._client: Any = None
        self._connected = False  # for weights too
        self._logprobs_mode: str | None = None

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
            prompts: Token ids, none of them empty; no prompts at all on a rank that has none.
            max_new_tokens: At most so many for each completion; the same on all ranks.
            sampling: How tokens are chosen, the same on all ranks; None for the likeliest one every time.
            num_completions: Completions of each prompt, the same on all ranks. Greedy ones are asked for once.
            on_answered: Told when all prompts are answered.

        Returns:
            ``len(prompts) * num_completions`` completions, those of one prompt side by side. `prefilled` counts the
            prompt tokens sent: the server may have had some of them in its cache.

        Raises:
            ConfigError: For an empty prompt, a number below 1, or stop strings without a tokenizer.
            RolloutError: If the server can't be reached, or answers something else than was asked for.
        """
        problem = None
        try:
            check_request(prompts, max_new_tokens, num_completions)
            Ending(self.end_token_ids, () if sampling is None else sampling.stop, self.tokenizer)
        except ConfigError as error:
            problem = error
        asked = Sampling(temperature=0.0) if sampling is None else sampling

        def work(ranks: list[tuple[list[list[int]], ConfigError | None]]) -> list[tuple[Completion, ...]]:
            for _, wrong in ranks:
                if wrong is not None:
                    raise wrong
            every = [prompt for theirs, _ in ranks for prompt in theirs]
            answers = iter(self._ask(every, max_new_tokens, asked, num_completions))
            return [tuple(next(answers) for _ in range(len(theirs) * num_completions)) for theirs, _ in ranks]

        completions = on_rank_zero(work, ([list(prompt) for prompt in prompts], problem))
        if on_answered is not None and prompts:
            on_answered(len(prompts))
        return Rollouts(completions, 0, sum(map(len, prompts)))

    def sync_weights(self, model: CausalLM) -> None:
        """Send the server the weights that a model has now, and have it forget what it computed with others.

        Adapters are merged on the way, into copies: the model is left as it is, bit for bit. Every rank must call it;
        those of a sharded model gather its weights together.

        Args:
            model: The live model, on a GPU.

        Raises:
            ModelError: If the model's weights aren't those of a plain model (see `ServedWeights`).
            RolloutError: If the server can't be reached or fails.
        """
        weights = ServedWeights(model)
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
            for _ in stream:  # what is left: other ranks wait for this one's part of each weight
                pass

        def outcome(problems: list[LightningFTError | None]) -> list[None]:
            if problems[0] is not None:
                raise problems[0]
            return [None] * len(problems)

        on_rank_zero(outcome, problem)

    # ------------------------------------------------------------ rank 0

    def _ask(
        self, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling, num_completions: int
    ) -> list[Completion]:
        if not prompts:
            return []
        n = 1 if sampling.greedy else num_completions  # vLLM refuses several greedy completions
        wants_logprobs = not sampling.greedy and not sampling.filters
        self._check_logprobs_mode(sampling, wants_logprobs)
        with self._talking("generate"):
            output = self._connection().generate(
                prompts,
                n=n,
                temperature=float(sampling.temperature),
                top_p=1.0 if sampling.greedy else float(sampling.top_p),
                top_k=0 if sampling.greedy else sampling.top_k,
                min_p=0.0 if sampling.greedy else float(sampling.min_p),
                max_tokens=max_new_tokens,
                logprobs=0 if wants_logprobs else None,
                generation_kwargs={
                    "stop": list(sampling.stop),
                    "stop_token_ids": list(self.end_token_ids),
                    "ignore_eos": True,  # the server's own idea of an end token; ours are those above
                    "include_stop_str_in_output": True,
                    "skip_special_tokens": False,  # stop strings may hold some
                },
            )
        ending = Ending(self.end_token_ids, sampling.stop, self.tokenizer)
        completions = self._completions(output, prompts, n, wants_logprobs, ending)
        return [c for c in completions for _ in range(num_completions // n)]

    def _completions(
        self, output: dict[str, Any], prompts: list[list[int]], n: int, wants_logprobs: bool, ending: Ending
    ) -> list[Completion]:
        tokens: list[list[int]] = output["completion_ids"]
        if len(tokens) != len(prompts) * n:
            raise RolloutError(
                f"The vLLM server at {self.base_url} gave {len(tokens)} completions to {len(prompts)} prompts: "
                f"expected {n} to each, {len(prompts) * n} in all."
            )
        if output["prompt_ids"] != prompts:
            raise RolloutError(f"The vLLM server at {self.base_url} answered other prompts than it was sent.")
        scores: list[tuple[float, ...]] = [()] * len(tokens)
        if wants_logprobs:
            scores = [
                self._scores(ids, *given)
                for ids, *given in zip(
                    tokens, output["logprob_token_ids"] or [], output["logprobs"] or [], strict=False
                )
            ]
            if [len(s) for s in scores] != [len(ids) for ids in tokens]:
                raise RolloutError(f"The vLLM server at {self.base_url} left log-probabilities out.")
        ended = ending(tokens)
        return [
            Completion(tuple(ids), truncated=not end, logprobs=given)
            for ids, end, given in zip(tokens, ended, scores, strict=True)
        ]

    def _scores(self, tokens: list[int], ids: list[list[int]], logprobs: list[list[float | None]]) -> tuple[float, ...]:
        """The log-probability of each token, out of those of the tokens that stand beside it."""
        scores = []
        for token, names, values in zip(tokens, ids, logprobs, strict=False):
            value = dict(zip(names, values, strict=True)).get(token)
            if value is None:
                raise RolloutError(f"The vLLM server at {self.base_url} gave no log-probability of token {token}.")
            scores.append(value)
        return tuple(scores)

    def _check_logprobs_mode(self, sampling: Sampling, wants_logprobs: bool) -> None:
        if wants_logprobs and sampling.temperature != 1 and self._logprobs_mode not in (None, "processed_logprobs"):
            raise RolloutError(
                f"The vLLM server at {self.base_url} gives {self._logprobs_mode}, which leave the temperature out: "
                f"start it with --logprobs-mode processed_logprobs ({_START})."
            )

    def _send(
        self, model: CausalLM, metadata: list[tuple[str, str, list[int]]], stream: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        with self._talking("take weights"):
            client = self._connection()
            if not self._connected:
                client.init_communicator(device=input_device(model))
                self._connected = True
                self._logprobs_mode = (client.get_server_info().get("model_config") or {}).get("logprobs_mode")
            client.update_named_params(metadata, stream)
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

    @contextmanager
    def _talking(self, what: str) -> Iterator[None]:
        try:
            yield
        except LightningFTError:
            raise
        except Exception as error:  # the client raises whatever comes up, bare exceptions for HTTP errors among it
            raise RolloutError(
                f"The vLLM server at {self.base_url} failed to {what}: {type(error).__name__}: {error}"
            ) from error
