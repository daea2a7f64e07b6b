"""Answers don't depend on their batch or on the state of training."""

import pytest
import torch
from tiny import make_model, make_tokenizer

from lightning_ft.data.encode import encode_prompt
from lightning_ft.errors import ConfigError
from lightning_ft.models.generate import end_token_ids, evaluating, generate_text
from lightning_ft.modules.sft import FullFineTuning

TEXTS = ["where is my parcel", "refund", "what about the invoice of the kettle, please answer in one line", "hello 7"]


def prompts(tokenizer):
    return [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in TEXTS]


def alone(model, tokenizer, ids, **options):
    ids = torch.tensor([ids])
    out = model.eval().generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, do_sample=False, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_generate_is_unaffected_by_left_padding(batch_size):
    model, tokenizer = make_model(), make_tokenizer()
    want = [alone(model, tokenizer, ids, max_new_tokens=10) for ids in prompts(tokenizer)]
    got = generate_text(
        model, tokenizer, prompts(tokenizer), pad_token_id=0, max_new_tokens=10, batch_size=batch_size, do_sample=False
    )
    assert got == want


def test_generate_ignores_train_mode_and_gradient_checkpointing():
    model, tokenizer = make_model(dropout=0.5), make_tokenizer()
    want = [alone(model, tokenizer, ids, max_new_tokens=64) for ids in prompts(tokenizer)]
    module = FullFineTuning(model, tokenizer=tokenizer, gradient_checkpointing=True)
    module.configure_model()
    module.train()
    assert module.generate(TEXTS) == want
    assert all(m.training for m in module.model.modules())


def test_evaluating_restores_each_mode_after_an_error():
    model = make_model()
    model.train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]

    def fail():
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [m.training for m in model.modules()] == before


def test_generate_stops_at_every_end_token():
    model, tokenizer = make_model(), make_tokenizer(eos="<|pad|>")  # the template ends answers with another token
    model.generation_config.eos_token_id = [7, 2]
    assert end_token_ids(model, tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>"), 0, 7]


def test_generate_refuses_a_prompt_that_does_not_fit():
    model, tokenizer = make_model(), make_tokenizer()
    with pytest.raises(ConfigError, match="context of 512"):
        generate_text(model, tokenizer, [[5] * 500], pad_token_id=0, max_new_tokens=64)


@pytest.mark.parametrize("configured", [False, True])
def test_generate_refuses_several_answers_to_a_prompt(configured):
    """They would be taken as the answers to the prompts after it."""
    module = FullFineTuning(make_model(), tokenizer=make_tokenizer())
    options = {} if configured else {"num_return_sequences": 2}
    if configured:
        module.configure_model()
        module.model.generation_config.num_return_sequences = 2
    with pytest.raises(ConfigError, match="num_return_sequences=2: each prompt gets one answer"):
        module.generate(TEXTS[:2], do_sample=True, **options)


def test_generate_ends_at_stop_strings():
    module = FullFineTuning(make_model(), tokenizer=make_tokenizer())
    (whole,) = module.generate(TEXTS[:1], max_new_tokens=20)
    stop = whole[4:7]
    (answer,) = module.generate(TEXTS[:1], max_new_tokens=20, stop_strings=[stop])
    assert answer != whole
    assert whole.startswith(answer)
    assert stop in answer


def test_generate_treats_strings_as_conversations():
    module = FullFineTuning(make_model(), tokenizer=make_tokenizer())
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    assert module.generate(chats) == module.generate(TEXTS)
