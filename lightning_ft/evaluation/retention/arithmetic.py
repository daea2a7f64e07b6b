"""How far training moved a model on text that it wasn't trained on: divergence, perplexity and agreement with the base.

The divergence is KL(base || tuned), which weights each token by its probability under the base, so that it grows with
whatever the tuned model no longer predicts.
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
from lightning_ft.document.numbers import format_number
from lightning_ft.errors import RetentionError
from lightning_ft.evaluation.bootstrap import (
    Array,
    Interval,
    Statistic,
    bootstrap_intervals,
    format_interval,
    format_range,
)
from lightning_ft.evaluation.retention.choices import ALL, ChoiceResult

BaseType = Literal["adapter_off", "step_0", "model"]
"""Base that a tuned model is compared with, see `RetentionResult.base`."""
INTERVALS = ("kl_general", "ppl_ratio", "top1_agreement", "kl_task")
"""Statistics with intervals."""


def kl_divergence(base_logprobs: Tensor, tuned_logprobs: Tensor) -> Tensor:
    """Compute KL(base || tuned) at each position: ``sum_v p_base(v) (log p_base(v) - log p_tuned(v))``, exactly.

    Kullback and Leibler 1951, https://doi.org/10.1214/aoms/1177729694. Negative values, due to rounding, become 0.

    Args:
        base_logprobs: Log-probabilities of the vocabulary under the base, in nats, ``fp32 [n, v]``.
        tuned_logprobs: Log-probabilities of the vocabulary under the tuned model, in nats, ``fp32 [n, v]``.

    Returns:
        Divergence in nats, ``fp32 [n]``; infinite where a token has probability 0 under the tuned model alone.

    Example:
        >>> import torch
        >>> base, tuned = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
        >>> kl_divergence(base, tuned)
        tensor([0.1438, 0.0000])
    """
    return _sum_of_terms(base_logprobs, tuned_logprobs).clamp(min=0.0)


def _sum_of_terms(p: Tensor, q: Tensor) -> Tensor:
    # tokens of probability 0 under p add nothing, though their logarithm is infinite
    return torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True)
class TopK:
    """The base's most probable tokens at each position, and the total probability of the others.

    Args:
        ids: Ids of the `k` most probable tokens, ``int32 [n, k]``.
        logprobs: Log-probabilities of these tokens, in nats, ``fp32 [n, k]``.
        tail: Logarithm of the total probability of the other tokens, ``fp32 [n]``; minus infinity if there are none.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor


def top_k_and_tail(logprobs: Tensor, k: int) -> TopK:
    """Keep the `k` most probable tokens at each position, or all of them if the vocabulary is smaller.

    Args:
        logprobs: Log-probabilities of the vocabulary, in nats, ``fp32 [n, v]``.
        k: Number of tokens to keep, at least 1.

    Example:
        >>> import torch
        >>> kept = top_k_and_tail(torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log(), k=2)
        >>> kept.ids.tolist(), kept.tail.exp()
        ([[0, 2]], tensor([0.2000]))
    """
    kept, ids = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    return TopK(ids.to(torch.int32), kept, _log_tail(logprobs, ids))


def _log_tail(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Logarithm of the other tokens' probability, summed up, since 1 minus that of `ids` would round it to 0."""
    return logprobs.scatter(-1, ids, -math.inf).logsumexp(-1)


def kl_lower_bound(base: TopK, tuned_logprobs: Tensor) -> Tensor:
    """Compute KL(base || tuned) over `k` tokens and one bucket for the rest, a lower bound of the exact divergence.

    Merging tokens into a bucket is a function of the token, and no function can increase the divergence (the
    data-processing inequality; Kullback and Leibler 1951, theorem 4.1; Cover and Thomas 2006, section 2.8,
    https://doi.org/10.1002/047174882X). With ``k = v`` it is exact.

    Args:
        base: Most probable tokens of the base at `n` positions.
        tuned_logprobs: Log-probabilities of the vocabulary under the tuned model, in nats, ``fp32 [n, v]``.

    Returns:
        Lower bound of the divergence in nats, ``fp32 [n]``.

    Example:
        >>> import torch
        >>> base, tuned = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
        >>> [round(float(kl_lower_bound(top_k_and_tail(base, k), tuned)), 4) for k in (1, 2, 3)]
        [0.2231, 0.2749, 0.2749]
        >>> round(float(kl_divergence(base, tuned)), 4)
        0.2749
    """
    ids = base.ids.long()
    tuned = torch.cat([tuned_logprobs.gather(-1, ids), _log_tail(tuned_logprobs, ids)[:, None]], dim=-1)  # [n, k + 1]
    return _sum_of_terms(torch.cat([base.logprobs, base.tail[:, None]], dim=-1), tuned).clamp(min=0.0)


@dataclass(frozen=True)
class PositionSums:
    """Measurements of each of `n` texts, summed over its positions.

    Args:
        tokens: Number of predicted tokens of each text.
        kl: Divergence of each text, in nats.
        base_nll: Negative log-likelihood of each text under the base, in nats.
        tuned_nll: Negative log-likelihood of each text under the tuned model, in nats.
        agreed: Number of positions of each text at which both models have the same most probable token.

    Raises:
        RetentionError: If there is no text, a text has no predicted token, or a sum isn't a number.
    """

    tokens: tuple[int, ...]
    kl: tuple[float, ...]
    base_nll: tuple[float, ...]
    tuned_nll: tuple[float, ...]
    agreed: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1:
            raise RetentionError(
                "There is no text, or one without a token to predict, so nothing can be measured. Remove empty texts."
            )
        for name in ("kl", "base_nll", "tuned_nll"):
            bad = [i for i, value in enumerate(getattr(self, name)) if math.isnan(value)]
            if bad:
                model = "base" if name == "base_nll" else "tuned model"
                raise RetentionError(
                    f"{name} of text {bad[0]} isn't a number ({len(bad):,} of {len(self.tokens):,} texts): the "
                    f"{model}'s weights or outputs are NaN. Training has diverged; use an earlier checkpoint."
                )


@dataclass(frozen=True)
class RetentionResult:
    """Comparison of a tuned model with its base.

    Args:
        kl_general: KL(base || tuned) on general texts, in nats per token.
        ppl_ratio: Perplexity of the general texts under the tuned model, divided by that under the base.
        top1_agreement: Share of positions at which both models have the same most probable token.
        kl_task: KL(base || tuned) on the answers of task rows, in nats per token; None without task rows.
        base: Base of the comparison: ``"adapter_off"``, the model with its adapter disabled; ``"step_0"``, stored
            log-probabilities of the model at step 0; or ``"model"``, a second model.
        top_k: Number of tokens stored per position, in which case the KL is a lower bound; None if the KL is exact.
        texts: Number of general texts.
        tokens: Number of predicted tokens in the general texts.
        task_rows: Number of task rows.
        task_tokens: Number of predicted tokens in the answers of task rows.
        texts_hash: Hash of the general texts.
        step: Optimizer step of the measurement; None outside training.
        choices: Answers to multiple-choice questions, by set and for ``"all"``; empty if there were none.
        provenance: Models, texts, settings and versions of the measurement, as JSON values.
        date: Day of the measurement, such as ``2026-01-31``; empty if not recorded. Ignored in comparisons.
        weights: Hash of the tuned model's weights, see `lightning_ft.models.card_facts.weights_hash`; None if not
            recorded. Ignored in comparisons.
    """

    kl_general: Interval
    ppl_ratio: Interval
    top1_agreement: Interval
    kl_task: Interval | None
    base: BaseType
    top_k: int | None
    texts: int
    tokens: int
    task_rows: int
    task_tokens: int
    texts_hash: str
    step: int | None = None
    choices: Mapping[str, ChoiceResult] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)
    date: str = field(default="", compare=False)
    weights: str | None = field(default=None, compare=False)

    @property
    def lower_bound(self) -> bool:
        """Whether the divergences are lower bounds."""
        return self.top_k is not None

    @property
    def headline(self) -> str:
        """Summary in one sentence, with intervals."""
        kl, ratio, same = self.kl_general, self.ppl_ratio, self.top1_agreement
        sign = "at least " if self.lower_bound else ""
        task = "" if self.kl_task is None else f"; on task answers KL {sign}{_digits(self.kl_task.value)}"
        if ALL in self.choices:
            answered = self.choices[ALL]
            task += (
                f"; of {answered.questions:,} multiple-choice questions {answered.tuned.value:.1%} correct, by the "
                f"base {answered.base.value:.1%}"
            )
        return (
            f"On {self.texts:,} general texts ({self.tokens:,} tokens): KL from the base {sign}{_digits(kl.value)} "
            f"nats per token ({format_range(kl, _digits)}), perplexity times {format_interval(ratio, _digits)}, same "
            f"most probable token at {same.value:.1%} of positions{task}."
        )

    def metrics(self) -> dict[str, float]:
        """Return the metrics to log by name; ``kl_lower_bound`` is 1 if the divergences are lower bounds."""
        metrics: dict[str, float] = {}
        for name in INTERVALS:
            interval: Interval | None = getattr(self, name)
            if interval is not None:
                metrics |= {name: interval.value, f"{name}_lo": interval.lo, f"{name}_hi": interval.hi}
        if ALL in self.choices:
            for name in ("base", "tuned", "lost"):
                interval = getattr(self.choices[ALL], name)
                metrics |= {
                    f"choices_{name}": interval.value,
                    f"choices_{name}_lo": interval.lo,
                    f"choices_{name}_hi": interval.hi,
                }
        return metrics | {"kl_lower_bound": float(self.lower_bound), "tokens": float(self.tokens)}

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types, with infinite numbers, which JSON lacks, as ``"Infinity"``."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in INTERVALS:
            values[name] = None if values[name] is None else values[name].to_dict()
        choices = {name: result.to_dict() for name, result in self.choices.items()}
        return {**values, "choices": choices, "provenance": dict(self.provenance), "lower_bound": self.lower_bound}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RetentionResult:
        """Restore a result from :meth:`to_dict`."""
        since = {"date": "", "weights": None}  # older files lack both
        known = {name: {**since, **values}[name] for name in cls.__dataclass_fields__}
        for name in INTERVALS:
            interval = known[name]
            known[name] = None if interval is None else Interval.from_dict(interval)
        known["choices"] = {name: ChoiceResult.from_dict(result) for name, result in known["choices"].items()}
        return cls(**known)

    def save(self, folder: str | Path) -> Path:
        """Write ``retention.json`` into a folder, which is created if it doesn't exist, and return its path."""
        path = Path(folder) / "retention.json"
        write_json(path, self.to_dict())
        return path


def retention(
    general: PositionSums,
    task: PositionSums | None = None,
    *,
    base: BaseType,
    top_k: int | None,
    texts_hash: str,
    step: int | None = None,
    choices: Mapping[str, ChoiceResult] | None = None,
    resamples: int = 9999,
    seed: int = 0,
    provenance: Mapping[str, object] | None = None,
) -> RetentionResult:
    """Compute the statistics with intervals, by a bootstrap over texts, since tokens of one text aren't independent.

    All are ratios of sums, so that long texts weigh more; the ratio of perplexities is
    ``exp((sum nll_tuned - sum nll_base) / sum tokens)``.

    Args:
        general: Sums over the general texts.
        task: Sums over the answers of task rows; None without task rows.
        base: Base of the comparison, see :class:`RetentionResult`.
        top_k: Number of tokens stored per position, if `kl` is a lower bound.
        texts_hash: Hash of the general texts.
        step: Optimizer step of the measurement.
        choices: Answers to multiple-choice questions, by set.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
        provenance: Models, texts, settings and versions of the measurement, as JSON values.

    Example:
        >>> sums = PositionSums((10, 30), (1.0, 2.0), (20.0, 60.0), (24.0, 64.0), (9, 30))
        >>> result = retention(sums, base="adapter_off", top_k=None, texts_hash="", resamples=99)
        >>> result.kl_general.value, round(result.ppl_ratio.value, 4), result.top1_agreement.value
        (0.075, 1.2214, 0.975)
    """
    options = {"resamples": resamples, "seed": seed}
    kl: dict[str, Statistic] = {"kl": lambda s: s["kl"] / s["tokens"]}
    # The divergence is the last column: columns determine the order of texts of one length, and so which are drawn.
    # The number of stored tokens affects the divergence only, and must not change the other intervals.
    columns = sorted(general.__dataclass_fields__, key=lambda name: name == "kl")
    intervals = bootstrap_intervals(
        {name: getattr(general, name) for name in columns},
        {
            **kl,
            "ppl_ratio": lambda s: _exp((s["tuned_nll"] - s["base_nll"]) / s["tokens"]),
            "top1_agreement": lambda s: s["agreed"] / s["tokens"],
        },
        **options,  # type: ignore[arg-type]
    )
    kl_task = None
    if task is not None:
        kl_task = bootstrap_intervals({"kl": task.kl, "tokens": task.tokens}, kl, **options)["kl"]  # type: ignore[arg-type]
    return RetentionResult(
        kl_general=intervals["kl"],
        ppl_ratio=intervals["ppl_ratio"],
        top1_agreement=intervals["top1_agreement"],
        kl_task=kl_task,
        base=base,
        top_k=top_k,
        texts=len(general.tokens),
        tokens=sum(general.tokens),
        task_rows=0 if task is None else len(task.tokens),
        task_tokens=0 if task is None else sum(task.tokens),
        texts_hash=texts_hash,
        step=step,
        choices=choices or {},
        provenance=provenance or {},
    )


def _digits(value: float) -> str:
    return format_number(value, 4)


def _exp(exponent: Array) -> Array:
    with np.errstate(over="ignore"):  # overflow: the model has diverged, and the ratio is infinite
        ratio: Array = np.exp(exponent)
    return ratio
