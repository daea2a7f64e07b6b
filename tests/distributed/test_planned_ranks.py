"""What each of two ranks holds and sends in training is what `lightning_ft.planning.ranks` computes from shapes."""

import functools

import pytest
import torch
from collectives import Collectives
from ranks import as_rank, free_port, run_ranks, trainer_options
from tiny import make_model, make_rows
from torch.distributed.fsdp import FSDPModule

from lightning_ft import FullFineTuning, LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Callback, Trainer, _pl
from lightning_ft.models.head import base_of
from lightning_ft.planning.ranks import rank_memory, rank_traffic
from lightning_ft.planning.shapes import shape_model

WINDOW = 2  # micro-batches per optimizer step
LORA = {"r": 3}  # an odd number of rows, so that shards are padded


def local_bytes(tensors):
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


def gathered_bytes(model):
    """Bytes of the gathered weights that a rank holds, and of those on their way to it."""
    total = 0
    for part in model.modules():
        group = part._get_fsdp_state()._fsdp_param_group if isinstance(part, FSDPModule) else None
        if group is not None:
            coming = group._all_gather_result
            held = [output for param in group.fsdp_params for output in param.all_gather_outputs]
            held += [] if coming is None else [coming.all_gather_output]
            total += sum(tensor.untyped_storage().nbytes() for tensor in held)
    return total


class Measured(Callback):
    """What a rank holds at the second optimizer step, and sends in the accumulation window before it."""

    def __init__(self):
        self.found, self._mode, self._gathered = {}, None, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx != WINDOW:
            return
        base = base_of(module.model)
        for layer in base.model.layers:  # FSDP2's own hooks come first
            layer.register_forward_pre_hook(lambda *args: self._gathered.append(gathered_bytes(base)))
            layer.register_full_backward_pre_hook(lambda *args: self._gathered.append(gathered_bytes(base)))
        self._mode = Collectives()
        self._mode.__enter__()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self._mode is None:
            return
        self._mode.__exit__(None, None, None)
        parameters = list(module.parameters())
        reducer = getattr(trainer.strategy.model, "reducer", None)
        self.found = {
            "weights": local_bytes(parameters),
            "gradients": local_bytes(p.grad for p in parameters if p.grad is not None),
            "optimizer": local_bytes(state[n] for state in optimizer.state.values() for n in ("exp_avg", "exp_avg_sq")),
            "sent": [(name, dtype.itemsize * numel) for name, dtype, numel in self._mode.seen],
            "gathered": max(self._gathered),
            "buckets": 0 if reducer is None else sum(b.buffer().nbytes for b in reducer._get_zeros_like_grad_buckets()),
        }


def one_rank(rank, method, strategy, model, folder, port):
    as_rank(rank, port)
    measured = Measured()
    options = {**trainer_options("ddp", folder), "callbacks": [measured], "precision": "bf16-mixed"}
    if strategy == "fsdp":
        options["strategy"] = _pl.strategies.ModelParallelStrategy()
    module = FullFineTuning(model) if method == "full" else LoRAFineTuning(model, dtype="bfloat16", lora=LORA)
    data = PairDataModule(make_rows(16), batch_size=2, cache_dir=False)
    Trainer(**options, accumulate_grad_batches=WINDOW).fit(module, data)
    torch.save(measured.found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def measure(tmp_path_factory, tokenizer):
    """What rank 0 of two held and sent with a method and a strategy."""

    @functools.cache
    def found(method, strategy):
        folder = tmp_path_factory.mktemp("planned")
        make_model(layers=5).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        run_ranks(one_rank, (method, strategy, str(folder / "model"), folder, free_port()))
        return torch.load(folder / "0.pt", weights_only=True)

    return found


slow = pytest.mark.slow
CASES = [
    ("full", "ddp"),
    ("lora", "fsdp"),
    pytest.param("lora", "ddp", marks=slow),
    pytest.param("full", "fsdp", marks=slow),
]


def planned_model(method):
    return shape_model(make_model(layers=5).config, None if method == "full" else LORA)


@pytest.mark.parametrize(("method", "strategy"), CASES)
def test_rank_memory_is_what_a_rank_holds(measure, method, strategy):
    planned = rank_memory(planned_model(method), 2, strategy, micro_batches=WINDOW)
    found = measure(method, strategy)
    assert (planned.weights, planned.gradients) == (found["weights"], found["gradients"])
    assert planned.optimizer == found["optimizer"]
    assert planned.buckets == found["buckets"]
    if strategy == "fsdp":  # on a CPU the next group isn't fetched ahead
        assert planned.gathered / 3 < found["gathered"] <= planned.gathered
    else:
        assert planned.gathered == found["gathered"] == 0


@pytest.mark.parametrize(("method", "strategy"), CASES)
def test_rank_traffic_is_what_a_rank_sends(measure, method, strategy):
    planned = rank_traffic(planned_model(method), 2, strategy, micro_batches=WINDOW)
    sent = {"gather": 0, "reduce": 0}
    for name, size in measure(method, strategy)["sent"]:
        for word in sent:
            sent[word] += size * (word in name)
    # Of two ranks, each has half of a gathered or scattered tensor and sends it; of one reduced to both, half twice.
    share = 1 if strategy == "ddp" else 1 / 2
    assert planned.gathered == sent["gather"] * share
    assert planned.reduced == sent["reduce"] * share
