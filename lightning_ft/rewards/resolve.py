"""From what a user passes as rewards to named, weighted things that judge a batch."""

from __future__ import annotations

import difflib
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

from lightning_ft.checkpoint_file import read_checkpoint
from lightning_ft.data.tokenizers import load_tokenizer
from lightning_ft.errors import ConfigError, ModelError, RewardError
from lightning_ft.importing import from_file, from_import_path, import_object, is_file_path
from lightning_ft.rewards.batch import RewardBatch
from lightning_ft.rewards.function import FunctionReward
from lightning_ft.rewards.model import ConversationScorer, ModelReward, RewardModel, local_folder

RewardLike = str | dict[str, Any] | Callable[..., Any] | nn.Module | ConversationScorer
"""What a single reward may be given as; see `RewardFunctions`."""

_FUNCTION, _MODEL = ("function", "class_path"), "model"
_OF_FUNCTIONS = (*_FUNCTION, "init_args")
_OF_MODELS = (_MODEL, "tokenizer", "batch_size", "dtype", "revision", "trust_remote_code")
_OF_ALL = ("weight", "name")


@dataclass(frozen=True)
class NamedReward:
    """A reward, ready to judge.

    Args:
        name: What its figures are logged under.
        weight: Of its rewards in the sum.
        judge: Called with a batch and the two functions that log; gives rewards, or an awaitable of them.
    """

    name: str
    weight: float
    judge: FunctionReward | ModelReward

    def __call__(self, batch: RewardBatch, **log: Callable[..., None]) -> Any:
        """Judge a batch."""
        return self.judge(batch, **log)


@dataclass(frozen=True)
class _Found:
    """What was found, and what it would be called."""

    name: str
    judge: Any


def resolve_rewards(
    rewards: Any, weights: Sequence[float] | None = None, taken: Sequence[str] = ()
) -> tuple[NamedReward, ...]:
    """Named, weighted rewards.

    Args:
        rewards: One or a list of what `RewardFunctions` takes.
        weights: One for each; by default those that stand in dicts, else 1.
        taken: Names that other rewards are logged under.

    Raises:
        RewardError: For what isn't a reward.
        ConfigError: For weights that don't fit.
    """
    several = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    if not several:
        raise ConfigError("rewards=[]: expected at least one.")
    found = [_resolve(reward) for reward in several]
    written = [_written(reward, "weight") for reward in several]
    if weights is None:
        weights = [1.0 if weight is None else weight for weight in written]
    elif any(weight is not None for weight in written):
        raise ConfigError("Weights stand both in weights= and beside the rewards: leave out one of them.")
    if len(weights) != len(several):
        raise ConfigError(f"{len(several)} rewards with {len(weights)} weights: expected one each.")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"The weight {weight!r} of a reward: expected a finite number.")
    names = _unique([_written(reward, "name") for reward in several], [reward.name for reward in found], taken)
    judges = [
        reward.judge if isinstance(reward.judge, ModelReward) else FunctionReward(name, reward.judge)
        for name, reward in zip(names, found, strict=True)
    ]
    return tuple(map(NamedReward, names, map(float, weights), judges))


def callable_name(function: Any) -> str:
    """What a function is called by: lambdas ``reward``, partials as their function, objects as their class.

    Example:
        >>> from functools import partial
        >>> callable_name(partial(callable_name)), callable_name(lambda completions: [0.0])
        ('callable_name', 'reward')
    """
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "reward" if name == "<lambda>" else str(name)


def _written(reward: Any, key: str) -> Any:
    return reward.get(key) if isinstance(reward, dict) else None


def _unique(given: Sequence[str | None], derived: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """Names that were given stay; others get a number where they stand for several."""
    taken = [*others, *(name for name in given if name)]
    if twice := [name for name in given if name and taken.count(name) > 1]:
        raise ConfigError(f"Two rewards are named {twice[0]!r}: each is logged under its name, so give another one.")
    names = []
    for name, default in zip(given, derived, strict=True):
        number, unique = 1, name or default
        while not name and unique in taken:
            number += 1
            unique = f"{default}_{number}"
        names.append(unique)
        taken.append(unique)
    return names


def _resolve(reward: Any) -> _Found:
    if isinstance(reward, str):
        return _from_string(reward)
    if isinstance(reward, dict):
        return _from_dict(reward)
    return _from_object(reward)


def _from_object(reward: Any) -> _Found:
    reward = getattr(reward, "_orig_mod", reward)  # what torch.compile wraps
    if isinstance(reward, (PreTrainedModel, PeftModel)):
        return _model_object(reward, {})
    if hasattr(reward, "score_conversations"):
        name = getattr(reward, "model_name", None)
        return _Found(_last_part(name) if name else type(reward).__name__, ModelReward(lambda: reward))
    if inspect.isclass(reward):
        try:
            reward = reward()
        except TypeError as error:
            raise RewardError(
                f"The reward {reward.__name__} is a class that can't be made without arguments ({error}): pass an "
                "object of it, or {'class_path': ..., 'init_args': {...}}."
            ) from error
        return _from_object(reward)
    if callable(reward):
        return _Found(callable_name(reward), reward)
    raise RewardError(
        f"A reward can't be a {type(reward).__name__}: expected a function, a reward model, a string that names "
        "one, or a dict with 'function' or 'model'."
    )


def _from_dict(reward: dict[str, Any]) -> _Found:
    kinds = [key for key in (*_FUNCTION, _MODEL) if key in reward]
    if len(kinds) != 1:
        raise RewardError(f"A reward given as a dict needs one of 'function' and 'model'; this one has {list(reward)}.")
    known = (*(_OF_MODELS if kinds[0] == _MODEL else _OF_FUNCTIONS), *_OF_ALL)
    for key in reward:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise RewardError(f"A reward with {kinds[0]!r} has no {key!r}. {hint}It takes {', '.join(known)}.")
    what = reward[kinds[0]]
    if kinds[0] == _MODEL:
        options = {key: reward[key] for key in _OF_MODELS[1:] if key in reward}
        if isinstance(what, (str, Path)):
            return _model_named(str(what), options)
        what = getattr(what, "_orig_mod", what)
        if isinstance(what, (PreTrainedModel, PeftModel)):
            return _model_object(what, options)
        if hasattr(what, "score_conversations") and not options:
            return _from_object(what)
        raise RewardError(
            f"A reward can't have a {type(what).__name__} as its 'model'"
            f"{' with ' + ', '.join(options) if options else ''}: expected a name, a folder, a .ckpt, or a "
            "sequence-classification model of transformers or PEFT."
        )
    function = _imported(what) if isinstance(what, str) else what
    if "init_args" in reward:
        try:
            function = function(**reward["init_args"])
        except TypeError as error:
            raise RewardError(f"rewards={what!r} can't be made with {dict(reward['init_args'])}: {error}") from error
    return _from_object(function)


def _from_string(reward: str) -> _Found:
    """In this order: a file's function, a checkpoint, a folder, an import path, a hub name."""
    if is_file_path(reward):
        return _from_object(from_file(reward, argument="rewards", error=RewardError))
    if reward.endswith(".ckpt") or (reward and Path(reward).is_dir()):
        return _model_named(reward, {})
    tried = [f"a folder (there is none at {str(Path(reward).resolve())!r})"]
    if _is_import_path(reward):
        try:
            return _from_object(from_import_path(reward, argument="rewards", error=RewardError))
        except (ModuleNotFoundError, AttributeError) as error:
            tried.append(f"an import path ({error})")
    else:
        tried.append("an import path (it isn't written like one: package.module.function)")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", reward):
        return _model_named(reward, {})
    tried.append("a hub name (it isn't written like one: owner/name)")
    raise RewardError(
        f"rewards={reward!r} could not be found. Tried: {'; '.join(tried)}. A function in a file is written "
        "path/to/file.py:function, a checkpoint ends in .ckpt."
    )


def _imported(place: str) -> Any:
    if not is_file_path(place) and not _is_import_path(place):
        raise RewardError(f"rewards={place!r}: expected package.module.function or path/to/file.py:function.")
    return import_object(place, argument="rewards", error=RewardError)


def _is_import_path(place: str) -> bool:
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*[.:][^\W\d]\w*(\.[^\W\d]\w*)*", place) is not None


def _model_named(name: str, options: dict[str, Any]) -> _Found:
    if name.endswith(".ckpt"):
        if not Path(name).is_file():
            raise RewardError(f"rewards={name!r}: there is no such checkpoint (looked for {Path(name).resolve()}).")
        if options:
            raise RewardError(f"rewards={name!r}: a checkpoint brings its own {', '.join(options)}.")
        return _Found(Path(name).stem, ModelReward(lambda: _load_checkpoint(name)))
    if Path(name).is_dir():
        local_folder(name)  # says now what it would say when the model is loaded
    return _Found(_last_part(name), ModelReward(lambda: RewardModel.from_pretrained(name, **options)))


def _model_object(model: PreTrainedModel | PeftModel, options: dict[str, Any]) -> _Found:
    place = model.config._name_or_path
    tokenizer = options.get("tokenizer") or place
    if not tokenizer:
        raise RewardError(
            f"The reward model {type(model).__name__} comes without a tokenizer: pass {{'model': model, 'tokenizer': "
            "tokenizer}."
        )
    batch_size = {"batch_size": options["batch_size"]} if "batch_size" in options else {}
    if unused := [key for key in options if key not in ("tokenizer", "batch_size")]:
        raise RewardError(f"{unused[0]!r} is for a reward model that is loaded by its name, not for a loaded one.")

    def load() -> RewardModel:
        return RewardModel(model, load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer, **batch_size)

    return _Found(_last_part(place) if place else type(model).__name__, ModelReward(load))


def _load_checkpoint(path: str) -> ConversationScorer:
    try:
        settings = read_checkpoint(path).get("hyper_parameters", {})
    except ModelError as error:
        raise RewardError(f"rewards={path!r} can't be read: {error}") from error
    if "centering" in settings and settings["model"] is None:
        raise RewardError(
            f"rewards={path!r} is of a model that has no name to load it from: export it, and give the folder."
        )
    # By name, since this package may not import modules, which are built on it.
    reward_modeling = import_module("lightning_ft").RewardModeling
    try:
        module = reward_modeling(**settings)
        module.load_checkpoint(path)
    except (TypeError, ModelError) as error:
        raise RewardError(f"rewards={path!r} isn't a checkpoint of RewardModeling: {error}") from error
    return cast(ConversationScorer, module)


def _last_part(name: str) -> str:
    return Path(name).name or name
