import pytest
import torch
from tiny import make_model, make_tokenizer

from lightning_ft.errors import ModelError
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.vocabulary import (
    beyond_embeddings,
    check_special_tokens,
    embedding_rows,
    ends_at_ordinary_tokens,
    frozen_tokens,
    trainable_tokens,
    untrained_rows,
)


def grown(rows=403, dtype=torch.float32, **options):
    model = make_model(**options).to(dtype)
    torch.nn.init.normal_(model.get_input_embeddings().weight.data[0])  # the padding token's, which is zero otherwise
    model.resize_token_embeddings(rows)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_rows_are_those_that_a_resize_added(dtype):
    assert untrained_rows(grown(dtype=dtype), range(403)) == [400, 401, 402]


def test_untrained_rows_are_zero_or_equal_to_each_other():
    model = make_model()
    weight = model.get_input_embeddings().weight.data
    weight[[7, 9]] = weight[50].clone() * 3
    assert untrained_rows(model, range(400)) == [0, 7, 9]
    assert untrained_rows(model, [50, 60]) == []


def test_untrained_rows_accept_no_tokens():
    assert untrained_rows(make_model(), []) == []


@pytest.mark.parametrize(
    ("lora", "frozen"),
    [
        ({}, [5, 6]),
        ({"trainable_token_indices": {"embed_tokens": [6, 7]}}, [5]),
        ({"modules_to_save": ["embed_tokens"]}, []),
        ({"target_modules": ["embed_tokens"]}, []),
    ],
)
def test_frozen_tokens_are_those_without_trained_embedding(lora, frozen):
    model = make_model()
    model.requires_grad_(False)
    model = add_lora(model, lora_config({"r": 2, **lora}))
    assert frozen_tokens(model, [5, 6]) == frozen
    assert embedding_rows(model) == 400


@pytest.mark.parametrize(
    ("lora", "tie", "frozen"),
    [
        ({"trainable_token_indices": [5, 6]}, False, [5, 6]),
        ({"trainable_token_indices": {"embed_tokens": [5], "lm_head": [6]}}, False, [5]),
        ({"modules_to_save": ["lm_head"]}, False, []),
        ({"target_modules": ["lm_head"]}, False, []),
        ({"trainable_token_indices": [5]}, True, []),
    ],
)
def test_frozen_tokens_of_an_untied_head_are_those_without_trained_row(lora, tie, frozen):
    model = add_lora(make_model(tie=tie).requires_grad_(False), lora_config({"r": 2, **lora}))
    assert frozen_tokens(model, [5, 6], in_head=True) == frozen


@pytest.mark.parametrize(("tie", "names"), [(True, ["embed_tokens"]), (False, ["embed_tokens", "lm_head"])])
def test_trainable_tokens_include_those_that_the_adapter_trains(tie, names):
    lora = lora_config({"r": 2, "trainable_token_indices": {name: [5] for name in names}})
    assert trainable_tokens(add_lora(make_model(tie=tie), lora), [7, 6]) == {name: [5, 6, 7] for name in names}


def test_frozen_tokens_are_none_in_full_fine_tuning():
    assert frozen_tokens(make_model(), [5, 6]) == []


@pytest.mark.parametrize(("tie", "names"), [(True, ["embed_tokens"]), (False, ["embed_tokens", "lm_head"])])
def test_trainable_tokens_include_an_untied_head(tie, names):
    assert trainable_tokens(make_model(tie=tie), [5]) == {name: [5] for name in names}


def test_beyond_embeddings_names_the_token():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<call>"])
    token = len(tokenizer) - 1
    assert beyond_embeddings(make_model(vocab_size=len(tokenizer)), tokenizer, token, "Row 1") is None
    error = beyond_embeddings(make_model(vocab_size=token), tokenizer, token, "Row 1")
    assert isinstance(error, ModelError)
    assert str(error).startswith(f"Row 1 has the token '<call>' (id {token:,})")
    assert f"{token:,} embeddings, for ids up to {token - 1:,}" in str(error)


def test_check_special_tokens_names_a_padding_token_without_an_embedding():
    tokenizer = make_tokenizer()
    rows = len(tokenizer)
    check_special_tokens(make_model(vocab_size=rows), tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ModelError, match=rf"pads with '\[PAD\]' \(id {rows}\).*set tokenizer\.pad_token"):
        check_special_tokens(make_model(vocab_size=rows), tokenizer)


def test_check_special_tokens_names_an_end_token_without_an_embedding():
    tokenizer = make_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|stop|>"})
    with pytest.raises(ModelError, match=r"The end of an answer has the token '<\|stop\|>'"):
        check_special_tokens(make_model(vocab_size=rows), tokenizer)
    model = make_model(vocab_size=rows)
    model.generation_config.eos_token_id = [2, 10**6]  # beyond the vocabulary, so it is never generated
    check_special_tokens(model, make_tokenizer())


def test_ends_at_ordinary_tokens_finds_end_tokens_of_another_vocabulary():
    model, tokenizer = make_model(), make_tokenizer()
    assert ends_at_ordinary_tokens(model, tokenizer) == []
    model.generation_config.eos_token_id = [2, 77, 10**6]
    assert ends_at_ordinary_tokens(model, tokenizer) == [77]
