"""Sums of profiled time by operator group, part of the code, operator, and size of matrix product."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from profile_marks import BLOCK, CLOSURE, UPDATES

PRODUCTS = "matrix products"
ATTENTION = "attention kernels"
HEAD = "softmax, argmax, entropy, sampling and gradient of the head"
ELEMENTWISE = "norms, activations, other arithmetic"
COPIES = "embedding, index, gather, copies"
VIEWS = "views and allocation"
OPTIMIZER = "optimizer, scaling and clipping of gradients"
AUTOGRAD = "autograd bookkeeping"
PYTHON = "Python, Lightning and the rest"
GROUPS = (PRODUCTS, ATTENTION, HEAD, ELEMENTWISE, COPIES, VIEWS, OPTIMIZER, AUTOGRAD, PYTHON)

NAMES = {
    PRODUCTS: re.compile(r"^aten::(mm|addmm_?|bmm|baddbmm_?|addbmm|mv|addmv_?|matmul|linear|mkldnn_linear)$|^mkl"),
    ATTENTION: re.compile(r"attention"),
    COPIES: re.compile(
        r"^aten::_?(embedding\w*|index\w*|gather|scatter\w*|take\w*|masked_select|nonzero\w*|copy_?|to|to_copy|clone"
        r"|contiguous|cat|stack|pad|constant_pad_nd|repeat\w*|fill_?|zero_?|zeros\w*|ones\w*|full\w*|new_\w+|arange"
        r"|flip|roll|local_scalar_dense|item|is_nonzero|lift_fresh)$"
    ),
    VIEWS: re.compile(
        r"^aten::_?(view\w*|reshape\w*|unsafe_view|reshape_alias|t|transpose_?|permute|expand\w*|as_strided_?|slice\w*"
        r"|select\w*|narrow|split\w*|chunk|unbind|squeeze_?|unsqueeze_?|flatten|unflatten|detach_?|alias|empty\w*"
        r"|resize\w*|result_type|lazy_clone|unsafe_split|movedim|numpy_T|set_|resolve_\w+|requires_grad_)$|^detach_?$"
    ),
    AUTOGRAD: re.compile(r"^autograd::|Backward\d*$|AccumulateGrad$"),
}
"""Operator names of each group, tried in this order; operators that match none are elementwise."""

ADAM = re.compile(r"^Optimizer\.step#")


def group_of(event: Any, scope: str) -> str:
    """The operator group that an event's own time counts for.

    Args:
        event: Event of the profiler.
        scope: Innermost part of the code that it runs in: ``optimizer``, ``head`` or an empty string.
    """
    name = event.name
    if name.startswith(BLOCK) or not (name.startswith(("aten::", "mkl", "detach")) or NAMES[AUTOGRAD].search(name)):
        return OPTIMIZER if ADAM.match(name) and scope == "optimizer" else PYTHON
    if scope == "optimizer":
        return OPTIMIZER
    for group in (PRODUCTS, ATTENTION):
        if NAMES[group].search(name):
            return group
    if scope == "head":
        return HEAD
    return next((group for group in (COPIES, VIEWS, AUTOGRAD) if NAMES[group].search(name)), ELEMENTWISE)


SCOPES = {
    f"{BLOCK}head (summed)": "head",
    f"{BLOCK}head": "head",
    f"{BLOCK}rollout: next tokens": "head",
    "_SummedLogProbsBackward": "head",
    "_SelectedLogProbsBackward": "head",
    f"{BLOCK}{UPDATES}: scaled": "optimizer",
    f"{BLOCK}{UPDATES}: clipped": "optimizer",
    f"{BLOCK}{UPDATES}: norm": "optimizer",
    f"{BLOCK}{CLOSURE}": "",
}
"""Part of the code by event name. Under Lightning, the training step runs inside the optimizer's step."""


def scopes(events: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """Yield each event with the innermost part of the code that it runs in."""
    known: dict[int, str] = {}
    for event in events:
        chain = []
        at = event
        while at is not None and id(at) not in known:
            chain.append(at)
            at = at.cpu_parent
        scope = "" if at is None else known[id(at)]
        for at in reversed(chain):
            own = SCOPES.get(at.name)
            scope = own if own is not None else "optimizer" if ADAM.match(at.name) else scope
            known[id(at)] = scope
        yield event, known[id(event)]


def product_size(event: Any) -> tuple[str, int] | None:
    """Sizes and operations of a matrix product; None for other operators."""
    operator = event.name.removeprefix("aten::")
    if operator not in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mkldnn_linear"):
        return None
    first = 1 if "add" in operator else 0  # the bias precedes the two factors, an output follows them
    a, b = event.input_shapes[first : first + 2]
    batch = a[0] if len(a) == len(b) == 3 else 1
    if operator == "mkldnn_linear":
        a, b = [math.prod(a[:-1]), a[-1]], b[::-1]
    m, k, n = a[-2], a[-1], b[-1]
    many = f"{batch:,} x " if batch > 1 else ""
    return f"{many}[{m:,}, {k:,}] @ [{k:,}, {n:,}]", 2 * batch * m * k * n


def inside(event: Any, name: str) -> bool:
    """Whether an event is nested in another one of the same name, so that its time would count twice."""
    at = event.cpu_parent
    while at is not None:
        if at.name == name:
            return True
        at = at.cpu_parent
    return False


@dataclass
class Breakdown:
    """Breakdown of a step's time; all values are per step.

    Args:
        groups: Seconds of each operator group; Python's are the remainder.
        parts: Calls and seconds of each part of the code, including what it calls.
        operators: Calls and own seconds of each operator, by name and group.
        products: Calls, own seconds and operations of matrix products, by size.
    """

    groups: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GROUPS, 0.0))
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    operators: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    products: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))


def break_down(events: Iterable[Any], steps: int, seconds: float) -> Breakdown:
    """Break down the time of `steps` steps, which took `seconds` each on average."""
    breakdown = Breakdown()
    for event, scope in scopes(events):
        group = group_of(event, scope)
        if event.name.startswith(BLOCK):
            whole = 0.0 if inside(event, event.name) else event.cpu_time_total / 1e6 / steps
            _add(breakdown.parts[event.name.removeprefix(BLOCK)], 1 / steps, whole)
        if group == PYTHON:
            continue
        own = event.self_cpu_time_total / 1e6 / steps
        breakdown.groups[group] += own
        _add(breakdown.operators[event.name, group], 1 / steps, own)
        size = product_size(event)
        if size is not None:
            _add(breakdown.products[size[0]], 1 / steps, own, size[1] / steps)
    breakdown.groups[PYTHON] = seconds - sum(breakdown.groups.values())
    return breakdown


def _add(sums: list[float], *values: float) -> None:
    sums[:] = [a + b for a, b in zip(sums, values, strict=True)]
