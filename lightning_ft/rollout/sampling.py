"""The next token from logits, and how probable it was."""

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
    """Transformers' own logits processors for a way of sampling, in the order of `generate`; none for greedy.

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
        logits: As the model gave them, ``fp32 [b, vocabulary]``.
        tokens: One for each row, ``int64 [b]``.
        temperature: Above 0.

    Returns:
        Nats, ``fp32 [b]``.

    Example:
        >>> token_logprobs(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), temperature=0.5).exp()
        tensor([0.5000])
    """
    scaled = logits if temperature == 1 else logits / temperature
    return scaled.gather(-1, tokens[:, None])[:, 0] - scaled.logsumexp(-1)


_BLOCK = 256  # tokens that are drawn from at a time


def draw(probabilities: Tensor) -> Tensor:
    """One token of each row, from the global generator of their device.

    On a CPU a block of tokens first and then one of it, each by the inverse of the distribution function in float64:
    `torch.multinomial` draws a number for each token of the vocabulary there, which took a tenth of a rollout's time.

    Args:
        probabilities: ``fp32 [b, vocabulary]``; rows sum to 1.

    Returns:
        ``int64 [b]``, never one of probability 0.

    Example:
        >>> draw(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])).tolist()
        [1, 2]
    """
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, num_samples=1)[:, 0]
    rows, tokens = probabilities.shape
    blocks = torch.nn.functional.pad(probabilities, (0, -tokens % _BLOCK)).view(rows, -1, _BLOCK)
    block = _inverse(blocks.sum(-1, dtype=torch.float64))
    return block * _BLOCK + _inverse(blocks[torch.arange(rows), block].double())


def _inverse(weights: Tensor) -> Tensor:
    """One place of each row with the chance of its weight, ``int64 [b]``."""
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    found = torch.searchsorted(sums, torch.rand_like(total) * total, right=True)
    last = torch.searchsorted(sums, total)  # the last place of any weight, should rounding reach the total
    return torch.minimum(found, last)[:, 0]


class TokenSampler:
    """Takes the next token of each row.

    Sampling draws once a call, from the global generator of the logits' device: whoever restores that generator's state
    and asks again gets the same tokens. From logits that aren't finite any token is drawn, with a log-probability that
    isn't finite either; of greedy tokens :meth:`check` tells.

    Args:
        sampling: How; None for greedy.

    Example:
        >>> TokenSampler(None)(torch.tensor([[0.0, 2.0], [3.0, 1.0]]))
        (tensor([1, 0]), None)
    """

    def __init__(self, sampling: Sampling | None) -> None:
        self._temperature = None if sampling is None or sampling.greedy else float(sampling.temperature)
        self._warpers = None if sampling is None else warpers(sampling)
        self._highest: Tensor | None = None

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose.

        Args:
            logits: ``fp32 [b, vocabulary]``.

        Returns:
            Tokens, ``int64 [b]``, and their log-probabilities, ``fp32 [b]``, or None where they were not drawn.
        """
        if self._temperature is None or self._warpers is None:
            highest, tokens = logits.max(-1)  # NaN where any logit of a row is
            self._highest = highest.sum() if self._highest is None else self._highest + highest.sum()
            return tokens, None
        no_ids: Any = logits.new_empty(0)  # none of these warpers looks at the tokens so far
        warped = self._warpers(no_ids, logits)
        tokens = draw(drawable(warped.softmax(-1), logits))  # [b]
        return tokens, token_logprobs(logits, tokens, self._temperature)

    def check(self) -> None:
        """Refuse greedy tokens that were chosen from logits that aren't finite.

        Raises:
            NonFiniteError: If any were.
        """
        if self._highest is not None and not bool(self._highest.isfinite()):
            raise NonFiniteError(
                "The model's logits weren't finite (NaN or infinite), so its answers mean nothing: load it in float32 "
                "or bfloat16, or take an earlier checkpoint."
            )


def drawable(probabilities: Tensor, logits: Tensor) -> Tensor:
    """Probabilities with rows that can be drawn from, in place: there is no next token where a logit isn't finite.

    Such a draw is an index out of bounds, and on CUDA an assertion that ends the process. Which rows they were is told
    by their log-probabilities.

    Args:
        probabilities: Probabilities of the next tokens, ``fp32 [b, vocabulary]``.
        logits: What they were made of, ``fp32 [b, vocabulary]``.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, torch.nan]])
        >>> drawable(logits.softmax(-1), logits)
        tensor([[0.5000, 0.5000],
                [1.0000, 1.0000]])
    """
    bad = ~logits.amax(-1, keepdim=True).isfinite()  # NaN where any logit of a row is
    if bad.device.type == "cpu" and not bool(bad.any()):
        return probabilities
    return probabilities.masked_fill_(bad, 1.0)
