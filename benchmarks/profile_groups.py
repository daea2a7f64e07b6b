"""What the profiler saw, added up by group of operators, part of the code, operator, and size of matrix product."""

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
AUTOGRAD = "bookkeeping of autograd"
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
"""Which names belong to a group, in this order; what is left of the operators is arithmetic."""

ADAM = re.compile(r"^Optimizer\.step#")


def group_of(event: Any, scope: str) -> str:
    """The group of operators that an event's own time belongs to.

    Args:
        event: The profiler's.
        scope: The innermost part of the code that it runs in: ``optimizer``, ``head`` or none.
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
"""What runs in which part of the code; under Lightning the whole step runs inside of the optimizer's."""


def scopes(events: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """Each event with the innermost part of the code that it runs in."""
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
    """A matrix product's sizes and operations; None for what isn't one itself."""
    kind = event.name.removeprefix("aten::")
    if kind not in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mkldnn_linear"):
        return None
    first = 1 if "add" in kind else 0  # what it is added to stands before the two, an output behind them
    a, b = event.input_shapes[first : first + 2]
    batch = a[0] if len(a) == len(b) == 3 else 1
    if kind == "mkldnn_linear":
        a, b = [math.prod(a[:-1]), a[-1]], b[::-1]
    m, k, n = a[-2], a[-1], b[-1]
    many = f"{batch:,} x " if batch > 1 else ""
    return f"{many}[{m:,}, {k:,}] @ [{k:,}, {n:,}]", 2 * batch * m * k * n


def inside(event: Any, name: str) -> bool:
    """Whether an event stands inside of another one of a name: its time would be told twice."""
    at = event.cpu_parent
    while at is not None:
        if at.name == name:
            return True
        at = at.cpu_parent
    return False


@dataclass
class Spent:
    """Where the time of a step went; calls and seconds are of one step.

    Args:
        groups: Seconds of each group of operators; Python's are what the others leave.
        parts: Calls and seconds of each part of the code, with all that it calls.
        operators: Calls and own seconds, by name and group.
        products: Calls, own seconds and operations of matrix products, by their sizes.
    """

    groups: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GROUPS, 0.0))
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    operators: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    products: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))


def spent(events: Iterable[Any], steps: int, seconds: float) -> Spent:
    """Add up the events of so many steps, of so many seconds each."""
    found = Spent()
    for event, scope in scopes(events):
        group = group_of(event, scope)
        if event.name.startswith(BLOCK):
            whole = 0.0 if inside(event, event.name) else event.cpu_time_total / 1e6 / steps
            _add(found.parts[event.name.removeprefix(BLOCK)], 1 / steps, whole)
        if group == PYTHON:
            continue
        own = event.self_cpu_time_total / 1e6 / steps
        found.groups[group] += own
        _add(found.operators[event.name, group], 1 / steps, own)
        size = product_size(event)
        if size is not None:
            _add(found.products[size[0]], 1 / steps, own, size[1] / steps)
    found.groups[PYTHON] = seconds - sum(found.groups.values())
    return found


def _add(sums: list[float], *values: float) -> None:
    sums[:] = [a + b for a, b in zip(sums, values, strict=True)]
