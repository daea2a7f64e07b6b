"""Checks of arguments: names that a class does not accept, and values of another type or out of range."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

from lightning_ft.errors import ConfigError, LightningFTError, MissingArgumentError, UnknownArgumentError
from lightning_ft.types import Request

_RENAMED = {
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "alpha": "lora_alpha",
    "assistant_only_loss": "supervise",
    "beta": "kl_coef",
    "bf16": "precision",
    "center_rewards_coefficient": "centering",
    "completion_only_loss": "supervise",
    "data_files": "train",
    "dataset": "train",
    "dataset_name": "train",
    "dataset_text_field": "columns",
    "epochs": "max_epochs",
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
    "eval_batch_size": "batch_size",
    "eval_dataset": "validation",
    "eval_steps": "val_check_interval",
    "formatting_func": "format",
    "fp16": "precision",
    "generation_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "importance_sampling_level": "importance",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "logging_steps": "log_every_n_steps",
    "lora_r": "r",
    "lora_rank": "r",
    "lr": "learning_rate",
    "lr_scheduler": "lr_schedule",
    "lr_scheduler_type": "lr_schedule",
    "mask_prompt": "supervise",
    "mask_truncated_completions": "mask_truncated",
    "max_completion_length": "max_new_tokens",
    "max_grad_norm": "gradient_clip_val",
    "max_seq_length": "max_length",
    "model_name": "model",
    "model_name_or_path": "model",
    "num_epochs": "max_epochs",
    "num_generations": "num_completions",
    "num_iterations": "epochs_per_rollout",
    "num_train_epochs": "max_epochs",
    "output_dir": "default_root_dir",
    "path": "train",
    "peft_config": "lora",
    "per_device_eval_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "precompute_ref_log_probs": "precompute_reference",
    "processing_class": "tokenizer",
    "quantization_config": "quantization",
    "rank": "r",
    "report_to": "logger",
    "reward_funcs": "rewards",
    "steps_per_generation": "steps_per_rollout",
    "test_size": "validation",
    "text_field": "columns",
    "torch_dtype": "dtype",
    "train_dataset": "train",
    "train_file": "train",
    "train_on_inputs": "supervise",
    "train_on_prompt": "supervise",
    "truncation": "on_overlong",
    "use_bias_correction_kl": "bias_corrected_kl",
    "use_vllm": "vllm",
    "val_batch_size": "batch_size",
    "val_size": "validation",
    "validation_file": "validation",
}
"""Names of TRL, transformers and torch, and those of this package, of the Trainer and of PEFT (docs/from_trl.md)."""
_OF_DATA = frozenset(
    {"batch_size", "chat_template", "columns", "max_length", "num_workers", "packing", "supervise"}
    | {"test", "train", "validation"}
)
_OF_TRAINER = frozenset(
    {"accumulate_grad_batches", "callbacks", "default_root_dir", "gradient_clip_val", "logger", "max_epochs"}
    | {"accelerator", "devices", "log_every_n_steps", "max_steps", "precision", "strategy", "val_check_interval"}
)
_OF_LORA = frozenset(
    {"alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save", "r"}
    | {"rank_pattern", "target_modules", "trainable_token_indices", "use_dora", "use_rslora"}
)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the closest known name, as a sentence that continues a message; an empty string if none is close.

    Args:
        name: Unknown name.
        known: Known names.

    Example:
        >>> did_you_mean("simgoid", ["hinge", "sigmoid"]), did_you_mean("x", ["hinge"])
        (" Did you mean 'sigmoid'?", '')
    """
    nearest = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def did_you_mean_path(path: str | Path) -> str:
    """Suggest the closest existing path, as :func:`did_you_mean` does; an empty string if none is close.

    Args:
        path: Path, of which any part may be misspelled; nothing is suggested if it exists.

    Example:
        >>> did_you_mean_path("Qwen/Qwen3-0.6B")  # in a folder that contains nothing of a similar name
        ''
    """
    found = Path()
    try:
        for part in Path(path).parts:
            if not (found / part).exists():
                near = difflib.get_close_matches(part, [other.name for other in found.iterdir()], 1)
                part = near[0] if near else part
            found /= part
        return f" Did you mean {str(found)!r}?" if found.exists() and found != Path(path) else ""
    except (OSError, ValueError):  # a folder that can't be listed, a file in place of a folder, a NUL character
        return ""


def searched_here() -> str:
    """Say where a folder was looked for, before the hub's error: a name may be a folder's or one of the hub."""
    return f"there is no such folder in {str(Path.cwd())!r}, and as a name on the hub: "


def unknown_argument(cls: type, name: str) -> UnknownArgumentError:
    """Build the error for an argument that a class's constructor does not accept, with the closest accepted name.

    Args:
        cls: Class whose constructor was called.
        name: Name of the unknown argument.

    Example:
        >>> from lightning_ft import PairDataModule
        >>> print(unknown_argument(PairDataModule, "max_lenght"))
        PairDataModule has no argument 'max_lenght'. Did you mean 'max_length'?
    """
    parameters = [
        parameter.name
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    hint = hint_for_argument(name, parameters) or f" It accepts {', '.join(parameters)}."
    return UnknownArgumentError(f"{cls.__name__} has no argument {name!r}.{hint}")


def hint_for_argument(name: str, parameters: Sequence[str]) -> str:
    """Suggest an argument, as a sentence that continues a message; an empty string if none is close.

    Args:
        name: Unknown argument, which may be another package's name.
        parameters: Known arguments.

    Example:
        >>> hint_for_argument("lr", ["lora", "learning_rate"]), hint_for_argument("batch_size", ["model"])
        (" Did you mean 'learning_rate'?", ' batch_size= is an argument of the DataModule.')
    """
    return _known_elsewhere(name, parameters) or did_you_mean(name, parameters)


def _known_elsewhere(name: str, parameters: Sequence[str]) -> str:
    """Say what another package's argument is called here, and whose argument it is."""
    if name == "ref_model" and "model" in parameters:
        return " The reference is the model before training."
    here = _RENAMED.get(name, name)
    if here in parameters:
        return f" Did you mean {here!r}?"
    if here in _OF_LORA and "dtype" in parameters:
        where = "lora=, such as" if "lora" in parameters else "lora= of LoRAFineTuning:"
        return f" It belongs into {where} lora={{{here!r}: ...}}."
    if here in _OF_DATA and "model" in parameters:
        return f" {here}= is an argument of the DataModule."
    if here == "quantization" and "dtype" in parameters:
        return " Quantized weights can't be trained themselves: use LoRAFineTuning(quantization=...)."
    return f" {here}= is an argument of the Trainer." if here in _OF_TRAINER else ""


def check_values(cls: type, args: Sequence[object], options: Mapping[str, object]) -> None:
    """Refuse missing arguments, and values of another type where the constructor's annotation asks for a number.

    Args:
        cls: Class whose constructor was called.
        args: Positional arguments.
        options: Keyword arguments.

    Raises:
        MissingArgumentError: If an argument without a default is missing.
        UnknownArgumentError: If one is missing, and another that is passed is unknown.
        ConfigError: For a value that isn't a number, such as a text with one in it.
    """
    parameters = inspect.signature(cls).parameters
    positional = (p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    values = {**dict(zip(positional, args, strict=False)), **options}
    for name, parameter in parameters.items():
        if name in values:
            _check_value(f"{cls.__name__}: {name}", values[name], parameter.annotation)
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            check_arguments(cls, options)  # it may be there under another name
            raise MissingArgumentError(f"{cls.__name__} needs {name}=: it has no default.")


def _check_value(argument: str, value: object, annotation: object) -> None:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if numbers := re.fullmatch(r"tuple\[((?:float|int)(?:, (?:float|int))*)\]", text):
        count = numbers[1].count(",") + 1
        fits = isinstance(value, (tuple, list)) and len(value) == count
        if not fits or not all(hasattr(number, "__float__") for number in cast("Sequence[object]", value)):
            raise ConfigError(f"{argument}={value!r:.80}: expected {count} numbers, such as a tuple of them.")
        return
    allowed = {part.strip() for part in text.split("|")}
    if not allowed <= {"int", "float", "None"} or (value is None and "None" in allowed):
        return
    expected, method = ("a number", "__float__") if "float" in allowed else ("an integer", "__index__")
    if not hasattr(value, method):
        quotes = " Leave out the quotes." * _is_number(value)
        if quotes and "e" in str(value).lower():
            quotes = " Leave out the quotes; in YAML write 1.0e-4, since 1e-4 is a text there."
        raise ConfigError(f"{argument}={value!r:.80}: expected {expected}{' or None' * ('None' in allowed)}.{quotes}")


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def check_arguments(cls: type, names: Iterable[str]) -> None:
    """Refuse keyword arguments that a class's constructor does not accept.

    Args:
        cls: Class whose constructor was called. If the constructor has ``**kwargs``, every name is accepted.
        names: Names of the keyword arguments.

    Raises:
        UnknownArgumentError: For the first unknown name; the message suggests the closest accepted one.
    """
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            raise unknown_argument(cls, name)


class CheckedValues:
    """Base of classes that check the values of their arguments before any constructor runs, see :func:`check_values`.

    A class of its own: jsonargparse reads the arguments of a class that defines ``__new__`` from there.
    """

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Check values where they are passed; a copy is made without."""
        if args or options:
            check_values(cls, args, options)
        return super().__new__(cls)


class CheckedArguments(CheckedValues):
    """Base of classes that name the closest argument for a misspelled one, before any constructor runs.

    Raises:
        UnknownArgumentError: For an argument that the class does not take.
        ConfigError: For a missing argument, and for anything but a number where one is expected.

    Example:
        >>> class Meter(CheckedArguments):
        ...     def __init__(self, *, every: int = 1) -> None:
        ...         self.every = every
        >>> list(inspect.signature(Meter).parameters)
        ['every']
        >>> Meter(everyy=2)
        Traceback (most recent call last):
        lightning_ft.errors.UnknownArgumentError: Meter has no argument 'everyy'. Did you mean 'every'?
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # `inspect` would show __new__'s

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Check argument names, then values."""
        check_arguments(cls, options)
        return super().__new__(cls, *args, **options)


def check_integer(argument: str, value: object, minimum: int, error: type[LightningFTError]) -> None:
    """Check that an argument is an integer of at least `minimum`.

    Args:
        argument: Name of the argument, for the message.
        value: Value of the argument.
        minimum: Smallest allowed value.
        error: Exception class to raise.

    Raises:
        LightningFTError: An `error`, for another type or a smaller number.

    Example:
        >>> from lightning_ft.errors import ConfigError
        >>> check_integer("batch_size", "8", 1, ConfigError)
        Traceback (most recent call last):
        lightning_ft.errors.ConfigError: batch_size='8': expected an integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise error(f"{argument}={value!r}: expected an integer of at least {minimum}.")
    if value < minimum:
        raise error(f"{argument}={value}: expected at least {minimum}.")


def check_number(argument: str, value: object, error: type[LightningFTError]) -> None:
    """Check that an argument is a number other than NaN.

    Args:
        argument: Name of the argument, for the message.
        value: Value of the argument.
        error: Exception class to raise.

    Raises:
        LightningFTError: An `error`, for another type.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise error(f"{argument}={value!r}: expected a number, not a value of type {type(value).__name__}.")


def check_nonnegative(argument: str, value: float, error: type[LightningFTError]) -> None:
    """Check that a weight, penalty or the like is a finite number of at least 0.

    Args:
        argument: Name of the argument, for the message.
        value: Value of the argument.
        error: Exception class to raise.

    Raises:
        LightningFTError: An `error`, for any other number.

    Example:
        >>> from lightning_ft.errors import ConfigError
        >>> check_nonnegative("value_coef", -0.1, ConfigError)
        Traceback (most recent call last):
        lightning_ft.errors.ConfigError: value_coef=-0.1: expected a finite number of at least 0.
    """
    if not 0 <= value < math.inf:
        raise error(f"{argument}={value}: expected a finite number of at least 0.")


def check_requests(requests: object, error: type[LightningFTError]) -> None:
    """Check that `requests` is a sequence of `Request` objects with texts as ids and references, and with messages.

    Args:
        requests: Value of the argument.
        error: Exception class to raise.

    Raises:
        LightningFTError: An `error`, for anything else; the message says how to make requests of rows.
    """
    remedy = (
        "Request objects are the rows of PairDataModule.requests('test'), or are built with "
        "lightning_ft.types.Request(id=..., messages=(...), reference=...)."
    )
    if isinstance(requests, str) or not isinstance(requests, Sequence):
        raise error(f"requests={requests!r:.80}: expected a list of Request objects. {remedy}")
    for index, request in enumerate(requests):
        if not isinstance(request, Request):
            raise error(f"requests[{index}] is a value of type {type(request).__name__}, not a Request. {remedy}")
        for name, text in (("id", request.id), ("reference", request.reference)):
            if not isinstance(text, str):
                raise error(
                    f"requests[{index}].{name} is {text!r:.80}: expected a text, not a value of type "
                    f"{type(text).__name__}."
                )
        if isinstance(request.messages, (str, Mapping)) or not all(
            isinstance(message, Mapping) and "role" in message for message in request.messages
        ):
            raise error(
                f"requests[{index}].messages is {request.messages!r:.80}: expected messages such as "
                "(Message(role='user', content=...),), with a comma after a single one."
            )
