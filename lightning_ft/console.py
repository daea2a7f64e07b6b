"""Messages of other libraries that no one can act on; they are hidden, each by its own text.

A log message is hidden by a filter of the logger that writes it, a warning by Python's filter. Anything else that these
libraries say is still shown. With `python -W ...` or ``PYTHONWARNINGS``, warnings are shown as configured there.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_RANK_ZERO = tuple(
    f"{package}.utilities.rank_zero"
    for package in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")
)

LOG_MESSAGES: dict[str, tuple[str, ...]] = {
    # A kernel for inference in 4 bits. Modules here don't use it, since it has no gradients, and PEFT imports
    # bitsandbytes in runs without quantization too.
    r"Failed to load CPU gemm_4bit_forward": ("bitsandbytes.backends.cpu.ops",),
    # Once per layer and step, of a cast that the kernel makes for every base that isn't in float16.
    r"MatMul8bitLt: inputs will be cast": ("bitsandbytes.autograd._functions",),
    r"💡 Tip: ": _RANK_ZERO,  # services of Lightning's company
}
"""Pattern of the beginning of each hidden message, with the names of the loggers that write it."""

WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # PEFT calls what transformers has deprecated, and Lightning what torch has.
    (r"`is_gradient_checkpointing` is deprecated", FutureWarning),
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
    # The modules convert batches of transformers there, whatever DataModule is used.
    (r"You have overridden `on_after_batch_transfer` in `LightningModule`", UserWarning),
)
"""Pattern of the beginning of each hidden warning, with its category."""

WARNINGS_WITHOUT_FIT: tuple[tuple[str, type[Warning]], ...] = (
    # About choosing the best checkpoints, of which a run without training writes none.
    (r"The dirpath has changed from ", UserWarning),
)
"""Those that are hidden in addition where nothing is trained."""

WARNINGS_OF_OWN_STEPS: tuple[tuple[str, type[Warning]], ...] = (
    # Weights after the step are what a checkpoint should have. What it advises needs a module with a `layer`.
    (r"Using ModelCheckpoint with manual optimization and every_n_train_steps", UserWarning),
)
"""Those that are hidden in addition where a module of this package takes its own optimizer steps."""


class _Without(logging.Filter):
    """Refuses the messages that begin with a pattern."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.pattern.match(record.getMessage()) is None


def hide_log_messages() -> None:
    """Hide what :data:`LOG_MESSAGES` lists."""
    for pattern, names in LOG_MESSAGES.items():
        for name in names:
            logging.getLogger(name).addFilter(_Without(pattern))


@contextmanager
def hidden_log_messages(pattern: str, name: str) -> Iterator[None]:
    """Hide log messages that this package has a message of its own for, within the block.

    Args:
        pattern: Pattern of their beginning.
        name: Name of the logger that writes them.
    """
    logger, hidden = logging.getLogger(name), _Without(pattern)
    logger.addFilter(hidden)
    try:
        yield
    finally:
        logger.removeFilter(hidden)


def hide_warnings(hidden: tuple[tuple[str, type[Warning]], ...] = WARNINGS) -> None:
    """Hide warnings, unless Python was told which to show.

    Args:
        hidden: Patterns of their text, each with its category.
    """
    if not sys.warnoptions:
        for pattern, category in hidden:
            warnings.filterwarnings("ignore", pattern, category)
