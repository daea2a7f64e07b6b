"""`lightning-ft fit|validate|test|predict|preview|export`: a LightningCLI in subclass mode.

One YAML file holds `trainer`, `model`, `data` and `trainer.callbacks`; the model's name stands in it once, since the
data takes its tokenizer from the model.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import MethodType
from typing import Any

from lightning_ft._lightning import LightningDataModule, LightningModule, Trainer, cli_module
from lightning_ft.commands import COMMANDS
from lightning_ft.errors import ConfigError, GateError, MeasurementError
from lightning_ft.importing import without_imports
from lightning_ft.printable import printable

_cli = cli_module()
_DESCRIPTION = "Fine-tune language models. Also: " + "; ".join(f"`{name}`: {does}" for name, does in COMMANDS.items())


class FineTuningTrainer(Trainer):
    """The Trainer of the command line: the usual one, and two subcommands that train nothing."""

    def preview(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        examples: int = 3,
        weights: bool = False,
    ) -> None:
        """Print examples with their supervised tokens, and what would be cut or dropped.

        Args:
            model: Whose tokenizer is used, where the data has none of its own.
            datamodule: What would be trained on.
            examples: How many rows of each split to show.
            weights: Load the model too, and print a table of what would be trained. Otherwise no weights are loaded.
        """
        from lightning_ft.data.module import RowDataModule
        from lightning_ft.data.preview import preview

        if not isinstance(datamodule, RowDataModule):
            raise ConfigError("preview shows the rows of a DataModule of lightning_ft: give one as data.")
        own = datamodule.hparams["tokenizer"] is not None
        preview(datamodule, None if own else getattr(model, "tokenizer", None), examples=examples)
        if weights:
            from lightning_ft.modules.base import FineTuning

            if not isinstance(model, FineTuning):
                raise ConfigError(f"weights=true: {type(model).__name__} isn't a module of lightning_ft.")
            print(printable(model.what_is_trained()))

    def export(
        self,
        model: LightningModule,
        ckpt_path: str,
        output: str,
        datamodule: LightningDataModule | None = None,
        merge: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Write a checkpoint as a folder that plain transformers and PEFT load.

        Args:
            model: The module of the run that wrote the checkpoint.
            ckpt_path: The checkpoint.
            output: The folder to write.
            datamodule: Not used.
            merge: Fold an adapter into the base weights; refused where greedy output would change.
            overwrite: Write into a folder that isn't empty.
        """
        from lightning_ft.modules.base import FineTuning

        if not isinstance(model, FineTuning):
            raise ConfigError(f"{type(model).__name__} can't be exported: it isn't a module of lightning_ft.")
        model.load_checkpoint(ckpt_path)
        folder = model.export(output, merge=merge, overwrite=overwrite)
        print(printable(f"Exported to {folder}"))


class FineTuningCLI(_cli.LightningCLI):  # type: ignore[name-defined,misc]
    """The command line.

    Args:
        args: In place of the process's own arguments.
        run: Run the subcommand; False to only build `trainer`, `model` and `datamodule`.
        save_config: Write the configuration into the logger's folder when training starts.

    Example:
        >>> sorted(FineTuningCLI.subcommands())
        ['export', 'fit', 'predict', 'preview', 'test', 'validate']
    """

    def __init__(self, args: list[str] | None = None, run: bool = True, save_config: bool = True) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=FineTuningTrainer,
            save_config_callback=_cli.SaveConfigCallback if save_config else None,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            parser_kwargs={"prog": "lightning-ft", "description": _DESCRIPTION} if run else {},
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's own, and those of `FineTuningTrainer`."""
        own = {"preview": {"model", "datamodule"}, "export": {"model", "datamodule"}}
        return {**_cli.LightningCLI.subcommands(), **own}

    def instantiate_classes(self) -> None:
        """Build what the configuration names; for a preview without the code of rewards and scorers."""
        with without_imports() if self.subcommand == "preview" else nullcontext():
            super().instantiate_classes()

    def after_fit(self) -> None:
        """Tell by an error what didn't stop the run.

        Raises:
            MeasurementError: If something could not be measured or written.
            GateError: If quality wasn't shown to be kept, or a limit was broken at which training was to stop.
        """
        callbacks: list[Any] = self.trainer.callbacks
        failures = [failure for callback in callbacks for failure in getattr(callback, "failures", ())]
        if failures:
            raise MeasurementError(f"Training ran to its end. What failed along the way: {' '.join(failures)}")
        if gates := [callback.name for callback in callbacks if getattr(callback, "gate_failed", False)]:
            raise GateError(f"Training ran to its end. The limits of these don't hold: {', '.join(gates)}.")

    def _parse_ckpt_path(self) -> None:
        """The configuration file says what the model is; the module checks that a checkpoint fits it."""

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Let `--optimizer` and `--lr_scheduler` take the place of the module's own.

        LightningCLI builds them here, from all parameters. There are none yet: weights are loaded later, and then most
        of an adapted model's are frozen.
        """
        optimizer, scheduler = (self._get(self.config_init, key) for key in ("optimizer", "lr_scheduler"))
        if not optimizer and not scheduler:
            return
        own, cli = self.model.configure_optimizers, type(self)

        def configure_optimizers(module: LightningModule) -> Any:
            if optimizer:
                trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
                built = _cli.instantiate_class(trainable, optimizer)
            else:
                built = own()["optimizer"]
            return cli.configure_optimizers(
                module, built, _cli.instantiate_class(built, scheduler) if scheduler else None
            )

        self.model.configure_optimizers = MethodType(configure_optimizers, self.model)
