"""Compare a tokenizer with a model's embeddings: tokens without an embedding, or with one that was never trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.data.tokenizers import pad_token_id
from lightning_ft.errors import ModelError
from lightning_ft.models.generate import end_token_ids
from lightning_ft.models.head import CausalLM, base_of

_AS_GOOD_AS_MEAN = 0.05
"""Largest distance of an untrained row from the mean row, as a share of the usual distance: rows that transformers adds
equal the mean up to a hundred-thousandth."""


def embedding_rows(model: CausalLM) -> int:
    """Return the number of tokens that a model has embeddings for.

    Args:
        model: Model on any device, sharded or not, adapted or not.
    """
    return int(_matrix(model).shape[0])


def _matrix(model: CausalLM) -> Tensor:
    return cast(Tensor, base_of(model).get_input_embeddings().weight)


def token_name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Format a token for messages.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> core = Tokenizer(models.WordLevel({"<call>": 0}, unk_token="<call>"))
        >>> token_name(PreTrainedTokenizerFast(tokenizer_object=core), 0)
        "'<call>' (id 0)"
    """
    entry = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
    text = str(tokenizer.decode([token])) if entry is not None else ""
    return f"id {token:,}" if entry is None else f"{(text if text and text.isprintable() else entry)!r} (id {token:,})"


def beyond_embeddings(model: CausalLM, tokenizer: PreTrainedTokenizerBase, token: int, where: str) -> ModelError | None:
    """Return the error for a token that a model has no embedding for; None if it has one.

    Args:
        model: Model to check.
        tokenizer: Tokenizer of the token.
        token: Id of the token.
        where: Description of what contains the token, for the message.
    """
    rows = embedding_rows(model)
    if token < rows:
        return None
    return ModelError(
        f"{where} has the token {token_name(tokenizer, token)}, and {type(base_of(model)).__name__} has {rows:,} "
        f"embeddings, for ids up to {rows - 1:,}; the tokenizer has {len(tokenizer):,} tokens. Use the model's own "
        "tokenizer, or load the model, call model.resize_token_embeddings(len(tokenizer)), save it with the tokenizer, "
        "and pass that folder as model=."
    )


def check_special_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose padding or end tokens the model has no embeddings for.

    Args:
        model: Model to check.
        tokenizer: Tokenizer of training and generation.

    Raises:
        ModelError: With the token, its role and a remedy.
    """
    rows = embedding_rows(model)
    pad = pad_token_id(tokenizer)
    if pad >= rows:
        raise ModelError(
            f"The tokenizer pads with {token_name(tokenizer, pad)}, and {type(base_of(model)).__name__} has {rows:,} "
            f"embeddings, for ids up to {rows - 1:,}. Padding is never trained on: set tokenizer.pad_token to a token "
            "that the model has, such as its EOS."
        )
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    for token in end_token_ids(model, tokenizer):
        error = beyond_embeddings(model, tokenizer, token, "The end of an answer")
        if (
            error is not None and token not in own
        ):  # end tokens of the model that the tokenizer lacks are never generated
            raise error


def ends_at_ordinary_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the model's own end tokens that are ordinary text in this tokenizer, and so probably of another one."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return [token for token in own if token not in special and token < len(tokenizer)]


@torch.no_grad()
def untrained_rows(model: CausalLM, tokens: Iterable[int]) -> list[int]:
    """Return the tokens whose embedding has never been trained, judging by the matrix alone.

    Such embeddings are zero, the mean of all others (which transformers adds when a matrix grows), or bitwise equal to
    another one. Random initial values can't be told from trained ones.

    Args:
        model: Model that isn't sharded.
        tokens: Token ids with an embedding.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
        >>> _ = model.resize_token_embeddings(11)
        >>> untrained_rows(model, range(11))
        [9, 10]
    """
    wanted = torch.tensor(sorted(set(tokens)), dtype=torch.int64)
    matrix = _matrix(model).detach()
    if not len(wanted) or not matrix.is_floating_point():
        return []
    mean = matrix.mean(0, dtype=torch.float32)  # [d]
    sample = matrix[:: max(1, len(matrix) // 4096)].float()  # a few thousand rows suffice for the usual distance
    usual = (sample - mean).norm(dim=1).median()
    rows = matrix[wanted.to(matrix.device)].float()  # [n, d]
    found = (rows - mean).norm(dim=1) < _AS_GOOD_AS_MEAN * usual
    found |= rows.norm(dim=1) == 0
    _, group, sizes = rows.unique(dim=0, return_inverse=True, return_counts=True)
    found |= sizes[group] > 1
    return cast("list[int]", wanted[found.cpu()].tolist())


def frozen_tokens(model: CausalLM, tokens: Iterable[int], *, in_head: bool = False) -> list[int]:
    """Return the tokens whose embedding doesn't change in training.

    Args:
        model: Model, prepared for training.
        tokens: Token ids.
        in_head: Whether their rows of an untied head are meant instead.
    """
    matrices = _matrices(base_of(model))
    if len(matrices) <= in_head:
        return []
    matrix = matrices[in_head]
    if not any(parameter.requires_grad for parameter in matrix.parameters()):
        return sorted(set(tokens))
    trained = _trained_rows(matrix)
    return [] if trained is None else sorted(set(tokens) - trained)


def _matrices(base: PreTrainedModel) -> list[nn.Module]:
    """The input embeddings, and the head unless it is tied to them."""
    inside, head = base.get_input_embeddings(), base.get_output_embeddings()
    # Under PEFT's wrappers, which have weights of their own, tied modules still have the same one.
    weights = [getattr(getattr(module, "original_module", module), "weight", None) for module in (inside, head)]
    return [inside] if head is None or weights[0] is weights[1] else [inside, head]


def _trained_rows(matrix: nn.Module) -> set[int] | None:
    """The rows that PEFT's `trainable_token_indices` train; None for a matrix without any."""
    if not isinstance(matrix, TrainableTokensWrapper):
        return None
    indices = matrix.token_adapter.token_indices
    return {int(i) for name in indices for i in indices[name]}


def trainable_tokens(model: CausalLM, tokens: list[int]) -> dict[str, list[int]]:
    """Return the `trainable_token_indices` of a LoRA configuration that train the embeddings of these tokens.

    They include the rows of an untied head, and the rows that the model's adapter trains already.

    Args:
        model: Model that the adapter will be put on, or that has one.
        tokens: Token ids.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> config = LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=True)
        >>> trainable_tokens(LlamaForCausalLM(config), [8])
        {'embed_tokens': [8]}
    """
    base = base_of(model)
    return {_name_in(base, matrix): sorted({*tokens, *(_trained_rows(matrix) or ())}) for matrix in _matrices(base)}


def _name_in(base: PreTrainedModel, wanted: nn.Module) -> str:
    return next(str(name).rpartition(".")[2] for name, module in base.named_modules() if module is wanted)
