"""An anchor in training: a penalty on the KL divergence from the original model, on texts or on its own samples."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ft.data.layout import Example, TokenBatch, collate_examples
from lightning_ft.data.texts import encode_texts, load_texts
from lightning_ft.data.tokenizers import pad_token_id
from lightning_ft.distributed import rank_and_world_size, rank_zero_info
from lightning_ft.errors import ConfigError
from lightning_ft.losses.kl import AdaptiveKL
from lightning_ft.models.flops import OperationCounter, counted_separately, is_compiled
from lightning_ft.models.head import base_of, distill, frozen_logits, input_device
from lightning_ft.models.load import context_length
from lightning_ft.models.reference import Reference
from lightning_ft.modules.step_metrics import MeanMetrics
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling

if TYPE_CHECKING:
    from lightning_ft.modules.sft import SupervisedFineTuning

SAMPLES = "samples"
"""Value of `texts` for samples of the original model."""
KEPT_BYTES = 2 * 2**30
"""Largest size of the original model's hidden states that are kept: 128,000 tokens of width 4,096 in float32."""
RANGE = (0.01, 100.0)
"""Limits of an adaptive weight, as multiples of `coef`: a weight that fell to nothing couldn't rise again in time."""


@dataclass(frozen=True)
class AnchorOptions:
    """Options of an anchor.

    Args:
        texts: General texts, as for `Retention`: a JSONL file with ``text``, a ``.txt`` file, or a list; or
            ``samples``, for texts that the original model writes before the first step, starting from nothing.
        coef: Weight of the divergence, which is a mean in nats per token, next to the loss of the rows.
        target: Divergence to stay near, in nats per token: the weight then rises while more is measured and falls while
            less is, as PPO's does (https://arxiv.org/abs/1909.08593), within `RANGE` times `coef`; None for a fixed
            weight.
        horizon: Number of optimizer steps over which the weight changes by about a fifth.
        texts_per_batch: Number of texts drawn for each micro-batch.
        max_texts: Largest number of texts to use, from the first; number of samples.
        max_tokens: Largest number of tokens per text; longer texts are truncated.

    Raises:
        ConfigError: For a number out of its range.

    Example:
        >>> AnchorOptions(["It was a bright cold day in April."], coef=0.5).texts_per_batch
        4
    """

    texts: str | list[str]
    coef: float = 1.0
    target: float | None = None
    horizon: int = 5
    texts_per_batch: int = 4
    max_texts: int = 256
    max_tokens: int = 128

    def __post_init__(self) -> None:
        for name, types in (("coef", (int, float)), ("target", (int, float, type(None)))):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, types)
                or (value is not None and not 0 < value < math.inf)
            ):
                raise ConfigError(f"anchor: {name}={value!r}, expected a number above 0.")
        for name in ("horizon", "texts_per_batch", "max_texts", "max_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"anchor: {name}={value!r}, expected a whole number of at least 1.")
        if self.max_tokens < 2:
            raise ConfigError(f"anchor: max_tokens={self.max_tokens}, expected at least 2.")

    @classmethod
    def of(cls, anchor: AnchorOptions | Mapping[str, Any] | None) -> AnchorOptions | None:
        """Convert the argument of a module.

        Raises:
            ConfigError: If it is neither None, options nor a mapping of their names.
        """
        if anchor is None or isinstance(anchor, AnchorOptions):
            return anchor
        if not isinstance(anchor, Mapping):
            raise ConfigError(
                f"anchor is a {type(anchor).__name__}: expected a dict such as {{'texts': 'general.jsonl', 'coef': 1}}."
            )
        names = [item.name for item in fields(cls)]
        if unknown := [name for name in anchor if name not in names]:
            raise ConfigError(f"anchor has no {unknown[0]!r}: expected {', '.join(names)}.")
        if "texts" not in anchor:
            raise ConfigError("anchor has no texts: pass a file, a list of texts, or 'samples'.")
        return cls(**anchor)

    def as_json(self) -> dict[str, Any]:
        """The options as JSON types."""
        values = asdict(self)
        return {**values, "texts": str(self.texts) if isinstance(self.texts, Path) else values["texts"]}


class Anchor:
    """The penalty of a module: its texts, the original model, and the weight.

    Args:
        options: Options.
    """

    def __init__(self, options: AnchorOptions) -> None:
        self.options, self.coef = options, float(options.coef)
        self._reference: Reference | None = None
        self._examples: list[Example] = []
        self._kept = 0  # number of texts, from the first, whose states may be kept
        self._read = 0  # number of times that a text was read
        self._states: dict[int, Tensor] = {}
        self._divergence = MeanMetrics()  # over the tokens of this step
        self.flops, self.seconds = 0, 0.0
        """Operations and time of the original model after the first step."""

    def keep_original(self, module: SupervisedFineTuning) -> None:
        """Keep the model as it is now; call it before the first step.

        Raises:
            ConfigError: If the model is sharded.
        """
        if module.sharded:
            raise ConfigError("anchor can't be used with a sharded model (ModelParallelStrategy): leave it out.")
        starting = module._adaptation.starting_adapter(module.model, module._initial)
        self._reference = Reference(module.model, initial=starting)

    def start(self, module: SupervisedFineTuning) -> None:
        """Set the weight of a new fit, and encode the texts or let the original model write them.

        Raises:
            RetentionError: If texts can't be read.
        """
        assert self._reference is not None
        if module.trainer.ckpt_path is None:  # a resumed fit continues with the checkpoint's
            self.coef = float(self.options.coef)
        self._reference.to(module.device)
        options, limit = self.options, context_length(base_of(module.model))
        if limit is not None and options.max_tokens > limit:
            raise ConfigError(
                f"anchor: max_tokens={options.max_tokens:,} exceeds the model's context of {limit:,} tokens. Lower it."
            )
        if options.texts == SAMPLES:
            self._examples = self._samples(module)
        else:
            texts = load_texts(options.texts, max_texts=options.max_texts)
            self._examples, cut = encode_texts(module.tokenizer, texts, max_tokens=options.max_tokens)
            rank_zero_info(
                f"Anchor: {len(texts):,} texts, {sum(map(len, self._examples)):,} tokens, {cut:,} of them truncated to "
                f"{options.max_tokens:,}."
            )
        self._states, self._read, self._divergence = {}, 0, MeanMetrics()
        width = int(getattr(base_of(module.model).config.get_text_config(), "hidden_size", 0))
        sizes = accumulate(len(example) * width * torch.float32.itemsize for example in self._examples)
        self._kept = sum(size <= KEPT_BYTES for size in sizes) if width else 0

    def _samples(self, module: SupervisedFineTuning) -> list[Example]:
        assert self._reference is not None
        options, tokenizer = self.options, module.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        with self._reference.use() as model, torch.random.fork_rng(devices=_cuda_devices(module)):
            torch.manual_seed(module.model_options.seed)
            # only padding ends a sample: the end token may also be what texts start with
            engine = LocalEngine(
                model, end_token_ids=[len(tokenizer)], pad_token_id=pad_token_id(tokenizer), batch_size=64
            )
            rollouts = engine.generate(
                [[first]],
                max_new_tokens=options.max_tokens - 1,
                sampling=Sampling(1.0),
                num_completions=options.max_texts,
            )
        ids = [torch.tensor([first, *completion.tokens]) for completion in rollouts.completions]
        rank_zero_info(f"Anchor: the original model wrote {len(ids):,} texts of {options.max_tokens:,} tokens.")
        return [Example(tokens, torch.arange(len(tokens)) >= 1) for tokens in ids]

    def penalty(self, module: SupervisedFineTuning, targets: int, batch_idx: int) -> Tensor:
        """The weighted divergence of a micro-batch, times its number of supervised tokens, as its loss is summed.

        Args:
            module: The module.
            targets: Number of supervised tokens of the micro-batch.
            batch_idx: Number of the micro-batch.
        """
        assert self._reference is not None
        chosen = self.draw(module, batch_idx)
        batch = self._batch(module, chosen)
        states = module._required_logprob_model().states(module.model, batch)
        original_states = self._original_states(module, chosen, batch).to(states.device)
        result = distill(module.model, states, batch.targets, original_states, frozen_logits(self._reference.use))
        self._divergence.add({"kl": result.divergence})
        return self.coef * targets * result.loss / batch.num_targets

    def draw(self, module: SupervisedFineTuning, batch_idx: int) -> list[int]:
        """Numbers of the texts of a micro-batch, by step, micro-batch and rank, so that a resumed run draws the same.

        Args:
            module: The module.
            batch_idx: Number of the micro-batch.
        """
        rank = rank_and_world_size()[0]
        rng = random.Random(f"{module.model_options.seed} {module.trainer.global_step} {batch_idx} {rank}")
        return rng.sample(range(len(self._examples)), min(self.options.texts_per_batch, len(self._examples)))

    def _original_states(self, module: SupervisedFineTuning, chosen: Sequence[int], batch: TokenBatch) -> Tensor:
        """Hidden states of the original model for a batch of texts, which never change: kept when first computed.

        Each text is run alone. If it were run with those that it is first drawn with, rounding would differ in a
        resumed run, which draws it with others first. In the first step the two models are equal, and the same pass
        gives a divergence of exactly 0, whose gradients an optimizer can't amplify.
        """
        assert self._reference is not None
        run = module._required_logprob_model().states
        if module.trainer.global_step == 0:
            with self._reference.use() as original:
                return run(original, batch)
        missing = [index for index in chosen if index not in self._states]
        found = {index: self._states[index] for index in chosen if index in self._states}
        if missing:
            started = time.perf_counter()
            counting = nullcontext if is_compiled(module) else OperationCounter
            with self._reference.use() as original, counted_separately(), counting() as counter:
                found |= {index: run(original, self._batch(module, [index])).cpu() for index in missing}
            self._states |= {index: found[index] for index in missing if index < self._kept}
            self._read += len(missing)
            self.seconds += time.perf_counter() - started
            self.flops += 0 if counter is None else counter.flops
        return torch.cat([found[index] for index in chosen])

    def growth(self, micro_batches: int) -> float:
        """Expected number of times that a run reads a text, as a multiple of those so far.

        Args:
            micro_batches: Number of micro-batches of the run.
        """
        if not self._read:
            return 1.0
        drawn = min(1.0, self.options.texts_per_batch / len(self._examples))
        once = self._kept * (1 - (1 - drawn) ** micro_batches)
        each_time = (len(self._examples) - self._kept) * drawn * micro_batches
        return (once + each_time) / self._read

    def end(self) -> None:
        """Free the hidden states, which only training needs."""
        self._states = {}

    def _batch(self, module: SupervisedFineTuning, chosen: Sequence[int]) -> TokenBatch:
        examples = [self._examples[index] for index in chosen]
        pad = module._required_logprob_model().pad_token_id
        return collate_examples(examples, packing=False, pad_token_id=pad).to(input_device(module.model))

    def close_step(self, device: torch.device) -> dict[str, float]:
        """Adapt the weight to what the micro-batches of a step measured on all ranks.

        Returns:
            Metrics to log by name: the divergence in nats per token, and the weight in this step.
        """
        kl, used = self._divergence.reduce(device).get("kl", 0.0), self.coef
        if self.options.target is not None and math.isfinite(kl):
            controller = AdaptiveKL(self.coef, self.options.target, self.options.horizon)
            lowest, highest = (factor * self.options.coef for factor in RANGE)
            self.coef = min(max(controller.update(kl, steps=1).coef, lowest), highest)
        return {"train/anchor_kl": kl, "train/anchor_coef": used}


def _cuda_devices(module: SupervisedFineTuning) -> Sequence[torch.device]:
    return [module.device] if module.device.type == "cuda" else []
