"""Chooses how much of what was trained to keep: quality against forgetting over scales of the update."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft._lightning import LightningModule, Trainer
from lightning_ft.arguments import check_integer
from lightning_ft.callbacks.base import TrainerOrFabric, is_trainer, precision_of, shows_progress, validation_requests
from lightning_ft.callbacks.measuring import ComparingCallback
from lightning_ft.distributed import rank_zero_info, rank_zero_warn
from lightning_ft.errors import RetentionError
from lightning_ft.evaluation.retention.choices import ChoiceQuestion
from lightning_ft.evaluation.retention.frontier import FILE_NAME, FrontierResult, check_budget, sweep_scales
from lightning_ft.evaluation.retention.measurement import RetentionMeasurement
from lightning_ft.evaluation.savings.arms import run_arm
from lightning_ft.evaluation.savings.plan import MeasurementPlan, answer_plan
from lightning_ft.evaluation.scorers import Scorer
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.load import context_length
from lightning_ft.models.unwrap import required_model, required_tokenizer, tokenizer_is_late
from lightning_ft.models.update_scale import UpdateScale, copies_of, copy_weights
from lightning_ft.rollout.structured import StructuredOutputs
from lightning_ft.types import Request


class RetentionFrontier(ComparingCallback):
    """Sweeps the scale of a trained update, and keeps the one with the best quality that forgets no more than allowed.

    One training gives a whole frontier: at a smaller scale the model is closer to the original, so it has forgotten
    less and usually answers a little worse. When training ends, each scale is measured on the validation rows and on
    general texts; the weights are then those of the chosen scale, which `ExportModel` exports and `TokenSavings`
    measures, whatever the order of the callbacks. Checkpoints keep the trained weights, and so does ``best/``, which
    `ExportModel` makes of one. If no scale is within the budget, the trained weights are kept, and `gate_failed` is
    True.

    Works for a new LoRA adapter and for full fine-tuning, whose original weights it keeps in the memory of the CPU. For
    loops without a Trainer there is `lightning_ft.evaluation.retention.frontier.sweep_scales`.

    Args:
        texts: General texts, see `Retention`.
        budget: Limits of what may be forgotten: ``kl`` (nats per token on the general texts), ``ppl_ratio``, and with
            `choices` ``choices_lost`` (a share); point estimates are compared. None chooses by quality alone.
        scales: Scales of the update to try; 1 is the trained model.
        scorer: Name or function that grades answers, see `TokenSavings`.
        requests: Requests with reference answers; by default the validation rows of the Trainer's DataModule.
        max_requests: Largest number of requests, sampled with `seed` if there are more; None for all.
        max_new_tokens: Largest number of tokens per answer.
        structured_outputs: Format of the answers, see `TokenSavings`.
        choices: Multiple-choice questions, see `Retention`.
        max_texts: Largest number of texts to use, from the first.
        max_tokens: Largest number of tokens per text; longer texts are truncated.
        batch_size: Number of answers generated at a time.
        output_dir: Folder of the file. None for ``retention_frontier`` in the logger's folder or in
            `default_root_dir` (with Fabric, no file is written), False for no file.
        tokenizer: Tokenizer of the model; the module's by default.
        name: Prefix of the logged names, and name of the folder.
        progress: Whether to show progress bars; by default if the Trainer does.
        resamples: Number of bootstrap resamples.
        seed: Seed of the sample of requests and of the bootstrap.

    Raises:
        RetentionError: For a budget or scales that can't be measured; raised before training if possible.
        SavingsError: For requests that can't be measured.

    Example:
        >>> frontier = RetentionFrontier(["It was a bright cold day in April."], budget={"kl": 0.05})
        >>> frontier.scales
        (0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
    """

    title = "Retention frontier"
    files = (FILE_NAME,)
    finish_order: ClassVar[int] = 0

    def __init__(
        self,
        texts: str | list[str],
        *,
        budget: dict[str, float] | None = None,
        scales: tuple[float, ...] | list[float] = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0),
        scorer: str | Scorer = "normalized",
        requests: list[Request] | None = None,
        max_requests: int | None = None,
        max_new_tokens: int = 128,
        structured_outputs: StructuredOutputs | bool = False,
        choices: str | list[ChoiceQuestion] | None = None,
        max_texts: int = 64,
        max_tokens: int = 256,
        batch_size: int = 32,
        output_dir: str | Path | bool | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "retention_frontier",
        progress: bool | None = None,
        resamples: int = 9999,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, 1, RetentionError)
        check_budget(budget, scales, choices=choices is not None)
        self.budget, self.scales = dict(budget or {}), tuple(scales)
        self.texts, self.requests, self.tokenizer = texts, requests, tokenizer
        self.output_dir, self.progress, self.name = output_dir, progress, name
        self._bootstrap: dict[str, Any] = {"resamples": resamples, "seed": seed}
        self._batch_size = batch_size
        self._answers: dict[str, Any] = {
            "scorer": scorer,
            "max_requests": max_requests,
            "max_new_tokens": max_new_tokens,
            "structured_outputs": structured_outputs,
            "seed": seed,
        }
        self._retention: dict[str, Any] = {"choices": choices, "max_texts": max_texts, "max_tokens": max_tokens}
        self.result: FrontierResult | None = None
        """The frontier and the chosen scale; None before training has ended."""
        self._plan: MeasurementPlan | None = None
        self._measurement: RetentionMeasurement | None = None
        self._original: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints; it differs between callbacks with different names."""
        return f"RetentionFrontier({self.name!r})"

    # ---------------------------------------------------------------- hooks, in call order

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read texts and requests before weights are loaded.

        Raises:
            RetentionError: For problems with the texts that can be found without the model.
            SavingsError: For problems with the requests.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.keep_state(trainer)
            self._plan = self._measurement = None
            if not tokenizer_is_late(self.tokenizer, pl_module):
                self._prepare(trainer, pl_module)

    def on_train_start(self, trainer: TrainerOrFabric | None = None, pl_module: nn.Module | None = None) -> None:
        """Determine the original model, unless it was loaded from a checkpoint.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.

        Raises:
            RetentionError: If training has already changed the weights, or an adapter didn't start at zero.
        """
        self.result = None
        if not is_trainer(trainer) or self._plan is None:
            self._prepare(trainer, pl_module)
        assert self._plan is not None
        assert self._measurement is not None
        model = required_model(pl_module, "RetentionFrontier", RetentionError)
        self._plan.check_context(context_length(base_of(model)))
        trained = is_trainer(trainer) and trainer.global_step > 0
        if trained and self._loaded is None:
            raise RetentionError(
                "RetentionFrontier measures from the first step on, and this run has already been trained: put it "
                "among the callbacks from the start, and begin a new run."
            )
        if not (trained and self._original):
            self._original = self._original_weights(model, pl_module, trained=trained)
        if self._loaded is not None:
            self._measurement.load_state_dict(self._loaded)
            self._loaded = None
        if not self._measurement.has_before:
            with precision_of(trainer):
                self._measurement.before(model)
        UpdateScale(model, self._original)  # refuses now what can't be scaled later
        if isinstance(model, PeftModel) and self._measurement.base_type != "adapter_off":
            raise RetentionError(
                "The adapter didn't start at zero: it was trained before, or its initialization changed the base "
                "weights (PiSSA, OLoRA), so scaling it doesn't lead back to the original model. Start a new adapter "
                "with the default init_lora_weights."
            )

    def on_train_batch_start(
        self,
        trainer: TrainerOrFabric | None = None,
        pl_module: nn.Module | None = None,
        batch: object = None,
        batch_idx: int = 0,
    ) -> None:
        """Keep the original of weights that have been unfrozen since the start, before they are trained."""
        model = required_model(pl_module, "RetentionFrontier", RetentionError)
        if not isinstance(model, PeftModel):
            unfrozen = {
                name: p for name, p in model.named_parameters() if p.requires_grad and name not in self._original
            }
            self._original |= copies_of(unfrozen)

    def measure(self, trainer: TrainerOrFabric | None, pl_module: nn.Module | None) -> dict[str, float]:
        """Sweep the scales and leave the weights at the chosen one.

        Raises:
            RetentionError: If `on_train_start` didn't run, or the weights contain NaN.
        """
        self.result = None
        plan, measurement = self._plan, self._measurement
        if plan is None or measurement is None:
            raise RetentionError(
                "RetentionFrontier has no original model. Call its on_train_start before the first step."
            )
        model = required_model(pl_module, "RetentionFrontier", RetentionError)
        tokenizer = self._tokenizer(pl_module)
        progress = shows_progress(trainer, self.progress)
        step = getattr(trainer, "global_step", None)
        with precision_of(trainer):
            self.result = sweep_scales(
                UpdateScale(model, self._original),
                self.scales,
                lambda: run_arm(
                    "tuned", model, tokenizer, plan, timed_requests=0, batch_size=self._batch_size, progress=progress
                ),
                lambda: measurement.after(model, step=step),
                budget=self.budget,
                provenance={"scorer": plan.scorer_name, "measured": plan.fingerprint, **self._bootstrap},
                **self._bootstrap,
            )
        return self.with_prefix(self.result.metrics())

    def show(self, folder: Path | None) -> None:
        """Log the headline, warn if no scale is within the budget, and write the file."""
        assert self.result is not None
        report = rank_zero_warn if self.result.chosen is None else rank_zero_info
        report(f"Retention frontier. {self.result.headline}")
        if folder is not None:
            self.report_written(self.result.save(folder))

    @property
    def gate_failed(self) -> bool:
        """Whether no scale is within the budget."""
        return self.result is not None and self.result.chosen is None

    # ---------------------------------------------------------------- helpers

    def _prepare(self, trainer: TrainerOrFabric | None, module: nn.Module | None) -> None:
        tokenizer = self._tokenizer(module)
        requests = validation_requests(self.requests, trainer, "RetentionFrontier", RetentionError)
        self._plan = answer_plan(tokenizer, requests, **self._answers)
        self._measurement = RetentionMeasurement(
            tokenizer,
            self.texts,
            progress=shows_progress(trainer, self.progress),
            **self._retention,
            **self._bootstrap,
        )

    def _tokenizer(self, module: nn.Module | None) -> PreTrainedTokenizerBase:
        return required_tokenizer(self.tokenizer, module, "RetentionFrontier", RetentionError)

    @staticmethod
    def _original_weights(model: CausalLM, module: Any, *, trained: bool) -> dict[str, Tensor]:
        """Original values of trained weights: a copy of the present ones, or in a resumed run the base loaded again."""
        if not trained or not copy_weights(model):
            return copy_weights(model)
        argument = getattr(module, "_model_argument", [None])[0]
        if argument is None or isinstance(argument, PreTrainedModel):
            raise RetentionError(
                "This run resumes with weights that have been trained, and the original ones aren't known: pass the "
                "model to the module as a name or folder, from which RetentionFrontier loads them again."
            )
        base = module._load_base()
        return copy_weights(base)
