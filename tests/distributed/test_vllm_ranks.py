"""One rank sends the requests of all ranks to the vLLM server; sharded weights are gathered for it."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from stand_in_server import logprob, serving, without_vllm
from tiny import make_model
from torch.distributed.device_mesh import init_device_mesh

from lightning_ft.errors import ConfigError, RolloutError
from lightning_ft.models.head import base_of
from lightning_ft.models.shard import is_sharded, shard
from lightning_ft.rollout.protocol import Sampling
from lightning_ft.rollout.vllm import VLLMEngine

SHARES = [([[5, 6], [7, 8, 9]], [[10]]), ([], [[11, 12]]), ([], [])]


def answer(prompt, n):
    return [sum(prompt), 30 + n, 2]


def make():
    lora = LoraConfig(
        r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], use_dora=True
    )
    return get_peft_model(make_model(vocab_size=64), lora)


def two_ranks(rank, path, expected):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=limit)
    with pytest.MonkeyPatch.context() as monkeypatch, serving(answer) as (stand_in, url):
        transport = without_vllm(monkeypatch)
        engine = VLLMEngine(url, end_token_ids=[2], connection_timeout=0.0)

        for share in SHARES:
            rollouts = engine.generate(share[rank], max_new_tokens=5, sampling=Sampling(), num_completions=2)
            expected_tokens = [answer(prompt, n) for prompt in share[rank] for n in range(2)]
            assert [list(c.tokens) for c in rollouts.completions] == expected_tokens
            assert all(c.logprobs == tuple(map(logprob, c.tokens)) for c in rollouts.completions)
        sent_prompts = [[prompt for of_rank in share for prompt in of_rank] for share in SHARES[:2]]
        assert [body["prompt"] for body in stand_in.posted("/v1/completions")] == ([] if rank else sent_prompts)
        with pytest.raises(ConfigError, match="Prompt 0 has no tokens"):  # on both ranks
            engine.generate([[]] if rank else [[5]], max_new_tokens=5)

        for sharded in (False, True):
            model = make()
            if sharded:
                shard(base_of(model), init_device_mesh("cpu", (2,)))
                assert is_sharded(model)
            engine.sync_weights(model)
            assert transport.order == ([] if rank else list(expected))
            for name, weight in transport.sent.items():
                torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6)
                assert type(weight) is torch.Tensor
            transport.order.clear()

            stand_in.failing["/start_weight_update"] = 400
            with pytest.raises(RolloutError, match="failed to update its weights"):  # on both ranks, and neither waits
                engine.sync_weights(model)
            stand_in.failing.clear()
        stand_in.failing["/v1/completions"] = 400
        with pytest.raises(RolloutError, match="failed to generate"):
            engine.generate([[5]], max_new_tokens=5)
    dist.destroy_process_group()


def test_two_ranks_share_one_vllm_server(tmp_path):
    expected = {name: weight.detach() for name, weight in make().merge_and_unload(safe_merge=True).named_parameters()}
    mp.start_processes(two_ranks, (tmp_path / "store", expected), nprocs=2, start_method="fork")
