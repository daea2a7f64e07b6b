"""What of a model is trained: every weight, a new adapter, or a saved one that is continued."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from lightning_ft.errors import ConfigError
from lightning_ft.models.adapt import InitialAdapter, add_lora, as_json, load_adapter, lora_config, splits_base
from lightning_ft.models.layers import in_top_layers, refuse_adapters_below
from lightning_ft.models.load import adapter_base


class Adaptation:
    """Decides from the arguments of a module what is trained, and does it to the model once that is loaded.

    Args:
        model: Hub name, folder or loaded model. A folder that holds an adapter is continued on its own base.
        lora: The configuration of a new adapter; None or False for none.
        adapter: A saved adapter to continue from.
        top_layers: Put the new adapter into so many of the topmost layers only; None for all.

    Raises:
        ConfigError: For two adapters, or a configuration for one that brings its own.

    Example:
        >>> full, adapted = Adaptation("some/model", None, None), Adaptation("some/model", {"r": 4}, None)
        >>> full.kind, adapted.kind, adapted.as_json()["r"]
        ('full', 'lora', 4)
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        lora: dict[str, Any] | LoraConfig | bool | None,
        adapter: str | None,
        top_layers: int | None = None,
    ) -> None:
        self.base: str | None = None
        """Where the model given is an adapter, its base."""
        if isinstance(model, str) and (base := adapter_base(model)) is not None:
            if adapter is not None:
                raise ConfigError(f"{model!r} is an adapter already; give its base as model= to continue {adapter!r}.")
            adapter, self.base = model, base
        if adapter is not None and lora not in (None, True):
            raise ConfigError("An adapter that is continued brings its own LoRA configuration: leave out lora=.")
        if adapter is not None and top_layers is not None:
            raise ConfigError("An adapter that is continued stands in layers of its own: leave out top_layers=.")
        self.adapter, self._top_layers = adapter, top_layers
        self.lora = lora_config(lora) if lora not in (None, False) and adapter is None else None

    @property
    def kind(self) -> str:
        """``"full"``, ``"lora"`` for a new adapter, ``"adapter"`` for a saved one."""
        return "adapter" if self.adapter is not None else ("full" if self.lora is None else "lora")

    def as_json(self) -> dict[str, Any] | None:
        """The new adapter's configuration as JSON values."""
        return None if self.lora is None else as_json(self.lora)

    def apply(self, base: PreTrainedModel, *, seed: int) -> tuple[PreTrainedModel | PeftModel, InitialAdapter | None]:
        """Make the model trainable as decided.

        Args:
            base: The loaded model.
            seed: Of a new adapter's initial weights.

        Returns:
            The model, and its adapter as initialised where that changed the base weights.
        """
        if self.adapter is not None:
            return load_adapter(base, self.adapter), None
        if self.lora is None:
            return base.requires_grad_(True), None
        base.requires_grad_(False)
        config = self.lora if self._top_layers is None else in_top_layers(self.lora, base, self._top_layers)
        model = add_lora(base, config, seed=seed)
        if self._top_layers is not None:
            refuse_adapters_below(model, self._top_layers)
        return model, InitialAdapter(model) if splits_base(config) else None
