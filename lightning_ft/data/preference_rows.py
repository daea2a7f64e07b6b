"""Rows of preferences, as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.encode import Encoded, encode
from lightning_ft.data.fields import FieldReader
from lightning_ft.data.kinds import RowKind
from lightning_ft.data.layout import Example
from lightning_ft.data.preference_fields import FORMATS, Preference, PreferenceFormat
from lightning_ft.data.report import SplitReport
from lightning_ft.data.request import Message
from lightning_ft.data.templates import ChatTemplate
from lightning_ft.data.turns import RowError
from lightning_ft.errors import DataError


class Preferences(RowKind[Preference]):
    """Completions that were judged, of which only the last turn is learnt from."""

    name = "preferences"

    def reader(
        self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None, *, answered: bool
    ) -> FieldReader[Preference]:
        """See `RowKind`."""
        return PreferenceFormat(FORMATS.detect(rows, columns), columns)

    def encode(self, tokenizer: PreTrainedTokenizerBase, row: Preference, template: ChatTemplate) -> Encoded:
        """See `RowKind`."""
        sides = [
            encode(tokenizer, [*row.prompt, *completion], template, row.template_kwargs, last_only=True)
            for completion in row.completions
        ]
        different = next((side.mismatch for side in sides if side.mismatch is not None), None)
        notes = tuple(dict.fromkeys(note for side in sides for note in side.notes))
        return Encoded(tuple(side.example for side in sides), different is None, notes, different)

    def texts(self, row: Preference) -> list[Sequence[Message]]:
        """See `RowKind`."""
        return [[*row.prompt, *completion] for completion in row.completions]

    def check_encoded(self, encoded: Encoded) -> None:
        """See `RowKind`."""
        first, *others = (example.input_ids.tolist() for example in encoded.examples)
        if first in others:
            fix = "The chat template leaves nothing that tells the two apart: remove the row, or pass chat_template=."
            raise RowError(None, "chosen and rejected become the same tokens", f"{len(first):,} tokens", fix)
        if not len(split_shared(encoded.examples)[0]):
            fix = "The chat template starts them differently: pass chat_template=."
            raise RowError(None, "no token is shared before the answers", "", fix)

    def complete(self, name: str, parts: list[list[Preference]], report: SplitReport) -> list[list[Preference]]:
        """Refuse pairs mixed with single completions; where some rows have a margin, the others get 0, and a note."""
        kinds = {len(row.completions): row for part in reversed(parts) for row in reversed(part)}
        if len(kinds) > 1:
            pair, single = (f"{kinds[n].source}, row {kinds[n].row}" for n in (2, 1))
            raise DataError(
                f"{name} mixes pairs ({pair}) with completions that have a label ({single}): they have different "
                "losses. Put them into DataModules of their own."
            )
        without = sum(row.margin is None for part in parts for row in part)
        if not without or without == sum(map(len, parts)):
            return parts
        report.notes["no margin, taken for 0"] += without
        return [[row if row.margin is not None else replace(row, margin=0.0) for row in part] for part in parts]


PREFERENCES = Preferences()
"""The kind of `PreferenceDataModule`."""


def split_shared(examples: Sequence[Example]) -> tuple[Tensor, tuple[Example, ...]]:
    """Encoded conversations as the tokens that all start with, and what is left of each.

    All supervised tokens are in what is left.

    Args:
        examples: One for each completion, prompt included, supervised from some token on.

    Returns:
        The shared tokens, ``int64 [t]``, and the completions.

    Example:
        >>> examples = [
        ...     Example(torch.tensor(ids), torch.tensor([False, False, True, True]))
        ...     for ids in ([5, 6, 7, 8], [5, 6, 7, 9])
        ... ]
        >>> prompt, (chosen, rejected) = split_shared(examples)
        >>> prompt.tolist(), chosen.input_ids.tolist(), rejected.input_ids.tolist()
        ([5, 6], [7, 8], [7, 9])
    """
    most = min(int(example.supervised.int().argmax()) for example in examples)
    first = examples[0].input_ids[:most]
    same = torch.stack([example.input_ids[:most] == first for example in examples]).all(0)
    shared = int(same.int().cumprod(0).sum())
    return first[:shared], tuple(
        Example(example.input_ids[shared:], example.supervised[shared:]) for example in examples
    )


__all__ = ["FORMATS", "PREFERENCES", "Preference", "PreferenceFormat", "Preferences", "split_shared"]
