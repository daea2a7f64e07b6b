"""LoRA adapters: their configuration, new adapters, saved ones, and variants that change the base weights."""

from __future__ import annotations

import dataclasses
import enum
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from transformers import PreTrainedModel

from lightning_ft.arguments import did_you_mean
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.load import adapter_config
from lightning_ft.models.load_report import shortened, warn_on_rank_zero, why_unreadable
from lightning_ft.models.lora_checks import check_adapter
from lightning_ft.models.zero_weights import warn_of_dead_adapter
from lightning_ft.read_errors import READ_ERRORS

DEFAULT_LORA: dict[str, object] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
"""Rank 16 on every linear layer but the head: adapting all layers, not attention alone, is what reaches full
fine-tuning's quality (QLoRA, https://arxiv.org/abs/2305.14314, section 4)."""

_SPLITS_BASE = ("pissa", "olora", "corda", "lora_ga")


def lora_config(lora: LoraConfig | dict[str, Any] | bool | None) -> LoraConfig:
    """A LoRA configuration from the `lora` argument of a module.

    Args:
        lora: A `peft.LoraConfig`, a dict of its arguments (on top of :data:`DEFAULT_LORA`), or None or True for the
            default.

    Raises:
        ConfigError: For an argument that PEFT doesn't have (the nearest name is suggested) or refuses.

    Example:
        >>> lora_config({"r": 4, "use_rslora": True}).r
        4
        >>> lora_config({"rank": 4})
        Traceback (most recent call last):
        lightning_ft.errors.ConfigError: lora has no argument 'rank'. ...
    """
    if isinstance(lora, LoraConfig):
        return lora
    if lora is not None and not isinstance(lora, (bool, Mapping)):
        raise ConfigError(
            f"lora={lora!r:.80}: expected True, or a dict of arguments of peft.LoraConfig, such as {{'r': 8}}."
        )
    arguments = {} if lora is None or lora is True else dict(lora or {})
    arguments.pop("peft_type", None)  # every saved adapter_config.json contains it
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for name in arguments:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"lora has no argument {name!r}.{hint} See peft.LoraConfig for all of them.")
    for name, nested_class in _nested_configs().items():
        if isinstance(arguments.get(name), dict):
            arguments[name] = nested_class(**arguments[name])
    try:
        return LoraConfig(**{**DEFAULT_LORA, **arguments})
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise ConfigError(f"lora: {str(error).strip()}") from error


def _nested_configs() -> dict[str, type]:
    import peft

    return {"loftq_config": peft.LoftQConfig, "eva_config": peft.EvaConfig}


def as_json(config: LoraConfig) -> dict[str, object]:
    """The configuration as JSON values: rank, alpha, and what differs from PEFT's defaults.

    A checkpoint that holds it can be loaded with `weights_only=True`, and :func:`lora_config` restores it.

    Example:
        >>> as_json(lora_config({"r": 4}))["r"]
        4
    """
    default = LoraConfig()
    return {
        field.name: _json(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in ("peft_type", "auto_mapping", "peft_version", "runtime_config")
        and (field.name in DEFAULT_LORA or getattr(config, field.name) != getattr(default, field.name, None))
        and _is_json(_json(getattr(config, field.name)))
    }


def _json(value: object) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset)):
        return sorted(_json(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    return value


def _is_json(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_json(item) for item in value.values())
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, (str, int, float, bool))


def splits_base(config: PeftConfig) -> bool:
    """Whether initialization moves a part of the base weights into the adapter (PiSSA, OLoRA, ...).

    Such an adapter is meaningless on the original base, but can be converted into one that fits it.
    """
    init = _initialization(config)
    return isinstance(init, str) and init.lower().startswith(_SPLITS_BASE)


def rounds_base(config: PeftConfig) -> bool:
    """Whether initialization rounds the base weights (LoftQ), which no adapter can compensate exactly."""
    return _initialization(config) == "loftq"


def needs_data(config: PeftConfig) -> bool:
    """Whether the adapter is initialized from activations of the training data (EVA)."""
    return _initialization(config) == "eva"


def _initialization(config: PeftConfig) -> object:
    """The initialization of a LoRA adapter; that of PEFT's other methods leaves the base as it is."""
    return getattr(config, "init_lora_weights", True)


def add_lora(model: PreTrainedModel, config: LoraConfig, *, seed: int = 0) -> PeftModel:
    """Put a new adapter on a model.

    Initialization uses a generator of its own, seeded by `seed`: an adapter that splits the base weights must split
    them the same way when a run is resumed.

    Args:
        model: The base model. Its parameters are frozen.
        config: Configuration of the adapter.
        seed: Seed of the adapter's initial weights.

    Raises:
        ModelError: If the configuration doesn't fit the model, or the adapter couldn't be exported exactly.
    """
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if _saves_tied(model, config):
        config.ensure_weight_tying = True  # otherwise PEFT silently unties the head from the embeddings
    try:
        with torch.random.fork_rng(devices=_devices(model)):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, ImportError, AttributeError, IndexError, NotImplementedError) as error:
        names = _unknown_targets(model, config)
        raise ModelError(f"LoRA doesn't fit {type(model).__name__}: {str(error).strip()}{names}") from error
    check_adapter(adapted, splits_base=splits_base(config))
    return adapted


def _unknown_targets(model: PreTrainedModel, config: LoraConfig) -> str:
    """The names that `target_modules` may have, if it is a list with others."""
    names = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "weight")})
    targets = config.target_modules if isinstance(config.target_modules, (list, set, tuple)) else ()
    unknown = [target for target in targets if target.rsplit(".", 1)[-1] not in names]
    return f"{did_you_mean(unknown[0], names)} Modules with weights: {', '.join(names)}." if unknown else ""


def _saves_tied(model: PreTrainedModel, config: LoraConfig) -> bool:
    """Whether `modules_to_save` names embeddings that are tied to the head."""
    if not config.modules_to_save or not getattr(model.config, "tie_word_embeddings", False):
        return False
    tied = [id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    names = [name for name, module in model.named_modules() if id(module) in tied]
    return any(name.split(".")[-1] == saved.split(".")[-1] for name in names for saved in config.modules_to_save)


def load_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """Put a saved adapter on its base to continue its training.

    Args:
        model: The base model.
        path: Folder of the adapter, or its name on the hub.

    Raises:
        ModelError: If the adapter doesn't exist, isn't LoRA, or its weights can't be read or don't match those that its
            configuration creates on this base (missing ones would be initialized from scratch).
    """
    config = adapter_config(path)
    if not isinstance(config, LoraConfig):
        raise ModelError(f"The adapter in {path!r} is {config.peft_type}, not LoRA.")
    _warn_of_other_base(model, config, path)
    config.inference_mode = False
    wrap = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type), PeftModel)
    try:
        adapted = wrap(model, config)
        renamed = getattr(model, "_checkpoint_conversion_mapping", {})
        result = adapted.load_adapter(path, adapted.active_adapter, is_trainable=True, key_mapping=renamed)
    except READ_ERRORS as error:
        raise ModelError(f"No adapter could be loaded from {path!r}: {_why_not_loaded(path, error)}") from error
    if result.missing_keys or result.unexpected_keys:
        problems = [
            f"{len(names):,} of its weights are {which} ({shortened(names)})"
            for names, which in ((result.missing_keys, "missing"), (result.unexpected_keys, "unknown to the model"))
            if names
        ]
        raise ModelError(
            f"The adapter in {path!r} doesn't fit {type(model).__name__}: {' and '.join(problems)}. It was trained on "
            f"{config.base_model_name_or_path!r}: pass that as the base, or check that its files belong together."
        )
    warn_of_dead_adapter(adapted, path)
    return adapted


def _why_not_loaded(path: str, error: BaseException) -> str:
    """The reason for an error that PEFT raised while loading an adapter."""
    lines = [line.strip() for line in str(error).splitlines()]
    sizes = [line for line in lines if line.startswith("size mismatch")]
    if sizes:
        cause = "Its rank or its base isn't the one that its configuration names."
        return f"{len(sizes):,} of its weights have unexpected sizes. The first: {sizes[0]} {cause}"
    if isinstance(error, KeyError):
        return f"its weights lack {error}, which are trained according to its configuration."
    if Path(path).is_dir() and not any(Path(path).glob("adapter_model.*")):
        return "the folder contains no weights (adapter_model.safetensors)."
    return why_unreadable(path, error)


def _warn_of_other_base(model: PreTrainedModel, config: LoraConfig, path: str) -> None:
    """Warn if an adapter was trained on a base of another name, which may have the same sizes all the same."""
    trained_on, base = config.base_model_name_or_path, getattr(model.config, "_name_or_path", None)
    if trained_on and base and Path(trained_on).name != Path(base).name:
        warn_on_rank_zero(
            f"The adapter in {path!r} was trained on {trained_on!r} and is continued on {base!r}. Unless those are the "
            "same weights, the adapter is meaningless there: pass its own base as model=."
        )


class InitialAdapter:
    """The adapter as initialized, saved if its initialization changed the base weights.

    With it an export becomes an ordinary adapter of twice the rank that fits the original base: relative to that base,
    training added ``s(BA - B0 A0)`` (https://arxiv.org/abs/2404.02948, appendix C).
    """

    def __init__(self, model: PeftModel) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lightning_ft_")
        config = model.active_peft_config
        init = config.init_lora_weights
        config.init_lora_weights = True  # the saved weights are plain and must not be initialized again
        try:
            # Without embeddings, whose size PEFT would look up on the hub under the name of a local folder.
            model.save_pretrained(str(self.path), save_embedding_layers=False)
        finally:
            config.init_lora_weights = init

    @property
    def path(self) -> Path:
        """The folder of the adapter, in PEFT's format."""
        return Path(self._folder.name)


def _devices(model: PreTrainedModel) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
