"""Tools of benchmarks that train: a silent Trainer, restorable weights, and a reward."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_ft._lightning import Trainer


def silent_trainer(**options: Any) -> Any:
    """Create a Trainer on the CPU that writes and prints nothing.

    Args:
        options: Arguments of the Trainer, which override these defaults.
    """
    silent: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tempfile.gettempdir(),
    }
    return Trainer(**{**silent, **options})


def fit(module: Any, batches: Sequence[Any], **options: Any) -> None:
    """Train once on each batch.

    Args:
        module: Module to train.
        batches: Batches in the form that the module's `training_step` takes.
        options: Further arguments of the Trainer.
    """
    forget_last_fit(module)
    silent_trainer(max_epochs=1, **options).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


def forget_last_fit(module: Any) -> None:
    """Free the Trainer of a module's last fit, whose optimizer would count as memory of the next one.

    The module and the Trainer refer to one another, so that only a collection of garbage frees them.
    """
    module.trainer = None
    gc.collect()


class InitialWeights:
    """Copy of a model's current trainable weights, to restore them later."""

    def __init__(self, trained: torch.nn.Module) -> None:
        # accelerate collects garbage at the start of each training, which takes half a second with everything that is
        # imported here. That is no cost of a step, so existing objects are excluded from collection.
        gc.collect()
        gc.freeze()
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        self._kept = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the weights, and clear the gradients."""
        for parameter, value in self._kept:
            parameter.copy_(value)
            parameter.grad = None


def reward(prompts: Any, completions: Any, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """A reward that differs between completions and doesn't depend on their text."""
    return [sum(ids) % 11 / 4 for ids in completion_ids]
