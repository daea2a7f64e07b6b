"""When a completion has ended: by an end token, or by a stop string in its text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from lightning_ft.errors import ConfigError

_MARGIN = 8  # tokens in front of the shortest tail that could hold a stop string


class Ending:
    """Whether completions have ended.

    Only the text of the last tokens is decoded, as many as can be part of a stop string that the newest one completes:
    a token stands for a byte at least. The margin is for tokenizers that write the first tokens of a text differently
    (a leading space left out, the rest of a character cut off).

    Args:
        end_token_ids: Each of them ends a completion.
        stop: So does any of these strings. Special tokens are part of the text.
        tokenizer: Makes text of tokens; needed with `stop`.

    Raises:
        ConfigError: If there is no end token, or `stop` comes without `tokenizer`.

    Example:
        >>> Ending([2])([[5, 2], [5, 6], []])
        [True, False, False]
    """

    def __init__(
        self, end_token_ids: Iterable[int], stop: Sequence[str] = (), tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.end_token_ids = frozenset(end_token_ids)
        self.stop = tuple(stop)
        if not self.end_token_ids:
            raise ConfigError("No end token: an answer would never end.")
        if self.stop and tokenizer is None:
            raise ConfigError(f"stop={self.stop!r} needs the text of what was written: pass the engine a tokenizer=.")
        self._tokenizer = tokenizer
        self._tail = max((len(s.encode()) for s in self.stop), default=0) + _MARGIN

    def __call__(self, answers: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the last token of each completion ended it."""
        ended = [bool(answer) and answer[-1] in self.end_token_ids for answer in answers]
        return [a or b for a, b in zip(ended, self.stopped(answers), strict=True)] if self.stop else ended

    def stopped(self, answers: Sequence[Sequence[int]]) -> list[bool]:
        """Whether a stop string stands at the end of each completion, in the text of its last tokens."""
        if not self.stop or self._tokenizer is None:
            return [False] * len(answers)
        texts = self._tokenizer.batch_decode([list(answer[-self._tail :]) for answer in answers])
        return [any(s in text for s in self.stop) for text in texts]
