"""What a model card says besides its code: how the weights were trained, and what was measured with them.

A card gets published. So these objects hold no text of rows, no path and no address: only numbers, and names that the
functions which make them have chosen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from torch import nn

_HASHED = 4096  # values per weight: two trainings of one model differ everywhere

Setting = str | int | float | bool


@dataclass(frozen=True)
class TrainingRecord:
    """How weights were trained, as a checkpoint keeps it.

    Args:
        data: Sources of the training rows, their number and hash, by label; empty if they aren't known.
        settings: Method and settings, by label.
        versions: Versions of the packages, by name.
        datasets: Names of the data sets on the hub among the sources.
        date: Day on which the record was made, such as ``2026-01-31``.
    """

    data: Mapping[str, Setting] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    date: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values, as checkpoints hold them."""
        return {**asdict(self), "datasets": list(self.datasets)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingRecord:
        """Restore a record from :meth:`to_dict`.

        Example:
            >>> record = TrainingRecord(data={"rows": 3}, datasets=("user/data",))
            >>> TrainingRecord.from_dict(record.to_dict()) == record
            True
        """
        # of another version, or of somebody else: what isn't understood is left out, since a card must not stop a run
        known = {name: values.get(name) for name in ("data", "settings", "versions")}
        maps = {name: dict(value) for name, value in known.items() if isinstance(value, Mapping)}
        datasets, date = values.get("datasets"), values.get("date")
        names = tuple(map(str, datasets)) if isinstance(datasets, (list, tuple)) else ()
        return cls(**maps, datasets=names, date=date if isinstance(date, str) else "")


@dataclass(frozen=True)
class MeasuredResult:
    """A result of a measurement, in sentences.

    Args:
        title: Name of the measurement.
        sentences: What was found, with intervals.
        notes: Caveats that a reader needs in order to interpret it.
        weights: :func:`weights_hash` of the weights that were measured; None if it isn't known.
        metrics: Metrics for the metadata of the card, by name; empty for none.
        measured_on: Name of what they were measured on.
        provenance: Hashes and settings of the measurement, by label.
        failed: Whether the measurement failed, so that nothing was found.
    """

    title: str
    sentences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    weights: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    measured_on: str = ""
    provenance: Mapping[str, Setting] = field(default_factory=dict)
    failed: bool = False


@dataclass(frozen=True)
class CardFacts:
    """What is known about the weights of an export.

    Args:
        training: How they were trained; None if that wasn't recorded.
        results: Results of measurements in the same run, of these weights or of others.
    """

    training: TrainingRecord | None = None
    results: tuple[MeasuredResult, ...] = ()

    def results_for(self, weights: str | None) -> Iterator[MeasuredResult]:
        """Results that were measured with these weights.

        Args:
            weights: Their :func:`weights_hash`.
        """
        return (result for result in self.results if weights is not None and result.weights == weights)


def today() -> str:
    """The day in UTC, such as ``2026-01-31``: when a result was measured, or weights were recorded."""
    return datetime.now(timezone.utc).date().isoformat()


def weights_hash(model: nn.Module) -> str | None:
    """Hash the trainable weights of a model. All ranks of a sharded model must make this call.

    It is the same on every device, and in every dtype that holds the values.

    Args:
        model: Transformers or PEFT model.

    Returns:
        16 hexadecimal digits; None if no weight is trainable.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> before = weights_hash(layer)
        >>> _ = layer.weight.data.add_(1.0)
        >>> before == weights_hash(layer), weights_hash(layer.requires_grad_(False))
        (False, None)
    """
    digest, found = hashlib.sha256(), False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.detach()
            values = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            digest.update(f"{name} {tuple(values.shape)}".encode())
            # a copy, since FSDP2 can't free a gathered weight whose memory NumPy has seen
            digest.update(values.flatten()[:_HASHED].float().cpu().clone().numpy().tobytes())
            found = True
    return digest.hexdigest()[:16] if found else None
