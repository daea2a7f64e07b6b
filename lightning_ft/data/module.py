"""Base of the DataModules: arguments, tokenizer, splits, and loaders of their batches."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from transformers import PreTrainedTokenizerBase

from lightning_ft._lightning import LightningDataModule, active_datamodule, check_same_namespace, restricted_classmethod
from lightning_ft.arguments import CheckedArguments
from lightning_ft.checkpoint_file import checked_file
from lightning_ft.data import cache
from lightning_ft.data.loader import Collate, TokenLoader, token_loader
from lightning_ft.data.option_checks import check_choices, check_without_train
from lightning_ft.data.overlong import OnOverlong
from lightning_ft.data.provenance import describe_training_rows
from lightning_ft.data.row_store import ChainedRows
from lightning_ft.data.row_types import RowType
from lightning_ft.data.rows import OnBadRow
from lightning_ft.data.rows_tokenizer import RowsTokenizer
from lightning_ft.data.sampler import BatchPlan, EpochPlan, FixedBatchPlan
from lightning_ft.data.sources import Sources, source_as_json
from lightning_ft.data.split_report import SplitReport
from lightning_ft.data.splits import RowRules, SplitName, Splits
from lightning_ft.data.stream_loader import stream_loader
from lightning_ft.data.stream_plan import StreamPlan
from lightning_ft.data.stream_rows import RowStream
from lightning_ft.data.stream_sources import RowFactory, RowIterable, check_streamed, is_streamed, stream_sources
from lightning_ft.data.tool_calls import template_variables
from lightning_ft.distributed import rank_zero_info
from lightning_ft.errors import ConfigError
from lightning_ft.signatures import complete

DataModuleT = TypeVar("DataModuleT", bound="RowDataModule")

_NEEDS: dict[str, tuple[SplitName, ...]] = {
    "fit": ("train", "validation", "test"),  # test rows, too, are checked before training rather than hours later
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class RowDataModule(CheckedArguments, LightningDataModule, ABC):
    """Base of the DataModules: a subclass names the type of its rows and collates them into batches.

    Args:
        train: A JSONL, JSON, CSV, TSV or Parquet file, a hub name (``user/data`` or ``user/data:split``), a
            `datasets.Dataset` or `IterableDataset`, a list of dicts, or a list of several of these. With `streaming`
            also any iterable of dicts, a function that returns one, or the import path of such a function. Only `fit`
            needs training rows.
        validation: Rows in the same forms, or the share of the training rows to hold out. Rows with the same prompt
            (whatever its system turn), from one conversation or from one `cluster` stay together.
        test: Test rows, in the same forms as `train`.
        columns: Mapping from field names of the format to columns of your data, such as ``{"prompt": "question",
            "cluster": "customer"}``.
        mixing: For several training sources, how often the rows of each appear per epoch. For a fraction, rows are
            drawn again in every epoch.
        tokenizer: Hub name, local folder or tokenizer; by default the module's. The module generates and exports with
            it, too. It needs no pad token.
        chat_template: Chat template that replaces the tokenizer's own, in generation and export too: ``plain``
            (``User:`` and ``Assistant:`` lines), ``text`` (prompt and completion without markup), a file, or Jinja.
        chat_template_kwargs: Variables that the chat template gets for every row in addition to the messages, such as
            ``{"enable_thinking": False}``. A row's own ``chat_template_kwargs`` take precedence.
        max_length: Maximum number of tokens per row, the longest completion included.
        batch_size: Number of rows per batch on each rank.
        on_overlong: What happens to rows longer than `max_length`: ``error`` lists them, ``drop`` counts them,
            ``truncate_prompt`` cuts user turns of the prompt from their left, the earliest first. Answers, tool turns,
            system turns and the template's own tokens are never cut; a row that is too long without any user text is a
            bad row. An answer whose whole question was cut isn't supervised.
        on_bad_row: What happens to bad rows: ``error`` lists them all, ``skip`` leaves them out and counts them by
            reason.
        streaming: Whether training rows are read, checked and tokenized while training, rather than before it, and
            never held in memory; by default only those of an `IterableDataset`, another iterable or a function. An
            endless source needs `max_steps`. A row that is left out makes its batch smaller.
        shuffle_buffer: Number of rows of a stream that are shuffled together.
        shuffle: Whether each epoch has an order of its own, drawn from `seed` and the epoch.
        seed: Seed of the epochs' orders, the held-out rows and the mixing.
        num_workers: Number of processes that tokenize rows, and that make batches.
        cache_dir: Folder for tokenized rows; by default one in the `datasets` library's cache, False for no cache.
        trust_remote_code: Whether code from the tokenizer's repository may run.

    Raises:
        ConfigError: For arguments that contradict each other.
        UnknownArgumentError: For an argument that the DataModule does not take, with the nearest name.
    """

    row_type: RowType[Any]

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        complete(cls)

    def __init__(
        self,
        train: Sources | RowIterable | RowFactory | None = None,
        validation: float | Sources | None = None,
        test: Sources | None = None,
        *,
        columns: dict[str, str] | None = None,
        mixing: list[float] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_length: int = 2048,
        batch_size: int = 8,
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
        super().__init__()
        check_choices(max_length, batch_size, on_overlong, on_bad_row, validation, cache_dir)
        self._mixing = mixing
        self._tokenizer = RowsTokenizer(
            tokenizer, chat_template, trust_remote_code=trust_remote_code, owner=type(self).__name__
        )
        self._shuffle = shuffle
        self._seed, self._num_workers = seed, num_workers
        folder = Path(cache_dir) if isinstance(cache_dir, str) else cache.default_folder()
        self.rules = RowRules(
            columns=columns,
            on_bad_row=on_bad_row,
            max_length=max_length,
            on_overlong=on_overlong,
            seed=seed,
            cache=None if cache_dir is False else folder,
            template_kwargs=template_variables(chat_template_kwargs),
            num_workers=num_workers,
        )
        sources = {"train": train, "validation": validation, "test": test}
        if train is None:
            check_without_train(validation, mixing, streaming)
        streamed = train is not None and is_streamed(train, streaming)
        if streamed:
            check_streamed(validation, mixing)
        self.splits: Splits[Any] = Splits(
            {name: source for name, source in sources.items() if name != "train" or not streamed},
            self.rules,
            self.row_type,
        )
        self.stream: RowStream[Any] | None = None
        """The training rows, if they are read while training."""
        if streamed:
            self.stream = RowStream(stream_sources(train, "train"), self.splits)
            self.splits.streamed.add("train")
        self._shuffle_buffer = shuffle_buffer
        self._loaders: list[TokenLoader] = []
        self._is_compared = False  # with the batch size
        self._described: tuple[object, tuple[dict[str, str | int], tuple[str, ...]]] | None = None
        self._save(
            **{name: source_as_json(source) for name, source in sources.items()},
            columns=columns,
            mixing=mixing,
            tokenizer=tokenizer if isinstance(tokenizer, str) else None,
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

    def _save(self, **hyper: object) -> None:
        # Lightning compares `hyper` with the frame's arguments, which fails for data frames: this frame has none.
        outermost = inspect.currentframe()
        while outermost is not None and outermost.f_back is not None:
            outermost = outermost.f_back
        # Not logged: the module logs its own, and a Trainer refuses two values for one name.
        self.save_hyperparameters(hyper, logger=False, frame=outermost)

    @abstractmethod
    def make_collate(self) -> Callable[[Sequence[Any]], Collate]:
        """A function from rows to the function that makes batches of them by their numbers.

        It is pickled for the workers of a stream, which may have been started without a copy of this process.
        """

    def collate(self, split: SplitName) -> Collate:
        """The function that makes batches from the rows of an encoded split."""
        return self.make_collate()(ChainedRows(self.splits.rows[split]))

    @property
    def report(self) -> dict[str, SplitReport]:
        """Counts of the rows in each split, by its name: read, kept, dropped, truncated, and why.

        Of training rows that are streamed, those that this rank has used in the current pass.
        """
        streamed: dict[str, SplitReport] = {} if self.stream is None else {"train": self.stream.report}
        return {**streamed, **self.splits.report}

    def require_rows(self, purpose: str) -> None:
        """Refuse training rows that are streamed, where all of them have to be read before training.

        Args:
            purpose: What they are read for; begins the message.

        Raises:
            ConfigError: If they are streamed, or missing.
        """
        if self.stream is not None:
            raise ConfigError(
                f"{purpose} needs all training rows before training, and they are streamed. Pass streaming=False, or "
                "train= with a file of as many rows as it should read."
            )
        self._require("train")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of this DataModule, or else the module's, with `chat_template` set on it.

        Raises:
            ConfigError: If neither has one.
        """
        return self._tokenizer.current(getattr(self.trainer, "lightning_module", None))

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer.set(tokenizer)

    def share_tokenizer(self, module: Any) -> PreTrainedTokenizerBase:
        """Let a module generate, measure and export with the tokenizer and the chat template of these rows.

        `setup` calls it for the Trainer's module. Modules of lightning_ft adopt the tokenizer; for others a tokenizer
        that differs is only reported.

        Args:
            module: Module that is trained on the rows. Its tokenizer is used if this DataModule has none of its own:
                rows that were encoded with that of an earlier module are then read and encoded again.

        Returns:
            The tokenizer, which both have from now on.

        Raises:
            ConfigError: If another tokenizer was passed to the module.
        """
        if self._tokenizer.follow(module):
            rank_zero_info("The rows are read and encoded again, with the tokenizer of this module.")
            self.splits.forget()
        return self._tokenizer.share(module)

    @restricted_classmethod
    def load_from_checkpoint(
        cls: type[DataModuleT],
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> DataModuleT:
        """A DataModule with the arguments from a checkpoint; no code from the checkpoint is run.

        Args:
            checkpoint_path: The checkpoint: a path, a URL or an open file.
            map_location: Device mapping, as for `torch.load`.
            hparams_file: YAML or CSV file with arguments that replace the checkpoint's.
            weights_only: None or True: a checkpoint is never unpickled.
            kwargs: Arguments that replace the checkpoint's. ``trust_remote_code`` is only taken from here.

        Raises:
            CheckpointError: If it can't be read.
            ConfigError: For ``weights_only=False``.
        """
        required = "train" if hparams_file is None else None
        with checked_file(
            checkpoint_path, weights_only, kept="datamodule_hyper_parameters", required=required, arguments=kwargs
        ) as file:
            return super().load_from_checkpoint(file, map_location, hparams_file, **kwargs)

    def prepare_data(self) -> None:
        """Check all rows and fill the cache, on one process per node; the others read the cache."""
        self.setup(getattr(getattr(self.trainer, "state", None), "fn", None))

    def setup(self, stage: str | None = None) -> None:
        """Read, check and tokenize the splits that a stage needs, each of them once.

        Raises:
            ConfigError: If there are no rows to train on, for ``fit``, or to answer, for ``predict``.
            DataError: With every bad row.
        """
        trainer: Any = self.trainer
        if trainer is not None and trainer.state.status == "running" and active_datamodule(trainer) is not self:
            return  # a Trainer also sets up the DataModule of an earlier call when it is passed loaders
        if trainer is not None:
            check_same_namespace(trainer, trainer.lightning_module)
        names = _NEEDS[getattr(stage, "value", stage) or "fit"]  # a Trainer passes an enum
        if "train" in names and self.stream is None:
            self._require("train")
        if "predict" in names and "predict" not in self.splits.sources:
            self.predict_dataloader()  # which raises, rather than after the weights are loaded
        self.splits.load(names)
        if (module := getattr(trainer, "lightning_module", None)) is not None:
            self.share_tokenizer(module)
            self.splits.load(names)  # again if they were encoded for another module
        tokenizer = self.tokenizer  # even if nothing is encoded: its chat template may be replaced
        self.splits.encode([name for name in names if name != "predict"], tokenizer)
        if self.stream is not None and "train" in names:
            self.stream.start(tokenizer, self.row_type)

    def load_rows(self) -> None:
        """Read and check every split without tokenizing it, so no tokenizer is needed; streamed rows are not read.

        Raises:
            DataError: With every bad row.
        """
        self.splits.load(list(self.splits.sources))

    def training_rows(self) -> tuple[dict[str, str | int], tuple[str, ...]]:
        """Sources, number and hash of the training rows, see `lightning_ft.data.provenance`; empty without them."""
        if self.stream is None and "train" not in self.splits.sources:
            return {}, ()
        parts = self.splits.encoded.get("train")
        if self._described is None or self._described[0] is not parts:  # to hash all tokens takes time
            streamed = None if self.stream is None else [source.path for source in self.stream.sources]
            self._described = (parts, describe_training_rows(self.splits, streamed))
        return self._described[1]

    def reorder(self, seed: int) -> None:
        """Draw the order of each epoch from another seed; each split keeps its rows.

        Args:
            seed: Seed of the orders, set before training.
        """
        self._seed = seed

    def train_dataloader(self) -> TokenLoader:
        """Batches of the training rows, in a new order every epoch."""
        if self.stream is not None:
            return self._stream_loader(self.stream)
        return self._loader("train", shuffle=self._shuffle)

    def val_dataloader(self) -> TokenLoader | list[TokenLoader]:
        """Batches of the validation rows; an empty list if there are no such rows."""
        if "validation" in self.splits.sources:
            return self._loader("validation")
        warnings.filterwarnings("ignore", f"Total length of `{NoLoaders.__name__}` across ranks is zero")
        return NoLoaders()

    def test_dataloader(self) -> TokenLoader:
        """Batches of the test rows."""
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        """Batches of the rows to answer, in a DataModule that has such rows.

        Raises:
            ConfigError: In all others.
        """
        raise ConfigError(
            f"{type(self).__name__} has no rows to answer. Pass PairDataModule(..., predict=...) to predict with any "
            "module that answers: its rows need no output. A RewardModeling reads whole conversations: "
            "DataLoader(conversations, collate_fn=list)."
        )

    @property
    def batch_size(self) -> int:
        """Number of rows per batch on each rank, as in `hparams`, where Lightning's Tuner sets it."""
        return int(self.hparams["batch_size"])

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        if value < 1:
            raise ConfigError(f"batch_size={value}: expected at least 1.")
        self.hparams["batch_size"] = value

    def _require(self, name: str) -> None:
        if name in self.splits.streamed:
            self.require_rows("This")
        if name not in self.splits.sources:
            raise ConfigError(f"{type(self).__name__} has no {name} rows: pass {name}=.")

    def _encode(self, name: SplitName) -> None:
        self._require(name)
        self.splits.load([name])
        self.splits.encode(name, self.tokenizer)

    def _loader(self, name: SplitName, *, shuffle: bool = False) -> TokenLoader:
        self._encode(name)
        parts = self.splits.encoded[name]
        trainer: Any = self.trainer
        fixed = trainer is not None and trainer.overfit_batches > 0
        plan = (FixedBatchPlan if fixed else BatchPlan)(
            [part.num_rows for part in parts],
            self._mixing if name == "train" and self._mixing is not None else [1.0] * len(parts),
            shuffle=shuffle and not fixed,
            **self._plan_options(),
        )
        if name == "train":
            self._compare_with_batch(plan)
            self._continue_epoch(plan)
        loader = token_loader(parts, plan, self.collate(name), num_workers=self._num_workers)
        self._loaders.append(loader)
        return loader

    def _stream_loader(self, stream: RowStream[Any]) -> TokenLoader:
        stream.start(self.tokenizer, self.row_type)
        trainer: Any = self.trainer
        if trainer is not None and trainer.overfit_batches:
            raise ConfigError(
                "overfit_batches repeats the first batches of rows that are read before training: pass "
                "streaming=False, or train= with as many rows."
            )
        plan = StreamPlan(stream.sources, shuffle=self._shuffle, buffer=self._shuffle_buffer, **self._plan_options())
        self._continue_epoch(plan)

        def trained() -> int | None:
            fits = trainer is not None and trainer.state.fn == "fit"
            return trainer.fit_loop.epoch_loop.batch_progress.current.ready if fits else None

        loader = stream_loader(stream, plan, self.make_collate(), num_workers=self._num_workers, trained=trained)
        self._loaders.append(loader)
        return loader

    def _plan_options(self) -> dict[str, int]:
        trainer: Any = self.trainer
        rank, ranks = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        return {"batch_size": self.batch_size, "seed": self._seed, "rank": rank, "world_size": ranks}

    def _continue_epoch(self, plan: EpochPlan) -> None:
        trainer: Any = self.trainer
        if trainer is not None:  # a run resumed at an epoch's end iterates before set_epoch
            plan.set_epoch(trainer.fit_loop.epoch_progress.current.processed)

    def _compare_with_batch(self, plan: BatchPlan) -> None:
        """Say once that an epoch is a single batch, which is rarely meant."""
        rows, batch = sum(plan.sizes), plan.batch_size * plan.num_replicas
        if rows < batch and not self._is_compared:
            ranks = "" if plan.num_replicas == 1 else f" on each of {plan.num_replicas} ranks"
            rank_zero_info(
                f"batch_size={plan.batch_size}{ranks} is more than the {rows:,} training rows, so an epoch is one "
                "batch. Lower batch_size for more steps."
            )
            self._is_compared = True

    def teardown(self, stage: str | None = None) -> None:
        """Stop the loaders' workers."""
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()


class NoLoaders(list[TokenLoader]):
    """What `val_dataloader` returns without validation rows: a list of its own name, so that no one is warned of it."""
