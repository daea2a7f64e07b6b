"""A result as Markdown, for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ft.functional.result import SavingsResult
from lightning_ft.report.table import SAVINGS, arm_rows, cost_rows, cost_title, percent

PARTS = {"system": "system prompt", "few_shot": "examples", "template": "chat template", "request": "request"}
"""Where the input tokens of a request go, in words."""


def savings_markdown(result: SavingsResult, picture: str | None = None) -> str:
    """Headline, tables and provenance of a result.

    Args:
        result: The result.
        picture: File name of the picture beside it.
    """
    arms = list(result.arms)
    lines = ["# Token savings", "", f"**{result.headline}**", ""]
    if picture is not None:
        lines += [f"![Tokens of a request and quality of each arm]({picture})", ""]
    lines += [f"> {warning}\n" for warning in result.warnings]
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
            f"{cost_title(result)}:",
            "",
            *markdown_table(["", "cached prefix", "no cache"], cost_rows(result)),
        ]
    if result.provenance:
        lines += ["", "Measured with:", "", *(f"- {name}: {value}" for name, value in result.provenance.items())]
    return "\n".join(lines) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, numbers to the right."""
    align = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, align, *rows)]
