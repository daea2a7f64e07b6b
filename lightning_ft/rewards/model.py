"""Reward models as rewards: frozen, with their own tokenizer and chat template, and no part of any checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.data.encode import AnswerLostError, encode_conversation
from lightning_ft.data.request import Message
from lightning_ft.data.templates import chat_template
from lightning_ft.errors import RewardError
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import base_of, input_device
from lightning_ft.models.load import context_length, load_tokenizer, pad_token_id
from lightning_ft.models.sequence_scores import check_last_token, last_token_scores
from lightning_ft.rank_zero import warn
from lightning_ft.rewards.batch import RewardBatch
from lightning_ft.rewards.folder import load_scorer, local_folder


class ConversationScorer(Protocol):
    """What scores whole conversations: a `RewardModel`, or a `RewardModeling` module."""

    def score_conversations(self, conversations: list[list[Message]]) -> Tensor:
        """Score each conversation, the answer last, ``float32 [n]``."""
        ...


class RewardModel:
    """A sequence-classification model that scores conversations as they stand in its own chat template.

    Args:
        model: With one label, over a decoder, adapted or not.
        tokenizer: The model's own.
        batch_size: Conversations at a time.

    Raises:
        ModelError: If the model isn't one that reads a score at the last token.

    Example:
        >>> reward = RewardModel.from_pretrained("out/reward")  # doctest: +SKIP
        >>> turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
        >>> reward.score_conversations([turns])  # doctest: +SKIP
        tensor([1.2710])
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 16
    ) -> None:
        check_last_token(model)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._template = chat_template(tokenizer)
        self._told = False

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> RewardModel:
        """Load a reward model and freeze it.

        Args:
            name: A folder that a reward model was exported to, whole or as a PEFT adapter, or a hub name of one.
            tokenizer: Where it isn't in the same place.
            batch_size: Conversations at a time.
            dtype: Of the weights; ``"auto"`` is the checkpoint's own.
            revision: Branch, tag or commit on the hub.
            trust_remote_code: Run code that the repository ships.

        Raises:
            RewardError: If there is no reward model of that name.
            ModelError: If it can't be loaded.
            TokenizerError: If it has no tokenizer.
        """
        folder = local_folder(str(name), revision=revision, trust_remote_code=trust_remote_code)
        model = load_scorer(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer or str(folder), trust_remote_code=trust_remote_code)
        return cls(model, tokenizer, batch_size=batch_size)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return input_device(self.model)

    def to(self, device: torch.device | str) -> RewardModel:
        """Move the model, and give it back."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    def score_conversations(self, conversations: Sequence[Sequence[Message]]) -> Tensor:
        """Score each conversation at its last token, in eval mode and without gradients.

        Args:
            conversations: The answer last.

        Returns:
            ``float32 [n]``.

        Raises:
            RewardError: If a conversation is longer than the model's context.
        """
        rows = [self._encode(messages) for messages in conversations]
        limit = context_length(base_of(self.model))
        for i, row in enumerate(rows):
            if limit is not None and len(row) > limit:
                raise RewardError(
                    f"Conversation {i} has {len(row):,} tokens, more than the {limit:,} that the reward model reads: "
                    "shorten prompts or completions."
                )
        with evaluating(self.model):
            return last_token_scores(self.model, rows, pad_token_id(self.tokenizer), batch_size=self.batch_size)

    def _encode(self, messages: Sequence[Message]) -> Tensor:
        try:
            return encode_conversation(self.tokenizer, messages, self._template).input_ids
        except AnswerLostError as error:
            # Training refuses such a row. A policy may write anything, and what the template makes of it is what the
            # reward model would be given wherever it is served.
            if not self._told:
                self._told = True
                warn(f"The reward model is given completions as it renders them: {error}.", stacklevel=2)
            text = self._template.render(messages)
            return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


class ModelReward:
    """Judges a batch with a model, loaded when it is first needed.

    Args:
        load: Gives what scores conversations.
    """

    def __init__(self, load: Callable[[], ConversationScorer]) -> None:
        self._load = load
        self._scorer: Any = None

    def load(self) -> Any:
        """The model, which is loaded if it isn't yet."""
        if self._scorer is None:
            # Loading draws weights that saved ones take the place of: the policy's samples must not depend on it.
            with torch.random.fork_rng(devices=[]):
                scorer: Any = self._load()
                if hasattr(scorer, "configure_model"):  # a LightningModule loads its weights there
                    scorer.configure_model()
            self._scorer = scorer
        return self._scorer

    def to(self, device: torch.device | str) -> None:
        """Load the model, if it isn't yet, and move it."""
        scorer = self.load()
        if hasattr(scorer, "to"):
            scorer.to(device)

    def __call__(self, batch: RewardBatch, **unused: Any) -> Tensor:
        """Scores of the batch's conversations, ``[c]``, the same whatever precision a Trainer runs its module in."""
        scorer = self.load()
        device = getattr(scorer, "device", None)
        with ExitStack() as around:
            if isinstance(scorer, nn.Module):
                around.enter_context(evaluating(scorer))
            if device is not None:
                around.enter_context(torch.autocast(torch.device(device).type, enabled=False))
            return cast(Tensor, scorer.score_conversations(batch.conversations))
