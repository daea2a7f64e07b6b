"""Check one GPU in at most ten minutes: kernels, syncs, exactness, speed and memory against TRL.

    make gpu-check                          # needs a GPU; the report is runs/gpu_check.json
    make gpu-check DRY=1                    # lists the checks with their budgets, on any machine
    python tests/gpu/gpu_check.py --only sft_lora,dpo --size smollm2-135m
    python tests/gpu/gpu_check.py --device cpu --size tiny      # finds mistakes in the checks, shows nothing else

Models have the shape of real ones and random weights, so nothing is downloaded. Each check has a process of its own: if
it fails, crashes or takes too long, the others still run. The exit status is 0 if no check failed, 1 if any did, and 2
without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Whether there is a GPU is found without initializing it here, since processes of the checks are forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from gpu_runner import Check, listing, run_checks  # noqa: E402 needs the path

LIMIT = 600.0
CHECKS = (
    Check("exactness", 60, "packed rows and shared prompts under every attention", "gpu_exact:exactness"),
    Check("kernels", 50, "flash kernels in both passes, no fp32 product over the vocabulary", "gpu_kernels:kernels"),
    Check("syncs", 25, "at most 3 host syncs in an SFT micro-batch and 3 more in a step", "gpu_kernels:syncs"),
    Check("sft_lora", 60, "tokens/s and memory at least TRL's; 30% model-FLOPs utilization", "gpu_speed:sft_lora"),
    Check("sft_full", 60, "tokens/s and memory at least TRL's; 40% model-FLOPs utilization", "gpu_speed:sft_full"),
    Check("dpo", 60, "pairs/s and memory at least TRL's", "gpu_speed:dpo"),
    Check("grpo", 60, "completions/s and memory of an update at least TRL's", "gpu_speed:grpo"),
    Check("rollouts", 30, "sampled tokens/s of each engine, the model's log-probabilities", "gpu_rollouts:rollouts"),
    Check("idle", 25, "at most 10% of training in which the GPU does nothing", "gpu_kernels:idle"),
    Check("head", 25, "as fast as Liger's fused cross-entropy and TRL's, and the same loss", "gpu_parts:head"),
    Check("qlora", 45, "a base in 4 bits trains", "gpu_parts:qlora"),
    Check("sharding", 25, "FSDP2 takes the steps of an unsharded model, offloaded too", "gpu_parts:sharding"),
    Check("compile", 60, "at most 3 graphs over packed batches of many shapes", "gpu_parts:compile_graphs"),
    Check("row_constants", 15, "measures the constant of this GPU that layouts depend on", "gpu_parts:row_constants"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="list the checks with their budgets, and run none")
    parser.add_argument("--only", default="", help="names of checks, separated by commas; by default all")
    parser.add_argument("--size", default="qwen3-0.6b", help="shape of the models")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to find mistakes in the checks")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu_check.json"), help="file for the report")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all checks")
    options = parser.parse_args(arguments)
    wanted = [name for name in options.only.split(",") if name]
    if unknown := sorted(set(wanted) - {check.name for check in CHECKS}):
        parser.error(f"no check is called {', '.join(unknown)}: --dry lists them")
    checks = [check for check in CHECKS if not wanted or check.name in wanted]
    if options.dry:
        print(listing(checks))
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu-check: this machine has no CUDA device that PyTorch can use, so nothing was checked. "
            "`make gpu-check DRY=1` lists the checks.",
            file=sys.stderr,
        )
        return 2
    from gpu_setup import SIZES, Setup

    if options.size not in SIZES:
        parser.error(f"--size {options.size}: expected one of {', '.join(SIZES)}")
    setup = Setup(device=options.device, size=options.size)
    preload = (
        "gpu_exact",
        "gpu_kernels",
        "gpu_parts",
        "gpu_rollouts",
        "gpu_speed",
        "datasets",
        "trl",
        "pytorch_lightning",
    )
    results = run_checks(checks, setup, report=options.json, limit=options.limit, preload=preload)
    counts = {status: sum(result.status == status for result in results) for status in ("pass", "fail", "skip")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"({options.json})")
    return int(counts["fail"] > 0)


if __name__ == "__main__":
    sys.exit(main())
