"""What was counted and scored of one arm, request by request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_ft.errors import SavingsError

PARTS = ("system", "few_shot", "template", "request")
"""Where the input tokens of a request go; `template` is the markup, BOS included."""


@dataclass(frozen=True)
class ArmRecords:
    """One arm's requests. All tuples have ``n`` entries, in one order.

    Args:
        ids: Of the requests, each one once.
        input_tokens: Ids given to generation: template and BOS included, padding not.
        output_tokens: Ids generated, the end token included.
        scores: From 0 to 1.
        truncated: Whether an answer hit the limit of new tokens.
        cached_prefix_tokens: Input tokens that all requests of the arm have in common, which a provider would cache;
            empty for none.
        clusters: What each request belongs to; empty for none.
        outputs: The answers; may be empty.
        parts: Input tokens of all requests together by where they go, see :data:`PARTS`; may be empty.
        first_token_seconds: Time to first token, ``{"cold": ..., "warm": ...}``; may be empty. Equality ignores it.
        prefill_flops: Mean of a request, None where the architecture isn't known.
        kv_cache_bytes: Mean of a request at its last token, None where the architecture isn't known.

    Raises:
        SavingsError: If lengths differ, an id stands there twice, there are no requests, or a number can't be what it
            says.

    Example:
        >>> arm = ArmRecords(("a", "b"), (10, 12), (3, 5), (1.0, 0.0), (False, True))
        >>> arm.tokens, arm.tokens_per_success, arm.truncated_rate
        (30, 30.0, 0.5)
    """

    ids: tuple[str, ...]
    input_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    scores: tuple[float, ...]
    truncated: tuple[bool, ...]
    cached_prefix_tokens: tuple[int, ...] = ()
    clusters: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    parts: Mapping[str, int] = field(default_factory=dict)
    first_token_seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    prefill_flops: float | None = None
    kv_cache_bytes: float | None = None

    def __post_init__(self) -> None:
        n = len(self.ids)
        if not self.cached_prefix_tokens:
            object.__setattr__(self, "cached_prefix_tokens", (0,) * n)
        if n == 0:
            raise SavingsError("No requests: there is nothing to measure.")
        for item in fields(self):
            value = getattr(self, item.name)
            if (
                isinstance(value, tuple)
                and len(value) != n
                and not (item.name in ("clusters", "outputs") and not value)
            ):
                raise SavingsError(f"{item.name} has {len(value)} entries for {n} request ids.")
        twice = [i for i, count in Counter(self.ids).items() if count > 1]
        if twice:
            raise SavingsError(f"{len(twice):,} request ids stand there more than once: {', '.join(twice[:5])}.")
        for i, tokens, out, cached, score in zip(
            self.ids, self.input_tokens, self.output_tokens, self.cached_prefix_tokens, self.scores, strict=True
        ):
            if tokens <= 0 or out < 0 or not 0 <= cached <= tokens:
                raise SavingsError(
                    f"Request {i!r}: {tokens} input tokens, {cached} of them cached, {out} output tokens."
                )
            if not 0 <= score <= 1:  # false for NaN too
                raise SavingsError(f"Request {i!r}: a score of {score}, expected a number from 0 to 1.")

    @property
    def tokens(self) -> int:
        """Input and output tokens of all requests."""
        return sum(self.input_tokens) + sum(self.output_tokens)

    @property
    def quality(self) -> float:
        """Mean score."""
        return sum(self.scores) / len(self.scores)

    @property
    def tokens_per_success(self) -> float:
        """Tokens of all attempts for each success; infinite where nothing succeeded."""
        return self.tokens / sum(self.scores) if any(self.scores) else float("inf")

    @property
    def truncated_rate(self) -> float:
        """Share of answers that hit the limit of new tokens."""
        return sum(self.truncated) / len(self.truncated)

    def ordered(self, ids: tuple[str, ...], name: str) -> ArmRecords:
        """The same requests in another order.

        Args:
            ids: The order.
            name: Of this arm, for the message.

        Raises:
            SavingsError: If the ids aren't the same.
        """
        if ids == self.ids:
            return self
        missing, unknown = sorted(set(ids) - set(self.ids)), sorted(set(self.ids) - set(ids))
        if missing or unknown:
            raise SavingsError(
                f"The arms didn't answer the same requests: {len(missing):,} of the prompted arm's are missing from "
                f"the {name} arm (first: {missing[:3]}), {len(unknown):,} of its own the prompted arm doesn't have "
                f"(first: {unknown[:3]})."
            )
        place = {i: k for k, i in enumerate(self.ids)}
        changed: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            changed[item.name] = tuple(value[place[i]] for i in ids) if isinstance(value, tuple) and value else value
        return ArmRecords(**changed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            name: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v
            for name, v in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ArmRecords:
        """Back from :meth:`to_dict`."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)
