"""The loss of an optimizer step as the mean over its supervised tokens, for modules and loops that aren't ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ft.distributed import rank_and_world_size, sum_over_ranks
from lightning_ft.errors import ConfigError
from lightning_ft.modules.step_metrics import mean_factor

TokenCount = Callable[[Any], int]
"""Function from a batch to its number of supervised tokens."""


def supervised_tokens(batch: object) -> int:
    """Number of supervised tokens of a batch: labels other than -100, the first of each row excluded.

    The first label of a row isn't a target, since causal language models shift labels by one. For other models there is
    :func:`supervised_labels`.

    Args:
        batch: A mapping with ``labels``, ``[b, s]``, or an object of this package with `num_targets`.

    Raises:
        ConfigError: If it is neither.

    Example:
        >>> supervised_tokens({"labels": torch.tensor([[-100, 5, 6], [7, 8, -100]])})
        3
    """
    if (count := _own_count(batch)) is not None:
        return count
    labels = _labels(batch)
    if labels.ndim < 2:
        raise ConfigError(
            f"The labels of a {type(batch).__name__} have the shape {tuple(labels.shape)}, one per row as for a "
            "classifier, so no token is supervised: pass count=supervised_labels of lightning_ft.modules.token_mean, "
            "or a function of your own from a batch to the number of what its loss is the mean over."
        )
    return int((labels[..., 1:] != -100).sum())


def supervised_labels(batch: object) -> int:
    """Number of labels of a batch other than -100, for a model that doesn't shift them.

    Such models are encoder-decoders, and those with another head than a causal language model's, as classifiers have.

    Args:
        batch: A mapping with ``labels`` of any shape, or an object of this package with `num_targets`.

    Raises:
        ConfigError: If it is neither.

    Example:
        >>> supervised_labels({"labels": torch.tensor([[5, 6, -100], [7, 8, 9]])})
        5
        >>> supervised_labels({"labels": torch.tensor([0, 2])})
        2
    """
    count = _own_count(batch)
    return int((_labels(batch) != -100).sum()) if count is None else count


def check_defined(loss: Tensor, tokens: int) -> None:
    """Refuse the loss of a micro-batch without supervised tokens, unless it is a number, such as 0.

    Args:
        loss: Mean over the supervised tokens of the micro-batch.
        tokens: Their number.

    Raises:
        ConfigError: If the mean over none isn't a number: its gradients would make all weights NaN.
    """
    if not tokens and bool(loss.detach().isnan()):
        raise ConfigError(
            "A micro-batch has no supervised token (all labels are -100), so its mean loss is NaN, and so would all "
            "weights be after the step. Leave out rows whose answer was cut off, or return None from training_step for "
            "such a batch (in a loop of your own, skip it)."
        )


def _own_count(batch: object) -> int | None:
    """The count that a batch of this package has of its own."""
    count = getattr(batch, "num_targets", None)
    return count if isinstance(count, int) else None


def _labels(batch: object) -> Tensor:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        raise ConfigError(
            f"The supervised tokens of a {type(batch).__name__} without labels can't be counted: pass count=, a "
            "function from a batch to their number."
        )
    return labels


class TokenMean:
    """Weighs the micro-batches of an optimizer step by their supervised tokens, in a loop of one's own.

    `TokenMeanAccumulation` does the same in a Trainer.

    Args:
        count: Function from a batch to its number of supervised tokens; :func:`supervised_labels` for a model that
            isn't a causal language model.

    Example:
        The gradient is the mean over three tokens, and not the mean of two means.

        >>> weight = torch.nn.Parameter(torch.ones(()))
        >>> optimizer, mean = torch.optim.SGD([weight], lr=1.0), TokenMean(count=len)
        >>> for batch in ([6.0, 6.0], [3.0]):
        ...     mean.weigh(weight * sum(batch) / len(batch), batch).backward()
        >>> mean.divide(optimizer)
        >>> weight.grad.item()
        5.0
    """

    def __init__(self, count: TokenCount = supervised_tokens) -> None:
        self._count = count
        self._tokens = self._batches = 0

    def count(self, batch: object) -> int:
        """Number of supervised tokens of a micro-batch.

        Args:
            batch: The micro-batch.

        Raises:
            ConfigError: If the function that counts them returns something else than a number of at least 0.
        """
        tokens: Any = self._count(batch)
        whole = tokens.item() if isinstance(tokens, Tensor) and tokens.numel() == 1 else tokens
        number = float(whole) if isinstance(whole, Real) else -1.0
        if not number >= 0 or not number.is_integer():
            raise ConfigError(
                f"count= returned {tokens!r:.80} for a {type(batch).__name__}: expected the number of tokens that its "
                "loss is the mean over, an integer of at least 0."
            )
        return int(number)

    def weigh(self, loss: Tensor, batch: object) -> Tensor:
        """Turn the mean loss of a micro-batch into a sum; call it before each backward pass.

        Args:
            loss: Mean over the supervised tokens of the micro-batch, as transformers' models return it.
            batch: The micro-batch.

        Raises:
            ConfigError: If no token is supervised and the loss, the mean over none, isn't a number, or if they can't
                be counted.
        """
        tokens = self.count(batch)
        check_defined(loss, tokens)
        self.add(tokens)
        return loss * tokens

    def add(self, tokens: int) -> None:
        """Count the supervised tokens of a micro-batch whose loss is a sum already.

        Args:
            tokens: Their number.
        """
        self._tokens += tokens
        self._batches += 1

    def divide(self, optimizer: Optimizer, micro_batches: int = 1) -> None:
        """Divide the gradients by the tokens of the step on all ranks; call it before clipping, on every rank.

        Args:
            optimizer: Optimizer of the weights, or Fabric's wrapper of it.
            micro_batches: What each loss was divided by already, as Lightning does; 1 if it wasn't.

        Raises:
            ConfigError: On all ranks with gradients, if no micro-batch was weighed since the last call, which would
                leave sums undivided.
        """
        every = [p for group in optimizer.param_groups for p in group["params"]]
        parameters = [p for p in every if p.grad is not None]
        device = every[0].device  # of all ranks, also of one without gradients
        counted = sum_over_ranks(torch.tensor([self._tokens, self._batches], dtype=torch.float64), device)
        total, batches = counted.tolist()
        self._tokens = self._batches = 0
        if not batches and any(bool(p.grad.any()) for p in parameters):
            raise ConfigError(
                "TokenMean.divide: there are gradients, but no micro-batch was weighed since the last call. Call "
                "weigh() or add() for each, and with several optimizers use one TokenMean for each of them."
            )
        factor = mean_factor(total, micro_batches=micro_batches, ranks=rank_and_world_size()[1])
        for parameter in parameters:
            parameter.grad.mul_(factor)
