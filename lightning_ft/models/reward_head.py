"""One score for a sequence: the head of a sequence-classification model at each row's last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.errors import ModelError
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, as_forward, base_of, input_device
from lightning_ft.models.lengths import length_switch

HEADS = ("score", "classifier")
"""What architectures call the head that reads the last token."""


def score_head(model: CausalLM) -> nn.Module:
    """The head that turns a hidden state into a score; with PEFT the wrapper that holds its trained copy.

    Args:
        model: From `AutoModelForSequenceClassification`, adapted or not.

    Raises:
        ModelError: If the model has no such head, or no backbone under it.
    """
    base = base_of(model)
    heads: list[nn.Module] = [getattr(base, name) for name in HEADS if isinstance(getattr(base, name, None), nn.Module)]
    if not heads or base.base_model is base:
        raise ModelError(
            f"{type(base).__name__} has no head named {' or '.join(map(repr, HEADS))} over a backbone, so no sequence "
            "can be scored with it. Load it with AutoModelForSequenceClassification and num_labels=1."
        )
    return heads[0]


def last_token_rewards(
    model: CausalLM, input_ids: Sequence[Tensor], pad_token_id: int, *, batch_size: int = 16
) -> Tensor:
    """Score each sequence at its last token.

    transformers' own forward pass takes the last token that isn't the pad token for the last one. Where padding is done
    with EOS that is the token before the end, and without a pad token it refuses batches; here the lengths decide.
    Gradients flow where they are switched on.

    Args:
        model: A sequence-classification model with one label over a causal backbone, adapted or not.
        input_ids: Token ids, ``int64 [t]`` each, at least one.
        pad_token_id: Stands behind shorter sequences, unseen: any token will do.
        batch_size: Sequences at a time; those of like length go together.

    Returns:
        ``float32 [n]`` on the model's device, in the order of `input_ids`.

    Raises:
        ModelError: If the model has no head, or one with several labels, or a sequence has no token.

    Example:
        >>> from transformers import LlamaConfig, LlamaForSequenceClassification
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_hidden_layers=1, num_labels=1))
        >>> last_token_rewards(model, [torch.tensor([5, 6, 2]), torch.tensor([7])], pad_token_id=2).shape
        torch.Size([2])
    """
    base = base_of(model)
    score_head(base)
    if empty := [i for i, ids in enumerate(input_ids) if not len(ids)]:
        raise ModelError(f"Sequence {empty[0]} of {len(input_ids)} has no token, so it can't be scored.")
    switch = as_forward(base, length_switch)
    lengths = [len(ids) for ids in input_ids]
    order: list[int] = []
    scores = []
    for group in [list(range(len(lengths)))] if switch is None else switch.groups(lengths):
        group.sort(key=lambda i: lengths[i])
        order += group
        for start in range(0, len(group), batch_size):
            part = [input_ids[i] for i in group[start : start + batch_size]]
            if switch is not None:
                switch.forget()
            scores.append(as_forward(base, _scores, part, pad_token_id, input_device(base)))
    if not scores:
        return torch.zeros(0, dtype=torch.float32, device=input_device(base))
    back = torch.tensor(order).argsort().to(scores[0].device)
    return torch.cat(scores).index_select(0, back)  # [n]


def _scores(base: PreTrainedModel, rows: Sequence[Tensor], pad_token_id: int, device: torch.device) -> Tensor:
    """Scores of one batch, ``float32 [b]``."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_token_id).to(device)  # [b, s]
    lengths = lengths.to(device)
    mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).to(torch.int64)
    out = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True)
    hidden: Tensor = out.last_hidden_state
    last = hidden[torch.arange(len(rows), device=hidden.device), lengths.to(hidden.device) - 1]  # [b, d]
    logits: Tensor = score_head(base)(last)
    if logits.shape != (len(rows), 1):
        raise ModelError(
            f"{type(base).__name__} gives {tuple(logits.shape[1:])} numbers a sequence where a score is one: load it "
            "with num_labels=1."
        )
    return logits[:, 0].float()


def check_last_token(model: CausalLM) -> None:
    """Check that the model itself reads its score at the last token.

    BERT and its kin read it at the first, or at the mean. No list of names stays complete, so the model is asked, on a
    few tokens without padding.

    Args:
        model: A sequence-classification model with one label, adapted or not.

    Raises:
        ModelError: If it doesn't.
    """
    base = base_of(model)
    score_head(base)
    text: Any = base.config.get_text_config()
    tokens = [token for token in range(min(text.vocab_size, 16)) if token != text.pad_token_id]
    row = torch.tensor([tokens[i % len(tokens)] for i in (1, 5, 2, 7, 3)])
    with evaluating(model):
        own: Tensor = base(input_ids=row[None].to(input_device(base))).logits
        try:
            wanted = last_token_rewards(base, [row], 0)
        except (RuntimeError, IndexError, TypeError, AttributeError):  # a head that takes the states of all tokens
            reads = False
        else:
            tolerance = 1e-4 if base.dtype == torch.float32 else 5e-2
            reads = bool((own[:, 0].float() - wanted).abs().max() <= tolerance * own.abs().max())
    if not reads:
        raise ModelError(
            f"{type(base).__name__} doesn't read its score at the last token of a sequence, as decoders do. As a "
            "reward, call it in a function of your own that prepares its input as its model card says."
        )
