"""What training steps get from the frozen layers: read from disk where it was kept, else computed and kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ft.data import cache
from lightning_ft.data.layout import TokenBatch
from lightning_ft.distributed import rank_zero_info, rank_zero_warn
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.activation_store import ActivationStore, sequence_digest
from lightning_ft.models.flops import OperationCounter, counted_apart
from lightning_ft.models.frozen_layers import FrozenLayers
from lightning_ft.models.head import CausalLM, as_forward, base_of, hidden_states
from lightning_ft.models.logprob_model import LogProbModel

GIB = 2**30


@dataclass(frozen=True)
class ActivationCache:
    """Where states of frozen layers are kept.

    Args:
        folder: Holds a folder for each model and depth.
        max_gib: Most that all of them may take; the longest unused make room.

    Raises:
        ConfigError: For a limit that isn't more than 0.
    """

    folder: Path
    max_gib: float = 50.0

    def __post_init__(self) -> None:
        if not self.max_gib > 0:
            raise ConfigError(f"activation_cache: max_gib={self.max_gib} must be more than 0.")

    @classmethod
    def of(cls, given: bool | str | Path | Mapping[str, Any] | None) -> ActivationCache | None:
        """What a user may pass: a folder, True for one in the cache of the `datasets` library, or both settings.

        Raises:
            ConfigError: For anything else.

        Example:
            >>> ActivationCache.of({"folder": "states", "max_gib": 2}).max_gib, ActivationCache.of(None) is None
            (2.0, True)
        """
        if given is None or given is False:
            return None
        if given is True:
            return cls(default_folder())
        if isinstance(given, (str, Path)):
            return cls(Path(given))
        if not isinstance(given, Mapping) or set(given) - {"folder", "max_gib"}:
            raise ConfigError(
                f"activation_cache={given!r}: expected a folder, True, or a dict of 'folder' and 'max_gib'."
            )
        folder = Path(given["folder"]) if "folder" in given else default_folder()
        try:
            limit = float(given.get("max_gib", cls.max_gib))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"activation_cache: max_gib={given['max_gib']!r} is no number of GiB.") from error
        return cls(folder, limit)


def default_folder() -> Path:
    """A folder of its own in the `datasets` library's cache."""
    return cache.default_folder().with_name("lightning_ft_trunk")


class ActivationReader:
    """Lets training steps begin at the lowest trained layer.

    Args:
        model: The model, with adapters in its top layers only.
        cache: Where states are kept.
        scorer: What was found out about the model.
        autocast: The dtype that matrix products run in, where it isn't the weights'.

    Raises:
        ModelError: Where the frozen layers' output isn't the same every time; the message says why.
    """

    def __init__(
        self, model: CausalLM, cache: ActivationCache, scorer: LogProbModel, *, autocast: torch.dtype | None = None
    ):
        self.trunk = FrozenLayers(model)
        self._model, self._logprob_model, self._cache = model, scorer, cache
        key = self.trunk.content_key(str(autocast))
        self.store = ActivationStore(cache.folder, key, limit=int(cache.max_gib * GIB))
        self.read = self.computed = 0
        """Sequences whose states were on disk, and those whose states had to be computed."""
        self.flops = 0
        """Operations that computing them took."""
        self._by_length: dict[int, int] = {}
        self._verified = self._told = False

    def announce(self, tokens: int | None) -> None:
        """Say what will be written, before it is.

        Args:
            tokens: Of all training rows, where that is known.

        Raises:
            ConfigError: If it is more than may be kept, or than there is room for.
        """
        each = self.trunk.width * self.trunk.dtype.itemsize
        what = f"Frozen trunk: layers 0 to {self.trunk.depth - 1} of {len(self.trunk.layers)} are computed once a row. "
        if tokens is None:
            size = f"A token takes {each:,} bytes, all of them at most {self._cache.max_gib:g} GiB"
        else:
            size = f"{tokens:,} tokens of {each:,} bytes take {tokens * each / GIB:.2f} GiB"
            try:
                self.store.reserve(tokens * each)
            except OSError as error:
                raise ConfigError(
                    f"activation_cache: {error} Give another folder, a larger max_gib, or train without it."
                ) from error
        rank_zero_info(f"{what}{size} in {self.store.folder}; {len(self.store):,} rows are there already.")

    @contextmanager
    def around(self, batch: TokenBatch) -> Iterator[None]:
        """In this context the model's forward pass over `batch` runs its trained layers only.

        Raises:
            ModelError: If that gives anything else than all layers do; found out with the first batch.
        """
        if batch.has_shared_prefixes:
            raise ModelError(
                "activation_cache: a batch shares prefixes between its segments; their states aren't kept."
            )
        batch = self._logprob_model.arranged(self._model, batch)  # which tries the model out, while all layers run
        if not self._logprob_model.takes_one_pass(self._model, batch):
            raise ModelError(
                f"activation_cache: {type(base_of(self._model)).__name__} lets rows of this batch change each other, so it "
                "takes several passes, and kept states belong to one. Use batch_size=1, or train without activation_cache."
            )
        states = self._states(batch)
        if not self._verified:
            self._verify(batch, states)
            self._verified = True
        with self.trunk.replaced_by(states):
            yield

    def _states(self, batch: TokenBatch) -> Tensor:
        """``[b, s, d]``; zero where there is no token, which nothing attends to."""
        ids, segments = batch.input_ids.cpu(), batch.segment_ids.cpu()
        found = torch.zeros(*ids.shape, self.trunk.width, dtype=self.trunk.dtype)
        for row, kinds in enumerate(segments):
            start = 0
            runs, counts = kinds.unique_consecutive(return_counts=True)
            for segment, count in zip(runs.tolist(), counts.tolist(), strict=True):
                if segment >= 0:
                    found[row, start : start + count] = self._sequence(ids[row, start : start + count])
                start += count
        return found.to(batch.input_ids.device, non_blocking=True)

    def _sequence(self, input_ids: Tensor) -> Tensor:
        digest = sequence_digest(input_ids)
        if (kept := self.store.get(digest)) is not None:
            self.read += 1
            return kept
        self.computed += 1
        states = self._compute(input_ids)
        if not self.store.put(digest, states) or self.store.failure:
            self._tell_not_kept()
        return states.cpu()

    def flush(self) -> None:
        """Write what was kept in memory."""
        self.store.flush()
        if self.store.failure:
            self._tell_not_kept()

    def _tell_not_kept(self) -> None:
        if self._told:
            return
        self._told = True
        if self.store.failure:
            rank_zero_warn(f"activation_cache: {self.store.failure} Further rows are computed in every epoch.")
            return
        rank_zero_warn(
            f"The frozen trunk's cache is full ({self._cache.max_gib:g} GiB in {self._cache.folder}): further rows "
            "are computed in every epoch. Raise max_gib of activation_cache."
        )

    def _compute(self, input_ids: Tensor) -> Tensor:
        """The states; operations are counted once for each length, which they follow from."""
        if (known := self._by_length.get(len(input_ids))) is not None:
            self.flops += known
            with counted_apart():
                return self.trunk.states(input_ids)
        with counted_apart(), OperationCounter() as counter:
            states = self.trunk.states(input_ids)
        self._by_length[len(input_ids)] = counter.flops
        self.flops += counter.flops
        return states

    @torch.no_grad()
    def _verify(self, batch: TokenBatch, states: Tensor) -> None:
        """Compare with a pass through all layers; random states apart, only rounding may differ."""
        base = base_of(self._model)
        alike = partial(torch.random.fork_rng, devices=_cuda(batch.input_ids.device))  # dropout above draws the same
        try:  # ahead of all layers: what a pass over this batch leaves behind in one must not serve here
            with counted_apart(), alike(), self.trunk.replaced_by(states):
                top = as_forward(base, hidden_states, batch, None).flatten(0, 1)[batch.predictors]
        except torch.OutOfMemoryError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # something isn't there
            raise ModelError(
                f"{type(base).__name__}: its upper layers don't run without the lower ones ({error!r}), so activation_cache "
                "can't be used: they depend on more than what the one before gives."
            ) from error
        with counted_apart(), alike():
            every = as_forward(base, hidden_states, batch, None).flatten(0, 1)[batch.predictors]
        if not len(every):
            return
        apart = float((every.float() - top.float()).abs().max() / every.float().abs().max().clamp(min=1.0))
        exact = self.trunk.dtype == torch.float32 and not torch.is_autocast_enabled(batch.input_ids.device.type)
        limit = 1e-4 if exact else 5e-2
        if not apart <= limit:
            raise ModelError(
                f"{type(base).__name__}: with kept states of its lower layers the model gives something else than "
                f"with all of them (by {apart:.2g} of the largest value, more than {limit:g}), so activation_cache can't be "
                "used: its layers depend on more than what the one before gives, or are random."
            )
        rank_zero_info(f"Frozen trunk: checked with the first batch, {apart:.1e} apart from a pass through all layers.")

    def end_epoch(self, epoch: int) -> None:
        """See what other ranks have written.

        Args:
            epoch: Its number, from 0.
        """
        self.store.refresh()
        if epoch == 1 and not self.read:
            rank_zero_warn(
                "No row of the second epoch was seen in the first: rows that change from epoch to epoch can't gain "
                "from activation_cache, which only fills the disk."
            )


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
