"""Supervised fine-tuning of all weights, or of a LoRA adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig, PeftModel, get_eva_state_dict, initialize_lora_eva_weights
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightning_ft._lightning import active_datamodule
from lightning_ft.data.hf_batches import from_hf
from lightning_ft.data.layout import TokenBatch
from lightning_ft.data.row_types import Pairs, RowType
from lightning_ft.data.tokenizers import pad_token_id
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ConfigError
from lightning_ft.losses.logprobs import SelectedLogProbs
from lightning_ft.models.adapt import (
    as_json,
    lora_config,
    needs_data,
)
from lightning_ft.models.adaptation import Adaptation
from lightning_ft.models.head import base_of
from lightning_ft.models.load import adapter_base
from lightning_ft.models.logprob_model import for_attention
from lightning_ft.models.numerics import refuse_nonfinite
from lightning_ft.models.optim import ADAMW
from lightning_ft.models.router import RouterLoss
from lightning_ft.modules.activation_cache import ActivationCache
from lightning_ft.modules.anchor import Anchor, AnchorOptions
from lightning_ft.modules.base import FineTuning
from lightning_ft.modules.hooks import refuse_replaced_hooks
from lightning_ft.modules.options import SupervisedOptions, Unpack
from lightning_ft.modules.resume import STATE
from lightning_ft.modules.step_metrics import MeanMetrics, TokenMetrics, with_mean_value


class SupervisedFineTuning(FineTuning):
    """Trains on the supervised tokens of `TokenBatch`es.

    The loss of an optimizer step is the mean over the supervised tokens of the whole step: all its micro-batches on all
    ranks. A mixture of experts that is configured with a router loss adds it with the configured coefficient: the loss
    of each forward pass is over all of its tokens, and a pass is weighted by its number of supervised tokens.

    Args:
        model: Hub name, local folder, or a loaded model.
        anchor: Penalty on forgetting: the KL divergence from the original model on general texts, weighted by ``coef``
            (1 by default) or held near a ``target`` in nats per token. A dict such as ``{"texts": "general.jsonl",
            "coef": 1.0}``, with ``"samples"`` in place of the file for texts that the original model writes, or
            `lightning_ft.modules.anchor.AnchorOptions`.
        options: Arguments of `FineTuning`.
    """

    trains_router_loss: ClassVar[bool] = True
    row_type: ClassVar[type[RowType[Any]] | None] = Pairs
    purpose: ClassVar[str] = "trains on supervised tokens"
    accuracy_name: ClassVar[str] = "token_accuracy"
    """Logged name of the share of supervised tokens that were predicted."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        anchor: AnchorOptions | dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self._step_metrics = TokenMetrics()
        self._router_metrics = MeanMetrics()
        anchor_options = AnchorOptions.of(anchor)
        self.anchor = None if anchor_options is None else Anchor(anchor_options)
        """What keeps the model near to the original one; None without the argument `anchor`."""
        self.record_arguments({"anchor": None if anchor_options is None else anchor_options.as_json()})

    def configure_model(self) -> None:
        """As in `FineTuning`, and keep the original model where an anchor needs it."""
        if self.model is None:
            super().configure_model()
            if self.anchor is not None:
                self.anchor.keep_original(self)

    def on_train_start(self) -> None:
        """As in `FineTuning`, and start counting."""
        super().on_train_start()
        self._step_metrics.start()
        if self.anchor is not None:
            self.anchor.start(self)
        self._router_metrics = MeanMetrics()

    def on_train_end(self) -> None:
        """Free what only training needs."""
        super().on_train_end()
        if self.anchor is not None:
            self.anchor.end()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Convert batches of transformers (`input_ids`, `attention_mask`, `labels`) to `TokenBatch`es."""
        if isinstance(batch, Mapping) and "labels" in batch:
            return from_hf(batch, pad_token_id=pad_token_id(self.tokenizer))
        return batch

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Mean negative log-likelihood per supervised token, with the gradients of the sum.

        `on_before_optimizer_step` divides these by the tokens of the whole step.
        """
        if not self._own_loss.router:
            result = self.compute_logprobs(batch, "sum")
            loss = -result.logprobs
            self._step_metrics.add(loss, result.correct, batch)
            loss = self.anchored(loss, batch.num_targets, batch_idx)
            self.note_loss(batch_idx, loss)
            return with_mean_value(loss, batch.num_targets)
        result, router_loss = self._logprobs_and_router_loss(batch)
        loss = -result.logprobs
        self._step_metrics.add(loss, result.correct, batch)
        weighted = router_loss * batch.num_targets
        self._router_metrics.add({"router_loss": weighted}, {"router_loss": batch.num_targets})
        loss = self.anchored(loss + self._own_loss.router * weighted.to(loss.device), batch.num_targets, batch_idx)
        self.note_loss(batch_idx, loss)
        return with_mean_value(loss, batch.num_targets)

    @property
    def frozen_flops(self) -> int:
        """Operations of the original model on the texts of an anchor, in addition to the training steps."""
        return 0 if self.anchor is None else self.anchor.flops

    def anchored(self, loss: Tensor, targets: int, batch_idx: int) -> Tensor:
        """Add the penalty of the anchor, if there is one, to the summed loss of a micro-batch.

        Args:
            loss: Loss, summed over the supervised tokens.
            targets: Number of these tokens.
            batch_idx: Number of the micro-batch.
        """
        return loss if self.anchor is None else loss + self.anchor.penalty(self, targets, batch_idx)

    def _logprobs_and_router_loss(self, batch: TokenBatch) -> tuple[SelectedLogProbs, Tensor]:
        """Log-probabilities as `compute_logprobs` gives them, and the router's loss of the same forward pass."""
        batch = self._required_logprob_model().arranged(self.model, batch)
        with RouterLoss(self.model).recorded() as recorded:
            result = self.compute_logprobs(batch, "sum")
        return result, recorded.value(batch)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the sum of the step's gradients into their token-weighted mean, before they are clipped."""
        totals = self._step_metrics.reduce(self.device)
        gradients = self.average_gradients(totals.targets)
        metrics = {"train/loss": totals.loss, f"train/{self.accuracy_name}": totals.accuracy}
        self.log_dict(metrics, prog_bar=True, batch_size=1)
        self.log_dict(
            {
                "train/tokens_seen": float(totals.tokens_seen),
                "train/tokens_per_second": totals.tokens_per_second,
                "train/padding_fraction": totals.padding_fraction,
            },
            batch_size=1,
        )
        if self.anchor is not None:
            self.log_dict(self.anchor.close_step(self.device), batch_size=1)
        for name, mean in self._router_metrics.reduce(self.device).items():
            self.log(f"train/{name}", mean, batch_size=1)
        self.log_optimizer(optimizer, gradients, totals.loss)

    def add_evaluation(self, sums: TokenMetrics | None, batch: TokenBatch, batch_idx: int) -> TokenMetrics:
        """Sum the log-likelihood of a batch."""
        result = self.compute_logprobs(batch, "sum")
        sums = sums if sums is not None else TokenMetrics()
        sums.add(-result.logprobs, result.correct, batch)
        return sums

    def evaluation_metrics(self, sums: TokenMetrics) -> dict[str, float]:
        """Loss, perplexity and token accuracy, each weighted by token over all batches and ranks."""
        totals = sums.reduce(self.device)
        return {
            "loss": totals.loss,
            "perplexity": math.exp(min(totals.loss, 700.0)),
            "token_accuracy": totals.accuracy,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in `FineTuning`, with the count of tokens."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE]["tokens_seen"] = self._step_metrics.tokens_seen
        if self.anchor is not None:
            checkpoint[STATE]["anchor_coef"] = self.anchor.coef

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in `FineTuning`, with the count of tokens."""
        super().on_load_checkpoint(checkpoint)
        self._step_metrics.tokens_seen = int(checkpoint.get(STATE, {}).get("tokens_seen", 0))
        if self.anchor is not None and "anchor_coef" in checkpoint.get(STATE, {}):
            self.anchor.coef = float(checkpoint[STATE]["anchor_coef"])


class FullFineTuning(SupervisedFineTuning):
    """Fine-tune every weight of a causal language model on supervised tokens.

    Args:
        model: Hub name, local folder, or a loaded model.
        dtype: Dtype of the weights: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``. The default
            is ``float32``: small updates are lost in bf16 weights; use the Trainer's ``precision="bf16-mixed"`` for
            speed.

    Raises:
        ConfigError: For settings that contradict each other.

    Example:
        >>> module = FullFineTuning("Qwen/Qwen3-0.6B", learning_rate=1e-5)  # no weights are loaded yet
        >>> module.hparams["learning_rate"]
        1e-05
    """

    default_learning_rate: ClassVar[float] = 2e-5
    default_dtype: ClassVar[str] = "float32"

    def __init__(self, model: str | PreTrainedModel, **options: Unpack[SupervisedOptions]) -> None:
        super().__init__(model, **options)
        if isinstance(model, str) and adapter_base(model) is not None:
            raise ConfigError(
                f"{model!r} is an adapter; FullFineTuning needs a whole model (LoRAFineTuning continues adapters)."
            )


class LoRAFineTuning(SupervisedFineTuning):
    """Fine-tune a LoRA adapter on supervised tokens (https://arxiv.org/abs/2106.09685).

    Args:
        model: Hub name, local folder, or a loaded model. A folder that holds an adapter is continued on its own base.
        lora: Configuration of the adapter: a `peft.LoraConfig` or a dict of its arguments that override the default
            (every linear layer, rank 16, alpha 32). All of PEFT's variants pass through (``use_rslora``, ``use_dora``,
            ``init_lora_weights: pissa | olora | eva | loftq``, ``modules_to_save``, ``rank_pattern``, ...).
        adapter: Folder of a saved adapter to continue, instead of a new one.
        top_layers: Number of the topmost layers that are adapted; None for all.
        activation_cache: Cache of the activations of frozen layers: what the layers below the lowest adapted one output
            is computed once per row, kept on disk, and read in all later epochs. A folder; True for one in the cache of
            the `datasets` library; or a dict of ``folder`` and ``max_gib`` (50 by default; the longest unused entries
            make room). Refused where it would not be exact: adapters or dropout below, layers that depend on more than
            the one before.
        loraplus_lr_ratio: Learning rate of B divided by that of A in LoRA+.
        learning_rate: Learning rate at the peak of the schedule; the default is ten times that of full fine-tuning.
        dtype: Dtype of the frozen base: ``auto`` (the checkpoint's, the default), ``float32``, ``bfloat16`` or
            ``float16``. The adapter is fp32.
        quantization: Quantization of the frozen base: ``4bit`` (QLoRA), ``8bit``, or a dict of arguments for
            `BitsAndBytesConfig`.

    Raises:
        ConfigError: For settings that contradict each other, or that PEFT doesn't know.

    Example:
        >>> module = LoRAFineTuning("Qwen/Qwen3-0.6B", lora={"r": 8})  # no weights are loaded yet
        >>> module.hparams["lora"]["r"], module.hparams["learning_rate"]
        (8, 0.0002)
    """

    default_learning_rate: ClassVar[float] = 10 * FullFineTuning.default_learning_rate
    optimizer_names: ClassVar[tuple[str, ...]] = (ADAMW, "loraplus", "lorafa")
    default_dtype: ClassVar[str] = "auto"

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        lora: dict[str, Any] | LoraConfig | bool | None = None,
        adapter: str | None = None,
        top_layers: int | None = None,
        activation_cache: bool | str | Path | dict[str, Any] | None = None,
        loraplus_lr_ratio: float = 16.0,
        quantization: str | dict[str, Any] | None = None,
        **options: Unpack[SupervisedOptions],
    ) -> None:
        if (earlier_name := cast("dict[str, Any]", options).pop("trunk_cache", None)) is not None:
            rank_zero_warn("`trunk_cache` is now called `activation_cache`.")
            activation_cache = earlier_name
        super().__init__(model, **options)
        self.model_options = replace(self.model_options, quantization=quantization)
        if lora is False:
            raise ConfigError("LoRAFineTuning trains an adapter, and lora=False asks for none: use FullFineTuning.")
        self.loraplus_lr_ratio = float(loraplus_lr_ratio)
        self._activations = ActivationCache.of(activation_cache)
        """Cache of the activations of frozen layers; None without one."""
        if self._activations is not None and self.model_options.torch_compile:
            raise ConfigError("activation_cache skips layers, which compiled code can't: leave out torch_compile.")
        if self._activations is not None and self.anchor is not None:
            raise ConfigError(
                "activation_cache keeps activations of training rows, and an anchor runs other texts: leave one out."
            )
        self._adaptation = Adaptation(model, True if lora is None else lora, adapter, top_layers)
        self._eva_due = self._moves_ranks()
        """Whether the adapter has still to be initialized from data."""
        self.record_arguments(
            {
                "lora": self._adaptation.as_json(),
                "adapter": adapter,
                "top_layers": top_layers,
                "activation_cache": _without_paths(activation_cache),
                "loraplus_lr_ratio": self.loraplus_lr_ratio,
                "quantization": quantization,
            }
        )

    # ---------------------------------------------------------------- activation cache

    @property
    def frozen_flops(self) -> int:
        """As in `SupervisedFineTuning`, and operations spent on the cached activations of frozen layers so far."""
        return super().frozen_flops + (0 if self._activations is None else self._activations.flops)

    def on_train_start(self) -> None:
        """As in `SupervisedFineTuning`; open the activation cache and announce its size."""
        super().on_train_start()
        if self._activations is not None:
            refuse_replaced_hooks(type(self), with_options=True)
            self._activations.start(self)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """As in `SupervisedFineTuning`, from the lowest trained layer on where activations are cached."""
        if self._activations is None:
            return super().training_step(batch, batch_idx)
        with self._activations.around(self, batch):
            return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        """Write activations that are still in memory, so that other ranks and later runs find them."""
        if self._activations is not None:
            self._activations.end_epoch(self)

    def on_train_end(self) -> None:
        """As in `SupervisedFineTuning`; write activations that are still in memory, and report how many were read."""
        super().on_train_end()
        if self._activations is not None:
            self._activations.end()

    # ---------------------------------------------------------------- adapter

    def configure_model(self) -> None:
        """As in `SupervisedFineTuning`; in a fit, initialize a new adapter from the data where it is configured so.

        The weights may have been loaded before, to evaluate or to generate.
        """
        super().configure_model()
        if self._eva_due and self._starts_fit():
            self._eva_due = False
            if any(bool(p.any()) for name, p in self.named_parameters() if ".lora_B." in name):
                return  # trained without a Trainer, or loaded with load_state_dict
            self._initialize_from_data(cast(PeftModel, self.model))
            self.model.train()
            refuse_nonfinite(self.model)
            self.checkpoint_names()

    def _initialize_from_data(self, model: PeftModel) -> None:
        """EVA (https://arxiv.org/abs/2410.07170): A from the principal directions of the activations.

        On rank 0 for all; before optimizers and strategies see the model, whose layers it replaces where it moves
        ranks.
        """
        data = active_datamodule(self.trainer)
        if data is None:
            raise ConfigError(
                "init_lora_weights='eva' is computed from the training data: pass a DataModule to the Trainer."
            )
        if self.sharded:
            raise ConfigError(
                "init_lora_weights='eva' can't be computed on a sharded model: start on one device, export the "
                "adapter, and continue it with `adapter`."
            )
        device = self.trainer.strategy.root_device

        def forward(model: PeftModel, batch: TokenBatch) -> None:
            on_device = for_attention(base_of(model), batch).to(device)
            model(input_ids=on_device.input_ids, position_ids=on_device.position_ids, use_cache=False)

        directions = None
        if self.global_rank == 0:
            with torch.random.fork_rng():
                torch.manual_seed(self.model_options.seed)
                directions = get_eva_state_dict(
                    model.to(device),
                    data.train_dataloader(),
                    forward_fn=forward,
                    prepare_model_inputs_fn=None,
                    prepare_layer_inputs_fn=None,
                    gather_distributed_inputs=False,
                )
        directions = self.trainer.strategy.broadcast(directions)
        initialize_lora_eva_weights(model, eva_state_dict=directions)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in `SupervisedFineTuning`, with ranks that EVA may have moved between layers; activations are written."""
        super().on_save_checkpoint(checkpoint)
        if self._activations is not None:
            self._activations.flush()  # a resumed run finds them
        if self._moves_ranks() and "hyper_parameters" in checkpoint:
            lora = as_json(cast(LoraConfig, cast(PeftModel, self.model).active_peft_config))
            checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "lora": lora}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in `SupervisedFineTuning`, with the ranks of the run that wrote it."""
        self._eva_due = False  # the checkpoint has the directions of its own data
        saved = checkpoint.get("hyper_parameters", {}).get("lora")
        if self._moves_ranks() and saved is not None and saved.get("rank_pattern"):
            self._adaptation.lora = lora_config(saved)
            if self.model is not None:
                self.model = self._adapt(cast(PreTrainedModel, self.model.unload())).train()
        super().on_load_checkpoint(checkpoint)

    def _moves_ranks(self) -> bool:
        return self._adaptation.lora is not None and needs_data(self._adaptation.lora)

    def _starts_fit(self) -> bool:
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == "fit" and trainer.ckpt_path is None

    def _optimizer(self) -> torch.optim.Optimizer:
        options = self.optimizer_options
        if options.optimizer not in ("loraplus", "lorafa"):
            return super()._optimizer()
        model = cast(PeftModel, self.model)
        if options.optimizer == "loraplus":
            return create_loraplus_optimizer(
                model,
                torch.optim.AdamW,
                lr=options.learning_rate,
                loraplus_lr_ratio=self.loraplus_lr_ratio,
                betas=options.betas,
                loraplus_weight_decay=options.weight_decay,
            )
        config = model.active_peft_config
        return create_lorafa_optimizer(
            model,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            use_rslora=config.use_rslora,
        )


def _without_paths(option: bool | str | Path | dict[str, object] | None) -> bool | str | dict[str, object] | None:
    """Paths as strings: a checkpoint that holds a `Path` can't be loaded with `weights_only=True`."""
    if isinstance(option, dict):
        return {name: str(value) if isinstance(value, Path) else value for name, value in option.items()}
    return str(option) if isinstance(option, Path) else option
