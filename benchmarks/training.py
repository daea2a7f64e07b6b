"""What benchmarks that train have in common: a silent Trainer, weights to start from again, and a reward."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_ft._lightning import Trainer


def silent_trainer(**options: Any) -> Any:
    """A Trainer on the CPU that writes and shows nothing.

    Args:
        options: Of the Trainer, over that.
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
        module: What is trained.
        batches: As the module takes them.
        options: Of the Trainer.
    """
    silent_trainer(max_epochs=1, **options).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


class InitialWeights:
    """The trainable weights of a model as they are now, to be put back."""

    def __init__(self, trained: torch.nn.Module) -> None:
        # accelerate collects garbage whenever a training starts, which takes half a second with all that is imported
        # here: that isn't what a step costs, so what there is by now is left out of it.
        gc.collect()
        gc.freeze()
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        self._kept = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back, and forget the gradients."""
        for parameter, value in self._kept:
            parameter.copy_(value)
            parameter.grad = None


def reward(prompts: Any, completions: Any, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Something that differs between completions, and doesn't ask for their text."""
    return [sum(ids) % 11 / 4 for ids in completion_ids]
