"""The base class of all modules: loading, optimizer and schedule, evaluation, generation, checkpoints and export."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft._lightning import warn_of_late_import
from lightning_ft.arguments import CheckedValues, unknown_argument
from lightning_ft.data.encode import encode_prompt
from lightning_ft.data.layout import TokenBatch
from lightning_ft.data.row_costs import RowCosts
from lightning_ft.data.tokenizers import load_tokenizer, pad_token_id
from lightning_ft.distributed import rank_zero_info
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.losses.logprobs import SelectedLogProbs
from lightning_ft.models.adapt import InitialAdapter
from lightning_ft.models.adaptation import Adaptation
from lightning_ft.models.adapter_export import check_base
from lightning_ft.models.backbone import Backbone
from lightning_ft.models.generate import generate_text
from lightning_ft.models.head import CausalLM, Reduction, base_of
from lightning_ft.models.load import LoadOptions, load_causal_lm
from lightning_ft.models.load_once import load_once
from lightning_ft.models.load_report import refuse_file
from lightning_ft.models.logprob_model import LogProbModel, LogProbOptions, row_costs
from lightning_ft.models.lora_checks import refuse_adapter_layers
from lightning_ft.models.numerics import refuse_nonfinite
from lightning_ft.models.optim import (
    ADAMW,
    OptimizerLike,
    Schedule,
    named_class,
    schedule_factor,
)
from lightning_ft.models.router import OwnLoss, find_own_loss
from lightning_ft.models.shard import check_quantization, shard
from lightning_ft.modules.averaging import AveragedWeights
from lightning_ft.modules.checkpoint_io import CheckpointedModule, refuse_code_of_checkpoint
from lightning_ft.modules.checks import check_tokens, checked_inputs
from lightning_ft.modules.evaluation import EvaluatedModule
from lightning_ft.modules.exporting import ExportedModule
from lightning_ft.modules.optimization import OptimizedModule
from lightning_ft.modules.options import ModelOptions, OptimizerOptions, Unpack
from lightning_ft.modules.resume import STATE
from lightning_ft.modules.sharded_strategy import adopt, refuse_other_names, refuse_other_shapes
from lightning_ft.modules.tokenizer import ModuleTokenizer
from lightning_ft.modules.trainer_checks import (
    check_callbacks,
    check_strategy,
    warn_lost_steps,
    warn_own_loss,
    warn_slow_precision,
)
from lightning_ft.rewards.function import OnNonFinite
from lightning_ft.sharded_checkpoint import read_any_checkpoint
from lightning_ft.signatures import complete
from lightning_ft.types import Message, Request


class FineTuning(EvaluatedModule, AveragedWeights, OptimizedModule, CheckpointedModule, ExportedModule, CheckedValues):
    """Base of the fine-tuning modules; a subclass adds the training step and says how a batch is evaluated.

    Args:
        model: Hub name, local folder, or a loaded model.
        tokenizer: Hub name, folder or tokenizer; only where it is neither the model's own nor given to the DataModule.
        learning_rate: Learning rate at the peak of the schedule.
        weight_decay: Weight decay of AdamW on matrices; norms and biases never decay.
        betas: Decay rates of AdamW's running averages of the gradient and of its square.
        lr_schedule: Shape of the learning rate after the warm-up: ``cosine``, ``linear`` or ``constant``.
        warmup_ratio: Share of all optimizer steps in which the learning rate rises linearly to its peak, rounded up.
        optimizer: Optimizer: ``adamw`` (fused where possible); the import path of another class, such as
            ``bitsandbytes.optim.PagedAdamW8bit``; or a dict of its ``class_path`` and ``init_args``. `LoRAFineTuning`
            also has ``loraplus`` (LoRA+, https://arxiv.org/abs/2402.12354) and ``lorafa`` (LoRA-FA,
            https://arxiv.org/abs/2308.03303).
        dtype: Dtype of the weights: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: Attention implementation in transformers: ``sdpa``, ``eager``, ``flash_attention_2`` (packs
            without padding or a mask, shares no prompts), ``flex_attention`` (packs and shares, on a GPU), ...
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        torch_compile: Compile the backbone, for batches of any shape: True, or a dict of arguments for `torch.compile`.
        generation: Arguments of `generate` for `predict_step`, such as ``{"max_new_tokens": 128}``.
        on_nonfinite: What happens before an optimizer step whose loss or gradients are not finite: ``error`` stops the
            run, ``skip`` leaves the step out and counts it (``train/skipped_steps``).
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that the model's repository ships.
        seed: Seed of weights that are initialized at random.

    Raises:
        ConfigError: For a setting that is out of range or contradicts another.
        UnknownArgumentError: For an argument that the module does not take, with the nearest name.
        MissingArgumentError: For an argument without a default that isn't passed.
    """

    default_learning_rate: ClassVar[float]
    default_dtype: ClassVar[str]
    optimizer_names: ClassVar[tuple[str, ...]] = (ADAMW,)
    """Values of `optimizer` that are no import paths."""
    trains_router_loss: ClassVar[bool] = False
    """Whether the loss includes the load-balancing term of a mixture of experts."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        complete(cls)

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
        optimizer: OptimizerLike = ADAMW,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        torch_compile: bool | dict[str, Any] = False,
        generation: dict[str, Any] | None = None,
        on_nonfinite: OnNonFinite = "error",
        revision: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise unknown_argument(type(self), next(iter(unknown)))
        warn_of_late_import()
        super().__init__()
        if not isinstance(model, (str, PreTrainedModel)):
            raise ConfigError(
                f"`model` is a {type(model).__name__}: expected a hub name, a folder, or a loaded transformers model. "
                "For an adapted model pass the folder that its adapter is saved in; pass a path as a string."
            )
        if isinstance(model, str):
            refuse_file(model, type(self).__name__)
        self.model_options = ModelOptions(
            dtype,
            attn_implementation,
            None,
            gradient_checkpointing,
            torch_compile,
            revision,
            trust_remote_code,
            seed,
        )
        rate = self.default_learning_rate if learning_rate is None else float(learning_rate)
        self.optimizer_options = OptimizerOptions(
            rate, float(weight_decay), (betas[0], betas[1]), lr_schedule, float(warmup_ratio), on_nonfinite, optimizer
        )
        refuse_code_of_checkpoint("optimizer", named_class(optimizer, self.optimizer_names))
        self.generation_options = {"max_new_tokens": 64, "do_sample": False, **(generation or {})}
        self.model_name = model if isinstance(model, str) else model.config._name_or_path or None
        """Hub name or folder of the model; None for a loaded model that has neither."""
        self.model: Any = None
        # In a list it is no submodule yet: weights are loaded in configure_model only.
        self._model_argument: list[str | PreTrainedModel] = [model]
        self._tokenizer_name = tokenizer if isinstance(tokenizer, str) else None
        self._tokenizer = ModuleTokenizer(tokenizer, self._load_tokenizer, trust_remote_code=trust_remote_code)
        self._factor = schedule_factor(lr_schedule, warmup_ratio=warmup_ratio, total_steps=self._total_steps)
        self.strict_loading = False  # checkpoints hold trainable weights only; on_load_checkpoint checks those
        self._logprob_model: LogProbModel | None = None
        self._initial: InitialAdapter | None = None
        self._checkpoint_names: set[str] = set()
        self._adaptation = Adaptation(model, None, None)
        self._own_loss = OwnLoss()
        self.record_arguments(
            {
                "model": self.model_name,
                "tokenizer": self._tokenizer_name,
                "learning_rate": rate,
                "weight_decay": self.optimizer_options.weight_decay,
                "betas": list(betas),
                "lr_schedule": lr_schedule,
                "warmup_ratio": self.optimizer_options.warmup_ratio,
                "optimizer": optimizer,
                "dtype": dtype,
                "attn_implementation": attn_implementation,
                "gradient_checkpointing": gradient_checkpointing,
                "torch_compile": torch_compile,
                "generation": generation,
                "on_nonfinite": on_nonfinite,
                "revision": revision,
                "trust_remote_code": trust_remote_code,
                "seed": seed,
            }
        )

    def record_arguments(self, arguments: dict[str, object]) -> None:
        """Add constructor arguments to `hparams`, from which `load_from_checkpoint` builds the module again.

        Args:
            arguments: Plain values by name, as a checkpoint may hold them.
        """
        frame = inspect.currentframe()
        while frame is not None and frame.f_back is not None:  # at the outermost frame Lightning collects nothing else
            frame = frame.f_back
        self.save_hyperparameters(arguments, frame=frame)

    # ---------------------------------------------------------------- model and tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of rows, answers and exports; loading it loads no weights.

        It is the one passed to the module or to its DataModule, or else the model's own; in a module that was loaded
        from a checkpoint, the one that was trained with.

        Raises:
            TokenizerError: If there is none.
        """
        return self._tokenizer.current

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        name = self._tokenizer_name or self.model_name
        if not name:
            raise ConfigError("The loaded model has no name to load a tokenizer from: pass `tokenizer`.")
        options = self.model_options
        return load_tokenizer(name, revision=options.revision, trust_remote_code=options.trust_remote_code)

    def adopt_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, *, configured: bool = True, template_configured: bool = False
    ) -> None:
        """Use the tokenizer of the rows from now on; a DataModule of lightning_ft calls it at `setup`.

        Args:
            tokenizer: Tokenizer that the rows are encoded with.
            configured: Whether the user passed a tokenizer or a chat template to the DataModule.
            template_configured: Whether the user passed a chat template to the DataModule.

        Raises:
            ConfigError: If another tokenizer was passed to this module.
        """
        self._tokenizer.adopt(tokenizer, configured=configured, template_configured=template_configured)
        if self.model is not None:
            self._follow_tokenizer()

    def _follow_tokenizer(self) -> None:
        """Update what was derived from an earlier tokenizer."""
        self._required_logprob_model().pad_token_id = pad_token_id(self.tokenizer)

    def configure_model(self) -> None:
        """Load the weights, adapt them, and shard them where the strategy shards."""
        if self.model is not None:
            return
        if self.sharded:
            check_quantization(self.model_options.quantization)
        load = self._load_and_adapt
        loaded = load_once(load) if self._loads_once else load()
        self.model, self._adaptation, self._own_loss = loaded
        if self.sharded:
            self.shard(base_of(self.model))
        self._logprob_model = LogProbModel(pad_token_id=pad_token_id(self.tokenizer), backbone=self._compiled())
        # a checkpoint is also read by modules that load the model by its name, where these are trained, or are others
        self._checkpoint_names.update(f"model.{name}" for name in self._adaptation.frozen)
        self.checkpoint_names()

    def _load_and_adapt(self) -> tuple[CausalLM, Adaptation, OwnLoss]:
        """The model as it is trained, what is trained of it, and what its own loss adds."""
        base = self._load_base()
        refuse_adapter_layers(base)
        refuse_nonfinite(base)  # before it is adapted, so that a model that was passed is left as it was
        self._check_rows(base)
        if self.model_options.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = self._adapt(base)
        if model is not base:
            refuse_nonfinite(model)
        self.model = model.train()
        own_loss = find_own_loss(self.model) if base.can_generate() else OwnLoss()
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ModelError("No parameter of the model is trainable.")
        if self.sharded:
            self._warn_misfits()  # which reads weights
        return self.model, self._adaptation, own_loss

    @property
    def _loads_once(self) -> bool:
        """Whether rank 0 loads the weights for all ranks, each of which will hold a part of them."""
        options = self.model_options
        named = isinstance(self._model_argument[0], str) and not options.trust_remote_code
        return self.sharded and named and self._adaptation.keeps_base and options.quantization is None

    @property
    def row_costs(self) -> RowCosts:
        """Constants of the model and its device, by which a DataModule chooses how batches are packed."""
        if self.model is None:
            return RowCosts()
        return row_costs(base_of(self.model), self.device)

    @property
    def sharded(self) -> bool:
        """Whether the strategy shards the weights (FSDP2)."""
        return getattr(self, "_device_mesh", None) is not None

    def shard(self, base: PreTrainedModel) -> None:
        """Shard a model as the strategy and the precision of the Trainer say.

        Args:
            base: The module's model or a copy of it, with its adapters if any.
        """
        assert self._device_mesh is not None
        precision = "32-true" if self._trainer is None else str(self._trainer.precision)
        offload = self._trainer is not None and bool(getattr(self.trainer.strategy, "cpu_offload", False))
        shard(base, self._device_mesh, precision, cpu_offload=offload)

    def _load_base(self) -> PreTrainedModel:
        model = self._model_argument[0]
        if isinstance(model, PreTrainedModel):
            return cast(PreTrainedModel, model.train())
        return load_causal_lm(self._base_name(), **self._load_options())

    def _load_options(self) -> LoadOptions:
        """Arguments of the functions in `lightning_ft.models.load`."""
        options = self.model_options
        return {
            "dtype": options.dtype or self.default_dtype,
            "attn_implementation": options.attn_implementation,
            "quantization": options.quantization,
            "revision": options.revision,
            "trust_remote_code": options.trust_remote_code,
            "device": self._trainer.strategy.root_device if self._trainer is not None else None,
        }

    def _base_name(self) -> str:
        return self._adaptation.base or cast(str, self.model_name)

    def _adapt(self, base: PreTrainedModel) -> CausalLM:
        model, self._initial = self._adaptation.apply(base, seed=self.model_options.seed)
        return model

    def _compiled(self) -> Backbone | None:
        compile_options = self.model_options.torch_compile
        if not compile_options:
            return None
        # Batches differ in both dimensions: compiled for fixed sizes, each new shape would first be compiled again.
        options = {"dynamic": True, **({} if compile_options is True else compile_options)}
        return torch.compile(base_of(self.model).base_model, **options)

    def _required_logprob_model(self) -> LogProbModel:
        self.configure_model()
        return cast(LogProbModel, self._logprob_model)

    def compute_logprobs(
        self, batch: TokenBatch, reduction: Reduction = "none", **options: Unpack[LogProbOptions]
    ) -> SelectedLogProbs:
        """Log-probabilities of the supervised tokens of a batch, see `lightning_ft.models.head.completion_logprobs`.

        Args:
            batch: The batch.
            reduction: ``"none"`` for one value per token, ``"sum"`` for their sum.
            options: `temperature`, `entropy` and `states` of that function.
        """
        if not isinstance(batch, TokenBatch):
            keys = f" with {', '.join(map(repr, batch)) or 'no keys'}" if isinstance(batch, Mapping) else ""
            raise ConfigError(
                f"{type(self).__name__} trains on supervised tokens and got a {type(batch).__name__}{keys}: pass a "
                "PairDataModule to the Trainer, or a loader of dicts with 'input_ids', 'attention_mask' and 'labels'."
            )
        return self._required_logprob_model()(self.model, batch, reduction, **options)

    # ---------------------------------------------------------------- training

    def configure_callbacks(self) -> list[Any]:
        """Refuse callbacks that would change weights before they are loaded, and strategies that can't train these."""
        check_callbacks(self.trainer, self)
        adopt(self.trainer.strategy)
        if self.trainer.state.fn == "fit":
            check_strategy(self.trainer.strategy)
        return cast("list[Any]", super().configure_callbacks())

    def on_fit_start(self) -> None:
        """Refuse rows and bases that would train silently wrong, and report what is trained."""
        check_base(self.model)
        self._check_rows(self.model)
        if not self.sharded:
            self._warn_misfits()
        warn_lost_steps(self.model, self.optimizer_options.learning_rate, str(self.trainer.precision))
        warn_slow_precision(self.model, self.device, str(self.trainer.precision))
        rank_zero_info(self.what_is_trained())
        warn_own_loss(self._own_loss, base_of(self.model), type(self).__name__, trained=self.trains_router_loss)

    def what_is_trained(self) -> str:
        """A table of trained, adapted and frozen weights by part of the model, and what no row of text reaches."""
        self.configure_model()
        return self._adaptation.describe(self.model)

    # ---------------------------------------------------------------- generation

    def predict_step(self, batch: list[list[Message] | Request], batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """Answers to a batch of conversations."""
        return self.generate(batch)

    def generate(self, inputs: Sequence[str | list[Message] | Request], **options: Any) -> list[str]:
        """Answer each input.

        Args:
            inputs: Strings (one user turn each), conversations, or requests, which may have `tools` and other arguments
                of the chat template.
            options: Arguments of transformers' `generate`, which override those in `generation`; the default is 64 new
                tokens, greedy.

        Returns:
            The answers, without special tokens.

        Raises:
            ConfigError: For a single text or conversation instead of a list of them.
        """
        inputs = checked_inputs(inputs)
        self.configure_model()
        prompts = [self._encode_prompt(prompt) for prompt in inputs]
        check_tokens(self.model, self.tokenizer, prompts)
        return generate_text(
            self.model,
            self.tokenizer,
            prompts,
            pad_token_id=pad_token_id(self.tokenizer),
            **{**self.generation_options, **options},
        )

    def _encode_prompt(self, prompt: str | list[Message] | Request) -> list[int]:
        if isinstance(prompt, Request):
            return encode_prompt(self.tokenizer, prompt.messages, kwargs=prompt.template_kwargs)
        turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
        return encode_prompt(self.tokenizer, turns)

    # ---------------------------------------------------------------- checkpoints

    def checkpoint_names(self) -> set[str]:
        """Names of the weights that a checkpoint holds: those that are trainable, or were at an earlier call.

        Of a model that was passed also those that its user has frozen.

        An optimizer (LoRA-FA) or a callback that unfreezes layers step by step may have frozen some since they were
        loaded. Those may differ from the base too, or are drawn at random.
        """
        known = self._checkpoint_names
        self._checkpoint_names = {
            n for n, parameter in self.named_parameters() if parameter.requires_grad or n in known
        }
        return self._checkpoint_names

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only weights that training may have changed, and what an exact resume needs."""
        self.refuse_nonfinite_weights()
        kept = self.checkpoint_names()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}
        self.drop_frozen_averages(checkpoint, kept)
        frozen = [name for name, parameter in self.named_parameters() if name in kept and not parameter.requires_grad]
        own = {"tokenizer": self._tokenizer.state(), "frozen": frozen}
        checkpoint[STATE] = {**self.resume_state(), **own, **self.record_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits before anything is loaded from it.

        Raises:
            CheckpointError: If the checkpoint lacks trainable weights, has some that the module hasn't, or is to
                continue a run of another method.
        """
        if (tokenizer := checkpoint.get(STATE, {}).get("tokenizer")) is not None:
            predicts = self._trainer is None or self._trainer.state.fn == "predict"
            self._tokenizer.restore(tokenizer, rows_encoded=not predicts)
        self.load_record(checkpoint.get(STATE, {}))
        self.check_continued(checkpoint)
        self.configure_model()
        self._follow_tokenizer()
        # ModelParallelStrategy has already taken the weights out, and loads them itself.
        trainable = self.checkpoint_names()
        saved = set(checkpoint.get("state_dict", trainable))
        refuse_other_names(trainable, saved, {name for name, _ in self.named_parameters()})
        self._checkpoint_names = saved  # also those that a callback had unfrozen
        frozen = checkpoint.get(STATE, {}).get("frozen")
        if frozen is not None and self._trainer is not None and self._trainer.state.fn == "fit":
            for name, parameter in self.named_parameters():  # such callbacks restore groups of the optimizer only
                if name in saved:
                    parameter.requires_grad_(name not in frozen)
        self.fill_frozen_averages(checkpoint)
        refuse_other_shapes(self, {name: w.shape for name, w in checkpoint.get("state_dict", {}).items()})
        self._take_dtypes(checkpoint.get("state_dict", {}))
        self.load_resume_state(checkpoint)

    def load_checkpoint(self, path: str | Path) -> None:
        """Load the trainable weights of a checkpoint into this module, outside of a Trainer.

        Args:
            path: Path or URL of a checkpoint file, or the folder of a sharded one.

        Raises:
            CheckpointError: If it can't be read, or doesn't fit.
        """
        checkpoint = read_any_checkpoint(path, optimizers=False)
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"], strict=False)
