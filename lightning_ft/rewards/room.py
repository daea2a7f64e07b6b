"""Whether reward models have room for every prompt and its completion: asked before training, over all rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_ft.data.encode import AnswerLostError, encode_conversation
from lightning_ft.data.extremes import Extreme
from lightning_ft.data.request import Message
from lightning_ft.data.splits import Splits
from lightning_ft.data.templates import chat_template
from lightning_ft.errors import ConfigError
from lightning_ft.models.head import base_of
from lightning_ft.models.load import context_length
from lightning_ft.models.positions import reads_position
from lightning_ft.rewards.model import RewardModel

_ANSWER = Message(role="assistant", content="x")


def check_room(models: Iterable[tuple[str, Any]], splits: Splits[Any], new_tokens: int) -> None:
    """Refuse prompts that a reward model can't read together with a completion, which it would meet hours later.

    A row isn't tokenized where its number of bytes shows that it fits: no token is of less than a byte.

    Args:
        models: Names of reward models, and what scores conversations there; those of other kinds aren't asked.
        splits: Rows of prompts; every split that is loaded is looked at.
        new_tokens: Most tokens of a completion, taken for as many of the reward model's.

    Raises:
        ConfigError: With the reward model and the row.
    """
    for name, scorer in models:
        if getattr(scorer, "model", None) is None or getattr(scorer, "tokenizer", None) is None:
            continue
        base, tokenizer = base_of(scorer.model), scorer.tokenizer
        if (limit := context_length(base)) is None:
            continue
        template = chat_template(tokenizer)

        def tokens(prompt: list[Message], tokenizer: Any = tokenizer, template: Any = template) -> int:
            try:
                return len(encode_conversation(tokenizer, [*prompt, _ANSWER], template)) - 1 + new_tokens
            except AnswerLostError:  # the reward model says so when it is asked
                return 0

        around = tokens([Message(role="user", content="x")])
        for split, parts in splits.rows.items():
            for row in (row for part in parts for row in part if hasattr(row, "prompt")):
                prompt = row.prompt
                turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
                if sum(around + len(str(turn).encode()) for turn in turns) <= limit:
                    continue
                length = tokens(turns)
                if length <= limit or (not isinstance(scorer, RewardModel) and reads_position(base, length - 1)):
                    continue
                where = Extreme(length, split, row.source, row.row).where
                raise ConfigError(
                    f"{where}: with max_new_tokens={new_tokens:,} the conversation that the reward {name!r} scores may "
                    f"have {length:,} tokens, and its model reads {limit:,}. Lower max_new_tokens, leave the row out, "
                    "or take a reward model with a longer context. (Rewards get whole prompts, also where max_length "
                    "cuts them.)"
                )
