"""Resolves what users pass as rewards to named and weighted reward functions and models."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lightning_ft.arguments import did_you_mean
from lightning_ft.checkpoint_file import read_checkpoint
from lightning_ft.data.tokenizers import load_tokenizer
from lightning_ft.errors import ConfigError, ModelError, RewardError
from lightning_ft.importing import from_file, from_import_path, import_object, is_file_path, is_import_path
from lightning_ft.rewards.batch import RewardBatch
from lightning_ft.rewards.function import FunctionReward
from lightning_ft.rewards.model import ConversationScorer, ModelReward, RewardModel, check_folder, local_folder

RewardLike = str | dict[str, Any] | Callable[..., Any] | nn.Module | ConversationScorer
"""What a user may pass as a reward; see `RewardFunctions`."""

_FUNCTION, _MODEL = ("function", "class_path"), "model"
_FUNCTION_KEYS = (*_FUNCTION, "init_args")
_MODEL_KEYS = (_MODEL, "tokenizer", "batch_size", "dtype", "revision", "trust_remote_code")
_COMMON_KEYS = ("weight", "name")


@dataclass(frozen=True)
class NamedReward:
    """A reward with its name and weight.

    Args:
        name: Name that its metrics are logged under.
        weight: Factor of its rewards in the sum.
        reward: Callable of a batch and the two logging functions that returns rewards, or an awaitable of them.
    """

    name: str
    weight: float
    reward: FunctionReward | ModelReward

    def __call__(self, batch: RewardBatch, **log: Callable[..., None]) -> object:
        """Compute the rewards of a batch."""
        return self.reward(batch, **log)


@dataclass(frozen=True)
class _Resolved:
    """A function or a `ModelReward`, and its default name."""

    name: str
    reward: ModelReward | Callable[..., object]


def resolve_rewards(
    rewards: object, weights: Sequence[float] | None = None, taken: Sequence[str] = ()
) -> tuple[NamedReward, ...]:
    """Resolve rewards to named and weighted ones.

    Args:
        rewards: A reward, or a list of rewards, as `RewardFunctions` takes them.
        weights: Weight of each reward; None takes those of dicts, and 1 for the others.
        taken: Names that other rewards are logged under.

    Raises:
        RewardError: For an object that isn't a reward.
        ConfigError: For weights or names that don't match the rewards.
    """
    rewards = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    if not rewards:
        raise ConfigError("rewards=[]: expected at least one reward.")
    resolved = [_resolve(reward) for reward in rewards]
    configured = [_option(reward, "weight") for reward in rewards]
    if weights is None:
        weights = [1.0 if weight is None else weight for weight in configured]
    elif any(weight is not None for weight in configured):
        raise ConfigError("Weights are set both by weights= and in the dicts of rewards: leave out one of them.")
    if len(weights) != len(rewards):
        raise ConfigError(f"{len(rewards)} rewards with {len(weights)} weights: expected one weight per reward.")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"A reward has the weight {weight!r}: expected a finite number.")
    names = _unique_names([_option(reward, "name") for reward in rewards], [reward.name for reward in resolved], taken)
    callables = [
        reward.reward if isinstance(reward.reward, ModelReward) else FunctionReward(name, reward.reward)
        for name, reward in zip(names, resolved, strict=True)
    ]
    return tuple(map(NamedReward, names, map(float, weights), callables))


def find_function(rewards: object) -> str | None:
    """Find a reward among strings and dicts whose resolution would run code of its author; None if there is none.

    Args:
        rewards: A reward or a list of rewards, as a checkpoint stores them.

    Example:
        >>> find_function(["owner/reward-model", {"model": "folder"}]), find_function(["my_package.rewards.length"])
        (None, 'my_package.rewards.length')
    """
    for reward in rewards if isinstance(rewards, (list, tuple)) else [rewards]:
        if isinstance(reward, dict):
            found = next((str(reward[key]) for key in _FUNCTION if key in reward), None)
        else:
            found = reward if isinstance(reward, str) and _names_function(reward) else None
        if found is not None:
            return found
    return None


def callable_name(function: object) -> str:
    """Return the default name of a function: ``reward`` for lambdas, the function of a partial, the class of an object.

    Example:
        >>> from functools import partial
        >>> callable_name(partial(callable_name)), callable_name(lambda completions: [0.0])
        ('callable_name', 'reward')
    """
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "reward" if name == "<lambda>" else str(name)


def _option(reward: object, key: str) -> Any:
    return reward.get(key) if isinstance(reward, dict) else None


def _unique_names(configured: Sequence[str | None], defaults: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """Keep configured names, and append a number to default names that are already taken."""
    taken = [*others, *(name for name in configured if name)]
    if duplicates := [name for name in configured if name and taken.count(name) > 1]:
        raise ConfigError(
            f"Two rewards are named {duplicates[0]!r}, but each is logged under its name: rename one of them."
        )
    names = []
    for name, default in zip(configured, defaults, strict=True):
        number, unique = 1, name or default
        while not name and unique in taken:
            number += 1
            unique = f"{default}_{number}"
        names.append(unique)
        taken.append(unique)
    return names


def _resolve(reward: object) -> _Resolved:
    if isinstance(reward, str):
        return _from_string(reward)
    if isinstance(reward, dict):
        return _from_dict(reward)
    return _from_object(reward)


def _from_object(reward: Any) -> _Resolved:
    reward = getattr(reward, "_orig_mod", reward)  # the module that torch.compile has wrapped
    if isinstance(reward, (PreTrainedModel, PeftModel)):
        return _model_object(reward, {})
    if hasattr(reward, "score_conversations"):
        name = getattr(reward, "model_name", None)
        return _Resolved(_last_part(name) if name else type(reward).__name__, ModelReward(lambda: reward))
    if inspect.isclass(reward):
        try:
            reward = reward()
        except TypeError as error:
            raise RewardError(
                f"The reward {reward.__name__} is a class that can't be instantiated without arguments ({error}): pass "
                "an instance of it, or {'class_path': ..., 'init_args': {...}}."
            ) from error
        return _from_object(reward)
    if callable(reward):
        return _Resolved(callable_name(reward), reward)
    raise RewardError(
        f"A reward can't be of type {type(reward).__name__}: expected a function, a reward model, a string that names "
        "one, or a dict with 'function' or 'model'."
    )


def _from_dict(reward: dict[str, Any]) -> _Resolved:
    sources = [key for key in (*_FUNCTION, _MODEL) if key in reward]
    if len(sources) != 1:
        raise RewardError(f"A dict reward needs either 'function' or 'model'; this one has {list(reward)}.")
    (source,) = sources
    known = (*(_MODEL_KEYS if source == _MODEL else _FUNCTION_KEYS), *_COMMON_KEYS)
    for key in reward:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise RewardError(f"A reward with {source!r} has no option {key!r}.{hint} It takes {', '.join(known)}.")
    value = reward[source]
    if source == _MODEL:
        options = {key: reward[key] for key in _MODEL_KEYS[1:] if key in reward}
        if isinstance(value, (str, Path)):
            return _model_named(str(value), options)
        value = getattr(value, "_orig_mod", value)
        if isinstance(value, (PreTrainedModel, PeftModel)):
            return _model_object(value, options)
        if hasattr(value, "score_conversations") and not options:
            return _from_object(value)
        raise RewardError(
            f"The 'model' of a reward can't be of type {type(value).__name__}"
            f"{' with ' + ', '.join(options) if options else ''}: expected a name, a folder, a .ckpt, or a "
            "sequence-classification model of transformers or PEFT."
        )
    function = _imported(value) if isinstance(value, str) else value
    if "init_args" in reward:
        init_args = dict(reward["init_args"])
        try:
            function = function(**init_args)
        except TypeError as error:
            raise RewardError(f"rewards={value!r} can't be called with init_args={init_args}: {error}") from error
    return _from_object(function)


def _from_string(reward: str) -> _Resolved:
    """Resolve a string: a function in a file, a checkpoint, a folder, an import path or a hub name, in this order."""
    if is_file_path(reward):
        return _from_object(from_file(reward, argument="rewards", error=RewardError))
    if _is_model_path(reward):
        return _model_named(reward, {})
    tried = [f"a folder ({str(Path(reward).resolve())!r} doesn't exist)"]
    if is_import_path(reward):
        try:
            return _from_object(from_import_path(reward, argument="rewards", error=RewardError))
        except (ModuleNotFoundError, AttributeError) as error:
            tried.append(f"an import path ({error})")
    else:
        tried.append("an import path (expected the form package.module.function)")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", reward):
        return _model_named(reward, {})
    tried.append("a hub name (expected the form owner/name)")
    raise RewardError(
        f"rewards={reward!r} could not be found. Tried: {'; '.join(tried)}. A function in a file has the form "
        "path/to/file.py:function, and a checkpoint ends in .ckpt."
    )


def _imported(path: str) -> Any:
    if not is_file_path(path) and not is_import_path(path):
        raise RewardError(f"rewards={path!r}: expected package.module.function or path/to/file.py:function.")
    return import_object(path, argument="rewards", error=RewardError)


def _names_function(text: str) -> bool:
    """Whether :func:`_from_string` would import a string."""
    return is_file_path(text) or (is_import_path(text) and not _is_model_path(text))


def _is_model_path(text: str) -> bool:
    return text.endswith(".ckpt") or bool(text and Path(text).is_dir())


def _model_named(name: str, options: dict[str, Any]) -> _Resolved:
    if name.endswith(".ckpt"):
        if not Path(name).is_file():
            raise RewardError(f"rewards={name!r}: the checkpoint {str(Path(name).resolve())!r} doesn't exist.")
        if options:
            raise RewardError(
                f"rewards={name!r}: a checkpoint contains its own {', '.join(options)}. Leave out {', '.join(options)}."
            )
        return _Resolved(Path(name).stem, ModelReward(lambda: _load_checkpoint(name)))
    if Path(name).is_dir():
        check_folder(local_folder(name))  # raises now what would otherwise be raised when the model is loaded
    return _Resolved(_last_part(name), ModelReward(lambda: RewardModel.from_pretrained(name, **options)))


def _model_object(model: PreTrainedModel | PeftModel, options: dict[str, Any]) -> _Resolved:
    path = model.config._name_or_path
    tokenizer = options.get("tokenizer") or path
    if not tokenizer:
        raise RewardError(
            f"The reward model {type(model).__name__} was not loaded from a folder or hub name, so its tokenizer is "
            "unknown: pass {'model': model, 'tokenizer': tokenizer}."
        )
    batch_size = {"batch_size": options["batch_size"]} if "batch_size" in options else {}
    if unused := [key for key in options if key not in ("tokenizer", "batch_size")]:
        raise RewardError(
            f"{unused[0]!r} only applies to a reward model that is loaded by name, but this one is loaded already: "
            "leave it out."
        )

    def load() -> RewardModel:
        return RewardModel(model, load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer, **batch_size)

    return _Resolved(_last_part(path) if path else type(model).__name__, ModelReward(load))


def _load_checkpoint(path: str) -> ConversationScorer:
    try:
        hparams = read_checkpoint(path).get("hyper_parameters", {})
    except ModelError as error:
        raise RewardError(f"rewards={path!r} can't be read: {error}") from error
    if "centering" in hparams and hparams["model"] is None:
        raise RewardError(
            f"rewards={path!r} doesn't contain the name of its base model, because it was trained from a model object: "
            "export it, and pass the folder."
        )
    # Imported by name: `lightning_ft.modules` is built on this package, so importing it here would be circular.
    reward_modeling = import_module("lightning_ft").RewardModeling
    try:
        # A file doesn't decide whether a repository's code runs.
        module = reward_modeling(**{**hparams, "trust_remote_code": False})
        module.load_checkpoint(path)
    except (TypeError, ModelError) as error:
        raise RewardError(f"rewards={path!r} isn't a checkpoint of RewardModeling: {error}") from error
    return cast(ConversationScorer, module)


def _last_part(name: str) -> str:
    return Path(name).name or name
