"""Token savings as a torchmetrics metric, updated batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.savings.arithmetic import token_savings
from lightning_ft.evaluation.savings.cost import Prices
from lightning_ft.evaluation.savings.gate import check_margin, check_min_quality
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.savings.result import SavingsResult

_ARMS = ("prompted", "tuned", "untuned")
_NUM_COLUMNS = 6  # id, input tokens, output tokens, cached tokens, truncated, cluster


class TokenSavingsMetric(Metric):
    """Token savings of the tuned over the prompted arm, accumulated over batches and ranks.

    Each request must be added exactly once per arm, on any rank. The arm ``untuned`` may be left out.

    Args:
        margin: Largest acceptable loss of quality, between 0 and 1.
        min_quality: Quality below which an arm is of no use; None to require that the prompted arm is better than the
            untuned one, if that is added.
        prices: Prices of tokens and of training.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
        kwargs: Keyword arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = TokenSavingsMetric()
        >>> for batch in (["a", "b"], ["c", "d"]):
        ...     metric.update("prompted", batch, [500, 510], [20, 30], [1.0, 1.0])
        ...     metric.update("tuned", batch, [50, 60], [20, 30], [1.0, 0.0])
        >>> round(float(metric.compute()["total"]), 4), metric.result().n
        (0.8491, 4)
    """

    full_state_update = False

    def __init__(
        self,
        *,
        margin: float = 0.02,
        min_quality: float | None = None,
        prices: Prices | None = None,
        resamples: int = 9999,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_margin(margin)
        check_min_quality(min_quality)
        self.margin, self.prices, self.resamples, self.seed = margin, prices, resamples, seed
        self.min_quality = min_quality
        for arm in _ARMS:
            self.add_state(f"{arm}_counts", default=[], dist_reduce_fx="cat")  # int64 [n, 6]
            self.add_state(f"{arm}_scores", default=[], dist_reduce_fx="cat")  # int64 [n], bits of the fp64 scores

    def update(
        self,
        arm: str,
        ids: Sequence[str],
        input_tokens: Sequence[int] | Tensor,
        output_tokens: Sequence[int] | Tensor,
        scores: Sequence[float] | Tensor,
        *,
        truncated: Sequence[bool] | Tensor | None = None,
        cached_prefix_tokens: Sequence[int] | Tensor | None = None,
        clusters: Sequence[str] | None = None,
    ) -> None:
        """Add a batch of requests of one arm. Numbers may be tensors of shape ``[batch]``, on any device.

        Args:
            arm: Name of the arm: ``prompted``, ``tuned`` or ``untuned``.
            ids: Id of each request.
            input_tokens: Number of input tokens of each request, see `ArmRecords`.
            output_tokens: Number of output tokens of each request, see `ArmRecords`.
            scores: Score of each answer, from 0 to 1.
            truncated: Whether each answer hit the limit of new tokens; by default none did.
            cached_prefix_tokens: Number of input tokens of each request that a provider would cache; by default 0.
            clusters: Cluster of each request; by default each request is a cluster of its own.

        Raises:
            SavingsError: If `arm` is unknown, lengths differ, or a number is out of range.
        """
        if arm not in _ARMS:
            raise SavingsError(f"arm={arm!r}: expected one of {', '.join(_ARMS)}.")
        n = len(ids)
        read, written, grades = _numbers(input_tokens), _numbers(output_tokens), _numbers(scores)
        flags, cached = _numbers(truncated) or (False,) * n, _numbers(cached_prefix_tokens) or (0,) * n
        ArmRecords(tuple(ids), read, written, grades, flags, cached)  # validates the values
        rows = zip(map(_hash, ids), read, written, cached, flags, map(_hash, clusters or ids), strict=True)
        counts = torch.tensor([list(map(int, row)) for row in rows], dtype=torch.int64, device=self.device)
        getattr(self, f"{arm}_counts").append(counts)
        # Scores are stored as bits, since `Metric.half()` and devices without fp64 would round them.
        getattr(self, f"{arm}_scores").append(
            torch.tensor(grades, dtype=torch.float64).view(torch.int64).to(self.device)
        )

    def compute(self) -> dict[str, Tensor]:
        """Compute the metrics by name, see `SavingsResult.metrics`.

        Raises:
            SavingsError: If an arm has no requests, and as :func:`token_savings`.
        """
        metrics = self._result().metrics()
        return {name: torch.tensor(value, dtype=torch.float32, device=self.device) for name, value in metrics.items()}

    def result(self) -> SavingsResult:
        """Compute the complete result over all ranks.

        Raises:
            SavingsError: If an arm has no requests, and as :func:`token_savings`.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return self._result()

    def _result(self) -> SavingsResult:
        arms = {arm: records for arm in _ARMS if (records := self._records(arm)) is not None}
        missing = [arm for arm in ("prompted", "tuned") if arm not in arms]
        if missing:
            names = " and the ".join(missing)
            raise SavingsError(f"No requests were added to the {names} arm. Add them with update().")
        return token_savings(
            arms["prompted"],
            arms["tuned"],
            arms.get("untuned"),
            margin=self.margin,
            prices=self.prices,
            resamples=self.resamples,
            seed=self.seed,
            min_quality=self.min_quality,
        )

    def _records(self, arm: str) -> ArmRecords | None:
        if not len(getattr(self, f"{arm}_counts")):
            return None
        counts = dim_zero_cat(getattr(self, f"{arm}_counts")).reshape(-1, _NUM_COLUMNS).tolist()
        bits = dim_zero_cat(getattr(self, f"{arm}_scores")).cpu()
        ids, tokens, out, cached, flags, clusters = zip(*counts, strict=True)
        return ArmRecords(
            ids=tuple(map(str, ids)),
            input_tokens=tokens,
            output_tokens=out,
            scores=tuple(bits.view(torch.float64).tolist()),
            truncated=tuple(map(bool, flags)),
            cached_prefix_tokens=cached,
            clusters=() if clusters == ids else tuple(map(str, clusters)),
        )


def _numbers(values: Sequence[Any] | Tensor | None) -> tuple[Any, ...]:
    return () if values is None else tuple(values.tolist() if isinstance(values, Tensor) else values)


def _hash(text: str) -> int:
    """63-bit hash of a text: only tensors can be exchanged between ranks."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
