"""Chooses between `pytorch_lightning` and `lightning.pytorch`; the only module that imports Lightning.

The two packages are the same code under two names, and a LightningModule of one raises a TypeError in the Trainer of
the other. The choice is made once, when the first name that needs Lightning is used. It is, in this order:

1. the environment variable ``LIGHTNING_FT_NAMESPACE`` (``pytorch_lightning`` or ``lightning``);
2. the package that is already imported (`pytorch_lightning` if both are, with a warning);
3. the package that is installed (`pytorch_lightning` if both are).

If both are imported, callbacks and DataModules inherit from both, so they work with either Trainer. LightningModules
can't.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_ft.errors import ConfigError, NamespaceError

VARIABLE = "LIGHTNING_FT_NAMESPACE"
_MODULES = {"pytorch_lightning": "pytorch_lightning", "lightning": "lightning.pytorch"}


def _choose() -> str:
    """Choose the Lightning package; returns a key of `_MODULES`."""
    if value := os.environ.get(VARIABLE):
        name = "lightning" if value == "lightning.pytorch" else value
        if name not in _MODULES:
            raise ConfigError(f"{VARIABLE}={value!r}: expected 'pytorch_lightning' or 'lightning'.")
        return name
    imported = [name for name, module in _MODULES.items() if module in sys.modules]
    if len(imported) == 2:
        warnings.warn(
            "Both pytorch_lightning and lightning.pytorch are imported; lightning_ft uses pytorch_lightning. "
            f"Set the environment variable {VARIABLE}=lightning if your Trainer is lightning.pytorch's.",
            stacklevel=3,
        )
    if imported:
        return imported[0]
    return next((name for name in _MODULES if importlib.util.find_spec(name)), "pytorch_lightning")


NAMESPACE: str = _choose()
"""Lightning package in use: ``"pytorch_lightning"`` or ``"lightning"``."""

_pl: ModuleType = importlib.import_module(_MODULES[NAMESPACE])
_both = [sys.modules[module] for module in _MODULES.values() if module in sys.modules]
_both.sort(key=lambda module: module is not _pl)

if TYPE_CHECKING:
    import torch
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
    from pytorch_lightning.plugins import CheckpointIO as CheckpointIO
    from pytorch_lightning.plugins import TorchCheckpointIO
    from pytorch_lightning.utilities.types import OptimizerLRScheduler as OptimizerLRScheduler

    restricted_classmethod = classmethod
else:
    TorchCheckpointIO = _pl.plugins.TorchCheckpointIO
    restricted_classmethod = importlib.import_module(f"{_pl.__name__}.utilities.model_helpers")._restricted_classmethod
    MisconfigurationException = importlib.import_module(
        f"{_pl.__name__}.utilities.exceptions"
    ).MisconfigurationException
    LightningModule = _pl.LightningModule
    Trainer = _pl.Trainer
    Callback = _pl.Callback if len(_both) == 1 else type("Callback", tuple(m.Callback for m in _both), {})
    LightningDataModule = (
        _pl.LightningDataModule
        if len(_both) == 1
        else type("LightningDataModule", tuple(m.LightningDataModule for m in _both), {})
    )


def cli_module() -> ModuleType:
    """Import the module that defines `LightningCLI`; done on demand, since it imports jsonargparse."""
    return importlib.import_module(_MODULES[NAMESPACE] + ".cli")


def available_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOPs per second of a device for a dtype, from Lightning's table; None if the table doesn't list it."""
    fabric = "lightning.fabric" if NAMESPACE == "lightning" else "lightning_fabric"
    found = importlib.import_module(f"{fabric}.utilities.throughput").get_available_flops(device, dtype)
    return None if found is None else float(found)


def active_datamodule(trainer: Any) -> Any:
    """DataModule that the current or last call of a Trainer reads its batches from; None if it reads from loaders.

    `trainer.datamodule` is that of an earlier call if loaders are passed to a later one.

    Args:
        trainer: The Trainer; Fabric and None, which have no DataModule, give None.
    """
    data, state = getattr(trainer, "datamodule", None), getattr(trainer, "state", None)
    if data is None or state is None or state.fn is None:
        return None
    loop = getattr(trainer, f"{state.fn.value}_loop")
    if state.fn == "fit" and (trainer.validating or trainer.sanity_checking):
        loop = loop.epoch_loop.val_loop  # its loaders may be passed without those of training, and the reverse
    return data if loop._data_source.instance is data else None


def check_same_namespace(trainer: object, module: object) -> None:
    """Refuse to combine a Trainer of one Lightning package with a LightningModule of the other.

    Raises:
        NamespaceError: If the packages differ. The message names the environment variable that selects one.
    """
    names = []
    for instance, base in ((trainer, "Trainer"), (module, "LightningModule")):
        packages = {c.__module__.split(".")[0] for c in type(instance).__mro__ if c.__name__ == base}
        names.append(packages & set(_MODULES))
    if names[0] and names[1] and not names[0] & names[1]:
        raise NamespaceError(
            f"The Trainer comes from {names[0].pop()} and the module from {names[1].pop()}. Import both from the same "
            f"package, or set {VARIABLE} to the Trainer's package before lightning_ft is used."
        )


def warn_of_late_import() -> None:
    """Warn that the other Lightning package was imported after the choice, since its Trainer refuses these modules."""
    late = [module for module in _MODULES.values() if module in sys.modules and module != _MODULES[NAMESPACE]]
    if late and len(_both) == 1 and not os.environ.get(VARIABLE):
        warnings.warn(
            f"{late[0]} was imported after lightning_ft, which uses {_MODULES[NAMESPACE]}. Its Trainer doesn't take "
            f"modules of the other package: import {late[0]} before lightning_ft, or set {VARIABLE}.",
            stacklevel=4,
        )


__all__ = [
    "NAMESPACE",
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "MisconfigurationException",
    "TorchCheckpointIO",
    "Trainer",
    "active_datamodule",
    "available_flops",
    "check_same_namespace",
    "cli_module",
    "restricted_classmethod",
    "warn_of_late_import",
]
