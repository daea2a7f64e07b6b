"""Requests and weights sent to a vLLM server, and its responses. (The server is a mock; none of them is real.)"""

import socket

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stand_in_server import logprob, serving, without_vllm
from tiny import make_model

from lightning_ft import GRPO
from lightning_ft.errors import ConfigError, MissingDependencyError, RolloutError
from lightning_ft.rollout.protocol import Sampling
from lightning_ft.rollout.vllm import VLLMEngine

PROMPTS = [[5, 6, 7], [8, 9]]
END = 2


def complete(prompt, n):
    return [prompt[0] + 10 + n, 30 + n] + [END] * (n % 2 == 0)


@pytest.fixture
def transport(monkeypatch):
    return without_vllm(monkeypatch)


@pytest.fixture
def server(transport):
    with serving(complete) as (stand_in, url):
        yield stand_in, url


def test_generate_sends_one_request_for_all_groups(server, tokenizer):
    stand_in, url = server
    progress = []
    engine = VLLMEngine(url + "/", end_token_ids=[END, 3], tokenizer=tokenizer)
    sampling = Sampling(temperature=0.7, stop=("\n\n", "User:"))
    rollouts = engine.generate(
        PROMPTS, max_new_tokens=9, sampling=sampling, num_completions=3, on_answered=progress.append
    )
    assert stand_in.posted("/v1/completions") == [
        {
            "model": "served-model",
            "prompt": PROMPTS,
            "n": 3,
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": 9,
            "logprobs": 0,
            "stop": ["\n\n", "User:"],
            "stop_token_ids": [END, 3],
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
    ]
    assert [list(c.tokens) for c in rollouts.completions] == [complete(p, n) for p in PROMPTS for n in range(3)]
    assert [c.truncated for c in rollouts.completions] == [False, True, False] * 2
    for completion in rollouts.completions:
        assert completion.logprobs == tuple(logprob(token) for token in completion.tokens)
    assert (rollouts.shared_prefix, rollouts.prefilled, progress) == (0, 5, [2])


def test_stop_string_ends_a_completion(server, tokenizer):
    stand_in, url = server
    lamp = tokenizer.encode(" the lamp")
    stand_in.answer = lambda prompt, n: lamp + [5] * n
    engine = VLLMEngine(url, end_token_ids=[END], tokenizer=tokenizer)
    sampling = Sampling(stop=("lamp",))
    one, _ = engine.generate([[5]], max_new_tokens=9, sampling=sampling, num_completions=2).completions
    assert one.tokens == tuple(lamp)
    assert not one.truncated
    with pytest.raises(ConfigError, match="pass the engine a tokenizer="):
        VLLMEngine(url, end_token_ids=[END]).generate([[5]], max_new_tokens=9, sampling=sampling)


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.0, top_p=0.5, top_k=3)])
def test_greedy_completions_are_requested_once(server, sampling):
    stand_in, url = server
    rollouts = VLLMEngine(url, end_token_ids=[END]).generate(
        PROMPTS, max_new_tokens=4, sampling=sampling, num_completions=3
    )
    (body,) = stand_in.posted("/v1/completions")
    assert (body["n"], body["temperature"], body["top_p"], body["top_k"], body["logprobs"]) == (1, 0.0, 1.0, 0, None)
    assert [list(c.tokens) for c in rollouts.completions] == [complete(p, 0) for p in PROMPTS for _ in range(3)]
    assert {c.logprobs for c in rollouts.completions} == {()}


def test_filters_leave_out_renormalized_logprobs(server):
    stand_in, url = server
    for sampling in (Sampling(top_p=0.9), Sampling(top_k=40), Sampling(min_p=0.1)):
        rollouts = VLLMEngine(url, end_token_ids=[END]).generate(PROMPTS, max_new_tokens=4, sampling=sampling)
        assert stand_in.posted("/v1/completions")[-1]["logprobs"] is None
        assert {c.logprobs for c in rollouts.completions} == {()}


def test_no_prompts_send_no_request(server):
    stand_in, url = server
    assert VLLMEngine(url, end_token_ids=[END]).generate([], max_new_tokens=4).completions == ()
    assert stand_in.requests == []


# ------------------------------------------------------------ weights


@pytest.mark.parametrize("stateful", [False, True])
def test_sync_weights_sends_metadata_and_weights_under_the_servers_names(monkeypatch, server, stateful):
    transport = without_vllm(monkeypatch, stateful)
    stand_in, url = server
    model = make_model().to(torch.bfloat16)
    engine = VLLMEngine(url, end_token_ids=[END], group_port=5555)
    engine.sync_weights(model)
    expected = dict(model.named_parameters())
    assert transport.order == list(expected)
    for name, weight in expected.items():
        assert torch.equal(transport.sent[name], weight)
    (update,) = stand_in.posted("/update_weights")
    info = update["update_info"]
    assert info["names"] == list(expected)
    assert info["dtype_names"] == ["bfloat16"] * len(expected)
    assert info["shapes"] == [list(weight.shape) for weight in expected.values()]
    assert [path for path, _ in stand_in.requests] == [
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
    ]
    (opened,) = transport.opened
    assert opened["master_port"] == 5555
    assert opened["world_size"] == 3  # the server's two workers and this process

    stand_in.requests.clear()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    engine.sync_weights(model)
    assert torch.equal(transport.sent["lm_head.weight"], model.lm_head.weight)
    assert stand_in.requests[0][0] == "/start_weight_update"  # the channel stays open


@pytest.mark.parametrize(
    ("served", "sent"), [("torch.bfloat16", "bfloat16"), ("torch.float32", "float32"), (None, "float32")]
)
def test_fp32_weights_are_sent_in_the_half_precision_of_the_server(transport, server, served, sent):
    stand_in, url = server
    stand_in.config["model_config"]["dtype"] = served
    model = make_model()
    VLLMEngine(url, end_token_ids=[END]).sync_weights(model)
    (update,) = stand_in.posted("/update_weights")
    assert set(update["update_info"]["dtype_names"]) == {sent}
    for name, weight in model.named_parameters():
        assert torch.equal(transport.sent[name], weight.to(getattr(torch, sent)))


def test_sync_weights_finishes_the_transfer_of_a_broken_adapter_and_raises(transport, server):
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"])
    model = get_peft_model(make_model(), lora)
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(RolloutError, match="can't be merged into its weights: NaNs"):
        VLLMEngine(server[1], end_token_ids=[END]).sync_weights(model)
    assert len(transport.order) == len(list(make_model().parameters()))
    assert server[0].requests[-1][0] == "/reset_prefix_cache"


# ------------------------------------------------------------ errors


def test_engine_without_vllm_names_the_package_to_install():
    with pytest.raises(MissingDependencyError, match=r"pip install 'lightning-ft\[vllm\]'"):
        VLLMEngine(end_token_ids=[END])


def test_missing_server_raises_with_the_start_command(transport):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        engine = VLLMEngine(url, end_token_ids=[END], connection_timeout=0.0)
        with pytest.raises(RolloutError, match=f"(?s)No vLLM server answered at {url}.*vllm serve MODEL"):
            engine.generate(PROMPTS, max_new_tokens=3)
        with pytest.raises(RolloutError, match=r"(?s)No vLLM server answered"):
            engine.sync_weights(make_model())


def test_server_errors_raise_and_the_engine_recovers(server):
    stand_in, url = server
    engine = VLLMEngine(url, end_token_ids=[END])
    stand_in.failing["/v1/completions"] = 500
    with pytest.raises(RolloutError, match=r"failed to generate: .*500"):
        engine.generate(PROMPTS, max_new_tokens=3)
    stand_in.failing["/v1/completions"] = 400
    with pytest.raises(RolloutError, match=r"failed to generate: .*400.*out of order"):
        engine.generate(PROMPTS, max_new_tokens=3)
    stand_in.failing["/update_weights"] = 404
    with pytest.raises(RolloutError, match=r"failed to update its weights: .*404"):
        engine.sync_weights(make_model())
    stand_in.failing.clear()
    engine.generate(PROMPTS, max_new_tokens=3)
    engine.sync_weights(make_model())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda choices: choices[:-1], "returned 3 completions of 2 prompts: expected 2 per prompt, 4 in total"),
        (lambda choices: [], "failed to generate"),
        (lambda choices: choices[::-1], "completed other prompts"),
        (lambda choices: [c | {"logprobs": None} for c in choices], "no log-probabilities for some tokens"),
        (
            lambda choices: [c | {"token_ids": [*c["token_ids"], 9]} for c in choices],
            "no log-probabilities for some tokens",
        ),
        (
            lambda choices: [c | {"token_ids": [9, *c["token_ids"][1:]]} for c in choices],
            "no log-probability of token 9",
        ),
    ],
)
def test_response_that_does_not_match_the_request_is_refused(server, changed, reason):
    stand_in, url = server
    stand_in.changed = changed
    with pytest.raises(RolloutError, match=reason):
        VLLMEngine(url, end_token_ids=[END]).generate(PROMPTS, max_new_tokens=3, sampling=Sampling(), num_completions=2)


def test_server_started_with_other_options_is_refused(monkeypatch, server):
    stand_in, url = server
    engine, model = VLLMEngine(url, end_token_ids=[END]), make_model()
    monkeypatch.setattr("lightning_ft.rollout.vllm.input_device", lambda model: torch.device("cpu"))
    with pytest.raises(RolloutError, match="needs a CUDA device"):
        engine.sync_weights(model)
    monkeypatch.setattr("lightning_ft.rollout.vllm.input_device", lambda model: torch.device("cuda"))
    stand_in.config["weight_transfer_config"] = None
    with pytest.raises(RolloutError, match="weight-transfer-config"):
        engine.sync_weights(model)
    stand_in.failing["/server_info"] = 404
    with pytest.raises(RolloutError, match="VLLM_SERVER_DEV_MODE=1"):
        engine.sync_weights(model)
    stand_in.failing.clear()
    stand_in.config = {"weight_transfer_config": {}, "model_config": {"logprobs_mode": "raw_logprobs"}}
    engine.sync_weights(model)
    engine.generate(PROMPTS, max_new_tokens=3, sampling=Sampling())
    with pytest.raises(RolloutError, match="raw_logprobs, which ignore the temperature"):
        engine.generate(PROMPTS, max_new_tokens=3, sampling=Sampling(temperature=0.5))


def test_engine_refuses_invalid_requests(server):
    engine = VLLMEngine(server[1], end_token_ids=[END])
    with pytest.raises(ConfigError, match="Prompt 1 has no tokens"):
        engine.generate([[1], []], max_new_tokens=3)
    with pytest.raises(ConfigError, match="end_token_ids is empty"):
        VLLMEngine(server[1], end_token_ids=[])


@pytest.mark.parametrize(
    ("vllm", "message"),
    [
        ("http://gpu-7:8000", "vllm='http://gpu-7:8000': expected True, False or a dict"),
        ({"base_urll": "http://gpu-7:8000"}, "no argument 'base_urll'. Did you mean 'base_url'"),
        ({"end_token_ids": [2]}, "'end_token_ids' is that of the module"),
        ({"group_port": "51216"}, "group_port='51216': expected an integer"),
    ],
)
def test_arguments_of_a_module_are_checked_before_it_loads_a_model(vllm, message):
    with pytest.raises(ConfigError, match=message):
        GRPO("some/model", rewards=len, vllm=vllm)
