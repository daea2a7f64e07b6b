"""Check that every attention path gives the log-probabilities and gradients of rows alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from gpu_runner import Outcome
from gpu_setup import Setup
from torch import Tensor

from lightning_ft.data.layout import Example, collate_examples
from lightning_ft.models.logprob_model import LogProbModel

LAYERS = 2
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
"""Largest difference, relative to the largest value (at least 1); on a GPU, products of fp32 have 1e-3 in Triton."""


def exactness(setup: Setup) -> Outcome:
    """Packed rows and shared prompts under each attention, compared with one row each under SDPA without a mask."""
    outcome = Outcome()
    prompts, completions = _prompts(setup)
    whole = [_joined(prompt, one) for prompt, group in zip(prompts, completions, strict=True) for one in group]
    paths = [name for name in ("flash_attention_3", "flash_attention_2") if name in setup.attentions()]
    paths += ["flex_attention", "sdpa", "eager"]
    expected: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
    for attention in paths:
        dtype = torch.bfloat16 if attention.startswith("flash") else torch.float32
        if dtype not in expected:
            expected[dtype] = _alone(setup, whole, dtype)
        model = setup.model(attention=attention, dtype=dtype, layers=LAYERS).to(setup.device)
        logprob_model = LogProbModel(pad_token_id=1)
        for layout in ("packed", "shared"):
            if layout == "shared":
                batch = logprob_model.lay_out(model, prompts, completions)
            else:
                batch = collate_examples(whole, pad_token_id=1).to(setup.device)
            name = f"{attention}, {layout}"
            with _compiler(setup):
                differences = _differences(setup, model, logprob_model, batch, expected[dtype])
            for what, difference in differences.items():
                outcome.measured[f"{name}, {what}"] = difference
                limit = TOLERANCE[dtype]
                outcome.require(difference <= limit, f"{name}: {what} differ by {difference:.1e}, at most {limit:.0e}")
        shares = not attention.startswith("flash")
        reason = logprob_model.exactness(model).sharing
        outcome.require((reason is None) == shares, f"{attention}: shared prompts are {reason or 'used'}")
        del model
    return outcome


def _joined(prompt: Tensor, completion: Example) -> Example:
    unsupervised = torch.zeros(len(prompt), dtype=torch.bool)
    return Example(torch.cat([prompt, completion.input_ids]), torch.cat([unsupervised, completion.supervised]))


def _compiler(setup: Setup) -> AbstractContextManager[Any]:
    """On a CPU, FlexAttention runs uncompiled: compiling it takes half a minute there and shows nothing about a GPU."""
    return nullcontext() if setup.on_gpu else torch.compiler.set_stance("force_eager")


def _prompts(setup: Setup) -> tuple[list[Tensor], list[list[Example]]]:
    """Prompts with groups of completions, so long on a GPU that they span several blocks of a kernel."""
    generator = torch.Generator().manual_seed(0)
    scale = 40 if setup.on_gpu else 1

    def ids(length: int) -> Tensor:
        return torch.randint(2, setup.vocabulary, (length,), generator=generator)

    def completion(length: int) -> Example:
        return Example(ids(length), torch.ones(length, dtype=torch.bool))

    sizes = ((13, (3, 8)), (5, (11, 1, 4, 6)), (9, (7, 7, 2)))
    prompts = [ids(scale * prompt) for prompt, _ in sizes]
    return prompts, [[completion(scale * length) for length in lengths] for _, lengths in sizes]


def _alone(setup: Setup, whole: list[Example], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probabilities and gradients of each sequence in a pass of its own, by the model's own logits."""
    model = setup.model(dtype=dtype, layers=LAYERS).to(setup.device)
    found = []
    for example in whole:
        ids = example.input_ids.to(setup.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        picked = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        found.append(picked[example.supervised[1:].to(setup.device)])
    logprobs = torch.cat(found)
    return logprobs.detach(), _gradient(model, logprobs)


def _gradient(model: Any, logprobs: Tensor) -> Tensor:
    """Gradients of all weights but the embeddings, under a loss that weights tokens differently."""
    model.zero_grad()
    (torch.linspace(-1, 1, len(logprobs), device=logprobs.device) * logprobs).sum().backward()
    layers = [p.grad.flatten().float() for name, p in model.named_parameters() if "layers" in name]
    return torch.cat(layers)


def _differences(
    setup: Setup, model: Any, logprob_model: LogProbModel, batch: Any, expected: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Largest differences of log-probabilities and gradients, relative to the largest value."""
    backward = setup.on_gpu or model.config._attn_implementation != "flex_attention"  # it has none on a CPU
    with nullcontext() if backward else torch.no_grad():
        found = logprob_model(model, batch).logprobs
    values = {"log-probabilities": (found.detach(), expected[0])}
    if backward:
        values["gradients"] = (_gradient(model, found), expected[1])
    return {
        name: float((one - other).abs().max() / other.abs().max().clamp(min=1.0))
        for name, (one, other) in values.items()
    }
