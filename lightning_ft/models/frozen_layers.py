"""The frozen layers of a model, below the lowest trained one: their output for a sequence never changes in training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor, nn

from lightning_ft.errors import ModelError
from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.models.layers import layers_of
from lightning_ft.models.tensors import tensor_bytes

_RANDOM = ("dropout", "layerdrop", "jitter")  # attributes with these in their names make outputs random unless 0


class FrozenLayers:
    """Runs the frozen layers of a model alone, and lets the trained layers continue from their output.

    Layers are skipped by replacing their `forward` for one call, so everything else about the model stays the same:
    positions, masks, the types of its layers, adapters, and what it computes before and after its layers. The output
    of the frozen layers is computed for one sequence at a time, without padding: matrix products of other shapes round
    differently, and the result must not depend on the batch that the sequence is in.

    Args:
        model: A causal language model with adapters in its top layers.

    Raises:
        ModelError: If no layer is frozen, or the frozen layers' output isn't the same every time; the message says why.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=3,
        ...                      num_attention_heads=2)
        >>> lora = LoraConfig(target_modules=["q_proj"], layers_to_transform=[2])
        >>> frozen = FrozenLayers(get_peft_model(LlamaForCausalLM(config), lora))
        >>> frozen.depth, frozen.states(torch.tensor([3, 4, 5])).shape
        (2, torch.Size([3, 8]))
    """

    def __init__(self, model: CausalLM) -> None:
        self._base = base_of(model)
        self.layers = layers_of(model)[1]
        """All layers of the model, in order."""
        self.depth = _depth(model, self.layers)
        """Number of frozen layers, counted from the first layer."""
        _refuse_random(self._base.base_model, self.layers, self.depth)
        self._tuples = False  # whether layers return tuples, as in older architectures
        probe = self.states(torch.zeros(2, dtype=torch.int64))
        self.width, self.dtype = probe.shape[-1], probe.dtype
        """Width and dtype of a hidden state."""

    @torch.no_grad()
    def states(self, input_ids: Tensor) -> Tensor:
        """The input of the trained layers for a sequence.

        Args:
            input_ids: Token ids from the beginning of the sequence, ``int64 [t]``.

        Returns:
            Hidden states, ``[t, d]``, on the model's device.
        """
        caught: list[object] = []

        def catch(module: nn.Module, args: object, out: object) -> None:
            self._tuples = isinstance(out, tuple)  # must be known before the next layer is skipped
            caught.append(out)

        hook = self.layers[self.depth - 1].register_forward_hook(catch)
        ids = input_ids[None].to(input_device(self._base))
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        try:
            with replaced_forwards([(layer, self._skipped) for layer in self.layers[self.depth :]]):
                self._base.base_model(input_ids=ids, position_ids=positions, use_cache=False, return_dict=True)
        finally:
            hook.remove()
        (out,) = caught
        if isinstance(out, tuple):
            if any(isinstance(other, Tensor) for other in out[1:]):
                raise ModelError(
                    f"{type(self._base).__name__}: its layers pass on more than one tensor, so they can't be cached."
                )
            out = out[0]
        if not isinstance(out, Tensor) or out.ndim != 3:
            raise ModelError(f"{type(self._base).__name__}: its layers pass on more than one state per token.")
        return out[0]

    @contextmanager
    def replaced_by(self, states: Tensor) -> Iterator[None]:
        """In this context the model's forward pass uses `states` as the output of the frozen layers.

        Args:
            states: Hidden states of the batch that the model is called with, ``[b, s, d]``.
        """

        def replacement(hidden: Tensor, *_: object, **__: object) -> Tensor | tuple[Tensor]:
            return (states,) if self._tuples else states

        below = [(layer, self._skipped) for layer in self.layers[: self.depth - 1]]
        with replaced_forwards([*below, (self.layers[self.depth - 1], replacement)]):
            yield

    def _skipped(self, hidden: Tensor, *_: object, **__: object) -> Tensor | tuple[Tensor]:
        return (hidden,) if self._tuples else hidden

    def content_key(self, *details: object) -> str:
        """A hash of everything that determines the frozen layers' output: weights, configuration and software.

        Args:
            details: Further values that change the result, JSON types.
        """
        config = {k: v for k, v in self._base.config.to_dict().items() if not k.startswith("_")}
        content = [config, str(self._base.config._attn_implementation), self.depth, str(self.dtype), *details]
        content += [str(input_device(self._base).type), torch.__version__, transformers.__version__]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
        backbone, trained = self._base.base_model, {id(layer) for layer in self.layers[self.depth :]}
        above = tuple(f"{name}." for name, part in backbone.named_modules() if id(part) in trained)
        for key, value in sorted(backbone.state_dict().items()):
            if not key.startswith(above):
                digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(tensor_bytes(value))
        return digest.hexdigest()[:32]


def _depth(model: CausalLM, layers: list[nn.Module]) -> int:
    """Number of layers below the first trained one."""
    base = base_of(model)
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ModelError("No parameter of the model is trained.")
    inside = [{id(p) for p in layer.parameters()} for layer in layers]
    above = {id(p) for p in _parameters(base.get_output_embeddings())} - {
        id(p) for p in _parameters(base.get_input_embeddings())
    }
    for key, name in trained.items():
        if key not in above and not any(key in layer for layer in inside):
            raise ModelError(
                f"{name} is trained and isn't inside a layer, so the output of every layer changes in training. Train "
                "the top layers only (top_layers=, or lora={'layers_to_transform': [...], 'target_modules': [...]})."
            )
    first = next((i for i, layer in enumerate(inside) if layer & set(trained)), len(layers))
    if first == 0:
        raise ModelError(
            f"The lowest of the {len(layers)} layers is trained, so no layers below it are frozen. Train the top "
            "layers only (top_layers=, or lora={'layers_to_transform': [...], 'target_modules': [...]})."
        )
    return first


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _refuse_random(backbone: nn.Module, layers: list[nn.Module], depth: int) -> None:
    """Refuse dropout and the like below the trained layers: the output would differ in every pass."""
    above = {id(part) for layer in layers[depth:] for part in layer.modules()}
    for part in (part for part in backbone.modules() if id(part) not in above):
        drawn = {name: v for name, v in vars(part).items() if isinstance(v, float) and any(w in name for w in _RANDOM)}
        if isinstance(part, nn.modules.dropout._DropoutNd):
            drawn["p"] = part.p
        for name, value in drawn.items():
            if value > 0:
                raise ModelError(
                    f"{type(part).__name__}.{name} is {value} below the trained layers, so their input differs in "
                    "every pass. Set it to 0 in the model's configuration, or train without activation_cache."
                )


@contextmanager
def replaced_forwards(changes: Sequence[tuple[nn.Module, Callable[..., object]]]) -> Iterator[None]:
    """Replace the `forward` of modules within this context."""
    before = [(module, module.__dict__.get("forward")) for module, _ in changes]
    try:
        for module, forward in changes:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own
