"""Local stand-in for a vLLM server that answers TRL's client without a model."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch
from trl import import_utils
from trl.generation import vllm_client


def logprob(token):
    return -token / 100


class StandIn:
    """A server that records its requests.

    Args:
        answer: Token ids of the n-th completion of a prompt, `answer(prompt, n)`.
    """

    def __init__(self, answer):
        self.answer = answer
        self.requests = []  # (path, body) of each POST
        self.failing = {}  # path -> HTTP status to fail with
        self.changed = lambda choices: choices  # applied to the choices before they are sent
        self.config = {
            "weight_transfer_config": {"backend": "nccl"},
            "model_config": {"logprobs_mode": "processed_logprobs"},
        }

    def posted(self, path):
        return [body for where, body in self.requests if where == path]

    def respond(self, method, path, body):
        if method == "POST":
            self.requests.append((path, body))
        if path in self.failing:
            return self.failing[path], {"error": "out of order"}
        if path == "/v1/models":
            return 200, {"data": [{"id": "served-model"}]}
        if path == "/server_info":
            return 200, {"vllm_config": self.config}
        if path == "/get_world_size":
            return 200, {"world_size": 2}
        if path == "/v1/completions":
            return 200, {"choices": self.changed(self.choices(body))}
        return 200, {}

    def choices(self, body):
        choices = []
        for prompt in body["prompt"]:
            for n in range(body["n"]):
                tokens = self.answer(prompt, n)
                names = [f"token_id:{token}" for token in tokens]
                values = [logprob(token) for token in tokens]
                top_logprobs = [
                    {name: value, "token_id:77": value + 1} for name, value in zip(names, values, strict=True)
                ]
                logprobs = {"tokens": names, "token_logprobs": values, "top_logprobs": top_logprobs}
                choices.append(
                    {
                        "prompt_token_ids": prompt,
                        "token_ids": tokens,
                        "logprobs": None if body["logprobs"] is None else logprobs,
                    }
                )
        return choices


@contextmanager
def serving(answer):
    """Start a stand-in, and yield it with its address."""
    stand_in = StandIn(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.reply("GET")

        def do_POST(self):
            self.reply("POST")

        def reply(self, method):
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, content = stand_in.respond(method, self.path.split("?")[0], json.loads(raw) if raw else None)
            sent = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield stand_in, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Transport:
    """Replacement of vLLM's NCCL transfer that records the tensors."""

    def __init__(self):
        self.opened = []
        self.sent = {}  # name -> tensor, in the order of sending
        self.order = []

    def open(self, init_info):
        self.opened.append(init_info)
        return SimpleNamespace(group=SimpleNamespace(store=None, socket=None))

    def send(self, iterator):
        for name, tensor in iterator:
            self.order.append(name)
            self.sent[name] = tensor.clone()


def without_vllm(monkeypatch, stateful=False):
    """Install the transport where TRL's client calls vLLM, with its old or new interface."""
    transport = Transport()

    def put(name, value):
        monkeypatch.setattr(vllm_client, name, value, raising=False)

    monkeypatch.setattr(import_utils, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda self, response=None: None)
    monkeypatch.setattr("lightning_ft.rollout.vllm.input_device", lambda model: torch.device("cuda"))
    put("is_vllm_available", lambda *args, **kwargs: True)
    put("get_ip", lambda: "127.0.0.1")
    put("_HAS_STATEFUL_TRAINER_ENGINE", stateful)
    put("open_trainer_endpoint", transport.open)
    put("packed_nccl_broadcast_producer", lambda iterator, group, src, post_iter_func: transport.send(iterator))
    put("NCCLTrainerSendWeightsArgs", SimpleNamespace)
    engine = SimpleNamespace(
        trainer_init=transport.open, trainer_send_weights=lambda iterator, trainer_args: transport.send(iterator)
    )
    put("NCCLWeightTransferEngine", engine)
    return transport
