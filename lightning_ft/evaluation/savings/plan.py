"""What is to be measured, checked before anything is generated: requests, both arms' prompts, and the scorer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lightning_ft.data.encode import encode_prompt
from lightning_ft.data.templates import chat_template
from lightning_ft.errors import SavingsError, TokenizerError
from lightning_ft.evaluation.savings.prompt import PromptBaseline, check_no_overlap, content_hash
from lightning_ft.evaluation.scorers import Scorer, resolve_scorer
from lightning_ft.rollout.protocol import common_prefix
from lightning_ft.types import Request


@dataclass(frozen=True)
class ArmPrompts:
    """The prompts of one arm.

    Args:
        prompts: Token ids of each request, as generation gets them.
        parts: Tokens of all prompts together by where they go: ``system``, ``few_shot`` and ``request`` are those of
            the texts alone, ``template`` is all else.
        shared: Tokens that all prompts start with.
    """

    prompts: tuple[tuple[int, ...], ...]
    parts: dict[str, int]
    shared: int


@dataclass(frozen=True)
class MeasurementPlan:
    """Requests and prompts that were checked.

    Args:
        requests: What is asked, ``n``.
        available: How many there were to choose from.
        prompted: Prompts with system prompt and examples.
        bare: Prompts of the tuned and untuned arms.
        scorer: Judges the answers.
        scorer_name: For messages and reports.
        max_new_tokens: Limit of every answer.
        baseline_hash: Names the baseline.
        tokenizer: Its name.
    """

    requests: tuple[Request, ...]
    available: int
    prompted: ArmPrompts
    bare: ArmPrompts
    scorer: Scorer
    scorer_name: str
    max_new_tokens: int
    baseline_hash: str
    tokenizer: str

    @property
    def fingerprint(self) -> str:
        """Names everything that the arms must have in common."""
        return content_hash(
            [
                [list(map(list, arm.prompts)) for arm in (self.prompted, self.bare)],
                [[r.id, r.reference, r.cluster] for r in self.requests],
                self.scorer_name,
                self.max_new_tokens,
            ]
        )

    def check_context(self, limit: int | None) -> None:
        """Refuse prompts that leave no room for the answer in the model's context.

        Raises:
            SavingsError: With the first such request; nothing is ever cut.
        """
        for name, arm in (("prompted", self.prompted), ("tuned", self.bare)):
            for request, prompt in zip(self.requests, arm.prompts, strict=True):
                if limit is not None and len(prompt) + self.max_new_tokens > limit:
                    raise SavingsError(
                        f"Request {request.id!r}: its {name} prompt has {len(prompt):,} tokens and its answer may have "
                        f"{self.max_new_tokens:,}, the model's context is {limit:,}. Prompts are never cut: leave "
                        "the request out, shorten the baseline, or lower max_new_tokens."
                    )


def measurement_plan(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    baseline: PromptBaseline | None,
    *,
    scorer: str | Scorer = "normalized",
    max_new_tokens: int = 128,
    max_requests: int | None = None,
    seed: int = 0,
) -> MeasurementPlan:
    """Choose the requests, encode both arms' prompts and check what can be checked without the model.

    Args:
        tokenizer: The model's.
        requests: What to ask, and the right answers.
        baseline: System prompt and examples of the prompted arm.
        scorer: See `lightning_ft.evaluation.scorers.resolve_scorer`.
        max_new_tokens: Limit of every answer.
        max_requests: Ask only so many, drawn by `seed`.
        seed: Of that draw.

    Raises:
        SavingsError: Without baseline or requests; for ids that are missing or stand there twice; for examples that
            are also evaluated; for prompts that are the same in both arms, or that the chat template refuses.
    """
    if baseline is None:
        raise SavingsError(
            "Token savings need a baseline to compare with: pass baseline=PromptBaseline(system=..., few_shot=[...]) "
            "with the prompt that you would use without training."
        )
    if max_new_tokens < 1 or (max_requests is not None and max_requests < 1):
        raise SavingsError(f"max_new_tokens={max_new_tokens}, max_requests={max_requests}: expected at least 1.")
    _check_ids(requests)
    chosen = list(requests)
    if max_requests is not None and max_requests < len(chosen):
        places = sorted(random.Random(seed).sample(range(len(chosen)), max_requests))
        chosen = [chosen[i] for i in places]
    check_no_overlap(baseline, chosen)
    name, score = resolve_scorer(scorer, [r.reference for r in chosen])
    template = chat_template(tokenizer)
    prompted, bare = [], []
    for request in chosen:
        if request.answer is not None and request.answer.get("tool_calls"):
            raise SavingsError(
                f"Request {request.id!r}: its right answer calls tools, and answers are compared as texts. Leave such "
                "rows out of the split, or pass requests= with what the model should write as their reference."
            )
        try:
            kwargs = request.template_kwargs
            bare.append(tuple(encode_prompt(tokenizer, request.messages, template, kwargs)))
            prompted.append(tuple(encode_prompt(tokenizer, baseline.messages(request.messages), template, kwargs)))
        except TokenizerError as error:
            raise SavingsError(f"Request {request.id!r}: {error}") from error
        if prompted[-1] == bare[-1]:
            raise SavingsError(
                f"Request {request.id!r}: its prompt is the same in both arms, so there is nothing to save. Does the "
                "chat template leave the system prompt out?"
            )
    return MeasurementPlan(
        requests=tuple(chosen),
        available=len(requests),
        prompted=_arm(tokenizer, chosen, prompted, baseline),
        bare=_arm(tokenizer, chosen, bare, None),
        scorer=score,
        scorer_name=name,
        max_new_tokens=max_new_tokens,
        baseline_hash=baseline.hash,
        tokenizer=str(getattr(tokenizer, "name_or_path", "")),
    )


def _check_ids(requests: Sequence[Request]) -> None:
    if not requests:
        raise SavingsError("No requests: there is nothing to measure.")
    for place, request in enumerate(requests):
        if not request.id:
            raise SavingsError(f"The request at place {place} has no id.")
    twice = [i for i, count in Counter(r.id for r in requests).items() if count > 1]
    if twice:
        raise SavingsError(f"{len(twice):,} request ids stand there more than once: {', '.join(twice[:5])}.")


def _arm(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    prompts: list[tuple[int, ...]],
    baseline: PromptBaseline | None,
) -> ArmPrompts:
    def tokens(texts: list[str]) -> int:
        return sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    parts = {
        "system": 0 if baseline is None or not baseline.system else len(prompts) * tokens([baseline.system]),
        "few_shot": 0
        if baseline is None or not baseline.few_shot
        else len(prompts) * tokens([turn["content"] for turn in baseline.examples()]),
        "request": tokens([turn["content"] for request in requests for turn in request.messages]),
    }
    total = sum(map(len, prompts))
    # A template may trim white space, and a tokenizer merge over a border: then the texts alone have a few tokens more.
    parts["request"] = min(parts["request"], total - parts["system"] - parts["few_shot"])
    return ArmPrompts(tuple(prompts), {**parts, "template": total - sum(parts.values())}, common_prefix(prompts))
