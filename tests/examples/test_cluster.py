"""Runs that torchrun and SLURM's script start again continue: the final weights are those of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from guide_code import ROOT
from ranks import free_port
from tiny import make_rows

pytestmark = pytest.mark.slow

INTERRUPTIONS = '''
"""Callbacks that interrupt a run once, after the checkpoint of step 4."""
import os, signal, time
from pathlib import Path
from lightning_ft._lightning import Callback

class Interruption(Callback):
    how = None
    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 5 and not Path(f"interrupted{trainer.global_rank}").exists():
            Path(f"interrupted{trainer.global_rank}").touch()
            self.interrupt(trainer)

class Kill(Interruption):
    def interrupt(self, trainer):
        if trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

class Wait(Interruption):
    def interrupt(self, trainer):
        time.sleep(600)
'''
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
os.setpgid(0, 0)
open("srun.pid", "w").write(str(os.getpid()))
ids = [{{"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0"}} for rank in "01"]
tasks = [subprocess.Popen(sys.argv[1:], env={{**os.environ, **one}}) for one in ids]
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = f"""#!{sys.executable}
import os, signal, sys
open("scontrol", "w").write(" ".join(sys.argv[1:]))
os.killpg(int(open("srun.pid").read()), signal.SIGKILL)
"""


@pytest.fixture
def launch(tmp_path, model_folder):
    """Starts a command in a folder of its own, with stand-ins for SLURM's programs."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "interruptions.py").write_text(INTERRUPTIONS)
    command = f'#!/bin/sh\nexec {sys.executable} -m lightning_ft "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("lightning-ft", command)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def start(name, callback, arguments, **environment):
        folder = tmp_path / name
        (folder / "examples/cluster").mkdir(parents=True, exist_ok=True)
        added = (ROOT / "examples/cluster/slurm.yaml").read_text()
        assert "every_n_train_steps: 100" in added
        added = added.replace("every_n_train_steps: 100", "every_n_train_steps: 2")
        (folder / "examples/cluster/slurm.yaml").write_text(added)
        checkpoints = yaml.safe_load(added)["trainer"]["callbacks+"]
        callbacks = [] if callback is None else [{"class_path": f"interruptions.{callback}"}]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(20)))
        trainer = {"max_epochs": 2, "accelerator": "cpu", "strategy": "ddp", "logger": False, "callbacks": callbacks}
        lora = {"model": model_folder, "dtype": "float32", "lora": {"r": 4, "lora_dropout": 0.1}}
        config = {
            "seed_everything": 0,
            "trainer": trainer | {"enable_progress_bar": False},
            "model": {"class_path": "lightning_ft.LoRAFineTuning", "init_args": lora},
            "data": {
                "class_path": "lightning_ft.PairDataModule",
                "init_args": {"train": "rows.jsonl", "batch_size": 2, "cache_dir": str(folder / "cache")},
            },
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        (folder / "checkpoints.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": checkpoints}}))
        paths = [str(programs), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = (
            os.environ
            | environment
            | {
                "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join(paths),
            }
        )
        log = (folder / "log").open("a")
        return folder, subprocess.Popen(arguments, cwd=folder, env=environment, stdout=log, stderr=log)

    return start


TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"),
    *("-m", "lightning_ft", "fit", "--config", "run.yaml", "--config", "checkpoints.yaml"),
    *("--ckpt_path", "last", "--trainer.devices", "2"),
]


def finish(folder, process):
    assert process.wait(timeout=900) == 0, (folder / "log").read_text()[-5000:]
    return torch.load(folder / "runs/slurm/last.ckpt", weights_only=True)


def until(exists, process, folder):
    while not all(path.exists() for path in exists):
        assert process.poll() is None, (folder / "log").read_text()[-5000:]
        time.sleep(0.2)


def test_runs_that_are_started_again_end_with_the_weights_of_an_undisturbed_one(launch):
    arguments = [*TORCHRUN, "--trainer.num_nodes", "1"]
    port = {"MASTER_PORT": str(free_port())}
    whole = finish(*launch("whole", None, arguments))
    restarted, process = launch("killed", "Kill", arguments, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    killed = finish(restarted, process)

    script = ["bash", str(ROOT / "examples/cluster/slurm.sh"), "--config", "run.yaml"]
    slurm = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "lightning-ft",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1",
    } | port
    folder, job = launch("requeued", "Wait", script, **slurm)
    until([folder / "interrupted0", folder / "interrupted1"], job, folder)
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=60)
    assert (folder / "scontrol").read_text() == "requeue 17"
    requeued = finish(*launch("requeued", "Wait", script, **slurm))

    assert whole["global_step"] == 10
    for other in (killed, requeued):
        assert other["global_step"] == 10
        assert other["state_dict"].keys() == whole["state_dict"].keys()
        assert all(torch.equal(other["state_dict"][name], weight) for name, weight in whole["state_dict"].items())
    for continued in (restarted, folder):  # and not from scratch
        assert "Restored all states" in (continued / "log").read_text()
