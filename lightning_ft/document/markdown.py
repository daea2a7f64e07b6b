"""A result as Markdown, for a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.evaluation.savings.table import SAVINGS, arm_rows, cost_rows, cost_title, percent
from lightning_ft.printable import printable

_MARKUP = re.compile(r"[\\`*_\[\]|~]")
PARTS = {"system": "system prompt", "few_shot": "examples", "template": "chat template", "request": "request"}
"""Where the input tokens of a request go, in words."""


def savings_markdown(result: SavingsResult, picture: str | None = None) -> str:
    """Headline, tables and provenance of a result.

    Args:
        result: The result.
        picture: File name of the picture beside it.
    """
    arms = list(result.arms)
    lines = ["# Token savings", "", f"**{markdown_text(result.headline)}**", ""]
    if picture is not None:
        lines += [f"![Tokens of a request and quality of each arm]({picture})", ""]
    lines += [f"> {markdown_text(warning)}\n" for warning in result.warnings]
    lines += ["Mean of a request:", "", *markdown_table(["", *arms], arm_rows(result))]
    lines += ["", "Tuned against prompted:", ""]
    savings = [
        [SAVINGS[name], percent(i.value), f"{percent(i.lo)} to {percent(i.hi)}"] for name, i in result.savings.items()
    ]
    lines += markdown_table(["saving of", "saved", f"{result.confidence:.0%} interval"], savings)
    if any(arm.parts for arm in result.arms.values()):
        parts = [
            [label, *(f"{arm.parts.get(part, 0) / result.n:,.1f}" for arm in result.arms.values())]
            for part, label in PARTS.items()
        ]
        answer = ["answer", *(f"{sum(arm.output_tokens) / result.n:,.1f}" for arm in result.arms.values())]
        lines += ["", "Where the tokens of a request go:", "", *markdown_table(["", *arms], [*parts, answer])]
    gate = result.gate
    half = "yes" if result.saves_half else "not shown"
    lines += [
        "",
        f"Gate: {'passed' if gate.passed else 'failed'}. The one-sided 97.5% lower bound of tuned minus prompted "
        f"quality is {gate.bound:+.4f}, it must be above {-gate.margin:+.4f}. Requests: {gate.n:,}; needed with "
        f"{gate.discordant:.1%} discordant answers: {gate.required_n:,}. At least half of the tokens saved: {half}.",
    ]
    if result.costs is not None:
        lines += [
            "",
            f"{markdown_text(cost_title(result))}:",
            "",
            *markdown_table(["", "cached prefix", "no cache"], cost_rows(result)),
        ]
    if result.provenance:
        lines += ["", "Measured with:", "", *(_entry(name, value) for name, value in result.provenance.items())]
    return "\n".join(lines) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table of any texts, numbers to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    align = ["---", *["---:"] * (len(head) - 1)]
    texts = [[markdown_text(cell, breaks=True) for cell in row] for row in (head, *rows)]
    return [line(texts[0]), line(align), *map(line, texts[1:])]


def markdown_text(text: str, *, breaks: bool = False) -> str:
    r"""A text on one line, with nothing in it that Markdown, HTML, a terminal or a reader's eye would take for more.

    Args:
        text: Any text.
        breaks: Keep line breaks, as HTML.

    Example:
        >>> print(markdown_text("<b> [x](y) | a_b \x1b[2J"))
        &lt;b> \[x\](y) \| a\_b \\x1b\[2J
    """
    lines = [" ".join(printable(line).split()) for line in (text.split("\n") if breaks else [" ".join(text.split())])]
    return "<br>".join(_MARKUP.sub(r"\\\g<0>", line.replace("&", "&amp;").replace("<", "&lt;")) for line in lines)


def _entry(name: str, value: object) -> str:
    return f"- {markdown_text(name)}: {markdown_text(str(value))}"
