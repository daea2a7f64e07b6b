"""Every exception this package raises on purpose.

Each derives from :class:`LightningFTError` (to catch them all) and from the builtin it refines (so that code which
knows nothing of this package still catches it). A message says what was wrong, where, and what to do.
"""


class LightningFTError(Exception):
    """Base of every error of this package."""


class DataError(LightningFTError, ValueError):
    """Rows that can't be trained on; the message lists them with source, row, field, reason and fix."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A data source that doesn't exist."""


class TokenizerError(LightningFTError, ValueError):
    """A tokenizer or chat template that can't be trained with."""


class ModelError(LightningFTError, ValueError):
    """A model, adapter or quantization that can't be loaded as asked."""


class ConfigError(LightningFTError, ValueError):
    """Arguments that contradict each other or aren't allowed."""


class ExportError(LightningFTError, RuntimeError):
    """An export that would not give the same output as the live model, or can't be written."""


class SavingsError(LightningFTError, ValueError):
    """A token-savings measurement that would not be honest or is not defined."""


class RetentionError(LightningFTError, ValueError):
    """A measurement of forgetting that would compare with the wrong weights, or has nothing to read."""


class ComparisonError(LightningFTError, ValueError):
    """Methods that can't be compared: other data, other precision, or figures that would mean nothing."""


class RolloutError(LightningFTError, RuntimeError):
    """A generation that failed outside this process: a server that can't be reached, another rank, a broken answer."""


class RewardError(LightningFTError, ValueError):
    """A reward that can't be found, fails, or isn't one finite number or None for each completion."""


class MissingDependencyError(LightningFTError, ImportError):
    """An optional package that isn't installed; the message says how to install it."""


class NamespaceError(LightningFTError, TypeError):
    """Objects of `pytorch_lightning` and of `lightning.pytorch` mixed in one run."""
