"""Compare programs that do the same work: agreement of their results, and ratios of time, operations and memory.

Each contender runs in its own process, so that neither affects the other's memory, patches or caches. Both are built
first; then one works while the other waits. Which of the two goes first alternates from pair to pair. The result is the
median of the pairs' ratios, with minimum and maximum.

A contender is a function at the top level of a module, ``build(case) -> repeat``, where ``repeat()`` does the work once
and returns values to compare: numbers, or nested lists and tensors of numbers, by name.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

Repeat = Callable[[], Mapping[str, Any]]
Build = Callable[[Any], Repeat]
MIB = 2**20


@dataclass(frozen=True)
class Ratio:
    """Median, minimum and maximum of the ratios of all pairs."""

    median: float
    least: float
    largest: float
    pairs: int

    @classmethod
    def of(cls, ratios: list[float]) -> Ratio:
        return cls(median(ratios), min(ratios), max(ratios), len(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.largest:.2f}, n = {self.pairs})"


@dataclass(frozen=True)
class Result:
    """Measurements of one case.

    Args:
        name: Name of the work.
        case: Sizes and options of the work.
        peer: Name of the contender that ours is compared with.
        seconds: Median time per repetition, by contender.
        speed: Ratio of the peer's time to ours; above 1, ours is faster.
        flops: Operations per repetition, by contender.
        excess: Peak resident bytes beyond those of the built contender, by contender.
        apart: Largest absolute difference of each value that both return.
        machine: Processor, threads and versions of packages, see :func:`machine`.
    """

    name: str
    case: Any
    peer: str
    seconds: dict[str, float]
    speed: Ratio
    flops: dict[str, int]
    excess: dict[str, int]
    apart: dict[str, float]
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def flops_ratio(self) -> float:
        """Ratio of our operations to the peer's."""
        return self.flops["ours"] / self.flops[self.peer]

    @property
    def memory_ratio(self) -> float:
        """Ratio of our excess memory to the peer's."""
        return self.excess["ours"] / self.excess[self.peer]

    def __str__(self) -> str:
        apart = ", ".join(f"{name} {value:.1e}" for name, value in self.apart.items())
        return (
            f"{self.name} [{self.case}] against {self.peer}: {self.speed} times as fast "
            f"({self.seconds['ours']:.3f} s to {self.seconds[self.peer]:.3f} s); operations x {self.flops_ratio:.3f} "
            f"({self.flops['ours'] / 1e9:.2f} GFLOP); excess memory x {self.memory_ratio:.2f} "
            f"({self.excess['ours'] / MIB:.0f} MiB to {self.excess[self.peer] / MIB:.0f} MiB); differences: {apart}"
        )


def compare(
    name: str,
    case: Any,
    ours: Build,
    peer: Build,
    *,
    peer_name: str = "TRL",
    pairs: int = 5,
    threads: int = 2,
    agree: Mapping[str, float],
) -> Result:
    """Run both contenders alternately.

    Args:
        name: Name of the work.
        case: Argument of both build functions; it must be picklable.
        ours: Function that builds this project's contender.
        peer: Function that builds the other contender.
        peer_name: Name of the other contender.
        pairs: Number of timed repetitions, after an untimed one.
        threads: Number of threads per contender.
        agree: Largest allowed difference of each value; every contender must return all of these values.

    Raises:
        SystemExit: If the values of the two differ by more, or one contender fails.
    """
    sides = {"ours": _Side("ours", ours, case, threads), peer_name: _Side(peer_name, peer, case, threads)}
    try:
        first = {side: process.ask("repeat") for side, process in sides.items()}  # warm: allocations, caches, kernels
        apart = {value: _apart(first["ours"][1][value], first[peer_name][1][value]) for value in agree}
        for value, limit in agree.items():
            if not apart[value] <= limit:
                raise SystemExit(
                    f"{name} [{case}]: {value} differs by {apart[value]:.3g}; at most {limit:g} is allowed."
                )
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for pair in range(pairs):
            for side in list(sides) if pair % 2 == 0 else list(sides)[::-1]:
                seconds[side].append(sides[side].ask("repeat")[0])
        excess = {side: process.ask("excess") for side, process in sides.items()}
        flops = {side: process.ask("flops") for side, process in sides.items()}
    finally:
        for process in sides.values():
            process.stop()
    result = Result(
        name,
        case,
        peer_name,
        {side: median(times) for side, times in seconds.items()},
        Ratio.of([b / a for a, b in zip(seconds["ours"], seconds[peer_name], strict=True)]),
        flops,
        excess,
        apart,
        machine(threads),
    )
    print(result, flush=True)
    return result


def compare_each(
    name: str,
    cases: Iterable[Any],
    ours: Build,
    peers: Mapping[str, Build],
    options: argparse.Namespace,
    *,
    agree: Callable[[Any], Mapping[str, float]],
) -> list[Result]:
    """Compare with each peer in each case, and save the results after each one: a later one may run out of memory.

    Args:
        name: Name of the work.
        cases: All cases; those whose description and peer's name don't contain `options.only` are skipped.
        ours: Function that builds this project's contender.
        peers: Functions that build the other contenders, by name.
        options: Command-line options, see :func:`arguments`.
        agree: Function that returns the largest allowed differences for a case, see :func:`compare`.
    """
    results: list[Result] = []
    for case in cases:
        for peer_name, peer in peers.items():
            if options.only in f"{case} {peer_name}":
                sizes = {"pairs": options.pairs, "threads": options.threads}
                results.append(compare(name, case, ours, peer, peer_name=peer_name, agree=agree(case), **sizes))
                save(results, options.json)
    return results


@dataclass(frozen=True)
class Measured:
    """Measurements of one of several contenders.

    Args:
        seconds: Time of each repetition, in the order of the turns.
        flops: Operations per repetition.
        excess: Peak resident bytes beyond those of the built contender.
        values: Values that its first repetition returned.
    """

    seconds: list[float]
    flops: int
    excess: int
    values: dict[str, Any]


def in_turns(contenders: Mapping[str, tuple[Build, Any]], *, pairs: int = 5, threads: int = 2) -> dict[str, Measured]:
    """Run any number of contenders alternately, in forward and in reverse order.

    Args:
        contenders: Build function and its argument, by name.
        pairs: Number of timed repetitions, after an untimed one.
        threads: Number of threads per contender.
    """
    sides: dict[str, _Side] = {}
    try:
        for name, (build, case) in contenders.items():
            sides[name] = _Side(name, build, case, threads)
        values = {name: side.ask("repeat")[1] for name, side in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(pairs):
            for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
                seconds[name].append(sides[name].ask("repeat")[0])
        excess = {name: side.ask("excess") for name, side in sides.items()}
        flops = {name: side.ask("flops") for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.stop()
    return {name: Measured(seconds[name], flops[name], excess[name], values[name]) for name in sides}


def machine(threads: int) -> dict[str, Any]:
    """Describe the hardware and the versions of packages that the measurements depend on."""
    import peft
    import transformers
    import trl

    packages = {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)}
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": threads, **packages}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _apart(a: Any, b: Any) -> float:
    first, second = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    if first.shape != second.shape:
        raise SystemExit(f"Values of shapes {tuple(first.shape)} and {tuple(second.shape)} can't be compared.")
    return float((first - second).abs().max()) if first.numel() else 0.0


class _Side:
    """A contender in its own process."""

    def __init__(self, name: str, build: Build, case: Any, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, case, threads), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()  # contenders are built one after the other, so that neither disturbs the other's memory

    def ask(self, what: str) -> Any:
        self._connection.send(what)
        return self._receive()

    def _receive(self) -> Any:
        try:
            failed, answer = self._connection.recv()
        except EOFError:
            raise SystemExit(
                f"The process of {self._name} ended unexpectedly; it may have run out of memory."
            ) from None
        if failed:
            raise SystemExit(f"{self._name}:\n{answer}")
        return answer

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


def _serve(connection: Connection, build: Build, case: Any, threads: int) -> None:
    try:
        quiet()
        torch.set_num_threads(threads)
        from lightning_ft.evaluation.compute.memory import PeakMemory
        from lightning_ft.models.flops import OperationCounter

        repeat = build(case)
        _warm_up()
        memory = PeakMemory(torch.device("cpu"))
        connection.send((False, None))
        while True:
            wanted = connection.recv()
            if wanted == "repeat":
                started = time.perf_counter()
                values = repeat()
                seconds = time.perf_counter() - started
                plain = {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
                connection.send((False, (seconds, plain)))
            elif wanted == "excess":
                connection.send((False, memory.peak() - memory.at_start))
            else:
                with OperationCounter() as counter:
                    repeat()
                if counter.uncounted:
                    raise RuntimeError(f"operators without a formula: {', '.join(counter.uncounted)}")
                connection.send((False, counter.flops))
    except EOFError:
        pass
    except BaseException:
        connection.send((True, traceback.format_exc()))


def _warm_up() -> None:
    """Run a product and a backward pass, so that torch's one-time setup counts for neither side."""
    states = torch.randn(256, 256, requires_grad=True)
    (states @ states).logsumexp(-1).sum().backward()


def quiet() -> None:
    """Switch off progress bars, warnings and log lines, so that only the benchmark prints."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    warnings.simplefilter("ignore")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Create a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="timed repetitions per contender")
    parser.add_argument("--threads", type=int, default=2, help="threads per contender")
    parser.add_argument("--only", default="", help="run only cases whose description contains this text")
    parser.add_argument("--json", type=Path, help="write the measurements to this JSON file")
    return parser


def write_json(value: Any, path: Path | None) -> None:
    """Write a value as JSON unless the path is None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2) + "\n")


def save(results: list[Result], path: Path | None) -> None:
    """Write results as JSON unless the path is None."""
    write_json([{**asdict(result), "case": str(result.case)} for result in results], path)
