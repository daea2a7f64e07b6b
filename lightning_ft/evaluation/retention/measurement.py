"""Measure forgetting around any training loop: the base before the first step, the tuned model whenever asked.

On several ranks each computes everything, so that nothing is exchanged, the figures are equal, and ranks that share a
sharded model run it in step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.layout import Example, TokenBatch, collate_examples
from lightning_ft.data.tokenizers import pad_token_id
from lightning_ft.distributed import rank_and_world_size
from lightning_ft.errors import RetentionError
from lightning_ft.evaluation.retention.arithmetic import (
    BaseKind,
    PositionSums,
    RetentionResult,
    retention,
    top_k_and_tail,
)
from lightning_ft.evaluation.retention.base_logprobs import (
    EXACT,
    Base,
    KeptBase,
    LiveBase,
    check_head,
    chunks,
    tolerance,
)
from lightning_ft.evaluation.retention.texts import TaskRow, encode_task, encode_texts, load_texts
from lightning_ft.evaluation.savings.prompt import content_hash
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.models.load import context_length


class RetentionMeasurement:
    """Compares the model before a training loop with the model after it.

    Args:
        tokenizer: The model's.
        texts: General texts: a JSONL file with ``text``, a ``.txt`` file with a blank line between texts, or a list.
        task: Rows of the task, for the divergence on their answers: requests, or pairs of token ids.
        max_texts: Read the first so many; None for all.
        max_tokens: Of each text; what stands behind them is left out.
        base: What to compare with: ``adapter_off`` (exact), ``step_0`` (the model as training starts from it, of which
            `top_k` tokens a place are kept), or ``auto``: the first where switching the adapter off changes nothing
            before the first step (`EXACT` at most), so that it is new; else the second.
        top_k: Tokens to keep at each place.
        batch_size: Texts at a time.
        resamples: Draws of the bootstrap.
        seed: Of the draws.
        progress: Show progress bars.

    Raises:
        RetentionError: For texts or rows that can't be read, before a model runs.

    Example:
        A loop written by hand::

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
        self.base, self.top_k = base, top_k
        self._pad, self._batch_size, self._progress = pad_token_id(tokenizer), batch_size, progress
        self._bootstrap = {"resamples": resamples, "seed": seed}
        self.texts_hash = content_hash(chosen)
        self._provenance: dict[str, Any] = {
            "tokenizer": str(getattr(tokenizer, "name_or_path", "")),
            "texts": str(texts) if isinstance(texts, (str, Path)) else "given as a list",
            "max_tokens": max_tokens,
            "texts_cut": cut,
            **self._bootstrap,
            "versions": {name: version(name) for name in ("lightning-ft", "torch", "transformers", "peft")},
        }
        self._kind: BaseKind | None = None
        self._kept: tuple[KeptBase, ...] = ()
        self._original: dict[str, Any] = {}

    @property
    def has_before(self) -> bool:
        """Whether it is known what to compare with."""
        return self._kind is not None

    @property
    def fingerprint(self) -> str:
        """Names the tokens that are read."""
        return content_hash(
            [[e.input_ids.tolist(), e.supervised.tolist()] for e in [*self.general, *self.task]] + [len(self.general)]
        )

    def check_model(self, model: CausalLM) -> None:
        """Refuse a model that can't be measured, or that the texts don't fit into.

        Raises:
            RetentionError: Saying which and why.
        """
        base = base_of(model)
        if not isinstance(base.get_output_embeddings(), torch.nn.Module):
            raise RetentionError(f"{type(base).__name__} has no output embeddings: Retention needs a causal model.")
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise RetentionError("Retention can't measure adapters that put tokens of their own before every text.")
        limit = context_length(base)
        for name, examples in (("General text", self.general), ("Task row", self.task)):
            for place, example in enumerate(examples):
                if limit is not None and len(example) > limit:
                    raise RetentionError(
                        f"{name} {place} has {len(example):,} tokens, the model's context is {limit:,}: lower "
                        "max_tokens, or leave the row out."
                    )

    def before(self, model: CausalLM, *, trained: bool = False) -> None:
        """Settle what to compare with, ahead of the first step.

        Args:
            model: As training starts from it.
            trained: It has been trained already. Then only an adapter that was new can be switched off, which
                ``base="adapter_off"`` vouches for.

        Raises:
            RetentionError: If the model can't be measured, or differs from what it is to be compared with.
        """
        self.check_model(model)
        if trained and (self.base != "adapter_off" or not isinstance(model, PeftModel)):
            raise RetentionError(
                "These weights have been trained, and nothing was kept of those before. If the adapter was new when "
                "training began, pass base='adapter_off'; else start anew with the measurement in place."
            )
        if self.base == "adapter_off" and not isinstance(model, PeftModel):
            raise RetentionError("base='adapter_off' needs an adapter: for full fine-tuning pass base='step_0'.")
        self._original = {
            "model": base_of(model).config._name_or_path or base_of(model).config.model_type,
            "dtype": str(base_of(model).dtype).removeprefix("torch."),
        }
        with evaluating(model):
            check_head(model, self.general[0])
        if trained:
            self._kind, self._kept = "adapter_off", ()
            return
        if self.base != "step_0" and isinstance(model, PeftModel):
            self._kind, self._kept = "adapter_off", ()
            kl = self.after(model).kl_general.value
            self._original["step_0_kl"] = kl
            if kl <= (EXACT if self.base == "auto" else tolerance(model)):
                return
            self._kind = None
            if self.base == "adapter_off":
                raise RetentionError(
                    f"Before the first step the model is {kl:.3g} nats a token away from its base with the adapter "
                    f"switched off ({tolerance(model):g} at most for a new adapter): the adapter was trained before, "
                    "or its initialization changed the base weights (PiSSA, OLoRA). Pass base='step_0' to compare "
                    "with the model as this training starts from it."
                )
        with evaluating(model):
            self._kept = tuple(self._keep(model, examples) for examples in (self.general, self.task) if examples)
        self._kind = "step_0"
        kl = self.after(model).kl_general.value
        self._original["step_0_kl"] = kl
        if kl > tolerance(model):
            self._kind = None
            raise RetentionError(
                f"Read twice before the first step, the model is {kl:.3g} nats a token away from itself "
                f"({tolerance(model):g} at most): its output is random in eval mode, or its weights change. "
                "Forgetting can't be told from that."
            )

    def after(
        self, model: CausalLM, provenance: Mapping[str, Any] | None = None, *, step: int | None = None
    ) -> RetentionResult:
        """Compare the model as it is now; can be called again later in training.

        Args:
            model: With the trained weights.
            provenance: More of what the figures come from, JSON values only.
            step: Optimizer step, to be kept with the figures.

        Raises:
            RetentionError: If `before` didn't run, or the model's outputs aren't numbers.
        """
        if self._kind is None:
            raise RetentionError("There is nothing to compare with: call before(model) ahead of the first step.")
        live = None
        if self._kind == "adapter_off":
            if not isinstance(model, PeftModel):
                raise RetentionError("The base was the adapter switched off, and this model has no adapter any more.")
            live = LiveBase(model, adapter=False)
        return self._compare(model, live, self._kind, provenance, step)

    def against(self, model: CausalLM, original: CausalLM) -> RetentionResult:
        """Compare with a second model.

        Args:
            model: The tuned one.
            original: The one to compare it with, of the same vocabulary.

        Raises:
            RetentionError: If either can't be measured.
        """
        for each in (model, original):
            self.check_model(each)
            with evaluating(each):
                check_head(each, self.general[0])
        self._original = {"model": base_of(original).config._name_or_path or base_of(original).config.model_type}
        with evaluating(original):
            return self._compare(model, LiveBase(original), "model", None, None)

    def state_dict(self) -> dict[str, Any]:
        """What is compared with, in numbers, strings and tensors: `torch.load(..., weights_only=True)` reads it."""
        return {
            "fingerprint": self.fingerprint,
            "base": self._kind,
            "original": dict(self._original),
            "kept": [kept.state_dict() for kept in self._kept],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what to compare with from a checkpoint.

        Raises:
            RetentionError: If it was kept for other texts or rows, or for another base.
        """
        if state["base"] is None:
            return
        if state["fingerprint"] != self.fingerprint:
            raise RetentionError(
                "The checkpoint's base was measured on other texts or task rows, and can't be measured again on "
                "weights that were trained since. Use the texts, max_texts, max_tokens and rows of the run that wrote "
                "it."
            )
        if self.base not in ("auto", state["base"]):
            raise RetentionError(f"The checkpoint compares with base={state['base']!r}: pass that, or 'auto'.")
        self._kind, self._original = state["base"], dict(state["original"])
        self._kept = tuple(KeptBase(**kept) for kept in state["kept"])

    def _compare(
        self,
        model: CausalLM,
        live: LiveBase | None,
        kind: BaseKind,
        provenance: Mapping[str, Any] | None,
        step: int | None,
    ) -> RetentionResult:
        sums: list[PositionSums | None] = []
        with evaluating(model):
            for name, examples in (("general texts", self.general), ("task rows", self.task)):
                base = live if live is not None else self._kept[len(sums)] if examples else None
                sums.append(self._sums(f"Retention, {name}", model, base, examples) if base and examples else None)
        return retention(
            cast(PositionSums, sums[0]),
            sums[1],
            base=kind,
            top_k=None if live is not None else self._kept[0].ids.shape[1],
            texts_hash=self.texts_hash,
            step=step,
            provenance={**self._original, **self._provenance, **(provenance or {})},
            **self._bootstrap,
        )

    def _sums(self, title: str, model: CausalLM, base: Base, examples: Sequence[Example]) -> PositionSums:
        tuned = LiveBase(model)
        rows: list[Tensor] = []
        for batch, first in self._batches(title, model, examples):
            states, compare = tuned.states(batch), base.reader(batch, first)
            found = []
            for places in chunks(batch.num_targets):
                logprobs = tuned.logprobs(states[places])  # [c, v]
                kl, base_nll, base_top = compare(places, logprobs)
                tuned_nll = -logprobs.gather(-1, batch.targets[places, None])[:, 0]
                agreed = logprobs.argmax(-1) == base_top
                columns = (torch.ones_like(kl), kl, base_nll, tuned_nll, agreed)
                found.append(torch.stack([column.cpu().double() for column in columns], dim=1))  # [c, 5]
            sums = torch.zeros(batch.num_groups, 5, dtype=torch.float64)
            rows.append(sums.index_add_(0, batch.groups.cpu(), torch.cat(found)))
        tokens, kls, base_nlls, tuned_nlls, agrees = torch.cat(rows).T.tolist()
        return PositionSums(
            tuple(map(int, tokens)), tuple(kls), tuple(base_nlls), tuple(tuned_nlls), tuple(map(int, agrees))
        )

    def _keep(self, model: CausalLM, examples: Sequence[Example]) -> KeptBase:
        read, parts = LiveBase(model), []
        for batch, _ in self._batches("Retention, base", model, examples):
            states = read.states(batch)
            for places in chunks(batch.num_targets):
                logprobs = read.logprobs(states[places])
                nll = -logprobs.gather(-1, batch.targets[places, None])[:, 0]
                kept = top_k_and_tail(logprobs, self.top_k)
                top = logprobs.argmax(-1).to(torch.int32)  # not ids[:, 0]: of equals topk may name another one first
                parts.append([t.cpu() for t in (kept.ids, kept.logprobs, kept.tail, nll, top)])
        return KeptBase(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _batches(self, title: str, model: CausalLM, examples: Sequence[Example]) -> Iterator[tuple[TokenBatch, int]]:
        """Batches of one row each example, and how many targets stood before; targets come in the examples' order."""
        first, device = 0, input_device(model)
        hidden = not self._progress or rank_and_world_size()[0] != 0
        with tqdm(total=len(examples), desc=title, unit="text", disable=hidden, leave=False) as bar:
            for start in range(0, len(examples), self._batch_size):
                part = examples[start : start + self._batch_size]
                batch = collate_examples(part, packing=False, pad_token_id=self._pad).to(device)
                yield batch, first
                first += batch.num_targets
                bar.update(len(part))


def measure_retention(
    tuned: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    original: CausalLM | None = None,
    texts: str | Path | Sequence[str] | None = None,
    task: Sequence[TaskRow] | None = None,
    **options: Any,
) -> RetentionResult:
    """Compare a trained model with the original, both at hand; the divergences are exact.

    Args:
        tuned: The trained model.
        tokenizer: Of both.
        original: The model as it was; by default `tuned` with its adapter switched off.
        texts: General texts, see :class:`RetentionMeasurement`.
        task: Rows of the task.
        options: Further arguments of :class:`RetentionMeasurement`.

    Raises:
        RetentionError: As :class:`RetentionMeasurement`, or if there is no original to compare with.
    """
    measurement = RetentionMeasurement(tokenizer, texts, task, **{"base": "adapter_off", **options})
    if original is not None:
        return measurement.against(tuned, original)
    if not isinstance(tuned, PeftModel):
        raise RetentionError("Pass original=: without an adapter the trained model doesn't hold the original weights.")
    measurement.before(tuned, trained=True)
    return measurement.after(tuned)
