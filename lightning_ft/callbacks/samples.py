"""Writes the completions of a policy to a file, to the loggers and, on request, to the screen."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_ft._lightning import Callback
from lightning_ft.callbacks.base import described
from lightning_ft.distributed import rank_zero_info, rank_zero_warn
from lightning_ft.document.markdown import markdown_table
from lightning_ft.errors import ConfigError
from lightning_ft.modules.samples import RolloutRecord, append_samples, drop_samples, set_aside
from lightning_ft.printable import printable
from lightning_ft.types import Message

CELL = 600
"""Characters of a text that Markdown and the screen show; files and tables of loggers hold all of it."""


def samples_columns(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Rows of `RolloutRecord.rows` as a flat table.

    Args:
        rows: Of one step, at least one.

    Returns:
        The names of the columns, and a cell of each for every row: texts, numbers or None.

    Example:
        >>> row = {"step": 3, "prompt": "2+2?", "completion": "4", "rewards": {"correct": 1.0}, "reward": 1.0}
        >>> row |= {"advantage": 0.5, "truncated": False, "length": 2}
        >>> samples_columns([row])[0]
        ['step', 'prompt', 'completion', 'rewards/correct', 'reward', 'advantage', 'truncated', 'length']
    """
    data = [_cells(row) for row in rows]
    return list(data[0]), [list(cells.values()) for cells in data]


def samples_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of one step as a Markdown table."""
    columns, data = samples_columns(rows)
    cells = [[_short(cell) for cell in row] for row in data]
    return "\n".join(markdown_table(columns, cells)) + "\n"


def samples_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Rows of one step as a table on the screen."""
    columns, data = samples_columns(rows)
    table = Table(title=f"Completions of step {rows[0]['step']:,}", title_justify="left", show_lines=True)
    for column in columns[1:]:
        table.add_column(Text(printable(column, one_line=True)), overflow="fold")
    for row in data:
        table.add_row(*(Text(printable(_short(cell))) for cell in row[1:]))  # Text: brackets in it are no markup
    return table


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": row["step"],
        "prompt": _text(row["prompt"]),
        "completion": row["completion"],
        **{f"rewards/{name}": value for name, value in row["rewards"].items()},
        **{name: row[name] for name in ("reward", "advantage", "truncated", "length")},
        **{f"extra/{name}": str(value) for name, value in row.get("extra", {}).items()},
    }


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {_said(message)}" for message in prompt)


def _said(message: Message) -> str:
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _short(cell: Any) -> str:
    text = f"{cell:.4g}" if isinstance(cell, float) else ("" if cell is None else str(cell))
    return text if len(text) <= CELL else f"{text[:CELL]}... (and {len(text) - CELL:,} characters more)"


class SampleCompletions(Callback):
    """Shows completions of the policy with their prompts, rewards and advantages.

    They are appended to a JSONL file, and given to loggers that show tables (Weights & Biases, MLflow) or text
    (TensorBoard). A run that is resumed first drops the rows that it will write again; a new run puts the file of an
    earlier one aside. On several ranks it is the first one's completions that are shown.

    Without a Trainer use `lightning_ft.modules.samples.write_samples`.

    Args:
        path: Path of the file; by default ``completions.jsonl`` in the logger's folder, or in `default_root_dir`.
        every_n_steps: Number of optimizer steps between rollouts whose completions are shown.
        num_samples: Number of completions per rollout, spread evenly over its prompts; None for all.
        print_samples: Whether to print the completions, too.
        name: Name of the table in loggers, and of the file without `path`.

    Raises:
        ConfigError: For a module that has no rollouts, before training.

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
        """The file, once training has started."""
        self.failures: tuple[str, ...] = ()
        """What could not be written, in words."""
        self._seen: RolloutRecord | None = None
        self._last_step: int | None = None

    @property
    def state_key(self) -> str:
        """Names this callback's state in checkpoints, so that two with different names can stand side by side."""
        return f"SampleCompletions({self.name!r})"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a module that has no rollouts."""
        if not hasattr(pl_module, "last_rollout"):
            raise ConfigError(
                f"SampleCompletions shows what a policy writes in training, and {type(pl_module).__name__} has no "
                "`last_rollout`: use it with GRPO or PPO."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Get the file ready: without the rows that will be written again, or without those of another run."""
        # asked on all ranks: the first one tells the others
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        self.written_to = self.path or folder / f"{self.name}.jsonl"
        self._seen, self.failures = None, ()
        if trainer.global_step == 0:
            self._last_step = None
        if not trainer.is_global_zero:
            return
        if trainer.global_step > 0:
            drop_samples(self.written_to, trainer.global_step)
        elif (aside := set_aside(self.written_to)) is not None:
            rank_zero_info(f"The completions of an earlier run are now in {aside}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show a new rollout, where it is one of those to show."""
        record = pl_module.last_rollout
        if record is None or record is self._seen:
            return
        self._seen = record
        if self._last_step is not None and record.step // self.every_n_steps == self._last_step // self.every_n_steps:
            return
        self._last_step = record.step
        if trainer.is_global_zero and len(record):
            rows = record.rows(self.num_samples)
            assert self.written_to is not None
            self._try(f"to {self.written_to}", append_samples, rows, self.written_to)
            for logger in trainer.loggers:
                self._try(f"to {type(logger).__name__}", log_samples, logger, self.name, rows)
            if self.print_samples:
                Console().print(samples_table(rows))

    def _try(self, where: str, write: Callable[..., object], *arguments: Any) -> None:
        """Write samples; they aren't worth a run. Only the first failure is reported, since others are like it."""
        try:
            write(*arguments)
        except Exception as error:
            what = f"SampleCompletions could not write {where}"
            if not any(earlier.startswith(what) for earlier in self.failures):
                failure = f"{what}: {described(error)}"
                self.failures = (*self.failures, failure)
                rank_zero_warn(f"{failure}. Training goes on.")

    def state_dict(self) -> dict[str, Any]:
        """The step shown last."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the step shown last."""
        self._last_step = state_dict["last_step"]


def log_samples(logger: Any, name: str, rows: Sequence[dict[str, Any]]) -> bool:
    """Give rows of one step to a logger that has a place for them.

    Args:
        logger: Any logger of Lightning's.
        name: Name of the table.
        rows: See `RolloutRecord.rows`; at least one.

    Returns:
        Whether it had one.
    """
    columns, data = samples_columns(rows)
    step = rows[0]["step"]
    if hasattr(logger, "log_table"):  # Weights & Biases
        logger.log_table(key=name, columns=columns, data=data, step=step)
        return True
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_text"):  # TensorBoard
        experiment.add_text(name, samples_markdown(rows), step)
        return True
    if hasattr(experiment, "log_table") and hasattr(logger, "run_id"):  # MLflow, which appends
        table = {column: [row[i] for row in data] for i, column in enumerate(columns)}
        experiment.log_table(logger.run_id, table, artifact_file=f"{name}.json")
        return True
    return False
