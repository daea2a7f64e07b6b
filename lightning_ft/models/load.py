"""Load models from the hub or a local folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from lightning_ft.arguments import did_you_mean_path
from lightning_ft.console import hidden_log_messages
from lightning_ft.distributed import warn
from lightning_ft.errors import ConfigError, MissingDependencyError, ModelError
from lightning_ft.models.base_folder import find_base
from lightning_ft.models.load_report import check_loaded, refuse_damaged_json, why_unreadable
from lightning_ft.models.zero_weights import warn_of_zero_weights
from lightning_ft.read_errors import READ_ERRORS, first_line

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig
    from transformers.models.auto.auto_factory import _BaseAutoModelClass
    from typing_extensions import Unpack

    AutoClass = type[_BaseAutoModelClass]

_MULTIMODAL = getattr(transformers, "AutoModelForMultimodalLM", None)  # missing in the oldest supported version
ADAPTER_CONFIG = "adapter_config.json"


class LoadOptions(TypedDict, total=False):
    """Options of :func:`load_model`, which documents them and has their defaults."""

    dtype: str | torch.dtype
    attn_implementation: str | None
    quantization: str | dict[str, Any] | None
    revision: str | None
    trust_remote_code: bool
    device: torch.device | None


def load_causal_lm(name: str, **options: Unpack[LoadOptions]) -> PreTrainedModel:
    """Load a causal language model, in train mode.

    Args:
        name: Hub name or local folder.
        options: Further arguments of :func:`load_model`.

    Raises:
        ModelError: If it can't be loaded, or isn't a causal language model.
        MissingDependencyError: For quantization without bitsandbytes.
    """
    revision, trust = options.get("revision"), options.get("trust_remote_code", False)
    config: PreTrainedConfig | None
    try:
        config = load_config(name, revision=revision, trust_remote_code=trust)
    except ModelError:
        config = None  # loading the model will report what is wrong with it
    if config is not None and _is_encoder_decoder(config):
        raise ModelError(
            f"{name!r} is an encoder-decoder ({config.model_type}), and this package trains causal language models. "
            "Train it in a LightningModule of your own: TokenMeanAccumulation, TrainableCheckpoint, ExactResume and "
            "ExportModel work there."
        )
    first, *others = text_model_classes(config)
    model = load_model(first, name, **options)
    if others:
        from lightning_ft.models.reach import find_reach

        if (reason := find_reach(model).unknown) is not None:
            warn(
                f"{type(model).__name__} doesn't run on text alone ({reason}), so only the language model of {name!r} "
                "is loaded, and only that is exported.",
                stacklevel=2,
            )
            model = load_model(others[0], name, **options)
    return model


def _is_encoder_decoder(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint is an encoder-decoder, rather than the decoder of one."""
    names = getattr(config, "architectures", None) or []
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return config.is_encoder_decoder and not own_code and not any(name.endswith("ForCausalLM") for name in names)


def text_model_classes(config: PreTrainedConfig | None) -> list[AutoClass]:
    """Return the auto classes that load a checkpoint as a language model, the best one first.

    transformers doesn't always list a multimodal checkpoint as a causal language model, but it can be trained on text.
    If several classes support it, the one that it was saved from keeps all of its weights and their names.

    Args:
        config: Configuration of the checkpoint; None if it is unknown.

    Example:
        >>> from transformers import LlamaConfig, Qwen2_5_VLConfig
        >>> [text_model_classes(config)[0].__name__ for config in (LlamaConfig(), Qwen2_5_VLConfig())]
        ['AutoModelForCausalLM', 'AutoModelForImageTextToText']
    """
    if config is None or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return [AutoModelForCausalLM]
    saved_from = set(getattr(config, "architectures", None) or [])
    classes: dict[tuple[type[PreTrainedModel], ...], AutoClass] = {}
    for auto, models in _text_classes(config):
        classes.setdefault(models, auto)
    ordered = sorted(
        classes, key=lambda models: saved_from.isdisjoint(model.__name__ for model in models)
    )  # the sort is stable
    return [classes[models] for models in ordered] or [AutoModelForCausalLM]


def text_class_name(base: PreTrainedModel) -> str:
    """Return the name of the auto class that loads a language model as its own class.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> text_class_name(LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)))
        'AutoModelForCausalLM'
    """
    names = (auto.__name__ for auto, models in _text_classes(base.config) if type(base) in models)
    return str(next(names, AutoModelForCausalLM.__name__))


def _text_classes(config: PreTrainedConfig) -> list[tuple[AutoClass, tuple[type[PreTrainedModel], ...]]]:
    """The auto classes for text that know a configuration, each with the model classes that it maps it to."""
    classes = []
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, _MULTIMODAL):
        if auto is not None and type(config) in auto._model_mapping:
            models = auto._model_mapping[type(config)]
            classes.append((auto, tuple(models) if isinstance(models, (list, tuple)) else (models,)))
    return classes


def load_reward_model(name: str, **options: Unpack[LoadOptions]) -> PreTrainedModel:
    """Load a sequence-classification model with one label, in train mode.

    From a causal language model only the backbone is loaded; the reward head is new, drawn from the global generator.

    Args:
        name: Hub name or local folder.
        options: Further arguments of :func:`load_model`.

    Raises:
        ModelError: If it can't be loaded.
    """
    return load_model(AutoModelForSequenceClassification, name, num_labels=1, **options)


def load_model(
    auto_class: AutoClass,
    name: str,
    *,
    num_labels: int | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    quantization: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load a model, in train mode.

    `from_pretrained` returns a model in eval mode and a Trainer doesn't change that, so dropout and gradient
    checkpointing would silently be off.

    Args:
        auto_class: One of transformers' auto classes.
        name: Hub name or local folder.
        num_labels: Number of labels of a classification model.
        dtype: Dtype of the weights; ``"auto"`` for the checkpoint's own.
        attn_implementation: Attention implementation, by transformers' name (``"sdpa"``, ``"eager"``, ...).
        quantization: ``"4bit"`` (NF4 with double quantization as in QLoRA, https://arxiv.org/abs/2305.14314),
            ``"8bit"``, or the arguments of `transformers.BitsAndBytesConfig`.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code from the model's repository may run.
        device: Device of quantized weights; other weights are moved by the Trainer.

    Raises:
        ModelError: If the model can't be loaded, or weights are missing from the checkpoint or have unexpected sizes.
        MissingDependencyError: For quantization without bitsandbytes.
    """
    options: dict[str, object] = {
        "dtype": resolve_dtype(dtype),
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # transformers' error doesn't name them; `check_loaded` does
    }
    if num_labels is not None:
        options["num_labels"] = num_labels
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization)
        options["device_map"] = {"": device if device is not None else torch.device("cpu")}
    refuse_damaged_json(name, "generation_config.json")
    try:
        # `check_loaded` reports what is missing or left out, and knows of new heads.
        hidden = hidden_log_messages(r"[^\n]*LOAD REPORT", "transformers.modeling_utils")
        with torch.device("cpu"), hidden:  # a Trainer may have set another default (meta, for sharded strategies)
            model, info = auto_class.from_pretrained(name, **options)
    except READ_ERRORS as error:
        reason = why_unreadable(name, error, revision=revision)
        raise ModelError(f"The model {name!r} could not be loaded: {reason}") from error
    check_loaded(model, info, name, new_head=num_labels is not None)
    warn_of_zero_weights(model, name)
    if quantization is not None:
        _refuse_other_quantization(model, name, quantization)
    _keep_trainable(model)
    return cast(PreTrainedModel, model.train())


def _refuse_other_quantization(model: PreTrainedModel, name: str, quantization: str | dict[str, Any]) -> None:
    """Refuse a checkpoint that was saved quantized in another way: transformers would leave it as it is."""
    wanted, own = quantization_config(quantization), model.config.quantization_config
    settings = {"load_in_4bit", "load_in_8bit", *(quantization if isinstance(quantization, dict) else ())}
    other = [f"{key}={getattr(own, key, None)}" for key in settings if getattr(own, key, None) != getattr(wanted, key)]
    if other:
        raise ModelError(
            f"quantization={quantization!r}: the weights of {name!r} are quantized already, with "
            f"{', '.join(sorted(other))}. Leave out quantization=, or name the model that isn't quantized."
        )


def _keep_trainable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first evaluation.

    On CPUs with AVX512-BF16 it does so in place, for a kernel without gradients: after a single evaluation (a probe, a
    sanity check, a prompted arm) training would silently continue with wrong gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def adapter_base(name: str) -> str | None:
    """Return the base model of a local adapter folder; None if `name` isn't such a folder.

    Raises:
        ModelError: If the adapter doesn't name its base, or the base is a local folder that can't be found.
    """
    folder = Path(name)
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    base = adapter_config(name).base_model_name_or_path
    if not base:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG} doesn't name a base model. Write its name or path there as "
            "base_model_name_or_path. A module also takes the base as model= and this folder as adapter=."
        )
    return find_base(folder, str(base))


def adapter_config(name: str) -> PeftConfig:
    """Load the `peft.PeftConfig` of an adapter from its folder or the hub.

    Raises:
        ModelError: If there is none, or its file can't be read.
    """
    from peft import PeftConfig

    try:
        config: PeftConfig = PeftConfig.from_pretrained(name)
    except READ_ERRORS as error:
        file = Path(name) / ADAPTER_CONFIG
        if not file.is_file():
            hint = did_you_mean_path(name)
            raise ModelError(f"No adapter could be loaded from {name!r}: {first_line(error)}.{hint}") from error
        raise ModelError(
            f"{str(file)!r} isn't a configuration that PEFT can read: {type(error).__name__}: {first_line(error)}. "
            "Export the adapter again, or install the version of peft that wrote it."
        ) from error
    return config


def context_length(model: PreTrainedModel) -> int | None:
    """Return the maximum number of positions of a model; None if its configuration sets no limit.

    Rotary scaling (YaRN, linear, dynamic) multiplies that number by its factor. Configurations differ in whether
    `max_position_embeddings` is the number before or after scaling.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        >>> config = LlamaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=64, rope_parameters=yarn)
        >>> context_length(LlamaForCausalLM(config))
        256
    """
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not length:
        return None
    rope = getattr(config, "rope_parameters", None)
    scaling = rope if isinstance(rope, dict) and rope.get("rope_type", "default") != "default" else {}
    original = scaling.get("original_max_position_embeddings") or length
    return max(int(length), int(original * float(scaling.get("factor") or 1.0)))


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the model's configuration, without its weights.

    Raises:
        ModelError: If it can't be found.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except READ_ERRORS as error:
        hint = did_you_mean_path(name)
        raise ModelError(f"The model {name!r} could not be found: {first_line(error)}{hint}") from error
    return config


def resolve_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Convert the name of a dtype, or return ``"auto"``.

    Example:
        >>> resolve_dtype("bfloat16"), resolve_dtype("auto")
        (torch.bfloat16, 'auto')
    """
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    resolved = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ConfigError(f"dtype={dtype!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'.")
    return resolved


def quantization_options(quantization: str | dict[str, Any]) -> dict[str, object]:
    """Return the arguments of `transformers.BitsAndBytesConfig` for ``"4bit"``, ``"8bit"`` or a dict of them.

    Raises:
        ConfigError: For another name, and for 4-bit weights that are stored as if they were floating-point numbers.

    Example:
        >>> quantization_options("8bit")
        {'load_in_8bit': True}
    """
    named: dict[str, dict[str, object]] = {
        "4bit": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        "8bit": {"load_in_8bit": True},
    }
    if isinstance(quantization, dict):
        storage = quantization.get("bnb_4bit_quant_storage")
        if storage not in (None, "uint8", torch.uint8):
            raise ConfigError(
                f"quantization: bnb_4bit_quant_storage={storage!r} stores packed weights as if they were numbers of "
                "that dtype, which checks and casts of weights would misread. Leave it out: packed bytes can be "
                "sharded, too (it was needed for FSDP1)."
            )
        return quantization
    if quantization not in named:
        raise ConfigError(f"quantization={quantization!r}: expected '4bit', '8bit' or a dict for BitsAndBytesConfig.")
    return named[quantization]


def quantization_config(quantization: str | dict[str, Any]) -> BitsAndBytesConfig:
    """Create the `transformers.BitsAndBytesConfig` with the arguments of :func:`quantization_options`.

    Raises:
        ConfigError: For an unknown name.
        MissingDependencyError: If bitsandbytes isn't installed.
    """
    options = quantization_options(quantization)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            f"quantization={quantization!r} needs bitsandbytes, which isn't installed: "
            "pip install 'lightning-ft[quant]'."
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)
