"""The activation cache of frozen layers: what they output is read from disk where it is kept, else computed and kept.

With adapters in the top layers only, the output of the layers below is the same in every epoch. `ActivationCache` is
what a module holds; `ActivationReader` does the work once the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ft._lightning import active_datamodule
from lightning_ft.data import cache
from lightning_ft.data.layout import TokenBatch
from lightning_ft.data.module import RowDataModule
from lightning_ft.distributed import rank_zero_info, rank_zero_warn
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.activation_store import ActivationStore, sequence_digest
from lightning_ft.models.flops import OperationCounter, counted_separately
from lightning_ft.models.frozen_layers import FrozenLayers
from lightning_ft.models.head import CausalLM, as_forward, base_of, hidden_states, input_device
from lightning_ft.models.logprob_model import LogProbModel

if TYPE_CHECKING:
    from lightning_ft.modules.base import FineTuning

GIB = 2**30


@dataclass
class ActivationCache:
    """Cache of the activations of a module's frozen layers.

    In a hand-written loop `around` is called by `training_step`, as under a Trainer; call `end_epoch` at the end of an
    epoch to write what is still in memory.

    Args:
        folder: Folder that holds one folder per model and depth.
        max_gib: Largest size of all of them, GiB; the longest unused entries make room.

    Raises:
        ConfigError: For a limit that is not above 0.
    """

    folder: Path
    max_gib: float = 50.0
    reader: ActivationReader | None = field(default=None, init=False, compare=False, repr=False)
    """Does the work, once the model is loaded."""

    def __post_init__(self) -> None:
        if not self.max_gib > 0:
            raise ConfigError(f"activation_cache: max_gib={self.max_gib} must be above 0.")

    @classmethod
    def of(cls, option: bool | str | Path | Mapping[str, Any] | None) -> ActivationCache | None:
        """The cache of the argument `activation_cache`; None without one.

        Args:
            option: A folder, True for one in the cache of the `datasets` library, or a dict of `folder` and `max_gib`.

        Raises:
            ConfigError: For anything else.

        Example:
            >>> ActivationCache.of({"folder": "states", "max_gib": 2}).max_gib, ActivationCache.of(None) is None
            (2.0, True)
        """
        if option is None or option is False:
            return None
        if option is True:
            return cls(default_folder())
        if isinstance(option, (str, Path)):
            return cls(Path(option))
        if not isinstance(option, Mapping) or set(option) - {"folder", "max_gib"}:
            raise ConfigError(
                f"activation_cache={option!r}: expected a folder, True, or a dict of 'folder' and 'max_gib'."
            )
        folder = Path(option["folder"]) if "folder" in option else default_folder()
        try:
            limit = float(option.get("max_gib", 50.0))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"activation_cache: max_gib={option['max_gib']!r} is not a number of GiB.") from error
        return cls(folder, limit)

    @property
    def flops(self) -> int:
        """Operations spent on computing activations so far."""
        return 0 if self.reader is None else self.reader.flops

    def start(self, module: FineTuning) -> None:
        """Open the cache for the loaded model of a module, and announce what will be written to disk.

        Raises:
            ModelError: Where the output of the frozen layers is not the same every time.
            ConfigError: Where it takes more room than there is, or the model is sharded.
        """
        if module.sharded:
            raise ConfigError("activation_cache: layers of a sharded model can't be skipped; use DDP, or leave it out.")
        with module.trainer.precision_plugin.forward_context():
            reader = self._open(module)
        data = active_datamodule(module.trainer)
        report = data.report.get("train") if isinstance(data, RowDataModule) and data.stream is None else None
        reader.announce(None if report is None else sum(report.lengths))

    def around(self, module: FineTuning, batch: TokenBatch) -> AbstractContextManager[None]:
        """In this context the module's forward pass over `batch` runs its trained layers only."""
        return self._open(module).around(batch)

    def _open(self, module: FineTuning) -> ActivationReader:
        if self.reader is None:
            if module._own_loss.router:
                raise ConfigError(
                    "activation_cache skips layers whose routers are part of the configured router loss: set "
                    "output_router_logits=False in the model's configuration, or train without activation_cache."
                )
            logprob_model, device = module._required_logprob_model(), input_device(module.model).type
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            self.reader = ActivationReader(module.model, self, logprob_model, autocast=autocast)
        return self.reader

    def flush(self) -> None:
        """Write activations that are still in memory."""
        if self.reader is not None:
            self.reader.flush()

    def end_epoch(self, module: FineTuning) -> None:
        """Write activations that are still in memory, and look for those of other ranks."""
        if self.reader is not None:
            self.reader.flush()
            if module._trainer is not None:
                module.trainer.strategy.barrier()  # all ranks have written before one looks
            self.reader.end_epoch(module.current_epoch)

    def end(self) -> None:
        """Write activations that are still in memory, and report how many rows were read."""
        if self.reader is not None:
            self.reader.flush()
            rank_zero_info(
                f"Activation cache: {self.reader.read:,} rows were read, {self.reader.computed:,} were computed."
            )


def default_folder() -> Path:
    """A folder of its own in the cache of the `datasets` library."""
    return cache.default_folder().with_name("lightning_ft_activations")


class ActivationReader:
    """Lets training steps begin at the lowest trained layer.

    Args:
        model: The model, with adapters in its top layers only.
        cache: Folder and limit of the cache.
        logprob_model: Computes the model's log-probabilities.
        autocast: Dtype of matrix products, where it isn't that of the weights.

    Raises:
        ModelError: Where the output of the frozen layers is not the same every time; the message says why.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: ActivationCache,
        logprob_model: LogProbModel,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.frozen = FrozenLayers(model)
        self._model, self._logprob_model, self._cache = model, logprob_model, cache
        key = self.frozen.content_key(str(autocast))
        self.store = ActivationStore(cache.folder, key, limit=int(cache.max_gib * GIB))
        self.read = self.computed = 0
        """Sequences whose states were on disk, and those whose states had to be computed."""
        self.flops = 0
        """Operations spent on computing them."""
        self._by_length: dict[int, int] = {}
        self._verified = self._warned = False

    def announce(self, tokens: int | None) -> None:
        """Announce what will be written, before it is.

        Args:
            tokens: Number of tokens of all training rows, where it is known.

        Raises:
            ConfigError: If it exceeds the limit, or the free disk space.
        """
        each = self.frozen.width * self.frozen.dtype.itemsize
        layers = f"layers 0 to {self.frozen.depth - 1} of {len(self.frozen.layers)}"
        if tokens is None:
            size = f"Each token takes {each:,} bytes, all of them at most {self._cache.max_gib:g} GiB"
        else:
            size = f"{tokens:,} tokens of {each:,} bytes take {tokens * each / GIB:.2f} GiB"
            try:
                self.store.reserve(tokens * each)
            except OSError as error:
                raise ConfigError(
                    f"activation_cache: {error} Pass another folder or a larger max_gib, or train without it."
                ) from error
        rank_zero_info(
            f"Activation cache: {layers} are computed once per row. {size} in {self.store.folder}; {len(self.store):,} "
            "rows are already there."
        )

    @contextmanager
    def around(self, batch: TokenBatch) -> Iterator[None]:
        """In this context the model's forward pass over `batch` runs its trained layers only.

        Raises:
            ModelError: If that differs from a pass through all layers, which is checked with the first batch.
        """
        if batch.has_shared_prefixes:
            raise ModelError("activation_cache: the segments of a batch share prefixes, whose activations aren't kept.")
        batch = self._logprob_model.arranged(self._model, batch)  # probes the model, while all layers run
        if not self._logprob_model.takes_one_pass(self._model, batch):
            raise ModelError(
                f"activation_cache: in {type(base_of(self._model)).__name__} the rows of this batch change each other, "
                "so it takes several passes, and kept activations belong to one. Use batch_size=1, or train without "
                "activation_cache."
            )
        states = self._states(batch)
        if not self._verified:
            self._verify(batch, states)
            self._verified = True
        with self.frozen.replaced_by(states):
            yield

    def _states(self, batch: TokenBatch) -> Tensor:
        """Activations of a batch, ``[b, s, d]``; zero where there is no token, which nothing attends to."""
        ids, segments = batch.input_ids.cpu(), batch.segment_ids.cpu()
        states = torch.zeros(*ids.shape, self.frozen.width, dtype=self.frozen.dtype)
        for row, row_segments in enumerate(segments):
            start = 0
            runs, counts = row_segments.unique_consecutive(return_counts=True)
            for segment, count in zip(runs.tolist(), counts.tolist(), strict=True):
                if segment >= 0:
                    states[row, start : start + count] = self._sequence(ids[row, start : start + count])
                start += count
        return states.to(batch.input_ids.device, non_blocking=True)

    def _sequence(self, input_ids: Tensor) -> Tensor:
        digest = sequence_digest(input_ids)
        if (kept := self.store.get(digest)) is not None:
            self.read += 1
            return kept
        self.computed += 1
        states = self._compute(input_ids)
        if not self.store.put(digest, states) or self.store.failure:
            self._warn_not_kept()
        return states.cpu()

    def flush(self) -> None:
        """Write what was kept in memory."""
        self.store.flush()
        if self.store.failure:
            self._warn_not_kept()

    def _warn_not_kept(self) -> None:
        if self._warned:
            return
        self._warned = True
        if self.store.failure:
            rank_zero_warn(
                f"activation_cache: {self.store.failure} Rows that are not kept are computed in every epoch."
            )
            return
        rank_zero_warn(
            f"The activation cache is full ({self._cache.max_gib:g} GiB in {self._cache.folder}): further rows are "
            "computed in every epoch. Raise max_gib of activation_cache."
        )

    def _compute(self, input_ids: Tensor) -> Tensor:
        """Activations of a sequence; operations are counted once per length, which determines them."""
        if (flops := self._by_length.get(len(input_ids))) is not None:
            self.flops += flops
            with counted_separately():
                return self.frozen.states(input_ids)
        with counted_separately(), OperationCounter() as counter:
            states = self.frozen.states(input_ids)
        self._by_length[len(input_ids)] = counter.flops
        self.flops += counter.flops
        return states

    @torch.no_grad()
    def _verify(self, batch: TokenBatch, states: Tensor) -> None:
        """Compare with a pass through all layers under the same random draws; only rounding may differ."""
        base = base_of(self._model)
        alike = partial(torch.random.fork_rng, devices=_cuda(batch.input_ids.device))  # dropout above draws the same
        try:  # before the pass through all layers, which may leave state of this batch in a layer
            with counted_separately(), alike(), self.frozen.replaced_by(states):
                top = as_forward(base, hidden_states, batch, None).flatten(0, 1)[batch.predictors]
        except torch.OutOfMemoryError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # something is missing
            raise ModelError(
                f"{type(base).__name__}: its upper layers don't run without the lower ones ({error!r}), so "
                "activation_cache can't be used: they depend on more than the output of the layer before."
            ) from error
        with counted_separately(), alike():
            every = as_forward(base, hidden_states, batch, None).flatten(0, 1)[batch.predictors]
        if not len(every):
            return
        apart = float((every.float() - top.float()).abs().max() / every.float().abs().max().clamp(min=1.0))
        exact = self.frozen.dtype == torch.float32 and not torch.is_autocast_enabled(batch.input_ids.device.type)
        limit = 1e-4 if exact else 5e-2
        if not apart <= limit:
            raise ModelError(
                f"{type(base).__name__}: with kept activations of its lower layers the output differs from that of all "
                f"layers (by {apart:.2g} of the largest value, more than {limit:g}), so activation_cache can't be "
                "used: its layers depend on more than the layer before, or are random."
            )
        rank_zero_info(f"Activation cache: verified with the first batch, {apart:.1e} from a pass through all layers.")

    def end_epoch(self, epoch: int) -> None:
        """Look for what other ranks have written.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.store.refresh()
        if epoch == 1 and not self.read:
            rank_zero_warn(
                "No row of the second epoch appeared in the first: with rows that change from epoch to epoch "
                "activation_cache saves nothing and only fills the disk."
            )


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
