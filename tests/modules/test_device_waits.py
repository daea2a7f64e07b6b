"""How often the host would wait for a GPU: values that it reads, and copies that block."""

import pytest
import torch
from tiny import make_rows
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_ft import FullFineTuning, LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer
from lightning_ft.modules.step_metrics import MeanMetrics, to_host

READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero", "unique", "equal"}
READS |= {"allclose", "cpu", "masked_select", "argwhere"}


class Waits(TorchFunctionMode):
    """Counts operations that would wait if the module were on a GPU and batches in page-locked memory.

    What is created without a device, was copied to the CPU, or is computed from such tensors only, is on the host.
    """

    def __init__(self):
        super().__init__()
        self.reads = self.copies = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        options, name = kwargs or {}, getattr(function, "__name__", "")
        inputs = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, torch.Tensor)]
        on_host = all(getattr(tensor, "on_host", False) for tensor in inputs)
        target = options.get("device", args[1] if name == "to" and len(args) > 1 else None)
        moved = isinstance(target, (torch.device, str))
        if name == "to" and moved and on_host:
            self.copies += not (options.get("non_blocking") or (len(args) > 3 and args[3]))
        elif inputs and not on_host:
            mask = name == "__getitem__" and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool
            self.reads += name in READS or mask  # a mask selects a number of values that the host must know
        result = function(*args, **options)
        if (on_host and not moved) or name == "cpu":
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and not isinstance(tensor, torch.nn.Parameter):
                    tensor.on_host = True
        return result


@pytest.mark.parametrize("module_class", [LoRAFineTuning, FullFineTuning])
def test_supervised_step_waits_rarely(module_class, model_folder, trainer_options, monkeypatch):
    """At most 3 times in a micro-batch, from its copy to the end of its backward pass, and 3 times more in a step."""
    waits, in_batches, in_steps = Waits(), [], []

    class Watched(module_class):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            waits.reads = waits.copies = 0
            return super().on_before_batch_transfer(batch, dataloader_idx)

        def on_after_backward(self):
            in_batches.append(waits.reads + waits.copies)

        def on_before_optimizer_step(self, optimizer):
            waits.reads = 0
            super().on_before_optimizer_step(optimizer)
            in_steps.append(waits.reads)  # copies of numbers that Lightning logs aren't waited for

    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self, *_: True)
    trainer = Trainer(**trainer_options, max_steps=2, accumulate_grad_batches=4, gradient_clip_val=1.0)
    with waits:
        trainer.fit(Watched(str(model_folder)), PairDataModule(make_rows(32), batch_size=4, cache_dir=False))
    assert len(in_batches) == 8
    assert max(in_batches[1:]) <= 3  # the first one also checks its model
    assert len(in_steps) == 2
    assert max(in_steps) <= 3


def test_metrics_are_copied_once():
    values = [torch.tensor(float(n)) for n in range(5)]
    with Waits() as waits:
        found = to_host(values)
    assert waits.reads == 1
    assert found.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert to_host([]).tolist() == []
    metrics = MeanMetrics()
    for n in range(3):
        metrics.add({"a": torch.full((2,), float(n)), "b": torch.tensor(6.0)}, {"b": 4.0})
    assert metrics.reduce(torch.device("cpu")) == {"a": 1.0, "b": 1.5}
