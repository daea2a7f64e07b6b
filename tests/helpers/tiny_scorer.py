"""A small reward model for tests."""

import torch
from tiny import make_model
from transformers import LlamaForSequenceClassification


def make_scorer(vocab_size=400, *, seed=0, pad_token_id=0, **options):
    config = make_model(vocab_size, num_labels=1, **options).config
    config.pad_token_id = pad_token_id
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config).eval()
