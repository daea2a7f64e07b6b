"""Checks that rows, tokenizer and model fit each other, made before the first step.

A token without an embedding, a row longer than the model's positions, a prompt that leaves no room for its completion:
each would end the run when its batch comes, perhaps after hours, and on a GPU with a device-side assertion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ft._lightning import LightningModule, active_datamodule
from lightning_ft.data.batches import PreferenceBatch, PromptBatch
from lightning_ft.data.encode import encode_prompt
from lightning_ft.data.extremes import Extreme, largest_token, longest_row, rows_with
from lightning_ft.data.layout import TokenBatch
from lightning_ft.data.module import RowDataModule
from lightning_ft.data.preference_rows import Preferences
from lightning_ft.data.prompts import Prompts
from lightning_ft.data.row_types import Pairs, RowT, RowType
from lightning_ft.data.splits import Splits
from lightning_ft.data.tokenizers import load_tokenizer
from lightning_ft.errors import ConfigError, ModelError, TokenizerError
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.load import context_length
from lightning_ft.models.load_report import warn_on_rank_zero
from lightning_ft.models.positions import reads_position
from lightning_ft.models.vocabulary import (
    beyond_embeddings,
    check_special_tokens,
    ends_at_ordinary_tokens,
    frozen_tokens,
    token_name,
    trainable_tokens,
    untrained_rows,
)
from lightning_ft.modules.options import ModelOptions
from lightning_ft.types import Request

_MOST_NAMED = 5
_PACKAGE = "lightning_ft."
_DATA_MODULES: dict[type[RowType[Any]] | None, str] = {
    Pairs: "PairDataModule",
    Preferences: "PreferenceDataModule",
    Prompts: "PromptDataModule",
}


def check_rows(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, splits: Splits[RowT], *, new_tokens: int = 0
) -> None:
    """Refuse encoded rows that a model can't read.

    Args:
        model: The model, on any device, adapted or not; all ranks of a sharded model must call this.
        tokenizer: Tokenizer that the rows were encoded with.
        splits: The splits; every encoded one is checked.
        new_tokens: Largest number of tokens sampled after each row; 0 for rows that are trained on as they are.

    Raises:
        ModelError: For a token without an embedding, or a row longer than the model's table of positions.
        ConfigError: For a prompt that leaves no room for `new_tokens`.
    """
    largest, longest = largest_token(splits), longest_row(splits)
    if (
        largest is not None
        and (error := beyond_embeddings(model, tokenizer, largest.value, largest.origin)) is not None
    ):
        raise error
    if longest is not None:
        _check_length(model, longest.value, longest.origin, new_tokens)


def _check_length(model: CausalLM, tokens: int, where: str, new_tokens: int, *, is_cut: bool = True) -> None:
    """Refuse a row that is too long for a model, or warn of it; `is_cut`: whether `on_overlong` concerns it."""
    base = base_of(model)
    limit, architecture = context_length(base), type(base).__name__
    if limit is None or tokens + new_tokens <= limit:
        return
    remedy = "and choose with on_overlong whether longer rows are dropped or their prompts truncated."
    if new_tokens:
        room = f"set max_length={limit - new_tokens:,} in the DataModule {remedy}" if new_tokens < limit else ""
        if not is_cut:
            room = "shorten such rows or leave them out: max_length and on_overlong are for rows that are trained on."
        raise ConfigError(
            f"{where} has a prompt of {tokens:,} tokens: with max_new_tokens={new_tokens:,} that "
            f"exceeds the {limit:,} positions of {architecture}. Lower max_new_tokens{', or ' + room if room else '.'}"
        )
    if not reads_position(base, tokens - 1):
        raise ModelError(
            f"{where} has {tokens:,} tokens, and {architecture} has {limit:,} positions. Set max_length={limit} "
            f"in the DataModule {remedy}"
        )
    warn_on_rank_zero(
        f"{where} has {tokens:,} tokens, more than the {limit:,} positions that {architecture} was trained on: it can "
        f"read them, but never learned to. Set max_length={limit} in the DataModule {remedy} Or extend the model's "
        "rotary positions (rope_parameters in its configuration)."
    )


def check_prompts(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, splits: Splits[RowT], split: str, *, new_tokens: int
) -> None:
    """Refuse prompts that a model can't answer; the rows aren't encoded yet.

    Args:
        model: The model, on any device, adapted or not.
        tokenizer: Tokenizer that encodes the prompts.
        splits: The splits, loaded.
        split: Name of the split to check.
        new_tokens: Largest number of tokens of an answer.

    Raises:
        ModelError: For a token without an embedding.
        ConfigError: For a prompt that leaves no room for its answer.
    """
    limit = context_length(base_of(model))
    for row in (row for part in splits.rows.get(split, []) for row in part):
        ids = encode_prompt(tokenizer, list(row.prompt_messages), kwargs=getattr(row, "template_kwargs", None))
        where = Extreme(len(ids), split, row.source, row.row).origin
        error = beyond_embeddings(model, tokenizer, max(ids, default=0), where)
        if error is not None:
            raise error
        if limit is not None and len(ids) + new_tokens > limit:
            _check_length(model, len(ids), where, new_tokens, is_cut=False)


def check_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that have a token without an embedding.

    Args:
        model: The model, on any device, adapted or not.
        tokenizer: Tokenizer that names the tokens in messages.
        prompts: Token ids of each prompt.

    Raises:
        ModelError: With the token.
    """
    for number, prompt in enumerate(prompts):
        error = beyond_embeddings(model, tokenizer, max(prompt, default=0), f"Input {number}")
        if error is not None:
            raise error


def check_batch(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    batch: object,
    *,
    new_tokens: int = 0,
    name: str = "A row of this batch",
) -> None:
    """Refuse a batch of a user's own loader that the model can't read, before the model gets it.

    Args:
        model: The model, on any device, adapted or not.
        tokenizer: Tokenizer that names the tokens in messages.
        batch: The batch; only types of this package are checked.
        new_tokens: Largest number of tokens sampled after each prompt.
        name: Name of a row of the batch in messages.

    Raises:
        ModelError: For a token without an embedding, or a row longer than the model's table of positions.
        ConfigError: For a prompt that leaves no room for `new_tokens`.
    """
    ids, longest = [], 0
    for tokens, length in _sequences(batch):
        ids.append(int(tokens.max()))
        longest = max(longest, length)
    if not ids:
        return
    error = beyond_embeddings(model, tokenizer, max(ids), name)
    if error is not None:
        raise error
    _check_length(model, longest, name, new_tokens)


def checked_inputs(inputs: Iterable[object], *, texts: bool = True) -> list[Any]:
    """The inputs to answer or to score as a list; anything but texts, conversations and requests is refused.

    A single text would be read as a list of its characters, a single conversation as one of its messages.

    Args:
        inputs: The inputs.
        texts: Whether texts and requests are inputs, or conversations only.

    Raises:
        ConfigError: For a single text or conversation, and for an input of another type or without messages.

    Example:
        >>> checked_inputs(["hi"])
        ['hi']
        >>> checked_inputs("hi")
        Traceback (most recent call last):
        lightning_ft.errors.ConfigError: Got a single text where a list of inputs is expected: pass ['hi']. ...
    """
    expected = f"a list of inputs, each {'a text or ' * texts}a list of messages"
    if isinstance(inputs, str):
        raise ConfigError(
            f"Got a single text where a list of inputs is expected: pass [{inputs[:40]!r}]. For a Trainer's predict "
            "pass a DataLoader of lists."
        )
    if isinstance(inputs, Mapping):
        raise ConfigError(f"Got a dict with the keys {', '.join(map(str, inputs))}: expected {expected}.")
    listed = list(inputs)
    for number, one in enumerate(listed):
        if isinstance(one, (str, Request)) and texts:
            continue
        if isinstance(one, Mapping):
            raise ConfigError(
                f"Input {number} is a dict with the keys {', '.join(map(str, one))}, not a conversation: expected "
                f"{expected}. For one conversation pass [conversation]; a DataLoader of conversations needs "
                "collate_fn=list."
            )
        turns = one.tolist() if isinstance(one, np.ndarray) else one  # pandas reads lists in Parquet files as arrays
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not all(isinstance(t, Mapping) for t in turns):
            raise ConfigError(f"Input {number} is of type {type(one).__name__}: expected {expected}.")
        if not turns and texts:
            raise ConfigError(f"Input {number} has no messages: end it with the turn to answer.")
        listed[number] = turns
    return listed


def _sequences(batch: object) -> Iterator[tuple[Tensor, int]]:
    """Pairs of token ids and the length of the sequence that ends with them."""
    if isinstance(batch, TokenBatch) and batch.input_ids.numel():
        real = batch.segment_ids >= 0
        yield batch.input_ids, 1 + int((batch.position_ids * real).max())
    elif isinstance(batch, PromptBatch):
        yield from ((ids, len(ids)) for ids in batch.input_ids if len(ids))
    elif isinstance(batch, PreferenceBatch):
        for prompt, completions in zip(batch.prompts, batch.completions, strict=True):
            yield prompt, len(prompt)
            for one in completions:
                if len(one):
                    yield one.input_ids, len(prompt) + len(one)


def warn_untrained_tokens(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits[RowT],
    *,
    own: PreTrainedTokenizerBase | None = None,
) -> None:
    """Warn of tokens in the training rows whose embedding was never trained and stays frozen.

    Args:
        model: The model as it will be trained.
        tokenizer: Tokenizer that the rows were encoded with.
        splits: The splits, encoded.
        own: Tokenizer of the model's checkpoint, if known; tokens that it lacks are new.
    """
    added, train = tokenizer.get_added_vocab().values(), splits.encoded.get("train", [])
    frozen, unwritable = frozen_tokens(model, added), frozen_tokens(model, added, in_head=True)
    counts = rows_with(train, frozen) if frozen else {}
    if unwritable:  # new rows of a head are all alike, so the model couldn't write one such token and not another
        counts |= rows_with(train, unwritable, supervised=True)
    if not counts:
        return
    vocabulary = set() if own is None else set(own.get_vocab())
    new = {token for token in counts if own is not None and tokenizer.convert_ids_to_tokens(token) not in vocabulary}
    untrained = sorted(new | set(untrained_rows(model, counts)))
    if not untrained:
        return
    names = ", ".join(f"{token_name(tokenizer, token)} in {counts[token]:,} rows" for token in untrained[:_MOST_NAMED])
    more = f" and {len(untrained) - _MOST_NAMED:,} more" if len(untrained) > _MOST_NAMED else ""
    warn_on_rank_zero(
        "The training rows hold tokens whose embedding was never trained, and the adapter leaves embeddings or the "
        f"head frozen: {names}{more}. To train these embeddings too, pass "
        f"lora={{'trainable_token_indices': {trainable_tokens(model, untrained)}}}."
    )


def warn_other_vocabulary(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase | None
) -> None:
    """Warn of a tokenizer that isn't the model's.

    Args:
        model: The model.
        tokenizer: Tokenizer that the model is trained with.
        own: Tokenizer of the model's checkpoint, if known.
    """
    if own is not None:
        ours, theirs = tokenizer.get_vocab(), own.get_vocab()
        other = sum(ours.get(text) != token for text, token in theirs.items())
        if other > len(theirs) // 100:
            warn_on_rank_zero(
                f"The tokenizer isn't the model's: of the {len(theirs):,} tokens of the checkpoint's own tokenizer it "
                f"lacks {other:,} or gives them other ids. What the model has learned about them would be lost: leave "
                "out `tokenizer`, or pass the model's."
            )
            return
    for token in ends_at_ordinary_tokens(model, tokenizer)[:1]:
        warn_on_rank_zero(
            f"The model's generation_config ends answers at {token_name(tokenizer, token)}, which is ordinary text in "
            "this tokenizer, so answers would stop early. Set model.generation_config.eos_token_id, or use the model's "
            "own tokenizer."
        )


class CheckedRows(LightningModule):
    """Base of `FineTuning`: refuses rows that its model can't read.

    All rows of a DataModule of this package are checked when a run starts; those of a stream, or of another loader,
    batch by batch.
    """

    row_type: ClassVar[type[RowType[Any]] | None] = None
    """Type of the rows that it is trained on; None for any."""
    purpose: ClassVar[str] = "trains on rows of its own"
    """What it does with them, for errors."""
    model: Any
    model_options: ModelOptions
    generation_options: dict[str, Any]
    """Arguments of `generate` for `predict_step`."""
    _checked: object = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the rows."""
        raise NotImplementedError

    def _base_name(self) -> str:
        raise NotImplementedError

    @property
    def _new_tokens(self) -> int:
        """Largest number of tokens that training samples after each row."""
        return 0

    def _row_data(self) -> RowDataModule | None:
        data = active_datamodule(self._trainer)
        return data if isinstance(data, RowDataModule) else None

    def setup(self, stage: str) -> None:
        """Refuse rows of another type, before any weights are loaded.

        Raises:
            ConfigError: For another DataModule of this package.
        """
        super().setup(stage)
        data = self._row_data()
        if stage == "predict" or data is None or self.row_type is None or isinstance(data.row_type, self.row_type):
            return
        if all(type(part).__module__.startswith(_PACKAGE) for part in (self, data, data.row_type)):
            raise self.wrong_data(type(data).__name__)  # what a subclass makes of other rows is the user's to know

    def wrong_data(self, found: str) -> ConfigError:
        """The error for data that it can't be trained on.

        Args:
            found: What was passed instead.
        """
        wanted = _DATA_MODULES.get(self.row_type, "DataModule of such rows")
        return ConfigError(f"{type(self).__name__} {self.purpose} and got a {found}: pass a {wanted} to the Trainer.")

    def _check_rows(self, model: CausalLM) -> None:
        """Refuse a tokenizer and rows that the model can't read, before anything is computed from them."""
        check_special_tokens(model, self.tokenizer)
        data = self._row_data()
        state = None if data is None else (data, frozenset(data.splits.encoded))
        if data is not None and state != self._checked:
            check_rows(model, data.tokenizer, data.splits, new_tokens=self._new_tokens)
            self._checked = state

    def _warn_misfits(self) -> None:
        """Warn of a tokenizer that isn't the model's, and of tokens that nothing trains."""
        name = self._base_name() or getattr(base_of(self.model).config, "_name_or_path", None)
        trust = self.model_options.trust_remote_code
        try:
            own = load_tokenizer(name, trust_remote_code=trust) if name else None
        except TokenizerError:  # the checkpoint has none
            own = None
        warn_other_vocabulary(self.model, self.tokenizer, own)
        if (data := self._row_data()) is not None:
            warn_untrained_tokens(self.model, data.tokenizer, data.splits, own=own)

    def _check_batch(self, batch: object) -> None:
        data = self._row_data()
        if data is None or data.stream is not None:
            check_batch(self.model, self.tokenizer, batch, new_tokens=self._new_tokens)

    def on_validation_start(self) -> None:
        """Refuse rows that the model can't read."""
        self._check_rows(self.model)

    def on_test_start(self) -> None:
        """Refuse rows that the model can't read."""
        self._check_rows(self.model)

    def on_predict_start(self) -> None:
        """Refuse prompts that leave no room for their answers, all before the first one is answered."""
        if (data := self._row_data()) is not None:
            new_tokens = int(self.generation_options.get("max_new_tokens") or 0)
            check_prompts(self.model, self.tokenizer, data.splits, "predict", new_tokens=new_tokens)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Refuse what the model can't read in a batch of a user's own loader."""
        self._check_batch(batch)
        return None

    def on_validation_batch_start(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse what the model can't read in a batch of a user's own loader."""
        self._check_batch(batch)

    def on_test_batch_start(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse what the model can't read in a batch of a user's own loader."""
        self._check_batch(batch)
