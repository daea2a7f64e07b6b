"""docs/tutorial.md is run from its first block to its last, on fewer rows: CSV, preview, fit, answers, a server."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import pytest
from guide_code import ROOT, SUPPORT, all_blocks, commands, rows, write_rows

from lightning_ft.__main__ import main

PAGE = "docs/tutorial.md"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A working directory whose support example has few rows."""
    data = tmp_path / "examples" / "support" / "data"
    data.mkdir(parents=True)
    (tmp_path / "examples" / "tiny_base").symlink_to(ROOT / "examples" / "tiny_base")
    (data.parent / "baseline.json").symlink_to(SUPPORT.parent / "baseline.json")
    write_rows(data / "train.jsonl", rows("train", 96))
    write_rows(data / "test.jsonl", rows("test", 24))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def servers():
    started = []
    yield started
    for server in started:
        server.terminate()
        server.wait()


def serve(arguments, port):
    """Start a server and wait until it answers."""
    command = [Path(sys.executable).parent / "transformers", *arguments, "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1)
            return server
        except OSError:
            assert server.poll() is None
            time.sleep(0.5)
    raise AssertionError("The server doesn't answer.")


def run_command(program, arguments, port, servers):
    if program == "lightning-ft" and arguments[0] == "fit":
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 3  # the gate, which so few rows can't pass
    elif program == "lightning-ft":
        main(arguments)
    elif program == "transformers":
        servers.append(serve(arguments, port))


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_tutorial_runs_from_the_csv_to_the_server(folder, port, servers, capsys):
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    namespace, printed = {}, []
    for block in all_blocks("python", "yaml", "csv", ""):
        if block.page != PAGE:
            continue
        code = block.code.replace("8000", str(port))
        if block.language == "csv":
            lines = (folder / block.title).read_text(encoding="utf-8").splitlines()
            assert lines[: len(code.splitlines())] == code.splitlines()
        elif block.language == "yaml":
            (folder / block.title).write_text(code)
        elif block.language == "python":
            capsys.readouterr()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(code, PAGE, "exec"), namespace)
            printed.append(capsys.readouterr().out.strip())
        for program, *arguments in commands(block._replace(code=code)) if block.language == "" else ():
            run_command(program, arguments, port, servers)

    _, local, served = printed
    answer, tokens = re.fullmatch(r"(.*) (\d+)", served, re.DOTALL).groups()
    assert answer == local
    assert int(tokens) > 0
    assert list(folder.glob("runs/tickets/version_0/token_savings/token_savings.json"))
    assert (folder / "runs/tickets/version_0/report/report.html").is_file()
