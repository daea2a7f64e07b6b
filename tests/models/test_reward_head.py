"""Rewards at the last token match the model's own forward pass on single sequences."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model
from tiny_scorer import make_scorer
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from lightning_ft.errors import ModelError
from lightning_ft.models.reward_head import check_last_token, last_token_rewards, reward_head

EOS, PAD = 2, 0
LENGTHS = (5, 1, 9, 3, 9, 2, 7)


@pytest.fixture
def rows():
    """Sequences that end with EOS, as conversations do, without pad tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 400, (length,), generator=generator) for length in LENGTHS]
    return [torch.cat([row, torch.tensor([EOS])]) for row in rows]


def adapted(model, **options):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False, **options)
    return get_peft_model(model, config).eval()


def alone(model, rows):
    """Reference rewards: each sequence alone, unpadded, by the model's own forward pass."""
    with torch.no_grad():
        return torch.stack([model(input_ids=row[None]).logits[0, 0] for row in rows])


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("wrap", [lambda model: model, adapted], ids=["plain", "peft"])
def test_reward_head_matches_the_models_forward(rows, wrap, batch_size):
    model = wrap(make_scorer(pad_token_id=PAD))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits[:, 0]
        scores = last_token_rewards(model, rows, PAD, batch_size=batch_size)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, padded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, alone(model, rows), atol=1e-5, rtol=1e-5)
    assert scores.std() > 0.01  # so that a wrong order would show


def test_reward_head_reads_last_token_before_eos_padding(rows):
    """With EOS as the pad token, transformers reads the token before EOS as the last one."""
    model = make_scorer(pad_token_id=EOS)
    with torch.no_grad():
        scores = last_token_rewards(model, rows, EOS)
        at_each = [model.score(model.model(input_ids=row[None]).last_hidden_state)[0, :, 0] for row in rows]
        own = alone(model, rows)
    torch.testing.assert_close(scores, torch.stack([at[-1] for at in at_each]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        own, torch.stack([at[-2] for at in at_each]), atol=1e-5, rtol=1e-5
    )  # transformers does so


def test_reward_head_needs_no_pad_token(rows):
    model = make_scorer(pad_token_id=None)
    with pytest.raises(ValueError, match="padding token"), torch.no_grad():
        model(input_ids=torch.ones(2, 2, dtype=torch.int64))
    with torch.no_grad():
        scores = [last_token_rewards(model, rows, pad) for pad in (0, 2, 77)]
    for score in scores:
        torch.testing.assert_close(score, alone(model, rows), atol=1e-5, rtol=1e-5)


def test_reward_head_gradients_match_the_models_forward(rows):
    model = adapted(make_scorer())
    weights = torch.linspace(-1, 1, len(rows))
    (last_token_rewards(model, rows, PAD, batch_size=3) * weights).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sum(model(input_ids=row[None]).logits[0, 0] * w for row, w in zip(rows, weights, strict=True)).backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    assert any("score" in name for name in ours)  # the head trains with the adapter
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4)


def test_reward_head_without_gradients_keeps_no_graph(rows):
    with torch.no_grad():
        assert not last_token_rewards(adapted(make_scorer()), rows, PAD).requires_grad


def test_reward_head_uses_the_adapters_head(rows):
    model = adapted(make_scorer())
    with torch.no_grad():
        before = last_token_rewards(model, rows, PAD)
        reward_head(model).modules_to_save["default"].weight.mul_(2)
        after = last_token_rewards(model, rows, PAD)
        with model.disable_adapter():
            off = last_token_rewards(model, rows, PAD)
    torch.testing.assert_close(after, 2 * before)
    torch.testing.assert_close(off, alone(make_scorer(), rows), atol=1e-5, rtol=1e-5)


def test_reward_head_handles_no_rows_and_rejects_empty_rows():
    assert last_token_rewards(make_scorer(), [], PAD).shape == (0,)
    with pytest.raises(ModelError, match="Sequence 1 of 2 has no token"):
        last_token_rewards(make_scorer(), [torch.tensor([1]), torch.zeros(0, dtype=torch.int64)], PAD)


def test_reward_head_refuses_causal_models_and_several_labels(rows):
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no head .* AutoModelForSequenceClassification"):
        last_token_rewards(make_model(), rows, PAD)
    model = make_scorer()
    model.score = torch.nn.Linear(32, 3)
    for refused in (lambda: last_token_rewards(model, rows, PAD), lambda: check_last_token(model)):
        with pytest.raises(ModelError, match="num_labels=1"):
            refused()


@pytest.mark.parametrize("pad_token_id", [None, 0, 1, 2])
def test_reward_head_reads_the_last_token_of_decoders(pad_token_id):
    check_last_token(make_scorer(pad_token_id=pad_token_id))
    check_last_token(adapted(make_scorer(pad_token_id=pad_token_id)))
    gpt2 = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=pad_token_id)
    check_last_token(GPT2ForSequenceClassification(gpt2).bfloat16())


def test_reward_head_refuses_first_token_pooling():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=1, **sizes))
    model.train()
    with pytest.raises(ModelError, match="BertForSequenceClassification doesn't read its output at the last token"):
        check_last_token(model)
    assert model.training  # the mode is restored
