"""The decoding loop: prompts are prefilled once, and sequences leave the batch as they finish."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.errors import ConfigError
from lightning_ft.models.grouped_attention import grouped_attention
from lightning_ft.models.head import CausalLM, attention_bias, base_of, input_device
from lightning_ft.read_errors import first_line
from lightning_ft.rollout.cache import GrowingCache, layer_support
from lightning_ft.rollout.protocol import Completion
from lightning_ft.rollout.sampling import TokenSampler
from lightning_ft.rollout.shared_rows import Forward, PrefilledPrompts, SharedRows
from lightning_ft.rollout.structured import GrammarMask


def next_logits(
    model: CausalLM, ids: Tensor, cache: GrowingCache, positions: Tensor, mask: Tensor | None, logits_to_keep: int = 1
) -> Tensor:
    """Run tokens through a model and keep their keys and values.

    Args:
        model: The model.
        ids: New tokens, ``int64 [b, t]``.
        cache: Cache with `p` positions per row; `t` are added.
        positions: Position ids of the new tokens, ``int64 [b, t]``.
        mask: Which positions hold tokens, ``[b, p + t]``, or what each new token attends to,
            ``bool [b, 1, t, p + t]``. None if every position holds a token and each token attends to those before it.
        logits_to_keep: Number of positions, `k`, at the end of each row to return logits for.

    Returns:
        Logits that follow from these positions, ``fp32 [b, k, vocabulary]``.
    """
    base = base_of(model)
    device = input_device(model)
    options = {_cache_argument(base): cache}
    explicit = mask is not None and mask.ndim == 4
    if mask is not None:
        mask = mask.to(device)
        mask = attention_bias(base, mask) if explicit else mask
    with grouped_attention(base) if explicit else nullcontext():
        out = base(  # a call of the PEFT wrapper would not make FSDP2 gather the weights
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=positions.to(device),
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **options,
        )
    logits: Tensor = out.logits[:, -logits_to_keep:].float()
    return logits


def idle_pass(model: CausalLM) -> None:
    """Run one token through a model, only to take part in gathering its weights."""
    base_of(model)(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=input_device(model)), use_cache=False)


def prefill_tokens(model: CausalLM, tokens: list[int], layers: int) -> GrowingCache:
    """Run tokens through a model and return a cache of one row that contains them."""
    cache = GrowingCache(layers)
    next_logits(model, torch.tensor([tokens]), cache, torch.arange(len(tokens))[None], None)
    return cache


def cache_support(model: CausalLM, tokens: int) -> tuple[int, str | None]:
    """Return the number of layers of the cache, and why rows of `tokens` tokens can't use it (None if they can)."""
    base = base_of(model)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return 0, "its adapter puts virtual tokens before every prompt"
    accepted = inspect.signature(base.forward).parameters
    for name in ("position_ids", _cache_argument(base), "logits_to_keep"):
        if name not in accepted:
            return 0, f"its forward pass doesn't accept {name}"
    try:
        return layer_support(base.config, tokens)
    except Exception as error:  # configs from which transformers can't create a cache
        return 0, f"no cache can be created from its config ({type(error).__name__}: {first_line(error)})"


def _cache_argument(base: PreTrainedModel) -> str:
    """Name of the cache argument of the model's forward pass; transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


_MARGIN = 8  # tokens decoded before the shortest tail that could contain a stop string


class StopChecker:
    """Tells which completions have ended, by an end token or a stop string.

    Only the last tokens are decoded to text: as many as can be part of a stop string that the newest token completes,
    since a token represents at least one byte. The margin is for tokenizers that decode the first tokens of a text
    differently (a leading space dropped, a character cut in two).

    Args:
        end_token_ids: Ids of the tokens that end a completion.
        stop: Strings that end a completion. Special tokens are part of the text that is searched.
        tokenizer: Tokenizer that decodes completions; required with `stop`.

    Raises:
        ConfigError: If there is no end token, or `stop` is passed without `tokenizer`.

    Example:
        >>> StopChecker([2])([[5, 2], [5, 6], []])
        [True, False, False]
    """

    def __init__(
        self, end_token_ids: Iterable[int], stop: Sequence[str] = (), tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.end_token_ids = frozenset(end_token_ids)
        self.stop = tuple(stop)
        if not self.end_token_ids:
            raise ConfigError("end_token_ids is empty: completions would never end. Pass at least one end token.")
        if self.stop and tokenizer is None:
            raise ConfigError(f"stop={self.stop!r} needs the text of completions: pass the engine a tokenizer=.")
        self._tokenizer = tokenizer
        self._tail = max((len(s.encode()) for s in self.stop), default=0) + _MARGIN

    def __call__(self, completions: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the last token of each completion ended it."""
        ended = [bool(tokens) and tokens[-1] in self.end_token_ids for tokens in completions]
        stopped = self.contains_stop_string(completions) if self.stop else [False] * len(ended)
        return [a or b for a, b in zip(ended, stopped, strict=True)]

    def contains_stop_string(self, completions: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the text of the last tokens of each completion contains a stop string."""
        if not self.stop or self._tokenizer is None:
            return [False] * len(completions)
        texts = self._tokenizer.batch_decode([list(tokens[-self._tail :]) for tokens in completions])
        return [any(s in text for s in self.stop) for text in texts]


def decode_parts(
    prompts: PrefilledPrompts,
    part_sizes: Sequence[int],
    decode_sequences: Callable[[SharedRows], list[Completion]],
    *,
    max_new_tokens: int,
    sequences_per_row: int | None,
) -> list[list[Completion]]:
    """Generate several completions per prompt, part by part, from prompts that were prefilled once.

    Args:
        prompts: `b` prefilled prompts.
        part_sizes: Number of completions per prompt in each part.
        decode_sequences: Function that generates a completion for each sequence of a part, such as :func:`decode`.
        max_new_tokens: Largest number of tokens per completion.
        sequences_per_row: Number of sequences that share a row of the cache; see :class:`SharedRows`.

    Returns:
        The ``b * size`` completions of each part, those of a prompt next to each other.
    """
    completions = []
    for parts_left, size in zip(reversed(range(len(part_sizes))), part_sizes, strict=True):
        shared_rows = SharedRows(
            prompts,
            num_completions=size,
            reuse_cache=not parts_left,
            max_new_tokens=max_new_tokens,
            sequences_per_row=sequences_per_row,
        )
        if not parts_left:
            del prompts  # frees their memory while the last part is decoded
        completions.append(decode_sequences(shared_rows))
        del shared_rows
    return completions


def decode(
    forward: Forward,
    shared_rows: SharedRows,
    sampler: TokenSampler,
    stop_checker: StopChecker,
    max_new_tokens: int,
    mask: GrammarMask | None = None,
) -> list[Completion]:
    """Generate one completion per sequence.

    The sampler is called once per step, with the sequences of the batch in order. Sequences that have ended stay in
    the batch until they are a quarter of it: only then does it pay to copy the cache without them.

    Args:
        forward: Function that runs the model.
        shared_rows: Sequences to continue, each at the end of its prompt; unusable afterwards.
        sampler: Sampler of the next tokens.
        stop_checker: Tells which completions have ended.
        max_new_tokens: Largest number of tokens per completion.
        mask: Tokens that structured outputs allow; None allows all.

    Raises:
        NonFiniteError: If greedy tokens were chosen from logits that aren't finite.
    """
    logits = shared_rows.logits
    count = len(logits)
    completions: list[list[int]] = [[] for _ in range(count)]
    all_logprobs = logits.new_zeros(count, max_new_tokens)  # fp32 [completions, max_new_tokens]
    sampled = False
    batch = list(range(count))  # index of the completion that each sequence of the batch belongs to
    running = list(range(count))  # sequences of the batch that have not ended
    batch_index = torch.arange(count, device=logits.device)  # `batch` on the device
    for step in range(max_new_tokens):
        if mask is not None:
            logits = mask.apply(logits, batch, completions)
        tokens, logprobs = sampler(logits)  # [b]
        if logprobs is not None:
            sampled = True
            all_logprobs[batch_index, step] = logprobs
        ids = tokens.tolist()
        for i in running:
            completions[batch[i]].append(ids[i])
        ended = stop_checker([completions[batch[i]] for i in running])
        running = [i for i, done in zip(running, ended, strict=True) if not done]
        if not running or step == max_new_tokens - 1:
            break
        if len(running) <= 0.75 * len(batch):
            kept = torch.tensor(running, device=batch_index.device)
            tokens, batch_index = tokens[kept], batch_index[kept]
            batch, running = [batch[i] for i in running], list(range(len(running)))
            shared_rows.keep(batch)
        logits = shared_rows.append(forward, tokens)
    sampler.check()
    ended = stop_checker(completions)
    logprob_rows = all_logprobs.tolist() if sampled else [[]] * count
    return [
        Completion(tuple(ids), truncated=not end, logprobs=tuple(row[: len(ids)]))
        for ids, end, row in zip(completions, ended, logprob_rows, strict=True)
    ]
