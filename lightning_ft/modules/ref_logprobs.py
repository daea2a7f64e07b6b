"""Log-probabilities under the reference, precomputed for all rows and kept on disk by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.data.cache import default_folder
from lightning_ft.distributed import (
    all_gather_objects,
    on_rank_zero,
    rank_and_world_size,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_ft.errors import ConfigError, FileWriteError
from lightning_ft.models.reference import Reference
from lightning_ft.models.shard import is_sharded
from lightning_ft.models.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from lightning_ft.data.preferences import PreferenceDataModule
    from lightning_ft.data.splits import SplitName

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_BATCH_SIZE = 8


class ReferenceLogProbs:
    """Log-probabilities of the completions of a DataModule under the reference.

    Args:
        reference: The model before training.
        folder: Folder of the log-probabilities; by default in the cache of the `datasets` library.
    """

    def __init__(self, reference: Reference, folder: str | None = None) -> None:
        self.reference = reference
        self._folder = Path(folder) if folder is not None else default_folder() / "reference"
        self._logprobs: dict[str, Tensor] = {}
        self._data: object = None

    def lookup(self, batch: PreferenceBatch, data: object, split: str) -> Tensor | None:
        """Summed log-probabilities of a batch's completions, ``[c]``; None where they were not precomputed.

        Args:
            batch: The batch.
            data: DataModule of the batch.
            split: Name of the split.
        """
        if data is not self._data or split not in self._logprobs:
            return None
        return self._logprobs[split][batch.rows.cpu()].flatten()

    def precompute(
        self,
        data: PreferenceDataModule,
        compute: Callable[[PreferenceBatch], Tensor],
        device: torch.device,
        *,
        precision: str,
    ) -> None:
        """Read or compute the log-probabilities of every split; no copy of the weights is needed afterwards.

        Args:
            data: A PreferenceDataModule that is set up.
            compute: Returns the summed log-probabilities of a batch's completions, ``[c]``.
            device: Device to compute on.
            precision: Precision of `compute`; results of another precision are not read.

        Raises:
            ConfigError: Without such a DataModule.
        """
        if not hasattr(data, "row_batches"):
            raise ConfigError(
                "precompute_reference=True reads all rows before training: pass a PreferenceDataModule to the Trainer."
            )
        data.require_rows("precompute_reference=True")
        self._data, self._logprobs = data, {}
        rank, ranks = rank_and_world_size()
        weights = self.reference.to(device).fingerprint()
        for split in SPLITS:
            if split not in data.splits.sources:
                continue
            key = hashlib.sha256(f"{weights} {precision} {data.encoded_key(split)}".encode()).hexdigest()
            path = self._folder / f"{key}.safetensors"
            kept = read_tensors(path, key=key)
            everywhere = on_rank_zero(lambda on_rank: [all(on_rank)] * len(on_rank), kept is not None)
            if kept is not None and everywhere:  # all ranks compute, or none
                self._logprobs[split] = kept["logprobs"]
                rank_zero_info(f"{split}: log-probabilities under the reference read from {path}")
            else:
                self._logprobs[split] = self._compute(data, split, compute, device)
                if rank == 0:
                    self._keep(path, key, self._logprobs[split])
            if ranks > 1:
                dist.barrier()
        self.reference.to(torch.device("cpu"))  # a later use moves it back

    def _keep(self, path: Path, key: str, logprobs: Tensor) -> None:
        try:
            write_tensors(path, {"logprobs": logprobs}, key=key)
        except FileWriteError as error:
            rank_zero_warn(f"{error} The reference's log-probabilities are computed again in the next run.")

    def _compute(
        self,
        data: PreferenceDataModule,
        split: SplitName,
        compute: Callable[[PreferenceBatch], Tensor],
        device: torch.device,
    ) -> Tensor:
        rank, ranks = rank_and_world_size()
        with self.reference.use() as model:
            sharded = is_sharded(model)  # all ranks have to run it in step, so each computes all rows
        mine: list[tuple[int, Tensor]] = []
        for number, batch in enumerate(data.row_batches(split, _BATCH_SIZE)):
            if sharded or number % ranks == rank:
                mine.append((number, compute(batch.to(device)).float().cpu().view(len(batch), -1)))
        parts = [mine] if sharded else all_gather_objects(mine)
        return torch.cat([values for _, values in sorted((n for part in parts for n in part), key=lambda n: n[0])])
