"""Shell completion of the command line: a script for bash, zsh or tcsh, which shtab writes.

jsonargparse can make one too, from the types of all arguments of all classes that an option may name. For LightningCLI
these don't end (a RecursionError). So shtab gets the options of each subcommand here, and those of this package's
classes.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning_ft
from lightning_ft._lightning import Callback, LightningDataModule, LightningModule
from lightning_ft.errors import MissingDependencyError

SHELLS = ("bash", "zsh", "tcsh")
Parsers = Callable[[], Mapping[str, argparse.ArgumentParser]]

_CLASSES: dict[str, type] = {
    "--model": LightningModule,
    "--data": LightningDataModule,
    "--trainer.callbacks+": Callback,
}
"""Options that name a class, with the base of the classes of this package that they take."""
_PATHS = ("config", "ckpt_path", "output", "folder")
"""Last part of the options whose value is a path."""


class PrintCompletion(argparse.Action):
    """Option that prints the script and exits.

    Args:
        args: Arguments of `argparse.Action`.
        parsers: Function that returns the parser of each subcommand.
        kwargs: Further arguments of `argparse.Action`.
    """

    def __init__(self, *args: Any, parsers: Parsers, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parsers = parsers

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, values: Any, option: object = None) -> None:
        """Print the script."""
        print(completion_script(parser.prog, self.parsers(), values))
        parser.exit()


def completion_script(prog: str, parsers: Mapping[str, argparse.ArgumentParser], shell: str) -> str:
    """Return the script that completes subcommands, options, names of classes, and paths.

    Args:
        prog: Name of the command.
        parsers: Parser of each subcommand.
        shell: One of :data:`SHELLS`.

    Raises:
        MissingDependencyError: If shtab isn't installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise MissingDependencyError(
            "Shell completion needs the package shtab: pip install 'lightning-ft[completion]'."
        ) from error
    root = argparse.ArgumentParser(prog=prog)
    subparsers = root.add_subparsers()
    for name, parser in parsers.items():
        _copy(parser, subparsers.add_parser(name, help=_one_line(parser.description) or name), shtab.FILE)
    return str(shtab.complete(root, shell))


def _copy(source: argparse.ArgumentParser, target: argparse.ArgumentParser, files: Any) -> None:
    """Add to a parser the arguments of another, and those of the classes that they may name."""
    for action in source._actions:
        if action.dest == "help" or action.help == argparse.SUPPRESS:
            continue
        for option in action.option_strings or [action.dest]:  # one by one, since their values differ
            classes = _public_classes(_CLASSES[option]) if option in _CLASSES else {}
            added = target.add_argument(option, help=_one_line(action.help))
            added.choices = list(classes) or action.choices
            if action.dest.split(".")[-1] in _PATHS:
                added.complete = files  # type: ignore[attr-defined]
        for base in ("--model", "--data"):
            if base in action.option_strings:
                for name in _arguments(_public_classes(_CLASSES[base])):
                    target.add_argument(f"{base}.{name}")


def _arguments(classes: Mapping[str, type]) -> list[str]:
    """Names of the arguments of classes, each once."""
    return list(dict.fromkeys(name for cls in classes.values() for name in inspect.signature(cls).parameters))


def _public_classes(base: type) -> dict[str, type]:
    """This package's classes that derive from a base, by name."""
    found = {name: getattr(lightning_ft, name) for name in lightning_ft.__all__}
    return {name: cls for name, cls in found.items() if isinstance(cls, type) and issubclass(cls, base)}


def _one_line(text: str | None) -> str:
    """The first sentence of a help text, which a shell shows in a line."""
    first = " ".join((text or "").split()).partition(". ")[0]
    return first.replace("%", "%%")
