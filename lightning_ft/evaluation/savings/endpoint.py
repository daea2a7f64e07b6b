"""An arm that an OpenAI-compatible endpoint answers: the model that you pay for now, or the one that you ship."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.distributed import all_gather_objects, rank_and_world_size
from lightning_ft.errors import MissingDependencyError, SavingsError
from lightning_ft.evaluation.savings.arms import graded
from lightning_ft.evaluation.savings.plan import MeasurementPlan
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.types import Message

if TYPE_CHECKING:
    from openai import OpenAI


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint: a provider, vLLM, `transformers serve`, llama.cpp's server, and so on.

    Tokens are those that it counts (`usage`), cached ones included. Failed calls are repeated with growing delays, as
    the `openai` client does, which also waits as long as a rate limit says.

    Args:
        url: Base URL, such as ``https://api.openai.com/v1`` or ``http://localhost:8000/v1``.
        model: Name of the model there.
        api_key_variable: Name of the environment variable with the key; the key itself is never saved. None for a
            server that takes any.
        concurrency: Number of requests at a time.
        timeout: Longest time to wait for an answer, in seconds.
        max_retries: Number of times that a failed call is repeated.
        options: Further arguments of each call, such as ``{"extra_body": {...}}``; None as a value leaves out one of
            the usual ones (``{"max_tokens": None, "max_completion_tokens": 64}``).

    Raises:
        SavingsError: For a number out of its range, or a URL of another scheme.

    Example:
        >>> Endpoint("http://localhost:8000/v1", "my-model", api_key_variable=None).concurrency
        4
    """

    url: str
    model: str
    api_key_variable: str | None = "OPENAI_API_KEY"
    concurrency: int = 4
    timeout: float = 60.0
    max_retries: int = 5
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise SavingsError(f"Endpoint: url={self.url!r}, expected http://... or https://...")
        if not self.model:
            raise SavingsError("Endpoint: model is empty. Pass the name of the model at the endpoint.")
        for name, least in (("concurrency", 1), ("timeout", 0), ("max_retries", 0)):
            if getattr(self, name) < least:
                raise SavingsError(f"Endpoint: {name}={getattr(self, name)}, expected at least {least}.")

    def client(self) -> OpenAI:
        """A client of the endpoint.

        Raises:
            MissingDependencyError: If `openai` isn't installed.
            SavingsError: If the environment variable of the key isn't set.
        """
        try:
            from openai import OpenAI
        except ImportError as error:
            raise MissingDependencyError(
                "An Endpoint needs the package openai: pip install 'lightning-ft[endpoint]'."
            ) from error
        key = "none" if self.api_key_variable is None else os.environ.get(self.api_key_variable)
        if not key:
            raise SavingsError(
                f"The environment variable {self.api_key_variable} isn't set, and {self.url} needs a key. Set it, or "
                "pass api_key_variable=None for a server that takes any."
            )
        return OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=self.max_retries)


class _Answer(NamedTuple):
    text: str
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    truncated: bool


def endpoint_arm(
    endpoint: Endpoint, plan: MeasurementPlan, baseline: PromptBaseline | None = None, *, progress: bool = True
) -> ArmRecords:
    """Answer the requests of a plan at an endpoint, greedily; the first rank asks for all.

    Args:
        endpoint: The endpoint.
        plan: Plan of the measurement.
        baseline: Prompt before each request; None for the requests alone.
        progress: Whether to show a progress bar.

    Raises:
        SavingsError: If a call fails after all retries, or its answer lacks counts or contradicts itself, for requests
            with tools or structured outputs, and if the scorer fails on an answer.
        MissingDependencyError: If `openai` isn't installed.
    """
    if plan.grammars is not None:
        raise SavingsError(
            "structured_outputs is a format of the arms that run here; pass the server's own to the endpoint: "
            "Endpoint(options={'response_format': ...}), and leave structured_outputs out."
        )
    for request in plan.requests:
        if request.template_kwargs:
            raise SavingsError(
                f"Request {request.id!r} has {', '.join(map(repr, request.template_kwargs))} for the chat template, "
                "which an endpoint doesn't take. Leave it out, or measure without an endpoint."
            )
    found: list[_Answer] | str = []
    if rank_and_world_size()[0] == 0:
        try:
            found = _answers(endpoint, plan, baseline, progress=progress)
        except (SavingsError, MissingDependencyError) as error:
            found = str(error)
    found = all_gather_objects(found)[0] if rank_and_world_size()[1] > 1 else found
    if isinstance(found, str):
        raise SavingsError(found)
    clusters = [r.cluster if r.cluster is not None else f"\0{r.id}" for r in plan.requests]
    outputs = tuple(answer.text for answer in found)
    return ArmRecords(
        ids=tuple(r.id for r in plan.requests),
        input_tokens=tuple(answer.input_tokens for answer in found),
        output_tokens=tuple(answer.output_tokens for answer in found),
        scores=graded(plan, outputs),
        truncated=tuple(answer.truncated for answer in found),
        cached_prefix_tokens=tuple(answer.cached_tokens for answer in found),
        clusters=tuple(clusters) if any(r.cluster is not None for r in plan.requests) else (),
        outputs=outputs,
    )


def _answers(
    endpoint: Endpoint, plan: MeasurementPlan, baseline: PromptBaseline | None, *, progress: bool
) -> list[_Answer]:
    client = endpoint.client()

    def ask(index: int) -> _Answer:
        request = plan.requests[index]
        messages: Sequence[Message] = request.messages
        if baseline is not None:
            messages = baseline.messages(messages, request.prompt_context)
        return _ask(client, endpoint, messages, plan.max_new_tokens, request.id)

    with (
        ThreadPoolExecutor(endpoint.concurrency) as pool,
        tqdm(
            total=len(plan.requests), desc=f"Token savings, {endpoint.model}", disable=not progress, leave=False
        ) as bar,
    ):
        futures = [pool.submit(ask, index) for index in range(len(plan.requests))]
        answers = []
        try:
            for future in futures:
                answers.append(future.result())
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return answers


def _ask(client: OpenAI, endpoint: Endpoint, messages: Sequence[Message], max_new_tokens: int, name: str) -> _Answer:
    import openai

    arguments: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 0.0, **endpoint.options}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    turns: Any = [dict(message) for message in messages]
    where = f"Request {name!r} to {endpoint.model!r} at {endpoint.url}"
    try:
        response = client.chat.completions.create(model=endpoint.model, messages=turns, **arguments)
    except (openai.OpenAIError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise SavingsError(f"{where} failed after {endpoint.max_retries} retries: {reason}") from error
    return _checked(response, max_new_tokens, where)


def _checked(response: Any, max_new_tokens: int, where: str) -> _Answer:
    """Read an answer, and refuse counts that can't be true: costs would be computed from them."""
    choices, usage = getattr(response, "choices", None), getattr(response, "usage", None)
    if not choices or usage is None:
        missing = "no answer" if not choices else "no usage, the counts of its tokens"
        raise SavingsError(f"{where}: the response has {missing}, so it can't be measured.")
    text = choices[0].message.content or ""
    details: Any = getattr(usage, "prompt_tokens_details", None)
    details = details if isinstance(details, Mapping) else vars(details) if details is not None else {}
    counts = (usage.prompt_tokens, usage.completion_tokens, details.get("cached_tokens") or 0)
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
        raise SavingsError(f"{where}: its usage {counts} isn't three counts of tokens.")
    if not counts[0] or (text and not counts[1]) or counts[2] > counts[0]:
        raise SavingsError(
            f"{where}: its usage contradicts the answer: {counts[0]} input tokens, {counts[2]} of them cached, and "
            f"{counts[1]} output tokens for {len(text)} characters."
        )
    if counts[1] > max_new_tokens:
        raise SavingsError(
            f"{where}: the answer has {counts[1]} tokens, although at most {max_new_tokens} were requested, so the "
            "arms can't be compared. If the server has another name for this limit, pass it in Endpoint(options=...)."
        )
    return _Answer(text, *counts, choices[0].finish_reason == "length")
