"""One rank loads the model; the others get the weights group by group, as they are sharded."""

import gc
from pathlib import Path

import pytest
import torch
from preference_runs import make_pairs
from ranks import as_rank, free_port, run_ranks, trainer_options
from tiny import make_model, make_rows
from torch.distributed.tensor import DTensor

import lightning_ft.modules.base
from lightning_ft import DPO, FullFineTuning, LoRAFineTuning, PairDataModule, PreferenceDataModule
from lightning_ft._lightning import Callback, Trainer, _pl
from lightning_ft.errors import ModelError
from lightning_ft.models import shard as sharding
from lightning_ft.models.load import load_causal_lm


def held_bytes():
    """Bytes of memory that all tensors of this process hold.

    A DTensor's shard is a tensor of its own. Earlier tests leave tensors without memory, of a compiler, whose sizes may
    be symbols.
    """
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values())


def is_mapped(tensor):
    """Whether a tensor's memory is that of a checkpoint's file, which the system can drop and read again."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(".safetensors")
    return False


class AtStart(Callback):
    """Keeps the gathered weights as they are before the first step."""

    def on_fit_start(self, trainer, module):
        self.weights = {name: p.full_tensor().clone() for name, p in module.named_parameters()}
        self.trained = [name for name, p in module.named_parameters() if p.requires_grad]
        self.buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}


CASES = {
    "full": (FullFineTuning, {"dtype": "float32"}),
    "lora": (LoRAFineTuning, {"dtype": "bfloat16", "gradient_checkpointing": True, "lora": {"r": 4}}),
    "dpo": (DPO, {"dtype": "float32"}),  # whose reference is loaded in the same way
}


def fit(module, folder, *callbacks):
    options = {**trainer_options("one", folder), "devices": 2, "strategy": _pl.strategies.ModelParallelStrategy()}
    options_of_data = {"batch_size": 2, "shuffle": False, "cache_dir": False}
    data = PreferenceDataModule(make_pairs(4), **options_of_data)
    if not isinstance(module, DPO):
        data = PairDataModule(make_rows(4), **options_of_data)
    Trainer(**options, callbacks=list(callbacks)).fit(module, data)


def one_rank(rank, models, folder, port):
    as_rank(rank, port)
    calls, held, mapped = [], [], []

    def load(name, **options):
        calls.append(name)
        return load_causal_lm(name, **options)

    receive = sharding.receive_weights

    def measured(part, device):
        loaded = [p for name, p in part.named_parameters() if not isinstance(p, DTensor) and "lora_" not in name]
        mapped.extend(is_mapped(p) for p in loaded)
        receive(part, device)
        held.append(held_bytes())

    lightning_ft.modules.base.load_causal_lm, sharding.receive_weights = load, measured
    found = {}
    for case in (("full", "tied"), ("lora", "untied"), ("dpo", "untied")):
        module_class, options = CASES[case[0]]
        calls.clear()
        held.clear()
        mapped.clear()
        gc.collect()
        before, start = held_bytes(), AtStart()
        fit(module_class(models[case[1]], **options), folder, start)
        groups = len(held) // 2 if case[0] == "dpo" else len(held)
        found[" ".join(case)] = {
            "loads": len(calls),
            "mapped": set(mapped),
            "bytes": max(held[:groups]) - before,
            "weights": start.weights,
            "trained": start.trained,
            "buffers": start.buffers,
        }
    with pytest.raises(ModelError, match="could not be loaded"):
        fit(FullFineTuning(str(folder / "none"), tokenizer=models["untied"]), folder)
    torch.save(found, folder / f"{rank}.pt")


def test_ranks_hold_their_shards_and_one_group_while_loading(tmp_path, tokenizer):
    models = {}
    for name in ("untied", "tied"):
        models[name] = str(tmp_path / name)
        make_model(layers=6, tie=name == "tied").save_pretrained(models[name])
        tokenizer.save_pretrained(models[name])
    run_ranks(one_rank, (models, tmp_path, free_port()))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for case, mine in second.items():
        other = first[case]
        assert (other["loads"], mine["loads"]) == (2 if case.startswith("dpo") else 1, 0)
        if Path("/proc/self/maps").exists():
            assert other["mapped"] == {not case.startswith("lora")}  # whose weights are cast to another dtype
        assert mine["trained"] == other["trained"]
        assert mine["weights"].keys() == other["weights"].keys()
        for name, weight in mine["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name
        for name, buffer in other["buffers"].items():
            assert torch.equal(mine["buffers"][name], buffer), name
        model = make_model(layers=6, tie=case.endswith(" tied"))
        loaded = dict(model.named_parameters())
        for name, weight in mine["weights"].items():
            original = name.replace("model.base_model.", "").replace("base_layer.", "").removeprefix("model.")
            if "lora" not in name:
                assert torch.equal(weight, loaded[original].to(weight.dtype)), name
        total = sum(weight.nbytes for weight in mine["weights"].values())
        largest = max(weight.nbytes for weight in mine["weights"].values())  # of a group: the embeddings
        assert mine["bytes"] < total / 2 + largest + 20_000 < other["bytes"]
