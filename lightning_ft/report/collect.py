"""Collection of the results that runs wrote below a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_ft.arguments import did_you_mean_path
from lightning_ft.errors import DataError, DataNotFoundError
from lightning_ft.evaluation.result_files import read_result
from lightning_ft.evaluation.savings.result import SavingsResult

if TYPE_CHECKING:
    from lightning_ft.evaluation.comparison.result import Comparison
    from lightning_ft.evaluation.compute.arithmetic import ComputeResult
    from lightning_ft.evaluation.retention.arithmetic import RetentionResult
    from lightning_ft.evaluation.retention.frontier import FrontierResult

SAVINGS, RETENTION, COMPUTE, COMPARISON = "token_savings.json", "retention.json", "compute.json", "comparison.json"
FRONTIER = "retention_frontier.json"
UNDEFINED = "undefined.json"
"""Name of the file that a failed measurement writes instead of its result."""
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class FailedMeasurement:
    """A measurement that failed, so that its result is undefined.

    Args:
        measurement: Name of what was to be measured.
        reason: Reason of the failure.
    """

    measurement: str
    reason: str


@dataclass(frozen=True)
class RunReport:
    """Results of one or several runs.

    Keys are the folders of the result files, relative to the folder that was searched.

    Args:
        savings: Token savings by folder.
        retention: Retention results by folder.
        compute: Compute results by folder.
        frontiers: Retention frontiers by folder.
        comparison: Comparison of methods, if there is one.
        undefined: Failed measurements by folder.
    """

    savings: Mapping[str, SavingsResult] = field(default_factory=dict)
    retention: Mapping[str, RetentionResult] = field(default_factory=dict)
    compute: Mapping[str, ComputeResult] = field(default_factory=dict)
    frontiers: Mapping[str, FrontierResult] = field(default_factory=dict)
    comparison: Comparison | None = None
    undefined: Mapping[str, tuple[FailedMeasurement, ...]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether no result was found."""
        return not (
            self.savings or self.retention or self.compute or self.frontiers or self.comparison or self.undefined
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return {
            "savings": {name: result.to_dict() for name, result in self.savings.items()},
            "retention": {name: result.to_dict() for name, result in self.retention.items()},
            "compute": {name: result.to_dict() for name, result in self.compute.items()},
            "frontiers": {name: result.to_dict() for name, result in self.frontiers.items()},
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
            "undefined": {name: [asdict(each) for each in failed] for name, failed in self.undefined.items()},
        }


def collect(folder: str | Path, within: Iterable[str] | None = None) -> RunReport:
    """Read all results below a folder.

    Args:
        folder: Folder of a run (with ``token_savings/``, ``retention/`` and ``compute/``), parent folder of several
            runs, or output folder of a comparison.
        within: Names of the subfolders to search; by default all of `folder` is searched.

    Raises:
        DataNotFoundError: If `folder` doesn't exist.
        DataError: If a file can't be read as the result that its name indicates, or there are several comparisons.
    """
    root = Path(folder)
    if not root.is_dir():
        hint = did_you_mean_path(root) or " Pass the folder that a run wrote its results to."
        raise DataNotFoundError(f"{str(root)!r} is not a folder.{hint}")
    roots = [root] if within is None else [root / name for name in within]
    comparisons = _files(roots, COMPARISON)
    if len(comparisons) > 1:
        found = ", ".join(path.relative_to(root).as_posix() for path in comparisons)
        raise DataError(
            f"{str(root)!r} contains {len(comparisons)} comparisons ({found}). Pass the folder of one of them."
        )

    return RunReport(
        savings=_read_all(root, roots, SAVINGS, SavingsResult.from_dict),
        retention=_read_all(root, roots, RETENTION, _retention),
        compute=_read_all(root, roots, COMPUTE, _compute),
        frontiers=_read_all(root, roots, FRONTIER, _frontier),
        comparison=read_result(comparisons[0], _comparison) if comparisons else None,
        undefined=_read_all(root, roots, UNDEFINED, _undefined),
    )


def same_run_result(key: str, others: Mapping[str, _Result]) -> _Result | None:
    """Find the result of another measurement of the same run: callbacks write to sibling folders.

    Args:
        key: Folder of a result, as in :class:`RunReport`.
        others: Results of the other measurement, by folder.

    Returns:
        The result with the same parent folder; None if there is none, or more than one.

    Example:
        >>> same_run_result("version_0/token_savings", {"version_0/retention": 1, "version_1/retention": 2})
        1
    """
    run = PurePosixPath(key).parent
    found = [result for other, result in others.items() if PurePosixPath(other).parent == run]
    return found[0] if len(found) == 1 else None


def run_names(keys: Iterable[str]) -> dict[str, str]:
    """Name the results of one measurement by the folders of their runs if those are distinct, or else by their own.

    Args:
        keys: Folders of the results, as in :class:`RunReport`.

    Returns:
        Name of each result by its key.

    Example:
        >>> run_names(["version_0/token_savings", "version_1/token_savings"])
        {'version_0/token_savings': 'version_0', 'version_1/token_savings': 'version_1'}
        >>> run_names(["test_rows", "validation_rows"])
        {'test_rows': 'test_rows', 'validation_rows': 'validation_rows'}
    """
    runs = {key: PurePosixPath(key).parent.as_posix() for key in keys}
    distinct = len(set(runs.values())) == len(runs) and "." not in runs.values()
    return runs if distinct else {key: key for key in runs}


def _files(roots: Sequence[Path], name: str) -> list[Path]:
    return sorted({path for root in roots for path in root.rglob(name) if path.is_file()})


def _read_all(
    root: Path, roots: Sequence[Path], name: str, parse: Callable[[Mapping[str, Any]], _Result]
) -> dict[str, _Result]:
    return {path.parent.relative_to(root).as_posix(): read_result(path, parse) for path in _files(roots, name)}


def _retention(values: Mapping[str, Any]) -> RetentionResult:
    from lightning_ft.evaluation.retention.arithmetic import RetentionResult

    return RetentionResult.from_dict(values)


def _frontier(values: Mapping[str, Any]) -> FrontierResult:
    from lightning_ft.evaluation.retention.frontier import FrontierResult

    return FrontierResult.from_dict(values)


def _compute(values: Mapping[str, Any]) -> ComputeResult:
    from lightning_ft.evaluation.compute.arithmetic import ComputeResult

    return ComputeResult.from_dict(values)


def _comparison(values: Mapping[str, Any]) -> Comparison:
    from lightning_ft.evaluation.comparison.result import Comparison

    return Comparison.from_dict(values)


def _undefined(values: Mapping[str, object]) -> tuple[FailedMeasurement, ...]:
    return tuple(FailedMeasurement(name, str(reason)) for name, reason in values.items())
