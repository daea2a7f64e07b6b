"""An arm that an OpenAI-compatible endpoint answers: the model that you pay for now, or the one that you ship."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from lightning_ft.arguments import check_integer
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
    the `openai` client does, which also waits as long as a rate limit says, up to two minutes: a call that should wait
    longer fails.

    Args:
        url: Base URL, such as ``https://api.openai.com/v1`` or ``http://localhost:8000/v1``. It is part of the results,
            so a user, password or query in it is refused: ``options={"extra_headers": {...}}`` is not saved.
        model: Name of the model there.
        api_key_variable: Name of the environment variable with the key; the key itself is never saved. None for a
            server that takes any.
        concurrency: Number of requests at a time.
        timeout: Longest time that the server may send nothing, in seconds.
        max_retries: Number of times that a failed call is repeated.
        options: Further arguments of each call, such as ``{"extra_body": {...}}``; None as a value leaves out one of
            the usual ones (``{"max_tokens": None, "max_completion_tokens": 64}``).

    Raises:
        SavingsError: For a number out of its range, a URL that isn't one or has a secret, and options that an arm sets.

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
        _check_url(self.url)
        if not self.model or not isinstance(self.model, str):
            raise SavingsError("Endpoint: model is empty. Pass the name of the model at the endpoint.")
        check_integer("Endpoint: concurrency", self.concurrency, 1, SavingsError)
        check_integer("Endpoint: max_retries", self.max_retries, 0, SavingsError)
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, (int, float)) or not self.timeout > 0:
            raise SavingsError(f"Endpoint: timeout={self.timeout!r}, expected a number of seconds above 0.")
        if not isinstance(self.options, Mapping):
            raise SavingsError(f"Endpoint: options is a {type(self.options).__name__}, expected a dict of arguments.")
        for name in ("model", "messages", "n", "stream"):
            if self.options.get(name) not in (None, False, 1):
                raise SavingsError(
                    f"Endpoint: options has {name!r}, but the measurement asks one model for one whole "
                    "answer to each request. Leave it out."
                )

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
        key = "none" if self.api_key_variable is None else os.environ.get(self.api_key_variable, "").strip()
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
    arguments: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 0.0, **endpoint.options}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    turns: Any = [dict(message) for message in messages]
    where = f"Request {name!r} to {endpoint.model!r} at {endpoint.url}"
    try:
        response = client.chat.completions.create(model=endpoint.model, messages=turns, **arguments)
    except Exception as error:  # of the client, of what it sends with, or of options that it doesn't take
        reason = _without_secrets(f"{type(error).__name__}: {error}", client.api_key, endpoint.options)[:300]
        raise SavingsError(f"{where} failed (max_retries={endpoint.max_retries}): {reason}") from error
    if (said := _error_in(response)) is not None:  # some servers report it with the status 200
        raise SavingsError(f"{where} failed: {_without_secrets(said, client.api_key, endpoint.options)[:300]}")
    return _checked(response, max_new_tokens, where)


def _error_in(response: Any) -> str | None:
    """The error that a server reports instead of an answer; None if it reports none."""
    if isinstance(response, str):
        return f"the server sent text and not JSON, as for a page: {response.strip()!r:.120}. Check the url."
    if not (error := _part(response, "error")):
        return None
    message = _part(error, "message")
    return f"the response has an error: {error if message is None else message}"


def _without_secrets(text: str, key: str, options: Mapping[str, Any]) -> str:
    """Text of an error, in which a server may repeat the key or a header that it was sent."""
    headers = options.get("extra_headers")
    secrets = [key, *(headers.values() if isinstance(headers, Mapping) else ())]
    for secret in sorted((str(s) for s in secrets if len(str(s)) > len("Bearer ")), key=len, reverse=True):
        text = text.replace(secret, "<secret>")
    return text


def _check_url(url: str) -> None:
    """Refuse what isn't a URL, and one with a secret, since it is written into results and errors."""
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise SavingsError(f"Endpoint: url={url!r}, expected http://... or https://...")
    try:
        parts = urlsplit(url)
        is_complete = bool(parts.hostname) and parts.port != 0  # the port is read here, which may fail
    except ValueError:
        is_complete = False
    if not is_complete:
        raise SavingsError(f"Endpoint: url={url!r} isn't a URL. Expected such as http://localhost:8000/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise SavingsError(
            "Endpoint: url has a user, password, query or fragment. It is written into results, and paths are appended "
            "to it: pass them in options={'extra_headers': {...}} or {'extra_query': {...}}, which aren't saved."
        )


def _part(value: Any, name: str) -> Any:
    """An attribute or item of what a server returned; None if it has none, whatever it is."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _checked(response: Any, max_new_tokens: int, where: str) -> _Answer:
    """Read an answer, and refuse counts that can't be true: costs would be computed from them."""
    choices, usage = _part(response, "choices"), _part(response, "usage")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = _part(choice, "message")
    if message is None or usage is None:
        missing = "no answer" if message is None else "no usage, the counts of its tokens"
        raise SavingsError(f"{where}: the response has {missing}, so it can't be measured.")
    if len(choices) > 1:
        raise SavingsError(f"{where}: the response has {len(choices)} answers and one usage for all of them.")
    text = _part(message, "content") or ""
    if not isinstance(text, str):
        raise SavingsError(f"{where}: its answer is a {type(text).__name__}, expected text.")
    cached = _part(_part(usage, "prompt_tokens_details"), "cached_tokens") or 0
    hidden = _part(_part(usage, "completion_tokens_details"), "reasoning_tokens")
    total = _part(usage, "total_tokens")
    counts = (_part(usage, "prompt_tokens"), _part(usage, "completion_tokens"), cached)
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
        raise SavingsError(f"{where}: its usage {counts} isn't three counts of tokens.")
    if not counts[0] or (text and not counts[1]) or counts[2] > counts[0]:
        raise SavingsError(
            f"{where}: its usage contradicts the answer: {counts[0]} input tokens, {counts[2]} of them cached, and "
            f"{counts[1]} output tokens for {len(text)} characters."
        )
    left_out = total - counts[0] - counts[1] if isinstance(total, int) else 0
    if left_out > 0 or (isinstance(hidden, int) and hidden > counts[1]):
        found = f"{counts[0]} input and {counts[1]} output tokens"
        found += (f", {hidden} of reasoning" if hidden else "") + (f", {total} in total" if left_out > 0 else "")
        if left_out == cached and not hidden:
            remedy = f"The {cached} cached ones aren't among its input tokens: turn its cache of prompts off."
        else:
            remedy = (
                "Tokens of reasoning are paid for, whether counted as output or not. Turn reasoning off with the "
                "server's own argument, such as Endpoint(options={'reasoning_effort': 'none'})."
            )
        raise SavingsError(f"{where}: its usage leaves tokens out: {found}, so costs can't be computed. {remedy}")
    if counts[1] > max_new_tokens:
        raise SavingsError(
            f"{where}: the answer has {counts[1]} tokens, although at most {max_new_tokens} were requested, so the "
            "arms can't be compared. If the server has another name for this limit, pass it in Endpoint(options=...)."
        )
    return _Answer(text, *counts, _part(choice, "finish_reason") == "length")
