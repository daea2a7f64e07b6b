"""Sampling with a merged adapter: the same probabilities, and weights that are untouched afterwards."""

import pytest
import torch
from adapters import LORAS, adapted
from peft.tuners.lora import LoraLayer
from policies import BATCHES, LORA, Policy, make
from pytorch_lightning import Trainer

from lightning_ft.errors import ConfigError, RolloutError
from lightning_ft.rollout.choice import check_choice
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.merged_adapter import merged_adapter
from lightning_ft.rollout.protocol import Sampling

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [4, 9, 4]]


def sampled(model, merge):
    engine = LocalEngine(model, end_token_ids=[0], batch_size=8, merge_adapter=merge)
    torch.manual_seed(3)
    return engine.generate(PROMPTS, max_new_tokens=8, sampling=Sampling(), num_completions=4).completions


@pytest.mark.parametrize(
    ("variant", "tie"), [(name, tie) for name in LORAS for tie in (False, True) if (name, tie) != ("embedding", True)]
)
def test_merged_and_unmerged_adapters_sample_the_same_tokens(variant, tie, monkeypatch):
    model = adapted(variant, tie=tie)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    addresses = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    products = []
    monkeypatch.setattr(LoraLayer, "_cast_input_dtype", lambda self, x, dtype: products.append(self) or x.to(dtype))
    merged = sampled(model, True)
    assert not products
    unmerged = sampled(model, False)
    assert products or variant == "embedding"
    for one, other in zip(merged, unmerged, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == addresses


def test_copies_are_dropped_after_an_error_in_the_block():
    model = adapted("linear")
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    weight = layer.base_layer.weight
    data = weight.detach().clone()
    seen = []

    def fail():
        with torch.no_grad(), merged_adapter(model):
            seen.append((layer.merged, torch.equal(weight, data)))
            raise KeyError("in a pass")

    with pytest.raises(KeyError):
        fail()
    assert (layer.merged, torch.equal(weight, data)) == (False, True)
    assert seen == [(True, False)]


def test_half_precision_copies_of_autocast_follow_the_merged_weights():
    """A caching autocast would go on with the copies of the weights without the adapter, or with it afterwards."""
    model, ids = adapted("linear").eval(), torch.tensor(PROMPTS[:1])
    for weight in model.parameters():
        weight.requires_grad_(True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        unmerged = model(ids).logits
        with merged_adapter(model):
            merged = model(ids).logits
        after = model(ids).logits
    assert torch.equal(after, unmerged)
    assert not torch.equal(merged, unmerged)  # rounded otherwise
    torch.testing.assert_close(merged, unmerged, atol=0.2, rtol=0.1)


def test_what_cannot_be_merged_is_refused():
    model = adapted("embedding", tie=True)
    with pytest.raises(ConfigError, match=r"merge_adapter=True: .* are tied, but the adapter changes only one"):
        sampled(model, True)
    model = adapted("linear")
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(RolloutError, match=r"the adapter of model\.layers\.0\.self_attn\.q_proj\.\* can't be merged"):
        sampled(model, True)
    for engine, vllm, batching, why in (
        (None, True, False, "vllm= merges the adapter already"),
        (None, False, True, "continuous_batching= samples with the model as it is"),
    ):
        with pytest.raises(ConfigError, match=f"merge_adapter=True is for the built-in engine, and {why}"):
            check_choice(engine, vllm, batching, merge_adapter=True)


def test_a_policy_samples_with_its_merged_adapter_and_corrects_for_it(trainer_options):
    """In fp32 the correction has nothing to do, so the steps are those of the unmerged adapter."""
    weights = {}
    for merge in (True, False):
        module = make(Policy, lora=LORA, merge_adapter=merge)
        assert module.hparams["merge_adapter"] is merge
        assert module.correction.mode == ("sequence_mask" if merge else None)
        loader = torch.utils.data.DataLoader(BATCHES, batch_size=None)
        torch.manual_seed(0)
        Trainer(**{**trainer_options, "max_epochs": 2}).fit(module, loader)
        weights[merge] = {n: w.detach().clone() for n, w in module.model.named_parameters() if w.requires_grad}
        assert any(w.any() for n, w in weights[merge].items() if "lora_B" in n)
    for name, weight in weights[True].items():
        torch.testing.assert_close(weight, weights[False][name], atol=1e-5, rtol=1e-4)
