"""The same completions by transformers' own `generate`, with the cache that the architecture asks for."""

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
from lightning_ft.rollout.decode import Ending
from lightning_ft.rollout.protocol import Completion, Sampling
from lightning_ft.rollout.sampling import TokenSampler, token_logprobs, warpers


def generate_plainly(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None,
    num_completions: int,
    ending: Ending,
    pad_token_id: int,
    synced_ranks: bool,
) -> list[Completion]:
    """Continue a batch of prompts; each prompt is run once for each of its completions.

    `generate` draws one token for every row a step, the rows that have ended among them.

    Args:
        model: In eval mode.
        prompts: Token ids, none of them empty.
        max_new_tokens: At most so many for each completion.
        sampling: How tokens are chosen; None for greedy.
        num_completions: Completions of each prompt.
        ending: Says which completions have ended.
        pad_token_id: Stands at masked places.
        synced_ranks: Go on until all ranks have finished, as a sharded model must.

    Returns:
        ``len(prompts) * num_completions`` completions, those of one prompt side by side.
    """
    ids, mask = left_padded(prompts, pad_token_id)
    recorder = _Recorder(sampling, ending, ids.shape[1])
    config = GenerationConfig(
        do_sample=sampling is not None and not sampling.greedy,
        temperature=1.0,  # the recorder must see logits as they are, so the warpers stand behind it and not in here
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_completions,
        eos_token_id=sorted(ending.end_token_ids),
        pad_token_id=pad_token_id,
    )
    generating: Any = model
    with own_generation_config(model):
        out = generating.generate(
            input_ids=ids.to(input_device(model)),
            attention_mask=mask.to(input_device(model)),
            generation_config=config,
            logits_processor=LogitsProcessorList(
                [recorder, *([] if sampling is None else warpers(sampling)), _Drawable(recorder)]
            ),
            stopping_criteria=StoppingCriteriaList([_Stop(recorder)]),
            synced_gpus=synced_ranks,
        )
    recorder.check()
    written = out[:, ids.shape[1] :].tolist()
    return [recorder.completion(row, tokens) for row, tokens in enumerate(written)]


class _Recorder(LogitsProcessor):
    """Keeps the logits of a step until its tokens are known, and from then on only what is wanted of them.

    `output_logits=True` would keep ``[steps, b, vocabulary]``: gigabytes, for a long answer.
    """

    def __init__(self, sampling: Sampling | None, ending: Ending, prompt_length: int) -> None:
        self._temperature = None if sampling is None or sampling.greedy else float(sampling.temperature)
        self._greedy = TokenSampler(None)
        self.finite: Tensor | None = None
        """Which rows of the last step have finite logits, ``bool [b, 1]``."""
        self._ending = ending
        self._prompt_length = prompt_length
        self._logits: Tensor | None = None
        self._logprobs: list[Tensor] = []  # [b] a step
        self._scores: list[list[float]] | None = None
        self._lengths: dict[int, int] = {}  # of the rows that a stop string has ended

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._logits = None if self._temperature is None else scores
        if self._temperature is None:
            self._greedy(scores)  # notes whether they are finite
        self.finite = scores.amax(-1, keepdim=True).isfinite()  # [b, 1]
        return scores

    def check(self) -> None:
        """As :meth:`~lightning_ft.rollout.sampling.TokenSampler.check`."""
        self._greedy.check()

    def chosen(self, input_ids: Tensor) -> Tensor:
        """Take note of the tokens of a step; which rows a stop string has ended, ``bool [b]``."""
        if self._logits is not None and self._temperature is not None:
            self._logprobs.append(token_logprobs(self._logits, input_ids[:, -1], self._temperature))
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self._ending.stop:
            written = input_ids[:, self._prompt_length :].tolist()
            for row, stopped in enumerate(self._ending.stopped(written)):
                if stopped:
                    self._lengths.setdefault(row, len(written[row]))
            ended[list(self._lengths)] = True
        return ended

    def completion(self, row: int, tokens: list[int]) -> Completion:
        """The completion of a row, without what stands behind its end."""
        ends = self._ending.end_token_ids
        length = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
        length = min(length, self._lengths.get(row, length))
        if self._logprobs and self._scores is None:
            self._scores = torch.stack(self._logprobs, dim=1).tolist()  # [b, steps]
        scores = () if self._scores is None else tuple(self._scores[row][:length])
        (ended,) = self._ending([tokens[:length]])
        return Completion(tuple(tokens[:length]), truncated=not ended, logprobs=scores)


class _Drawable(LogitsProcessor):
    """Makes rows of logits that aren't finite ones that can be drawn from, see `lightning_ft.rollout.sampling`."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        assert self._recorder.finite is not None
        return cast(torch.FloatTensor, scores.masked_fill(~self._recorder.finite, 0.0))


class _Stop(StoppingCriteria):
    """Ends rows with their stop strings. It is asked once a step, when the tokens are known."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return cast(torch.BoolTensor, self._recorder.chosen(input_ids))
