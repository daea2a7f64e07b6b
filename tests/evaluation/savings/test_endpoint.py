"""Arms that an OpenAI-compatible endpoint answers: against local arms, a real server, and servers that fail or lie."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_rows, make_tokenizer

from lightning_ft import Endpoint, FullFineTuning, PairDataModule, Prices, PromptBaseline, TokenSavings
from lightning_ft._lightning import Trainer
from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.savings.arms import run_arm
from lightning_ft.evaluation.savings.endpoint import endpoint_arm
from lightning_ft.evaluation.savings.measurement import SavingsMeasurement
from lightning_ft.evaluation.savings.plan import measurement_plan
from lightning_ft.types import Message, Request

BASELINE = PromptBaseline("answer in one line please", [{"input": "where is the fox", "output": "the lazy dog"}])
REQUESTS = [
    Request(f"r{n}", (Message(role="user", content=row["input"]),), row["output"]) for n, row in enumerate(make_rows(6))
]


class Answers:
    """What a stand-in server does: a tiny model answers, and counts its tokens."""

    def __init__(self):
        self.model, self.tokenizer, self.lock = make_model().eval(), make_tokenizer(), threading.Lock()
        self.calls, self.failures, self.change = [], [], lambda response: response
        self.echo = False  # whether errors repeat what was sent in secret

    def respond(self, body):
        self.calls.append(body)
        if self.failures:
            said = f"Incorrect key: {body['key']}, {body['tenant']}" if self.echo else "try later"
            return self.failures.pop(0), {"error": {"message": said}}
        ids = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        with self.lock, torch.no_grad():
            answer = []
            while len(answer) < body["max_tokens"] and (not answer or answer[-1] != self.tokenizer.eos_token_id):
                answer.append(int(self.model(torch.tensor([[*ids, *answer]])).logits[0, -1].argmax()))
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        ended = answer[-1] == self.tokenizer.eos_token_id
        return 200, self.change(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop" if ended else "length",
                        "message": {"role": "assistant", "content": text},
                    }
                ],
                "usage": {
                    "prompt_tokens": len(ids),
                    "completion_tokens": len(answer),
                    "total_tokens": len(ids) + len(answer),
                    "prompt_tokens_details": {"cached_tokens": 7},
                },
            }
        )


@pytest.fixture
def served():
    answers = Answers()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body["key"], body["tenant"] = self.headers["Authorization"], self.headers["X-Tenant"]
            status, content = answers.respond(body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 429:
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    answers.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield answers
    server.shutdown()
    server.server_close()


def endpoint(served, **options):
    return Endpoint(served.url, "tiny", **{"api_key_variable": None, "max_retries": 2, **options})


def plan(**options):
    return measurement_plan(make_tokenizer(), REQUESTS, BASELINE, **{"max_new_tokens": 5, **options})


def test_endpoint_counts_and_answers_as_the_local_arms(served, monkeypatch):
    measured = plan()
    for name, baseline in (("prompted", BASELINE), ("untuned", None)):
        found = endpoint_arm(endpoint(served), measured, baseline, progress=False)
        local = run_arm(name, make_model(), make_tokenizer(), measured, timed_requests=0, progress=False)
        assert found.input_tokens == local.input_tokens
        assert found.output_tokens == local.output_tokens
        assert found.outputs == local.outputs
        assert found.scores == local.scores
        assert found.truncated == local.truncated
        assert found.cached_prefix_tokens == (7,) * len(REQUESTS)
    assert {call["temperature"] for call in served.calls} == {0.0}
    monkeypatch.setenv("SOME_KEY", "secret")
    endpoint_arm(endpoint(served, api_key_variable="SOME_KEY"), measured, progress=False)
    assert served.calls[-1]["key"] == "Bearer secret"


def half(output, reference):
    return 0.5


def test_token_savings_compares_the_tuned_model_with_an_endpoint(served, model_folder, trainer_options, tmp_path):
    prices = Prices(10.0, 20.0, cached_input=1.0, tuned_input=0.1, tuned_output=0.2, currency="USD", date="2026-01-31")
    savings = TokenSavings(
        BASELINE,
        endpoint=endpoint(served),
        prices=prices,
        scorer=half,
        max_new_tokens=5,
        timed_requests=0,
        resamples=99,
    )
    rows = make_rows(30)
    data = PairDataModule(rows[:16], validation=rows[16:20], test=rows[20:], batch_size=8, cache_dir=False)
    module = FullFineTuning(model_folder, learning_rate=1e-2)
    trainer = Trainer(max_steps=6, callbacks=[savings], **trainer_options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
    result = savings.result
    assert len(served.calls) == 10  # each test request once, with the prompt
    assert result.arms["prompted"].cached_prefix_tokens == (7,) * 10
    full, cached, out = 10.0, 1.0, 20.0
    arm = result.arms["prompted"]
    expected = sum(
        full * (i - c) + cached * c + out * o
        for i, c, o in zip(arm.input_tokens, arm.cached_prefix_tokens, arm.output_tokens, strict=True)
    )
    assert result.costs.prompted_cached == pytest.approx(expected / 10 / 1e6)
    assert any("answered by tiny at http://127.0.0.1" in warning for warning in result.warnings)
    assert result.provenance["prompted_by"] == f"tiny at {served.url}"
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert "secret" not in (tmp_path / "run.ckpt").read_bytes().decode("latin-1")


def test_state_of_another_endpoint_is_refused(served):
    measurement = SavingsMeasurement(
        make_tokenizer(), REQUESTS, BASELINE, endpoint=endpoint(served), max_new_tokens=5, progress=False
    )
    measurement.before(make_model())
    local = SavingsMeasurement(make_tokenizer(), REQUESTS, BASELINE, max_new_tokens=5, progress=False)
    with pytest.raises(SavingsError, match="was measured with other requests"):
        local.load_state_dict(measurement.state_dict())


def test_failed_calls_are_repeated_and_then_reported(served, monkeypatch):
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0.0)
    served.failures = [429, 500]
    found = endpoint_arm(endpoint(served, concurrency=1), plan(), progress=False)
    assert len(served.calls) == len(REQUESTS) + 2
    assert len(found.ids) == len(REQUESTS)
    served.failures = [503] * 100
    with pytest.raises(SavingsError, match=r"Request 'r0' to 'tiny' at http.* failed .max_retries=2.: .*try later"):
        endpoint_arm(endpoint(served, concurrency=1), plan(), progress=False)
    served.failures = [401]
    with pytest.raises(SavingsError, match="AuthenticationError"):
        endpoint_arm(endpoint(served, concurrency=1), plan(), progress=False)


def test_errors_never_show_what_the_server_was_sent_in_secret(served, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret-1\n")
    served.failures = [401]
    served.echo = True
    options = {"extra_headers": {"X-Tenant": "secret-2"}}
    with pytest.raises(SavingsError, match="Incorrect key: Bearer <secret>, <secret>") as refused:
        endpoint_arm(endpoint(served, api_key_variable="SOME_KEY", concurrency=1, options=options), plan())
    assert "secret-" not in str(refused.value)


def test_options_that_the_client_does_not_take_are_reported(served):
    with pytest.raises(SavingsError, match=r"Request 'r0' .* TypeError: .*no_such"):
        endpoint_arm(endpoint(served, concurrency=1, options={"no_such": 1}), plan())


@contextmanager
def silent():
    """A server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


def test_servers_that_stall_or_do_not_exist_are_reported():
    with silent() as url:
        stalled = Endpoint(url, "x", api_key_variable=None, timeout=0.2, max_retries=0, concurrency=1)
        with pytest.raises(SavingsError, match="APITimeoutError"):
            endpoint_arm(stalled, plan(), progress=False)
    gone = Endpoint("http://127.0.0.1:9/v1", "x", api_key_variable=None, max_retries=0)
    with pytest.raises(SavingsError, match="APIConnectionError"):
        endpoint_arm(gone, plan(), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"usage": None}, "the response has no usage"),
        ({"choices": []}, "the response has no answer"),
        ({"choices": [{"index": 0, "message": None}]}, "the response has no answer"),
        ({"choices": {"0": "text"}}, "the response has no answer"),
        ({"choices": ["text"]}, "the response has no answer"),
        ({"choices": [{"index": 0, "message": {"content": "a"}}] * 2}, "2 answers and one usage for all of them"),
        ({"choices": [{"index": 0, "message": {"content": ["a"]}}]}, "its answer is a list, expected text"),
        ({"usage": "9 tokens"}, "isn't three counts of tokens"),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": [7]}}, "isn't three counts of tokens"),
        ({"usage": {"prompt_tokens": 0, "completion_tokens": 1, "total_tokens": 1}}, "usage contradicts the answer"),
        ({"usage": {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}}, "usage contradicts the answer"),
        (
            {
                "usage": {
                    "prompt_tokens": 9,
                    "completion_tokens": 1,
                    "total_tokens": 10,
                    "prompt_tokens_details": {"cached_tokens": 10},
                }
            },
            "10 of them cached",
        ),
        ({"usage": {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}}, "at most 5 were requested"),
        ({"usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 99}}, "leaves tokens out: 9 input"),
        (
            {
                "usage": {
                    "prompt_tokens": 9,
                    "completion_tokens": 2,
                    "completion_tokens_details": {"reasoning_tokens": 80},
                }
            },
            "2 output tokens, 80 of reasoning, so costs",
        ),
        (
            {
                "usage": {
                    "prompt_tokens": 9,
                    "completion_tokens": 2,
                    "total_tokens": 15,
                    "prompt_tokens_details": {"cached_tokens": 4},
                }
            },
            "15 in total, so costs can't be computed. The 4 cached ones aren't among its input tokens",
        ),
        ({"choices": None, "error": {"message": "no credits", "code": 402}}, "the response has an error: no credits"),
        ({"choices": [], "error": "no credits"}, "the response has an error: no credits"),
    ],
)
def test_answers_that_cannot_be_true_are_refused(served, change, message):
    served.change = lambda response: {**response, **change}
    with pytest.raises(SavingsError, match=message):
        endpoint_arm(endpoint(served, concurrency=1), plan(), progress=False)


def test_pages_and_errors_of_status_200_are_reported_without_secrets(served, monkeypatch):
    served.change = lambda response: {**response, "error": {}}  # an empty one is none
    assert endpoint_arm(endpoint(served), plan(), progress=False).ids
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    served.change = lambda response: {"error": {"message": "the key sk-0123456789 is blocked"}}
    with pytest.raises(SavingsError, match="has an error: the key <secret> is blocked"):
        endpoint_arm(endpoint(served, api_key_variable="OPENAI_API_KEY"), plan(), progress=False)
    served.change = lambda response: "<html>Log in</html>"
    with pytest.raises(SavingsError, match=r"sent text and not JSON, as for a page: '<html>Log in</html>'. Check the"):
        endpoint_arm(endpoint(served), plan(), progress=False)


def test_bad_endpoints_and_requests_are_refused(served, monkeypatch):
    with pytest.raises(SavingsError, match="endpoint is a value of type dict: expected Endpoint"):
        TokenSavings(BASELINE, endpoint={"url": served.url})
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SavingsError, match="environment variable OPENAI_API_KEY isn't set"):
        endpoint_arm(Endpoint(served.url, "tiny"), plan(), progress=False)
    for options, message in (
        ({"url": "localhost:8000", "model": "x"}, "expected http://"),
        ({"url": "http://x", "model": ""}, "model is empty"),
        ({"url": "http://x", "model": "x", "concurrency": 0}, "concurrency=0: expected at least 1"),
        ({"url": "http://x", "model": "x", "concurrency": 2.5}, "concurrency=2.5: expected an integer"),
        ({"url": "http://x", "model": "x", "max_retries": "3"}, "max_retries='3': expected an integer"),
        ({"url": "http://x", "model": "x", "timeout": "60"}, "timeout='60', expected a number of seconds"),
        ({"url": "http://x", "model": "x", "timeout": float("nan")}, "timeout=nan, expected a number of seconds"),
        ({"url": "http://x", "model": "x", "options": ["n"]}, "options is a list, expected a dict"),
        ({"url": "http://x", "model": "x", "options": {"n": 2}}, "options has 'n'"),
        ({"url": "http://x", "model": "x", "options": {"model": "y"}}, "options has 'model'"),
        ({"url": "http://[::1/v1", "model": "x"}, "isn't a URL"),
        ({"url": "http://x:port/v1", "model": "x"}, "isn't a URL"),
        ({"url": "http://", "model": "x"}, "isn't a URL"),
        ({"url": "http://me:secret@x/v1", "model": "x"}, "has a user, password, query"),
        ({"url": "https://x/v1?api-key=secret", "model": "x"}, "has a user, password, query"),
    ):
        with pytest.raises(SavingsError, match=message) as refused:
            Endpoint(**options)
        assert "secret" not in str(refused.value)
    restricted = plan(structured_outputs={"regex": "[a-z]+"})
    with pytest.raises(SavingsError, match="structured_outputs is a format of the arms that run here"):
        endpoint_arm(endpoint(served), restricted, progress=False)


@pytest.mark.slow
def test_usage_of_transformers_serve_equals_our_counts(model_folder):
    pytest.importorskip("fastapi")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = Path(sys.executable).parent / "transformers"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    server = subprocess.Popen(
        [command, "serve", *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.5)
        served = Endpoint(f"{url}/v1", model_folder, api_key_variable=None, concurrency=1, max_retries=1, timeout=60)
        measured = plan()
        for name, baseline in (("prompted", BASELINE), ("untuned", None)):
            found = endpoint_arm(served, measured, baseline, progress=False)
            local = run_arm(name, make_model(), make_tokenizer(), measured, timed_requests=0, progress=False)
            assert found.input_tokens == local.input_tokens
            assert found.output_tokens == local.output_tokens
            assert found.outputs == local.outputs
    finally:
        server.terminate()
        server.wait()
