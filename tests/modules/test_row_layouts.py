"""Rows are laid out by the constants of model and device, which changes neither losses nor counts."""

import pytest
import torch
from tiny import make_rows

from lightning_ft import DPO, LoRAFineTuning, PairDataModule, PreferenceDataModule
from lightning_ft._lightning import Trainer
from lightning_ft.data import row_costs


@pytest.fixture
def aligned(monkeypatch):
    """Masked rows of a multiple of 16 positions on a CPU; the lengths of all masks."""
    monkeypatch.setitem(row_costs.MULTIPLE, "cpu", 16)
    lengths, plain = [], torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, **options):
        if attn_mask is not None:
            lengths.append(attn_mask.shape[-1])
        return plain(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    return lengths


def trained(module, data, options):
    trainer = Trainer(**options, max_steps=3)
    trainer.fit(module, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "per_second" not in name}
    return metrics, {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_padding_of_masked_rows_is_in_no_loss_and_no_count(method, model_folder, trainer_options, request):
    def run():
        if method == "sft":
            data = PairDataModule(make_rows(24), validation=make_rows(4), batch_size=6, cache_dir=False)
            return trained(LoRAFineTuning(model_folder, learning_rate=1e-2), data, trainer_options)
        rows = [{"prompt": r["input"], "chosen": r["output"], "rejected": r["output"] + " no"} for r in make_rows(24)]
        data = PreferenceDataModule(rows, batch_size=6, cache_dir=False)
        return trained(DPO(model_folder, lora=True, learning_rate=1e-2), data, trainer_options)

    expected, weights = run()
    lengths = request.getfixturevalue("aligned")
    found, others = run()
    assert lengths
    assert any(length > 10 for length in lengths)
    probing = {length for length in lengths if length % 16}
    assert all(length <= 17 for length in probing)  # the probe of a few tokens has no such rows
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-5)


def test_batches_are_packed_by_the_constants_of_model_and_device(model_folder, trainer_options, monkeypatch):
    shapes = {}
    for per_width in (0.01, 10_000.0):
        monkeypatch.setitem(row_costs.SQUARE_PER_WIDTH, "cpu", per_width)
        module = LoRAFineTuning(model_folder)
        data = PairDataModule(make_rows(16), batch_size=8, cache_dir=False)
        seen = shapes[per_width] = []
        monkeypatch.setattr(
            LoRAFineTuning, "on_train_batch_start", lambda self, batch, index, seen=seen: seen.append(batch), False
        )
        Trainer(**trainer_options, max_steps=2).fit(module, data)
        assert module.row_costs.square == round(per_width * 32)
    narrow, wide = ([len(batch.input_ids) for batch in batches] for batches in shapes.values())
    assert max(wide) < min(narrow)
