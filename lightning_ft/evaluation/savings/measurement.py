"""Measure token savings around any training loop: once before the first step, once after the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.savings.arithmetic import token_savings
from lightning_ft.evaluation.savings.arms import run_arm
from lightning_ft.evaluation.savings.cost import Prices
from lightning_ft.evaluation.savings.gate import check_margin
from lightning_ft.evaluation.savings.overlap import TrainRows, request_overlap, training_index
from lightning_ft.evaluation.savings.plan import measurement_plan
from lightning_ft.evaluation.savings.prompt import PromptBaseline
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.evaluation.scorers import Scorer
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.load import context_length
from lightning_ft.types import Request


class SavingsMeasurement:
    """The three arms around a training loop.

    Args:
        tokenizer: The model's.
        requests: What to ask, and the right answers. Never rows that are trained on.
        baseline: System prompt and examples that training is to make unnecessary.
        scorer: ``"exact"``, ``"normalized"``, ``"label"``, ``"json"``, where to import one from, or a function
            ``f(output, reference)`` that gives a number from 0 to 1.
        margin: Loss of quality that would be accepted: 0.02 for two points.
        prices: What tokens and training cost.
        max_new_tokens: Limit of every answer. Answers that hit it are counted, and their share reported.
        max_requests: Ask only so many of the requests, drawn by `seed`.
        batch_size: Prompts at a time.
        share_prefix: Run the prompts' common prefix through the model once; the answers are the same.
        timed_requests: How many requests to time to their first token; 0 for none.
        resamples: Draws of the bootstrap.
        seed: Of bootstrap and drawn requests.
        progress: Show progress bars.
        train_rows: The rows that are trained on, as a DataModule takes them or as requests: those whose question is
            also asked here are counted in the verdict. Without them the result can't say so.

    Raises:
        SavingsError: For everything that can be known before a model runs: see `lightning_ft.evaluation.savings.plan`.

    Example:
        A loop written by hand::

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
        scorer: str | Scorer = "normalized",
        margin: float = 0.02,
        prices: Prices | None = None,
        max_new_tokens: int = 128,
        max_requests: int | None = None,
        batch_size: int = 32,
        share_prefix: bool = True,
        timed_requests: int = 3,
        resamples: int = 9999,
        seed: int = 0,
        progress: bool = True,
        train_rows: TrainRows | None = None,
    ) -> None:
        check_margin(margin)
        numbers = (("batch_size", batch_size, 1), ("resamples", resamples, 1), ("timed_requests", timed_requests, 0))
        for argument, value, least in (*numbers, ("seed", seed, 0)):
            if value < least:  # now, and not when hours of training are over
                raise SavingsError(f"{argument}={value}: expected at least {least}.")
        self.tokenizer = tokenizer
        self.margin, self.prices, self.resamples, self.seed = margin, prices, resamples, seed
        self.plan = measurement_plan(
            tokenizer,
            requests,
            baseline,
            scorer=scorer,
            max_new_tokens=max_new_tokens,
            max_requests=max_requests,
            seed=seed,
        )
        self._run = {
            "batch_size": batch_size,
            "share_prefix": share_prefix,
            "timed_requests": timed_requests,
            "progress": progress,
        }
        self.overlap = None if train_rows is None else request_overlap(self.plan.requests, training_index(train_rows))
        """What the requests have in common with the training rows; None where these aren't known."""
        self._before: dict[str, ArmRecords] = {}
        self._original = ""

    @property
    def has_before(self) -> bool:
        """Whether the arms of the original weights were measured."""
        return bool(self._before)

    def check_model(self, model: CausalLM) -> None:
        """Refuse a model that the prompts don't fit into.

        Raises:
            SavingsError: With the first request that doesn't.
        """
        self.plan.check_context(context_length(base_of(model)))

    def before(self, model: CausalLM) -> None:
        """Run the prompted and the untuned arm on the original weights, before anything is trained.

        Raises:
            SavingsError: If a prompt doesn't fit the model's context, or the scorer fails.
        """
        self.check_model(model)
        self._original = base_of(model).config._name_or_path or base_of(model).config.model_type
        self._before = {name: self._arm(name, model) for name in ("prompted", "untuned")}

    def after(self, model: CausalLM, provenance: Mapping[str, Any] | None = None) -> SavingsResult:
        """Run the tuned arm and compare; can be called again later in training.

        Args:
            model: With the trained weights.
            provenance: More of what the figures come from, JSON values only.

        Raises:
            SavingsError: If `before` didn't run, the scorer fails, or nothing succeeded in either arm.
        """
        if not self._before:
            raise SavingsError("The prompted arm has not been measured: call before(model) ahead of the first step.")
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
        )
        asked = self.plan.requests  # the arms' ids are theirs, in their order
        return replace(
            result,
            requests=tuple(_last_user_turn(request) for request in asked),
            references=tuple(request.reference for request in asked),
            warnings=(*result.warnings, *(self.overlap.cluster_warnings if self.overlap is not None else ())),
        )

    def state_dict(self) -> dict[str, Any]:
        """The arms of the original weights as JSON types, so that a resumed run compares with them."""
        return {
            "fingerprint": self.plan.fingerprint,
            "original": self._original,
            "before": {name: arm.to_dict() for name, arm in self._before.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the arms from a checkpoint.

        Raises:
            SavingsError: If they were measured with other requests, prompts, scorer or limit.
        """
        if state["before"] and state["fingerprint"] != self.plan.fingerprint:
            raise SavingsError(
                "The checkpoint's prompted arm was measured with other requests, another baseline, scorer or "
                "max_new_tokens, and can't be measured again on weights that were trained since. Use the settings of "
                "the run that wrote it."
            )
        self._original = str(state["original"])
        self._before = {name: ArmRecords.from_dict(arm) for name, arm in state["before"].items()}

    def _arm(self, name: str, model: CausalLM) -> ArmRecords:
        return run_arm(name, model, self.tokenizer, self.plan, **self._run)  # type: ignore[arg-type]

    def _provenance(self) -> dict[str, Any]:
        plan, seen = self.plan, self.overlap
        return {
            "model": self._original,
            "tokenizer": plan.tokenizer,
            "baseline": plan.baseline_hash,
            "measured": plan.fingerprint,
            "requests": len(plan.requests),
            "requests_available": plan.available,
            "requests_in_training": "not checked: pass train_rows=" if seen is None else len(seen.in_training),
            "scorer": plan.scorer_name,
            "max_new_tokens": plan.max_new_tokens,
            "decoding": "greedy",
            "seed": self.seed,
            "resamples": self.resamples,
            "versions": {name: version(name) for name in ("lightning-ft", "torch", "transformers", "peft")},
        }


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
    """Compare a trained model with the original, both at hand.

    Args:
        tuned: The trained model.
        tokenizer: Of both.
        requests: What to ask, and the right answers.
        baseline: System prompt and examples that training is to make unnecessary.
        original: The model as it was; by default `tuned` with its adapter switched off.
        options: Of :class:`SavingsMeasurement`.

    Raises:
        SavingsError: As :class:`SavingsMeasurement`, or if there is no original to compare with.
    """
    measurement = SavingsMeasurement(tokenizer, requests, baseline, **options)
    if original is None and not isinstance(tuned, PeftModel):
        raise SavingsError("Pass original=: without an adapter the trained model doesn't hold the original weights.")
    with tuned.disable_adapter() if original is None else nullcontext():  # type: ignore[operator]
        measurement.before(tuned if original is None else original)
    return measurement.after(tuned)
