import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import make_model, make_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from transformers import MambaConfig, MambaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicCache

from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.savings.measurement import SavingsMeasurement
from lightning_ft.evaluation.savings.serving import model_shape
from lightning_ft.models.shard import is_sharded, shard
from lightning_ft.types import Message, Request

BASELINE = PromptBaseline("Say where the thing is, in one word.")


def overlap(output, reference):
    return len(set(output) & set(reference)) / len(set(reference))


def grade_on_rank_0_only(output, reference):
    if dist.is_initialized() and dist.get_rank() == 1:
        pytest.fail("scored twice")
    return 7  # not a score


def measure(scorer=overlap, count=5, models=None):
    words = ("parcel", "lamp", "kettle", "invoice", "refund")[:count]
    requests = [
        Request(f"r{i}", (Message(role="user", content=f"where is the {w}"),), "here") for i, w in enumerate(words)
    ]
    measurement = SavingsMeasurement(
        make_tokenizer(),
        requests,
        BASELINE,
        scorer=scorer,
        max_new_tokens=6,
        batch_size=2,
        resamples=99,
        progress=False,
    )
    original, tuned = models or (make_model(), make_model(seed=1))
    measurement.before(original)
    return measurement.after(tuned)


def two_ranks(rank, path, alone):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    assert measure() == alone
    measure(count=1)  # fewer requests than ranks
    with pytest.raises(SavingsError, match="Scorer 'grade_on_rank_0_only' returned 7 for request 'r0'"):
        measure(grade_on_rank_0_only)  # raised on both ranks, so that neither waits
    dist.destroy_process_group()


def test_two_ranks_match_one(tmp_path):
    mp.start_processes(two_ranks, (tmp_path / "store", measure()), nprocs=2, start_method="fork")


def two_sharded_ranks(rank, path, alone):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    models = [make_model(), make_model(seed=1)]
    for model in models:
        shard(model, mesh)
        assert is_sharded(model)
    assert measure(models=models) == alone
    dist.destroy_process_group()


def test_two_sharded_ranks_match_one(tmp_path):
    mp.start_processes(two_sharded_ranks, (tmp_path / "store", measure()), nprocs=2, start_method="fork")


def test_a_prompt_given_as_text_is_told_from_a_file():
    with pytest.raises(SavingsError, match=r"PromptBaseline\(system=\.\.\.\)"):
        PromptBaseline.from_file("You are a router. Answer with a department.")
    with pytest.raises(SavingsError) as error:
        PromptBaseline.from_file("no/such/prompt.json")
    assert "system=" not in str(error.value)


def test_progress_bar_can_be_disabled(capsys):
    requests = [Request("r0", (Message(role="user", content="where is the lamp"),), "here")]
    for progress in (False, True):
        measurement = SavingsMeasurement(
            make_tokenizer(), requests, BASELINE, scorer=overlap, max_new_tokens=2, progress=progress
        )
        measurement.before(make_model())
        assert ("Token savings, prompted" in capsys.readouterr().err) is progress


def test_kv_cache_bytes_match_the_cache():
    for model in (make_model(), Qwen3ForCausalLM(Qwen3Config(**QWEN))):
        cache = DynamicCache(config=model.config)
        model.model(input_ids=torch.ones(1, 10, dtype=torch.int64), use_cache=True, **{cache_argument(model): cache})
        held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        assert model_shape(model).kv_cache_bytes(10) == held


QWEN = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def cache_argument(model):
    import inspect

    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def test_prefill_flops_match_the_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model(attn_implementation="eager")
    shape = model_shape(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, 16, dtype=torch.int64), logits_to_keep=1, use_cache=False)
    # Eager attention also computes the masked pairs: 16 * 16 in place of 16 * 17 / 2.
    masked = 2 * 2 * shape.heads * (shape.key_dim + shape.value_dim) * (16 * 16 - 16 * 17 // 2)
    assert shape.prefill_flops(16) + masked == counter.get_total_flops()


def test_model_shape_with_sliding_window_and_unknown_architecture():
    from transformers import MistralConfig, MistralForCausalLM

    shape = model_shape(MistralForCausalLM(MistralConfig(sliding_window=8, **QWEN)))
    assert shape.kv_cache_bytes(100) == shape.kv_cache_bytes(8)
    assert model_shape(MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))) is None
