"""The parsers of the command line, with hints in their errors: Lightning's, and that of `compare`, `plan`, `report`."""

from __future__ import annotations

import inspect
import os
import pydoc
import re
import sys
from argparse import Action
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

import lightning_ft
from lightning_ft._lightning import _pl, cli_module
from lightning_ft.arguments import did_you_mean, did_you_mean_path, hint_for_argument
from lightning_ft.completion import PrintCompletion

_UNKNOWN_OPTION = re.compile(r"given class_path '(?P<path>[\w.]+)':\s+Option '(?P<name>\w+)' is not accepted")
_UNKNOWN_NAME = re.compile(r"module '(?P<path>[\w.]+)' has no attribute '(?P<name>\w+)'")
_UNKNOWN_KEY = re.compile(
    r"(?:(?:Option '|does not accept option ')(?P<name>\w+\.[\w.]+)'(?: is not accepted)?"
    r"|unrecognized arguments: --(?P<option>[\w.]+)[^\n]*)"
)
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\w+)(?=\n|$)")
_UNKNOWN_SUBCOMMAND = re.compile(r"argument subcommand: invalid choice: '(?P<name>[^']*)' \(choose from [^)]*\)")
_NO_FILE = re.compile(r"File does not exist: '(?P<path>[^']+)'")
_SAYS_NOTHING = re.compile(
    r"\n *(?:Does not validate against any of the Union subtypes|Subtypes: .*|- Expected a <class 'NoneType'>"
    r"|Given value type: .*|Given value: (?:NestedArg|Namespace)\(.*"
    r"|Errors:(?=\n *Given value: (?!NestedArg|Namespace)))(?=\n|$)"
)
"""Lines of the parser's errors that repeat the argument's type, or the whole configuration around it."""
_NO_ENGINE = re.compile(r"Import path [\w.]+ does not implement protocol RolloutEngine(?!\. Its)")
_PATH_OF_FILE = re.compile(r"Unexpected import path format: (?P<path>\S+\.py:(?P<name>\w+))")
_UNUSED_VALUES = re.compile(r"unrecognized arguments: (?P<value>[^-\s]\S*)[^\n]*")
_NO_VALUE = re.compile(r"argument (?:\S*/)?(?P<option>--[\w.]+): expected one argument")


class _QuotedArguments:
    """Part of a parser: keeps the arguments that it parses, which an error may quote."""

    _command_line: Sequence[str] = ()

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:
        """Parse the arguments, and keep them."""
        self._command_line = sys.argv[1:] if args is None else args
        return super().parse_args(args, *others, **options)  # type: ignore[misc]


class CommandParser(_QuotedArguments, ArgumentParser):  # type: ignore[misc]
    """The parser of a subcommand that needs no Trainer, with hints in its errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Print the error and exit.

        Args:
            message: Error message.
            ex: Exception that caused the error.
        """
        keys = [action.dest for action in self._actions]
        message = _with_values(_with_nearest_names(message, keys), self._command_line, self._actions, commas=True)
        super().error(message, ex)


class FineTuningParser(_QuotedArguments, cli_module().LightningArgumentParser):  # type: ignore[misc]
    """Lightning's parser, with hints in its errors: the closest valid name, and what an engine needs."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Print the error in a few lines, without the fifty options that the subcommand has, and exit.

        Args:
            message: Error message.
            ex: Exception that caused the error.
        """
        parser = getattr(ex, "subcommand_parser", None) or self
        keys = [action.dest for action in parser._actions]
        message = _with_values(_with_nearest_names(message, keys), self._command_line, parser._actions)
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
    message = _UNKNOWN_OPTION.sub(
        lambda match: _continued(match[0], hint_for_argument(match["name"], list(arguments(match["path"])))), message
    )
    message = _UNKNOWN_NAME.sub(lambda match: _suggest(match, names(match["path"])), message)
    message = _UNKNOWN_CLASS.sub(lambda match: _suggest(match, classes), message)
    message = _PATH_OF_FILE.sub(lambda match: _continued(match[0], _hint_for_file(match)), message)
    return _UNKNOWN_KEY.sub(lambda match: _suggest(match, keys), message)


def _hint_for_file(match: re.Match[str]) -> str:
    return (
        f" class_path takes import paths, as in my_module.{match['name']}. A reward in a file is named by `function`: "
        f"rewards: {{function: {match['path']}, init_args: ...}}."
    )


def _with_values(message: str, words: Sequence[str], actions: Iterable[Action], *, commas: bool = False) -> str:
    """Add to a message how to write a list, a text with spaces, or a value that is true.

    Args:
        message: Error message.
        words: Arguments of the command line.
        actions: Options of the parser.
        commas: Whether options that take lists take them as text with commas.

    Example:
        >>> _with_values("unrecognized arguments: 1 2", ["--seeds", "0", "1", "2"], [])
        "unrecognized arguments: 1 2. --seeds takes one value: '0 1 2' in quotes, or a list '[0, 1, 2]'."
    """
    types = {option: getattr(action, "_typehint", None) for action in actions for option in action.option_strings}

    def values(match: re.Match[str]) -> str:
        option, found = _values_around(words, match["value"])
        if not found and Path(match["value"]).suffix in (".yaml", ".yml"):
            return f"{match[0]}. Write --config {match['value']}."
        if len(found) < 2:
            return match[0]
        quoted = f"'{' '.join(found)}' in quotes"
        if not commas:
            return f"{match[0]}. {option} takes one value: {quoted}, or a list '[{', '.join(found)}]'."
        one = f"{option} {','.join(found)}" if "list" in str(types.get(option)) else quoted
        return f"{match[0]}. {option} takes one value: {one}."

    def value(match: re.Match[str]) -> str:
        return f"{match[0]}. Write {match['option']} true." if types.get(match["option"]) is bool else match[0]

    return _NO_VALUE.sub(value, _UNUSED_VALUES.sub(values, message))


def _values_around(words: Sequence[str], value: str) -> tuple[str, list[str]]:
    """The option before a value of the command line, and all values that follow that option."""
    option, found = "", list[str]()
    for argument in words:
        if argument.startswith("--"):
            if value in found[1:]:
                break
            option, found = argument, []
        else:
            found.append(argument)
    return option, found if option and value in found[1:] else []


def _suggest(match: re.Match[str], names: Iterable[str]) -> str:
    return _continued(match[0], did_you_mean(match["name"] or match["option"], names))


def _continued(message: str, hint: str) -> str:
    return f"{message}.{hint}" if hint else message


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
