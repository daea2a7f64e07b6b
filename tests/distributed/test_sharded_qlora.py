"""QLoRA over a sharded base: 4-bit weights are shared as bytes, and the adapter takes the steps of one process."""

import pytest
import torch
from collectives import Collectives
from ranks import as_rank, free_port, run_ranks, trainer_options
from recording import RecordsGradients, RecordsLosses
from safetensors.torch import load_file
from tiny import make_model, make_rows
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lightning_ft.modules.base
from lightning_ft import ComputeMeter, LoRAFineTuning, PairDataModule, ShardedStrategy
from lightning_ft._lightning import Trainer
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.shard import gathered_bytes
from lightning_ft.sharded_checkpoint import read_any_checkpoint

pytest.importorskip("bitsandbytes")

EXACT = {  # products in fp32, so that ranks differ from one process by rounding only
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}
WEIGHTS = "model.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"


class Recording(RecordsGradients, RecordsLosses, LoRAFineTuning):
    pass


def fit(how, model, folder, **options):
    trainer_settings = trainer_options("one", folder)
    if how == "fsdp":
        trainer_settings |= {"devices": 2, "strategy": options.pop("strategy", None) or ShardedStrategy()}
    precision = options.pop("precision", "32-true")
    meter = ComputeMeter()
    trainer = Trainer(**trainer_settings, precision=precision, accumulate_grad_batches=2, callbacks=[meter])
    options = {"lora": {"r": 4}, "learning_rate": 1e-2, "quantization": EXACT, **options}
    module = Recording(model, gradient_checkpointing=True, **options)
    rows = PairDataModule(make_rows(16), batch_size=2 if how == "fsdp" else 4, shuffle=False, cache_dir=False)
    trainer.fit(module, rows)
    return trainer, module, meter.result.parameters


def weights(module):
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
    return {name: weight.detach().clone() for name, weight in whole.items()}


def run(how, model, folder, precision, **options):
    trainer, module, count = fit(how, model, folder, precision=precision, **options)
    found = {"losses": module.losses, "gradients": module.steps, "weights": weights(module)}
    return trainer, module, {**found, "count": count, "table": module.what_is_trained()}


def one_rank(rank, models, folder, port):
    as_rank(rank, port)
    loads, load = [], lightning_ft.modules.base.load_causal_lm
    lightning_ft.modules.base.load_causal_lm = lambda *args, **options: loads.append(args)
    with pytest.raises(ConfigError, match="FSDP2 would separate 8-bit weights from their scales"):
        fit("fsdp", models["plain"], folder, quantization="8bit")
    assert not loads  # refused before that
    lightning_ft.modules.base.load_causal_lm = load
    with pytest.raises(ModelError, match=r"quantized to 8 bits.* use 4 bits"):
        fit("fsdp", models["8bit"], folder, quantization=None)

    _, _, exact = run("fsdp", models["plain"], folder, "32-true")
    offloading = ShardedStrategy(cpu_offload=True, device_mesh=(1, 2))  # all of it together
    trainer, module, mixed = run("fsdp", models["plain"], folder, "bf16-mixed", strategy=offloading)
    sharded = dict(module.named_parameters())[WEIGHTS]
    assert isinstance(sharded, DTensor)
    assert sharded.dtype == torch.uint8
    assert sharded.to_local().numel() == sharded.numel() // 2
    packed = sum(p.numel() for p in module.parameters() if p.dtype == torch.uint8)
    others = sum(p.numel() for p in module.parameters() if p.dtype != torch.uint8)
    assert gathered_bytes(module.model.get_base_model()) == packed + 2 * others
    with Collectives() as sent, torch.no_grad():
        module.model(torch.tensor([[5, 6, 7]]))
    gathered = sum(c.numel * c.dtype.itemsize for c in sent.seen if "allgather" in c.name)
    assert packed < gathered < packed + 3 * others  # as bytes, not cast to the dtype of the other weights
    trainer.save_checkpoint(folder / "end.ckpt")
    module.export(folder / "adapter")
    answers = module.generate([row["input"] for row in make_rows(3)], max_new_tokens=6)
    torch.save({"32-true": exact, "bf16-mixed": mixed, "answers": answers}, folder / f"{rank}.pt")


@pytest.fixture
def models(tmp_path, tokenizer):
    plain, packed = tmp_path / "plain", tmp_path / "8bit"
    make_model(hidden=64).save_pretrained(plain)  # quantized blocks hold 64 weights
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": "cpu"}}
    quantized = AutoModelForCausalLM.from_pretrained(plain, **options)
    quantized.save_pretrained(packed)
    for folder in (plain, packed):
        tokenizer.save_pretrained(folder)
    return {"plain": str(plain), "8bit": str(packed)}


def test_qlora_over_a_sharded_base_takes_the_steps_of_one_process(models, tmp_path):
    run_ranks(one_rank, (models, tmp_path, free_port()))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    one = {precision: run("one", models["plain"], tmp_path, precision)[2] for precision in ("32-true", "bf16-mixed")}
    for found in (first, second):
        for precision, rounding in (("32-true", 1e-5), ("bf16-mixed", 5e-2)):
            expected, actual = one[precision], found[precision]
            assert actual["losses"] == pytest.approx(expected["losses"], abs=rounding)
            assert actual["table"] == expected["table"]
            assert actual["count"] == expected["count"]
            packed = {name for name, weight in expected["weights"].items() if weight.dtype == torch.uint8}
            assert WEIGHTS in packed
            for name in packed:
                assert torch.equal(actual["weights"][name], expected["weights"][name]), name
        for whole, step in zip(one["32-true"]["gradients"], found["32-true"]["gradients"], strict=True):
            for name in whole:
                torch.testing.assert_close(step[name], whole[name], rtol=0, atol=2e-5)
        for name, whole in one["32-true"]["weights"].items():
            torch.testing.assert_close(found["32-true"]["weights"][name], whole, rtol=0, atol=5e-5)
        assert found["answers"] == first["answers"]
    trained = read_any_checkpoint(tmp_path / "end.ckpt")["state_dict"]
    assert all("lora_" in name for name in trained)
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, weight in exported.items():
        live = first["bf16-mixed"]["weights"]["model." + name.replace(".weight", ".default.weight")]
        assert torch.equal(weight, live)
