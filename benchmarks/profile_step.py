"""Where the time of a training step goes: one of supervised LoRA, and one of GRPO (rollout and update).

    OMP_NUM_THREADS=2 python benchmarks/profile_step.py --json profile.json
    OMP_NUM_THREADS=1 python benchmarks/profile_step.py --small --threads 1 --pairs 1
    python benchmarks/profile_step.py --only "GRPO, vocabulary 32,000" --profiled 1

The real modules train under a Lightning Trainer. A step lasts from the start of its batch to the start of the next, so
that logging, loops and loaders are in it. Some steps are timed as they are; then torch.profiler watches some; at last
one is counted. Shares are of the profiled steps' wall time, which the profiler makes longer (both are told), mostly
what Python does between operators. The time of an operator is its own, without that of the operators that it calls.

The peak that matrix products are measured against is this machine's, of a large square product in fp32 on the same
number of threads. Attention counts all pairs of queries and keys, so its rate is too high where its kernel skips some.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from harness import arguments, machine, quiet
from models import Size, lengths, model, rows, tokenizer
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader

from lightning_ft import LoRAFineTuning
from lightning_ft._lightning import Callback, Trainer
from lightning_ft.data.batches import PromptBatch
from lightning_ft.data.layout import collate_examples
from lightning_ft.measurement.flops import OperationCounter
from lightning_ft.modules.grpo import GRPO
from lightning_ft.report.markdown import markdown_table

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

BLOCK = "part: "
CLOSURE = "closure of the optimizer's step"
UPDATES = "gradients"
ADAM = re.compile(r"^Optimizer\.step#")


@dataclass(frozen=True)
class Case:
    """A step.

    Args:
        kind: ``SFT`` or ``GRPO``.
        size: Of the model.
        count: Rows of the batch, or completions to each prompt.
        prompt: Mean length of the prompts, tokens.
        answer: Mean length of the answers, or length of the completions.
        prompts: Prompts of a rollout.
        packing: Of supervised rows; else they are padded.
    """

    kind: str
    size: Size
    count: int
    prompt: int
    answer: int
    prompts: int = 1
    packing: bool = True

    def __str__(self) -> str:
        what = (
            f"{self.count} rows, {'packed' if self.packing else 'padded'}"
            if self.kind == "SFT"
            else f"{self.prompts} prompts in groups of {self.count}"
        )
        return f"{self.kind}, {self.size}, {what}, prompts of {self.prompt}, answers of {self.answer}"


@dataclass
class Profile:
    """What was measured of a case; seconds and operations are of one step.

    Args:
        case: In words.
        tokens: Of the batch, or new ones of the rollout.
        seconds: Unwatched.
        watched: While it was profiled.
        groups: Seconds of each group of operators, watched.
        parts: For each part of the code its calls, and its seconds with all that it calls, watched.
        operators: For the longest operators their group, calls and own seconds.
        shapes: For the longest matrix products their sizes, calls, seconds and operations.
        product_flops: Operations of matrix products.
        attention_flops: Of attention.
        peak: Operations a second of a large product.
        machine: What it was measured on.
    """

    case: str
    tokens: int
    seconds: float
    watched: float
    groups: dict[str, float]
    parts: dict[str, tuple[float, float]]
    operators: list[tuple[str, str, float, float]]
    shapes: list[tuple[str, float, float, float]]
    product_flops: int
    attention_flops: int
    peak: float
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def product_rate(self) -> float:
        """Operations a second of the matrix products."""
        return self.product_flops / self.groups[PRODUCTS]

    @property
    def step_rate(self) -> float:
        """Operations a second of the whole step, unwatched."""
        return (self.product_flops + self.attention_flops) / self.seconds

    def markdown(self) -> str:
        """Tables."""

        def share(seconds: float) -> str:
            return f"{100 * seconds / self.watched:.1f}%"

        def rate(flops: float, seconds: float) -> str:
            return f"{flops / seconds / 1e9:.1f}" if seconds else ""

        def ms(seconds: float) -> str:
            return f"{1e3 * seconds:,.2f}"

        flops = {PRODUCTS: self.product_flops, ATTENTION: self.attention_flops}
        groups = [
            [name, ms(seconds), share(seconds), rate(flops[name], seconds) if name in flops else ""]
            for name, seconds in self.groups.items()
        ]
        parts = [
            [name, f"{calls:,.0f}", ms(seconds), share(seconds)]
            for name, (calls, seconds) in sorted(self.parts.items(), key=lambda item: -item[1][1])
        ]
        operators = [
            [f"`{name}`", group, f"{calls:,.0f}", ms(seconds), share(seconds)]
            for name, group, calls, seconds in self.operators
        ]
        shapes = [
            [name, f"{calls:,.0f}", ms(seconds), share(seconds), rate(count, seconds), percent(count, seconds, self)]
            for name, calls, seconds, count in self.shapes
        ]
        return "\n".join(
            [
                f"## {self.case}",
                "",
                f"{ms(self.seconds)} ms a step, {ms(self.watched)} ms while watched "
                f"(x {self.watched / self.seconds:.2f}); {self.tokens:,} tokens, "
                f"{self.tokens / self.seconds:,.0f} a second.",
                f"Matrix products: {share(self.groups[PRODUCTS])} of the step, {self.product_flops / 1e9:.2f} GFLOP at "
                f"{self.product_rate / 1e9:.1f} GFLOP/s, {100 * self.product_rate / self.peak:.0f}% of the peak of "
                f"{self.peak / 1e9:.1f} GFLOP/s. The whole step: "
                f"{(self.product_flops + self.attention_flops) / 1e9:.2f} GFLOP at {self.step_rate / 1e9:.1f} GFLOP/s, "
                f"{100 * self.step_rate / self.peak:.0f}%.",
                "",
                *markdown_table(["operators", "ms", "share", "GFLOP/s"], groups),
                "",
                "Parts of the code, with all that they call (parts may stand inside of others):",
                "",
                *markdown_table(["part", "calls", "ms", "share"], parts),
                "",
                "Longest operators:",
                "",
                *markdown_table(["operator", "group", "calls", "ms", "share"], operators),
                "",
                "Longest matrix products, by their sizes:",
                "",
                *markdown_table(["product", "calls", "ms", "share", "GFLOP/s", "of the peak"], shapes),
                "",
            ]
        )


def percent(flops: float, seconds: float, result: Profile) -> str:
    return f"{100 * flops / seconds / result.peak:.0f}%" if seconds else ""


def peak_rate(size: int = 2048, repetitions: int = 6) -> float:
    """Operations a second of a square product in fp32, the best of several."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = a @ b
    best = math.inf
    for _ in range(repetitions):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


# ---------------------------------------------------------------- what is watched


def parts() -> list[tuple[Any, str, str]]:
    """Functions whose time is told: where they are looked up, their name there, and what they are called here."""
    import transformers.models.llama.modeling_llama as llama

    from lightning_ft.models import head, scorer
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
        (head, "_explicit_mask", "mask of shared prompts"),
        (llama, "create_causal_mask", "transformers' mask"),
        (llama.LlamaRotaryEmbedding, "forward", "rotary embeddings"),
        (torch.Tensor, "backward", "backward"),
        (FineTuning, "scale_gradients", f"{UPDATES}: scaled"),
        (torch.nn.utils, "clip_grad_norm_", f"{UPDATES}: clipped"),
        (torch.nn.utils, "get_total_norm", f"{UPDATES}: norm"),
        (FineTuning, "log", "log"),
        (FineTuning, "log_dict", "log_dict"),
        (scorer.Scorer, "lay_out", "layout of a micro-batch"),
        (local.LocalEngine, "generate", "rollout"),
        (local, "read_prompts", "rollout: prompts read"),
        (local, "next_logits", "rollout: forward passes"),
        (TokenSampler, "__call__", "rollout: next tokens"),
        (SampledCompletions, "_judge", "rewards"),
        (PolicyOptimization, "measure", "reference (and old policy)"),
        (PolicyOptimization, "learn", "update"),
        (PolicyOptimization, "_count", "figures of a micro-batch"),
        (PolicyOptimization, "rollout_figures", "figures of the rollout"),
        (PolicyOptimization, "record", "record of the rollout"),
        (grpo, "policy_loss", "loss of the policy"),
    ]


def marked(stack: ExitStack, trainer: Any) -> None:
    """Let the profiler see the parts of the code until the stack is closed."""
    from lightning_ft.data.layout import TokenBatch
    from lightning_ft.rollout import local

    def timed(function: Any, label: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            with record_function(BLOCK + label):
                return function(*args, **options)

        return call

    for owner, name, label in parts():
        stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), label)))
    for name in ("num_tokens", "has_shared_prefixes"):
        getter = getattr(TokenBatch, name).fget
        stack.enter_context(patch.object(TokenBatch, name, property(timed(getter, f"TokenBatch.{name}"))))
    plugin = type(trainer.precision_plugin)  # what Lightning hands to the optimizer's step: the whole training step
    stack.enter_context(patch.object(plugin, "_wrap_closure", timed(plugin._wrap_closure, CLOSURE)))

    @contextmanager
    def evaluating(network: Any) -> Iterator[None]:
        with ExitStack() as inner:
            with record_function(f"{BLOCK}rollout: into eval mode"):
                inner.enter_context(original(network))
            yield

    original = local.evaluating
    stack.enter_context(patch.object(local, "evaluating", evaluating))


class SeparateCounter(OperationCounter):
    """Counts attention apart."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0
        """Operations of attention among `flops`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it."""
        flops, attention = self.flops, self.attention
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if "attention" in str(func):
            self.attention = attention + self.flops - flops
        return out


class Watch(Callback):
    """Times some steps as they are, then profiles some, then counts one.

    Args:
        timed: How many are timed, after one that isn't.
        profiled: How many are profiled.
    """

    def __init__(self, timed: int, profiled: int) -> None:
        super().__init__()
        self.timed, self.profiled = timed, profiled
        self.times: list[float] = []
        self.watched = 0.0
        self.counter = SeparateCounter()
        self._profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self._marks = ExitStack()
        self._at = 0.0

    @property
    def steps(self) -> int:
        """Of all."""
        return 1 + self.timed + self.profiled + 1

    def events(self) -> Sequence[Any]:
        """What the profiler saw."""
        return self._profiler.events()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins, and the one before ends."""
        now = time.perf_counter()
        if 1 < batch_idx <= 1 + self.timed:
            self.times.append(now - self._at)
        if batch_idx == 1 + self.timed:
            marked(self._marks, trainer)
            self._profiler.start()
        elif batch_idx == 1 + self.timed + self.profiled:
            self.watched = (now - self._at) / self.profiled
            self._profiler.stop()
            self._marks.close()
            self.counter.__enter__()
        if not 1 + self.timed < batch_idx < self.steps:
            self._at = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The counted step ends."""
        self.counter.__exit__(None, None, None)


# ---------------------------------------------------------------- what the profiler saw


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
    shapes = [shape for shape in event.input_shapes if len(shape) in (2, 3)]
    kind = event.name.removeprefix("aten::")
    if kind not in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mkldnn_linear") or len(shapes) < 2:
        return None
    a, b = shapes[-2:]
    batch = a[0] if len(a) == len(b) == 3 else 1
    if kind == "mkldnn_linear":
        a, b = [math.prod(a[:-1]), a[-1]], b[::-1]
    m, k, n = a[-2], a[-1], b[-1]
    many = f"{batch:,} x " if batch > 1 else ""
    return f"{many}[{m:,}, {k:,}] @ [{k:,}, {n:,}]", 2 * batch * m * k * n


def analysed(case: Case, watch: Watch, tokens: int, peak: float, threads: int, longest: int) -> Profile:
    """The events of the profiled steps, added up."""
    groups: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    operators: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    shapes: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    counted = 0.0
    steps = watch.profiled
    for event, scope in scopes(watch.events()):
        own = event.self_cpu_time_total / 1e6 / steps
        group = group_of(event, scope)
        if event.name.startswith(BLOCK):
            label = event.name.removeprefix(BLOCK)
            if not inside(event, event.name):
                found[label][1] += event.cpu_time_total / 1e6 / steps
            found[label][0] += 1 / steps
        if group == PYTHON:
            continue
        groups[group] += own
        operators[event.name, group][0] += 1 / steps
        operators[event.name, group][1] += own
        size = product_size(event)
        if size is not None:
            counted += size[1] / steps
            for index, value in enumerate((1 / steps, own, size[1] / steps)):
                shapes[size[0]][index] += value
    groups[PYTHON] = watch.watched - sum(groups.values())
    products = watch.counter.flops - watch.counter.attention
    if watch.counter.uncounted:
        raise RuntimeError(f"operators without a formula: {', '.join(watch.counter.uncounted)}")
    if abs(counted / products - 1) > 0.05:  # completions of another step may be longer
        logging.getLogger(__name__).warning("profiled products: %.3g operations, counted: %.3g", counted, products)
    return Profile(
        str(case),
        tokens,
        median(watch.times),
        watch.watched,
        groups,
        {label: (calls, seconds) for label, (calls, seconds) in found.items()},
        [
            (name, group, calls, seconds)
            for (name, group), (calls, seconds) in sorted(operators.items(), key=lambda item: -item[1][1])[:longest]
        ],
        [(size, *values) for size, values in sorted(shapes.items(), key=lambda item: -item[1][1])[:longest]],  # type: ignore[misc]
        products,
        watch.counter.attention,
        peak,
        machine(threads),
    )


def inside(event: Any, name: str) -> bool:
    """Whether an event stands inside of another one of a name: its time would be told twice."""
    at = event.cpu_parent
    while at is not None:
        if at.name == name:
            return True
        at = at.cpu_parent
    return False


# ---------------------------------------------------------------- the steps


def reward(prompts: Any, completions: Any, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Something that differs between completions."""
    return [sum(ids) % 11 / 4 for ids in completion_ids]


OPTIONS: dict[str, Any] = {"dtype": "float32", "lr_schedule": "constant", "warmup_ratio": 0.0}


def supervised(case: Case, steps: int) -> tuple[Any, list[Any], int]:
    """A module, its batches, and the tokens of one: the same in every step."""
    module = LoRAFineTuning(model(case.size), tokenizer=tokenizer(), **OPTIONS)
    examples = rows(case.count, case.size.vocabulary, prompt=case.prompt, answer=case.answer)
    batch = collate_examples(examples, packing=case.packing, pad_token_id=1)
    return module, [batch] * steps, batch.num_tokens


def policy(case: Case, steps: int) -> tuple[Any, list[Any], int]:
    """The same for GRPO; no completion ends early."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(2, case.size.vocabulary, (length,), generator=generator)
        for length in lengths(case.prompts, case.prompt, 0.3 if case.prompts > 1 else 0.0, generator)
    ]
    module = GRPO(
        model(case.size),
        tokenizer=tokenizer(),
        rewards=reward,
        lora=True,
        num_completions=case.count,
        max_new_tokens=case.answer,
        **OPTIONS,
    )
    module.engine.end_token_ids = (case.size.vocabulary,)  # type: ignore[attr-defined]  # no such token
    batch = PromptBatch([""] * case.prompts, prompts, columns={})
    return module, [batch] * steps, case.prompts * case.count * case.answer


def measured(case: Case, *, timed: int, profiled: int, threads: int, peak: float, longest: int) -> Profile:
    """Train, and say where the time went."""
    watch = Watch(timed, profiled)
    module, batches, tokens = (supervised if case.kind == "SFT" else policy)(case, watch.steps)
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return analysed(case, watch, tokens, max(peak, peak_rate()), threads, longest)


WIDE = Size(vocabulary=152_000, hidden=576, layers=30)
CASES = [
    Case("SFT", Size(), count=8, prompt=170, answer=35),
    Case("SFT", Size(), count=8, prompt=170, answer=35, packing=False),
    Case("SFT", WIDE, count=2, prompt=170, answer=35),
    Case("GRPO", Size(tied=False), count=8, prompt=256, answer=64),
    Case("GRPO", replace(WIDE, tied=False), count=4, prompt=128, answer=32),
]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--profiled", type=int, default=2, help="steps that are profiled")
    parser.add_argument("--longest", type=int, default=12, help="operators and products that are told")
    parser.add_argument("--small", action="store_true", help="sizes that only show whether it works")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    peak = peak_rate()
    print(f"Peak of a product in fp32 on {options.threads} threads: {peak / 1e9:.1f} GFLOP/s.\n", flush=True)
    results = []
    for case in CASES:
        if options.small:
            size = Size(2000, 64, 2 if case.size.layers < 20 else 4, tied=case.size.tied)
            case = Case(case.kind, size, case.count, 40, 10, packing=case.packing)
        if options.only not in str(case):
            continue
        result = measured(
            case,
            timed=options.pairs,
            profiled=options.profiled,
            threads=options.threads,
            peak=peak,
            longest=options.longest,
        )
        print(result.markdown(), flush=True)
        results.append(result)
        save(results, options.json)


def save(results: Sequence[Profile], path: Path | None) -> None:
    """Write the figures as JSON, where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
