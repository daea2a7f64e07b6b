"""Batches of preferences and prompts, and their handling by Lightning."""

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection

from lightning_ft._lightning import _pl
from lightning_ft.data.batches import PreferenceBatch, PromptBatch
from lightning_ft.data.layout import Example
from lightning_ft.errors import ConfigError


def example(*ids):
    return Example(torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool))


def batch(answers=((7,), (8,)), **changed):
    fields = {
        "prompts": [torch.tensor([5, 6])],
        "completions": [tuple(example(*ids) for ids in answers)],
        "labels": torch.tensor([True, False][: len(answers)]),
        "margins": torch.tensor([0.3]),
        "rows": torch.tensor([4]),
    }
    return PreferenceBatch(**{**fields, **changed})


def test_paired_is_false_for_labeled_completions():
    assert batch().paired
    assert not batch([(7,)]).paired


@pytest.mark.parametrize(
    "changed",
    [
        {"prompts": []},
        {"completions": []},
        {"labels": torch.tensor([True])},
        {"margins": torch.tensor([1.0, 2.0])},
        {"rows": torch.tensor([1, 2])},
    ],
)
def test_preference_batch_rejects_inconsistent_fields(changed):
    with pytest.raises(ConfigError, match="A PreferenceBatch of"):
        batch(**changed)


def test_to_moves_numeric_tensors_and_keeps_tokens():
    given = batch()
    moved = given.to("meta")
    assert {t.device.type for t in (moved.labels, moved.margins, moved.rows)} == {"meta"}
    assert moved.prompts[0] is given.prompts[0]
    assert moved.completions[0][0] is given.completions[0][0]
    assert batch(margins=None).to("meta").margins is None


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_batches_are_moved_by_lightning(device):
    """Lightning moves objects that have `to`; a device isn't always a string."""
    from lightning_fabric.utilities.apply_func import move_data_to_device

    assert move_data_to_device(batch(), device).rows.tolist() == [4]
    given = PromptBatch(["a"], [torch.tensor([1])], {"answer": [{"x": torch.tensor(0.3)}]})
    assert move_data_to_device(given, device) is given


def test_bf16_true_keeps_dtypes_of_batches():
    """Lightning converts floats in all collections that it finds, and fails on frozen dataclasses."""
    convert = _pl.plugins.precision.HalfPrecision("bf16-true").convert_input
    with pytest.raises(ValueError, match="frozen"):
        convert([example(1)])
    assert convert(batch()).margins.dtype is torch.float32
    answers = [range(3), "x"]  # a range can't be rebuilt from its elements
    assert convert(PromptBatch(["a", "b"], [torch.tensor([1])] * 2, {"answer": answers})).columns["answer"] is answers
    assert apply_to_collection(batch(), torch.Tensor, lambda t: 1 / 0).paired


def test_prompt_batch_rejects_inconsistent_columns():
    given = PromptBatch([], [], {"answer": []})
    assert len(given) == 0
    with pytest.raises(ConfigError, match="PromptBatch of 1 prompts can't have the column 'answer' of 2"):
        PromptBatch(["a"], [torch.tensor([1])], {"answer": [1, 2]})
    with pytest.raises(ConfigError, match="PromptBatch of 1 prompts can't have 0 input_ids"):
        PromptBatch(["a"], [], {})
