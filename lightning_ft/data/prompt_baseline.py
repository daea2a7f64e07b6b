"""The prompt that fine-tuning should make unnecessary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_ft.arguments import did_you_mean_path
from lightning_ft.errors import SavingsError
from lightning_ft.printable import content_hash
from lightning_ft.types import Message, Request

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class PromptBaseline:
    """System prompt and few-shot examples of the prompted arm.

    Use the best prompt that you have, and fix it before you look at results of the tuned model.

    Args:
        system: System prompt. It precedes the system turn of a request that has one, and the `prompt_context` of one
            that has it.
        few_shot: Few-shot examples, as ``{"input": ..., "output": ...}``, or as messages ``{"role": ..., "content":
            ...}`` that end with an assistant's message.

    Raises:
        SavingsError: If both are empty, or one of them or an example has another format.

    Example:
        >>> baseline = PromptBaseline("Answer yes or no.", [{"input": "Is 7 prime?", "output": "yes"}])
        >>> [m["role"] for m in baseline.messages([Message(role="user", content="Is 8 prime?")])]
        ['system', 'user', 'assistant', 'user']
    """

    system: str = ""
    few_shot: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.system, str):
            raise SavingsError(f"PromptBaseline: system is {self.system!r:.80}: expected one text.")
        if isinstance(self.few_shot, (str, Mapping)) or not isinstance(self.few_shot, Sequence):
            raise SavingsError(
                f"PromptBaseline: few_shot is a {type(self.few_shot).__name__}: expected a list of examples, "
                "[{'input': ..., 'output': ...}]."
            )
        if not self.system.strip() and not self.few_shot:
            raise SavingsError("PromptBaseline is empty: pass system, few_shot, or both.")
        if _is_file(self.system):
            raise SavingsError(
                f"PromptBaseline: system={self.system!r} is a file, and would be sent as these characters. Pass "
                "PromptBaseline.from_file(...) for JSON, or the text that it contains."
            )
        self.examples()

    @classmethod
    def from_file(cls, path: str | Path) -> PromptBaseline:
        """Read ``{"system": ..., "few_shot": [...]}`` from a JSON file; null is as if the key were absent.

        Raises:
            SavingsError: If the file can't be read, or contains something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            text = isinstance(path, str) and not path.endswith(".json")
            hint = " If it is the prompt itself, pass PromptBaseline(system=...)." if text else did_you_mean_path(path)
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
            raise SavingsError(f"PromptBaseline can't be read from {str(path)[:200]!r}: {reason}.{hint}") from error
        if not isinstance(found, dict) or not set(found) <= {"system", "few_shot"}:
            raise SavingsError(f"{str(path)!r}: expected a JSON object with the keys system and few_shot.")
        return cls(**{key: value for key, value in found.items() if value is not None})

    def examples(self) -> list[Message]:
        """Convert the few-shot examples to messages.

        Raises:
            SavingsError: If an example has another format, or the last one has no answer.
        """
        turns: list[Message] = []
        for i, example in enumerate(self.few_shot):
            fields: Mapping[str, Any] = example if isinstance(example, Mapping) else {}
            if set(fields) == {"input", "output"} and all(isinstance(v, str) for v in fields.values()):
                turns.append(Message(role="user", content=fields["input"]))
                turns.append(Message(role="assistant", content=fields["output"]))
            elif set(fields) == {"role", "content"} and fields["role"] in _ROLES and isinstance(fields["content"], str):
                turns.append(Message(role=fields["role"], content=fields["content"]))
            else:
                raise SavingsError(
                    f"PromptBaseline: few_shot[{i}] is {example!r}, expected {{'input': ..., 'output': ...}} or "
                    "{'role': ..., 'content': ...} with strings as values."
                )
        if turns and turns[-1]["role"] != "assistant":
            raise SavingsError(
                "PromptBaseline: the last example of few_shot has no answer. End with an assistant's message."
            )
        return turns

    def messages(self, request: Sequence[Message], context: str | None = None) -> list[Message]:
        """Prepend the system prompt and the few-shot examples to the messages of a request.

        Args:
            request: Messages of the request. Its own system turn follows the system prompt.
            context: Text for this request only, such as candidates or a schema; it ends the system prompt.
        """
        has_own = bool(request) and request[0]["role"] == "system"
        own, rest = (request[0]["content"], list(request[1:])) if has_own else ("", list(request))
        system = "\n\n".join(text for text in (self.system, own, context) if text)
        head = [Message(role="system", content=system)] if system else []
        return [*head, *self.examples(), *rest]

    def is_in(self, request: Sequence[Message]) -> bool:
        """Whether a request's own system turn has the system prompt already, so that it would be read twice.

        Args:
            request: Messages of the request.
        """
        own = request[0]["content"] if request and request[0]["role"] == "system" else ""
        return bool(self.system.strip()) and isinstance(own, str) and _folded(self.system) in _folded(own)

    @property
    def hash(self) -> str:
        """Hash of the content for reports, 16 hexadecimal digits."""
        return content_hash(asdict(self))


def _is_file(text: str) -> bool:
    try:
        return len(text.split()) == 1 and Path(text).is_file()
    except (OSError, ValueError):  # longer than a name of a file may be, or with a NUL character
        return False


def check_no_overlap(baseline: PromptBaseline, requests: Sequence[Request]) -> None:
    """Check that no few-shot example is also evaluated, since the prompt would contain its answer.

    Raises:
        SavingsError: If a request is also a few-shot example; the message names up to five.
    """
    examples = {_folded(turn["content"]) for turn in baseline.examples() if turn["role"] == "user"}
    questions = {r.id: [m["content"] for m in r.messages if m["role"] == "user"][-1:] for r in requests}
    found = [name for name, last in questions.items() if last and _folded(last[0]) in examples]
    if found:
        raise SavingsError(
            f"{len(found):,} evaluation rows are also few-shot examples of the baseline ({', '.join(found[:5])}): "
            "the prompt would contain their answers. Take few-shot examples from the training rows."
        )


def _folded(text: str) -> str:
    """Text without differences in case and white space."""
    return " ".join(text.casefold().split())
