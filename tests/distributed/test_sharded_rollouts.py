"""Ranks of a sharded model with different prompts generate what one process does, and none waits forever."""

import datetime
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from architectures import ENDS, SIZES, make_prompts
from collectives import Collectives
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lightning_ft.errors import ConfigError, RolloutError
from lightning_ft.models.head import as_forward, base_of, head_logits
from lightning_ft.models.shard import is_sharded, reshard, shard
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling

PROMPTS = make_prompts(9)
SHARES = [  # indices of the prompts of each rank
    ([0, 1, 2, 3, 4, 5, 6], [7, 8]),
    ([], [3, 4, 5]),
    ([2], [2]),
    ([], []),
]
REQUESTS = [
    {"max_new_tokens": 9},
    {"max_new_tokens": 7, "sampling": Sampling(temperature=1.5), "num_completions": 3},
    {"max_new_tokens": 3, "sampling": Sampling(top_p=0.8), "num_completions": 7},  # more than fit in a batch
]


def make(name):
    torch.manual_seed(0)
    if name == "window":
        return MistralForCausalLM(MistralConfig(sliding_window=8, **SIZES))
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    if name == "lora":
        return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    return model


def answers(engine, rank):
    """Rollouts of one rank over shares and requests; the same calls are made in one process."""
    done = []
    for seed, share in enumerate(SHARES):
        for request in REQUESTS:
            torch.manual_seed(10 * seed + rank)
            done.append(engine.generate([PROMPTS[i] for i in share[rank]], **request))
    return done


def change(weights):
    """Change weights of the root module, of a layer, and of the adapter."""
    with torch.no_grad():
        for name, weight in weights:
            if name.endswith(("lm_head.weight", "norm.weight", "lora_B.default.weight", "0.self_attn.v_proj.weight")):
                local = weight.to_local() if isinstance(weight, DTensor) else weight
                local.mul_(-2)


def both(engine, model, rank):
    weights = list(model.named_parameters())  # as an optimizer does, before they are gathered
    first = answers(engine, rank)
    change(weights)
    return first, answers(engine, rank)


def two_ranks(rank, path, name, expected, fitting):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=limit)
    model = make(name)
    shard(base_of(model), init_device_mesh("cpu", (2,)))
    assert is_sharded(model)
    engine = LocalEngine(model, end_token_ids=ENDS, batch_size=4)
    found = both(engine, model, rank)
    assert found == expected[rank]
    assert found[0] != found[1]
    with Collectives() as sent:
        engine.generate(PROMPTS[: 1 + rank], max_new_tokens=9, sampling=Sampling(), num_completions=3)
    gathers = len([one for one in sent.seen if "allgather" in one.name])
    groups = SIZES["num_hidden_layers"] + 3  # embeddings, head, and the last norm
    assert gathers == groups if fitting else gathers > 5 * SIZES["num_hidden_layers"]
    assert all(isinstance(p, DTensor) for p in model.parameters())  # and freed

    base, states = base_of(model), torch.rand(3, SIZES["hidden_size"])
    with torch.no_grad():
        logits = as_forward(base, head_logits, states)
    reshard(base)
    torch.testing.assert_close(logits, states @ base.lm_head.weight.full_tensor().T)

    with pytest.raises(ConfigError if rank else RolloutError, match="no tokens" if rank else "Another rank"):
        engine.generate([[]] if rank else PROMPTS, max_new_tokens=2)
    same = engine.generate(PROMPTS, max_new_tokens=9)  # as in TokenSavings, with the same prompts on all ranks
    assert engine.first_token(PROMPTS[0]) == same.completions[0].tokens[0]
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "fitting"),
    [("full", True), ("full", False), pytest.param("lora", True, marks=pytest.mark.slow), ("window", False)],
)
@pytest.mark.filterwarnings("ignore:.*only slower")
def test_sharded_ranks_sample_different_prompts_exactly(tmp_path, monkeypatch, name, fitting):
    if not fitting:
        monkeypatch.setattr("lightning_ft.rollout.rank_sync.free_bytes", lambda device: 1000)
    expected = []
    for rank in range(2):
        model = make(name)
        expected.append(both(LocalEngine(model, end_token_ids=ENDS, batch_size=4), model, rank))
    lengths = {len(c.tokens) for rollouts in expected[0][0] for c in rollouts.completions}
    assert len(lengths) > 4
    mp.start_processes(two_ranks, (tmp_path / "store", name, expected, fitting), nprocs=2, start_method="fork")
