"""Every exception this package raises on purpose.

Each derives from :class:`LightningFTError` (to catch them all) and from the builtin it refines (so that code which
knows nothing of this package still catches it). A message says what was wrong, where, and what to do.
"""

from __future__ import annotations

from lightning_ft.printable import printable


class LightningFTError(Exception):
    """Base of every error of this package.

    Names and texts of the user's, and of whoever wrote the rows, are in its message, which ends on a terminal.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class DataError(LightningFTError, ValueError):
    """Rows that can't be trained on; the message lists them with source, row, field, reason and fix."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A data source that doesn't exist."""


class TokenizerError(LightningFTError, ValueError):
    """A tokenizer or chat template that can't be trained with."""


class ModelError(LightningFTError, ValueError):
    """A model, adapter or quantization that can't be loaded as configured."""


class CheckpointError(ModelError):
    """A checkpoint that is damaged, isn't one, or contains more than tensors and plain values."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint that doesn't exist."""


class FileWriteError(LightningFTError, OSError):
    """A file that can't be written, such as on a full disk; what was there before is unchanged."""


class ConfigError(LightningFTError, ValueError):
    """Arguments that contradict each other or aren't allowed."""


class UnknownArgumentError(ConfigError, TypeError):
    """An argument that a class does not take."""


class ExportError(LightningFTError, RuntimeError):
    """An export that would not give the same output as the live model, or can't be written."""


class NonFiniteError(LightningFTError, FloatingPointError):
    """A loss, gradients, logits or weights that hold NaN or an infinity: the weights were left as they were before."""


class SavingsError(LightningFTError, ValueError):
    """A token-savings measurement that would not be honest or is not defined."""


class MeasurementError(LightningFTError, RuntimeError):
    """Measurements that failed at the end of a run that otherwise completed; the command line exits with 1."""


class GateError(LightningFTError, RuntimeError):
    """Results beyond a limit set for them, of a run that otherwise completed; the command line exits with 3."""


class RetentionError(LightningFTError, ValueError):
    """A measurement of forgetting that would compare with the wrong weights, or has nothing to read."""


class ComparisonError(LightningFTError, ValueError):
    """Methods that can't be compared: other data, other precision, or metrics that would mean nothing."""


class RolloutError(LightningFTError, RuntimeError):
    """A generation that failed outside this process: a server that can't be reached, another rank, a broken answer."""


class RewardError(LightningFTError, ValueError):
    """A reward that can't be found, fails, or isn't one finite number or None for each completion."""


class MissingDependencyError(LightningFTError, ImportError):
    """An optional package that isn't installed; the message says how to install it."""


class NamespaceError(LightningFTError, TypeError):
    """Objects of `pytorch_lightning` and of `lightning.pytorch` mixed in one run."""
