"""Token savings as a metric that is fed batch by batch."""

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
from lightning_ft.evaluation.savings.gate import check_margin
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.savings.result import SavingsResult

_ARMS = ("prompted", "tuned", "untuned")
_COUNTS = 6  # id, input, output, cached, truncated, cluster


class TokenSavingsMetric(Metric):
    """Savings of the tuned over the prompted arm, over all batches and ranks.

    Each request must be fed once to ``prompted`` and once to ``tuned`` (and, if at all, to ``untuned``), on whichever
    rank.

    Args:
        margin: Loss of quality that would be accepted.
        prices: What tokens and training cost.
        resamples: Draws of the bootstrap.
        seed: Of the bootstrap.
        kwargs: Of `torchmetrics.Metric`.

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
        prices: Prices | None = None,
        resamples: int = 9999,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_margin(margin)
        self.margin, self.prices, self.resamples, self.seed = margin, prices, resamples, seed
        for arm in _ARMS:
            self.add_state(f"{arm}_counts", default=[], dist_reduce_fx="cat")  # int64 [n, 6]
            self.add_state(f"{arm}_scores", default=[], dist_reduce_fx="cat")  # int64 [n], the bits of fp64

    def update(
        self,
        arm: str,
        ids: Sequence[str],
        input_tokens: Sequence[int],
        output_tokens: Sequence[int],
        scores: Sequence[float],
        *,
        truncated: Sequence[bool] | None = None,
        cached_prefix_tokens: Sequence[int] | None = None,
        clusters: Sequence[str] | None = None,
    ) -> None:
        """Add requests of one arm, ``b`` of each.

        Args:
            arm: ``prompted``, ``tuned`` or ``untuned``.
            ids: Of the requests.
            input_tokens: As `ArmRecords` counts them.
            output_tokens: Likewise.
            scores: From 0 to 1.
            truncated: Whether an answer hit the limit of new tokens.
            cached_prefix_tokens: Input tokens that a provider would have in its cache.
            clusters: What each request belongs to.

        Raises:
            SavingsError: For another arm, or numbers that can't be what they say.
        """
        if arm not in _ARMS:
            raise SavingsError(f"arm={arm!r}: expected one of {', '.join(_ARMS)}.")
        n = len(ids)
        flags, cached = truncated or [False] * n, cached_prefix_tokens or [0] * n
        ArmRecords(  # checks
            tuple(ids), tuple(input_tokens), tuple(output_tokens), tuple(scores), tuple(flags), tuple(cached)
        )
        rows = zip(
            map(_number, ids), input_tokens, output_tokens, cached, flags, map(_number, clusters or ids), strict=True
        )
        counts = torch.tensor([list(map(int, row)) for row in rows], dtype=torch.int64, device=self.device)
        getattr(self, f"{arm}_counts").append(counts)
        # Scores as bits: `Metric.half()` and moves to devices without fp64 would round them.
        getattr(self, f"{arm}_scores").append(
            torch.tensor(scores, dtype=torch.float64).view(torch.int64).to(self.device)
        )

    def compute(self) -> dict[str, Tensor]:
        """Figures by name, see `SavingsResult.figures`.

        Raises:
            SavingsError: As `lightning_ft.evaluation.savings.arithmetic.token_savings`.
        """
        figures = self._result().metrics()
        return {name: torch.tensor(value, dtype=torch.float32, device=self.device) for name, value in figures.items()}

    def result(self) -> SavingsResult:
        """All of the result, over all ranks.

        Raises:
            SavingsError: As `lightning_ft.evaluation.savings.arithmetic.token_savings`.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return self._result()

    def _result(self) -> SavingsResult:
        arms = {arm: records for arm in _ARMS if (records := self._records(arm)) is not None}
        missing = [arm for arm in ("prompted", "tuned") if arm not in arms]
        if missing:
            raise SavingsError(f"Nothing was recorded of the {' and the '.join(missing)} arm.")
        return token_savings(
            arms["prompted"],
            arms["tuned"],
            arms.get("untuned"),
            margin=self.margin,
            prices=self.prices,
            resamples=self.resamples,
            seed=self.seed,
        )

    def _records(self, arm: str) -> ArmRecords | None:
        if not len(getattr(self, f"{arm}_counts")):
            return None
        counts = dim_zero_cat(getattr(self, f"{arm}_counts")).reshape(-1, _COUNTS).tolist()
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


def _number(name: str) -> int:
    """A text as 63 bits: ranks can exchange numbers only."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
