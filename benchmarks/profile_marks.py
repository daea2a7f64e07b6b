"""Parts of the code that are marked for the profiler, by patching the names under which they are looked up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import record_function

BLOCK = "part: "
CLOSURE = "closure of the optimizer's step"
UPDATES = "gradients"


def parts() -> list[tuple[Any, str, str]]:
    """List the functions to mark: the object that holds each, its attribute there, and a label."""
    import transformers.models.llama.modeling_llama as llama

    from lightning_ft.models import head, logprob_model
    from lightning_ft.modules import grpo
    from lightning_ft.modules.base import FineTuning
    from lightning_ft.modules.policy import PolicyOptimization
    from lightning_ft.modules.sampled import SampledCompletions
    from lightning_ft.rollout import local
    from lightning_ft.rollout.sampling import TokenSampler

    return [
        (head, "hidden_states", "backbone, forward"),
        (head, "linear_logprob_sum", "head (summed)"),
        (head, "linear_logprobs", "head"),
        (head, "attention_bias", "our attention mask"),
        (llama, "create_causal_mask", "transformers' mask"),
        (llama.LlamaRotaryEmbedding, "forward", "rotary embeddings"),
        (torch.Tensor, "backward", "backward"),
        (FineTuning, "scale_gradients", f"{UPDATES}: scaled"),
        (torch.nn.utils, "clip_grad_norm_", f"{UPDATES}: clipped"),
        (torch.nn.utils, "get_total_norm", f"{UPDATES}: norm"),
        (FineTuning, "log", "log"),
        (FineTuning, "log_dict", "log_dict"),
        (logprob_model.LogProbModel, "lay_out", "layout of a micro-batch"),
        (local.LocalEngine, "generate", "rollout"),
        (local, "prefill_prompts", "rollout: prompts prefilled"),
        (local, "next_logits", "rollout: forward passes"),
        (TokenSampler, "__call__", "rollout: next tokens"),
        (SampledCompletions, "_compute_rewards", "rewards"),
        (PolicyOptimization, "measure", "reference (and old policy)"),
        (PolicyOptimization, "learn", "update"),
        (PolicyOptimization, "_count", "metrics of a micro-batch"),
        (PolicyOptimization, "rollout_metrics", "metrics of the rollout"),
        (PolicyOptimization, "record", "samples of the rollout"),
        (grpo, "policy_loss", "policy loss"),
    ]


def marked(stack: ExitStack, trainer: Any) -> None:
    """Mark the parts of the code until the stack is closed."""
    from lightning_ft.rollout import local

    def timed(function: Any, label: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            with record_function(BLOCK + label):
                return function(*args, **options)

        return call

    for owner, name, label in parts():
        stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), label)))
    plugin = type(trainer.precision_plugin)  # its closure runs the whole training step inside the optimizer's
    stack.enter_context(patch.object(plugin, "_wrap_closure", timed(plugin._wrap_closure, CLOSURE)))

    @contextmanager
    def evaluating(network: Any) -> Iterator[None]:
        with ExitStack() as inner:
            with record_function(f"{BLOCK}rollout: into eval mode"):
                inner.enter_context(original(network))
            yield

    original = local.evaluating
    stack.enter_context(patch.object(local, "evaluating", evaluating))
