"""Records of one arm: token counts, scores and answers per request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_ft.errors import SavingsError

PARTS = ("system", "few_shot", "template", "request")
"""Parts of the input tokens of a request; `template` is the markup of the chat template, BOS included."""


@dataclass(frozen=True)
class ArmRecords:
    """Records of one arm. Each tuple has ``n`` entries, one per request and in the same order.

    Args:
        ids: Unique id of each request.
        input_tokens: Number of prompt tokens of each request, with chat template and BOS, without padding.
        output_tokens: Number of generated tokens of each request, with the end token.
        scores: Score of each answer, from 0 to 1.
        truncated: Whether each answer hit the limit of new tokens.
        cached_prefix_tokens: Number of input tokens of each request in the common prefix of the arm, which a provider
            would cache; if empty, 0 for each request.
        clusters: Cluster of each request; empty if requests are independent.
        outputs: Answer to each request; may be empty.
        parts: Number of input tokens of all requests by part, see :data:`PARTS`; may be empty.
        first_token_seconds: Times to first token in seconds, ``{"cold": (...), "warm": (...)}``: one per timed request,
            the same requests in each arm and in the same order; may be empty. Ignored in comparisons for equality.
        prefill_flops: Mean number of operations to process a prompt; None if unknown for the architecture.
        kv_cache_bytes: Mean size of the KV cache after the last token, in bytes; None if unknown for the architecture.

    Raises:
        SavingsError: If there are no requests, ids aren't unique, lengths differ, or a number is out of range.

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
    first_token_seconds: Mapping[str, Sequence[float]] = field(default_factory=dict, compare=False)
    prefill_flops: float | None = None
    kv_cache_bytes: float | None = None

    def __post_init__(self) -> None:
        n = len(self.ids)
        if not self.cached_prefix_tokens:
            object.__setattr__(self, "cached_prefix_tokens", (0,) * n)
        if n == 0:
            raise SavingsError("No requests: there is nothing to measure. Pass at least one.")
        for item in fields(self):
            value = getattr(self, item.name)
            if (
                isinstance(value, tuple)
                and len(value) != n
                and not (item.name in ("clusters", "outputs") and not value)
            ):
                raise SavingsError(f"{item.name} has {len(value)} entries for {n} request ids. Pass one per request.")
        repeated = [i for i, count in Counter(self.ids).items() if count > 1]
        if repeated:
            raise SavingsError(
                f"{len(repeated):,} request ids appear more than once: {', '.join(repeated[:5])}. Ids must be unique."
            )
        for i, tokens, out, cached, score in zip(
            self.ids, self.input_tokens, self.output_tokens, self.cached_prefix_tokens, self.scores, strict=True
        ):
            if tokens <= 0 or out < 0 or not 0 <= cached <= tokens:
                raise SavingsError(
                    f"Request {i!r} has {tokens} input tokens, {cached} of them cached, and {out} output tokens; "
                    "expected at least 1 input token, 0 to all of them cached, and at least 0 output tokens."
                )
            if not 0 <= score <= 1:  # false for NaN too
                raise SavingsError(f"Request {i!r} has a score of {score}; expected a number from 0 to 1.")

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
        """Tokens of all requests divided by the sum of the scores; infinite if all scores are 0."""
        return self.tokens / sum(self.scores) if any(self.scores) else float("inf")

    @property
    def truncated_rate(self) -> float:
        """Share of answers that hit the limit of new tokens."""
        return sum(self.truncated) / len(self.truncated)

    def ordered(self, ids: tuple[str, ...], name: str) -> ArmRecords:
        """Reorder the requests.

        Args:
            ids: Ids of the same requests in the new order.
            name: Name of this arm, for the error message.

        Raises:
            SavingsError: If `ids` are of other requests.
        """
        if ids == self.ids:
            return self
        missing, unknown = sorted(set(ids) - set(self.ids)), sorted(set(self.ids) - set(ids))
        if missing or unknown:
            raise SavingsError(
                f"The arms answered different requests: {len(missing):,} requests are missing from the {name} arm "
                f"(first: {missing[:3]}), and {len(unknown):,} are only in it (first: {unknown[:3]}). Pass the same "
                "requests to each arm."
            )
        index = {i: k for k, i in enumerate(self.ids)}
        changed: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            changed[item.name] = tuple(value[index[i]] for i in ids) if isinstance(value, tuple) and value else value
        return ArmRecords(**changed)

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["first_token_seconds"] = {name: list(times) for name, times in self.first_token_seconds.items()}
        return {
            name: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v
            for name, v in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ArmRecords:
        """Restore records from :meth:`to_dict`."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        times = fields.get("first_token_seconds", {}).items()  # older files have the median alone
        fields["first_token_seconds"] = {name: (t,) if isinstance(t, float) else tuple(t) for name, t in times}
        return cls(**fields)
