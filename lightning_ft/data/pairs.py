"""DataModule of input-output pairs, for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, get_args

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_ft._lightning import restricted_classmethod
from lightning_ft.data.formats import Conversation
from lightning_ft.data.hf_batches import to_hf
from lightning_ft.data.layout import Example, TokenBatch, collate_examples
from lightning_ft.data.loader import Collate, EncodedRow
from lightning_ft.data.module import RowDataModule
from lightning_ft.data.overlong import OnOverlong
from lightning_ft.data.row_costs import RowCosts
from lightning_ft.data.row_mapping import RowFunction, check_row_function
from lightning_ft.data.row_types import Pairs, Supervise
from lightning_ft.data.rows import OnBadRow
from lightning_ft.data.sources import Sources, source_as_json
from lightning_ft.data.splits import SplitName
from lightning_ft.data.stream_sources import RowFactory, RowIterable
from lightning_ft.data.tokenizers import pad_token_id
from lightning_ft.errors import ConfigError
from lightning_ft.types import Message, Request

BatchFormat = Literal["tokens", "hf"]

PairDataModuleT = TypeVar("PairDataModuleT", bound="PairDataModule")


class PairDataModule(RowDataModule):
    """Input-output pairs from files, the hub or memory, checked, tokenized once and packed.

    Rows may be ``{input, output}``, ``{prompt, completion}``, ``{instruction, input, output}`` (Alpaca), ``{messages}``
    or ``{conversations}`` (ShareGPT), each with an optional ``system``, ``tools``, ``chat_template_kwargs``, ``id`` and
    ``cluster``; or ``{text}`` for continued pretraining, where every token is supervised. Messages may have
    ``tool_calls``, ``reasoning_content`` and a ``weight`` of 0. All bad rows are reported together before any weights
    are loaded. Rows and their tokens are memory-mapped files.

    Args:
        validation: Rows in the same forms, or the share of the training rows to hold out. Rows with the same question
            (whatever its system turn and answer), from one conversation exported turn by turn, or from one `cluster`
            stay together.
        predict: Rows to answer, in the same forms; they need no output, and no other rows are needed to answer them.
        columns: Mapping from field names of the format to columns of your data, such as ``{"input": "question",
            "cluster": "customer"}``.
        format: Function that maps each source row (a dict) to a list of messages, or to a dict in one of the formats
            above; or its import path, ``package.module.function`` or ``path/to/file.py:function``. It is called before
            the checks, for the rows of every split, `predict` included. A row for which it raises, or returns anything
            else, is a bad row. A row of messages keeps the `id` and `cluster` of its source row.
        tokenizer: Hub name, local folder or tokenizer; by default the module's. The module generates and exports with
            it, too. It needs no pad token: padding, which no token attends to, is EOS then.
        supervise: Which answers of a conversation are supervised: ``all``, or the ``last`` one only.
        max_length: Maximum number of tokens per row, answer included.
        batch_size: Number of rows per batch on each rank, packed or not.
        packing: Whether several rows share one sequence, kept apart by the attention mask, with hardly any padding. It
            changes the speed, never what is learned.
        batch_format: Type of the batches: ``tokens`` for `TokenBatch`es, which the modules of this package train on, or
            ``hf`` for dicts of ``input_ids``, ``attention_mask`` and ``labels``, for other LightningModules; these have
            one row per sequence, whatever `packing` says.

    Raises:
        ConfigError: For arguments that contradict each other.

    Example:
        >>> rows = [{"input": f"{n} + 1?", "output": str(n + 1)} for n in range(10)]
        >>> data = PairDataModule(rows, validation=0.2)
        >>> data.load_rows()
        >>> data.report["train"].kept, data.requests("validation")[0].reference
        (8, '7')
    """

    def __init__(
        self,
        train: Sources | RowIterable | RowFactory | None = None,
        validation: float | Sources | None = None,
        test: Sources | None = None,
        *,
        predict: Sources | None = None,
        columns: dict[str, str] | None = None,
        format: str | RowFunction | None = None,
        mixing: list[float] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        supervise: Supervise = "all",
        max_length: int = 2048,
        batch_size: int = 8,
        packing: bool = True,
        batch_format: BatchFormat = "tokens",
        on_overlong: OnOverlong = "error",
        on_bad_row: OnBadRow = "error",
        streaming: bool | None = None,
        shuffle_buffer: int = 1000,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: bool | str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if supervise not in get_args(Supervise):
            raise ConfigError(f"supervise={supervise!r}: expected 'all' or 'last'.")
        if batch_format not in get_args(BatchFormat):
            raise ConfigError(f"batch_format={batch_format!r}: expected 'tokens' or 'hf'.")
        check_row_function(format)
        self.row_type = Pairs(supervise)
        super().__init__(
            train,
            validation,
            test,
            columns=columns,
            mixing=mixing,
            tokenizer=tokenizer,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            max_length=max_length,
            batch_size=batch_size,
            on_overlong=on_overlong,
            on_bad_row=on_bad_row,
            streaming=streaming,
            shuffle_buffer=shuffle_buffer,
            shuffle=shuffle,
            seed=seed,
            num_workers=num_workers,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
        )
        self.rules = self.splits.rules = replace(self.rules, format=format)
        self._packing, self._batch_format = packing, batch_format
        if predict is not None:
            self.splits.sources["predict"] = predict
        self._save(
            predict=source_as_json(predict),
            format=format if isinstance(format, str) else None,
            packing=packing,
            batch_format=batch_format,
            supervise=supervise,
        )

    @restricted_classmethod
    def load_from_checkpoint(
        cls: type[PairDataModuleT], checkpoint_path: str | Path | IO[bytes], *args: Any, **kwargs: Any
    ) -> PairDataModuleT:
        """See `RowDataModule.load_from_checkpoint`; `format` is never taken from the checkpoint.

        Raises:
            ConfigError: If the checkpoint names a `format` and none is passed.
        """
        data = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        if data.rules.format is not None and "format" not in kwargs:
            raise ConfigError(
                f"The checkpoint names format={data.rules.format!r}, but a checkpoint doesn't decide which code runs. "
                "Pass it to load_from_checkpoint if you trust it, or pass format=None."
            )
        return data

    def make_collate(self) -> Callable[[Sequence[Conversation]], Collate]:
        """The function that lays out batches for a model, the same for all rows."""
        pad = pad_token_id(self.tokenizer)
        if self._batch_format == "hf":
            assert self.stream is not None  # others have `collate`
            return partial(_for_all_rows, _HFCollate(pad, self.stream.first_examples[0]))
        costs = getattr(getattr(self.trainer, "lightning_module", None), "row_costs", None)
        costs = costs if isinstance(costs, RowCosts) else RowCosts()
        return partial(_for_all_rows, _PairCollate(self._packing, pad, costs))

    def collate(self, split: SplitName) -> Collate:
        """The function that makes batches from the rows of an encoded split."""
        if self._batch_format != "hf":
            return super().collate(split)
        first = next(part[0] for part in self.splits.encoded[split] if part.num_rows)
        return _HFCollate(pad_token_id(self.tokenizer), first)

    def predict_dataloader(self) -> DataLoader[list[Message] | Request]:
        """The conversations of `predict`, each up to its last question, `batch_size` at a time.

        Rows with `tools` or `chat_template_kwargs` become requests, which hold those too.
        """
        self._require("predict")
        self.splits.load(["predict"])
        prompts = [
            Request(row.id, row.prompt_messages, "", row.cluster, row.template_kwargs)
            if row.template_kwargs
            else list(row.prompt_messages)
            for part in self.splits.rows["predict"]
            for row in part
        ]
        return DataLoader(prompts, batch_size=self.batch_size, collate_fn=list)  # type: ignore[arg-type]

    def requests(self, split: SplitName) -> list[Request]:
        """The rows of a split that are kept, as requests with their reference answers.

        Args:
            split: Name of a split that `setup` or `load_rows` has read.

        Returns:
            One request per row: the messages up to the last answer, that answer as the reference, the id (the row's
            ``id``, or ``source:row``) and the cluster (the column that ``columns={"cluster": ...}`` names, or
            ``cluster``).

        Raises:
            ConfigError: If there is no such split.
        """
        return self.splits.requests(split)


def _for_all_rows(collate: Collate, rows: Sequence[Conversation]) -> Collate:
    return collate


class _HFCollate:
    """Lays out a batch as transformers' models take it. A rank without rows repeats one, as DistributedSampler does.

    The mean of a loss over no labels would be NaN.
    """

    def __init__(self, pad_token_id: int, first: Example) -> None:
        self._pad_token_id, self._first = pad_token_id, first

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        return to_hf([example for _, (example,) in rows] or [self._first], pad_token_id=self._pad_token_id)


class _PairCollate:
    """Lays out a batch. A rank without rows gets one unsupervised token, so that it still takes part in the step."""

    def __init__(self, packing: bool, pad_token_id: int, costs: RowCosts) -> None:
        self._packing, self._pad_token_id, self._square = packing, pad_token_id, costs.square

    def __call__(self, rows: Sequence[EncodedRow]) -> TokenBatch:
        examples = [example for _, (example,) in rows]
        placeholder = Example(torch.tensor([self._pad_token_id]), torch.tensor([False]))
        return collate_examples(
            examples or [placeholder], packing=self._packing, pad_token_id=self._pad_token_id, square=self._square
        )
