"""`lightning-ft fit|validate|test|predict|preview|export`: a LightningCLI in subclass mode.

One YAML file contains `trainer`, `model`, `data` and `trainer.callbacks`. The model's name appears in it once, since
the DataModule takes its tokenizer from the model.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import MethodType
from typing import Any

from lightning_utilities.core import rank_zero

import lightning_ft
from lightning_ft._lightning import (
    LightningDataModule,
    LightningModule,
    MisconfigurationException,
    Trainer,
    cli_module,
)
from lightning_ft.atomic_files import unwritable, write_text
from lightning_ft.checkpoint_file import local_path
from lightning_ft.completion import SHELLS, Parsers, PrintCompletion
from lightning_ft.console import WARNINGS_WITHOUT_FIT, hide_warnings
from lightning_ft.errors import (
    CheckpointNotFoundError,
    ConfigError,
    FileWriteError,
    GateError,
    LightningFTError,
    MeasurementError,
)
from lightning_ft.importing import without_imports
from lightning_ft.models.export import ExportFormat
from lightning_ft.models.gguf_export import GGUFType
from lightning_ft.models.load import ADAPTER_CONFIG
from lightning_ft.parser import FineTuningParser
from lightning_ft.printable import json_text, printable
from lightning_ft.run_checkpoints import BEST, LAST, find_checkpoint, run_folder

_cli = cli_module()


class FineTuningTrainer(Trainer):
    """Lightning's Trainer with the subcommands `preview` and `export`, which don't train."""

    def preview(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        examples: int = 3,
        weights: bool = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Print examples with their supervised tokens, and which rows would be truncated or dropped.

        Args:
            model: Module whose tokenizer is used if the DataModule has none of its own.
            datamodule: DataModule whose rows are shown.
            examples: Number of rows to show per split.
            weights: Whether to load the model too and print a table of its trainable weights.
            ckpt_path: Unused; accepted so that a configuration of `fit` can be reused.
            weights_only: Unused, too.
        """
        from lightning_ft.data.module import RowDataModule
        from lightning_ft.data.preview import preview

        if not isinstance(datamodule, RowDataModule):
            raise ConfigError("preview shows the rows of a DataModule of lightning_ft. Pass one as `data`.")
        own = datamodule.hparams["tokenizer"] is not None
        preview(datamodule, None if own else getattr(model, "tokenizer", None), examples=examples)
        if weights:
            from lightning_ft.modules.base import FineTuning

            if not isinstance(model, FineTuning):
                raise ConfigError(
                    f"weights=true needs a module of lightning_ft, but `model` is a {type(model).__name__}."
                )
            print(printable(model.what_is_trained()))

    def export(
        self,
        model: LightningModule,
        ckpt_path: str,
        output: str,
        datamodule: LightningDataModule | None = None,
        merge: bool = False,
        overwrite: bool = False,
        format: ExportFormat = "safetensors",
        gguf_dtype: GGUFType = "f16",
        results: str | None = None,
        push_to_hub: str | None = None,
        private: bool = True,
        hub_overwrite: bool = False,
        weights_only: bool | None = None,
    ) -> None:
        """Write a checkpoint as a folder that transformers and PEFT can load.

        Args:
            model: Module of the run that wrote the checkpoint.
            ckpt_path: Path of the checkpoint; ``last`` or ``best`` for that of the newest run with this configuration.
            output: Folder to write to.
            datamodule: Unused; accepted so that a configuration of `fit` can be reused.
            merge: Whether to merge the adapter into the base weights; refused if this would change greedy output.
            overwrite: Whether to write into a folder that isn't empty.
            format: ``safetensors``, or ``gguf`` for a ``model.gguf`` of llama.cpp, into which an adapter is merged.
            gguf_dtype: Type of the matrices in it.
            results: Folder with results for the model card; by default that of the run that wrote the checkpoint. Only
                those that were measured with the same weights are used.
            push_to_hub: Repository on the Hugging Face hub to upload to, such as ``organization/name``.
            private: Whether the repository is private; an existing public one is refused.
            hub_overwrite: Whether to commit over the files of a repository that isn't empty.
            weights_only: Unused, since checkpoints are always read so; accepted so that a configuration of `fit` can be
                reused.
        """
        from lightning_ft.models.hub import check_hub
        from lightning_ft.modules.base import FineTuning
        from lightning_ft.report.for_card import results_of_run

        if not isinstance(model, FineTuning):
            raise ConfigError(f"{type(model).__name__} can't be exported, since it isn't a module of lightning_ft.")
        if push_to_hub is not None:
            check_hub(push_to_hub, private=private, overwrite=hub_overwrite, format=format)
        model.load_checkpoint(ckpt_path)
        facts = replace(model.card_facts(), results=results_of_run(results, ckpt_path))
        folder = model.export(
            output, merge=merge, overwrite=overwrite, format=format, gguf_dtype=gguf_dtype, facts=facts
        )
        print(printable(f"Exported to {folder}"))
        if push_to_hub is not None:
            url = model.upload(
                folder, push_to_hub, merge=merge, private=private, hub_overwrite=hub_overwrite, facts=facts
            )
            print(printable(f"Uploaded to {url}"))
        if (folder / ADAPTER_CONFIG).exists():
            print("It is an adapter. For `transformers serve`, which loads a whole model, export with --merge true.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what Lightning tells at level INFO."""
    log = rank_zero.log
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _own_error(error: BaseException | None) -> LightningFTError | None:
    """The error of this package that the parser wrapped in its own, which would list the whole configuration."""
    while error is not None and not isinstance(error, LightningFTError):
        error = error.__cause__ or error.__context__
    return error


def _import_public_classes() -> None:
    """Import this package's classes, so that the parser knows their short names (``--model LoRAFineTuning``)."""
    for name in lightning_ft.__all__:
        getattr(lightning_ft, name)


class _SaveConfig(_cli.SaveConfigCallback):  # type: ignore[name-defined,misc]
    """Writes the configuration; a run that continues one in the same folder keeps that one's next to its own."""

    def __init__(self, parser: Any, config: Any, *args: Any, **options: Any) -> None:
        super().__init__(parser, config, *args, **options)
        if config.get("ckpt_path") is not None:
            self.overwrite = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration.

        Raises:
            ConfigError: If the folder holds that of another run.
            FileWriteError: If it can't be written.
        """
        folder = trainer.log_dir  # which all ranks must ask for
        try:
            if self.overwrite and not self.already_saved and folder and trainer.is_global_zero:
                _keep_earlier(Path(folder) / self.config_filename)
            super().setup(trainer, pl_module, stage)
        except OSError as error:
            raise FileWriteError(
                f"The configuration {self.config_filename!r} can't be written to {folder!r} "
                f"({error.strerror or error}). Free some space, or set trainer.default_root_dir to another folder."
            ) from error
        except RuntimeError as error:
            if "to NOT exist" not in str(error):
                raise
            raise ConfigError(
                f"The folder {folder!r} contains the {self.config_filename} of another run. Delete or rename "
                "it, set trainer.default_root_dir to another folder, or use a logger, which makes a folder per run."
            ) from error


def _check_folders(trainer: Any, *, saves_config: bool) -> None:
    """Refuse folders of loggers and of the configuration that can't be written, before rows and weights are read."""
    if trainer.fast_dev_run or not trainer.is_global_zero:
        return
    chosen = [logger.save_dir for logger in trainer.loggers] or ([trainer.default_root_dir] if saves_config else [])
    for folder in map(local_path, filter(None, chosen)):
        if folder is not None and (reason := unwritable(folder)) is not None:
            raise ConfigError(
                f"The run can't be written into {str(folder)!r}: {reason}. Set trainer.default_root_dir, or the "
                "logger's save_dir, to another folder."
            )


def _keep_earlier(path: Path) -> None:
    """Rename the configuration of the run that is continued: `config.yaml` becomes `config-1.yaml`, the next `-2`."""
    if path.exists():
        number = next(n for n in count(1) if not path.with_stem(f"{path.stem}-{n}").exists())
        path.rename(path.with_stem(f"{path.stem}-{number}"))


class FineTuningCLI(_cli.LightningCLI):  # type: ignore[name-defined,misc]
    """Command line of this package, and the base of a command line of your own.

    A subclass overrides the hooks of `LightningCLI`: `add_arguments_to_parser` for arguments and links between them,
    `before_fit` and `after_fit`, ... In a link, arguments of the module and of the data are named
    ``model.init_args.<name>`` and ``data.init_args.<name>``.

    Args:
        args: Command-line arguments; those of the process by default.
        run: Whether to run the subcommand. If False, only `trainer`, `model` and `datamodule` are built.
        save_config: Whether to write the configuration into the logger's folder when training starts.
        description: First line of the help text.
        trainer_defaults: Arguments of the Trainer that replace its defaults.
        parser_kwargs: Further arguments of the parser, such as ``{"default_env": True}`` for options in environment
            variables.
        other_parsers: Function that returns the parsers of further subcommands of the program, for shell completion.

    Example:
        >>> class SupportCLI(FineTuningCLI):
        ...     def add_arguments_to_parser(self, parser):
        ...         parser.add_argument("--learning_rate", type=float, default=1e-4, help="Learning rate.")
        ...         parser.link_arguments("learning_rate", "model.init_args.learning_rate")
        >>> model = ["--model=FullFineTuning", "--model.model=base/"]
        >>> data = ["--data=PairDataModule", "--data.train=a.jsonl"]
        >>> cli = SupportCLI([*model, *data, "--learning_rate=1e-5"], run=False)
        >>> cli.model.hparams["learning_rate"]
        1e-05
        >>> sorted(SupportCLI.subcommands())
        ['export', 'fit', 'predict', 'preview', 'test', 'validate']
    """

    def __init__(
        self,
        args: list[str] | None = None,
        run: bool = True,
        save_config: bool = True,
        description: str = "Fine-tune language models.",
        trainer_defaults: dict[str, Any] | None = None,
        parser_kwargs: dict[str, Any] | None = None,
        other_parsers: Parsers = dict,
    ) -> None:
        _import_public_classes()
        self._run, self._other_parsers = run, other_parsers
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=FineTuningTrainer,
            save_config_callback=_SaveConfig if save_config else None,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_defaults=trainer_defaults,
            parser_kwargs={"description": description, **(parser_kwargs or {})},
            args=args,
            run=run,
        )

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Build the parsers, with an option for shell completion."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        if add_subcommands:
            self.parser.add_argument(
                "--print_completion",
                action=PrintCompletion,
                parsers=lambda: {**self._subcommand_parsers, **self._other_parsers()},
                default=argparse.SUPPRESS,
                choices=SHELLS,
                help="Print a script that completes this command in a shell, and exit.",
            )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the arguments.

        Without a subcommand, they come from a program whose own arguments (`lightning-ft compare ...`) are none of
        LightningCLI's, so it has no reason to warn that the two differ.
        """
        if self._run or not isinstance(args, list):
            super().parse_arguments(parser, args)
        else:
            self.config = parser.parse_args(args)

    def init_parser(self, **kwargs: object) -> object:
        """Build a parser that suggests the closest name, if this version of Lightning supports `parser_class`."""
        self.parser_class = FineTuningParser
        return super().init_parser(**kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Subcommands of Lightning and of `FineTuningTrainer`, each with the arguments that the CLI fills in."""
        own = {"preview": {"model", "datamodule"}, "export": {"model", "datamodule"}}
        return {**_cli.LightningCLI.subcommands(), **own}

    def instantiate_classes(self) -> None:
        """Build the configured classes.

        For `preview`, reward functions and scorers are not imported. For it and for `export`, which don't train, the
        Trainer doesn't list accelerators.
        """
        if self.subcommand not in (None, "fit"):
            hide_warnings(WARNINGS_WITHOUT_FIT)
        with ExitStack() as stack:
            if self.subcommand == "preview":
                stack.enter_context(without_imports())
            if self.subcommand in ("preview", "export"):
                stack.enter_context(_quiet())
            try:
                super().instantiate_classes()
            except ValueError as error:
                if (own := _own_error(error)) is not None:
                    raise own from None
                raise
        self._resolve_ckpt_path()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer.

        Raises:
            ConfigError: For settings that it refuses, such as an accelerator that this machine lacks, and for a folder
                that can't be written.
        """
        try:
            trainer: Trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            if isinstance(error, LightningFTError):
                raise
            raise ConfigError(f"The Trainer refuses the settings in `trainer`: {error}") from error
        if self.subcommand not in (None, "preview", "export"):
            _check_folders(trainer, saves_config=self.save_config_callback is not None)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the subcommand; if a signal ends it, exit with the status that shells have for it.

        Lightning exits after SIGTERM with 0, which schedulers take for a completed run, and after Ctrl-C with the
        status of an error.

        Raises:
            SystemExit: If a signal ended it.
        """
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stopped:
            terminated = type(stopped).__name__ == "SIGTERMException"
            if not terminated and not isinstance(stopped.__context__, KeyboardInterrupt):
                raise
            what, number = ("Terminated", signal.SIGTERM) if terminated else ("Interrupted", signal.SIGINT)
            hint = " `--ckpt_path last` goes on from the last checkpoint." if subcommand == "fit" else ""
            print(f"{self.parser.prog}: {what}.{hint}", file=sys.stderr)
            sys.exit(128 + number)

    def _resolve_ckpt_path(self) -> None:
        """Replace ``last`` and ``best`` by the path of a checkpoint of an earlier run, and print it.

        `preview` reads no checkpoint.

        For `fit`, ``last`` may be set before the first run, as in Lightning, which says that it starts from scratch.
        """
        config = self.config_init[self.subcommand] if self.subcommand else {}
        if self.subcommand == "preview" or (name := config.get("ckpt_path")) not in (LAST, BEST):
            return
        try:
            path = find_checkpoint(self.trainer, name)
        except CheckpointNotFoundError:
            if self.subcommand == "fit" and name == LAST:
                return
            raise
        config["ckpt_path"] = str(path)
        print(printable(f"ckpt_path={name!r}: {path}"))

    def after_fit(self) -> None:
        """Raise an error for failures that did not stop the run.

        Raises:
            MeasurementError: If a result could not be measured or written.
            GateError: If quality was not shown to be kept, or a limit was exceeded; not with `fast_dev_run`.
        """
        callbacks: list[Any] = self.trainer.callbacks
        failures = [failure for callback in callbacks for failure in getattr(callback, "failures", ())]
        if failures:
            raise MeasurementError(f"Training completed, but some results are missing: {' '.join(failures)}")
        gates = [callback.name for callback in callbacks if getattr(callback, "gate_failed", False)]
        if gates and not self.trainer.fast_dev_run:  # after one step no limit is expected to hold
            raise GateError(f"Training completed, but the limits of these callbacks don't hold: {', '.join(gates)}.")

    def after_predict(self) -> None:
        """Write the answers to ``predictions.jsonl`` in the run's folder, each with its request's id and messages.

        For modules of this package, whose answers are text or rewards; nothing with ``--return_predictions false``.
        """
        from lightning_ft.modules.base import FineTuning

        trainer: Any = self.trainer
        if not isinstance(self.model, FineTuning) or not (batches := trainer.predict_loop.predictions):
            return
        answers = [answer for batch in batches for answer in batch]
        if trainer.fast_dev_run:
            print(f"fast_dev_run: {len(answers):,} answers, not written")
            return
        requests = self._predicted_requests() if trainer.world_size == 1 else []
        name = "predictions.jsonl" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.jsonl"
        path = run_folder(trainer) / name
        if len(requests) == len(answers):
            rows = [{**request, "answer": answer} for request, answer in zip(requests, answers, strict=True)]
        else:
            rows = [{"answer": answer} for answer in answers]
        write_text(path, "".join(json_text(row) + "\n" for row in rows))
        print(printable(f"{len(answers):,} answers written to {path}"))

    def _predicted_requests(self) -> list[dict[str, object]]:
        """Ids and messages of the requests that were answered; empty for a DataModule that isn't this package's."""
        from lightning_ft.data.pairs import PairDataModule

        if not isinstance(self.datamodule, PairDataModule):
            return []
        rows = (row for part in self.datamodule.splits.rows["predict"] for row in part)
        return [{"id": row.id, "request": list(row.prompt_messages)} for row in rows]

    def _parse_ckpt_path(self) -> None:
        """Take no arguments from the checkpoint; the module checks that it fits the configured ones."""

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Let `--optimizer` and `--lr_scheduler` replace the module's own.

        LightningCLI would build them here from all parameters. The module has no parameters yet, since its weights are
        loaded later, and most parameters of a model with an adapter are frozen. So they are built in
        `configure_optimizers` from the trainable ones.
        """
        optimizer, scheduler = (self._get(self.config_init, key) for key in ("optimizer", "lr_scheduler"))
        if not optimizer and not scheduler:
            return
        own, cli = self.model.configure_optimizers, type(self)

        def configure_optimizers(module: LightningModule) -> object:
            if optimizer:
                trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
                built = _cli.instantiate_class(trainable, optimizer)
            else:
                built = own()["optimizer"]
            return cli.configure_optimizers(
                module, built, _cli.instantiate_class(built, scheduler) if scheduler else None
            )

        self.model.configure_optimizers = MethodType(configure_optimizers, self.model)
