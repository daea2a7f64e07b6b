"""Run checks one after the other, each in a process of its own, and write what they found as JSON.

A check is a function of a :class:`~gpu_setup.Setup`. What it measures goes into an :class:`Outcome`; a requirement that
isn't met, an exception, a crash of its process and a check that exceeds its budget all fail that check and no other.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

Status = Literal["pass", "fail", "skip"]
STARTING = 20.0
"""Seconds that a process may take to import what it needs, in addition to the budget of its check."""


class Skipped(Exception):
    """Raised by a check that can't run here, with the reason."""


@dataclass
class Outcome:
    """What a check found.

    Args:
        measured: Measured values by name.
        unmet: Requirements that aren't met, as sentences.
    """

    measured: dict[str, Any] = field(default_factory=dict)
    unmet: list[str] = field(default_factory=list)

    def require(self, met: bool, otherwise: str) -> None:
        """Note a requirement that isn't met.

        Args:
            met: Whether it is.
            otherwise: What is wrong if it isn't.
        """
        if not met:
            self.unmet.append(otherwise)


@dataclass(frozen=True)
class Check:
    """A check.

    Args:
        name: Name, for the command line and the report.
        seconds: Budget in seconds, the start of its process excluded.
        shows: What it shows, in one line.
        run: Function of a setup that returns an :class:`Outcome`, as ``module:function``; only its process imports it.
    """

    name: str
    seconds: float
    shows: str
    run: str


@dataclass(frozen=True)
class Result:
    """Result of a check.

    Args:
        name: Name of the check.
        status: Whether it passed, failed or was skipped.
        reason: Why it failed or was skipped; empty if it passed.
        measured: What it measured.
        seconds: Time that it took, the start of its process included.
        trace: Traceback of an exception; empty without one.
    """

    name: str
    status: Status
    reason: str
    measured: dict[str, Any]
    seconds: float
    trace: str = ""


def listing(checks: Sequence[Check]) -> str:
    """The checks with their budgets, as a table."""
    width = max(len(check.name) for check in checks)
    lines = [f"{check.name:<{width}}  {check.seconds:>4.0f} s  {check.shows}" for check in checks]
    return "\n".join([*lines, f"{'all':<{width}}  {sum(check.seconds for check in checks):>4.0f} s"])


def run_checks(
    checks: Sequence[Check],
    setup: Any,
    *,
    report: Path | None = None,
    limit: float = 600.0,
    starting: float = STARTING,
    preload: Sequence[str] = (),
) -> list[Result]:
    """Run checks in their order, and write the report after each one.

    What a check prints goes into a file of its own in the folder of the report, if there is one.

    Args:
        checks: Checks to run.
        setup: Argument of their functions; it must be picklable.
        report: JSON file of the results.
        limit: Seconds for all of them; those whose budget doesn't fit into what is left are skipped.
        starting: Seconds that a process may take to start.
        preload: Modules to import once for all processes. None of them may initialize a GPU.
    """
    begun = time.monotonic()
    context = _context(preload, setup)
    results: list[Result] = []
    for check in checks:
        left = limit - (time.monotonic() - begun)
        if left < check.seconds:
            reason = f"{left:.0f} s of {limit:.0f} s are left, and it may take {check.seconds:.0f} s"
            results.append(Result(check.name, "skip", reason, {}, 0.0))
        else:
            log = None if report is None else report.with_suffix("") / f"{check.name}.log"
            results.append(_run(context, check, setup, min(starting + check.seconds, left), log))
        print(_line(results[-1]), flush=True)
        if report is not None:
            write_report(report, results, setup)
    return results


def write_report(path: Path, results: Sequence[Result], setup: Any) -> None:
    """Write results as JSON, with the setup and the versions that they depend on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = setup.described() if hasattr(setup, "described") else str(setup)
    content = {"setup": described, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")


def _line(result: Result) -> str:
    measured = ", ".join(f"{name} {_short(value)}" for name, value in result.measured.items())
    reason = f": {result.reason}" if result.reason else ""
    return f"{result.status:<4}  {result.name} ({result.seconds:.0f} s){reason}{f' [{measured}]' if measured else ''}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _context(preload: Sequence[str], setup: Any) -> Any:
    """How processes are started: forked from one that has imported everything, or from scratch if that spoils the GPU.

    Some library may initialize the GPU when it is imported, which no process forked after that could use.
    """
    # Before Python 3.13, the process that imports the modules doesn't get this one's `sys.path`.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *preload])
    probe = context.Process(target=_probe, args=(setup,))
    probe.start()
    probe.join()
    return context if probe.exitcode == 0 else multiprocessing.get_context("spawn")


def _probe(setup: Any) -> None:
    if hasattr(setup, "synchronize"):
        setup.synchronize()


def _run(context: Any, check: Check, setup: Any, most: float, log: Path | None) -> Result:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, check.run, setup, log), daemon=False)
    begun = time.monotonic()
    process.start()
    theirs.close()
    try:
        if not ours.poll(most):
            reason = f"it took more than {most:.0f} s"
            return Result(check.name, "fail", reason, {}, time.monotonic() - begun)
        status, reason, measured, trace = ours.recv()
    except EOFError:
        process.join()
        status, measured, trace = "fail", {}, ""
        reason = f"its process ended unexpectedly, with exit status {process.exitcode}"
    finally:
        process.join(2)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()
    return Result(check.name, status, reason, measured, time.monotonic() - begun, trace)


def _serve(connection: Connection, function: str, setup: Any, log: Path | None) -> None:
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    try:
        module, _, name = function.partition(":")
        outcome: Outcome = getattr(importlib.import_module(module), name)(setup)
        status: Status = "fail" if outcome.unmet else "pass"
        connection.send((status, "; ".join(outcome.unmet), outcome.measured, ""))
    except Skipped as reason:
        connection.send(("skip", str(reason), {}, ""))
    except BaseException as error:
        first = str(error).strip().partition("\n")[0]
        connection.send(("fail", f"{type(error).__name__}: {first}", {}, traceback.format_exc()))
    finally:
        connection.close()
