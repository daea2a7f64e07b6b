"""Draw quality against forgetting on the real model, for each domain, from the tables of `docs/results.md`.

python docs/forgetting_plot.py docs/images/forgetting-real.png
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PAGE = Path(__file__).parent / "results.md"
DOMAINS = ("API calls", "Legal citations", "Medical codes", "Support")
MARKERS = {"scale": ".", "LoRA": "o", "anchor": "s"}

Point = tuple[float, float]
"""Forgetting in nats per token, and the share of right answers in percent."""


def tables(section: str) -> Iterator[list[list[str]]]:
    """Cells of each table of a section, without the line under its head."""
    for lines in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines.splitlines()]
        yield [row for row in rows if not set("".join(row)) <= set("-: ")]


def number(cell: str) -> float:
    """The value of a cell, without its interval and unit."""
    return float(re.split(r"[ %]", cell)[0])


def points(page: str, domain: str) -> dict[str, list[Point]]:
    """Points of a domain, by the way in which the model was trained.

    Args:
        page: Text of the page.
        domain: Heading of the section.
    """
    section = page.split(f"\n## {domain}\n", 1)[1].split("\n## ", 1)[0]
    found: dict[str, list[Point]] = {name: [] for name in MARKERS}
    for head, *rows in tables(section):
        if head[0] == "scale of the update":
            found["scale"] += [(number(row[2]), number(row[1])) for row in rows if row[0].replace(".", "").isdigit()]
        elif head[1:3] == ["LoRA", "LoRA with the anchor"]:
            right = next(row for row in rows if row[0].startswith("right"))
            kl = next(row for row in rows if row[0].startswith("KL"))
            for column in range(1, len(head)):
                name = "LoRA" if column == 1 else "anchor"
                found[name].append((number(kl[column]), number(right[column])))
    return found


def main() -> None:
    """Draw a panel per domain."""
    page = PAGE.read_text(encoding="utf-8")
    figure = Figure(figsize=(10, 3.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, domain in zip(figure.subplots(1, len(DOMAINS)), DOMAINS, strict=True):
        for color, (name, marker) in enumerate(MARKERS.items()):
            found = sorted(points(page, domain)[name])
            style = "-" if name == "scale" else ""
            axes.plot(*zip(*found, strict=True), marker=marker, linestyle=style, color=f"C{color}", label=name)
        axes.set_title(domain)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("forgotten: KL, nats per token")
    figure.axes[0].set_ylabel("right answers in %")
    figure.axes[0].legend()
    figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
