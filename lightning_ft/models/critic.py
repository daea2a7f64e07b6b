"""What a policy's completions will be worth, token by token: a value head over its trunk, or over one of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from lightning_ft.data.layout import TokenBatch
from lightning_ft.errors import ConfigError
from lightning_ft.models.adapt import rounds_base, splits_base
from lightning_ft.models.head import CausalLM, as_forward, base_of, hidden_states, input_device
from lightning_ft.models.reference import active_adapter

Trunk = Literal["shared", "adapter"]
CRITIC = "critic"
"""Name of the adapter that a critic with a trunk of its own has."""


class Critic(nn.Module):
    """Values of the states in which tokens are chosen, as PPO's critic gives them.

    Args:
        model: The policy's model; its base is the trunk.
        trunk: ``shared`` reads the policy's own states. ``adapter`` puts a second LoRA adapter on the base, so that
            learning values doesn't move the policy; it costs a forward pass of its own.
        seed: Of the adapter's initial weights; the head starts at 0.

    Raises:
        ConfigError: For ``adapter`` without an adapted policy.
    """

    def __init__(self, model: CausalLM, trunk: Trunk = "shared", *, seed: int = 0) -> None:
        super().__init__()
        self.trunk = trunk
        size = int(base_of(model).config.get_text_config().hidden_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(size, 1)
            # As OpenAI's: values start at 0. Random ones would be noise in the first rollouts' advantages.
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
            if trunk == "adapter":
                _add_adapter(model)
                _recompute_as_computed(model)
        self.to(input_device(model))

    def forward(self, model: CausalLM, tokens: TokenBatch, states: Tensor | None) -> Tensor:
        """Value at each target of a batch.

        Args:
            model: The policy's model.
            tokens: The batch, with `n` targets.
            states: The policy's own states that predicted them, ``[n, d]``; not used by a trunk of its own.

        Returns:
            ``float32 [n]``.
        """
        if self.trunk == "adapter":
            with active_adapter(cast(PeftModel, model), CRITIC):
                hidden = as_forward(base_of(model), hidden_states, tokens)  # [b, s, d]
            states = hidden.flatten(0, 1).index_select(0, tokens.predictors)
        return cast(Tensor, self.head(cast(Tensor, states).to(self.head.weight.dtype)))[:, 0].float()

    def own_parameters(self, model: CausalLM) -> Iterator[nn.Parameter]:
        """What learns values only: the head, and the adapter where there is one."""
        yield from self.parameters()
        for name, parameter in model.named_parameters():
            if self.trunk == "adapter" and f".{CRITIC}" in name:
                yield parameter


def _recompute_as_computed(model: CausalLM) -> None:
    """Let gradient checkpointing run a layer again with the adapter that it ran with: by then another one is active."""
    base, adapted = base_of(model), cast(PeftModel, model)
    if not any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        return

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        name = adapted.active_adapter
        return nullcontext(), active_adapter(adapted, name) if name == CRITIC else nullcontext()

    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts})


def _add_adapter(model: Any) -> None:
    if not isinstance(model, PeftModel):
        raise ConfigError("critic='adapter' is an adapter beside the policy's: pass lora=True, or 'shared'.")
    config = cast(LoraConfig, model.active_peft_config)
    if splits_base(config) or rounds_base(config):  # the base has been changed for the policy's adapter already
        config = replace(config, init_lora_weights=True)
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.add_adapter(CRITIC, replace(config, inference_mode=False))
    for parameter, wanted in trains:
        parameter.requires_grad_(wanted)
    for name, parameter in model.named_parameters():
        if f".{CRITIC}" in name:
            parameter.requires_grad_(True)
