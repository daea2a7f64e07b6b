"""The reference model: the policy before training, for log-ratios and KL."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lightning_ft.errors import ConfigError
from lightning_ft.models.adapt import InitialAdapter
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.kept_float32 import kept_float32
from lightning_ft.models.shard import is_sharded
from lightning_ft.models.tensors import tensor_bytes

ReferenceMode = Literal["adapter_off", "initial_adapter", "copy"]
INITIAL = "initial"
"""Name of the frozen adapter that a continued one is compared with."""


@contextmanager
def active_adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    """Run with another adapter, or with none.

    PEFT makes the adapter that it activates trainable and freezes the others; this is restored afterwards.

    Args:
        model: Adapted model.
        name: Name of the adapter; None for the base alone.
    """
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = model.active_adapter
    try:
        if name is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(name)
            yield
    finally:
        if name is not None:
            model.set_adapter(before)
        for parameter, wanted in trains:
            parameter.requires_grad_(wanted)


def trained_base_weights(model: PeftModel) -> list[str]:
    """Names of weights outside of all adapters that are trained, so that the model without them isn't the original.

    They are biases of the base, which LoRA's ``bias="all"`` or ``"lora_only"`` trains, also in an adapter that was
    loaded, and weights that were unfrozen next to the adapter.

    Args:
        model: The adapted model.
    """
    biases = any(getattr(config, "bias", "none") not in ("none", False) for config in model.peft_config.values())
    return [
        name
        for name, parameter in model.named_parameters()
        if (parameter.requires_grad or (biases and name.endswith(".bias")))
        and not set(model.peft_config).intersection(name.split("."))
    ]


class Reference:
    """The model before training, without a second copy of its weights if it has an adapter.

    A new adapter is disabled. A continued adapter, or one whose initialization changed the base weights (PiSSA,
    OLoRA, LoftQ), is kept as a second, frozen adapter. Only full fine-tuning needs a copy of the weights.

    Args:
        model: The model before its first step.
        initial: Adapter at the start of training; None for a new one on unchanged weights, which is disabled.
        load: Callable that loads the weights again; None to copy the model's current weights.
        prepare_copy: Callable that is passed the copy of the weights, to shard it like the model.

    Raises:
        ConfigError: If weights outside of the adapter are trained, which only a copy of them could undo.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        initial: InitialAdapter | None = None,
        load: Callable[[], PreTrainedModel] | None = None,
        prepare_copy: Callable[[PreTrainedModel], None] = lambda copied: None,
    ) -> None:
        self._model = [model]  # in lists: neither is a submodule, nor are their weights in checkpoints
        self._copy: list[PreTrainedModel] = []
        self.mode: ReferenceMode
        if not isinstance(model, PeftModel):
            self.mode = "copy"
            copied = load() if load is not None else copy.deepcopy(model)
            copied.requires_grad_(False).eval()
            prepare_copy(copied)
            self._copy.append(copied)
            return
        if outside := trained_base_weights(model):
            raise ConfigError(
                f"{len(outside):,} weights outside of the adapter are trained (first: {outside[0]}), so the model "
                "without its adapter would no longer be the reference that training started from. Leave bias out of "
                "`lora` (lora_bias=True trains biases of the adapter), or train every weight."
            )
        if initial is None:
            self.mode = "adapter_off"
        else:
            self.mode = "initial_adapter"
            training = model.training
            with warnings.catch_warnings():  # this adapter belongs to the changed base
                warnings.filterwarnings("ignore", message=".*changes the base weights")
                model.load_adapter(str(initial.path), INITIAL, is_trainable=False)
            model.train(training)  # PEFT puts the whole model into eval mode

    def to(self, device: torch.device) -> Reference:
        """Move a copy of the weights to a device, in the current precision of the model.

        A sharded copy stays on its devices.
        """
        for model in self._copy:
            if not is_sharded(model):
                with kept_float32(cast(torch.nn.Module, model)):
                    cast(torch.nn.Module, model).to(device, dtype=base_of(self._model[0]).dtype)
        return self

    @contextmanager
    def use(self) -> Iterator[CausalLM]:
        """Yield the reference model in eval mode, without gradients."""
        model = self._model[0]
        if self._copy:
            with evaluating(self._copy[0]):
                yield self._copy[0]
            return
        adapted = cast(PeftModel, model)
        with evaluating(adapted), active_adapter(adapted, INITIAL if self.mode == "initial_adapter" else None):
            yield adapted

    def fingerprint(self) -> str:
        """A hash of the reference's weights, which names the log-probs computed with them."""
        digest = hashlib.sha256()
        with self.use() as model:
            trained = set(model.peft_config) - {INITIAL} if isinstance(model, PeftModel) else set()
            for name, value in sorted(base_of(model).state_dict().items()):
                if trained.intersection(name.split(".")):
                    continue
                digest.update(name.encode())
                digest.update(tensor_bytes(value))
        return digest.hexdigest()
