"""A DataLoader of one's own whose position is saved in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_ft.data.sampler import EpochPlan
from lightning_ft.distributed import rank_and_world_size
from lightning_ft.errors import ConfigError


def before_fabric(loader: Any) -> Any:
    """The loader that `fabric.setup_dataloaders` was called with, or the loader itself."""
    return getattr(loader, "_dataloader", loader)


class LoaderPosition(TypedDict):
    """Position of a :class:`ResumableLoader`.

    Args:
        epoch: Number of iterations over the loader that were complete.
        batch: Number of batches of the current one that were yielded.
        rng: State of PyTorch's generator when the current one began, from which the order of a shuffled epoch follows.
    """

    epoch: int
    batch: int
    rng: Tensor | None


class ResumableLoader:
    """Wraps a DataLoader so that a run that was interrupted inside an epoch goes on with the next batch.

    Lightning saves its `state_dict` in checkpoints. On resumption the epoch is begun with the random state that it
    began with, so that it is shuffled in the same way, and the batches that were trained on are skipped; they are read,
    but not trained on again. Use it with the mixin `lightning_ft.modules.exact_resume.ExactResume`, which restores the
    random state of the training.

    Args:
        loader: The DataLoader, shuffled or not, with any number of workers. The order of its rows may depend on
            PyTorch's global generator, but on nothing else that changes. On several ranks it needs a
            DistributedSampler. Rows that draw random numbers when they are read draw the same ones again, except in an
            accumulation window that was open.

    Raises:
        ConfigError: For an IterableDataset, the loader of a DataModule of this package, which keeps its position
            itself, and a loader with a DistributedSampler that Fabric has set up.

    Example:
        >>> loader = ResumableLoader(DataLoader(list(range(6)), batch_size=2))
        >>> batches = iter(loader)
        >>> _ = next(batches)
        >>> other = ResumableLoader(DataLoader(list(range(6)), batch_size=2))
        >>> other.load_state_dict(loader.state_dict())
        >>> [batch.tolist() for batch in other]
        [[2, 3], [4, 5]]
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        if isinstance(loader.dataset, IterableDataset):
            raise ConfigError(
                "ResumableLoader can't return to a position of an IterableDataset: use a dataset with a length, or a "
                "loader with a state_dict of its own."
            )
        within = before_fabric(loader)
        if isinstance(within.sampler, EpochPlan):
            raise ConfigError(
                f"A {type(within).__name__} keeps its position itself: pass it to Trainer.fit, save_loop and load_loop "
                "as it is. A ResumableLoader around it would begin each run with its first epoch."
            )
        if within is not loader and isinstance(loader.sampler, DistributedSampler):
            raise ConfigError(
                "What fabric.setup_dataloaders makes of a DataLoader counts the epochs of its DistributedSampler from "
                "0 in each run, so a resumed one would read other rows. Wrap the DataLoader itself, call "
                "sampler.set_epoch(epoch) before each epoch, and move batches with fabric.to_device."
            )
        self.loader = loader
        self._epoch, self._yielded = 0, 0
        self._began: Tensor | None = None
        self._resumed: LoaderPosition | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if rank_and_world_size()[1] > 1 and not isinstance(self.loader.sampler, DistributedSampler):
            raise ConfigError(
                "Every rank would read all rows: Lightning distributes the rows of a DataLoader, but not of one that "
                "is wrapped. Pass sampler=DistributedSampler(dataset, shuffle=...) to the DataLoader."
            )
        resumed, self._resumed = self._resumed, None
        now, skipped = torch.get_rng_state(), -1
        if resumed is not None and resumed["rng"] is not None:
            torch.set_rng_state(resumed["rng"].cpu())
            skipped = resumed["batch"]
        self._began, self._yielded = torch.get_rng_state(), 0
        batches = iter(self.loader)
        for _ in range(skipped):
            next(batches)
            self._yielded += 1
        if skipped > 0:
            torch.set_rng_state(now)  # what comes next draws as if there had been no batches to skip
        for batch in batches:
            self._yielded += 1
            yield batch
        self._epoch, self._yielded = self._epoch + 1, 0

    def state_dict(self) -> LoaderPosition:
        """The position."""
        if self._resumed is not None:
            return self._resumed
        return {"epoch": self._epoch, "batch": self._yielded, "rng": self._began if self._yielded else None}

    def load_state_dict(self, state_dict: LoaderPosition) -> None:
        """Begin the next iteration at a position from `state_dict`."""
        epoch, batch, rng = state_dict["epoch"], state_dict["batch"], state_dict["rng"]
        if batch >= len(self):  # the next iteration begins as after any other epoch
            epoch, batch, rng = epoch + 1, 0, None
        self._resumed = {"epoch": epoch, "batch": batch, "rng": rng}
        self._epoch, self._yielded = epoch, 0

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)
