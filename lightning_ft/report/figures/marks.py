"""Colours and markers: told apart with every kind of colour vision, and by shape in print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Mark(NamedTuple):
    """How the points of an arm or a method look: a marker of matplotlib and a colour."""

    marker: str
    colour: str


# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/).
PARTS = {
    "system": ("system prompt", "#0072B2"),
    "few_shot": ("examples", "#56B4E9"),
    "template": ("chat template", "#999999"),
    "request": ("request", "#F0E442"),
    "input": ("input", "#0072B2"),
    "answer": ("answer", "#D55E00"),
}
"""Where tokens go: a label and a colour, from the bottom of a bar to its top."""
_KNOWN = {
    "prompted": Mark("s", "#0072B2"),
    "untuned": Mark("o", "#999999"),
    "tuned": Mark("D", "#D55E00"),
    "lora": Mark("D", "#D55E00"),
    "full": Mark("^", "#009E73"),
}
_OTHERS = (
    Mark("v", "#CC79A7"),
    Mark("P", "#E69F00"),
    Mark("X", "#56B4E9"),
    Mark("<", "#000000"),
    Mark(">", "#B8A900"),
    Mark("h", "#7A4B00"),
)


def marks(names: Sequence[str]) -> dict[str, Mark]:
    """A mark for each name, the same for the usual ones in every picture.

    Example:
        >>> marks(["full", "frozen trunk"])["frozen trunk"]
        Mark(marker='v', colour='#CC79A7')
    """
    others = [name for name in names if name not in _KNOWN]
    return {name: _KNOWN.get(name) or _OTHERS[others.index(name) % len(_OTHERS)] for name in names}


def spread(value: float, lo: float, hi: float) -> list[list[float]]:
    """An interval as matplotlib's error bars want it: how far it goes down and up, never below 0.

    Example:
        >>> spread(0.5, 0.25, 0.75)
        [[0.25], [0.25]]
    """
    return [[max(0.0, value - lo)], [max(0.0, hi - value)]]
