"""The same completions by transformers' own `generate`, with the cache that the architecture needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lightning_ft.models.batched_generation import left_padded, own_generation_config
from lightning_ft.models.head import CausalLM, input_device
from lightning_ft.rollout.decode import StopChecker
from lightning_ft.rollout.protocol import Completion, Sampling
from lightning_ft.rollout.sampling import TokenSampler, token_logprobs, warpers
from lightning_ft.rollout.structured import GrammarMask


def generate_with_transformers(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None,
    num_completions: int,
    stop_checker: StopChecker,
    pad_token_id: int,
    synced_ranks: bool,
    grammar_mask: GrammarMask | None = None,
) -> list[Completion]:
    """Continue a batch of prompts; each prompt is run once per completion.

    At each step `generate` samples one token for every row, including rows that have ended.

    Args:
        model: Model in eval mode.
        prompts: Token ids of each prompt, none of them empty.
        max_new_tokens: Largest number of tokens per completion.
        sampling: How tokens are chosen; None for greedy decoding.
        num_completions: Number of completions per prompt.
        stop_checker: Tells which completions have ended.
        pad_token_id: Token id at masked positions.
        synced_ranks: Whether to continue until all ranks have finished, as a sharded model must.
        grammar_mask: Tokens that structured outputs allow; None allows all.

    Returns:
        ``len(prompts) * num_completions`` completions, those of a prompt next to each other.
    """
    ids, mask = left_padded(prompts, pad_token_id)
    recorder = _Recorder(sampling, stop_checker, ids.shape[1])
    config = GenerationConfig(
        do_sample=sampling is not None and not sampling.greedy,
        temperature=1.0,  # the recorder needs the unprocessed logits, so the warpers follow it in `logits_processor`
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_completions,
        eos_token_id=sorted(stop_checker.end_token_ids),
        pad_token_id=pad_token_id,
    )
    generating: Any = model
    with own_generation_config(model):
        out = generating.generate(
            input_ids=ids.to(input_device(model)),
            attention_mask=mask.to(input_device(model)),
            generation_config=config,
            logits_processor=LogitsProcessorList(
                [
                    recorder,
                    *([] if grammar_mask is None else [_Mask(grammar_mask, ids.shape[1])]),
                    *([] if sampling is None else warpers(sampling)),
                    _ReplaceNonFinite(recorder),
                ]
            ),
            stopping_criteria=StoppingCriteriaList([_StopStrings(recorder)]),
            synced_gpus=synced_ranks,
        )
    recorder.check()
    generated = out[:, ids.shape[1] :].tolist()
    return [recorder.completion(row, tokens) for row, tokens in enumerate(generated)]


class _Mask(LogitsProcessor):
    """Restricts the next tokens to those that structured outputs allow."""

    def __init__(self, mask: GrammarMask, prompt_length: int) -> None:
        self._mask, self._prompt_length = mask, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        completions = input_ids[:, self._prompt_length :].tolist()
        return cast(torch.FloatTensor, self._mask.apply(scores.clone(), range(len(completions)), completions))


class _Recorder(LogitsProcessor):
    """Keeps the logits of a step until its tokens are known, and after that only the log-probabilities of the tokens.

    `output_logits=True` would keep ``[steps, b, vocabulary]``: gigabytes for long completions.
    """

    def __init__(self, sampling: Sampling | None, stop_checker: StopChecker, prompt_length: int) -> None:
        self._temperature = None if sampling is None or sampling.greedy else float(sampling.temperature)
        self._greedy = TokenSampler(None)
        self.finite: Tensor | None = None
        """Whether each row of the last step has finite logits only, ``bool [b, 1]``."""
        self._stop_checker = stop_checker
        self._prompt_length = prompt_length
        self._logits: Tensor | None = None
        self._logprobs: list[Tensor] = []  # [b] per step
        self._logprob_rows: list[list[float]] | None = None
        self._stop_lengths: dict[int, int] = {}  # by row: length of a completion that a stop string has ended

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._logits = None if self._temperature is None else scores
        if self._temperature is None:
            self._greedy(scores)  # records whether they are finite
        self.finite = scores.amax(-1, keepdim=True).isfinite()  # [b, 1]
        return scores

    def check(self) -> None:
        """See :meth:`~lightning_ft.rollout.sampling.TokenSampler.check`."""
        self._greedy.check()

    def record_tokens(self, input_ids: Tensor) -> Tensor:
        """Record the tokens of a step and return which rows a stop string has ended, ``bool [b]``."""
        if self._logits is not None and self._temperature is not None:
            self._logprobs.append(token_logprobs(self._logits, input_ids[:, -1], self._temperature))
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self._stop_checker.stop:
            generated = input_ids[:, self._prompt_length :].tolist()
            for row, stopped in enumerate(self._stop_checker.contains_stop_string(generated)):
                if stopped:
                    self._stop_lengths.setdefault(row, len(generated[row]))
            ended[list(self._stop_lengths)] = True
        return ended

    def completion(self, row: int, tokens: list[int]) -> Completion:
        """Return the completion of a row, without the tokens after its end."""
        end_ids = self._stop_checker.end_token_ids
        length = next((position + 1 for position, token in enumerate(tokens) if token in end_ids), len(tokens))
        length = min(length, self._stop_lengths.get(row, length))
        if self._logprobs and self._logprob_rows is None:
            self._logprob_rows = torch.stack(self._logprobs, dim=1).tolist()  # [b, steps]
        logprobs = () if self._logprob_rows is None else tuple(self._logprob_rows[row][:length])
        (ended,) = self._stop_checker([tokens[:length]])
        return Completion(tuple(tokens[:length]), truncated=not ended, logprobs=logprobs)


class _ReplaceNonFinite(LogitsProcessor):
    """Replaces rows with non-finite logits by zeros, for sampling; see `rollout.sampling.replace_nonfinite`."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        assert self._recorder.finite is not None
        return cast(torch.FloatTensor, scores.masked_fill(~self._recorder.finite, 0.0))


class _StopStrings(StoppingCriteria):
    """Ends rows at their stop strings. `generate` calls it once per step, when the tokens are known."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.BoolTensor:
        return cast(torch.BoolTensor, self._recorder.record_tokens(input_ids))
