"""Supervised fine-tuning of all weights, or of a LoRA adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_eva_state_dict, initialize_lora_eva_weights
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.data.layout import TokenBatch
from lightning_ft.data.module import RowDataModule
from lightning_ft.distributed import rank_zero_info
from lightning_ft.errors import ConfigError
from lightning_ft.losses.logprobs import SelectedLogProbs
from lightning_ft.models.adapt import (
    as_json,
    lora_config,
    needs_data,
)
from lightning_ft.models.adaptation import Adaptation
from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.models.load import adapter_base
from lightning_ft.models.logprob_model import for_attention
from lightning_ft.models.optim import Schedule
from lightning_ft.models.router import RouterLoss
from lightning_ft.modules.activation_cache import ActivationCache, ActivationReader
from lightning_ft.modules.evaluation import EvaluatedFineTuning
from lightning_ft.modules.resume import STATE
from lightning_ft.modules.step_metrics import MeanMetrics, TokenMetrics
from lightning_ft.rewards.function import OnNonFinite


class SupervisedFineTuning(EvaluatedFineTuning):
    """Trains on the supervised tokens of `TokenBatch`es.

    The loss of an optimizer step is the mean over the supervised tokens of the whole step: all its micro-batches on all
    ranks. A mixture of experts whose configuration asks for it adds its router's loss, with the coefficient given
    there: that of each forward pass over all of its tokens, a pass weighing as much as it has supervised tokens.
    """

    trains_router_loss: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._window = TokenMetrics()
        self._router_window = MeanMetrics()

    def on_train_start(self) -> None:
        """As in `FineTuning`, and start counting."""
        super().on_train_start()
        self._window.start()
        self._router_window = MeanMetrics()

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Summed negative log-likelihood; `on_before_optimizer_step` divides by the tokens of the whole step."""
        if not self._own_loss.router:
            scored = self.score(batch, "sum")
            loss = -scored.logprobs
            self.note_loss(batch_idx, loss)
            self._window.add(loss, scored.correct, batch)
            return cast(Tensor, loss)
        scored, router_loss = self._score_with_router(batch)
        loss = -scored.logprobs
        self._window.add(loss, scored.correct, batch)
        weighted = router_loss * batch.num_targets
        self._router_window.add({"router_loss": weighted}, {"router_loss": batch.num_targets})
        loss = loss + self._own_loss.router * weighted.to(loss.device)
        self.note_loss(batch_idx, loss)
        return loss

    def _score_with_router(self, batch: TokenBatch) -> tuple[SelectedLogProbs, Tensor]:
        """Log-probabilities as `score` gives them, and the router's loss over the same forward pass."""
        scorer = self._required_logprob_model()
        batch = scorer.arranged(self.model, batch)
        with RouterLoss(self.model).recorded() as recorded:
            scored = self.score(batch, "sum")
        return scored, recorded.value(batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Turn the sum of the step's gradients into their token-weighted mean, before they are clipped.

        Lightning divided each micro-batch by `accumulate_grad_batches` (also in a short last window) and DDP averaged
        over ranks.
        """
        totals = self._window.reduce(self.device)
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / max(1, totals.targets)
        gradients = self.scale_gradients(factor)
        figures: dict[str, Any] = {"train/loss": totals.loss, "train/token_accuracy": totals.accuracy}
        self.log_dict(figures, prog_bar=True, batch_size=1)
        self.log_dict(
            {
                "train/tokens_seen": float(totals.tokens_seen),
                "train/tokens_per_second": totals.tokens_per_second,
                "train/padding_fraction": totals.padding_fraction,
            },
            batch_size=1,
        )
        for name, mean in self._router_window.reduce(self.device).items():
            self.log(f"train/{name}", mean, batch_size=1)
        self.log_optimizer(optimizer, gradients, totals.loss)

    def add_evaluation(self, sums: TokenMetrics | None, batch: TokenBatch, batch_idx: int) -> TokenMetrics:
        """Sum the log-likelihood of a batch."""
        scored = self.score(batch, "sum")
        window = sums if sums is not None else TokenMetrics()
        window.add(-scored.logprobs, scored.correct, batch)
        return window

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
        checkpoint[STATE]["tokens_seen"] = self._window.tokens_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in `FineTuning`, with the count of tokens."""
        super().on_load_checkpoint(checkpoint)
        self._window.tokens_seen = int(checkpoint.get(STATE, {}).get("tokens_seen", 0))


class CachedFineTuning(SupervisedFineTuning):
    """Keeps what the frozen layers give for each row, where a subclass is asked to.

    In a loop of one's own `training_step` does the same as under a Trainer; call `on_train_epoch_end` at the end of an
    epoch to write what is still in memory.
    """

    _activation_cache: ActivationCache | None = None
    _reader: ActivationReader | None = None

    @property
    def frozen_flops(self) -> int:
        """Operations that computing the frozen layers' output took so far, beside those of the training steps."""
        return 0 if self._reader is None else self._reader.flops

    def on_train_start(self) -> None:
        """As in `SupervisedFineTuning`, and say what will be written to disk.

        Raises:
            ModelError: Where what the frozen layers give isn't the same every time.
            ConfigError: Where it takes more room than there is.
        """
        super().on_train_start()
        if self._activation_cache is None:
            return
        if getattr(self, "_device_mesh", None) is not None:
            raise ConfigError("activation_cache: a sharded model can't pass over layers; use DDP, or train without it.")
        with self.trainer.precision_plugin.forward_context():
            reader = self._trunk_reader(self._activation_cache)
        data = getattr(self.trainer, "datamodule", None)
        report = data.report.get("train") if isinstance(data, RowDataModule) else None
        reader.announce(None if report is None else sum(report.lengths))

    def _trunk_reader(self, cache: ActivationCache) -> ActivationReader:
        if self._reader is None:
            if self._own_loss.router:
                raise ConfigError(
                    "activation_cache passes over layers whose routers are part of the router's loss that the model asks "
                    "for: set output_router_logits=False in its configuration, or train without activation_cache."
                )
            scorer, kind = self._required_logprob_model(), input_device(self.model).type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            self._reader = ActivationReader(self.model, cache, scorer, autocast=autocast)
        return self._reader

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """As in `SupervisedFineTuning`, from the lowest trained layer on where the others' output is kept."""
        if self._activation_cache is None:
            return super().training_step(batch, batch_idx)
        with self._trunk_reader(self._activation_cache).around(batch):
            return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        """Write what was kept in memory, so that other ranks and later runs find it."""
        if self._reader is not None:
            self._reader.flush()
            if self._trainer is not None:
                self.trainer.strategy.barrier()  # all ranks have written by the time that one looks
            self._reader.end_epoch(self.current_epoch)

    def on_train_end(self) -> None:
        """Write what was kept in memory, and say how often it was read."""
        if self._reader is not None:
            self._reader.flush()
            rank_zero_info(
                f"Frozen trunk: {self._reader.read:,} rows were read, {self._reader.computed:,} had to be computed."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in `SupervisedFineTuning`; states are written too, so that a resumed run finds them."""
        super().on_save_checkpoint(checkpoint)
        if self._reader is not None:
            self._reader.flush()


LoRAOptimizer = Literal["adamw", "loraplus", "lorafa"]


class FullFineTuning(SupervisedFineTuning):
    """Fine-tune every weight of a causal language model on supervised tokens.

    Args:
        model: Hub name, local folder, or a loaded model.
        tokenizer: Hub name, folder or tokenizer, where it is neither the model's own nor given to the DataModule.
        learning_rate: Peak of the schedule.
        weight_decay: Of AdamW, on matrices only: norms and biases never decay.
        betas: Of AdamW.
        lr_schedule: What follows the warm-up: ``cosine``, ``linear`` or ``constant``.
        warmup_ratio: Share of all optimizer steps in which the learning rate rises linearly to its peak, rounded up.
        dtype: Of the weights: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``. By default
            ``float32``: small updates are lost in bf16 weights; use the Trainer's ``precision="bf16-mixed"`` for speed.
        attn_implementation: As transformers names them: ``sdpa``, ``eager``, ``flash_attention_2``, ...
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        torch_compile: Compile the backbone: True, or a dict of `torch.compile`'s arguments.
        generation: Arguments of `generate` for `predict_step`, such as ``{"max_new_tokens": 128}``.
        on_nonfinite: What to do before an optimizer step whose loss or gradients aren't finite: ``error`` stops the
            run, ``skip`` leaves the step out and counts it (``train/skipped_steps``).
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that the model's repository ships.
        seed: Of whatever is initialised at random.

    Raises:
        ConfigError: For settings that contradict each other.

    Example:
        >>> module = FullFineTuning("Qwen/Qwen3-0.6B", learning_rate=1e-5)  # no weights are loaded yet
        >>> module.hparams["learning_rate"]
        1e-05
    """

    default_learning_rate: ClassVar[float] = 2e-5
    default_dtype: ClassVar[str] = "float32"

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        learning_rate: float | None = None,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        lr_schedule: Schedule = "cosine",
        warmup_ratio: float = 0.03,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        torch_compile: bool | dict[str, Any] = False,
        generation: dict[str, Any] | None = None,
        on_nonfinite: OnNonFinite = "error",
        revision: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            tokenizer=tokenizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            betas=betas,
            lr_schedule=lr_schedule,
            warmup_ratio=warmup_ratio,
            dtype=dtype,
            attn_implementation=attn_implementation,
            gradient_checkpointing=gradient_checkpointing,
            torch_compile=torch_compile,
            generation=generation,
            on_nonfinite=on_nonfinite,
            revision=revision,
            trust_remote_code=trust_remote_code,
            seed=seed,
        )
        if isinstance(model, str) and adapter_base(model) is not None:
            raise ConfigError(
                f"{model!r} is an adapter; FullFineTuning needs a whole model (LoRAFineTuning continues adapters)."
            )
        self.save_hyperparameters({name: value for name, value in self._hyper.items() if name != "quantization"})


class LoRAFineTuning(CachedFineTuning):
    """Fine-tune a LoRA adapter on supervised tokens (https://arxiv.org/abs/2106.09685).

    Args:
        model: Hub name, local folder, or a loaded model. A folder that holds an adapter is continued on its own base.
        lora: `peft.LoraConfig` or a dict of its arguments, over the default: every linear layer, rank 16, alpha 32. All
            of PEFT's variants pass through (``use_rslora``, ``use_dora``, ``init_lora_weights: pissa | olora | eva |
            loftq``, ``modules_to_save``, ``rank_pattern``, ...).
        adapter: A saved adapter to continue from, instead of a new one.
        top_layers: Adapt so many of the topmost layers only; None for all.
        activation_cache: Compute what the layers below the lowest adapted one give once for each row, keep it on disk, and
            read it in all later epochs: a folder; True for one in the cache of the `datasets` library; or a dict of
            ``folder`` and ``max_gib`` (50 by default; the longest unused make room). Refused where it would not be
            exact: adapters or dropout below, layers that depend on more than the one before.
        optimizer: ``adamw``, ``loraplus`` (LoRA+, https://arxiv.org/abs/2402.12354) or ``lorafa`` (LoRA-FA,
            https://arxiv.org/abs/2308.03303).
        loraplus_lr_ratio: How much faster LoRA+ trains B than A.
        tokenizer: Hub name, folder or tokenizer, where it is neither the model's own nor given to the DataModule.
        learning_rate: Peak of the schedule; by default ten times that of full fine-tuning.
        weight_decay: Of AdamW, on matrices only: norms and biases never decay.
        betas: Of AdamW.
        lr_schedule: What follows the warm-up: ``cosine``, ``linear`` or ``constant``.
        warmup_ratio: Share of all optimizer steps in which the learning rate rises linearly to its peak, rounded up.
        dtype: Of the frozen base: ``auto`` (the checkpoint's, the default), ``float32``, ``bfloat16`` or ``float16``.
            The adapter is fp32.
        attn_implementation: As transformers names them: ``sdpa``, ``eager``, ``flash_attention_2``, ...
        quantization: Of the frozen base: ``4bit`` (QLoRA), ``8bit``, or a dict for `BitsAndBytesConfig`.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        torch_compile: Compile the backbone: True, or a dict of `torch.compile`'s arguments.
        generation: Arguments of `generate` for `predict_step`, such as ``{"max_new_tokens": 128}``.
        on_nonfinite: What to do before an optimizer step whose loss or gradients aren't finite: ``error`` stops the
            run, ``skip`` leaves the step out and counts it (``train/skipped_steps``).
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that the model's repository ships.
        seed: Of the adapter's initial weights.

    Raises:
        ConfigError: For settings that contradict each other, or that PEFT doesn't know.

    Example:
        >>> module = LoRAFineTuning("Qwen/Qwen3-0.6B", lora={"r": 8})  # no weights are loaded yet
        >>> module.hparams["lora"]["r"], module.hparams["learning_rate"]
        (8, 0.0002)
    """

    default_learning_rate: ClassVar[float] = 10 * FullFineTuning.default_learning_rate
    default_dtype: ClassVar[str] = "auto"

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        lora: dict[str, Any] | LoraConfig | bool | None = None,
        adapter: str | None = None,
        top_layers: int | None = None,
        activation_cache: bool | str | Path | dict[str, Any] | None = None,
        optimizer: LoRAOptimizer = "adamw",
        loraplus_lr_ratio: float = 16.0,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        learning_rate: float | None = None,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        lr_schedule: Schedule = "cosine",
        warmup_ratio: float = 0.03,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        torch_compile: bool | dict[str, Any] = False,
        generation: dict[str, Any] | None = None,
        on_nonfinite: OnNonFinite = "error",
        revision: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            tokenizer=tokenizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            betas=betas,
            lr_schedule=lr_schedule,
            warmup_ratio=warmup_ratio,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization=quantization,
            gradient_checkpointing=gradient_checkpointing,
            torch_compile=torch_compile,
            generation=generation,
            on_nonfinite=on_nonfinite,
            revision=revision,
            trust_remote_code=trust_remote_code,
            seed=seed,
        )
        if optimizer not in ("adamw", "loraplus", "lorafa"):
            raise ConfigError(f"optimizer={optimizer!r}: expected 'adamw', 'loraplus' or 'lorafa'.")
        self._activation_cache = ActivationCache.of(activation_cache)
        if self._activation_cache is not None and torch_compile:
            raise ConfigError(
                "activation_cache passes over layers, which compiled code can't: leave out torch_compile."
            )
        self._adaptation = Adaptation(model, True if lora is None else lora, adapter, top_layers)
        self._hyper |= {
            "lora": self._adaptation.as_json(),
            "adapter": adapter,
            "top_layers": top_layers,
            "activation_cache": _without_paths(activation_cache),
            "optimizer": optimizer,
            "loraplus_lr_ratio": float(loraplus_lr_ratio),
        }
        self.save_hyperparameters(dict(self._hyper))

    def _adapt(self, base: PreTrainedModel) -> CausalLM:
        model = super()._adapt(base)
        if self._moves_ranks() and self._starts_fit():
            self._initialise_from_data(cast(PeftModel, model))
        return model

    def _initialise_from_data(self, model: PeftModel) -> None:
        """EVA (https://arxiv.org/abs/2410.07170): A from the principal directions of the activations.

        On rank 0 for all; before optimizers and strategies see the model, whose layers it replaces where it moves
        ranks.
        """
        data = cast(Any, self.trainer).datamodule
        if data is None:
            raise ConfigError("init_lora_weights='eva' looks at the training data, so it needs a DataModule.")
        if getattr(self, "_device_mesh", None) is not None:
            raise ConfigError(
                "init_lora_weights='eva' can't be computed on a sharded model: start with one device, export the "
                "adapter, and continue it with adapter=."
            )
        device = self.trainer.strategy.root_device

        def forward(model: PeftModel, batch: TokenBatch) -> None:
            on_device = for_attention(base_of(model), batch).to(device)
            model(input_ids=on_device.input_ids, position_ids=on_device.position_ids, use_cache=False)

        found = None
        if self.global_rank == 0:
            with torch.random.fork_rng():
                torch.manual_seed(self._hyper["seed"])
                found = get_eva_state_dict(
                    model.to(device),
                    data.train_dataloader(),
                    forward_fn=forward,
                    prepare_model_inputs_fn=None,
                    prepare_layer_inputs_fn=None,
                    gather_distributed_inputs=False,
                )
        found = self.trainer.strategy.broadcast(found)
        initialize_lora_eva_weights(model, eva_state_dict=found)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in `SupervisedFineTuning`; EVA may have moved ranks between layers, and whoever loads this needs them."""
        super().on_save_checkpoint(checkpoint)
        if self._moves_ranks() and "hyper_parameters" in checkpoint:
            lora = as_json(cast(LoraConfig, cast(PeftModel, self.model).active_peft_config))
            checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "lora": lora}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in `SupervisedFineTuning`, with the ranks of the run that wrote it."""
        saved = checkpoint.get("hyper_parameters", {}).get("lora")
        if self._moves_ranks() and saved is not None and saved.get("rank_pattern"):
            self._adaptation.lora = lora_config(saved)
            if self.model is not None:
                self.model = self._adapt(cast(PreTrainedModel, self.model.unload())).train()
        super().on_load_checkpoint(checkpoint)

    def _moves_ranks(self) -> bool:
        return self._adaptation.lora is not None and needs_data(self._adaptation.lora)

    def _starts_fit(self) -> bool:
        trainer = cast(Any, self._trainer)
        return trainer is not None and trainer.state.fn == "fit" and trainer.ckpt_path is None

    def _optimizer(self) -> torch.optim.Optimizer:
        kind, rate = self._hyper["optimizer"], self._hyper["learning_rate"]
        if kind == "adamw":
            return super()._optimizer()
        model = cast(PeftModel, self.model)
        if kind == "loraplus":
            return create_loraplus_optimizer(
                model,
                torch.optim.AdamW,
                lr=rate,
                loraplus_lr_ratio=self._hyper["loraplus_lr_ratio"],
                betas=tuple(self._hyper["betas"]),
                loraplus_weight_decay=self._hyper["weight_decay"],
            )
        config = model.active_peft_config
        return create_lorafa_optimizer(
            model,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lr=rate,
            weight_decay=self._hyper["weight_decay"],
            use_rslora=config.use_rslora,
        )


def _without_paths(given: bool | str | Path | dict[str, Any] | None) -> bool | str | dict[str, Any] | None:
    """Paths as text: a checkpoint that holds one can't be loaded with `weights_only=True`."""
    if isinstance(given, dict):
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    return str(given) if isinstance(given, Path) else given
