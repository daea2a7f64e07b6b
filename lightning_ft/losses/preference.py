"""The registry of preference losses, which compare log-probabilities of chosen and rejected completions.

The formulas are in `pairwise`. A custom loss is a function with the same signature, passed as `DPO(loss=...)`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ft.arguments import did_you_mean
from lightning_ft.errors import ConfigError
from lightning_ft.importing import import_object
from lightning_ft.losses.pairwise import (
    hinge_loss,
    ipo_loss,
    orpo_loss,
    robust_loss,
    sft_loss,
    sigmoid_loss,
    simpo_loss,
)

SETTINGS = ("beta", "label_smoothing", "gamma")
"""Settings that a preference loss may take as keyword arguments."""


class SequenceLogProbs(NamedTuple):
    """Log-probabilities of `p` completions.

    Args:
        logprobs: Log-probabilities under the policy, summed over the tokens of each completion, in nats, ``[p]``.
        ref_logprobs: Log-probabilities under the reference, ``[p]``; None without a reference.
        lengths: Number of tokens of each completion, ``int64 [p]``.
    """

    logprobs: Tensor
    ref_logprobs: Tensor | None
    lengths: Tensor

    @property
    def average(self) -> Tensor:
        """Average log-probability per token under the policy, in nats, ``[p]``; 0 for a completion without tokens."""
        return self.logprobs / self.lengths.clamp(min=1)

    @property
    def logratios(self) -> Tensor:
        """``log (p / p_ref)`` of each completion, in nats, ``[p]``.

        Raises:
            ConfigError: If `ref_logprobs` is None.
        """
        if self.ref_logprobs is None:
            raise ConfigError(
                "A log-ratio needs ref_logprobs, got None. Compute them with the reference model, or choose a "
                "reference-free loss: "
                f"{', '.join(name for name, loss in PREFERENCE_LOSSES.items() if not loss.needs_reference)}."
            )
        return self.logprobs - self.ref_logprobs


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss on pairs of a chosen and a rejected completion.

    Args:
        compute: Function of ``(chosen, rejected)``, the `SequenceLogProbs` of `p` pairs, that returns their losses,
            ``[p]``. The settings `beta`, `label_smoothing` and `gamma` are passed to it by keyword if its signature
            (that of `forward` for an `nn.Module`) names them. A setting that a `functools.partial` binds is kept.
        needs_reference: Whether the loss uses log-probabilities under the reference.
        takes_label_smoothing: Whether the loss uses `label_smoothing`.
        name: Name in messages: a name of the registry, an import path, or any other that no second loss has.

    Raises:
        ConfigError: If `compute` can't be called in this way.

    Example:
        >>> def margin(chosen, rejected, *, beta):
        ...     return (1 - beta * (chosen.average - rejected.average)).relu()
        >>> PreferenceLoss(margin, needs_reference=False, name="margin").needs_reference
        False
    """

    compute: Callable[..., Tensor]
    needs_reference: bool = True
    takes_label_smoothing: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        name = self.name or _import_path(self.compute)
        if not callable(self.compute):
            raise ConfigError(
                f"loss={name!r} is of type {type(self.compute).__name__}: expected a function of (chosen, rejected)."
            )
        try:
            signature = _signature(self.compute)
            signature.bind("chosen", "rejected", **{n: 0.0 for n in SETTINGS if n in signature.parameters})
        except (TypeError, ValueError) as cause:
            raise ConfigError(
                f"loss={name!r} can't be called with (chosen, rejected) and the settings {', '.join(SETTINGS)}: "
                f"{cause}. Let it take the two sides first, and give its other parameters defaults."
            ) from cause

    @functools.cached_property
    def _settings(self) -> frozenset[str]:
        """The settings that are passed to the function."""
        return frozenset(name for name in SETTINGS if _takes(self.compute, name))

    @property
    def hparams_name(self) -> str:
        """Name in `hparams`; only for the registry's own losses is it a name of the registry."""
        entry = PREFERENCE_LOSSES.get(self.name)
        registered = entry is not None and replace(entry, name=self.name) == self
        return self.name if registered or _is_import_path(self.name) else f"custom {self.name}"

    def __call__(self, chosen: SequenceLogProbs, rejected: SequenceLogProbs, **settings: float) -> Tensor:
        """Loss of each pair, ``[p]``.

        Raises:
            ConfigError: If the function doesn't return one float per pair, or returns them without gradient although
                the log-probabilities of both sides have one.
        """
        losses = self.compute(chosen, rejected, **{n: v for n, v in settings.items() if n in self._settings})
        expected = chosen.logprobs.shape
        if not isinstance(losses, Tensor) or losses.shape != expected or not losses.is_floating_point():
            shape = f"{losses.dtype} {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ConfigError(f"Loss {self.name!r} returned {shape}: expected one float per pair, {tuple(expected)}.")
        learns = torch.is_grad_enabled() and chosen.logprobs.requires_grad and rejected.logprobs.requires_grad
        if learns and not losses.requires_grad:
            raise ConfigError(
                f"Loss {self.name!r} returned losses without gradient, so nothing can be learned from it. Compute them "
                "from chosen.logprobs or rejected.logprobs, without detach(), item() or torch.no_grad()."
            )
        return losses


def _signature(compute: Callable[..., Any]) -> inspect.Signature:
    """Signature of a loss: that of `forward` for an `nn.Module`, without the keywords that a `partial` binds."""
    if isinstance(compute, functools.partial):
        signature = inspect.signature(functools.partial(_called(compute.func), *compute.args, **compute.keywords))
        free = [p for p in signature.parameters.values() if p.name not in compute.keywords]
        return signature.replace(parameters=free)
    return inspect.signature(_called(compute))


def _called(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of an `nn.Module`, also of a compiled one, since the `__call__` of modules takes any argument."""
    module = getattr(compute, "_orig_mod", compute)
    return module.forward if isinstance(module, torch.nn.Module) else compute


def _takes(compute: Callable[..., Any], setting: str) -> bool:
    """Whether a loss gets a setting: its signature names it or has `**kwargs`, and no `partial` binds it."""
    if isinstance(compute, functools.partial) and setting in compute.keywords:
        return False
    parameters = _signature(compute).parameters
    return setting in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _sigmoid(chosen: SequenceLogProbs, rejected: SequenceLogProbs, *, beta: float, label_smoothing: float) -> Tensor:
    return sigmoid_loss(chosen.logratios - rejected.logratios, beta=beta, label_smoothing=label_smoothing)


def _robust(chosen: SequenceLogProbs, rejected: SequenceLogProbs, *, beta: float, label_smoothing: float) -> Tensor:
    return robust_loss(chosen.logratios - rejected.logratios, beta=beta, label_smoothing=label_smoothing)


def _hinge(chosen: SequenceLogProbs, rejected: SequenceLogProbs, *, beta: float) -> Tensor:
    return hinge_loss(chosen.logratios - rejected.logratios, beta=beta)


def _ipo(chosen: SequenceLogProbs, rejected: SequenceLogProbs, *, beta: float) -> Tensor:
    averages = [side.logratios / side.lengths.clamp(min=1) for side in (chosen, rejected)]
    return ipo_loss(averages[0] - averages[1], beta=beta)


def _simpo(
    chosen: SequenceLogProbs, rejected: SequenceLogProbs, *, beta: float, gamma: float, label_smoothing: float
) -> Tensor:
    return simpo_loss(chosen.average, rejected.average, beta=beta, gamma=gamma, label_smoothing=label_smoothing)


def _orpo(chosen: SequenceLogProbs, rejected: SequenceLogProbs, *, beta: float) -> Tensor:
    return orpo_loss(chosen.average, rejected.average, beta=beta)


def _sft(chosen: SequenceLogProbs, rejected: SequenceLogProbs) -> Tensor:
    return sft_loss(chosen.average)


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    loss.name: loss
    for loss in (
        PreferenceLoss(_sigmoid, takes_label_smoothing=True, name="sigmoid"),
        PreferenceLoss(_ipo, name="ipo"),
        PreferenceLoss(_hinge, name="hinge"),
        PreferenceLoss(_robust, takes_label_smoothing=True, name="robust"),
        PreferenceLoss(_simpo, needs_reference=False, takes_label_smoothing=True, name="simpo"),
        PreferenceLoss(_orpo, needs_reference=False, name="orpo"),
        PreferenceLoss(_sft, needs_reference=False, name="sft"),
    )
}
"""Preference losses by name. A loss that is added here can be used by its name everywhere."""

# Not `Callable[..., Tensor]`: jsonargparse would read a mapping of losses as the arguments of that class.
LossLike = str | PreferenceLoss | Callable[..., Any]
"""A preference loss as a name, an import path, a function or a `PreferenceLoss`."""
WeightedLike = dict[str, float] | LossLike | Mapping[LossLike, float]
"""A loss, or several with their weights. (Names come first, so that jsonargparse can write them to a file.)"""

WeightedLosses = Sequence[tuple[PreferenceLoss, float]]


def resolve_preference_losses(loss: WeightedLike) -> list[tuple[PreferenceLoss, float]]:
    """Preference losses and their weights, from the value of an argument `loss`.

    Args:
        loss: A name in `PREFERENCE_LOSSES`, the import path of a function, a function, a `PreferenceLoss`, or a mapping
            of any of these to weights. A function counts as one that needs the reference, and as one that takes label
            smoothing if its signature names `label_smoothing`.

    Raises:
        ConfigError: If a name is unknown, a value has another type, a function has a parameter that can't be filled,
            the mapping is empty, two losses have the same name, a weight isn't a finite number of at least 0, or all
            weights are 0.

    Example:
        >>> [(loss.name, weight) for loss, weight in resolve_preference_losses({"sigmoid": 0.8, "sft": 0.2})]
        [('sigmoid', 0.8), ('sft', 0.2)]
    """
    weights = list(loss.items()) if isinstance(loss, Mapping) else [(loss, 1.0)]
    if not weights:
        raise ConfigError(f"`loss` is empty: expected at least one of {', '.join(PREFERENCE_LOSSES)}.")
    losses = [(_resolve(_checked_type(one)), _weight(one, weight)) for one, weight in weights]
    names = [one.name for one, _ in losses]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"Two losses are named {repeated[0]!r}, and `hparams` would keep one of them only. Give each a name of its "
            "own: PreferenceLoss(function, name=...)."
        )
    if not any(weight for _, weight in losses):
        raise ConfigError(
            f"The weights of {', '.join(names)} are all 0, so nothing would be learned. Give at least one loss a "
            "weight above 0."
        )
    return losses


def _weighted(losses: WeightedLosses | WeightedLike) -> WeightedLosses:
    resolved = isinstance(losses, (list, tuple)) and losses and all(isinstance(item, tuple) for item in losses)
    return losses if resolved else resolve_preference_losses(losses)  # type: ignore[arg-type, return-value]


def _checked_type(loss: object) -> LossLike:
    if isinstance(loss, (str, PreferenceLoss)) or callable(loss):
        return loss  # type: ignore[return-value]
    raise ConfigError(f"loss={loss!r}: expected a name, a function, or a dict of names with their weights.")


def _resolve(loss: LossLike) -> PreferenceLoss:
    if isinstance(loss, str) and loss in PREFERENCE_LOSSES:
        return replace(PREFERENCE_LOSSES[loss], name=loss)
    if isinstance(loss, str):
        if not _is_import_path(loss):
            hint = did_you_mean(loss, PREFERENCE_LOSSES)
            raise ConfigError(
                f"loss={loss!r}: expected one of {', '.join(PREFERENCE_LOSSES)}, or an import path.{hint}"
            )
        imported = import_object(loss, argument="loss", error=ConfigError)
        if not isinstance(imported, PreferenceLoss):
            return _of_function(imported, loss)
        loss = imported
    if isinstance(loss, PreferenceLoss):
        return loss if loss.name else replace(loss, name=_import_path(loss.compute))
    return _of_function(loss, _import_path(loss))


def _of_function(compute: Callable[..., Any], name: str) -> PreferenceLoss:
    loss = PreferenceLoss(compute, name=name)
    return replace(loss, takes_label_smoothing="label_smoothing" in _signature(compute).parameters)


def _is_import_path(name: str) -> bool:
    return "." in name or ":" in name


def _import_path(function: object) -> str:
    if isinstance(function, functools.partial):
        return f"partial({_import_path(function.func)})"
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"


def _weight(loss: object, weight: object) -> float:
    if isinstance(weight, (int, float)) and 0 <= weight < math.inf:
        return float(weight)
    raise ConfigError(f"Weight {weight!r} of loss {loss!r}: expected a finite number of at least 0.")


def preference_loss(
    loss: LossLike,
    chosen: SequenceLogProbs,
    rejected: SequenceLogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
) -> Tensor:
    """Loss of each pair.

    Each loss equals TRL's with the same arguments, with two exceptions. TRL's ``sigmoid`` ignores `label_smoothing`.
    The NLL in TRL's ``sft`` and ORPO is a mean over all tokens of a micro-batch (for ORPO including the prompts), which
    depends on how a step is divided into micro-batches. Here it is a mean over the tokens of each chosen completion.

    Args:
        loss: A name in `PREFERENCE_LOSSES`, or any other value that `resolve_preference_losses` takes.
        chosen: Log-probabilities of the chosen completions, ``[p]``.
        rejected: Log-probabilities of the rejected completions, ``[p]``.
        beta: Strength of the KL constraint; scale of the reward in SimPO (2 to 10 in its paper), lambda in ORPO.
        label_smoothing: Share of pairs whose label is wrong (``sigmoid``, ``robust``, ``simpo``).
        gamma: Margin of the reward in SimPO.

    Returns:
        ``[p]``.

    Raises:
        ConfigError: If the loss is unknown, log-probabilities under the reference are missing, `beta` isn't above 0, or
            `label_smoothing` is outside ``[0, 0.5)`` or not used by the loss.

    Example:
        >>> import torch
        >>> length = torch.tensor([4])
        >>> chosen = SequenceLogProbs(torch.tensor([-4.0]), torch.tensor([-6.0]), length)
        >>> rejected = SequenceLogProbs(torch.tensor([-9.0]), torch.tensor([-7.0]), length)
        >>> preference_loss("sigmoid", chosen, rejected)
        tensor([0.5130])
        >>> preference_loss("simpo", chosen, rejected, beta=2.0)
        tensor([0.1269])
    """
    return weighted_preference_loss(loss, chosen, rejected, beta=beta, label_smoothing=label_smoothing, gamma=gamma)


def weighted_preference_loss(
    losses: WeightedLosses | WeightedLike,
    chosen: SequenceLogProbs,
    rejected: SequenceLogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
) -> Tensor:
    """Weighted sum of several losses, such as ``sigmoid`` and ``sft`` in MPO (https://arxiv.org/abs/2411.10442).

    Args:
        losses: Losses and weights from `resolve_preference_losses`, or a value that it takes.
        chosen: Log-probabilities of the chosen completions, ``[p]``.
        rejected: Log-probabilities of the rejected completions, ``[p]``.
        beta: Strength of the KL constraint, for all losses; see :func:`preference_loss`.
        label_smoothing: Share of pairs whose label is wrong, for the losses that use it.
        gamma: Margin of the reward in SimPO.

    Returns:
        ``[p]``.

    Raises:
        ConfigError: As in :func:`preference_loss`.

    Example:
        >>> import torch
        >>> one = SequenceLogProbs(torch.tensor([-4.0]), torch.tensor([-4.0]), torch.tensor([4]))
        >>> weighted_preference_loss({"hinge": 1.0, "sft": 0.5}, one, one)
        tensor([1.5000])
    """
    weighted = _weighted(losses)
    check_preference_losses(weighted, beta=beta, label_smoothing=label_smoothing)
    terms = [
        weight * loss(chosen, rejected, beta=beta, label_smoothing=label_smoothing, gamma=gamma)
        for loss, weight in weighted
    ]
    return sum(terms[1:], start=terms[0])


def implicit_rewards(logprobs: SequenceLogProbs, *, beta: float = 0.1) -> Tensor:
    """Implicit reward of a policy: ``beta * log (p / p_ref)``, equation 5 of https://arxiv.org/abs/2305.18290.

    Args:
        logprobs: Log-probabilities of the completions, ``[p]``. Without a reference the result is the reward of SimPO:
            `beta` times the average log-probability per token.
        beta: Strength of the KL constraint.

    Returns:
        ``[p]``, with gradient.

    Example:
        >>> import torch
        >>> implicit_rewards(SequenceLogProbs(torch.tensor([-4.0]), torch.tensor([-6.0]), torch.tensor([4])))
        tensor([0.2000])
    """
    return beta * (logprobs.average if logprobs.ref_logprobs is None else logprobs.logratios)


def check_preference_losses(
    losses: WeightedLosses | WeightedLike, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> None:
    """Check the settings of :func:`weighted_preference_loss` before any log-probabilities are computed.

    Args:
        losses: Losses and weights from `resolve_preference_losses`, or a value that it takes.
        beta: Strength of the KL constraint.
        label_smoothing: Share of pairs whose label is wrong.

    Raises:
        ConfigError: If a number is out of its range, or no loss uses `label_smoothing`.
    """
    weighted = _weighted(losses)
    if not 0 < beta < math.inf:
        raise ConfigError(f"beta={beta!r}: expected a number above 0.")
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing={label_smoothing!r}: expected a number from 0 to below 0.5.")
    if label_smoothing and not any(loss.takes_label_smoothing for loss, _ in weighted):
        smoothed = ", ".join(name for name, loss in PREFERENCE_LOSSES.items() if loss.takes_label_smoothing)
        raise ConfigError(
            f"label_smoothing={label_smoothing!r} has no meaning for {', '.join(loss.name for loss, _ in weighted)}. "
            f"Set it to 0, or choose a loss that uses it: {smoothed}."
        )
