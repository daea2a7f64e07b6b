"""What every fine-tuning module shares: loading, optimizer and schedule, checkpoints, generation, export."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.checkpoint_file import read_checkpoint
from lightning_ft.data.encode import encode_prompt
from lightning_ft.data.layout import TokenBatch
from lightning_ft.distributed import rank_zero_info, rank_zero_warn
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.adapt import InitialAdapter
from lightning_ft.models.adaptation import Adaptation
from lightning_ft.models.adapter_export import check_base
from lightning_ft.models.export import check_export, export
from lightning_ft.models.generate import generate_text
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.load import load_causal_lm, load_tokenizer, pad_token_id, quantization_options, resolve_dtype
from lightning_ft.models.logprob_model import LogProbModel
from lightning_ft.models.numerics import refuse_nonfinite
from lightning_ft.models.optim import Schedule, adamw, parameter_groups, schedule_factor, set_first_rate
from lightning_ft.models.router import OwnLoss, find_own_loss
from lightning_ft.models.shard import shard
from lightning_ft.modules.averaging import AveragedWeights
from lightning_ft.modules.checkpoint_io import CheckpointedModule, refuse_other_shapes
from lightning_ft.modules.checks import check_tokens
from lightning_ft.modules.nonfinite import FiniteSteps, check_on_nonfinite
from lightning_ft.modules.precision import tell_lost_steps
from lightning_ft.modules.resume import STATE
from lightning_ft.modules.strategies import check_strategy
from lightning_ft.modules.tokenizer import ModuleTokenizer
from lightning_ft.rewards.function import OnNonFinite
from lightning_ft.types import Message, Request


class FineTuning(AveragedWeights, FiniteSteps, CheckpointedModule):
    """Base of the fine-tuning modules; a subclass adds the training step.

    Args:
        model: Hub name, local folder, or a loaded model.
        tokenizer: Hub name, folder or tokenizer, where it is neither the model's own nor given to the DataModule.
        learning_rate: Peak of the schedule.
        weight_decay: Of AdamW, on matrices only: norms and biases never decay.
        betas: Of AdamW.
        lr_schedule: What follows the warm-up: ``cosine``, ``linear`` or ``constant``.
        warmup_ratio: Share of all optimizer steps in which the learning rate rises linearly to its peak, rounded up.
        dtype: Of the weights: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: As transformers names them: ``sdpa``, ``eager``, ``flash_attention_2``, ...
        quantization: Of a frozen base under an adapter: ``4bit`` (QLoRA), ``8bit``, or a dict for
            `BitsAndBytesConfig`.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        torch_compile: Compile the backbone: True, or a dict of `torch.compile`'s arguments.
        generation: Arguments of `generate` for `predict_step`, such as ``{"max_new_tokens": 128}``.
        on_nonfinite: What to do before an optimizer step whose loss or gradients aren't finite: ``error`` stops the
            run, ``skip`` leaves the step out and counts it (``train/skipped_steps``).
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that the model's repository ships.
        seed: Of whatever is initialised at random.

    Raises:
        ConfigError: For a setting that can't be.
    """

    default_learning_rate: ClassVar[float]
    default_dtype: ClassVar[str]
    trains_router_loss: ClassVar[bool] = False
    """Whether the loss includes the term with which a mixture of experts balances its experts."""

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
        quantization: str | dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        torch_compile: bool | dict[str, Any] = False,
        generation: dict[str, Any] | None = None,
        on_nonfinite: OnNonFinite = "error",
        revision: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(model, (str, PreTrainedModel)):
            raise ConfigError(
                f"model= is a {type(model).__name__}: expected a hub name, a folder, or a loaded transformers model. "
                "Of an adapted model give the folder that its adapter is saved in; a path as a string."
            )
        self.model: Any = None
        self._given = [model]  # in a list: not yet a submodule, so that weights are loaded in configure_model only
        self._tokenizer = ModuleTokenizer(tokenizer, self._load_tokenizer, trust_remote_code=trust_remote_code)
        self._hyper: dict[str, Any] = {
            "model": model if isinstance(model, str) else model.config._name_or_path or None,
            "tokenizer": tokenizer if isinstance(tokenizer, str) else None,
            "learning_rate": self.default_learning_rate if learning_rate is None else float(learning_rate),
            "weight_decay": float(weight_decay),
            "betas": list(betas),
            "lr_schedule": lr_schedule,
            "warmup_ratio": float(warmup_ratio),
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "quantization": quantization,
            "gradient_checkpointing": gradient_checkpointing,
            "torch_compile": torch_compile,
            "generation": generation,
            "on_nonfinite": on_nonfinite,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "seed": seed,
        }
        self._check_settings()
        self._factor = schedule_factor(lr_schedule, warmup_ratio=warmup_ratio, total_steps=self._total_steps)
        self.strict_loading = False  # checkpoints hold trainable weights only; on_load_checkpoint checks those
        self._logprob_model: LogProbModel | None = None
        self._initial: InitialAdapter | None = None
        self._adaptation = Adaptation(model, None, None)
        self._own_loss = OwnLoss()

    def _check_settings(self) -> None:
        """Refuse now what would fail only after weights are loaded."""
        check_on_nonfinite(self._hyper["on_nonfinite"])
        if not 0 < self._hyper["learning_rate"] < math.inf:
            raise ConfigError(f"learning_rate={self._hyper['learning_rate']}: expected a finite number above 0.")
        if self._hyper["weight_decay"] < 0:
            raise ConfigError(f"weight_decay={self._hyper['weight_decay']}: expected 0 or more.")
        if self._hyper["dtype"] is not None:
            resolve_dtype(self._hyper["dtype"])
        if self._hyper["quantization"] is not None:
            quantization_options(self._hyper["quantization"])

    # ---------------------------------------------------------------- model and tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What rows are encoded, answers generated and exports written with; loading it loads no weights.

        It is the one given, to the module or to its DataModule, or else the model's own; in a module that was loaded
        from a checkpoint the one that was trained with.

        Raises:
            TokenizerError: If there is none.
        """
        return self._tokenizer.current

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        name = self._hyper["tokenizer"] or self.model_name
        if not name:
            raise ConfigError("The model given has no name to load a tokenizer from: pass tokenizer=.")
        return load_tokenizer(
            name, revision=self._hyper["revision"], trust_remote_code=self._hyper["trust_remote_code"]
        )

    def adopt_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, *, given: bool = True, template_given: bool = False
    ) -> None:
        """Use the tokenizer of the rows from now on; a DataModule of lightning_ft calls it at `setup`.

        Args:
            tokenizer: The one that rows are encoded with.
            given: Whether the DataModule was given it, or a chat template.
            template_given: Whether the DataModule was given a chat template.

        Raises:
            ConfigError: If another tokenizer was given to this module.
        """
        self._tokenizer.adopt(tokenizer, given=given, template_given=template_given)
        if self.model is not None:
            self._follow_tokenizer()

    def _follow_tokenizer(self) -> None:
        """Bring what was made of an earlier tokenizer up to date."""
        self._required_logprob_model().pad_token_id = pad_token_id(self.tokenizer)

    @property
    def model_name(self) -> str | None:
        """Hub name or folder of the model, None for an object that has neither."""
        return cast("str | None", self._hyper["model"])

    def configure_model(self) -> None:
        """Load the weights, adapt them, and shard them where the strategy shards."""
        if self.model is not None:
            return
        base = self._load_base()
        self._check_rows(base)
        if self._hyper["gradient_checkpointing"]:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = self._adapt(base)
        refuse_nonfinite(model)
        self.model = model.train()
        if base.can_generate():
            self._own_loss = find_own_loss(self.model)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ModelError("No parameter of the model is trainable.")
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None:
            self._tell_misfits()
            shard(base_of(self.model), mesh)
        self._logprob_model = LogProbModel(pad_token_id=pad_token_id(self.tokenizer), backbone=self._compiled())

    def _load_base(self) -> PreTrainedModel:
        given = self._given[0]
        if isinstance(given, PreTrainedModel):
            return cast(PreTrainedModel, given.train())
        return load_causal_lm(self._base_name(), **self._load_options())

    def _load_options(self) -> dict[str, Any]:
        """Arguments of the functions in `lightning_ft.models.load`."""
        return {
            "dtype": self._hyper["dtype"] or self.default_dtype,
            "attn_implementation": self._hyper["attn_implementation"],
            "quantization": self._hyper["quantization"],
            "revision": self._hyper["revision"],
            "trust_remote_code": self._hyper["trust_remote_code"],
            "device": self._trainer.strategy.root_device if self._trainer is not None else None,
        }

    def _base_name(self) -> str:
        return self._adaptation.base or cast(str, self.model_name)

    def _adapt(self, base: PreTrainedModel) -> CausalLM:
        model, self._initial = self._adaptation.apply(base, seed=self._hyper["seed"])
        return model

    def _compiled(self) -> Any:
        wanted = self._hyper["torch_compile"]
        if not wanted:
            return None
        options = {} if wanted is True else dict(wanted)
        return torch.compile(base_of(self.model).base_model, **options)

    # ---------------------------------------------------------------- training

    def setup(self, stage: str) -> None:
        """Refuse a strategy that these modules can't train with."""
        super().setup(stage)
        if stage == "fit":
            check_strategy(self.trainer.strategy)

    def on_fit_start(self) -> None:
        """Refuse rows and bases that would be silently wrong, and tell what is trained."""
        check_base(self.model)
        self._check_rows(self.model)
        if getattr(self, "_device_mesh", None) is None:
            self._tell_misfits()
        tell_lost_steps(self.model, self._hyper["learning_rate"], str(self.trainer.precision))
        rank_zero_info(self.what_is_trained())
        self._tell_own_loss()

    def _tell_own_loss(self) -> None:
        """Warn of what the model adds to its own loss and this module doesn't."""
        if self._own_loss.router and not self.trains_router_loss:
            rank_zero_warn(
                f"{type(base_of(self.model)).__name__} asks for its router's loss (output_router_logits), which isn't "
                f"part of {type(self).__name__}'s loss: set output_router_logits=False in the model's configuration to "
                "silence this."
            )
        if self._own_loss.unknown is not None and self.trains_router_loss:
            rank_zero_warn(self._own_loss.unknown)

    def what_is_trained(self) -> str:
        """A table of what is trained, adapted and frozen by kind, and what no row of text reaches."""
        self.configure_model()
        return self._adaptation.describe(self.model)

    def on_train_start(self) -> None:
        """Check that the schedule knows its end, and give the first step its rate."""
        super().on_train_start()
        schedulers: list[Any] = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        for scheduler in schedulers:
            if self._factor not in getattr(scheduler, "lr_lambdas", ()):
                continue
            if self._hyper["lr_schedule"] != "constant" and self._total_steps() is None:
                raise ConfigError(
                    f"lr_schedule={self._hyper['lr_schedule']!r} needs to know how long training lasts: set max_steps "
                    "or max_epochs of the Trainer (max_steps where the data has no length), or lr_schedule='constant'."
                )
            set_first_rate(scheduler)

    def score(self, batch: TokenBatch, reduction: Any = "none", **options: Any) -> Any:
        """Log-probabilities of the supervised tokens of a batch, see `lightning_ft.models.head.completion_logprobs`.

        Args:
            batch: The batch.
            reduction: ``"none"`` for one each, ``"sum"`` for their sum.
            options: `temperature`, `entropy` and `states` of that function.
        """
        if not isinstance(batch, TokenBatch):
            raise ConfigError(
                f"{type(self).__name__} trains on tokens that are supervised, and got {type(batch).__name__}: give the "
                "Trainer a PairDataModule, or a loader of `lightning_ft.data.layout.TokenBatch`es."
            )
        return self._required_logprob_model()(self.model, batch, reduction, **options)

    def _required_logprob_model(self) -> LogProbModel:
        self.configure_model()
        return cast(LogProbModel, self._logprob_model)

    def configure_optimizers(self) -> Any:
        """AdamW that doesn't decay norms and biases, linear warm-up and the schedule asked for."""
        optimizer = self._optimizer()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _optimizer(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.model, self._hyper["weight_decay"])
        return self._adamw(groups, self._hyper["learning_rate"])

    def _adamw(self, groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.Optimizer:
        scaled = self._trainer is None or "mixed" in str(self._trainer.precision)  # Fabric's precision isn't known here
        return adamw(groups, learning_rate, cast("tuple[float, float]", tuple(self._hyper["betas"])), scaled=scaled)

    def _total_steps(self) -> int | None:
        """Optimizer steps of the whole run, None if unknown; `estimated_stepping_batches` would rewind a loader."""
        if self._trainer is None:
            return None
        trainer = self.trainer
        batches = trainer.num_training_batches
        limits = [trainer.max_steps] if trainer.max_steps != -1 else []
        if trainer.max_epochs not in (None, -1) and not math.isinf(batches):
            limits.append(sum(self._steps_of_epoch(int(batches), epoch) for epoch in range(trainer.max_epochs)))
        return min(limits) if limits else None

    def _steps_of_epoch(self, batches: int, epoch: int) -> int:
        """Optimizer steps that the batches of an epoch make."""
        return math.ceil(batches / self._accumulation(epoch))

    # ---------------------------------------------------------------- generation

    def predict_step(self, batch: list[list[Message] | Request], batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """Answers to a batch of conversations."""
        return self.generate(batch)

    def generate(self, inputs: Sequence[str | list[Message] | Request], **options: Any) -> list[str]:
        """Answer each input.

        Args:
            inputs: Strings (one user turn each), conversations, or requests, which may have `tools` and other arguments
                of the chat template.
            options: Arguments of transformers' `generate`, over those in `generation`; 64 new tokens, greedy, by
                default.

        Returns:
            The answers, without special tokens.
        """
        self.configure_model()
        prompts = [self._encode_prompt(given) for given in inputs]
        settings = {**self._generation, **options}
        check_tokens(self.model, self.tokenizer, prompts)
        return generate_text(self.model, self.tokenizer, prompts, pad_token_id=pad_token_id(self.tokenizer), **settings)

    def _encode_prompt(self, given: str | list[Message] | Request) -> list[int]:
        if isinstance(given, Request):
            return encode_prompt(self.tokenizer, given.messages, kwargs=given.template_kwargs)
        turns = [Message(role="user", content=given)] if isinstance(given, str) else given
        return encode_prompt(self.tokenizer, turns)

    # ---------------------------------------------------------------- checkpoints and export

    def _kept(self) -> set[str]:
        """Names of what a checkpoint holds."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable weights only, and what an exact resume needs."""
        self.refuse_nonfinite_weights()
        kept = self._kept()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}
        self.drop_frozen_averages(checkpoint, kept)
        checkpoint[STATE] = {**self.resume_state(), "tokenizer": self._tokenizer.state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits before anything is loaded from it.

        Raises:
            ModelError: If trainable weights are missing, or others stand there.
        """
        if (tokenizer := checkpoint.get(STATE, {}).get("tokenizer")) is not None:
            predicts = self._trainer is None or self._trainer.state.fn == "predict"
            self._tokenizer.restore(tokenizer, rows_encoded=not predicts)
        self.configure_model()
        self._follow_tokenizer()
        # ModelParallelStrategy has taken the weights out by now, and loads them itself.
        expected, found = self._kept(), set(checkpoint.get("state_dict", self._kept()))
        if expected != found:
            missing, unknown = sorted(expected - found), sorted(found - expected)
            raise ModelError(
                f"The checkpoint doesn't fit this module: {len(missing)} trainable weights are missing from it (first: "
                f"{missing[:3]}) and {len(unknown)} of its weights aren't trainable here (first: {unknown[:3]}). Use "
                "the model and lora settings of the run that wrote it."
            )
        self.fill_frozen_averages(checkpoint)
        refuse_other_shapes(self, checkpoint.get("state_dict", {}))
        self.load_resume_state(checkpoint)

    def load_checkpoint(self, path: str | Path) -> None:
        """Load the trainable weights of a checkpoint into this module, outside of a Trainer.

        Raises:
            CheckpointError: If it can't be read.
            ModelError: If it doesn't fit.
        """
        checkpoint = read_checkpoint(path)
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"], strict=False)

    def export(self, folder: str | Path, *, merge: bool = False, overwrite: bool = False) -> Path:
        """Write a folder that plain transformers (and PEFT) load; on several ranks, call it on all of them.

        Args:
            folder: Where to write.
            merge: Fold an adapter into the base weights; refused where greedy output would change.
            overwrite: Write into a folder that isn't empty.

        Returns:
            The folder.

        Raises:
            ExportError: If it would not give the same output, can't be loaded over its base, or the folder isn't empty.
        """
        self.configure_model()
        return export(
            self.model,
            self.tokenizer,
            folder,
            merge=merge,
            overwrite=overwrite,
            initial=self._initial,
            write=self._trainer is None or self._trainer.is_global_zero,
            base_options=self._card_options(),
        )

    def check_export(self, *, merge: bool = False) -> None:
        """Refuse an export that would fail, as far as that can be known before training; on all ranks.

        Args:
            merge: Whether the adapter will be folded into the base weights.

        Raises:
            ExportError: With what to do instead.
        """
        self.configure_model()
        check_export(self.model, merge=merge, initial=self._initial)

    def _card_options(self) -> dict[str, Any]:
        """With what arguments a model card's code loads the base."""
        found = {name: self._hyper[name] for name in ("revision", "trust_remote_code") if self._hyper[name]}
        if self._hyper["dtype"] not in (None, "auto"):
            found["dtype"] = str(self._hyper["dtype"]).removeprefix("torch.")
        if self._hyper["quantization"] is not None:
            found["quantization"] = quantization_options(self._hyper["quantization"])
        return found
