"""Rewards of sequences: the head of a sequence-classification model, applied to each row's last token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.errors import ModelError
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, as_forward, base_of, input_device
from lightning_ft.models.lengths import length_switch

HEADS = ("score", "classifier")
"""Names that architectures use for the head that reads the last token."""


def reward_head(model: CausalLM) -> nn.Module:
    """The head that maps a hidden state to a reward; with PEFT the wrapper around its trained copy.

    Args:
        model: Model of `AutoModelForSequenceClassification`, adapted or not.

    Raises:
        ModelError: If the model has no such head, or no backbone under it.
    """
    base = base_of(model)
    heads: list[nn.Module] = [getattr(base, name) for name in HEADS if isinstance(getattr(base, name, None), nn.Module)]
    if not heads or base.base_model is base:
        raise ModelError(
            f"{type(base).__name__} has no head named {' or '.join(map(repr, HEADS))} over a backbone, so it can't "
            "compute rewards. Load it with AutoModelForSequenceClassification and num_labels=1."
        )
    return heads[0]


def last_token_rewards(
    model: CausalLM, input_ids: Sequence[Tensor], pad_token_id: int, *, batch_size: int = 16
) -> Tensor:
    """The reward of each sequence, read at its last token.

    transformers' own forward pass reads the last token that isn't the pad token. With EOS as padding, that is the token
    before the end, and without a pad token it refuses batches; here the lengths decide. Gradients flow if enabled.

    Args:
        model: A sequence-classification model with one label on a causal backbone, adapted or not.
        input_ids: Token ids of each sequence, ``int64 [t]``, at least one.
        pad_token_id: Id of the padding token, put after shorter sequences, where the model doesn't see it.
        batch_size: Number of sequences per batch. Sequences of similar length share a batch.

    Returns:
        Rewards, ``float32 [n]``, on the model's device, in the order of `input_ids`.

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
    reward_head(base)
    if empty := [i for i, ids in enumerate(input_ids) if not len(ids)]:
        raise ModelError(f"Sequence {empty[0]} of {len(input_ids)} has no token, so it has no reward.")
    switch = as_forward(base, length_switch)
    lengths = [len(ids) for ids in input_ids]
    order: list[int] = []
    rewards = []
    for group in [list(range(len(lengths)))] if switch is None else switch.groups(lengths):
        group.sort(key=lambda i: lengths[i])
        order += group
        for start in range(0, len(group), batch_size):
            part = [input_ids[i] for i in group[start : start + batch_size]]
            if switch is not None:
                switch.forget()
            rewards.append(as_forward(base, _batch_rewards, part, pad_token_id, input_device(base)))
    if not rewards:
        return torch.zeros(0, dtype=torch.float32, device=input_device(base))
    back = torch.tensor(order).argsort().to(rewards[0].device)
    return torch.cat(rewards).index_select(0, back)  # [n]


def _batch_rewards(base: PreTrainedModel, rows: Sequence[Tensor], pad_token_id: int, device: torch.device) -> Tensor:
    """Rewards of one batch, ``float32 [b]``."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_token_id).to(device)  # [b, s]
    lengths = lengths.to(device)
    mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).to(torch.int64)
    out = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True)
    hidden: Tensor = out.last_hidden_state
    last = hidden[torch.arange(len(rows), device=hidden.device), lengths.to(hidden.device) - 1]  # [b, d]
    logits: Tensor = reward_head(base)(last)
    if logits.shape != (len(rows), 1):
        raise ModelError(
            f"{type(base).__name__} returns an output of shape {tuple(logits.shape[1:])} per sequence, expected one "
            "reward. Load it with num_labels=1."
        )
    return logits[:, 0].float()


def check_last_token(model: CausalLM) -> None:
    """Check that the model itself reads its output at the last token.

    BERT-like models use the first token or the mean. No list of names stays complete, so the model is probed with a few
    tokens without padding.

    Args:
        model: A sequence-classification model with one label, adapted or not.

    Raises:
        ModelError: If the model reads its output elsewhere.
    """
    base = base_of(model)
    reward_head(base)
    text = base.config.get_text_config()
    tokens = [token for token in range(min(text.vocab_size, 16)) if token != text.pad_token_id]
    row = torch.tensor([tokens[i % len(tokens)] for i in (1, 5, 2, 7, 3)])
    with evaluating(model):
        own: Tensor = base(input_ids=row[None].to(input_device(base))).logits
        try:
            expected = last_token_rewards(base, [row], 0)
        except (RuntimeError, IndexError, TypeError, AttributeError):  # a head that needs the states of all tokens
            reads = False
        else:
            tolerance = 1e-4 if base.dtype == torch.float32 else 5e-2
            reads = bool((own[:, 0].float() - expected).abs().max() <= tolerance * own.abs().max())
    if not reads:
        raise ModelError(
            f"{type(base).__name__} doesn't read its output at the last token of a sequence, as decoders do. To use it "
            "as a reward, call it in your own reward function and prepare its input as its model card says."
        )
