"""Measures the token savings of a training run: the prompted arm before its first step, the tuned arm after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_ft._lightning import LightningModule, Trainer, active_datamodule
from lightning_ft.arguments import check_integer, check_requests
from lightning_ft.callbacks.base import TrainerOrFabric, is_trainer, precision_of, shows_progress
from lightning_ft.callbacks.measuring import ComparingCallback
from lightning_ft.callbacks.monitored import check_monitors
from lightning_ft.data.module import RowDataModule
from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.data.sources import Sources
from lightning_ft.data.splits import Splits
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ConfigError, SavingsError
from lightning_ft.evaluation.savings.card import savings_for_card
from lightning_ft.evaluation.savings.cost import Prices
from lightning_ft.evaluation.savings.endpoint import Endpoint
from lightning_ft.evaluation.savings.first_token import TIMED_REQUESTS
from lightning_ft.evaluation.savings.measurement import SavingsMeasurement, check_numbers
from lightning_ft.evaluation.savings.overlap import TrainRows
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.evaluation.scorers import Scorer, check_scorer
from lightning_ft.models.card_facts import MeasuredResult
from lightning_ft.models.card_sections import SAVINGS as CARD_TITLE
from lightning_ft.models.unwrap import (
    model_of,
    required_model,
    required_tokenizer,
    tokenizer_is_late,
    weights_fingerprint,
)
from lightning_ft.report.collect import SAVINGS
from lightning_ft.rollout.structured import StructuredOutputs
from lightning_ft.types import Request


class TokenSavings(ComparingCallback):
    """Measures how many tokens per request training saves, and whether the quality of the answers is kept.

    The measurement has three arms. Before the first step the original weights answer with the baseline's prompt
    (prompted) and without it (untuned); after training the trained weights answer without it (tuned). Metrics are
    logged as ``token_savings/...``; the result is printed as a table and written to a folder as JSON, Markdown and PNG
    (with matplotlib). The first two arms are saved in checkpoints, so that a resumed run compares with the original
    weights.

    With Fabric, pass `requests` and `tokenizer`, and call ``fabric.call("on_train_start", fabric, model)`` before the
    loop and ``fabric.call("on_train_end", fabric, model)`` after it. Without Trainer or Fabric, use
    `lightning_ft.evaluation.savings.measurement.SavingsMeasurement`.

    Args:
        baseline: System prompt and few-shot examples that training should replace, or path of a JSON file with them.
        scorer: ``"exact"``, ``"normalized"``, ``"label"``, ``"json"``, the import path of a function
            (``"package.module.function"``), or a function ``f(output, reference)`` that returns a number from 0 to 1.
        margin: Largest acceptable loss of quality, chosen beforehand: 0.02 for two percentage points.
        min_quality: Quality below which an arm is of no use. By default the prompted arm must be shown to be better
            than the untuned one, and than always giving the most frequent reference; if it isn't, the verdict is VOID.
        endpoint: Endpoint that answers in the prompted arm: the model that you pay for now, with your prompt, against
            the tuned one. Its tokens are those that it counts; pass its prices as `input`, `cached_input` and `output`,
            and those of the tuned model as `tuned_input` and so on. By default the original weights answer.
        prices: Prices of tokens and of training.
        split: Split of the DataModule to measure on. Without test rows, validation rows are used; never training rows.
        requests: Requests to measure on, instead of those of the DataModule.
        train_rows: Rows that the model is trained on, as data sources or as requests, for counting the requests that
            appear among them; those of the Trainer's DataModule by default.
        max_requests: Largest number of requests, drawn at random with `seed`; all by default.
        max_new_tokens: Largest number of tokens per answer.
        structured_outputs: Format of all answers, which every arm is restricted to as a server would; True for the
            `structured_output` of each request. By default answers are free text.
        batch_size: Number of prompts per generated batch.
        every_n_epochs: Number of epochs between measurements of the tuned arm during training, whose metrics can be
            monitored; None to measure at the end only.
        output_dir: Folder of the files. None for ``token_savings`` in the logger's folder or in `default_root_dir`
            (with Fabric, no files are written), False for no files.
        tokenizer: Tokenizer of the model; the module's by default.
        timed_requests: Number of requests whose time to first token is measured; 0 for none.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap and of the draw of requests.
        progress: Whether to show progress bars; by default if the Trainer does.
        name: Prefix of the logged names, and name of the folder.

    Raises:
        SavingsError: For an argument of another type or out of range, and for a measurement that would be misleading;
            raised before training if possible.
        UnknownArgumentError: For an argument that TokenSavings does not take, with the nearest name.

    Example:
        >>> baseline = PromptBaseline("Answer with the name of one department.")
        >>> savings = TokenSavings(baseline, scorer="label", margin=0.05)
    """

    title = "Token savings"
    files = (SAVINGS, "token_savings.md", "token_savings.png")
    metrics = ("input", "output", "total", "per_success", "quality_", "gate_", "truncated_rate", "cost_", "break_even")

    def __init__(
        self,
        baseline: PromptBaseline | str | Path | None = None,
        *,
        endpoint: Endpoint | None = None,
        scorer: str | Scorer = "normalized",
        margin: float = 0.02,
        min_quality: float | None = None,
        prices: Prices | None = None,
        split: Literal["test", "validation"] = "test",
        requests: list[Request] | None = None,
        train_rows: list[Request] | Sources | None = None,
        max_requests: int | None = None,
        max_new_tokens: int = 128,
        structured_outputs: StructuredOutputs | bool = False,
        batch_size: int = 32,
        every_n_epochs: int | None = None,
        output_dir: str | Path | bool | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        timed_requests: int = TIMED_REQUESTS,
        resamples: int = 9999,
        seed: int = 0,
        progress: bool | None = None,
        name: str = "token_savings",
    ) -> None:
        super().__init__()
        if baseline is None:
            raise SavingsError(
                "TokenSavings needs the prompt that you would use without training, to compare with. Pass "
                "TokenSavings(PromptBaseline(system=..., few_shot=[...]))."
            )
        if split not in ("test", "validation"):
            raise SavingsError(
                f"split={split!r}: expected 'test' or 'validation'; training rows would measure memorization."
            )
        check_integer("max_new_tokens", max_new_tokens, 1, SavingsError)
        for argument, optional in (("max_requests", max_requests), ("every_n_epochs", every_n_epochs)):
            if optional is not None:
                check_integer(argument, optional, 1, SavingsError)
        check_numbers(
            margin, min_quality, batch_size=batch_size, timed_requests=timed_requests, resamples=resamples, seed=seed
        )
        check_scorer(scorer)
        if requests is not None:
            check_requests(requests, SavingsError)
        _check_objects(baseline, prices, structured_outputs, tokenizer, endpoint)
        self.baseline = PromptBaseline.from_file(baseline) if isinstance(baseline, (str, Path)) else baseline
        self.split, self.requests, self.train_rows, self.tokenizer = split, requests, train_rows, tokenizer
        self.every_n_epochs, self.output_dir, self.progress, self.name = every_n_epochs, output_dir, progress, name
        self.options: dict[str, Any] = {
            "endpoint": endpoint,
            "scorer": scorer,
            "margin": margin,
            "min_quality": min_quality,
            "prices": prices,
            "max_requests": max_requests,
            "max_new_tokens": max_new_tokens,
            "structured_outputs": structured_outputs,
            "batch_size": batch_size,
            "timed_requests": timed_requests,
            "resamples": resamples,
            "seed": seed,
        }
        """Options of the measurement, by the names of `SavingsMeasurement`'s arguments."""
        self.result: SavingsResult | None = None
        """The last result; None before the first measurement."""
        self._measurement: SavingsMeasurement | None = None
        self._measured: tuple[float, ...] = ()
        self._split_used = ""

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints; it differs between callbacks with different names."""
        return f"TokenSavings({self.name!r})"

    # ---------------------------------------------------------------- hooks, in call order

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check requests and prompts before weights are loaded.

        Raises:
            SavingsError: For problems that can be found without the model.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.keep_state(trainer)
            late = tokenizer_is_late(self.tokenizer, pl_module)
            self._measurement = None if late else self._new_measurement(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the prompts fit the model.

        Raises:
            SavingsError: For the first request whose prompt doesn't fit.
        """
        measurement = self._measurement = self._measurement or self._new_measurement(trainer, pl_module)
        if (model := model_of(pl_module)) is not None:
            measurement.check_model(model)

    def on_train_start(self, trainer: TrainerOrFabric | None = None, pl_module: nn.Module | None = None) -> None:
        """Measure the original weights, unless their results were loaded from a checkpoint.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.

        Raises:
            SavingsError: If training has already changed the weights.
            ConfigError: If something monitors a metric in epochs in which it isn't measured.
        """
        self.result, self._measured, self._epochs = None, (), 0
        if is_trainer(trainer):
            check_monitors(trainer, self.metric_names(), "TokenSavings", self.every_n_epochs)
        prepared = self._measurement if is_trainer(trainer) else None  # of an earlier Fabric loop it would be stale
        self._measurement = measurement = prepared or self._new_measurement(trainer, pl_module)
        if self._loaded:
            measurement.load_state_dict(self._loaded)
            self._loaded = None  # a later fit with this callback starts from other weights
        if measurement.has_before:
            return
        if is_trainer(trainer) and trainer.global_step > 0:
            raise SavingsError(
                f"This run resumes at step {trainer.global_step:,} from a checkpoint without a prompted arm, and "
                "its weights are no longer the original ones. Start a new run with TokenSavings among the callbacks, "
                "or compare the exported models with lightning_ft.evaluation.savings.measurement.measure_token_savings."
            )
        with precision_of(trainer):
            measurement.before(required_model(pl_module, "TokenSavings", SavingsError))

    def on_train_epoch_end(self, trainer: Any = None, pl_module: Any = None) -> None:
        """Measure and log the tuned arm every `every_n_epochs` epochs; with Fabric, calls of this hook are counted.

        Raises:
            ConfigError: If the measurement failed and one of its metrics is monitored.
        """
        epochs = self.epoch_ended(trainer)
        if self.every_n_epochs is not None and epochs % self.every_n_epochs == 0:
            self.measure_during_training(trainer, pl_module, f"after epoch {epochs - 1}")

    def measure(self, trainer: TrainerOrFabric | None, pl_module: nn.Module | None) -> dict[str, float]:
        """Measure the tuned arm, unless these weights were the last measured.

        Raises:
            SavingsError: If the scorer fails, or no answer of an arm is correct.
        """
        if self._measurement is None:
            raise SavingsError("The prompted arm has not been measured. Call on_train_start before the first step.")
        model = required_model(pl_module, "TokenSavings", SavingsError)
        weights = weights_fingerprint(model)
        if self.result is None or weights != self._measured:
            self.result = None
            provenance = {"split": self._split_used} if self._split_used else {}
            if data := training_data(trainer):
                provenance["training_data"] = data
            with precision_of(trainer):
                self.result = self._measurement.after(model, provenance)
            self._measured = weights
        return self.with_prefix(self.result.metrics())

    def show(self, folder: Path | None) -> None:
        """Print the table with its notes, and write the files."""
        assert self.result is not None
        self.result.print()
        if folder is not None:
            self.report_written(*self.result.save(folder))

    def undefined_metrics(self) -> dict[str, float]:
        """Return a gate that isn't passed."""
        return {"gate_passed": 0.0}

    def for_card(self) -> MeasuredResult | None:
        """The last result, or its failure, as a model card reports it; None if nothing was measured."""
        if self.undefined is not None:
            return MeasuredResult(CARD_TITLE, failed=True)
        return None if self.result is None else savings_for_card(self.result)

    @property
    def gate_failed(self) -> bool:
        """Whether quality was not shown to be kept, or the prompt is not worth replacing."""
        return self.result is not None and not self.result.gate.passed

    # ---------------------------------------------------------------- helpers

    def _new_measurement(self, trainer: TrainerOrFabric | None, module: nn.Module | None) -> SavingsMeasurement:
        tokenizer = required_tokenizer(self.tokenizer, module, "TokenSavings", SavingsError)
        requests = self.requests if self.requests is not None else self._rows(trainer)
        return SavingsMeasurement(
            tokenizer,
            requests,
            self.baseline,
            progress=shows_progress(trainer, self.progress),
            train_rows=self._train_rows(trainer),
            **self.options,
        )

    def _train_rows(self, trainer: TrainerOrFabric | None) -> TrainRows | None:
        if self.train_rows is not None:
            return self.train_rows
        splits = getattr(active_datamodule(trainer), "splits", None)
        return splits.training_index() if isinstance(splits, Splits) else None

    def _rows(self, trainer: TrainerOrFabric | None) -> list[Request]:
        data: object = active_datamodule(trainer)
        if not hasattr(data, "requests"):
            raise SavingsError("TokenSavings has no requests. Pass requests=, or a PairDataModule to the Trainer.")
        reasons = []
        for split in dict.fromkeys((self.split, "validation")):
            try:
                found: list[Request] = data.requests(split)
            except ConfigError as error:  # no such rows
                reasons.append(str(error))
                continue
            self._split_used = split
            if split != self.split:
                rank_zero_warn("Token savings are measured on the validation rows, since there are no test rows.")
            return found
        raise SavingsError(
            f"TokenSavings has no rows to measure on; training rows would measure memorization. {' '.join(reasons)} "
            "Set test= or validation= of the PairDataModule."
        )


def training_data(trainer: object) -> str:
    """Sources and number of a run's training rows; empty if they aren't known.

    Args:
        trainer: The Trainer, or Fabric.
    """
    data: object = active_datamodule(trainer)
    if not isinstance(data, RowDataModule):
        return ""
    rows, _ = data.training_rows()
    return f"{rows['training data']} ({rows['training rows']:,} rows)" if "training rows" in rows else ""


def _check_objects(
    baseline: object, prices: object, structured_outputs: object, tokenizer: object, endpoint: object
) -> None:
    """Refuse values of types that would fail only when they are used, such as dicts."""
    if not isinstance(baseline, (PromptBaseline, str, Path)):
        raise SavingsError(
            f"baseline is a value of type {type(baseline).__name__}: expected PromptBaseline(system=..., "
            "few_shot=[...]), or the path of a JSON file with these two keys."
        )
    if endpoint is not None and not isinstance(endpoint, Endpoint):
        raise SavingsError(
            f"endpoint is a value of type {type(endpoint).__name__}: expected Endpoint(url, model, ...)."
        )
    if prices is not None and not isinstance(prices, Prices):
        raise SavingsError(
            f"prices is a value of type {type(prices).__name__}: expected Prices(input=..., output=..., currency=..., "
            "date=...)."
        )
    if not isinstance(structured_outputs, (bool, StructuredOutputs)):
        raise SavingsError(
            f"structured_outputs is a value of type {type(structured_outputs).__name__}: expected "
            "StructuredOutputs(choices=[...]), with json_schema= or regex= in its place, or True or False."
        )
    if isinstance(tokenizer, str):
        raise SavingsError(
            f"tokenizer={tokenizer!r}: expected a loaded tokenizer. Pass AutoTokenizer.from_pretrained({tokenizer!r})."
        )
