"""Samples the next token from logits, with its log-probability."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_ft.errors import NonFiniteError
from lightning_ft.rollout.protocol import Sampling


def warpers(sampling: Sampling) -> LogitsProcessorList:
    """Return transformers' logits processors for sampling options, in the order of `generate`; none for greedy.

    Example:
        >>> [type(warper).__name__ for warper in warpers(Sampling(temperature=0.5, min_p=0.1, top_p=0.9))]
        ['TemperatureLogitsWarper', 'TopPLogitsWarper', 'MinPLogitsWarper']
    """
    chosen = LogitsProcessorList()
    if sampling.greedy:
        return chosen
    if sampling.temperature != 1:
        chosen.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        chosen.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chosen.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        chosen.append(MinPLogitsWarper(sampling.min_p))
    return chosen


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of tokens under ``softmax(logits / temperature)``, over the whole vocabulary.

    Args:
        logits: Unprocessed logits of the model, ``fp32 [b, vocabulary]``.
        tokens: Token of each row, ``int64 [b]``.
        temperature: Positive divisor of the logits.

    Returns:
        Log-probabilities in nats, ``fp32 [b]``.

    Example:
        >>> token_logprobs(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), temperature=0.5).exp()
        tensor([0.5000])
    """
    scaled = logits if temperature == 1 else logits / temperature
    return scaled.gather(-1, tokens[:, None])[:, 0] - scaled.logsumexp(-1)


_BLOCK = 256  # tokens per block of the two-stage draw on CPUs


def draw(probabilities: Tensor) -> Tensor:
    """Draw one token per row, from the global generator of the device.

    On a CPU it draws a block of tokens and then a token of the block, each by inverting the cumulative distribution in
    float64: `torch.multinomial` draws a random number for every token of the vocabulary there, which took a tenth of a
    rollout's time.

    Args:
        probabilities: Probabilities of the next tokens, ``fp32 [b, vocabulary]``; rows sum to 1.

    Returns:
        Tokens, ``int64 [b]``, none of them of probability 0.

    Example:
        >>> draw(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])).tolist()
        [1, 2]
    """
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, num_samples=1)[:, 0]
    rows, tokens = probabilities.shape
    blocks = torch.nn.functional.pad(probabilities, (0, -tokens % _BLOCK)).view(rows, -1, _BLOCK)
    block = _draw_index(blocks.sum(-1, dtype=torch.float64))
    return block * _BLOCK + _draw_index(blocks[torch.arange(rows), block].double())


def _draw_index(weights: Tensor) -> Tensor:
    """Draw one index per row with probability proportional to its weight, ``int64 [b]``."""
    sums = weights.cumsum(-1)
    total = sums[:, -1:].contiguous()  # searchsorted warns otherwise
    found = torch.searchsorted(sums, torch.rand_like(total) * total, right=True)
    last = torch.searchsorted(sums, total)  # last index with a positive weight, in case rounding reaches the total
    return torch.minimum(found, last)[:, 0]


class TokenSampler:
    """Chooses the next token of each row.

    Sampling draws once per call, from the global generator of the logits' device: with the same generator state it
    draws the same tokens. From logits that aren't finite any token may be drawn, and its log-probability isn't finite
    either; for greedy tokens, :meth:`check` raises.

    Args:
        sampling: How tokens are chosen; None for greedy decoding.

    Example:
        >>> TokenSampler(None)(torch.tensor([[0.0, 2.0], [3.0, 1.0]]))
        (tensor([1, 0]), None)
    """

    def __init__(self, sampling: Sampling | None) -> None:
        self._temperature = None if sampling is None or sampling.greedy else float(sampling.temperature)
        self._warpers = None if sampling is None else warpers(sampling)
        self._highest: Tensor | None = None

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose a token per row.

        Args:
            logits: Unprocessed logits of the model, ``fp32 [b, vocabulary]``.

        Returns:
            Tokens, ``int64 [b]``, and their log-probabilities in nats, ``fp32 [b]``; None for greedy tokens.
        """
        if self._temperature is None or self._warpers is None:
            highest, tokens = logits.max(-1)  # NaN where any logit of a row is
            self._highest = highest.sum() if self._highest is None else self._highest + highest.sum()
            return tokens, None
        no_ids: Any = logits.new_empty(0)  # none of these warpers reads the tokens so far
        warped = self._warpers(no_ids, logits)
        tokens = draw(replace_nonfinite(warped.softmax(-1), logits))  # [b]
        return tokens, token_logprobs(logits, tokens, self._temperature)

    def check(self) -> None:
        """Check that greedy tokens were chosen from finite logits.

        Raises:
            NonFiniteError: If any logit was NaN or infinite.
        """
        refuse_nonfinite_logits(self._highest is None or bool(self._highest.isfinite()))


def refuse_nonfinite_logits(finite: bool) -> None:
    """Refuse completions whose greedy tokens were chosen from logits that aren't finite.

    Args:
        finite: Whether all logits were finite.

    Raises:
        NonFiniteError: If any weren't.
    """
    if not finite:
        raise NonFiniteError(
            "The model's logits weren't finite (NaN or infinite), so its completions are meaningless: load it in "
            "float32 or bfloat16, or take an earlier checkpoint."
        )


def replace_nonfinite(probabilities: Tensor, logits: Tensor) -> Tensor:
    """Replace rows of probabilities, in place, where a logit isn't finite, so that every row can be drawn from.

    A draw from NaNs returns an index out of bounds, and on CUDA an assertion ends the process. The log-probabilities of
    such rows still aren't finite, which tells them from the others.

    Args:
        probabilities: Probabilities of the next tokens, ``fp32 [b, vocabulary]``.
        logits: Logits that they were computed from, ``fp32 [b, vocabulary]``.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, torch.nan]])
        >>> replace_nonfinite(logits.softmax(-1), logits)
        tensor([[0.5000, 0.5000],
                [1.0000, 1.0000]])
    """
    bad = ~logits.amax(-1, keepdim=True).isfinite()  # NaN where any logit of a row is
    if bad.device.type == "cpu" and not bool(bad.any()):
        return probabilities
    return probabilities.masked_fill_(bad, 1.0)
