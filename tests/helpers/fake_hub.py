"""A Hugging Face hub on loopback: the endpoints that an upload calls, with repositories in memory."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_theTokenOfThisTest"


class FakeHub:
    """Repositories by name, each with its files as bytes, visibility and number of commits.

    Set `failing` to a pattern of paths that are answered with an error.
    """

    def __init__(self):
        self.repos, self.objects, self.calls = {}, {}, []
        self.failing = None

    def add(self, name, visibility="private", **files):
        self.repos[name] = {"files": {".gitattributes": b"", **files}, "visibility": visibility, "commits": 1}

    def files(self, name):
        return {path: data for path, data in self.repos[name]["files"].items() if path != ".gitattributes"}

    def respond(self, method, path, body, token):
        self.calls.append(f"{method} {path}")
        if self.failing is not None and re.search(self.failing, path):
            return 500, {"error": "out of order"}
        if method == "PUT":
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "someone", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if match := re.fullmatch(r"/(\w+/[\w-]+)\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": [self.upload(o) for o in json.loads(body)["objects"]]}
        match = re.fullmatch(r"/api/models/(\w+/[\w-]+)(?:/(preupload|commit)/main)?", path)
        if match is None or match[1] not in self.repos:
            return 404, {"error": "Repository not found"}
        if match[2] is None:
            repo = self.repos[match[1]]
            files = [{"rfilename": path} for path in repo["files"]]
            return 200, {"id": match[1], "private": repo["visibility"] == "private", "siblings": files, "tags": []}
        if match[2] == "preupload":
            return 200, {"files": [self.mode(file["path"]) for file in json.loads(body)["files"]]}
        return self.commit(match[1], [json.loads(line) for line in body.splitlines()])

    def create(self, config):
        name = f"{config.get('organization') or 'someone'}/{config['name']}"
        if name in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}
        self.add(name)
        self.repos[name]["visibility"] = config.get("visibility", "private" if config.get("private") else "public")
        return 200, {"url": f"{self.address}/{name}", "name": name}

    @staticmethod
    def mode(path):
        stored = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": stored, "shouldIgnore": False, "oid": None}

    def upload(self, wanted):
        return {**wanted, "actions": {"upload": {"href": f"{self.address}/storage/{wanted['oid']}"}}}

    def commit(self, name, lines):
        repo = self.repos[name]
        files = dict(repo["files"])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                files[value["path"]] = data
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo["files"], repo["commits"] = files, repo["commits"] + 1
        return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40}


@contextmanager
def running_hub(monkeypatch, *, token=TOKEN):
    """Start a hub that huggingface_hub talks to, and yield it.

    Args:
        monkeypatch: Pytest's fixture.
        token: Token of the user; None for none.
    """
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, content = hub.respond(self.command, self.path.split("?")[0], body, sent)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = reply

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    # as HF_ENDPOINT and the others set them, which are read when the package is imported
    for name, value in (("ENDPOINT", hub.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # of retries
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
