"""Corrects the loss of a policy for the engine that sampled, as far as the engine reports log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor

from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ConfigError
from lightning_ft.losses.sampling_correction import CorrectionMode, check_correction, sampling_correction
from lightning_ft.modules.rollout_batch import RolloutBatch, concatenated
from lightning_ft.modules.step_metrics import MeanMetrics

_MOST_OUT_OF_BOUNDS = 0.5


@dataclass
class EngineCorrection:
    """Weights of tokens whose engine has other probabilities than the model.

    Args:
        mode: How tokens are weighted; None where they aren't.
        largest: Upper bound of the ratios.
        smallest: Lower bound of the ratios.
    """

    mode: CorrectionMode | None
    largest: float | None
    smallest: float | None
    _warned: bool = field(default=False, init=False)

    @classmethod
    def of(
        cls,
        argument: CorrectionMode | Literal["auto"] | None,
        largest: float | None,
        smallest: float | None,
        *,
        renormalizing: str | None,
        differs: bool,
        filters: bool,
    ) -> EngineCorrection:
        """Resolve the settings of a module.

        Args:
            argument: The argument `sampling_correction`.
            largest: Upper bound of the ratios.
            smallest: Lower bound of the ratios.
            renormalizing: Name of the engine that samples, if its log-probabilities are those of the filtered
                distribution.
            differs: Whether the engine may have other probabilities than the model for another reason: it is one of the
                user's own, or samples with a merged adapter.
            filters: Whether top-k, top-p or min-p is set.

        Raises:
            ConfigError: For settings that contradict each other.
        """
        if argument is None:
            return cls(None, largest, smallest)
        mode: CorrectionMode = "sequence_mask" if argument == "auto" else argument
        check_correction(mode, largest, smallest)
        if renormalizing and filters:
            missing = (
                f"With top_p, top_k or min_p {renormalizing} reports log-probabilities of the filtered distribution, "
                "so the difference between its probabilities and the model's can't be corrected"
            )
            if argument != "auto":
                raise ConfigError(
                    f"sampling_correction={argument!r}: {missing}. Leave out the filters, or set it to None."
                )
            rank_zero_warn(f"{missing}. Leave out the filters, or set sampling_correction=None to accept that.")
            return cls(None, largest, smallest)
        return cls(mode if renormalizing or differs or argument != "auto" else None, largest, smallest)

    def weights(
        self,
        rollout_batch: RolloutBatch,
        micro_batch: Sequence[int],
        old: Tensor,
        sequences: Tensor,
        mask: Tensor,
        kept: Tensor,
        metrics: MeanMetrics,
    ) -> Tensor | None:
        """Measure the difference between the policy and the engine, and weight tokens to correct for it.

        Completions without reported log-probabilities, which an engine may leave out, have a weight of 1.

        Args:
            rollout_batch: The rollout.
            micro_batch: Indices of its completions in this micro-batch, `s`.
            old: Log-probabilities under the policy at the time of the rollout, ``[n]``.
            sequences: Index in the micro-batch of the completion of each token, ``[n]``.
            mask: Whether each token counts, ``[n]``.
            kept: Whether each completion of the rollout counts.
            metrics: Metrics of the step, to which the differences are added.

        Returns:
            Factor of each token's loss, ``[n]``; None if nothing is corrected.
        """
        found = {c: rollout_batch.sampling_logprobs[c] for c in micro_batch}
        lengths = {c: len(rollout_batch.completions[c]) for c in micro_batch}
        reported = torch.tensor([len(found[c]) > 0 for c in micro_batch], dtype=torch.bool).to(old.device)[sequences]
        padded = {c: found[c] if len(found[c]) else torch.zeros(lengths[c]) for c in micro_batch}
        sampled = torch.where(reported, cast(Tensor, concatenated(padded, micro_batch, old)), old)
        count = float(sum(lengths[c] for c in micro_batch if len(found[c])))
        metrics.add({"sampling_gap": (old - sampled).abs().sum()}, {"sampling_gap": count})
        if self.mode is None:
            return None
        weights, out_of_bounds = sampling_correction(
            old,
            sampled,
            sequences,
            len(micro_batch),
            mask,
            mode=self.mode,
            largest=self.largest,
            smallest=self.smallest,
        )
        counted, counts = mask & reported, float(sum(lengths[c] for c in micro_batch if len(found[c]) and kept[c]))
        sums = {
            "sampling_ratio": (weights * counted).sum(),
            "sampling_out_of_bounds": (out_of_bounds & counted).sum(),
        }
        metrics.add(sums, dict.fromkeys(sums, counts))
        return weights if count else None

    def warn(self, metrics: Mapping[str, float]) -> None:
        """Warn once if most tokens of a rollout are left out of the loss, or have a bound as their weight.

        Args:
            metrics: Means over a rollout, by logged name.
        """
        share = metrics.get("train/sampling_out_of_bounds", 0.0)
        if share <= _MOST_OUT_OF_BOUNDS or self._warned:
            return
        self._warned = True
        effect = "don't count" if cast(str, self.mode).endswith("mask") else "have the bound as their weight"
        rank_zero_warn(
            f"For {share:.0%} of the tokens of a rollout the ratio of the model's probability to the engine's exceeds "
            f"its bounds (sampling_ratio_max={self.largest}), so they {effect}. Check that the engine has the current "
            "weights and reports log-probabilities at the temperature of the module; ratios of long completions "
            "multiply, so sampling_correction='token_truncate' may fit better."
        )
