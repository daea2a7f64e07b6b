"""Exceptions that this package raises.

Each derives from :class:`LightningFTError`, to catch them all, and from a builtin exception, so that code which doesn't
know this package catches it too. A message says what was found, where, and what to do.
"""

from __future__ import annotations

from lightning_ft.printable import printable


class LightningFTError(Exception):
    """Base class of the exceptions of this package.

    Messages quote names from the user and text from rows, so characters that a terminal would interpret are escaped.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class DataError(LightningFTError, ValueError):
    """Rows that can't be trained on. The message lists each with source, row, field, reason and remedy."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A data source that doesn't exist."""


class TokenizerError(LightningFTError, ValueError):
    """A tokenizer or chat template that can't be trained with."""


class ModelError(LightningFTError, ValueError):
    """A model, adapter or quantization that can't be loaded as configured."""


class CheckpointError(ModelError):
    """A file that is damaged, isn't a checkpoint, or contains more than tensors and plain values."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint that doesn't exist."""


class FileWriteError(LightningFTError, OSError):
    """A file that can't be written, such as on a full disk. An earlier file of the same name is unchanged."""


class ConfigError(LightningFTError, ValueError):
    """Arguments that contradict each other or aren't allowed."""


class UnknownArgumentError(ConfigError, TypeError):
    """An argument that a class does not accept."""


class MissingArgumentError(ConfigError, TypeError):
    """An argument without a default that wasn't passed."""


class ExportError(LightningFTError, RuntimeError):
    """An export that would not produce the same output as the model in memory, or can't be written."""


class HubError(ExportError):
    """An upload to the Hugging Face hub that is refused or failed. The export in its folder is unchanged."""


class NonFiniteError(LightningFTError, FloatingPointError):
    """A loss, gradients, logits or weights with NaN or infinite values. The weights are those before the step."""


class SavingsError(LightningFTError, ValueError):
    """A measurement of token savings that would be misleading or is undefined."""


class MeasurementError(LightningFTError, RuntimeError):
    """Measurements that failed in a run that otherwise completed. The command line exits with status 1."""


class GateError(LightningFTError, RuntimeError):
    """Results beyond a configured limit, of a run that otherwise completed. The command line exits with status 3."""


class RetentionError(LightningFTError, ValueError):
    """A measurement of forgetting that would compare with the wrong weights, or has no texts."""


class ComparisonError(LightningFTError, ValueError):
    """Methods that can't be compared: different data, different precision, or meaningless metrics."""


class RolloutError(LightningFTError, RuntimeError):
    """Generation that failed outside this process: an unreachable server, another rank, an invalid response."""


class RewardError(LightningFTError, ValueError):
    """A reward function that can't be found, fails, or returns anything but a finite number or None per completion."""


class MissingDependencyError(LightningFTError, ImportError):
    """An optional package that isn't installed. The message says how to install it."""


class NamespaceError(LightningFTError, TypeError):
    """Objects of `pytorch_lightning` and of `lightning.pytorch` in the same run."""
