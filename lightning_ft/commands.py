"""Subcommands of `lightning-ft` that need no Trainer: `compare` and `report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from lightning_ft.printable import printable

COMMANDS = {
    "compare": "compare ways to train on the same rows: quality, tokens, cost, forgetting, resources",
    "report": "write the report of a run's folder again: HTML, PNG, Markdown, JSON",
}
"""What each does, for the help of the command line."""


def report(folder: str, output: str | None = None) -> None:
    """Write the report of whatever was measured below a folder.

    Args:
        folder: Of a run, of several, or of a comparison.
        output: Where to write; by default ``report`` in that folder.
    """
    from lightning_ft.report.write import write_report

    for path in write_report(folder, output):
        print(printable(str(path)))


def run_command(name: str, args: Sequence[str]) -> None:
    """Parse a subcommand's arguments and run it.

    Args:
        name: One of :data:`COMMANDS`.
        args: What stands behind it.

    Raises:
        SystemExit: For arguments that it doesn't take.
    """
    parser = ArgumentParser(prog=f"lightning-ft {name}", description=COMMANDS[name])
    function: Callable[..., Any]
    if name == "report":
        parser.add_argument("folder", type=str, help="of a run, of several, or of a comparison")
        parser.add_argument("--output", type=str, help="where to write; by default `report` in that folder")
        function = report
    else:
        from lightning_ft.compare.run import compare as function

        parser.add_function_arguments(function, sub_configs=False)
    function(**parser.parse_args(list(args)).as_dict())
