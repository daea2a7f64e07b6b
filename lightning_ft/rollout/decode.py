"""The decoding loop: sequences are written from prompts that were read once, and leave the batch as they end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.errors import ConfigError
from lightning_ft.models.head import CausalLM, attention_bias, base_of, input_device
from lightning_ft.read_errors import first_line
from lightning_ft.rollout.cache import GrowingCache, cache_layers
from lightning_ft.rollout.protocol import Completion
from lightning_ft.rollout.sampling import TokenSampler
from lightning_ft.rollout.shared_rows import Forward, ReadPrompts, SharedRows


def next_logits(
    model: CausalLM, ids: Tensor, cache: GrowingCache, positions: Tensor, mask: Tensor | None, last: int = 1
) -> Tensor:
    """Run tokens through a model and keep their keys and values.

    Args:
        model: The model.
        ids: New tokens, ``int64 [b, t]``.
        cache: Holds `p` places of each row; `t` are added.
        positions: Of the new tokens, ``int64 [b, t]``.
        mask: Which places are tokens, ``[b, p + t]``, or what each new token sees, ``bool [b, 1, t, p + t]``; None if
            all are, and each sees those before it.
        last: Places at the end of each row whose logits are wanted.

    Returns:
        Logits behind them, ``fp32 [b, last, vocabulary]``.
    """
    base = base_of(model)
    device = input_device(model)
    options = {_cache_argument(base): cache}
    if mask is not None:
        mask = mask.to(device)
        mask = attention_bias(base, mask) if mask.ndim == 4 else mask
    out = base(  # the base and not the PEFT wrapper, around which FSDP2 would not gather the weights
        input_ids=ids.to(device),
        attention_mask=mask,
        position_ids=positions.to(device),
        use_cache=True,
        logits_to_keep=last,
        **options,
    )
    behind: Tensor = out.logits[:, -last:].float()
    return behind


def idle_pass(model: CausalLM) -> None:
    """One token through a model, for nothing but the weights that its ranks gather."""
    base_of(model)(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=input_device(model)), use_cache=False)


def read_tokens(model: CausalLM, tokens: list[int], layers: int) -> GrowingCache:
    """A cache of one row with these tokens."""
    cache = GrowingCache(layers)
    next_logits(model, torch.tensor([tokens]), cache, torch.arange(len(tokens))[None], None)
    return cache


def cached_layers(model: CausalLM, tokens: int) -> tuple[int, str | None]:
    """Number of layers of the cache, and why it can't be used for rows of so many tokens (None if it can)."""
    base = base_of(model)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return 0, "its adapter puts tokens of its own before every prompt"
    accepted = inspect.signature(base.forward).parameters
    for name in ("position_ids", _cache_argument(base), "logits_to_keep"):
        if name not in accepted:
            return 0, f"its forward pass takes no {name}"
    try:
        return cache_layers(base.config, tokens)
    except Exception as error:  # configurations that no cache of transformers can be made from
        return 0, f"no cache can be made from its configuration ({type(error).__name__}: {first_line(error)})"


def _cache_argument(base: PreTrainedModel) -> str:
    """What the model's forward pass calls its cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


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


def decode_parts(
    read: ReadPrompts,
    parts: Sequence[int],
    write: Callable[[SharedRows], list[Completion]],
    *,
    max_new_tokens: int,
    width: int | None,
) -> list[list[Completion]]:
    """Write several completions of each prompt, some of them at a time, from prompts that were read once.

    Args:
        read: `b` prompts.
        parts: How many completions of each prompt are written together, part by part.
        write: :func:`decode`, for the sequences that it is given.
        max_new_tokens: At most so many for each.
        width: Sequences of a row of the cache, see :class:`SharedRows`.

    Returns:
        For each part its ``b * part`` completions, those of one prompt side by side.
    """
    done = []
    for left, size in zip(reversed(range(len(parts))), parts, strict=True):
        bundles = SharedRows(read, times=size, last=not left, ahead=max_new_tokens, width=width)
        if not left:
            del read  # while the last part is written its memory is free
        done.append(write(bundles))
        del bundles
    return done


def decode(
    forward: Forward, bundles: SharedRows, sampler: TokenSampler, ending: Ending, max_new_tokens: int
) -> list[Completion]:
    """Write one completion for each sequence.

    The sampler is asked once a step, for the rows of the batch in their order. Rows that have ended are among them
    until a quarter of the batch has: only then does it pay to copy the cache without them.

    Args:
        forward: Runs the model.
        bundles: The sequences, each where its prompt ends; used up.
        sampler: Takes the next tokens.
        ending: Says which completions have ended.
        max_new_tokens: At most so many for each.

    Raises:
        NonFiniteError: For greedy tokens of logits that aren't finite.
    """
    logits = bundles.logits
    count = len(logits)
    written: list[list[int]] = [[] for _ in range(count)]
    scored = logits.new_zeros(count, max_new_tokens)  # fp32 [rows, max_new_tokens]
    drawn = False
    rows = list(range(count))  # which completion each row of the batch is
    going = list(range(count))  # rows of the batch that have not ended
    index = torch.arange(count, device=scored.device)  # `rows` on the device
    for step in range(max_new_tokens):
        tokens, logprobs = sampler(logits)  # [b]
        if logprobs is not None:
            drawn = True
            scored[index, step] = logprobs
        ids = tokens.tolist()
        for r in going:
            written[rows[r]].append(ids[r])
        ended = ending([written[rows[r]] for r in going])
        going = [r for r, done in zip(going, ended, strict=True) if not done]
        if not going or step == max_new_tokens - 1:
            break
        if len(going) <= 0.75 * len(rows):
            kept = torch.tensor(going, device=index.device)
            tokens, index = tokens[kept], index[kept]
            rows, going = [rows[r] for r in going], list(range(len(going)))
            bundles.keep(rows)
        logits = bundles.write(forward, tokens)
    sampler.check()
    ends = ending(written)
    scores = scored.tolist() if drawn else [[]] * count
    return [
        Completion(tuple(answer), truncated=not end, logprobs=tuple(score[: len(answer)]))
        for answer, end, score in zip(written, ends, scores, strict=True)
    ]
