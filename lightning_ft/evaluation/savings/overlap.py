"""Which requests of a measurement also appear in the rows that are trained on."""

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
"""Rows as a DataModule takes them, requests made of them, or what was found in them."""


@dataclass(frozen=True)
class RequestOverlap:
    """What requests and training rows have in common.

    Args:
        in_training: Ids of the requests whose question appears in the training rows.
        of_trained_clusters: Ids of the requests whose cluster the training rows have rows of.
        n: All requests.
    """

    in_training: tuple[str, ...]
    of_trained_clusters: tuple[str, ...]
    n: int

    @property
    def cluster_warnings(self) -> tuple[str, ...]:
        """What to say of clusters in both; nothing where there are none."""
        if not self.of_trained_clusters:
            return ()
        return (
            f"{len(self.of_trained_clusters):,} of {self.n:,} requests are of a cluster that training rows are of too, "
            "so the result says little about requests of new clusters. Split the rows by cluster, as validation=0.1 "
            "does, and measure again.",
        )


def request_overlap(requests: Sequence[Request], index: TrainingIndex) -> RequestOverlap:
    """Look requests up in the training rows.

    Args:
        requests: What is asked.
        index: Of the training rows.

    Example:
        >>> ask = lambda text: ({"role": "user", "content": text},)
        >>> index = TrainingIndex.of([Request("t", ask("Where is it?"), "Here.", "Ann")])
        >>> requests = [Request("a", ask("Where is it? "), "There."), Request("b", ask("Why?"), "So.")]
        >>> found = request_overlap(requests, index)
        >>> found.in_training, found.of_trained_clusters
        (('a',), ())
    """
    return RequestOverlap(
        tuple(request.id for request in requests if index.has_question(request.messages)),
        tuple(request.id for request in requests if request.cluster in index.clusters),
        len(requests),
    )


def training_index(rows: TrainRows) -> TrainingIndex:
    """What the training rows ask.

    Args:
        rows: A file, a list of dicts or whatever else a DataModule takes as `train`; or requests made of such rows, as
            `PairDataModule.requests` gives them.

    Raises:
        DataError: If some rows can't be read, with the first of them.

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
    for name, source in as_sources(rows, "train_rows").items():  # type: ignore[arg-type]  # requests are dealt with
        good, bad = load_source(source, name, "train_rows", answered=False)
        problems += bad
        for row in good:
            index.add(row)
    if problems:
        raise DataError(
            f"train_rows: {len(problems):,} of its rows can't be read, so what they ask isn't known. The first: "
            f"{problems[0]} Or pass the rows as requests, as PairDataModule.requests('train') gives them."
        )
    return index
