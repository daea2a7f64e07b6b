"""The engine that a module's arguments ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_ft.arguments import check_arguments, check_values, did_you_mean
from lightning_ft.data.tokenizers import pad_token_id
from lightning_ft.errors import ConfigError
from lightning_ft.models.generate import end_token_ids
from lightning_ft.models.head import CausalLM
from lightning_ft.rollout.continuous_batching import ContinuousBatchingEngine, check_settings
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import RolloutEngine, check_engine
from lightning_ft.rollout.vllm import VLLMEngine
from lightning_ft.rollout.vllm_colocated import ColocatedVLLMEngine, check_colocated

_MODES = ("server", "colocated")


def check_choice(
    engine: object,
    vllm: bool | Mapping[str, Any],
    continuous_batching: bool | Mapping[str, Any],
    merge_adapter: bool = False,
) -> None:
    """Check the arguments of a module that say what samples.

    Args:
        engine: An engine of the user's own, or None.
        vllm: Whether vLLM samples, or its arguments.
        continuous_batching: Whether transformers' continuous batching samples, or its settings.
        merge_adapter: Whether the built-in engine samples with the adapter merged.

    Raises:
        ConfigError: For more than one of them, or values that none of them takes.

    Example:
        >>> check_choice(None, {"mode": "colocate"}, False)
        Traceback (most recent call last):
        lightning_ft.errors.ConfigError: vllm mode='colocate': expected server or colocated. Did you mean 'colocated'?
    """
    for name, value in (("vllm", vllm), ("continuous_batching", continuous_batching)):
        if not isinstance(value, (bool, Mapping)) or value == {}:
            raise ConfigError(f"{name}={value!r:.80}: expected True, False or a dict with settings.")
    named = {"engine": engine is not None, "vllm": bool(vllm), "continuous_batching": bool(continuous_batching)}
    if len(several := [f"{name}=" for name, passed in named.items() if passed]) > 1:
        raise ConfigError(f"{' and '.join(several)} each say what samples the completions: pass only one of them.")
    if merge_adapter and any(named.values()):
        other = next(name for name, passed in named.items() if passed)
        why = "merges the adapter already" if other == "vllm" else "samples with the model as it is"
        raise ConfigError(f"merge_adapter=True is for the built-in engine, and {other}= {why}: leave one of them out.")
    if engine is not None:
        check_engine(engine)
    if isinstance(vllm, Mapping):
        _check_vllm(vllm)
    if isinstance(continuous_batching, Mapping):
        check_settings(continuous_batching)


def _check_vllm(settings: Mapping[str, Any]) -> None:
    options = dict(settings)
    if (mode := options.pop("mode", "server")) not in _MODES:
        raise ConfigError(f"vllm mode={mode!r}: expected {' or '.join(_MODES)}.{did_you_mean(str(mode), _MODES)}")
    for name in ("end_token_ids", "tokenizer"):
        if name in options:
            raise ConfigError(f"vllm: {name!r} is that of the module; leave it out.")
    engine_class = _vllm_engine(mode)
    check_arguments(engine_class, options)
    check_values(engine_class, (), {"end_token_ids": (), **options})
    if mode == "colocated":
        check_colocated(**options)


def _vllm_engine(mode: str) -> type[VLLMEngine | ColocatedVLLMEngine]:
    return ColocatedVLLMEngine if mode == "colocated" else VLLMEngine


def make_engine(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    vllm: bool | Mapping[str, Any] = False,
    continuous_batching: bool | Mapping[str, Any] = False,
    merge_adapter: bool = False,
) -> RolloutEngine:
    """Make the engine that samples; by default the built-in one.

    Args:
        model: Model in training.
        tokenizer: Its tokenizer.
        batch_size: Number of completions sampled at a time.
        vllm: Whether vLLM samples, or its arguments: those of
            :class:`~lightning_ft.rollout.vllm.VLLMEngine`, or with ``mode: colocated`` of
            :class:`~lightning_ft.rollout.vllm_colocated.ColocatedVLLMEngine`.
        continuous_batching: Whether transformers' continuous batching samples, or its settings.
        merge_adapter: Whether the built-in engine samples with the adapter merged.
    """
    ends = end_token_ids(model, tokenizer)
    if vllm:
        options = dict(vllm) if isinstance(vllm, Mapping) else {}
        engine_class = _vllm_engine(options.pop("mode", "server"))
        return engine_class(end_token_ids=ends, tokenizer=tokenizer, **options)
    if continuous_batching:
        settings = continuous_batching if isinstance(continuous_batching, Mapping) else None
        return ContinuousBatchingEngine(
            model, end_token_ids=ends, batch_size=batch_size, tokenizer=tokenizer, settings=settings
        )
    return LocalEngine(
        model,
        end_token_ids=ends,
        pad_token_id=pad_token_id(tokenizer),
        batch_size=batch_size,
        tokenizer=tokenizer,
        merge_adapter=merge_adapter,
    )
