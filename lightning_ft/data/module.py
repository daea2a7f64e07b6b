"""What every DataModule of rows shares: its arguments, its tokenizer, its splits, and loaders of their batches."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO, Any, cast, get_args

from transformers import PreTrainedTokenizerBase

from lightning_ft._lightning import LightningDataModule, check_same_namespace, restricted_classmethod
from lightning_ft.checkpoint_file import checked_file
from lightning_ft.data import cache
from lightning_ft.data.loader import Collate, TokenLoader, token_loader
from lightning_ft.data.overlong import OnOverlong
from lightning_ft.data.row_types import RowType
from lightning_ft.data.rows import OnBadRow
from lightning_ft.data.sampler import BatchPlan
from lightning_ft.data.sources import Sources, source_as_json
from lightning_ft.data.split_report import SplitReport
from lightning_ft.data.splits import RowRules, SplitName, Splits
from lightning_ft.data.templates import set_chat_template
from lightning_ft.data.tokenizers import load_tokenizer
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ConfigError, TokenizerError

_NEEDS: dict[str, tuple[SplitName, ...]] = {
    "fit": ("train", "validation", "test"),  # test too: its rows are checked before hours of training, not after
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class RowDataModule(LightningDataModule, ABC):
    """Base of the DataModules: a subclass says of what kind its rows are and makes batches of them.

    Args:
        train: A JSONL, JSON, CSV, TSV or Parquet file, a hub name (``user/data`` or ``user/data:split``), a
            `datasets.Dataset` or `IterableDataset` (read to its end once, so it must have one), a list of dicts, or a
            list of those.
        validation: The same, or the share of the training rows to hold out, those of one prompt (whatever its system
            turn), one conversation or one `cluster` together.
        test: The same as `train`.
        columns: Field names of the format to those of your data, such as ``{"prompt": "question", "cluster":
            "customer"}``.
        mixing: For several training sources, how often the rows of each stand in an epoch; a fraction is drawn anew for
            every epoch.
        tokenizer: Hub name, folder or tokenizer; by default the module's. The module generates and exports with it,
            too. It needs no pad token.
        chat_template: In place of the tokenizer's own, which it replaces also for generation and export: ``plain``
            (``User:`` and ``Assistant:`` lines), ``text`` (prompt and completion without markup), a file, or Jinja.
        chat_template_kwargs: What the chat template is given for every row besides its messages, such as
            ``{"enable_thinking": False}``; a row's own ``chat_template_kwargs`` come first.
        max_length: Most tokens of a row: of a prompt, with its longest completion where it has any.
        batch_size: Rows of a batch on one rank.
        on_overlong: What to do with rows over `max_length`: ``error`` lists them, ``drop`` counts them,
            ``truncate_prompt`` cuts user turns of the prompt from their left, the earliest first. Answers, system turns
            and the template's own tokens are never cut; a row that is too long without any user text is a bad row.
        on_bad_row: ``error`` lists all bad rows, ``skip`` leaves them out and counts them by reason.
        shuffle: Draw an order for each epoch, from `seed` and the epoch.
        seed: Of the orders, the held-out rows and the mixing.
        num_workers: Processes that make batches.
        cache_dir: Where tokenized rows are kept; by default a folder in the `datasets` library's cache, False for
            nowhere.
        trust_remote_code: Run code that the tokenizer's repository ships.

    Raises:
        ConfigError: For arguments that contradict each other.
    """

    row_type: RowType[Any]

    def __init__(
        self,
        train: Sources,
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
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: bool | str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        _check_choices(max_length, batch_size, on_overlong, on_bad_row, validation, cache_dir)
        self._mixing, self._chat_template, self._trust_remote_code = mixing, chat_template, trust_remote_code
        self._given_tokenizer = tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._batch_size, self._shuffle = batch_size, shuffle
        self._seed, self._num_workers = seed, num_workers
        folder = Path(cache_dir) if isinstance(cache_dir, str) else cache.default_folder()
        self.rules = RowRules(
            columns=columns,
            on_bad_row=on_bad_row,
            max_length=max_length,
            on_overlong=on_overlong,
            seed=seed,
            cache=None if cache_dir is False else folder,
            template_kwargs=dict(chat_template_kwargs or {}),
        )
        given = {"train": train, "validation": validation, "test": test}
        self.splits: Splits[Any] = Splits(given, self.rules, self.row_type)
        self._loaders: list[TokenLoader] = []
        self._save(
            **{name: source_as_json(source) for name, source in given.items()},
            columns=columns,
            mixing=mixing,
            tokenizer=tokenizer if isinstance(tokenizer, str) else None,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            max_length=max_length,
            batch_size=batch_size,
            on_overlong=on_overlong,
            on_bad_row=on_bad_row,
            shuffle=shuffle,
            seed=seed,
            num_workers=num_workers,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
        )

    def _save(self, **hyper: Any) -> None:
        outermost = inspect.currentframe()  # Lightning would compare each argument with `hyper`: a frame refuses that
        while outermost is not None and outermost.f_back is not None:
            outermost = outermost.f_back
        # The module logs its own, and a Trainer refuses two of a name.
        self.save_hyperparameters(hyper, logger=False, frame=outermost)

    @abstractmethod
    def collate(self, split: SplitName) -> Collate:
        """What makes batches of the rows of a split that is encoded."""

    @property
    def report(self) -> dict[str, SplitReport]:
        """What became of the rows of each split, by its name."""
        return self.splits.report

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer given, or the module's, with `chat_template` put on it.

        Raises:
            ConfigError: If there is neither.
        """
        if self._tokenizer is None:
            self.tokenizer = self._find_tokenizer()
        return self._tokenizer  # type: ignore[return-value]  # the setter put it there

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self._chat_template is not None:
            set_chat_template(tokenizer, self._chat_template)
        self._tokenizer = tokenizer

    def _find_tokenizer(self) -> PreTrainedTokenizerBase:
        given = self._given_tokenizer
        if given is None:
            module = getattr(self.trainer, "lightning_module", None)
            found: PreTrainedTokenizerBase | None = getattr(module, "tokenizer", None)
            if found is None:
                raise ConfigError(
                    f"{type(self).__name__} has no tokenizer: pass tokenizer=, or use it with a module that has one."
                )
            return found
        if isinstance(given, str):
            given = load_tokenizer(given, trust_remote_code=self._trust_remote_code)
        return given

    def share_tokenizer(self, module: Any) -> PreTrainedTokenizerBase:
        """Let a module generate, measure and export with the tokenizer and the chat template of these rows.

        Called at `setup` for the Trainer's module. Modules of lightning_ft take them; others are only compared with.

        Args:
            module: What is trained on the rows. Its tokenizer is used where this DataModule was given none.

        Returns:
            The tokenizer, which both have from now on.

        Raises:
            ConfigError: If the module was given another tokenizer itself.
        """
        if self._tokenizer is None and self._given_tokenizer is None:
            self.tokenizer = module.tokenizer
        tokenizer = self.tokenizer
        if hasattr(module, "adopt_tokenizer"):
            templated = self._chat_template is not None
            given = templated or self._given_tokenizer is not None
            module.adopt_tokenizer(tokenizer, given=given, template_given=templated)
            return tokenizer
        try:
            other: PreTrainedTokenizerBase | None = getattr(module, "tokenizer", None)
        except (ConfigError, TokenizerError):  # a model without a tokenizer of its own
            other = None
        if (
            other is not None
            and other is not tokenizer
            and cache.content_key([], other) != cache.content_key([], tokenizer)
        ):
            rank_zero_warn(
                "The DataModule's tokenizer (or its chat template) isn't the module's: the model would be trained on "
                "other tokens than it generates with. Pass tokenizer= to the module only."
            )
        return tokenizer

    @restricted_classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """A DataModule with the arguments that a checkpoint holds, of which nothing is run.

        Args:
            checkpoint_path: The checkpoint: a path, a URL or an open file.
            map_location: As of `torch.load`.
            hparams_file: YAML or CSV file with arguments, which replace the checkpoint's.
            weights_only: Only None and True are allowed: a checkpoint is never unpickled.
            kwargs: Arguments that replace those of the checkpoint. ``trust_remote_code`` is taken from here only.

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
        """On one process of each node: check all rows and fill the cache that the others read."""
        self.setup(getattr(getattr(self.trainer, "state", None), "fn", None))

    def setup(self, stage: str | None = None) -> None:
        """Read, check and tokenize what a stage needs, each split once.

        Raises:
            DataError: With every bad row.
        """
        if self.trainer is not None:
            check_same_namespace(self.trainer, self.trainer.lightning_module)
        wanted = _NEEDS[getattr(stage, "value", stage) or "fit"]  # a Trainer passes an enum
        self.splits.load(wanted)
        tokenizer = self.tokenizer  # also where nothing is encoded: it may be given another chat template
        if (module := getattr(self.trainer, "lightning_module", None)) is not None:
            self.share_tokenizer(module)
        for name in wanted:
            if name != "predict":
                self.splits.encode(name, tokenizer)

    def load_rows(self) -> None:
        """Read and check every split without tokenizing it; needs no tokenizer.

        Raises:
            DataError: With every bad row.
        """
        self.splits.load(list(self.splits.sources))

    def reorder(self, seed: int) -> None:
        """Draw the order of each epoch from another seed; the rows of each split stay what they are.

        Args:
            seed: In place of the one given, before training.
        """
        self._seed = seed

    def train_dataloader(self) -> TokenLoader:
        """Batches of the training rows, in a new order every epoch."""
        return self._loader("train", shuffle=self._shuffle)

    def val_dataloader(self) -> TokenLoader | list[Any]:
        """Batches of the validation rows; none where there are no such rows."""
        return self._loader("validation") if "validation" in self.splits.sources else []

    def test_dataloader(self) -> TokenLoader:
        """Batches of the test rows."""
        return self._loader("test")

    def _require(self, name: str) -> None:
        if name not in self.splits.sources:
            raise ConfigError(f"{type(self).__name__} was given no {name} rows: pass {name}=.")

    def _encode(self, name: SplitName) -> None:
        self._require(name)
        self.splits.load([name])
        self.splits.encode(name, self.tokenizer)

    def _loader(self, name: SplitName, *, shuffle: bool = False) -> TokenLoader:
        self._encode(name)
        parts = self.splits.encoded[name]
        plan = BatchPlan(
            [part.num_rows for part in parts],
            self._mixing if name == "train" and self._mixing is not None else [1.0] * len(parts),
            batch_size=self._batch_size,
            shuffle=shuffle,
            seed=self._seed,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=self.trainer.world_size if self.trainer is not None else 1,
        )
        if name == "train" and self.trainer is not None:  # a run resumed at an epoch's end iterates before it names it
            plan.set_epoch(cast(Any, self.trainer).fit_loop.epoch_progress.current.processed)
        loader = token_loader(parts, plan, self.collate(name), num_workers=self._num_workers)
        self._loaders.append(loader)
        return loader

    def teardown(self, stage: str | None = None) -> None:
        """Stop the loaders' workers."""
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()


def _check_choices(
    max_length: int, batch_size: int, on_overlong: str, on_bad_row: str, validation: Any, cache_dir: Any
) -> None:
    for name, number, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
        if number < least:
            raise ConfigError(f"{name}={number}: expected at least {least}.")
    for name, choice, choices in (("on_overlong", on_overlong, OnOverlong), ("on_bad_row", on_bad_row, OnBadRow)):
        if choice not in get_args(choices):
            raise ConfigError(f"{name}={choice!r}: expected one of {', '.join(map(repr, get_args(choices)))}.")
    if cache_dir is True:
        raise ConfigError("cache_dir=True: expected a folder, None for the default one, or False for none.")
    if isinstance(validation, bool) or (isinstance(validation, (int, float)) and not 0 < validation < 1):
        raise ConfigError(f"validation={validation}: a share must lie between 0 and 1.")
