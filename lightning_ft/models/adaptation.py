"""What is trained: all weights of a model, a new adapter, or a saved adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.distributed import warn
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.adapt import (
    InitialAdapter,
    add_lora,
    as_json,
    load_adapter,
    lora_config,
    rounds_base,
    splits_base,
)
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.layers import refuse_adapters_below
from lightning_ft.models.load import adapter_base
from lightning_ft.models.lora_checks import check_names
from lightning_ft.models.parts import base_name, count_parts, expert_tensors, find_parts, parts_table
from lightning_ft.models.reach import Reach, find_reach
from lightning_ft.models.targets import fitted, unreached_groups


class Adaptation:
    """Decides from a module's arguments what is trained, and prepares the model accordingly once it is loaded.

    Args:
        model: Hub name, folder or loaded model. An adapter folder is loaded on its own base and continued.
        lora: Configuration of a new adapter; None or False for none.
        adapter: Folder or hub name of a saved adapter to continue.
        top_layers: Number of topmost layers that the new adapter is put on; None for all layers.

    Raises:
        ConfigError: For two adapters, or a LoRA configuration for a saved adapter, which has its own.

    Example:
        >>> full, adapted = Adaptation("some/model", None, None), Adaptation("some/model", {"r": 4}, None)
        >>> full.mode, adapted.mode, adapted.as_json()["r"]
        ('full', 'lora', 4)
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        lora: dict[str, Any] | LoraConfig | bool | None,
        adapter: str | None,
        top_layers: int | None = None,
    ) -> None:
        self._is_object = not isinstance(model, str)
        self.base: str | None = None
        """The base model's name, if `model` is an adapter folder."""
        if isinstance(model, str) and (base := adapter_base(model)) is not None:
            if adapter is not None:
                raise ConfigError(f"{model!r} is an adapter itself: pass its base as model= to continue {adapter!r}.")
            adapter, self.base = model, base
        if adapter is not None and lora not in (None, True):
            raise ConfigError("A saved adapter has its own LoRA configuration: leave out lora=.")
        if adapter is not None and top_layers is not None:
            raise ConfigError("A saved adapter determines which layers it is on: leave out top_layers=.")
        self.adapter, self._top_layers = adapter, top_layers
        self.lora = lora_config(lora) if lora not in (None, False) and adapter is None else None
        self.reach = Reach(frozenset())
        """What text reaches of the base, once it is loaded."""
        self.frozen: frozenset[str] = frozenset()
        """Parameters that text reaches and that were frozen in the model that was passed, once it is prepared."""
        self.parts: dict[str, str] = {}
        """The part of each parameter and module of the base, from `lightning_ft.models.parts.find_parts`."""

    @property
    def mode(self) -> str:
        """``"full"``, ``"lora"`` for a new adapter, or ``"adapter"`` for a saved one."""
        return "adapter" if self.adapter is not None else ("full" if self.lora is None else "lora")

    @property
    def keeps_base(self) -> bool:
        """Whether the model without what is trained stays as loaded, so that no starting adapter has to be kept."""
        lora = self.lora
        return self.mode == "full" or (lora is not None and not (splits_base(lora) or rounds_base(lora)))

    def as_json(self) -> dict[str, object] | None:
        """The new adapter's configuration as JSON values."""
        return None if self.lora is None else as_json(self.lora)

    def apply(self, base: PreTrainedModel, *, seed: int) -> tuple[PreTrainedModel | PeftModel, InitialAdapter | None]:
        """Prepare the model for training; parameters that text doesn't reach stay frozen and get no adapter.

        Without an adapter, parameters that are frozen in the loaded model stay frozen too, such as fixed positions or
        layers that the user has frozen. A model that is frozen as a whole, as the base of an adapter is, is trained.

        Args:
            base: The loaded model.
            seed: Seed of a new adapter's initial weights.

        Returns:
            The model, and its adapter as initialized if that changed the base weights.

        Raises:
            ConfigError: If the adapter targets only modules that text doesn't reach.
            ModelError: If the adapter doesn't fit the model, or a quantized model would be trained without one.
        """
        _refuse_without_tokens(base)
        self.reach, self.parts = find_reach(base), find_parts(base)
        if self.adapter is not None:
            model = load_adapter(base, self.adapter)
            return _freeze_unreached(model, find_reach(model)), None
        if self.lora is None:
            self._train_base(base)
            return base, None
        base.requires_grad_(False)
        model = self._add_lora(base, self.lora, seed)
        if self._top_layers is not None:
            refuse_adapters_below(model, self._top_layers)
        return model, InitialAdapter(model) if splits_base(self.lora) else None

    def starting_adapter(self, model: CausalLM, initial: InitialAdapter | None) -> InitialAdapter | None:
        """The adapter at the start of training, where disabling it wouldn't give the model that training starts from.

        Call it before the first step, and before the model is sharded.

        Args:
            model: The adapted model.
            initial: Adapter that was kept when its initialization changed the base weights, if it did.
        """
        if initial is None and isinstance(model, PeftModel) and (self.lora is None or rounds_base(self.lora)):
            return InitialAdapter(model)
        return initial

    def describe(self, model: PreTrainedModel | PeftModel) -> str:
        """A table of the trained weights by part of the model, followed by the modules that text doesn't reach.

        Args:
            model: The model that :meth:`apply` returned.
        """
        lines = ["What is trained, in weights:", parts_table(count_parts(model, self.parts, self.reach.unreached))]
        lines += unreached_groups(base_of(model), self.reach)
        if self.reach.unknown is not None:
            lines.append(f"Which parameters text reaches is unknown ({self.reach.unknown}), so none are left out.")
        return "\n".join(lines)

    def _train_base(self, base: PreTrainedModel) -> None:
        """Train what text reaches, without the parameters that are frozen."""
        base_parameters = dict(base.named_parameters())
        reached = [name for name in base_parameters if name not in self.reach.unreached]
        _refuse_packed({name: base_parameters[name] for name in reached}, type(base).__name__)
        frozen = [name for name in reached if not base_parameters[name].requires_grad]
        if len(frozen) == len(reached):
            frozen = []
        if frozen and self._is_object:
            self.frozen = frozenset(frozen)
            warn(
                f"{len(frozen):,} of {len(base_parameters):,} parameters of the model that was passed are frozen, the "
                f"first {frozen[0]}, and stay so. To train them too, call requires_grad_(True) on the model "
                "before passing it.",
                stacklevel=2,
            )
        trained = set(reached) - set(frozen)
        for name, parameter in base_parameters.items():
            parameter.requires_grad_(name in trained)

    def _add_lora(self, base: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
        check_names(lora, base)
        tensors = list(expert_tensors(base))
        model = add_lora(base, fitted(lora, base, self.reach, self._top_layers), seed=seed)
        seen = find_reach(model)
        idle = {base_name(name)[0] for name in _trained(model) if name in seen.unreached}
        missed = [name for name in tensors if name.rpartition(".")[0] in idle or self._breaks(seen)]
        if missed:  # the model uses its experts' weights without calling the module that holds them
            warn(
                f"The experts of {type(base).__name__} get no adapter ({', '.join(missed[:4])}): the model reads their "
                "weights where PEFT's adapters can't reach them. Set lora's target_modules yourself to silence this.",
                stacklevel=2,
            )
            without = replace(self.reach, unreached=self.reach.unreached.union(missed))
            model = add_lora(model.unload(), fitted(lora, base, without, self._top_layers), seed=seed)
            seen = find_reach(model)
        if self._breaks(seen):
            raise ModelError(
                f"{type(base).__name__} doesn't run with this adapter ({seen.unknown}). Name other layers in lora's "
                "target_modules."
            )
        return _freeze_unreached(model, seen)

    def _breaks(self, seen: Reach) -> bool:
        """Whether the model ran without its adapter but doesn't run with it."""
        return self.reach.unknown is None and seen.unknown is not None


def _refuse_without_tokens(base: PreTrainedModel) -> None:
    try:
        takes_tokens = base.get_input_embeddings() is not None and base.config.get_text_config().vocab_size > 0
    except (NotImplementedError, AttributeError):
        takes_tokens = False
    if not takes_tokens:
        raise ModelError(f"{type(base).__name__} has no token embeddings, so it can't be trained on text.")


def _refuse_packed(parameters: Mapping[str, Tensor], model: str) -> None:
    """Refuse weights that can't have gradients; frozen like others, only norms and embeddings would be trained."""
    if packed := [name for name, parameter in parameters.items() if not parameter.is_floating_point()]:
        raise ModelError(
            f"{len(packed):,} of {len(parameters):,} parameters of the {model} are integers, as in a quantized model "
            f"(first: {packed[0]}, {parameters[packed[0]].dtype}), and those can't be trained. Train an adapter on it "
            "(LoRAFineTuning; lora= in other modules), or load the model that isn't quantized."
        )


def _trained(model: PreTrainedModel | PeftModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _freeze_unreached(model: PeftModel, seen: Reach) -> PeftModel:
    """Freeze unreached parameters: the optimizer would waste memory on them, and DDP would wait for their gradients."""
    for name, parameter in model.named_parameters():
        if name in seen.unreached:
            parameter.requires_grad_(False)
    return model
