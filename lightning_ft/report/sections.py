"""What the figures come from: data, weights, seeds, prices, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_ft.document.blocks import Block, Table
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.evaluation.savings.table import percent

_PLAIN = {
    "model": "model",
    "tokenizer": "tokenizer",
    "baseline": "hash of the prompt (baseline)",
    "measured": "hash of requests, prompts and scorer",
    "requests": "requests asked",
    "requests_available": "requests there were",
    "requests_in_training": "requests that appear in the training rows",
    "max_new_tokens": "limit of new tokens",
    "split": "rows asked",
}


def provenance_table(title: str, provenance: Mapping[str, Any]) -> Table:
    """What one result was measured with, a row for each entry.

    Args:
        title: Of the result.
        provenance: JSON values; what is nested gets names with dots.
    """
    return Table(("", "value"), tuple(_rows(provenance)), title, texts=frozenset({0, 1}))


def savings_provenance(result: SavingsResult) -> dict[str, Any]:
    """Provenance of a token-savings result, with prices, exclusions and truncations."""
    found: dict[str, Any] = dict(result.provenance)
    asked, available = found.get("requests"), found.get("requests_available")
    if isinstance(asked, int) and isinstance(available, int):
        found["requests left out"] = available - asked
    for name, arm in result.arms.items():
        found[f"answers cut at the limit, {name}"] = percent(arm.truncated_rate)
    if result.costs is not None:
        prices = result.costs.prices
        found["prices"] = f"of {prices.date}, in {prices.currency} for a million tokens"
        for label, tuned in (("prompted", False), ("tuned", True)):
            full, cached, out = prices.rates(tuned=tuned)
            found[f"prices, {label}"] = f"input {full:g}, cached input {cached:g}, output {out:g}"
        found["invested"] = (
            f"training {prices.training:,.2f}, data {prices.data:,.2f}, sweep {prices.sweep:,.2f} {prices.currency}"
        )
    return found


def _rows(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        label = f"{prefix}{_PLAIN.get(name, name)}"
        if isinstance(value, Mapping):
            yield from _rows(value, f"{label}.")
        elif isinstance(value, (list, tuple)):
            yield label, ", ".join(map(str, value))
        else:
            yield label, "" if value is None else str(value)


_WIDE = 3


def runs_table(names: Sequence[str], rows: Sequence[tuple[str, ...]], caption: str = "") -> tuple[Block, ...]:
    """A column for each run; of more than a few a row for each, and what is the same in all of them as a sentence.

    Args:
        names: Of the runs; of a single one it is left out.
        rows: A label, and a cell for each run.
        caption: What the figures are.

    Example:
        >>> table, same = runs_table(["a", "b", "c", "d"], [("steps", "1", "2", "3", "4"), ("device", *["cpu"] * 4)])
        >>> table.head, table.rows[0], same
        (('run', 'steps'), ('a', '1'), 'The same in all runs: device: cpu.')
    """
    if len(names) == 1:
        return (Table(("", "measured"), tuple(rows), caption),)
    if len(names) <= _WIDE:
        return (Table(("", *names), tuple(rows), caption),)
    same = [row for row in rows if len(set(row[1:])) == 1]
    differing = [row for row in rows if row not in same]
    table = Table(
        ("run", *(row[0] for row in differing)),
        tuple((name, *(row[k] for row in differing)) for k, name in enumerate(names, start=1)),
        caption,
    )
    if not same:
        return (table,)
    return (table, "The same in all runs: " + "; ".join(f"{row[0]}: {row[1]}" for row in same) + ".")
