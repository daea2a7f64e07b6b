"""Plan of a measurement, validated before generation: requests, prompts of the arms, and scorer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from lightning_ft.arguments import check_requests
from lightning_ft.data.encode import encode_prompt
from lightning_ft.data.prompt_baseline import PromptBaseline, check_no_overlap
from lightning_ft.data.templates import ChatTemplate, chat_template
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ConfigError, SavingsError, TokenizerError
from lightning_ft.evaluation.scorers import SCORERS, Scorer, is_json, normalize_text, resolve_scorer
from lightning_ft.printable import content_hash
from lightning_ft.rollout.protocol import common_prefix
from lightning_ft.rollout.structured import StructuredOutputs, check_grammar
from lightning_ft.types import Message, Request


@dataclass(frozen=True)
class ArmPrompts:
    """The prompts of one arm.

    Args:
        prompts: Token ids of the prompt of each request, as passed to generation.
        parts: Number of tokens of all prompts by part: ``system``, ``few_shot`` and ``request`` count the tokens of the
            texts alone, ``template`` all others.
        prefix_length: Number of tokens in the common prefix of all prompts.
    """

    prompts: tuple[tuple[int, ...], ...]
    parts: dict[str, int]
    prefix_length: int


@dataclass(frozen=True)
class MeasurementPlan:
    """Validated requests and prompts of a measurement.

    Args:
        requests: Requests to measure, ``n``.
        available: Number of requests from which these were sampled.
        prompted: Prompts of the prompted arm, with system prompt and few-shot examples; None if only answers to the
            requests alone are measured.
        bare: Prompts of the tuned and untuned arms, with the request alone.
        scorer: Function that grades an answer against its reference.
        scorer_name: Name of the scorer in messages and reports.
        max_new_tokens: Maximum number of tokens per answer.
        baseline_hash: Hash of the baseline.
        grammars: Grammar of the answers to each request; None if they are free text.
        tokenizer: Name of the tokenizer.
    """

    requests: tuple[Request, ...]
    available: int
    prompted: ArmPrompts | None
    bare: ArmPrompts
    scorer: Scorer
    scorer_name: str
    max_new_tokens: int
    baseline_hash: str
    tokenizer: str
    grammars: tuple[str, ...] | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of everything that has to be the same for all arms: prompts, references, clusters, scorer and limit."""
        return content_hash(
            [
                [[list(prompt) for prompt in arm.prompts] for arm in self._arms.values()],
                [[r.id, r.reference, r.cluster] for r in self.requests],
                self.scorer_name,
                self.max_new_tokens,
                *([] if self.grammars is None else [list(self.grammars)]),
            ]
        )

    @property
    def _arms(self) -> dict[str, ArmPrompts]:
        arms = {} if self.prompted is None else {"prompted": self.prompted}
        return {**arms, "tuned": self.bare}

    def check_context(self, limit: int | None, *, prompted: bool = True) -> None:
        """Check that each prompt and its answer fit into the model's context; prompts are never truncated.

        Args:
            limit: Number of tokens in the model's context; None if it is unknown.
            prompted: Whether the prompted arm is answered by this model.

        Raises:
            SavingsError: If a request doesn't fit; the message names the first one.
        """
        for name, arm in self._arms.items():
            if name == "prompted" and not prompted:
                continue
            for request, prompt in zip(self.requests, arm.prompts, strict=True):
                if limit is not None and len(prompt) + self.max_new_tokens > limit:
                    raise SavingsError(
                        f"Request {request.id!r}: its prompt in the {name} arm has {len(prompt):,} tokens and its "
                        f"answer up to max_new_tokens={self.max_new_tokens}, which exceeds the model's context of "
                        f"{limit:,} tokens. Prompts are never truncated: leave the request out, shorten the baseline, "
                        "or lower max_new_tokens."
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
    structured_outputs: StructuredOutputs | Mapping[str, object] | bool = False,
) -> MeasurementPlan:
    """Sample the requests, encode the prompts of the arms and check everything that doesn't depend on the model.

    Args:
        tokenizer: Tokenizer of the model.
        requests: Requests with their reference answers.
        baseline: System prompt and few-shot examples of the prompted arm.
        scorer: Scorer or its name, see :func:`lightning_ft.evaluation.scorers.resolve_scorer`.
        max_new_tokens: Maximum number of tokens per answer.
        max_requests: Maximum number of requests, sampled with `seed` if there are more; None for all.
        seed: Seed of the sample.
        structured_outputs: Format of all answers of all arms; True for the `structured_output` of each request.

    Raises:
        SavingsError: If there is no baseline or no request, an id is missing or not unique, a few-shot example is also
            evaluated, requests have the baseline already, or a prompt is the same in both arms or refused by the chat
            template.
    """
    if baseline is None:
        raise SavingsError(
            "Token savings need a baseline to compare with: pass baseline=PromptBaseline(system=..., few_shot=[...]) "
            "with the prompt that you would use without training."
        )
    plan = answer_plan(
        tokenizer,
        requests,
        scorer=scorer,
        max_new_tokens=max_new_tokens,
        max_requests=max_requests,
        seed=seed,
        structured_outputs=structured_outputs,
    )
    check_no_overlap(baseline, plan.requests)
    if having := [request.id for request in plan.requests if baseline.is_in(request.messages)]:
        raise SavingsError(
            f"The system turn of {len(having):,} requests has the prompt of the baseline already "
            f"({', '.join(having[:5])}), so both arms would read it, the prompted arm twice. Leave it out of the rows."
        )
    template, prompted = chat_template(tokenizer), []
    for request, bare in zip(plan.requests, plan.bare.prompts, strict=True):
        messages = baseline.messages(request.messages, request.prompt_context)
        prompted.append(_encode(tokenizer, request, messages, template))
        if prompted[-1] == bare:
            raise SavingsError(
                f"Request {request.id!r}: its prompt is the same in both arms, so there is nothing to save. Check "
                "whether the chat template ignores the system prompt."
            )
    return replace(plan, prompted=_arm(tokenizer, plan.requests, prompted, baseline), baseline_hash=baseline.hash)


def answer_plan(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    scorer: str | Scorer = "normalized",
    max_new_tokens: int = 128,
    max_requests: int | None = None,
    seed: int = 0,
    structured_outputs: StructuredOutputs | Mapping[str, object] | bool = False,
) -> MeasurementPlan:
    """Plan the measurement of answers to the requests alone, without a prompt to compare with.

    Takes the arguments of :func:`measurement_plan`, but no baseline.

    Raises:
        SavingsError: If there is no request, an id is missing or not unique, a prompt is refused by the template, or
            a reference isn't JSON for the scorer ``"json"``.
    """
    if max_new_tokens < 1 or (max_requests is not None and max_requests < 1):
        raise SavingsError(f"max_new_tokens={max_new_tokens}, max_requests={max_requests}: expected at least 1.")
    _check_ids(requests)
    chosen = list(requests)
    if max_requests is not None and max_requests < len(chosen):
        indices = sorted(random.Random(seed).sample(range(len(chosen)), max_requests))
        chosen = [chosen[i] for i in indices]
    grammars = _grammars(chosen, structured_outputs)
    name, grade = resolve_scorer(scorer, [r.reference for r in chosen])
    template, bare = chat_template(tokenizer), []
    for request in chosen:
        if request.answer is not None and request.answer.get("tool_calls"):
            raise SavingsError(
                f"Request {request.id!r}: its reference answer calls tools, but answers are compared as text. Leave "
                "such rows out of the split, or pass requests= whose reference is the text that the model should write."
            )
        bare.append(_encode(tokenizer, request, request.messages, template))
    if name == "json":
        _check_json(chosen)
    if name in SCORERS:
        _warn_of_long_references(tokenizer, chosen, name, max_new_tokens)
    return MeasurementPlan(
        requests=tuple(chosen),
        available=len(requests),
        prompted=None,
        bare=_arm(tokenizer, chosen, bare, None),
        scorer=grade,
        scorer_name=name,
        max_new_tokens=max_new_tokens,
        baseline_hash="",
        tokenizer=str(getattr(tokenizer, "name_or_path", "")),
        grammars=grammars,
    )


def _check_json(requests: Sequence[Request]) -> None:
    """Refuse references that the scorer can't read, before any answer is generated."""
    bad = [request for request in requests if not is_json(request.reference)]
    if bad:
        raise SavingsError(
            f"scorer='json': the references of {len(bad):,} of {len(requests):,} requests aren't JSON, such as "
            f"{bad[0].reference[:60]!r} of {bad[0].id!r}, so no answer could equal them. Correct these rows, or pass "
            "another scorer, such as 'normalized'."
        )


def _warn_of_long_references(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], scorer: str, max_new_tokens: int
) -> None:
    """Warn of reference answers that no answer can equal, since it is cut off before."""
    lengths = [len(tokenizer(r.reference.strip(), add_special_tokens=False)["input_ids"]) for r in requests]
    if longer := [length for length in lengths if length > max_new_tokens]:
        rank_zero_warn(
            f"{len(longer):,} of {len(lengths):,} reference answers have more than max_new_tokens={max_new_tokens} "
            f"tokens, so answers to these requests are cut off, and the scorer {scorer} grades them as wrong. Raise "
            f"max_new_tokens; the longest has {max(longer):,} tokens."
        )


def _encode(
    tokenizer: PreTrainedTokenizerBase, request: Request, messages: Sequence[Message], template: ChatTemplate
) -> tuple[int, ...]:
    try:
        return tuple(encode_prompt(tokenizer, messages, template, request.template_kwargs))
    except TokenizerError as error:
        raise SavingsError(f"Request {request.id!r}: {error}") from error


def _grammars(
    requests: Sequence[Request], structured_outputs: StructuredOutputs | Mapping[str, object] | bool | None
) -> tuple[str, ...] | None:
    if structured_outputs is None or structured_outputs is False:
        return None
    try:
        if isinstance(structured_outputs, Mapping):
            structured_outputs = StructuredOutputs.from_dict(structured_outputs)
        if isinstance(structured_outputs, StructuredOutputs):
            grammar = structured_outputs.grammar()
            check_grammar(grammar)
            _check_reachable(requests, structured_outputs)
            return (grammar,) * len(requests)
    except ConfigError as error:
        raise SavingsError(f"structured_outputs: {error}") from error
    if structured_outputs is not True:
        raise SavingsError(
            f"structured_outputs={structured_outputs!r:.80}: expected StructuredOutputs(choices=[...]) or the like, "
            "True for the structured_output of each request, or False."
        )
    grammars: list[str] = []
    checked: set[str] = set()  # many requests may have the same format
    for request in requests:
        if not request.structured_output:
            raise SavingsError(
                f"Request {request.id!r} has no structured_output, which structured_outputs=True takes from each "
                "request. Add it to the row, such as {'choices': ['yes', 'no']}, or pass one StructuredOutputs for all."
            )
        try:
            grammars.append(StructuredOutputs.from_dict(request.structured_output).grammar())
            if grammars[-1] not in checked:
                check_grammar(grammars[-1])
                checked.add(grammars[-1])
        except ConfigError as error:
            raise SavingsError(f"Request {request.id!r}: {error}") from error
    return tuple(grammars)


def _check_reachable(requests: Sequence[Request], structured_outputs: StructuredOutputs) -> None:
    """Refuse choices of which none is a reference, up to case and white space."""
    if structured_outputs.choices is None:
        return
    choices = {normalize_text(choice) for choice in structured_outputs.choices}
    if not any(normalize_text(request.reference) in choices for request in requests):
        first = requests[0]
        raise SavingsError(
            f"structured_outputs: none of the {len(choices):,} choices is the reference of any request, such as "
            f"{first.reference[:60]!r} of {first.id!r}, so no answer could be right. Pass the possible answers."
        )


def _check_ids(requests: Sequence[Request]) -> None:
    check_requests(requests, SavingsError)
    if not requests:
        raise SavingsError("No requests: there is nothing to measure. Pass at least one.")
    for index, request in enumerate(requests):
        if not request.id:
            raise SavingsError(f"requests[{index}] has no id. Give each request an id of its own.")
    repeated = [i for i, count in Counter(r.id for r in requests).items() if count > 1]
    if repeated:
        raise SavingsError(
            f"{len(repeated):,} request ids appear more than once: {', '.join(repeated[:5])}. Give each "
            "request an id of its own."
        )


def _system_tokens(baseline: PromptBaseline, requests: Sequence[Request], tokens: Callable[[list[str]], int]) -> int:
    """Number of tokens in the system prompts, with the context of each request."""
    contexts = [request.prompt_context for request in requests if request.prompt_context]
    same = len(requests) * tokens([baseline.system]) if baseline.system else 0
    return same + (tokens(contexts) if contexts else 0)


def _arm(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    prompts: list[tuple[int, ...]],
    baseline: PromptBaseline | None,
) -> ArmPrompts:
    def tokens(texts: list[str]) -> int:
        return sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    parts = {
        "system": 0 if baseline is None else _system_tokens(baseline, requests, tokens),
        "few_shot": 0
        if baseline is None or not baseline.few_shot
        else len(prompts) * tokens([turn["content"] for turn in baseline.examples()]),
        "request": tokens([turn["content"] for request in requests for turn in request.messages]),
    }
    total = sum(map(len, prompts))
    # If the template strips white space or the tokenizer merges across a boundary, the texts alone have more tokens.
    parts["request"] = min(parts["request"], total - parts["system"] - parts["few_shot"])
    return ArmPrompts(tuple(prompts), {**parts, "template": total - sum(parts.values())}, common_prefix(prompts))
