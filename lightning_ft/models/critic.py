"""PPO's critic: a value head on the policy's own hidden states, or on those of a second adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from lightning_ft.data.layout import TokenBatch
from lightning_ft.errors import ConfigError
from lightning_ft.models.adapt import rounds_base, splits_base
from lightning_ft.models.head import CausalLM, as_forward, base_of, hidden_states, input_device
from lightning_ft.models.reference import active_adapter

CriticMode = Literal["shared", "adapter"]
CRITIC = "critic"
"""Name of the critic's adapter in ``"adapter"`` mode."""


class Critic(nn.Module):
    """Estimates the value of each completion token's state: the reward that the policy will earn from there on.

    Args:
        model: The policy's model, whose base the critic uses as its backbone.
        mode: ``"shared"`` reads the policy's own hidden states. ``"adapter"`` puts a second LoRA adapter on the base,
            so that learning values doesn't change the policy; it takes a forward pass of its own.
        seed: Seed of the adapter's initial weights. The head starts at 0.

    Raises:
        ConfigError: For ``"adapter"`` with a policy that has no adapter.
    """

    def __init__(self, model: CausalLM, mode: CriticMode = "shared", *, seed: int = 0) -> None:
        super().__init__()
        self.mode = mode
        size = int(base_of(model).config.get_text_config().hidden_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(size, 1)
            # Values start at 0, as in OpenAI's PPO. Random ones would add noise to the first advantages.
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
            if mode == "adapter":
                _add_adapter(model)
                _keep_adapter_in_recomputation(model)
        self.to(input_device(model))

    def forward(self, model: CausalLM, tokens: TokenBatch, states: Tensor | None) -> Tensor:
        """The value at each target of a batch.

        Args:
            model: The policy's model.
            tokens: The batch, with `n` targets.
            states: The policy's hidden states that predicted the targets, ``[n, d]``; unused in ``"adapter"`` mode.

        Returns:
            Values, ``float32 [n]``.
        """
        if self.mode == "adapter":
            with active_adapter(cast(PeftModel, model), CRITIC):
                hidden = as_forward(base_of(model), hidden_states, tokens)  # [b, s, d]
            states = hidden.flatten(0, 1).index_select(0, tokens.predictors)
        return cast(Tensor, self.head(cast(Tensor, states).to(self.head.weight.dtype)))[:, 0].float()

    def own_parameters(self, model: CausalLM) -> Iterator[nn.Parameter]:
        """Parameters that only learn values: the head, and in ``"adapter"`` mode the critic's adapter."""
        yield from self.parameters()
        for name, parameter in model.named_parameters():
            if self.mode == "adapter" and f".{CRITIC}" in name:
                yield parameter


def _keep_adapter_in_recomputation(model: CausalLM) -> None:
    """Make gradient checkpointing recompute a layer with the adapter of its first run, when another one is active."""
    base, adapted = base_of(model), cast(PeftModel, model)
    if not any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        return

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        name = adapted.active_adapter
        return nullcontext(), active_adapter(adapted, name) if name == CRITIC else nullcontext()

    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts})


def _add_adapter(model: CausalLM) -> None:
    if not isinstance(model, PeftModel):
        raise ConfigError("critic='adapter' needs a policy with an adapter: pass lora=True, or critic='shared'.")
    config = cast(LoraConfig, model.active_peft_config)
    if splits_base(config) or rounds_base(config):  # the policy's adapter has already changed the base
        config = replace(config, init_lora_weights=True)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.add_adapter(CRITIC, replace(config, inference_mode=False))
    for parameter, requires_grad in before:
        parameter.requires_grad_(requires_grad)
    for name, parameter in model.named_parameters():
        if f".{CRITIC}" in name:
            parameter.requires_grad_(True)
