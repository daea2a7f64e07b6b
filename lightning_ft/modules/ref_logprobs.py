"""Log-probabilities under the reference, computed once for all rows and kept on disk by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.data.cache import default_folder
from lightning_ft.distributed import gathered, on_first_rank, rank_and_ranks, rank_zero_info, rank_zero_warn
from lightning_ft.errors import ConfigError, FileWriteError
from lightning_ft.models.reference import Reference
from lightning_ft.models.shard import is_sharded
from lightning_ft.models.tensors import read_tensors, write_tensors

SPLITS = ("train", "validation", "test")
_AT_A_TIME = 8


class ReferenceLogProbs:
    """What the reference says of the completions of a DataModule.

    Args:
        reference: The model before training.
        folder: Where log-probabilities are kept; by default in the `datasets` library's cache.
    """

    def __init__(self, reference: Reference, folder: str | None = None) -> None:
        self.reference = reference
        self._folder = Path(folder) if folder is not None else default_folder() / "reference"
        self._found: dict[str, Tensor] = {}
        self._data: Any = None

    def lookup(self, batch: PreferenceBatch, data: Any, split: str) -> Tensor | None:
        """Summed log-probabilities of a batch's completions, ``[c]``; None where they weren't computed before.

        Args:
            batch: The batch.
            data: The DataModule that it comes from.
            split: Which split of that it is of.
        """
        if data is not self._data or split not in self._found:
            return None
        return self._found[split][batch.rows.cpu()].flatten()

    def precompute(
        self, data: Any, score: Callable[[PreferenceBatch], Tensor], device: torch.device, *, precision: str
    ) -> None:
        """Compute, or read, the log-probabilities of every split; a copy of the weights isn't needed afterwards.

        Args:
            data: A PreferenceDataModule that is set up.
            score: Gives the summed log-probabilities of a batch's completions, ``[c]``.
            device: Where to run.
            precision: Names how `score` computes: what was computed in another one isn't read.

        Raises:
            ConfigError: Without such a DataModule.
        """
        if not hasattr(data, "row_batches"):
            raise ConfigError(
                "precompute_reference=True looks at all rows beforehand: give the Trainer a PreferenceDataModule."
            )
        self._data, self._found = data, {}
        rank, ranks = rank_and_ranks()
        weights = self.reference.to(device).fingerprint()
        for split in SPLITS:
            if split not in data.splits.sources:
                continue
            key = hashlib.sha256(f"{weights} {precision} {data.encoded_key(split)}".encode()).hexdigest()
            path = self._folder / f"{key}.safetensors"
            kept = read_tensors(path, key=key)
            every = on_first_rank(lambda found: [all(found)] * len(found), kept is not None)
            if kept is not None and every:  # all ranks compute, or none
                self._found[split] = kept["logprobs"]
                rank_zero_info(f"{split}: log-probabilities under the reference read from {path}")
            else:
                self._found[split] = self._compute(data, split, score, device)
                if rank == 0:
                    self._keep(path, key, self._found[split])
            if ranks > 1:
                dist.barrier()
        self.reference.to(torch.device("cpu"))  # whoever asks for it later moves it back

    def _keep(self, path: Path, key: str, logprobs: Tensor) -> None:
        try:
            write_tensors(path, {"logprobs": logprobs}, key=key)
        except FileWriteError as error:
            rank_zero_warn(f"{error} The reference's log-probabilities are computed again in the next run.")

    def _compute(
        self, data: Any, split: str, score: Callable[[PreferenceBatch], Tensor], device: torch.device
    ) -> Tensor:
        rank, ranks = rank_and_ranks()
        with self.reference.use() as model:
            sharded = is_sharded(model)  # all ranks have to run it in step, so each computes all rows
        mine: list[tuple[int, Tensor]] = []
        for number, batch in enumerate(data.row_batches(split, _AT_A_TIME)):
            if sharded or number % ranks == rank:
                mine.append((number, score(batch.to(device)).float().cpu().view(len(batch), -1)))
        parts = [mine] if sharded else gathered(mine)
        return torch.cat([values for _, values in sorted((n for part in parts for n in part), key=lambda n: n[0])])
