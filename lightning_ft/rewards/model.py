"""Reward models as rewards: frozen, with their own tokenizer and chat template, and no part of any checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.data.encode import AnswerLostError, encode_conversation
from lightning_ft.data.extremes import Extreme
from lightning_ft.data.splits import Splits
from lightning_ft.data.templates import chat_template
from lightning_ft.data.tokenizers import load_tokenizer, pad_token_id
from lightning_ft.distributed import warn
from lightning_ft.errors import ConfigError, RewardError
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import base_of, input_device
from lightning_ft.models.load import (
    ADAPTER_CONFIG,
    adapter_base,
    context_length,
    load_config,
    load_model,
)
from lightning_ft.models.positions import reads_position
from lightning_ft.models.reward_head import HEADS, check_last_token, last_token_rewards
from lightning_ft.rewards.batch import RewardBatch
from lightning_ft.types import Message

_HEAD = re.compile(rf"(base_model\.model\.)?({'|'.join(HEADS)})\.")
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def local_folder(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder of a reward model, downloaded from the hub where there is none of that name here.

    Args:
        name: A folder, or a name on the hub.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Download the code that the repository ships, too.

    Raises:
        RewardError: If there is neither.
    """
    if Path(name).is_dir():
        if not any((Path(name) / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            raise RewardError(f"The folder {name!r} holds no model: there is neither config.json nor {ADAPTER_CONFIG}.")
        return Path(name)
    patterns = [*_FILES, "*.py"] if trust_remote_code else _FILES
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RewardError(f"There is no folder {name!r}, nor a model of that name on the hub: {reason}") from error


def load_scorer(folder: Path, *, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel | PeftModel:
    """Load a reward model, frozen and in eval mode.

    Args:
        folder: With a sequence-classification model of one label, or a PEFT adapter for one.
        dtype: Of the weights; ``"auto"`` is the checkpoint's own.
        trust_remote_code: Run code that the folder ships.

    Raises:
        RewardError: If the model isn't one that gives a score: a head that was never trained would be drawn at random.
        ModelError: If it can't be loaded.
    """
    if not any(_HEAD.match(name) for name in _saved_names(folder)):
        raise RewardError(
            f"{str(folder)!r} holds a model without a trained score head, which would score at random. A reward model "
            "is an export of RewardModeling, or another AutoModelForSequenceClassification with num_labels=1."
        )
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    base = adapter_base(str(folder))
    if base is None:
        labels = load_config(str(folder), trust_remote_code=trust_remote_code).num_labels
        if labels != 1:
            raise RewardError(f"{str(folder)!r} holds a classifier of {labels} labels; a reward model has one.")
        model: Any = load_model(AutoModelForSequenceClassification, str(folder), num_labels=1, **options)
    else:
        whole = load_model(AutoModelForSequenceClassification, base, num_labels=1, **options)
        model = PeftModel.from_pretrained(whole, str(folder))
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _saved_names(folder: Path) -> list[str]:
    """Names of the weights in a folder.

    Raises:
        RewardError: If there are none in safetensors files.
    """
    names: list[str] = []
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            names += json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RewardError(f"{str(index)!r} is damaged ({error!r}): export or copy the folder again.") from error
    for file in [] if names else sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                names += weights.keys()
        except (OSError, SafetensorError) as error:
            raise RewardError(f"{str(file)!r} is damaged ({error}): export or copy the folder again.") from error
    if not names:
        raise RewardError(f"{str(folder)!r} holds no weights in safetensors files.")
    return names


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
            return last_token_rewards(self.model, rows, pad_token_id(self.tokenizer), batch_size=self.batch_size)

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
                where = Extreme(length, split, row.source, row.row).origin
                raise ConfigError(
                    f"{where}: with max_new_tokens={new_tokens:,} the conversation that the reward {name!r} scores may "
                    f"have {length:,} tokens, and its model reads {limit:,}. Lower max_new_tokens, leave the row out, "
                    "or take a reward model with a longer context. (Rewards get whole prompts, also where max_length "
                    "cuts them.)"
                )
