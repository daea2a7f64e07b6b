"""The parser of the command line: Lightning's, with hints in its errors."""

from __future__ import annotations

import inspect
import os
import pydoc
import re
import sys
from collections.abc import Iterable

import lightning_ft
from lightning_ft._lightning import _pl, cli_module
from lightning_ft.arguments import did_you_mean, did_you_mean_path
from lightning_ft.completion import PrintCompletion

_UNKNOWN_OPTION = re.compile(r"given class_path '(?P<path>[\w.]+)':\s+Option '(?P<name>\w+)' is not accepted")
_UNKNOWN_NAME = re.compile(r"module '(?P<path>[\w.]+)' has no attribute '(?P<name>\w+)'")
_UNKNOWN_KEY = re.compile(
    r"(?:Option '|does not accept option '|unrecognized arguments: --)"
    r"(?P<name>\w+\.[\w.]+)(?:'(?: is not accepted)?|[^\n]*)"
)
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\w+)(?=\n|$)")
_UNKNOWN_SUBCOMMAND = re.compile(r"argument subcommand: invalid choice: '(?P<name>[^']*)' \(choose from [^)]*\)")
_NO_FILE = re.compile(r"File does not exist: '(?P<path>[^']+)'")
_SAYS_NOTHING = re.compile(
    r"\n *(?:Does not validate against any of the Union subtypes|Subtypes: .*|- Expected a <class 'NoneType'>"
    r"|Given value type: .*|Given value: NestedArg\(.*|Errors:(?=\n *Given value: (?!NestedArg)))(?=\n|$)"
)
"""Lines of the parser's errors that repeat the argument's type, or the whole configuration around it."""
_NO_ENGINE = re.compile(r"Import path [\w.]+ does not implement protocol RolloutEngine(?!\. Its)")


class FineTuningParser(cli_module().LightningArgumentParser):  # type: ignore[misc]
    """Lightning's parser, with hints in its errors: the closest valid name, and what an engine needs."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Print the error in a few lines, without the fifty options that the subcommand has, and exit.

        Args:
            message: Error message.
            ex: Exception that caused the error.
        """
        parser = getattr(ex, "subcommand_parser", None) or self
        keys = [action.dest for action in parser._actions]
        message = _with_nearest_names(message, keys)
        message = _UNKNOWN_SUBCOMMAND.sub(lambda match: _with_subcommands(match, self._subcommands()), message)
        parser.print_usage = lambda *_: None
        super().error(_SAYS_NOTHING.sub("", _with_hint_for_engines(message)), ex)

    def _subcommands(self) -> list[str]:
        """Names of all subcommands of the program, those that need no Trainer included."""
        return [name for action in self._actions if isinstance(action, PrintCompletion) for name in action.parsers()]


def _with_nearest_names(message: str, keys: Iterable[str]) -> str:
    """Add to a message the closest class, argument of a class, name of a module, or key of the parser."""

    def arguments(path: str) -> Iterable[str]:
        cls = pydoc.locate(path)
        return inspect.signature(cls).parameters if isinstance(cls, type) else ()

    def names(path: str) -> Iterable[str]:
        module = sys.modules.get(path)
        return getattr(module, "__all__", None) or dir(module)

    classes = (*lightning_ft.__all__, *_pl.callbacks.__all__, *_pl.loggers.__all__)
    message = _NO_FILE.sub(lambda match: f"{match[0]}.{did_you_mean_path(os.path.relpath(match['path']))}", message)
    message = _UNKNOWN_OPTION.sub(lambda match: _suggest(match, arguments(match["path"])), message)
    message = _UNKNOWN_NAME.sub(lambda match: _suggest(match, names(match["path"])), message)
    message = _UNKNOWN_CLASS.sub(lambda match: _suggest(match, classes), message)
    return _UNKNOWN_KEY.sub(lambda match: _suggest(match, keys), message)


def _suggest(match: re.Match[str], names: Iterable[str]) -> str:
    hint = did_you_mean(match["name"], names)
    return f"{match[0]}.{hint}" if hint else match[0]


def _with_subcommands(match: re.Match[str], names: Iterable[str]) -> str:
    """List all subcommands, since argparse knows only those that need a Trainer."""
    if not (names := list(names)):
        return match[0]
    return (
        f"argument subcommand: invalid choice: {match['name']!r} (choose from {', '.join(names)})."
        f"{did_you_mean(match['name'], names)}"
    )


def _with_hint_for_engines(message: str) -> str:
    """Add to a message about a class of an engine that its annotations are compared, which the parser leaves out."""
    return _NO_ENGINE.sub(
        lambda match: (
            f"{match[0]}. Its methods are compared with those of lightning_ft.rollout.protocol.RolloutEngine, types "
            "included: annotate their parameters and returned values as there"
        ),
        message,
    )
