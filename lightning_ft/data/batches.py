"""Batches of preferences and of prompts: token ids that are not yet laid out for a model.

Both are plain classes. With ``precision="bf16-true"`` Lightning converts the contents of dataclasses: it would refuse
the frozen examples of a batch, round its margins to bf16 and rebuild the columns that rewards read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ft.data.layout import Example, copied
from lightning_ft.errors import ConfigError
from lightning_ft.types import Message

RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
"""Names that no column of prompts may have, since reward functions have arguments with these names."""


class PreferenceBatch:
    """Prompts with labeled completions.

    `p` prompts have `c` completions. In a short last step, a rank may get a batch without prompts: it takes part in the
    step without adding anything to it.

    Args:
        prompts: Tokens that all completions of a row share, ``int64 [t]`` each, at least one.
        completions: Completions of each prompt: (chosen, rejected), or a single labeled one. Only the last assistant
            turn and the token that ends it are supervised; template tokens after that are kept.
        labels: Whether each completion is desirable, ``bool [c]``, prompt by prompt.
        margins: Number by which the chosen completion is better, ``float32 [p]``; None if the split has no margins.
        rows: Row number of each prompt in its split, counted over all sources, ``int64 [p]``.

    Raises:
        ConfigError: If these don't belong together.

    Example:
        >>> chosen, rejected = (Example(torch.tensor([t]), torch.tensor([True])) for t in (7, 8))
        >>> batch = PreferenceBatch(
        ...     [torch.tensor([5, 6])], [(chosen, rejected)], torch.tensor([True, False]), None, torch.tensor([3])
        ... )
        >>> len(batch), batch.paired
        (1, True)
    """

    def __init__(
        self,
        prompts: list[Tensor],
        completions: list[tuple[Example, ...]],
        labels: Tensor,
        margins: Tensor | None,
        rows: Tensor,
    ) -> None:
        sizes = len(prompts), len(completions), len(rows), len(prompts) if margins is None else len(margins)
        if len(set(sizes)) > 1 or len(labels) != sum(map(len, completions)):
            raise ConfigError(
                f"A PreferenceBatch of {len(prompts)} prompts with {sum(map(len, completions))} completions in "
                f"{len(completions)} tuples can't have {len(labels)} labels, {len(rows)} rows and "
                f"{'no' if margins is None else len(margins)} margins."
            )
        self.prompts, self.completions = prompts, completions
        self.labels, self.margins, self.rows = labels, margins, rows

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def paired(self) -> bool:
        """Whether every prompt has two completions, the chosen one first; True for a batch without prompts."""
        return all(len(completions) == 2 for completions in self.completions)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> PreferenceBatch:
        """Copy with labels, margins and rows on `device`; token ids are moved once they are laid out."""
        margins = None if self.margins is None else copied(self.margins, device, non_blocking)
        return PreferenceBatch(
            self.prompts,
            self.completions,
            copied(self.labels, device, non_blocking),
            margins,
            copied(self.rows, device, non_blocking),
        )


class PromptBatch:
    """Prompts to answer, and the other columns of their rows for the rewards.

    In a short last step, a rank may get a batch without prompts; its columns exist and are empty.

    Args:
        prompts: Prompts in the form that the rows have, the same for a whole split: strings, or lists of messages if
            any row has messages or a system turn. They are complete even if `input_ids` are cut.
        input_ids: Tokens that generation starts from, ``int64 [t]`` each.
        columns: Values of every other column by its name, one per prompt; None if a row lacks the column.
        template_kwargs: Variables of the chat template besides the messages, for each prompt; by default none.

    Raises:
        ConfigError: If these don't have the same length.

    Example:
        >>> batch = PromptBatch(["2+2?"], [torch.tensor([5, 6])], {"answer": ["4"]})
        >>> len(batch), batch.columns["answer"]
        (1, ['4'])
    """

    def __init__(
        self,
        prompts: list[str] | list[list[Message]],
        input_ids: Sequence[Tensor],
        columns: dict[str, list[Any]],
        template_kwargs: Sequence[Mapping[str, object]] | None = None,
    ) -> None:
        wrong = [name for name, values in columns.items() if len(values) != len(prompts)]
        if len(input_ids) != len(prompts) or wrong:
            field = f"the column {wrong[0]!r} of {len(columns[wrong[0]])}" if wrong else f"{len(input_ids)} input_ids"
            raise ConfigError(f"A PromptBatch of {len(prompts)} prompts can't have {field}.")
        self.prompts = prompts
        self.input_ids = list(input_ids)
        self.columns = columns
        self.template_kwargs = [{} for _ in prompts] if template_kwargs is None else list(template_kwargs)

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> PromptBatch:
        """This batch itself: token ids are moved once they are laid out or generated from."""
        return self
