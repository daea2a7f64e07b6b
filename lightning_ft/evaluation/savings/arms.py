"""One arm of a measurement: generates the answers, counts their tokens and grades them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.cores import without_reasoning
from lightning_ft.data.tokenizers import pad_token_id
from lightning_ft.distributed import all_gather_objects, rank_and_world_size
from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.savings.first_token import TIMED_REQUESTS
from lightning_ft.evaluation.savings.plan import MeasurementPlan
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.savings.serving import first_token_seconds, model_shape
from lightning_ft.evaluation.scorers import grade_answers
from lightning_ft.models.generate import end_token_ids
from lightning_ft.models.head import CausalLM
from lightning_ft.models.shard import is_sharded
from lightning_ft.models.vocabulary import embedding_rows
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Completion
from lightning_ft.rollout.structured import GrammarMasks


def run_arm(
    name: str,
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    plan: MeasurementPlan,
    *,
    batch_size: int = 32,
    share_prefix: bool = True,
    timed_requests: int = TIMED_REQUESTS,
    progress: bool = True,
) -> ArmRecords:
    """Generate and grade the answers of one arm to all requests of a plan.

    In a process group every rank must call this function. The requests are distributed over the ranks, unless the model
    is sharded: all ranks take part in each forward pass of a sharded model, so each of them answers every request. The
    records are the same on every rank.

    Args:
        name: Name of the arm: ``prompted``, ``tuned`` or ``untuned``.
        model: Model with the weights of the arm, in training or evaluation mode.
        tokenizer: Tokenizer of the model.
        plan: Requests, prompts and scorer.
        batch_size: Number of prompts per batch.
        share_prefix: Whether to compute the common prefix of the prompts only once.
        timed_requests: Number of requests whose time to first token is measured; 0 measures none.
        progress: Whether to show a progress bar.

    Raises:
        SavingsError: If the scorer fails on an answer.
    """
    arm = plan.prompted if name == "prompted" else plan.bare
    if arm is None:
        raise SavingsError("The plan has no prompt for the prompted arm. Make it with measurement_plan(baseline=...).")
    ends = end_token_ids(model, tokenizer)
    engine = LocalEngine(
        model,
        end_token_ids=ends,
        pad_token_id=pad_token_id(tokenizer),
        batch_size=batch_size,
        share_prefix=share_prefix,
    )
    rank, ranks = rank_and_world_size()
    if is_sharded(model):
        ranks = 1
    mine = range(rank if ranks > 1 else 0, len(arm.prompts), ranks)
    grammars = None
    if plan.grammars is not None and len(mine):
        grammars = GrammarMasks([plan.grammars[i] for i in mine], tokenizer, ends, embedding_rows(model))
    show_bar = progress and rank == 0
    with tqdm(total=len(mine), desc=f"Token savings, {name}", unit="request", disable=not show_bar, leave=False) as bar:
        completions = _gather(
            lambda: (
                engine.generate(
                    [arm.prompts[i] for i in mine],
                    max_new_tokens=plan.max_new_tokens,
                    on_answered=bar.update,
                    prefix=arm.prefix_length,
                    grammars=grammars,
                ).completions
            ),
            mine,
            ranks,
        )
    outputs = tokenizer.batch_decode([list(c.tokens) for c in completions], skip_special_tokens=True)
    shape = model_shape(model)
    n = len(plan.requests)
    clusters = [r.cluster if r.cluster is not None else f"\0{r.id}" for r in plan.requests]
    return ArmRecords(
        ids=tuple(r.id for r in plan.requests),
        input_tokens=tuple(map(len, arm.prompts)),
        output_tokens=tuple(len(c.tokens) for c in completions),
        scores=graded(plan, outputs),
        truncated=tuple(c.truncated for c in completions),
        cached_prefix_tokens=(arm.prefix_length,) * n,
        clusters=tuple(clusters) if any(r.cluster is not None for r in plan.requests) else (),
        outputs=tuple(outputs),
        parts=arm.parts,
        first_token_seconds=first_token_seconds(engine, arm.prompts, arm.prefix_length, rounds=timed_requests)
        if timed_requests
        else {},
        prefill_flops=None if shape is None else sum(shape.prefill_flops(len(p)) for p in arm.prompts) / n,
        kv_cache_bytes=None
        if shape is None
        else sum(shape.kv_cache_bytes(len(p) + len(c.tokens)) for p, c in zip(arm.prompts, completions, strict=True))
        / n,
    )


def constant_scores(plan: MeasurementPlan) -> tuple[float, ...] | None:
    """Grade the most frequent reference as the answer to every request; call it on all ranks.

    Args:
        plan: Plan of the measurement.

    Returns:
        A score per request; None if every reference appears only once.
    """
    answer, count = Counter(request.reference for request in plan.requests).most_common(1)[0]
    return graded(plan, [answer] * len(plan.requests)) if count > 1 else None


def _gather(answer: Callable[[], Sequence[Completion]], mine: Sequence[int], ranks: int) -> list[Completion]:
    """Gather the completions of all ranks in the order of the requests; an error on one rank is raised on all."""
    if ranks == 1:
        return list(answer())
    own: Any
    try:
        own = dict(zip(mine, answer(), strict=True))
    except Exception as error:
        own = f"{type(error).__name__}: {error}"
    parts = all_gather_objects(own)
    if failed := [f"rank {rank}: {part}" for rank, part in enumerate(parts) if isinstance(part, str)]:
        raise SavingsError(f"Generation failed on {'; on '.join(failed)}")
    answered = {i: completion for part in parts for i, completion in part.items()}
    return [answered[i] for i in sorted(answered)]


def graded(plan: MeasurementPlan, outputs: Sequence[str]) -> tuple[float, ...]:
    """Grade the answers on rank 0 and broadcast the scores, or the error, which all ranks then raise.

    If rank 0 raised alone, the others would wait for it in the broadcast.
    """
    rank, ranks = rank_and_world_size()
    outcome: list[Any] = [None]
    if rank == 0:
        try:
            ids, references = [r.id for r in plan.requests], [r.reference for r in plan.requests]
            # If a row has its reasoning in a field of its own, the reasoning of the answer isn't graded either.
            separate = ["reasoning_content" in (r.answer or {}) for r in plan.requests]
            answers = [without_reasoning(o) if s else o for o, s in zip(outputs, separate, strict=True)]
            outcome = [grade_answers(plan.scorer_name, plan.scorer, ids, answers, references)]
        except SavingsError as error:
            if ranks == 1:
                raise
            outcome = [str(error)]
    if ranks > 1:
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], str):
        raise SavingsError(outcome[0])
    return tuple(outcome[0])
