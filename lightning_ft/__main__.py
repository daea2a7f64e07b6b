"""`python -m lightning_ft`, and the `lightning-ft` command."""

from __future__ import annotations

import sys
import traceback
from types import TracebackType

from lightning_ft.commands import COMMANDS, run_command
from lightning_ft.errors import GateError, LightningFTError
from lightning_ft.printable import printable

GATE_FAILED = 3
"""Exit status of a run that went well, with a result that didn't; 1 is an error, 2 are arguments that can't be."""


def main(args: list[str] | None = None) -> None:
    """Run a subcommand; an error that says what to do is printed without its traceback."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_traceback
    given = sys.argv[1:] if args is None else args
    try:
        if given and given[0] in COMMANDS:
            run_command(given[0], given[1:])
        else:
            from lightning_ft.cli import FineTuningCLI

            FineTuningCLI(args=args)
    except GateError as error:
        print(f"lightning-ft: {error}", file=sys.stderr)
        sys.exit(GATE_FAILED)
    except LightningFTError as error:
        sys.exit(f"lightning-ft: {type(error).__name__}: {error}")


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, with nothing in it that a terminal obeys: errors of other libraries quote what they read."""
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))


if __name__ == "__main__":
    main()
