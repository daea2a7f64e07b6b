"""Writes completions of a policy to a file and to loggers, and optionally prints them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_ft._lightning import Callback, LightningModule, Trainer
from lightning_ft.arguments import CheckedArguments
from lightning_ft.callbacks.base import describe_error, is_dev_run, is_trainer
from lightning_ft.distributed import rank_zero_info, rank_zero_warn
from lightning_ft.document.markdown import markdown_table
from lightning_ft.errors import ConfigError
from lightning_ft.modules.samples import RolloutSamples, append_samples, drop_samples, rename_existing
from lightning_ft.printable import printable
from lightning_ft.run_checkpoints import run_folder
from lightning_ft.types import Message

MAX_CELL_LENGTH = 600
"""Largest number of characters of a text in Markdown and on the console; files and tables of loggers contain all."""


def samples_columns(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[object]]]:
    """Flatten rows of `RolloutSamples.rows` into a table.

    Args:
        rows: Rows of one step; at least one.

    Returns:
        Names of the columns, and the cells of each row: strings, numbers, booleans or None.

    Example:
        >>> row = {"step": 3, "prompt": "2+2?", "completion": "4", "rewards": {"correct": 1.0}, "reward": 1.0}
        >>> row |= {"advantage": 0.5, "truncated": False, "length": 2}
        >>> samples_columns([row])[0]
        ['step', 'prompt', 'completion', 'rewards/correct', 'reward', 'advantage', 'truncated', 'length']
    """
    data = [_cells(row) for row in rows]
    return list(data[0]), [list(cells.values()) for cells in data]


def samples_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Render the rows of one step as a Markdown table."""
    columns, data = samples_columns(rows)
    cells = [[_short(cell) for cell in row] for row in data]
    return "\n".join(markdown_table(columns, cells)) + "\n"


def samples_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Render the rows of one step as a table for the console."""
    columns, data = samples_columns(rows)
    table = Table(title=f"Completions of step {rows[0]['step']:,}", title_justify="left", show_lines=True)
    for column in columns[1:]:
        table.add_column(Text(printable(column, one_line=True)), overflow="fold")
    for row in data:
        table.add_row(*(Text(printable(_short(cell))) for cell in row[1:]))  # Text doesn't interpret brackets as markup
    return table


def _cells(row: Mapping[str, Any]) -> dict[str, object]:
    return {
        "step": row["step"],
        "prompt": _text(row["prompt"]),
        "completion": row["completion"],
        **{f"rewards/{name}": value for name, value in row["rewards"].items()},
        **{name: row[name] for name in ("reward", "advantage", "truncated", "length")},
        **{f"extra/{name}": str(value) for name, value in row.get("extra", {}).items()},
    }


def _text(prompt: str | Sequence[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {_content(message)}" for message in prompt)


def _content(message: Message) -> str:
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _short(cell: object) -> str:
    text = f"{cell:.4g}" if isinstance(cell, float) else ("" if cell is None else str(cell))
    return (
        text
        if len(text) <= MAX_CELL_LENGTH
        else f"{text[:MAX_CELL_LENGTH]}... (and {len(text) - MAX_CELL_LENGTH:,} characters more)"
    )


class SampleCompletions(CheckedArguments, Callback):
    """Shows completions of the policy with their prompts, rewards and advantages.

    They are appended to a JSONL file, and logged as a table (Weights & Biases, MLflow) or as text (TensorBoard). A
    resumed run first drops the rows that it will write again; a new run renames the file of an earlier run. With
    several ranks, the completions of rank 0 are shown.

    Without a Trainer, use `lightning_ft.modules.samples.write_samples`.

    Args:
        path: Path of the JSONL file; ``completions.jsonl`` in the logger's folder or in `default_root_dir` by default.
        every_n_steps: Number of optimizer steps between rollouts whose completions are shown.
        num_samples: Number of completions per rollout, spread evenly over its prompts; None for all.
        print_samples: Whether to print the completions too.
        name: Name of the table in loggers, and of the file if `path` is None.

    Raises:
        ConfigError: For numbers below 1; before training, for a module without rollouts.

    Example:
        >>> samples = SampleCompletions(every_n_steps=10, num_samples=4)
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        every_n_steps: int = 1,
        num_samples: int | None = 8,
        print_samples: bool = False,
        name: str = "completions",
    ) -> None:
        super().__init__()
        for argument, value in (("every_n_steps", every_n_steps), ("num_samples", num_samples)):
            if value is not None and value < 1:
                raise ConfigError(f"{argument}={value}: expected at least 1.")
        self.path = None if path is None else Path(path)
        self.every_n_steps, self.num_samples = every_n_steps, num_samples
        self.print_samples, self.name = print_samples, name
        self.written_to: Path | None = None
        """Path of the file, after training has started; None with `fast_dev_run`, which writes none."""
        self.failures: tuple[str, ...] = ()
        """Descriptions of samples that could not be written."""
        self._seen: RolloutSamples | None = None
        self._last_step: int | None = None

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints; it differs between callbacks with different names."""
        return f"SampleCompletions({self.name!r})"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the module has rollouts."""
        if not hasattr(pl_module, "last_rollout"):
            raise ConfigError(
                f"SampleCompletions shows the completions of a policy, but {type(pl_module).__name__} has no "
                "`last_rollout`. Use it with GRPO or PPO."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows that a resumed run will write again, or rename the file of an earlier run.

        Raises:
            ConfigError: With Fabric, which has no module with rollouts.
        """
        if not is_trainer(trainer):
            raise ConfigError(
                "SampleCompletions shows the rollouts of GRPO and PPO in a Trainer. In a loop of your own, use "
                "lightning_ft.modules.samples.write_samples."
            )
        # on all ranks, since the folder is broadcast
        folder = run_folder(trainer)
        self.written_to = None if is_dev_run(trainer) else self.path or folder / f"{self.name}.jsonl"
        self._seen, self.failures = None, ()
        if trainer.global_step == 0:
            self._last_step = None
        if not trainer.is_global_zero or self.written_to is None:
            return
        if trainer.global_step > 0:
            drop_samples(self.written_to, trainer.global_step)
        elif (renamed := rename_existing(self.written_to)) is not None:
            rank_zero_info(f"The completions of an earlier run were moved to {renamed}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Show the completions of a new rollout every `every_n_steps` optimizer steps."""
        record = pl_module.last_rollout
        if record is None or record is self._seen:
            return
        self._seen = record
        if self._last_step is not None and record.step // self.every_n_steps == self._last_step // self.every_n_steps:
            return
        self._last_step = record.step
        if trainer.is_global_zero and len(record):
            rows = record.rows(self.num_samples)
            if self.written_to is not None:
                self._try(f"to {self.written_to}", append_samples, rows, self.written_to)
            for logger in trainer.loggers:
                self._try(f"to {type(logger).__name__}", log_samples, logger, self.name, rows)
            if self.print_samples:
                Console().print(samples_table(rows))

    def _try(self, where: str, write: Callable[..., object], *arguments: object) -> None:
        """Write samples without stopping the run on failure; only the first failure per destination is reported."""
        try:
            write(*arguments)
        except Exception as error:
            what = f"SampleCompletions could not write {where}"
            if not any(earlier.startswith(what) for earlier in self.failures):
                failure = f"{what}: {describe_error(error)}"
                self.failures = (*self.failures, failure)
                rank_zero_warn(f"{failure}. Training continues.")

    def state_dict(self) -> dict[str, Any]:
        """Return the step whose completions were shown last."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step whose completions were shown last."""
        self._last_step = state_dict["last_step"]


def log_samples(logger: object, name: str, rows: Sequence[dict[str, Any]]) -> bool:
    """Log the rows of one step as a table or text, if the logger supports either.

    Args:
        logger: Logger of Lightning.
        name: Name of the table.
        rows: Rows of `RolloutSamples.rows`; at least one.

    Returns:
        Whether the rows were logged.
    """
    columns, data = samples_columns(rows)
    step = rows[0]["step"]
    if hasattr(logger, "log_table"):  # Weights & Biases
        logger.log_table(key=name, columns=columns, data=data, step=step)
        return True
    experiment: object = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_text"):  # TensorBoard
        experiment.add_text(name, samples_markdown(rows), step)
        return True
    if hasattr(experiment, "log_table") and hasattr(logger, "run_id"):  # MLflow, which appends to the table
        table = {column: [row[i] for row in data] for i, column in enumerate(columns)}
        experiment.log_table(logger.run_id, table, artifact_file=f"{name}.json")
        return True
    return False
