"""Find what was measured below a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_ft.errors import DataError, DataNotFoundError
from lightning_ft.evaluation.result_files import read_result
from lightning_ft.evaluation.savings.result import SavingsResult

if TYPE_CHECKING:
    from lightning_ft.evaluation.comparison.result import Comparison
    from lightning_ft.evaluation.compute.arithmetic import ComputeResult
    from lightning_ft.evaluation.retention.arithmetic import RetentionResult

SAVINGS, RETENTION, COMPUTE, COMPARISON = "token_savings.json", "retention.json", "compute.json", "comparison.json"
UNDEFINED = "undefined.json"
"""In the place of a result, where a measurement failed."""
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Undefined:
    """A measurement that failed.

    Args:
        measurement: What would have been measured, in words.
        reason: Why it wasn't.
    """

    measurement: str
    reason: str


@dataclass(frozen=True)
class RunReport:
    """Everything that was measured of a run, or of several.

    Args:
        savings: By the folder of its file, relative to the one that was searched.
        retention: Likewise.
        compute: Likewise.
        comparison: Of methods, where there is one.
        undefined: Measurements that failed, likewise.
    """

    savings: Mapping[str, SavingsResult] = field(default_factory=dict)
    retention: Mapping[str, RetentionResult] = field(default_factory=dict)
    compute: Mapping[str, ComputeResult] = field(default_factory=dict)
    comparison: Comparison | None = None
    undefined: Mapping[str, Undefined] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to report."""
        return not (self.savings or self.retention or self.compute or self.comparison or self.undefined)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "savings": {name: result.to_dict() for name, result in self.savings.items()},
            "retention": {name: result.to_dict() for name, result in self.retention.items()},
            "compute": {name: result.to_dict() for name, result in self.compute.items()},
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
            "undefined": {name: asdict(failed) for name, failed in self.undefined.items()},
        }


def collect(folder: str | Path, within: Iterable[str] | None = None) -> RunReport:
    """Read all results below a folder.

    Args:
        folder: Of a run (``token_savings/``, ``retention/``, ``compute/`` are in it), of several runs, or the output
            of a comparison.
        within: Only look into these folders in it; by default everywhere.

    Raises:
        DataNotFoundError: If there is no such folder.
        DataError: If a file isn't what its name says, or there is more than one comparison.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataNotFoundError(f"{str(root)!r} is no folder: give the one that a run wrote into.")
    roots = [root] if within is None else [root / name for name in within]
    comparisons = _files(roots, COMPARISON)
    if len(comparisons) > 1:
        found = ", ".join(path.relative_to(root).as_posix() for path in comparisons)
        raise DataError(f"{str(root)!r} holds {len(comparisons)} comparisons ({found}): report on one of them.")

    return RunReport(
        savings=_all(root, roots, SAVINGS, SavingsResult.from_dict),
        retention=_all(root, roots, RETENTION, _retention),
        compute=_all(root, roots, COMPUTE, _compute),
        comparison=read_result(comparisons[0], _comparison) if comparisons else None,
        undefined=_all(root, roots, UNDEFINED, _undefined),
    )


def beside(name: str, others: Mapping[str, _Result]) -> _Result | None:
    """What another measurement of the same run found: callbacks write into neighboring folders.

    Args:
        name: Key of a result.
        others: Results of another kind.

    Returns:
        The one of the same parent folder; None where there is none, or more than one.

    Example:
        >>> beside("version_0/token_savings", {"version_0/retention": 1, "version_1/retention": 2})
        1
    """
    run = PurePosixPath(name).parent
    found = [result for key, result in others.items() if PurePosixPath(key).parent == run]
    return found[0] if len(found) == 1 else None


def run_names(keys: Iterable[str]) -> dict[str, str]:
    """What to call results of one kind: the folder of the run, where that tells them apart.

    Args:
        keys: Of the results.

    Example:
        >>> run_names(["version_0/token_savings", "version_1/token_savings"])
        {'version_0/token_savings': 'version_0', 'version_1/token_savings': 'version_1'}
        >>> run_names(["test_rows", "validation_rows"])
        {'test_rows': 'test_rows', 'validation_rows': 'validation_rows'}
    """
    runs = {key: PurePosixPath(key).parent.as_posix() for key in keys}
    apart = len(set(runs.values())) == len(runs) and "." not in runs.values()
    return runs if apart else {key: key for key in runs}


def _files(roots: Sequence[Path], name: str) -> list[Path]:
    return sorted({path for root in roots for path in root.rglob(name) if path.is_file()})


def _all(
    root: Path, roots: Sequence[Path], name: str, parse: Callable[[Mapping[str, Any]], _Result]
) -> dict[str, _Result]:
    return {path.parent.relative_to(root).as_posix(): read_result(path, parse) for path in _files(roots, name)}


def _retention(values: Mapping[str, Any]) -> RetentionResult:
    from lightning_ft.evaluation.retention.arithmetic import RetentionResult

    return RetentionResult.from_dict(values)


def _compute(values: Mapping[str, Any]) -> ComputeResult:
    from lightning_ft.evaluation.compute.arithmetic import ComputeResult

    return ComputeResult.from_dict(values)


def _comparison(values: Mapping[str, Any]) -> Comparison:
    from lightning_ft.evaluation.comparison.result import Comparison

    return Comparison.from_dict(values)


def _undefined(values: Mapping[str, Any]) -> Undefined:
    return Undefined(str(values["measurement"]), str(values["reason"]))
