"""How far training moved a model on text that it wasn't trained on: divergence, perplexity and agreement with the base.

The divergence is KL(base || tuned), which weighs each token by what the base would say there, so that it grows with
whatever the tuned model no longer says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_ft.atomic_files import write_json
from lightning_ft.errors import RetentionError
from lightning_ft.evaluation.bootstrap import Interval, Statistic, bootstrap_intervals

BaseKind = Literal["adapter_off", "step_0", "model"]
INTERVALS = ("kl_general", "ppl_ratio", "top1_agreement", "kl_task")
"""The figures that have intervals."""


def kl_divergence(base_logprobs: Tensor, tuned_logprobs: Tensor) -> Tensor:
    """KL(base || tuned) at each place: ``sum_v p_base(v) (log p_base(v) - log p_tuned(v))``, exactly.

    Kullback and Leibler 1951, https://doi.org/10.1214/aoms/1177729694. Where rounding makes it negative it is 0.

    Args:
        base_logprobs: Log-probabilities of every token under the base, nats, ``fp32 [n, v]``.
        tuned_logprobs: Under the tuned model, ``fp32 [n, v]``.

    Returns:
        Nats, ``fp32 [n]``; infinite where the tuned model rules out what the base doesn't.

    Example:
        >>> import torch
        >>> base, tuned = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
        >>> kl_divergence(base, tuned)
        tensor([0.1438, 0.0000])
    """
    return _sum_of_terms(base_logprobs, tuned_logprobs).clamp(min=0.0)


def _sum_of_terms(p: Tensor, q: Tensor) -> Tensor:
    # what the base rules out adds nothing, though its logarithm is infinite
    return torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True)
class TopK:
    """The base's most probable tokens at each place, and the probability of all others together.

    Args:
        ids: The `k` most probable tokens, ``int32 [n, k]``.
        logprobs: Their log-probabilities, nats, ``fp32 [n, k]``.
        tail: Logarithm of the probability of all other tokens, ``fp32 [n]``; minus infinity where there are none.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor


def top_k_and_tail(logprobs: Tensor, k: int) -> TopK:
    """Keep the `k` most probable tokens of each place, all of them where the vocabulary has no more.

    Args:
        logprobs: Log-probabilities of every token, nats, ``fp32 [n, v]``.
        k: How many to keep, at least 1.

    Example:
        >>> import torch
        >>> kept = top_k_and_tail(torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log(), k=2)
        >>> kept.ids.tolist(), kept.tail.exp()
        ([[0, 2]], tensor([0.2000]))
    """
    kept, ids = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    return TopK(ids.to(torch.int32), kept, _log_rest(logprobs, ids))


def _log_rest(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Logarithm of the mass of all but `ids`: summed, since 1 minus the others' mass would round a small one away."""
    return logprobs.scatter(-1, ids, -math.inf).logsumexp(-1)


def kl_lower_bound(base: TopK, tuned_logprobs: Tensor) -> Tensor:
    """KL(base || tuned) over `k` tokens and one bucket for the rest, which is at most the exact one.

    Putting tokens into one bucket is a function of the token, and no function can move two distributions apart (the
    data-processing inequality; Kullback and Leibler 1951, theorem 4.1; Cover and Thomas 2006, section 2.8,
    https://doi.org/10.1002/047174882X). With ``k = v`` it is exact.

    Args:
        base: What was kept of the base at `n` places.
        tuned_logprobs: Log-probabilities of every token under the tuned model, nats, ``fp32 [n, v]``.

    Returns:
        Nats, ``fp32 [n]``.

    Example:
        >>> import torch
        >>> base, tuned = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
        >>> [round(float(kl_lower_bound(top_k_and_tail(base, k), tuned)), 4) for k in (1, 2, 3)]
        [0.2231, 0.2749, 0.2749]
        >>> round(float(kl_divergence(base, tuned)), 4)
        0.2749
    """
    ids = base.ids.long()
    tuned = torch.cat([tuned_logprobs.gather(-1, ids), _log_rest(tuned_logprobs, ids)[:, None]], dim=-1)  # [n, k + 1]
    return _sum_of_terms(torch.cat([base.logprobs, base.tail[:, None]], dim=-1), tuned).clamp(min=0.0)


@dataclass(frozen=True)
class PositionSums:
    """What was measured on each of `n` texts, summed over its places.

    Args:
        tokens: Places: tokens that were predicted.
        kl: Divergence, nats.
        base_nll: Negative log-likelihood of the text under the base, nats.
        tuned_nll: Under the tuned model.
        agreed: Places where both find the same token most probable.

    Raises:
        RetentionError: If there is nothing, or a sum isn't a number.
    """

    tokens: tuple[int, ...]
    kl: tuple[float, ...]
    base_nll: tuple[float, ...]
    tuned_nll: tuple[float, ...]
    agreed: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1:
            raise RetentionError("There is no text, or one without a token to predict: nothing can be measured.")
        for name in ("kl", "base_nll", "tuned_nll"):
            bad = [i for i, value in enumerate(getattr(self, name)) if math.isnan(value)]
            if bad:
                whose = "base" if name == "base_nll" else "tuned model"
                raise RetentionError(
                    f"{name} of text {bad[0]} isn't a number ({len(bad):,} of {len(self.tokens):,} texts): the "
                    f"{whose}'s weights or outputs are NaN. Training has diverged; take an earlier checkpoint."
                )


@dataclass(frozen=True)
class RetentionResult:
    """What a tuned model kept of its base.

    Args:
        kl_general: KL(base || tuned) on general texts, nats a token.
        ppl_ratio: Perplexity of the general texts under the tuned model, divided by that under the base.
        top1_agreement: Share of places where both find the same token most probable.
        kl_task: KL on the answers of task rows; None where no rows were given.
        base: What was compared with: the adapter switched off, what was kept of the model at step 0, or a second model.
        top_k: None where the KL is exact; else how many tokens of the base were kept, and the KL is a lower bound.
        texts: General texts.
        tokens: Tokens predicted in them.
        task_rows: Task rows.
        task_tokens: Tokens predicted in their answers.
        texts_hash: Names the general texts.
        step: Optimizer step it was measured at.
        provenance: What was measured with what, JSON values.
    """

    kl_general: Interval
    ppl_ratio: Interval
    top1_agreement: Interval
    kl_task: Interval | None
    base: BaseKind
    top_k: int | None
    texts: int
    tokens: int
    task_rows: int
    task_tokens: int
    texts_hash: str
    step: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lower_bound(self) -> bool:
        """Whether the divergences are lower bounds."""
        return self.top_k is not None

    @property
    def headline(self) -> str:
        """One sentence, with intervals."""
        kl, ratio, same = self.kl_general, self.ppl_ratio, self.top1_agreement
        sign = "at least " if self.lower_bound else ""
        task = "" if self.kl_task is None else f"; on answers of the task KL {sign}{self.kl_task.value:.4g}"
        return (
            f"On {self.texts:,} general texts ({self.tokens:,} tokens): KL from the base {sign}{kl.value:.4g} nats a "
            f"token ({kl.lo:.4g} to {kl.hi:.4g}), perplexity times {ratio.value:.4g} ({ratio.lo:.4g} to "
            f"{ratio.hi:.4g}), same most probable token at {same.value:.1%} of places{task}."
        )

    def metrics(self) -> dict[str, float]:
        """What is logged, name to number; ``kl_lower_bound`` is 1 where the divergences are lower bounds."""
        figures: dict[str, float] = {}
        for name in INTERVALS:
            interval: Interval | None = getattr(self, name)
            if interval is not None:
                figures |= {name: interval.value, f"{name}_lo": interval.lo, f"{name}_hi": interval.hi}
        return figures | {"kl_lower_bound": float(self.lower_bound), "tokens": float(self.tokens)}

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; infinite numbers as ``"Infinity"``, which JSON doesn't have."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in INTERVALS:
            values[name] = None if values[name] is None else values[name].to_dict()
        return {**values, "provenance": dict(self.provenance), "lower_bound": self.lower_bound}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RetentionResult:
        """Back from :meth:`to_dict`."""
        given = {name: values[name] for name in cls.__dataclass_fields__}
        for name in INTERVALS:
            interval = given[name]
            given[name] = None if interval is None else Interval.from_dict(interval)
        return cls(**given)

    def save(self, folder: str | Path) -> Path:
        """Write ``retention.json`` into a folder, which is made where there is none."""
        path = Path(folder) / "retention.json"
        write_json(path, self.to_dict())
        return path


def retention(
    general: PositionSums,
    task: PositionSums | None = None,
    *,
    base: BaseKind,
    top_k: int | None,
    texts_hash: str,
    step: int | None = None,
    resamples: int = 9999,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> RetentionResult:
    """Figures with intervals, by a bootstrap over texts: tokens of one text aren't independent.

    All are ratios of sums, so that long texts weigh more; the ratio of perplexities is
    ``exp((sum nll_tuned - sum nll_base) / sum tokens)``.

    Args:
        general: Of the general texts.
        task: Of the answers of task rows.
        base: What was compared with.
        top_k: Tokens kept of the base, where `kl` is a lower bound.
        texts_hash: Names the general texts.
        step: Optimizer step it was measured at.
        resamples: Draws of the bootstrap.
        seed: Of the draws.
        provenance: What was measured with what.

    Example:
        >>> sums = PositionSums((10, 30), (1.0, 2.0), (20.0, 60.0), (24.0, 64.0), (9, 30))
        >>> result = retention(sums, base="adapter_off", top_k=None, texts_hash="", resamples=99)
        >>> result.kl_general.value, round(result.ppl_ratio.value, 4), result.top1_agreement.value
        (0.075, 1.2214, 0.975)
    """
    options = {"resamples": resamples, "seed": seed}
    kl: dict[str, Statistic] = {"kl": lambda s: s["kl"] / s["tokens"]}
    # The divergence last: the order of the columns decides the order of texts of one length, and so which are drawn.
    # What is kept of the base bounds the divergence only, and must not move the other intervals.
    columns = sorted(general.__dataclass_fields__, key=lambda name: name == "kl")
    figures = bootstrap_intervals(
        {name: getattr(general, name) for name in columns},
        {
            **kl,
            "ppl_ratio": lambda s: _exp((s["tuned_nll"] - s["base_nll"]) / s["tokens"]),
            "top1_agreement": lambda s: s["agreed"] / s["tokens"],
        },
        **options,  # type: ignore[arg-type]
    )
    of_task = None
    if task is not None:
        of_task = bootstrap_intervals({"kl": task.kl, "tokens": task.tokens}, kl, **options)["kl"]  # type: ignore[arg-type]
    return RetentionResult(
        kl_general=figures["kl"],
        ppl_ratio=figures["ppl_ratio"],
        top1_agreement=figures["top1_agreement"],
        kl_task=of_task,
        base=base,
        top_k=top_k,
        texts=len(general.tokens),
        tokens=sum(general.tokens),
        task_rows=0 if task is None else len(task.tokens),
        task_tokens=0 if task is None else sum(task.tokens),
        texts_hash=texts_hash,
        step=step,
        provenance=provenance or {},
    )


def _exp(exponent: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore"):  # a model that has diverged: infinitely worse
        ratio: np.ndarray[Any, Any] = np.exp(exponent)
    return ratio
