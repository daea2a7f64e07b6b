"""The weights sent to a server are those of the merged model, and the model in training doesn't change."""

import copy

import pytest
import torch
from adapters import LORAS, adapted
from peft import PromptTuningConfig, get_peft_model
from tiny import make_model

from lightning_ft.errors import ModelError
from lightning_ft.rollout.merged_weights import MergedWeights


@pytest.mark.parametrize(
    ("variant", "tie"), [*((name, False) for name in LORAS), *((name, True) for name in ("linear", "dora", "tokens"))]
)
def test_served_weights_are_merged_and_the_model_is_unchanged(variant, tie):
    model = adapted(variant, tie=tie)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {name: weight.requires_grad for name, weight in model.named_parameters()}
    addresses = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    served = MergedWeights(model)
    sent = dict(served)
    assert [(name, str(w.dtype)[6:], list(w.shape)) for name, w in sent.items()] == served.metadata
    assert before.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == modes
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == addresses

    merged = dict(copy.deepcopy(model).merge_and_unload(safe_merge=True).named_parameters())
    assert set(sent) == set(merged)
    changed = 0
    plain = make_model(vocab_size=64, attention_bias=variant == "bias", tie=tie)
    for name, weight in merged.items():
        assert torch.equal(sent[name], weight), name
        changed += not torch.equal(weight, plain.get_parameter(name))
    assert changed
    ids = torch.tensor([[4, 9, 5, 6]])
    plain.load_state_dict(sent, strict=not tie)
    torch.testing.assert_close(plain(ids).logits, model.eval()(ids).logits, atol=2e-4, rtol=1e-4)


def test_disabled_adapter_is_not_merged():
    model = adapted("saved_head")
    with model.disable_adapter():
        sent = dict(MergedWeights(model))
    plain = make_model(vocab_size=64)
    for name, weight in plain.named_parameters():
        assert torch.equal(sent[name], weight)


def test_weights_that_no_plain_model_has_are_refused():
    with pytest.raises(ModelError, match="are tied, but the adapter changes only one"):
        MergedWeights(adapted("embedding", tie=True))
    with pytest.raises(ModelError, match="was trained apart from the embeddings"):
        MergedWeights(adapted("saved_head", tie=True))
    model = get_peft_model(make_model(vocab_size=64), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="PROMPT_TUNING adapter can't be merged"):
        MergedWeights(model)
    model = make_model(vocab_size=64)
    model.is_quantized = True
    with pytest.raises(ModelError, match="quantized"):
        MergedWeights(model)
