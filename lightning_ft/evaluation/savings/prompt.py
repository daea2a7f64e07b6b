"""The prompt that fine-tuning is to make unnecessary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_ft.errors import SavingsError
from lightning_ft.types import Message, Request

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class PromptBaseline:
    """System prompt and examples of the prompted arm. Freeze the best ones you have before you look at the tuned model.

    Args:
        system: The system prompt. It stands before a system turn that a request brings itself.
        few_shot: Examples, as ``{"input": ..., "output": ...}``, or as messages ``{"role": ..., "content": ...}`` that
            end with an assistant's.

    Raises:
        SavingsError: If both are empty, or an example has another form.

    Example:
        >>> baseline = PromptBaseline("Answer yes or no.", [{"input": "Is 7 prime?", "output": "yes"}])
        >>> [m["role"] for m in baseline.messages([Message(role="user", content="Is 8 prime?")])]
        ['system', 'user', 'assistant', 'user']
    """

    system: str = ""
    few_shot: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.system.strip() and not self.few_shot:
            raise SavingsError("PromptBaseline is empty: give a system prompt, examples, or both.")
        self.examples()

    @classmethod
    def from_file(cls, path: str | Path) -> PromptBaseline:
        """Read ``{"system": ..., "few_shot": [...]}`` from a JSON file.

        Raises:
            SavingsError: If it isn't there, or holds something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SavingsError(f"PromptBaseline can't be read from {str(path)!r}: {error}") from error
        if not isinstance(found, dict) or not set(found) <= {"system", "few_shot"}:
            raise SavingsError(f"{str(path)!r}: expected a JSON object with system and few_shot.")
        return cls(found.get("system", ""), found.get("few_shot", []))

    def examples(self) -> list[Message]:
        """The examples as turns.

        Raises:
            SavingsError: If one has another form than it should.
        """
        turns: list[Message] = []
        for i, example in enumerate(self.few_shot):
            given: Mapping[str, Any] = example if isinstance(example, Mapping) else {}
            if set(given) == {"input", "output"} and all(isinstance(v, str) for v in given.values()):
                turns.append(Message(role="user", content=given["input"]))
                turns.append(Message(role="assistant", content=given["output"]))
            elif set(given) == {"role", "content"} and given["role"] in _ROLES and isinstance(given["content"], str):
                turns.append(Message(role=given["role"], content=given["content"]))
            else:
                raise SavingsError(
                    f"PromptBaseline: few_shot[{i}] is {example!r}, expected {{'input': ..., 'output': ...}} or "
                    "{'role': ..., 'content': ...} with texts."
                )
        if turns and turns[-1]["role"] != "assistant":
            raise SavingsError("PromptBaseline: the last example has no answer.")
        return turns

    def messages(self, request: Sequence[Message]) -> list[Message]:
        """A request's conversation with system prompt and examples before it."""
        has_own = bool(request) and request[0]["role"] == "system"
        own, rest = (request[0]["content"], list(request[1:])) if has_own else ("", list(request))
        system = "\n\n".join(text for text in (self.system, own) if text)
        head = [Message(role="system", content=system)] if system else []
        return [*head, *self.examples(), *rest]

    @property
    def hash(self) -> str:
        """Names what is in it, for reports: 16 hexadecimal digits."""
        return content_hash(asdict(self))


def content_hash(value: Any) -> str:
    """16 hexadecimal digits that name a value made of JSON types.

    Example:
        >>> content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
        True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_no_overlap(baseline: PromptBaseline, requests: Sequence[Request]) -> None:
    """Refuse examples that are also evaluated: the prompt would hold the answer.

    Raises:
        SavingsError: With the requests that are among the examples.
    """
    shown = {_folded(turn["content"]) for turn in baseline.examples() if turn["role"] == "user"}
    asked = {r.id: [m["content"] for m in r.messages if m["role"] == "user"][-1:] for r in requests}
    found = [name for name, last in asked.items() if last and _folded(last[0]) in shown]
    if found:
        raise SavingsError(
            f"{len(found):,} evaluation rows are also few-shot examples of the baseline ({', '.join(found[:5])}): "
            "the prompt would hold their answers. Take examples from the training rows."
        )


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
