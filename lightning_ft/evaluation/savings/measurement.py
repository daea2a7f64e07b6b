"""Measurement of token savings around any training loop: before its first step and after its last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lightning_ft import __version__
from lightning_ft.arguments import CheckedArguments, check_integer
from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.savings.arithmetic import token_savings
from lightning_ft.evaluation.savings.arms import constant_scores, graded, run_arm
from lightning_ft.evaluation.savings.cost import Prices
from lightning_ft.evaluation.savings.endpoint import Endpoint, endpoint_arm
from lightning_ft.evaluation.savings.first_token import TIMED_REQUESTS
from lightning_ft.evaluation.savings.gate import check_margin, check_min_quality
from lightning_ft.evaluation.savings.overlap import TrainRows, request_overlap, training_index
from lightning_ft.evaluation.savings.plan import measurement_plan
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.evaluation.scorers import Scorer
from lightning_ft.models.card_facts import today, weights_hash
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.load import context_length
from lightning_ft.models.reference import trained_base_weights
from lightning_ft.models.unwrap import check_causal
from lightning_ft.printable import content_hash
from lightning_ft.rollout.structured import StructuredOutputs
from lightning_ft.types import Request


class SavingsMeasurement(CheckedArguments):
    """Measures the prompted, untuned and tuned arms around a training loop.

    Args:
        tokenizer: Tokenizer of the model.
        requests: Requests with their reference answers. They must not be training rows.
        baseline: System prompt and few-shot examples that training should make unnecessary.
        endpoint: Endpoint that answers in the prompted arm, such as the model that you pay for now; by default the
            original weights do.
        scorer: Name of a scorer (``"exact"``, ``"normalized"``, ``"label"`` or ``"json"``), import path of one, or a
            function ``f(output, reference)`` that returns a score from 0 to 1.
        margin: Largest acceptable loss of quality, between 0 and 1: 0.02 for two points.
        min_quality: Quality below which an arm is of no use. By default the prompted arm must be shown to be better
            than the untuned one, and than always giving the most frequent reference; if it isn't, the verdict is VOID.
        prices: Prices of tokens and of training.
        max_new_tokens: Maximum number of tokens per answer. The share of answers that hit it is reported.
        structured_outputs: Format of all answers, which every arm is restricted to as a server would; True for the
            `structured_output` of each request. By default answers are free text.
        max_requests: Maximum number of requests, sampled with `seed` if there are more; None for all.
        batch_size: Number of prompts per batch.
        share_prefix: Whether to compute the common prefix of the prompts only once; the answers are the same.
        timed_requests: Number of requests whose time to first token is measured; 0 measures none.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap and of the sample of requests.
        progress: Whether to show progress bars.
        train_rows: Training rows, as a DataModule takes them or as requests. Requests whose question they contain are
            counted in the headline and in a warning; without training rows this isn't checked.

    Raises:
        SavingsError: If the options are invalid, and as :func:`lightning_ft.evaluation.savings.plan.measurement_plan`.

    Example:
        A custom training loop::

            measurement = SavingsMeasurement(tokenizer, requests, PromptBaseline(system="..."), scorer="label")
            measurement.before(model)
            train(model)
            result = measurement.after(model)
            result.print()
            result.save("token_savings")
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        baseline: PromptBaseline | None,
        *,
        endpoint: Endpoint | None = None,
        scorer: str | Scorer = "normalized",
        margin: float = 0.02,
        min_quality: float | None = None,
        prices: Prices | None = None,
        max_new_tokens: int = 128,
        structured_outputs: StructuredOutputs | bool = False,
        max_requests: int | None = None,
        batch_size: int = 32,
        share_prefix: bool = True,
        timed_requests: int = TIMED_REQUESTS,
        resamples: int = 9999,
        seed: int = 0,
        progress: bool = True,
        train_rows: TrainRows | None = None,
    ) -> None:
        check_numbers(
            margin, min_quality, batch_size=batch_size, timed_requests=timed_requests, resamples=resamples, seed=seed
        )
        self.tokenizer = tokenizer
        self.margin, self.prices, self.resamples, self.seed = margin, prices, resamples, seed
        self.min_quality = min_quality
        self.plan = measurement_plan(
            tokenizer,
            requests,
            baseline,
            scorer=scorer,
            max_new_tokens=max_new_tokens,
            max_requests=max_requests,
            seed=seed,
            structured_outputs=structured_outputs,
        )
        self._run = {
            "batch_size": batch_size,
            "share_prefix": share_prefix,
            "timed_requests": timed_requests,
            "progress": progress,
        }
        self.overlap = None if train_rows is None else request_overlap(self.plan.requests, training_index(train_rows))
        """Overlap between requests and training rows; None if the training rows aren't known."""
        self.endpoint, self._baseline = endpoint, baseline
        self._before: dict[str, ArmRecords] = {}
        self._constant: tuple[float, ...] | None = None
        self._original = ""

    @property
    def has_before(self) -> bool:
        """Whether the arms of the original weights have been measured."""
        return bool(self._before)

    def check_model(self, model: CausalLM) -> None:
        """Check that the model is a causal language model, and that each prompt and its answer fit into its context.

        Raises:
            SavingsError: If it isn't, or a request doesn't fit; the message names the first one.
        """
        check_causal(model, "TokenSavings", SavingsError)
        self.plan.check_context(context_length(base_of(model)), prompted=self.endpoint is None)

    def before(self, model: CausalLM) -> None:
        """Measure the prompted and the untuned arm with the original weights; must be called before training.

        Raises:
            SavingsError: If a prompt doesn't fit the model's context, or the scorer fails.
        """
        self.check_model(model)
        self._original = base_of(model).config._name_or_path or base_of(model).config.model_type
        prompted = self._arm("prompted", model) if self.endpoint is None else self._endpoint_arm(self.endpoint)
        self._before = {"prompted": prompted, "untuned": self._arm("untuned", model)}
        self._constant = constant_scores(self.plan)

    def after(self, model: CausalLM, provenance: Mapping[str, object] | None = None) -> SavingsResult:
        """Measure the tuned arm and compare it with the prompted one; can be called several times during training.

        Args:
            model: Model with the trained weights.
            provenance: Additional entries of the provenance, as JSON values.

        Raises:
            SavingsError: If :meth:`before` wasn't called, the scorer fails, or all scores of both arms are 0.
        """
        if not self._before:
            raise SavingsError(
                "The prompted arm has not been measured: call before(model) before the first training step."
            )
        tuned = self._arm("tuned", model)
        result = token_savings(
            self._before["prompted"],
            tuned,
            self._before["untuned"],
            margin=self.margin,
            prices=self.prices,
            resamples=self.resamples,
            seed=self.seed,
            provenance={**self._provenance(), **(provenance or {})},
            in_training=None if self.overlap is None else self.overlap.in_training,
            constant=self._constant,
            min_quality=self.min_quality,
        )
        requests = self.plan.requests  # in the order of the arms' ids
        return replace(
            result,
            requests=tuple(_last_user_turn(request) for request in requests),
            references=tuple(request.reference for request in requests),
            date=today(),
            weights=weights_hash(model),
            warnings=(
                *result.warnings,
                *self._endpoint_warning(),
                *(self.overlap.cluster_warnings if self.overlap is not None else ()),
            ),
        )

    def state_dict(self) -> dict[str, Any]:
        """State for checkpoints: the arms of the original weights as JSON types, with which a resumed run compares."""
        return {
            "fingerprint": self._fingerprint,
            "original": self._original,
            "before": {name: arm.to_dict() for name, arm in self._before.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the arms of the original weights from a checkpoint, and grade their answers again.

        Raises:
            SavingsError: If they were measured with other requests, prompts, `max_new_tokens` or a scorer of another
                name, or the scorer fails.
        """
        if state["before"] and state["fingerprint"] != self._fingerprint:
            raise SavingsError(
                "The checkpoint's prompted arm was measured with other requests, another baseline, scorer, format of "
                "structured outputs or max_new_tokens. It can't be measured again, since the weights are trained. Use "
                "the settings of the run that wrote the checkpoint."
            )
        self._original = str(state["original"])
        # Graded again, since the scorer may have changed, and the tuned arm is graded by the present one.
        self._before = {name: self._graded(ArmRecords.from_dict(arm)) for name, arm in state["before"].items()}
        self._constant = constant_scores(self.plan) if self._before else None

    def _graded(self, arm: ArmRecords) -> ArmRecords:
        return replace(arm, scores=graded(self.plan, arm.outputs)) if arm.outputs else arm

    def _arm(self, name: str, model: CausalLM) -> ArmRecords:
        return run_arm(name, model, self.tokenizer, self.plan, **self._run)  # type: ignore[arg-type]

    def _endpoint_arm(self, endpoint: Endpoint) -> ArmRecords:
        return endpoint_arm(endpoint, self.plan, self._baseline, progress=bool(self._run["progress"]))

    @property
    def _fingerprint(self) -> str:
        if self.endpoint is None:
            return self.plan.fingerprint
        return content_hash([self.plan.fingerprint, self.endpoint.url, self.endpoint.model])

    def _endpoint_warning(self) -> tuple[str, ...]:
        if self.endpoint is None:
            return ()
        return (
            f"The prompted arm was answered by {self.endpoint.model} at {self.endpoint.url}, which counts its own "
            "tokens: where its tokenizer differs, compare costs rather than tokens.",
        )

    def _provenance(self) -> dict[str, object]:
        plan, overlap = self.plan, self.overlap
        return {
            "model": self._original,
            "tokenizer": plan.tokenizer,
            "baseline": plan.baseline_hash,
            **({} if self.endpoint is None else {"prompted_by": f"{self.endpoint.model} at {self.endpoint.url}"}),
            "measured": plan.fingerprint,
            "requests": len(plan.requests),
            "requests_available": plan.available,
            "requests_in_training": "not checked: pass train_rows=" if overlap is None else len(overlap.in_training),
            "scorer": plan.scorer_name,
            "max_new_tokens": plan.max_new_tokens,
            "decoding": "greedy" if plan.grammars is None else "greedy, structured outputs",
            "seed": self.seed,
            "resamples": self.resamples,
            "versions": {
                "lightning-ft": __version__,
                **{name: version(name) for name in ("torch", "transformers", "peft")},
            },
        }


def check_numbers(
    margin: float, min_quality: float | None, *, batch_size: int, timed_requests: int, resamples: int, seed: int
) -> None:
    """Check numbers that would otherwise fail after training; see `SavingsMeasurement` for what they are.

    Raises:
        SavingsError: For the first one of another type or out of its range.
    """
    check_margin(margin)
    check_min_quality(min_quality)
    check_integer("batch_size", batch_size, 1, SavingsError)
    check_integer("timed_requests", timed_requests, 0, SavingsError)
    check_integer("resamples", resamples, 1, SavingsError)
    check_integer("seed", seed, 0, SavingsError)


def _last_user_turn(request: Request) -> str:
    return next((turn["content"] for turn in reversed(request.messages) if turn["role"] == "user"), "")


def measure_token_savings(
    tuned: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    baseline: PromptBaseline | None,
    *,
    original: CausalLM | None = None,
    **options: Any,
) -> SavingsResult:
    """Measure the token savings of a trained model over the original model.

    Args:
        tuned: Trained model.
        tokenizer: Tokenizer of both models.
        requests: Requests with their reference answers.
        baseline: System prompt and few-shot examples that training should make unnecessary.
        original: Model with the original weights; by default `tuned` with its adapter disabled.
        options: Keyword arguments of :class:`SavingsMeasurement`.

    Raises:
        SavingsError: As :class:`SavingsMeasurement`, or if `original` isn't passed and `tuned` has no adapter, or
            weights outside of it are trained.
    """
    measurement = SavingsMeasurement(tokenizer, requests, baseline, **options)
    if original is None and not isinstance(tuned, PeftModel):
        raise SavingsError(
            "Pass original=: the trained model has no adapter, so it doesn't contain the original weights."
        )
    if original is None and (outside := trained_base_weights(tuned)):  # type: ignore[arg-type]
        raise SavingsError(
            f"Pass original=: {len(outside):,} weights outside of the adapter are trained (first: {outside[0]}), so "
            "the model with its adapter disabled isn't the original one."
        )
    with tuned.disable_adapter() if original is None else nullcontext():  # type: ignore[operator]
        measurement.before(tuned if original is None else original)
    return measurement.after(tuned)
