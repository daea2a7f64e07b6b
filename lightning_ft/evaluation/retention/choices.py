"""Multiple-choice questions as a measure of forgetting: what share does the model answer correctly, before and after?

The answer of a model is the choice with the highest log-likelihood per byte as a continuation of the question, the
``acc_norm`` of lm-evaluation-harness (Gao et al. 2021, https://doi.org/10.5281/zenodo.5371628).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.layout import Example
from lightning_ft.errors import RetentionError
from lightning_ft.evaluation.bootstrap import Interval, bootstrap_intervals

ALL = "all"
"""Name of the set that contains all questions."""


@dataclass(frozen=True)
class ChoiceQuestion:
    r"""A multiple-choice question.

    Args:
        input: Text before the choice, such as ``"Q: What is the capital of France?\nA:"``; a space follows.
        choices: Possible continuations.
        answer: Index of the correct one.
        set: Name of the set that it belongs to.

    Raises:
        RetentionError: If there are fewer than two choices, an empty or repeated one, or no choice of that index.
    """

    input: str
    choices: tuple[str, ...]
    answer: int
    set: str = "questions"

    def __post_init__(self) -> None:
        choices = self.choices
        if not isinstance(self.input, str) or not self.input.strip():
            raise RetentionError(f'"input" is {self.input!r:.80}: expected a text.')
        if not isinstance(choices, (list, tuple)) or not all(isinstance(c, str) and c.strip() for c in choices):
            raise RetentionError(f'"choices" is {choices!r:.80}: expected a list of texts that aren\'t empty.')
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise RetentionError(f'"choices" is {choices!r:.80}: expected at least two, none of them twice.')
        if isinstance(self.answer, bool) or not isinstance(self.answer, int) or not 0 <= self.answer < len(choices):
            raise RetentionError(f'"answer" is {self.answer!r}: expected an index from 0 to {len(choices) - 1}.')
        if not isinstance(self.set, str) or self.set in ("", ALL):
            raise RetentionError(f'"set" is {self.set!r:.80}: expected a name other than {ALL!r}.')
        object.__setattr__(self, "choices", tuple(choices))


def load_choices(source: str | Path | Sequence[ChoiceQuestion]) -> list[ChoiceQuestion]:
    r"""Load multiple-choice questions.

    Args:
        source: JSONL file whose rows have ``input``, ``choices``, ``answer`` (an index) and optionally ``set``; or a
            list of questions.

    Raises:
        RetentionError: If the file can't be read, a row isn't a question, or there are none.

    Example:
        >>> len(load_choices([ChoiceQuestion("Q: 1 + 1?\nA:", ("2", "3"), 0)]))
        1
    """
    questions = _read(Path(source)) if isinstance(source, (str, Path)) else list(source)
    for index, question in enumerate(questions):
        if not isinstance(question, ChoiceQuestion):
            raise RetentionError(f"choices[{index}] is of type {type(question).__name__}: expected ChoiceQuestion.")
    if not questions:
        raise RetentionError(f"choices={str(source)!r} contains no questions. Add at least one, or leave it out.")
    return questions


def _read(path: Path) -> list[ChoiceQuestion]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RetentionError(f"The questions {str(path)!r} can't be read as UTF-8 text: {error}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            known = {name: row[name] for name in ("input", "choices", "answer", "set") if name in row}
            questions.append(ChoiceQuestion(**known))
        except RetentionError as error:
            raise RetentionError(f"{path}, line {number}: {error}") from error
        except (ValueError, TypeError) as error:
            fields = '{"input": ..., "choices": [...], "answer": 0}'
            raise RetentionError(f"{path}, line {number}: not a question ({error}). Expected {fields}.") from error
    return questions


def encode_choices(tokenizer: PreTrainedTokenizerBase, questions: Sequence[ChoiceQuestion]) -> list[Example]:
    """Encode each choice of each question after its question, with the choice's tokens supervised.

    Args:
        tokenizer: Tokenizer of the model.
        questions: Questions.

    Raises:
        RetentionError: If a choice adds no token of its own.

    Returns:
        The examples of the first question's choices, then those of the second's, and so on.
    """
    examples = []
    for index, question in enumerate(questions):
        before = _without_end(tokenizer, tokenizer(question.input, verbose=False)["input_ids"])
        start = len(before)
        for choice in question.choices:
            ids = _without_end(tokenizer, tokenizer(f"{question.input} {choice}", verbose=False)["input_ids"])
            if len(ids) <= start or not start:
                raise RetentionError(f"Question {index}: the choice {choice!r:.80} has no token after the question's.")
            supervised = torch.arange(len(ids)) >= start
            examples.append(Example(torch.tensor(ids, dtype=torch.int64), supervised))
    return examples


def _without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Token ids without an end token that the tokenizer appends to every text."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def correct_answers(questions: Sequence[ChoiceQuestion], nll: Sequence[float]) -> tuple[bool, ...]:
    r"""Whether the most probable choice of each question, per byte, is the correct one; the first of equals counts.

    Args:
        questions: Questions.
        nll: Negative log-likelihood of each choice of each question, in nats.

    Raises:
        RetentionError: If a likelihood isn't a number.

    Example:
        >>> question = ChoiceQuestion("Q: The colors of the sky?\nA:", ("red", "blue and white"), 1)
        >>> correct_answers([question], [6.0, 14.0])
        (True,)
    """
    correct, start = [], 0
    for index, question in enumerate(questions):
        found = nll[start : start + len(question.choices)]
        start += len(question.choices)
        if any(value != value for value in found):
            raise RetentionError(f"The likelihood of a choice of question {index} isn't a number: the weights are NaN.")
        per_byte = [value / len(choice.encode()) for value, choice in zip(found, question.choices, strict=True)]
        correct.append(per_byte.index(min(per_byte)) == question.answer)
    return tuple(correct)


@dataclass(frozen=True)
class ChoiceResult:
    """Answers to the questions of one set.

    Args:
        questions: Number of questions.
        chance: Expected share of correct answers when choosing at random.
        base: Share of correct answers of the base.
        tuned: Share of correct answers of the tuned model.
        lost: The difference, base minus tuned; negative if the tuned model is better.
    """

    questions: int
    chance: float
    base: Interval
    tuned: Interval
    lost: Interval

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChoiceResult:
        """Restore a result from :meth:`to_dict`."""
        intervals = {name: Interval.from_dict(values[name]) for name in ("base", "tuned", "lost")}
        return cls(values["questions"], values["chance"], **intervals)


def compare_choices(
    questions: Sequence[ChoiceQuestion],
    base: Sequence[bool],
    tuned: Sequence[bool],
    *,
    resamples: int = 9999,
    seed: int = 0,
) -> dict[str, ChoiceResult]:
    r"""Compare the answers of two models, with intervals by a paired bootstrap over questions.

    Args:
        questions: Questions.
        base: Whether the base answers each question correctly.
        tuned: Whether the tuned model does.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        The result of each set by name, and of all questions as ``"all"``.

    Example:
        >>> questions = [ChoiceQuestion("Q: 1 + 1?\nA:", ("2", "3"), 0)] * 4
        >>> result = compare_choices(questions, [True, True, True, False], [True, False, False, False])["all"]
        >>> result.base.value, result.tuned.value, result.lost.value, result.chance
        (0.75, 0.25, 0.5, 0.5)
    """
    sets: dict[str, list[int]] = {ALL: list(range(len(questions)))}
    for index, question in enumerate(questions):
        sets.setdefault(question.set, []).append(index)
    found = {}
    for name, members in sets.items():
        columns = {
            "base": [float(base[i]) for i in members],
            "tuned": [float(tuned[i]) for i in members],
            "n": [1.0] * len(members),
        }
        statistics = {
            "base": lambda s: s["base"] / s["n"],
            "tuned": lambda s: s["tuned"] / s["n"],
            "lost": lambda s: (s["base"] - s["tuned"]) / s["n"],
        }
        chance = sum(1 / len(questions[i].choices) for i in members) / len(members)
        intervals = bootstrap_intervals(columns, statistics, resamples=resamples, seed=seed)
        found[name] = ChoiceResult(len(members), chance, **intervals)
    return found
