"""Reward models as rewards: frozen, with their own tokenizer and chat template, and not part of checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.data.encode import AnswerLostError, encode_conversation
from lightning_ft.data.extremes import Extreme
from lightning_ft.data.row_types import RowT
from lightning_ft.data.splits import Splits
from lightning_ft.data.templates import ChatTemplate, chat_template
from lightning_ft.data.tokenizers import load_tokenizer, pad_token_id
from lightning_ft.distributed import warn
from lightning_ft.errors import ConfigError, ModelError, RewardError
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import base_of, input_device
from lightning_ft.models.load import (
    ADAPTER_CONFIG,
    LoadOptions,
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
    """Return the folder of a reward model, downloaded from the hub if there is no local one of that name.

    Args:
        name: Path of a folder, or name on the hub.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to download the repository's code, too.

    Raises:
        RewardError: If there is neither, or the folder contains no model.
    """
    if Path(name).is_dir():
        if not any((Path(name) / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            raise RewardError(
                f"The folder {name!r} contains no model: it has neither config.json nor {ADAPTER_CONFIG}."
            )
        return Path(name)
    patterns = [*_FILES, "*.py"] if trust_remote_code else _FILES
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RewardError(f"There is no folder {name!r}, and no model of that name on the hub: {reason}") from error


def check_folder(folder: Path) -> str | None:
    """Check a reward model without loading it: that its score head is saved, and that an adapter's base is found.

    Args:
        folder: Folder of a sequence-classification model, or of a PEFT adapter for one.

    Returns:
        Base model of an adapter; None for a whole model.

    Raises:
        RewardError: If there is no trained score head, or no base.
    """
    if not any(_HEAD.match(name) for name in _saved_names(folder)):
        raise RewardError(
            f"The model in {str(folder)!r} has no trained score head, so its rewards would be random. Use an export of "
            "RewardModeling, or another AutoModelForSequenceClassification with num_labels=1."
        )
    try:
        return adapter_base(str(folder))
    except ModelError as error:
        raise RewardError(f"The reward model in {str(folder)!r} can't be loaded: {error}") from error


def load_reward_model(
    folder: Path, *, dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """Load a reward model, frozen and in eval mode.

    Args:
        folder: Folder of a sequence-classification model with one label, or of a PEFT adapter for one.
        dtype: Data type of the weights; ``"auto"`` is that of the checkpoint.
        trust_remote_code: Whether to run code from the folder.

    Raises:
        RewardError: If the model has no trained score head (a missing head would be initialized at random), or several
            labels.
        ModelError: If it can't be loaded.
    """
    base = check_folder(folder)
    options: LoadOptions = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if base is None:
        labels = load_config(str(folder), trust_remote_code=trust_remote_code).num_labels
        if labels != 1:
            raise RewardError(
                f"{str(folder)!r} contains a classifier with {labels} labels, but a reward model has num_labels=1."
            )
        model: PreTrainedModel | PeftModel = load_model(
            AutoModelForSequenceClassification, str(folder), num_labels=1, **options
        )
    else:
        base_model = load_model(AutoModelForSequenceClassification, base, num_labels=1, **options)
        model = PeftModel.from_pretrained(base_model, str(folder))
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _saved_names(folder: Path) -> list[str]:
    """Return the names of the weights in a folder.

    Raises:
        RewardError: If there are no safetensors files, or they are damaged.
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
        raise RewardError(f"{str(folder)!r} contains no weights in safetensors files: save the model again as those.")
    return names


class ConversationScorer(Protocol):
    """A model that scores whole conversations: a `RewardModel`, or a `RewardModeling` module."""

    def score_conversations(self, conversations: list[list[Message]]) -> Tensor:
        """Return a reward per conversation, whose last message is the completion, ``float32 [n]``."""
        ...


class RewardModel:
    """A sequence-classification model that scores conversations, rendered with its own chat template.

    Args:
        model: Sequence-classification model with one label, a decoder with or without a PEFT adapter.
        tokenizer: Tokenizer of the model, with its chat template.
        batch_size: Number of conversations per forward pass.

    Raises:
        ModelError: If the model doesn't compute its logit from the last token.

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
        self._warned = False

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
            name: Folder of an exported reward model or PEFT adapter, or the name of one on the hub.
            tokenizer: Tokenizer, or its folder or hub name; None if it is in the model's folder.
            batch_size: Number of conversations per forward pass.
            dtype: Data type of the weights; ``"auto"`` is that of the checkpoint.
            revision: Branch, tag or commit on the hub.
            trust_remote_code: Whether to run code from the repository.

        Raises:
            RewardError: If there is no reward model of that name.
            ModelError: If it can't be loaded.
            TokenizerError: If it has no tokenizer.
        """
        folder = local_folder(str(name), revision=revision, trust_remote_code=trust_remote_code)
        model = load_reward_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer or str(folder), trust_remote_code=trust_remote_code)
        return cls(model, tokenizer, batch_size=batch_size)

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        return input_device(self.model)

    def to(self, device: torch.device | str) -> RewardModel:
        """Move the model to a device and return this object."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    def score_conversations(self, conversations: Sequence[Sequence[Message]]) -> Tensor:
        """Compute the reward of each conversation at its last token, in eval mode and without gradients.

        Args:
            conversations: Messages of each conversation, the completion last.

        Returns:
            Rewards, ``float32 [n]``.

        Raises:
            RewardError: If a conversation is longer than the model's context.
        """
        rows = [self._encode(messages) for messages in conversations]
        limit = context_length(base_of(self.model))
        for i, row in enumerate(rows):
            if limit is not None and len(row) > limit:
                raise RewardError(
                    f"Conversation {i} has {len(row):,} tokens, which exceeds the reward model's context of {limit:,}: "
                    "shorten prompts or completions, or use a reward model with a longer context."
                )
        with evaluating(self.model):
            return last_token_rewards(self.model, rows, pad_token_id(self.tokenizer), batch_size=self.batch_size)

    def _encode(self, messages: Sequence[Message]) -> Tensor:
        try:
            return encode_conversation(self.tokenizer, messages, self._template).input_ids
        except AnswerLostError as error:
            # Training refuses such a row. But a policy may generate any text, and a server of the reward model would
            # get whatever the template renders, too.
            if not self._warned:
                self._warned = True
                warn(
                    f"Rewards are computed from completions as the reward model's chat template renders them: {error}.",
                    stacklevel=2,
                )
            text = self._template.render(messages)
            return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


class ModelReward:
    """Computes rewards with a model that is loaded on first use.

    Args:
        load: Function that loads and returns the model.
    """

    def __init__(self, load: Callable[[], ConversationScorer]) -> None:
        self._load = load
        self._scorer: ConversationScorer | None = None

    def load(self) -> ConversationScorer:
        """Return the model, loading it on the first call."""
        if self._scorer is None:
            # Loading initializes weights at random before saved ones replace them. The policy's samples must not
            # depend on when that happens.
            with torch.random.fork_rng(devices=[]):
                scorer = self._load()
                if hasattr(scorer, "configure_model"):  # a LightningModule loads its weights there
                    scorer.configure_model()
            self._scorer = scorer
        return self._scorer

    def to(self, device: torch.device | str) -> None:
        """Load the model, if it isn't loaded yet, and move it to a device."""
        scorer = self.load()
        if hasattr(scorer, "to"):
            scorer.to(device)

    def __call__(self, batch: RewardBatch, **unused: object) -> Tensor:
        """Return the reward of each completion, ``[c]``, independent of the precision of the Trainer."""
        scorer = self.load()
        device = getattr(scorer, "device", None)
        with ExitStack() as around:
            if isinstance(scorer, nn.Module):
                around.enter_context(evaluating(scorer))
            if device is not None:
                around.enter_context(torch.autocast(torch.device(device).type, enabled=False))
            return scorer.score_conversations(batch.conversations)


_ANSWER = Message(role="assistant", content="x")


def check_context_length(models: Iterable[tuple[str, object]], splits: Splits[RowT], new_tokens: int) -> None:
    """Check that prompts fit, together with a completion, into the context of each reward model.

    Otherwise training might fail on such a prompt hours later. Rows whose number of bytes shows that they fit aren't
    tokenized, since a token has at least one byte.

    Args:
        models: Name and model of each reward model; models without a `model` and a `tokenizer` are skipped.
        splits: Rows of prompts; all loaded splits are checked.
        new_tokens: Largest number of tokens per completion, also assumed for the reward model's tokenizer.

    Raises:
        ConfigError: If a prompt doesn't fit; the message names the reward model and the row.
    """
    for name, scorer in models:
        model, tokenizer = getattr(scorer, "model", None), getattr(scorer, "tokenizer", None)
        if model is None or tokenizer is None:
            continue
        base = base_of(model)
        if (limit := context_length(base)) is None:
            continue
        template = chat_template(tokenizer)

        def tokens(
            prompt: list[Message],
            tokenizer: PreTrainedTokenizerBase = tokenizer,
            template: ChatTemplate = template,
        ) -> int:
            try:
                return len(encode_conversation(tokenizer, [*prompt, _ANSWER], template)) - 1 + new_tokens
            except AnswerLostError:  # the reward model warns about it when it is used
                return 0

        template_tokens = tokens([Message(role="user", content="x")])
        for split, parts in splits.rows.items():
            for row in (row for part in parts for row in part if hasattr(row, "prompt")):
                prompt = row.prompt
                turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
                if sum(template_tokens + len(str(turn).encode()) for turn in turns) <= limit:
                    continue
                length = tokens(turns)
                if length <= limit or (not isinstance(scorer, RewardModel) and reads_position(base, length - 1)):
                    continue
                origin = Extreme(length, split, row.source, row.row).origin
                raise ConfigError(
                    f"{origin}: with max_new_tokens={new_tokens:,} a conversation may have {length:,} tokens, which "
                    f"exceeds the context of the reward model {name!r}, {limit:,}. Lower max_new_tokens, leave the row "
                    "out, or use a reward model with a longer context. (Rewards get whole prompts, also where "
                    "max_length cuts them.)"
                )
