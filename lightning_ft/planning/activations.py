"""What a forward pass keeps for the backward pass, per token position: counted on tensors without memory.

The model's own code runs on fake tensors under autocast, with one layer and with two; what autograd saves of both gives
the bytes of a layer and those of everything around the layers. Attention is counted as FlashAttention computes it:
queries, keys, values, output and normalizers are kept, and no scores.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedConfig

from lightning_ft.models.head import base_of
from lightning_ft.planning.shapes import shape_model

_ATTENTION = "lightning_ft_without_scores"
_POSITIONS = (64, 128)
"""Two lengths of a row: what doesn't grow with it (weights in half precision) is left out."""


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes per token position that are kept between the forward and the backward pass.

    Args:
        layers: Number of layers.
        layer: Bytes of a layer.
        layer_input: Bytes of a layer with `gradient_checkpointing`, which computes the others again.
        rest: Bytes of embeddings and last norm. The head needs a chunk of logits in addition, whatever the batch.
        rest_checkpointed: Bytes of embeddings and last norm with `gradient_checkpointing`.
    """

    layers: int
    layer: float
    layer_input: float
    rest: float
    rest_checkpointed: float

    @property
    def checkpointed(self) -> float:
        """With `gradient_checkpointing`: all layers' inputs, and all of the layer whose backward pass runs."""
        return self.rest_checkpointed + self.layers * self.layer_input + self.layer

    @property
    def kept(self) -> float:
        """Without `gradient_checkpointing`."""
        return self.rest + self.layers * self.layer


def activation_bytes(
    config: PreTrainedConfig,
    lora: LoraConfig | dict[str, Any] | bool | None = None,
    *,
    sharded: bool = False,
) -> ActivationBytes:
    """Count the activations of a token position under ``bf16-mixed``.

    Args:
        config: Configuration of the model.
        lora: As for `LoRAFineTuning`; None or False for full fine-tuning.
        sharded: Whether FSDP2 gathers all weights in half precision, so that the layers' inputs are in it too. With
            DDP, those of full fine-tuning are in fp32, since embeddings and norms are.

    Example:
        >>> from transformers import LlamaConfig
        >>> sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        >>> config = LlamaConfig(**sizes, num_hidden_layers=6)
        >>> activation_bytes(config).layer_input, activation_bytes(config, sharded=True).layer_input
        (128.0, 64.0)
    """
    shallow = {n: _with_layers(config, n) for n in (1, 2)}
    one, two = (_per_position(shallow[n], lora, sharded, checkpointing=False) for n in (1, 2))
    one_input, two_inputs = (_per_position(shallow[n], lora, sharded, checkpointing=True) for n in (1, 2))
    layer, layer_input = two - one, two_inputs - one_input
    layers = config.get_text_config(decoder=True).num_hidden_layers
    return ActivationBytes(layers, layer, layer_input, one - layer, one_input - layer_input)


def _with_layers(config: PreTrainedConfig, number: int) -> PreTrainedConfig:
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config(decoder=True)
    text.num_hidden_layers = number
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:number]
    return shallow


def _per_position(config: PreTrainedConfig, lora: Any, sharded: bool, *, checkpointing: bool) -> float:
    AttentionInterface.register(_ATTENTION, _without_scores)
    model = shape_model(config, lora, attn_implementation=_ATTENTION)
    with FakeTensorMode():
        _without_memory(model, torch.bfloat16 if sharded else None)
        base = base_of(model)
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        base.train()
        less, more = (saved_bytes(base.base_model, length) for length in _POSITIONS)
    return (more - less) / (_POSITIONS[1] - _POSITIONS[0])


def _without_memory(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace meta tensors by fake ones of a CPU, on which all operators know what they save."""
    replaced: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in replaced:
                empty = torch.empty(p.shape, dtype=dtype or p.dtype)
                replaced[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
            module._parameters[name] = None if p is None else replaced[id(p)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


def saved_bytes(backbone: nn.Module, length: int) -> int:
    """Bytes that a forward pass over one row saves for the backward pass, without the weights.

    Args:
        backbone: Model without its head, on the CPU; it runs under autocast.
        length: Number of positions of the row.
    """
    weights = {p.untyped_storage()._cdata for p in backbone.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        backbone(
            input_ids=torch.zeros(1, length, dtype=torch.long),
            position_ids=torch.arange(length)[None],
            use_cache=False,
        )
    return sum(storage.nbytes() for storage in saved.values())


def _without_scores(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **options: Any
) -> tuple[Tensor, None]:
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=options.get("scaling"), enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None
