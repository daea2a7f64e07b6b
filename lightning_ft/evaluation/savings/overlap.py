"""Overlap between the requests of a measurement and the training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lightning_ft.data.overlap import TrainingIndex
from lightning_ft.data.raw_rows import Problem
from lightning_ft.data.rows import load_source
from lightning_ft.data.sources import Sources, as_sources
from lightning_ft.errors import DataError
from lightning_ft.types import Request

TrainRows: TypeAlias = Sources | list[Request] | TrainingIndex
"""Training rows as a DataModule takes them, requests made from them, or an index of them."""


@dataclass(frozen=True)
class RequestOverlap:
    """Requests whose question or cluster also appears in the training rows.

    Args:
        in_training: Ids of the requests whose question appears in the training rows.
        in_training_clusters: Ids of the requests whose cluster has training rows.
        n: Number of all requests.
    """

    in_training: tuple[str, ...]
    in_training_clusters: tuple[str, ...]
    n: int

    @property
    def cluster_warnings(self) -> tuple[str, ...]:
        """Warning about clusters with both requests and training rows; empty if there are none."""
        if not self.in_training_clusters:
            return ()
        return (
            f"{len(self.in_training_clusters):,} of {self.n:,} requests belong to a cluster that also has training "
            "rows, so the result says little about requests of new clusters. Split the rows by cluster, as "
            "validation=0.1 does, and measure again.",
        )


def request_overlap(requests: Sequence[Request], index: TrainingIndex) -> RequestOverlap:
    """Find the requests that appear in the training rows.

    Args:
        requests: Requests of the measurement.
        index: Index of the training rows.

    Example:
        >>> turns = lambda text: ({"role": "user", "content": text},)
        >>> index = TrainingIndex.of([Request("t", turns("Where is it?"), "Here.", "Ann")])
        >>> requests = [Request("a", turns("Where is it? "), "There."), Request("b", turns("Why?"), "So.")]
        >>> found = request_overlap(requests, index)
        >>> found.in_training, found.in_training_clusters
        (('a',), ())
    """
    return RequestOverlap(
        tuple(request.id for request in requests if index.has_question(request.messages)),
        tuple(request.id for request in requests if request.cluster in index.clusters),
        len(requests),
    )


def training_index(rows: TrainRows) -> TrainingIndex:
    """Index the questions and clusters of training rows.

    Args:
        rows: Training rows, as a file, a list of dicts or any other source that a DataModule takes as `train`; or
            requests made from such rows, as `PairDataModule.requests` returns them.

    Raises:
        DataError: If some rows can't be read; the message names the first of them.

    Example:
        >>> index = training_index([{"input": "Where is it?", "output": "Here."}])
        >>> index.has_question([{"role": "user", "content": "Why?"}])
        False
    """
    if isinstance(rows, TrainingIndex):
        return rows
    if isinstance(rows, list):
        requests = [row for row in rows if isinstance(row, Request)]
        if requests and len(requests) == len(rows):
            return TrainingIndex.of(requests)
    index = TrainingIndex()
    problems: list[Problem] = []
    for name, source in as_sources(rows, "train_rows").items():  # type: ignore[arg-type]  # requests are handled above
        good, bad = load_source(source, name, "train_rows", answered=False)
        problems += bad
        for row in good:
            index.add(row)
    if problems:
        raise DataError(
            f"train_rows: {len(problems):,} of its rows can't be read, so their questions aren't known. The first: "
            f"{problems[0]} Or pass the rows as requests, as PairDataModule.requests('train') returns them."
        )
    return index
