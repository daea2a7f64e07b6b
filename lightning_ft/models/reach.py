"""Find the parameters that text reaches, by probing the model before the first step.

A checkpoint may contain modules that text doesn't go through: vision and audio towers and their projectors, keys and
values that a layer takes from another one, heads of other tasks. Their parameters never get a gradient. If they stayed
trainable, the optimizer and an exported adapter would hold them needlessly, and `DistributedDataParallel` would fail.

One forward pass over a few tokens is enough, and no backward pass: autograd's graph of the logits names every
parameter that they depend on, whatever the values are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.models.load import context_length

PROBE_TOKENS = 8
LONG_PROBE_TOKENS = 256
"""Tokens of a second probe: some layers have parts that only longer rows reach, such as token compression."""
_ANY_DEVICE = ("eager", "sdpa")
"""Attention implementations for any device: others have GPU kernels only, and the model may still be on the CPU."""


@dataclass(frozen=True)
class Reach:
    """Which parameters of a model text reaches.

    Args:
        unreached: Names of the parameters that the logits don't depend on.
        unlike_linear: Names of linear layers whose output isn't the product with their matrix, such as some routers and
            some grouped layers. An adapter, which adds to a linear layer's output, fails on them.
        unknown: Why the model couldn't be probed; None if it could. If set, no parameter counts as unreached.
    """

    unreached: frozenset[str] = frozenset()
    unlike_linear: frozenset[str] = frozenset()
    unknown: str | None = None

    def modules(self, model: nn.Module) -> frozenset[str]:
        """Names of the modules with parameters of their own, none of which are reached.

        Args:
            model: The model that was probed.
        """
        names = []
        for name, module in model.named_modules(remove_duplicate=False):
            own = [f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)]
            if own and self.unreached.issuperset(own):
                names.append(name)
        return frozenset(names)


def find_reach(model: CausalLM) -> Reach:
    """Find which parameters of a model text reaches, with a forward pass over a few tokens.

    Experts that the router chose for none of the tokens count as reached if a sibling is reached: members of a
    `ModuleList` that didn't run, next to members of the same class that did. A tensor of all experts is reached as a
    whole.

    The model isn't changed: modes, buffers, random generators and `requires_grad` are restored, and no gradients are
    computed.

    Args:
        model: A language model or reward model, adapted or not, on any device, quantized or not, but not sharded.

    Returns:
        Names of parameters, including every name of tied ones.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> model.tower = nn.Linear(2, 2)
        >>> sorted(find_reach(model).unreached)
        ['tower.bias', 'tower.weight']
    """
    odd: set[int] = set()
    try:
        with probing(model), _outputs(model, odd):
            reached, called = _reached(model, PROBE_TOKENS)
            partly = [member for group in _lists(model) for member in group if id(member) in called]
            if any(id(parameter) not in reached for member in partly for parameter in member.parameters()):
                reached |= _reached(model, LONG_PROBE_TOKENS)[0]
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, AssertionError) as error:
        return Reach(unknown=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    return Reach(
        frozenset(n for n, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) not in reached),
        frozenset(name for name, module in model.named_modules(remove_duplicate=False) if id(module) in odd),
    )


def _reached(model: CausalLM, tokens: int) -> tuple[set[int], set[int]]:
    """Ids of the parameters that a row reaches, and of the members of lists of modules that ran."""
    called: set[int] = set()
    with _differentiable(model) as marks, _calls(model, called):
        reached = _leaves(model_output(model, tokens).logits)
    reached |= {key for key, mark in marks.items() if id(mark) in reached}
    return reached | _routed_elsewhere(model, reached, called), called


def model_output(model: CausalLM, tokens: int = PROBE_TOKENS, *, labels: bool = False) -> Any:
    """Output of a model's own forward pass over a few tokens.

    Args:
        model: The model.
        tokens: Number of tokens in the row; fewer if the model has fewer positions.
        labels: Whether the model computes its own loss over them.
    """
    base = base_of(model)
    ids = probe_ids(base, min(tokens, context_length(base) or tokens))
    options = {"labels": ids} if labels else {}
    return base(input_ids=ids, use_cache=False, return_dict=True, **options)


def probe_ids(base: PreTrainedModel, tokens: int = PROBE_TOKENS) -> Tensor:
    """A row of ordinary text tokens, ``int64 [1, tokens]``, from the lower ids: special image tokens have high ids."""
    vocabulary = int(base.config.get_text_config().vocab_size)
    generator = torch.Generator(device="cpu").manual_seed(0)
    ids = torch.randint(0, max(1, vocabulary // 2), (1, tokens), generator=generator, device="cpu")
    return ids.to(input_device(base))


@contextmanager
def probing(model: CausalLM) -> Iterator[None]:
    """Eval mode with autograd enabled; the model is restored afterwards.

    Gradient checkpointing is switched off, since some implementations hide the graph.
    """
    base = base_of(model)
    modes = [(module, module.training) for module in model.modules()]
    recompute = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    of_modules = (getattr(module, "config", None) for module in base.modules())
    configs = {id(config): config for config in of_modules if isinstance(config, PreTrainedConfig)}
    kept = [(module, _plain_tensors(module)) for module in model.modules()]
    attention = [(config, config._attn_implementation) for config in configs.values()]
    device = input_device(base)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device(device))  # a sharded strategy makes meta tensors by default
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        try:
            model.eval()
            for module in recompute:
                cast(Any, module).gradient_checkpointing = False
            if device.type == "cpu":
                for config, implementation in attention:
                    if implementation not in (None, *_ANY_DEVICE):
                        config._attn_implementation = "eager"
            yield
        finally:
            for config, implementation in attention:
                if config._attn_implementation != implementation:
                    config._attn_implementation = implementation
            for module in recompute:
                cast(Any, module).gradient_checkpointing = True
            for module, training in modes:
                module.training = training
            for module, tensors in kept:
                vars(module).update(tensors)
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def _plain_tensors(module: nn.Module) -> dict[str, Tensor | None]:
    """Objects that may contain the state of a recurrent layer, which is neither a parameter nor a buffer."""
    return {name: value for name, value in vars(module).items() if value is None or isinstance(value, Tensor)}


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Make autograd track every parameter; quantized ones through a zero tensor added to their module's output.

    Yields:
        The zero tensor of each quantized parameter, by the parameter's id.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    marks: dict[int, Tensor] = {}
    hooks = []
    try:
        for parameter, _ in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        for module in model.modules():
            quantized = [p for p in module.parameters(recurse=False) if not p.is_floating_point()]
            if quantized:
                mark = torch.zeros((), device=quantized[0].device, requires_grad=True)
                marks.update((id(parameter), mark) for parameter in quantized)
                hooks.append(module.register_forward_hook(_marking(mark)))
        yield marks
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, trains in before:
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)


def _marking(mark: Tensor) -> Callable[[nn.Module, object, object], object]:
    def hook(module: nn.Module, args: object, out: object) -> object:
        return out + mark.to(out.dtype) if isinstance(out, Tensor) and out.is_floating_point() else out

    return hook


@contextmanager
def _calls(model: nn.Module, called: set[int]) -> Iterator[None]:
    """Record which members of lists of modules run."""
    hooks = [
        member.register_forward_pre_hook(lambda module, args: called.add(id(module)))  # type: ignore[func-returns-value]
        for group in _lists(model)
        for member in group
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _outputs(model: nn.Module, odd: set[int]) -> Iterator[None]:
    """Record the linear layers whose output isn't a tensor with one number per row of their matrix."""

    def note(module: nn.Linear | Conv1D, args: tuple[object, ...], out: object) -> None:
        rows = args[0].shape[:-1] if args and isinstance(args[0], Tensor) else None
        if not isinstance(out, Tensor) or (rows is not None and out.shape != (*rows, _outputs_of(module))):
            odd.add(id(module))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _outputs_of(module: nn.Linear | Conv1D) -> int:
    return int(module.nf if isinstance(module, Conv1D) else module.out_features)


def _lists(model: nn.Module) -> Iterator[list[nn.Module]]:
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1:
            yield list(module.children())


def _routed_elsewhere(model: nn.Module, reached: set[int], called: set[int]) -> set[int]:
    """Parameters of members that weren't called, where a sibling of the same class was called and reached.

    What a sibling that ran doesn't reach (the keys of a layer that takes another one's) isn't reached here either.
    """
    found: set[int] = set()
    for group in _lists(model):
        for member in group:
            if id(member) in called:
                continue
            alike = [other for other in group if type(other) is type(member) and id(other) in called]
            used = {name for other in alike for name, p in other.named_parameters() if id(p) in reached}
            found |= {id(p) for name, p in member.named_parameters() if name in used}
    return found


def _leaves(output: Tensor) -> set[int]:
    """Return the ids of the tensors that autograd would compute a gradient of `output` for."""
    found: set[int] = set()
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of the nodes that add up a leaf's gradient
        if variable is not None:
            found.add(id(variable))
        waiting.extend(following for following, _ in node.next_functions)
    return found
