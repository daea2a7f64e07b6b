"""Measure forgetting in any training loop: the base before the first step, the tuned model at any later point.

Each rank computes everything, so that no communication is needed, results are equal on all ranks, and ranks that share
a sharded model run its forward passes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lightning_ft import __version__
from lightning_ft.data.layout import Example, TokenBatch, collate_examples
from lightning_ft.data.texts import TaskRow, encode_task, encode_texts, load_texts
from lightning_ft.data.tokenizers import pad_token_id
from lightning_ft.distributed import rank_and_world_size
from lightning_ft.errors import RetentionError
from lightning_ft.evaluation.retention.arithmetic import (
    BaseType,
    PositionSums,
    RetentionResult,
    retention,
    top_k_and_tail,
)
from lightning_ft.evaluation.retention.base_logprobs import (
    FP32_TOLERANCE,
    Base,
    LiveModel,
    StoredBase,
    check_head,
    chunk_slices,
    tolerance,
)
from lightning_ft.evaluation.retention.choices import (
    ChoiceQuestion,
    compare_choices,
    correct_answers,
    encode_choices,
    load_choices,
)
from lightning_ft.models.card_facts import today, weights_hash
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.models.load import context_length
from lightning_ft.models.reference import trained_base_weights
from lightning_ft.models.unwrap import check_causal
from lightning_ft.printable import content_hash

_CHECKED_TEXTS = 16
"""Number of texts on which a divergence of 0 is checked before the first step."""


class RetentionMeasurement:
    """Comparison of the model before a training loop with the model after it.

    Args:
        tokenizer: Tokenizer of the model.
        texts: General texts: a JSONL file with ``text``, a ``.txt`` file with a blank line between texts, or a list.
        task: Rows of the task, for the divergence on their answers: requests, or pairs of token ids.
        choices: Multiple-choice questions, see :func:`~lightning_ft.evaluation.retention.choices.load_choices`.
        max_texts: Number of texts to read from the start; None reads all.
        max_tokens: Largest number of tokens per text; later ones are cut off.
        base: Base of the comparison: ``"adapter_off"``, the model with its adapter disabled (exact); ``"step_0"``, the
            model at the start of training, of which `top_k` tokens per position are stored; or ``"auto"``, which takes
            the first if disabling the adapter changes nothing before the first step (the KL is at most
            `FP32_TOLERANCE`), so that the adapter is new, and no weight outside of it is trained; and else the second.
        top_k: Number of tokens to store per position.
        batch_size: Number of texts per forward pass.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
        progress: Whether to show progress bars.

    Raises:
        RetentionError: If texts or rows can't be read; no model runs before this check.

    Example:
        A custom training loop::

            measurement = RetentionMeasurement(tokenizer, "general.jsonl")
            measurement.before(model)
            train(model)
            result = measurement.after(model)
            print(result.headline)
            result.save("retention")
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: str | Path | Sequence[str] | None = None,
        task: Sequence[TaskRow] | None = None,
        *,
        choices: str | Path | Sequence[ChoiceQuestion] | None = None,
        max_texts: int | None = 64,
        max_tokens: int = 256,
        base: Literal["auto", "adapter_off", "step_0"] = "auto",
        top_k: int = 64,
        batch_size: int = 8,
        resamples: int = 9999,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if base not in ("auto", "adapter_off", "step_0"):
            raise RetentionError(f"base={base!r}: expected 'auto', 'adapter_off' or 'step_0'.")
        for argument, value in (("top_k", top_k), ("batch_size", batch_size), ("resamples", resamples)):
            if value < 1:
                raise RetentionError(f"{argument}={value}: expected at least 1.")
        if seed < 0:
            raise RetentionError(f"seed={seed}: expected at least 0.")
        chosen = load_texts(texts, max_texts=max_texts)
        self.general, cut = encode_texts(tokenizer, chosen, max_tokens=max_tokens)
        self.task = encode_task(tokenizer, task) if task else []
        self.questions = [] if choices is None else load_choices(choices)
        self.choices = encode_choices(tokenizer, self.questions)
        self.base, self.top_k = base, top_k
        self._pad, self._batch_size, self._progress = pad_token_id(tokenizer), batch_size, progress
        self._bootstrap = {"resamples": resamples, "seed": seed}
        self.texts_hash = content_hash(chosen)
        self._provenance: dict[str, object] = {
            "tokenizer": str(getattr(tokenizer, "name_or_path", "")),
            "texts": str(texts) if isinstance(texts, (str, Path)) else "a list",
            "max_tokens": max_tokens,
            "texts_cut": cut,
            **self._bootstrap,
            "versions": {
                "lightning-ft": __version__,
                **{name: version(name) for name in ("torch", "transformers", "peft")},
            },
        }
        self._base_type: BaseType | None = None
        self._stored: tuple[StoredBase, ...] = ()
        self._original: dict[str, object] = {}
        self._base_correct: tuple[bool, ...] = ()

    @property
    def has_before(self) -> bool:
        """Whether the base to compare with is known."""
        return self._base_type is not None

    @property
    def base_type(self) -> BaseType | None:
        """Base of the comparison, see :class:`RetentionResult`; None before it is known."""
        return self._base_type

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens of all texts and rows."""
        examples = [*self.general, *self.task, *self.choices]
        counts = [len(self.general), *([len(self.task)] if self.choices else [])]
        return content_hash([[e.input_ids.tolist(), e.supervised.tolist()] for e in examples] + counts)

    def check_model(self, model: CausalLM) -> None:
        """Check that the model can be measured, and that the texts fit into its context.

        Args:
            model: Model to check.

        Raises:
            RetentionError: If the model isn't supported, or a text or row is too long.
        """
        base = base_of(model)
        check_causal(model, "Retention", RetentionError)
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise RetentionError(
                "Retention can't measure adapters that add tokens of their own to the prompt. Use LoRA, for example."
            )
        limit = context_length(base)
        for name, examples in (("General text", self.general), ("Task row", self.task), ("Choice", self.choices)):
            for index, example in enumerate(examples):
                if limit is not None and len(example) > limit:
                    raise RetentionError(
                        f"{name} {index} has {len(example):,} tokens, the model's context is {limit:,}. Lower "
                        "max_tokens, or leave the row out."
                    )

    def before(self, model: CausalLM, *, trained: bool = False) -> None:
        """Determine the base to compare with, before the first step.

        Args:
            model: Model at the start of training.
            trained: Whether the model has already been trained. The base is then the model with its adapter disabled,
                and ``base="adapter_off"`` must confirm that the adapter was new when training began.

        Raises:
            RetentionError: If the model can't be measured, differs from its base before the first step, or trains
                weights of the base with ``base="adapter_off"``.
        """
        self.check_model(model)
        if trained and (self.base != "adapter_off" or not isinstance(model, PeftModel)):
            raise RetentionError(
                "These weights have been trained, and nothing was kept of the weights before. If the adapter was new "
                "when training began, pass base='adapter_off'; otherwise train again with the measurement in place."
            )
        if self.base == "adapter_off" and not isinstance(model, PeftModel):
            raise RetentionError("base='adapter_off' needs an adapter. For full fine-tuning pass base='step_0'.")
        outside = trained_base_weights(model) if isinstance(model, PeftModel) else []
        if outside and self.base == "adapter_off":
            remedy = "Pass original=" if trained else "Pass base='step_0'"
            raise RetentionError(f"{_not_the_original(outside)} {remedy}.")
        self._original = {
            "model": base_of(model).config._name_or_path or base_of(model).config.model_type,
            "dtype": str(base_of(model).dtype).removeprefix("torch."),
        }
        with evaluating(model):
            check_head(model, self.general[0])
            self._base_correct = self._correct(LiveModel(model, adapter=not trained))
        if trained:
            self._base_type, self._stored = "adapter_off", ()
            return
        if self.base != "step_0" and isinstance(model, PeftModel) and not outside:
            self._base_type, self._stored = "adapter_off", ()
            kl = self._kl_before_training(model, LiveModel(model, adapter=False))
            self._original["step_0_kl"] = kl
            if kl <= (FP32_TOLERANCE if self.base == "auto" else tolerance(model)):
                return
            self._base_type = None
            if self.base == "adapter_off":
                raise RetentionError(
                    "Before the first step the KL between the model and its base with the adapter disabled is "
                    f"{kl:.3g} nats per token (at most {tolerance(model):g} for a new adapter): the adapter was "
                    "trained before, or its initialization changed the base weights (PiSSA, OLoRA). Pass base='step_0' "
                    "to compare with the model at the start of this training."
                )
        with evaluating(model):
            self._stored = tuple(self._store(model, examples) for examples in (self.general, self.task) if examples)
        self._base_type = "step_0"
        kl = self._kl_before_training(model, self._stored[0])
        self._original["step_0_kl"] = kl
        if kl > tolerance(model):
            self._base_type = None
            raise RetentionError(
                f"The KL between two evaluations of the model before the first step is {kl:.3g} nats per token "
                f"(expected at most {tolerance(model):g}): its output is random in eval mode, or its weights change. "
                "Make the model deterministic in eval mode, since forgetting can't be told from that noise."
            )

    def after(
        self, model: CausalLM, provenance: Mapping[str, object] | None = None, *, step: int | None = None
    ) -> RetentionResult:
        """Compare the model in its current state with the base; may be called several times during training.

        Args:
            model: Model with the trained weights.
            provenance: Additional provenance of the result, as JSON values.
            step: Optimizer step to record in the result.

        Raises:
            RetentionError: If `before` wasn't called, the model's outputs aren't numbers, or weights outside of an
                adapter that is disabled for the comparison were unfrozen since.
        """
        if self._base_type is None:
            raise RetentionError("There is nothing to compare with. Call before(model) ahead of the first step.")
        live = None
        if self._base_type == "adapter_off":
            if not isinstance(model, PeftModel):
                raise RetentionError(
                    "The base is the model with its adapter disabled, but this model no longer has an adapter. Pass it "
                    "before merging."
                )
            if outside := trained_base_weights(model):
                raise RetentionError(
                    f"{_not_the_original(outside)} They were frozen when the base was determined: pass base='step_0' "
                    "in a new run."
                )
            live = LiveModel(model, adapter=False)
        return self._compare(model, live, self._base_type, provenance, step)

    def against(self, model: CausalLM, original: CausalLM) -> RetentionResult:
        """Compare the model with a second one.

        Args:
            model: Tuned model.
            original: Model to compare it with, of the same vocabulary.

        Raises:
            RetentionError: If either model can't be measured.
        """
        for candidate in (model, original):
            self.check_model(candidate)
            with evaluating(candidate):
                check_head(candidate, self.general[0])
        self._original = {"model": base_of(original).config._name_or_path or base_of(original).config.model_type}
        with evaluating(original):
            self._base_correct = self._correct(LiveModel(original))
            return self._compare(model, LiveModel(original), "model", None, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the base as numbers, strings and tensors, which `torch.load(..., weights_only=True)` can load."""
        return {
            "fingerprint": self.fingerprint,
            "base": self._base_type,
            "original": dict(self._original),
            "kept": [stored.state_dict() for stored in self._stored],
            "base_correct": list(self._base_correct),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the base from a checkpoint.

        Raises:
            RetentionError: If the checkpoint is for other texts or rows, or for another `base`.
        """
        if state["base"] is None:
            return
        if state["fingerprint"] != self.fingerprint:
            raise RetentionError(
                "The checkpoint's base was measured on other texts or task rows, and can't be measured again, since "
                "the weights have been trained since then. Use the texts, max_texts, max_tokens and rows of the run "
                "that wrote it."
            )
        if self.base not in ("auto", state["base"]):
            raise RetentionError(f"The checkpoint compares with base={state['base']!r}. Pass that, or 'auto'.")
        self._base_type, self._original = state["base"], dict(state["original"])
        self._stored = tuple(StoredBase(**stored) for stored in state["kept"])
        self._base_correct = tuple(state.get("base_correct", ()))

    def _compare(
        self,
        model: CausalLM,
        live: LiveModel | None,
        base_type: BaseType,
        provenance: Mapping[str, object] | None,
        step: int | None,
    ) -> RetentionResult:
        sums: list[PositionSums | None] = []
        with evaluating(model):
            for name, examples in (("general texts", self.general), ("task rows", self.task)):
                base = live if live is not None else self._stored[len(sums)] if examples else None
                sums.append(self._sums(f"Retention, {name}", model, base, examples) if base and examples else None)
            tuned = self._correct(LiveModel(model))
        choices = compare_choices(self.questions, self._base_correct, tuned, **self._bootstrap) if tuned else {}
        result = retention(
            cast(PositionSums, sums[0]),
            sums[1],
            base=base_type,
            top_k=None if live is not None else self._stored[0].ids.shape[1],
            texts_hash=self.texts_hash,
            step=step,
            choices=choices,
            provenance={**self._original, **self._provenance, **(provenance or {})},
            **self._bootstrap,
        )
        return replace(result, date=today(), weights=weights_hash(model))

    def _kl_before_training(self, model: CausalLM, base: Base) -> float:
        """KL between the model and its base before the first step, in nats per token, on the first texts."""
        with evaluating(model):
            sums = self._sums("Retention, check", model, base, self.general[:_CHECKED_TEXTS])
        return sum(sums.kl) / sum(sums.tokens)

    def _sums(self, title: str, model: CausalLM, base: Base, examples: Sequence[Example]) -> PositionSums:
        tuned = LiveModel(model)
        rows: list[Tensor] = []
        for batch, first in self._batches(title, input_device(model), examples):
            states, compare = tuned.states(batch), base.prepare(batch, first)
            measured = []
            for positions in chunk_slices(batch.num_targets):
                logprobs = tuned.logprobs(states[positions])  # [c, v]
                kl, base_nll, base_top = compare(positions, logprobs)
                tuned_nll = -logprobs.gather(-1, batch.targets[positions, None])[:, 0]
                agreed = logprobs.argmax(-1) == base_top
                columns = (torch.ones_like(kl), kl, base_nll, tuned_nll, agreed)
                measured.append(torch.stack([column.cpu().double() for column in columns], dim=1))  # [c, 5]
            sums = torch.zeros(batch.num_groups, 5, dtype=torch.float64)
            rows.append(sums.index_add_(0, batch.groups.cpu(), torch.cat(measured)))
        tokens, kls, base_nlls, tuned_nlls, agrees = torch.cat(rows).T.tolist()
        return PositionSums(
            tuple(map(int, tokens)), tuple(kls), tuple(base_nlls), tuple(tuned_nlls), tuple(map(int, agrees))
        )

    def _correct(self, model: LiveModel) -> tuple[bool, ...]:
        """Whether the model answers each multiple-choice question correctly."""
        order = sorted(range(len(self.choices)), key=lambda i: len(self.choices[i]))  # little padding
        nll = torch.zeros(len(order), dtype=torch.float64)
        done = 0
        for batch, _ in self._batches("Retention, choices", model.device, [self.choices[i] for i in order]):
            states, sums = model.states(batch), torch.zeros(batch.num_groups, dtype=torch.float64)
            for positions in chunk_slices(batch.num_targets):
                found = model.logprobs(states[positions]).gather(-1, batch.targets[positions, None])[:, 0]
                sums.index_add_(0, batch.groups[positions].cpu(), -found.cpu().double())
            nll[torch.tensor(order[done : done + batch.num_groups])] = sums
            done += batch.num_groups
        return correct_answers(self.questions, nll.tolist())

    def _store(self, model: CausalLM, examples: Sequence[Example]) -> StoredBase:
        live, parts = LiveModel(model), []
        for batch, _ in self._batches("Retention, base", input_device(model), examples):
            states = live.states(batch)
            for positions in chunk_slices(batch.num_targets):
                logprobs = live.logprobs(states[positions])
                nll = -logprobs.gather(-1, batch.targets[positions, None])[:, 0]
                top_k = top_k_and_tail(logprobs, self.top_k)
                top = logprobs.argmax(-1).to(
                    torch.int32
                )  # not ids[:, 0]: among equal ones topk may return another first
                parts.append([t.cpu() for t in (top_k.ids, top_k.logprobs, top_k.tail, nll, top)])
        return StoredBase(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _batches(
        self, title: str, device: torch.device, examples: Sequence[Example]
    ) -> Iterator[tuple[TokenBatch, int]]:
        """Yield batches with one example per row, and the index of their first target among those of all examples."""
        first = 0
        hidden = not self._progress or rank_and_world_size()[0] != 0
        with tqdm(total=len(examples), desc=title, unit=" examples", disable=hidden, leave=False) as bar:
            for start in range(0, len(examples), self._batch_size):
                part = examples[start : start + self._batch_size]
                batch = collate_examples(part, packing=False, pad_token_id=self._pad).to(device)
                yield batch, first
                first += batch.num_targets
                bar.update(len(part))


def _not_the_original(outside: Sequence[str]) -> str:
    return (
        f"{len(outside):,} weights outside of the adapter are trained (first: {outside[0]}), so the model with its "
        "adapter disabled isn't the original one."
    )


def measure_retention(
    tuned: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    original: CausalLM | None = None,
    texts: str | Path | Sequence[str] | None = None,
    task: Sequence[TaskRow] | None = None,
    **options: Any,
) -> RetentionResult:
    """Compare a trained model with the original; the divergences are exact.

    Args:
        tuned: Trained model.
        tokenizer: Tokenizer of both models.
        original: Model before training; by default `tuned` with its adapter disabled.
        texts: General texts, see :class:`RetentionMeasurement`.
        task: Rows of the task, for the divergence on their answers.
        options: Further arguments of :class:`RetentionMeasurement`.

    Raises:
        RetentionError: As for :class:`RetentionMeasurement`, or if there is no original to compare with.
    """
    measurement = RetentionMeasurement(tokenizer, texts, task, **{"base": "adapter_off", **options})
    if original is not None:
        return measurement.against(tuned, original)
    if not isinstance(tuned, PeftModel):
        raise RetentionError("Pass original=, since a model without an adapter doesn't contain the original weights.")
    measurement.before(tuned, trained=True)
    return measurement.after(tuned)
