"""The router loss that a model adds is detected, and computed with the same value for training batches."""

import pytest
import torch
from many_models import make, make_multimodal
from tiny import make_model

from lightning_ft.data.layout import Example, collate_examples
from lightning_ft.errors import ModelError
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.head import completion_logprobs
from lightning_ft.models.router import OwnLoss, RouterLoss, find_own_loss

ASKED = {"output_router_logits": True, "router_aux_loss_coef": 0.03}
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe", "phimoe", "jamba", "ernie4_5_moe"]


def asking(kind, **options):
    return make(kind, **{**ASKED, **options})


def sequences(*lengths):
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 400, (length,), generator=draw) for length in lengths]
    return [Example(one, torch.ones(len(one), dtype=torch.bool)) for one in ids]


def recorded(model, batch):
    with RouterLoss(model).recorded() as found:
        completion_logprobs(model, batch, reduction="sum")
    return found.value(batch)


@pytest.mark.parametrize("kind", FAMILIES)
def test_find_own_loss_reads_the_coefficient_from_the_loss(kind):
    assert find_own_loss(asking(kind)) == OwnLoss(router=0.03)


@pytest.mark.parametrize("options", [{"output_router_logits": False}, {"router_aux_loss_coef": 0.0}])
def test_find_own_loss_is_the_cross_entropy_without_router_loss(options):
    assert find_own_loss(asking("mixtral", **options)) == OwnLoss()


def test_find_own_loss_accepts_models_without_experts():
    assert find_own_loss(make_model()) == OwnLoss()
    assert find_own_loss(add_lora(make_model().bfloat16(), lora_config({"r": 2}))) == OwnLoss()


def test_find_own_loss_reports_unknown_losses():
    class MorePrediction(type(make_model())):
        def forward(self, *args, labels=None, **kwargs):
            out = super().forward(*args, labels=labels, **kwargs)
            if out.loss is not None:
                out.loss = out.loss + 0.3
            return out

    model = make_model()
    model.__class__ = MorePrediction
    found = find_own_loss(model)
    assert found.router == 0
    assert "MorePrediction" in found.unknown
    assert "not trained here" in found.unknown


def test_find_own_loss_does_not_change_the_model():
    model = asking("mixtral").train()
    model(input_ids=torch.arange(4)[None])  # transformers registers hooks in the first pass
    hooks = [len(module._forward_hooks) for module in model.modules()]
    find_own_loss(model)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert "forward" not in vars(model.model)


@pytest.mark.parametrize("kind", FAMILIES)
def test_router_loss_of_one_row_matches_transformers(kind):
    model, (row,) = asking(kind), sequences(23)
    expected = model(input_ids=row.input_ids[None], labels=row.input_ids[None], use_cache=False).aux_loss
    ours = recorded(model, collate_examples([row]))
    torch.testing.assert_close(ours, expected.float())
    trained = [p for p in model.parameters() if p.requires_grad]
    mine, theirs = (torch.autograd.grad(term, trained, allow_unused=True) for term in (ours, expected))
    assert any(grad is not None and grad.abs().max() > 0 for grad in mine)
    for have, want in zip(mine, theirs, strict=True):
        assert (have is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe"])
def test_router_loss_excludes_padding(kind):
    model, rows = asking(kind), sequences(23, 9, 14)
    ids = torch.nn.utils.rnn.pad_sequence([row.input_ids for row in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row.input_ids)) for row in rows], batch_first=True).long()
    expected = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).aux_loss
    torch.testing.assert_close(recorded(model, collate_examples(rows, packing=False)), expected.float())


def test_router_loss_of_a_packed_row_covers_all_tokens():
    """Expert shares and mean probabilities are averaged over the tokens of both rows before they are multiplied."""
    model, rows = asking("mixtral"), sequences(20, 12)
    logits = [model(input_ids=row.input_ids[None], use_cache=False).router_logits for row in rows]
    together = [torch.cat(layer) for layer in zip(*logits, strict=True)]  # [32, e] per layer
    weights = torch.cat([layer.softmax(-1) for layer in together])
    share = torch.zeros_like(weights).scatter_(1, weights.topk(2).indices, 1.0).mean(0)
    expected = 4 * (share * weights.mean(0)).sum()
    torch.testing.assert_close(recorded(model, collate_examples(rows)), expected.float())


def test_router_loss_supports_adapters_and_gradient_checkpointing():
    model, (row,) = asking("mixtral"), sequences(23)
    expected = recorded(model, collate_examples([row])).item()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = add_lora(model.requires_grad_(False), lora_config({"r": 2, "target_modules": ["q_proj"]})).train()
    ours = recorded(model, collate_examples([row]))
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    ours.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_router_loss_supports_multimodal_models():
    assert make_multimodal("gemma3").config is not None
    model = make("qwen3_vl_moe", image=True)
    model.config.text_config.output_router_logits = model.config.output_router_logits = True
    assert find_own_loss(model).router == pytest.approx(model.config.text_config.router_aux_loss_coef)


def test_router_loss_refuses_several_passes():
    model, rows = asking("mixtral"), sequences(5, 7)
    with RouterLoss(model).recorded() as found:
        for row in rows:
            completion_logprobs(model, collate_examples([row]), reduction="sum")
    with pytest.raises(ModelError, match=r"2 forward passes.*output_router_logits=False"):
        found.value(collate_examples(rows))
