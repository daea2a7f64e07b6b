"""`python -m lightning_ft`, and the `lightning-ft` command: Trainer subcommands, `compare` and `report`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType

from jsonargparse import ArgumentParser

from lightning_ft.errors import GateError, LightningFTError
from lightning_ft.printable import printable

GATE_FAILED = 3
"""Exit status of a run that completed with results beyond a limit. 1 means an error, 2 invalid arguments."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

COMMANDS = {
    "compare": "compare methods trained on the same rows: quality, tokens, cost, forgetting, resources",
    "plan": "forecast what fine-tuning saves, takes and reaches, before any training",
    "report": "rewrite the report of a run's folder: HTML, PNG, Markdown, JSON",
}
"""Help text of each subcommand that needs no Trainer."""


def main(args: list[str] | None = None) -> None:
    """Run a subcommand. An error of this package says what to do, so it is printed without a traceback."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_traceback
    arguments = sys.argv[1:] if args is None else args
    try:
        if arguments and arguments[0] in COMMANDS:
            run_command(arguments[0], arguments[1:])
        else:
            from lightning_ft.cli import FineTuningCLI

            also = "; ".join(f"`{name}`: {text}" for name, text in COMMANDS.items())
            FineTuningCLI(
                args=args,
                description=f"Fine-tune language models. Also: {also}",
                parser_kwargs={"prog": "lightning-ft"},
                other_parsers=lambda: {name: command_parser(name)[0] for name in COMMANDS},
            )
    except GateError as error:
        print(f"lightning-ft: {error}", file=sys.stderr)
        sys.exit(GATE_FAILED)
    except LightningFTError as error:
        sys.exit(f"lightning-ft: {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        continues = arguments[:1] in (["compare"], ["plan"])
        hint = " The same command goes on: complete runs are kept, and others resume." if continues else ""
        print(f"lightning-ft: Interrupted.{hint}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def report(folder: str, output: str | None = None) -> None:
    """Write the report of all measurements in a folder and its subfolders.

    Args:
        folder: Folder of a run, of several runs, or of a comparison.
        output: Folder to write to; ``report`` in `folder` by default.
    """
    from lightning_ft.report.write import write_report

    for path in write_report(folder, output):
        print(printable(str(path)))


def run_command(name: str, args: Sequence[str]) -> None:
    """Parse the arguments of a subcommand and run it.

    Args:
        name: One of :data:`COMMANDS`.
        args: Command-line arguments after the name.

    Raises:
        SystemExit: For arguments that the subcommand doesn't accept.
    """
    parser, function = command_parser(name)
    function(**parser.parse_args(list(args)).as_dict())


def command_parser(name: str) -> tuple[ArgumentParser, Callable[..., object]]:
    """The parser of a subcommand, and the function that takes what it parses.

    Args:
        name: One of :data:`COMMANDS`.
    """
    from lightning_ft.parser import CommandParser

    parser = CommandParser(prog=f"lightning-ft {name}", description=COMMANDS[name])
    if name == "report":
        parser.add_argument("folder", type=str, help="folder of a run, of several runs, or of a comparison")
        parser.add_argument("--output", type=str, help="folder to write to; `report` in that folder by default")
        return parser, report
    function: Callable[..., object]
    if name == "plan":
        from lightning_ft.planning.command import plan as function
    else:
        from lightning_ft.compare.run import compare as function
    parser.add_function_arguments(function, sub_configs=False)
    return parser, function


def _print_traceback(error_type: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback without control characters, since errors of other libraries quote the files they read."""
    sys.stderr.write(printable("".join(traceback.format_exception(error_type, error, trace))))


if __name__ == "__main__":
    main()
