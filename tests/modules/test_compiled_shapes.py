"""A compiled backbone has at most three graphs, whatever shapes packed batches have."""

import pytest
import torch
from tiny import make_model, make_tokenizer
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from lightning_ft import LoRAFineTuning
from lightning_ft._lightning import Trainer
from lightning_ft.data.layout import Example, collate_examples
from lightning_ft.data.row_costs import RowCosts

LENGTHS = [[7, 2, 11, 6, 8, 5, 3], [17, 16, 40, 9, 3], [9, 3, 4], [8] * 5, [50], [30, 12, 5, 22], [5, 60], [33, 31, 2]]
"""Packed in one row or in several, one sequence per row, and a single sequence."""


def batches(packing=True):
    generator = torch.Generator().manual_seed(0)
    square = RowCosts.of("cpu", "sdpa", 32).square
    rows = [
        [Example(torch.randint(4, 300, (n,), generator=generator), torch.arange(n) >= n // 2) for n in lengths]
        for lengths in LENGTHS
    ]
    return [collate_examples(part, packing=packing, square=square) for part in rows]


def train(trainer_options, laid_out, **options):
    model = make_model(layers=1)
    module = LoRAFineTuning(model, tokenizer=make_tokenizer(), lora={"r": 4}, learning_rate=1e-2, **options)
    torch._dynamo.reset()
    counters.clear()
    Trainer(**trainer_options, max_epochs=1).fit(module, DataLoader(laid_out, batch_size=None))
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("packing", [True, False])
def test_graphs_are_few_over_batches_of_many_shapes(packing, trainer_options):
    laid_out = batches(packing)
    assert len({batch.input_ids.shape for batch in laid_out}) == len(laid_out)
    if packing:
        assert {batch.packed for batch in laid_out} == {True, False}
        assert len({len(batch.input_ids) == 1 for batch in laid_out if batch.packed}) == 2
    expected = train(trainer_options, laid_out)
    assert counters["stats"]["unique_graphs"] == 0
    found = train(trainer_options, laid_out, torch_compile={"backend": "eager"})  # graphs are counted, not compiled
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_graphs_are_few_with_the_default_compiler(trainer_options):
    laid_out = batches()
    expected = train(trainer_options, laid_out)
    found = train(trainer_options, laid_out, torch_compile=True)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-4)
