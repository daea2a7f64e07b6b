"""Results as runs write them: a support model of 300 requests, and three methods compared on them."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.savings.arithmetic import ArmRecords, Prices, token_savings

DEPARTMENTS = ("billing", "shipping", "returns", "technical support", "sales")
HOSTILE = '<script>document.title="hacked"</script><img src="http://outside.example/x.png" onerror="document.title=1">'
PRICES = Prices(0.15, 0.60, 0.015, training=4.2, data=30.0, sweep=6.5, currency="USD", date="2026-01-31")


def make_arm(name, quality, *, n=300, seed=0, hostile=False):
    """Records of one arm whose scores have about this mean; requests are as hard in every arm."""
    rng, order = random.Random(f"{name} {seed}"), random.Random(1)
    hardness = [order.random() for _ in range(n)]
    scores = tuple(float(0.85 * hard + 0.15 * rng.random() < quality) for hard in hardness)
    request_tokens = [17 + order.randrange(14) for _ in range(n)]
    system, examples = (310, 84) if name == "prompted" else (0, 0)
    template = 21 if name == "prompted" else 9
    right = [DEPARTMENTS[k % len(DEPARTMENTS)] for k in range(n)]
    wrong = [f"{name} thinks {DEPARTMENTS[(k + 2) % len(DEPARTMENTS)]}" for k in range(n)]
    outputs = [good if score else bad for good, bad, score in zip(right, wrong, scores, strict=True)]
    if hostile:
        outputs = [HOSTILE if not score else answer for answer, score in zip(outputs, scores, strict=True)]
    return ArmRecords(
        ids=tuple(f"test-{k:03d}" for k in range(n)),
        input_tokens=tuple(system + examples + template + tokens for tokens in request_tokens),
        output_tokens=tuple(4 + rng.randrange(4) + (6 if name == "untuned" else 0) for _ in range(n)),
        scores=scores,
        truncated=tuple(rng.random() < 0.01 for _ in range(n)),
        cached_prefix_tokens=(system + examples + 8,) * n,
        outputs=tuple(outputs),
        parts={
            "system": system * n,
            "few_shot": examples * n,
            "template": template * n,
            "request": sum(request_tokens),
        },
        first_token_seconds={
            "cold": tuple((0.0412 if name == "prompted" else 0.0063) * (1 + k / 50) for k in range(6))
        },
        prefill_flops=2.1e9 if name == "prompted" else 1.9e8,
        kv_cache_bytes=3.3e6 if name == "prompted" else 3.1e5,
    )


def make_questions(n):
    requests = tuple(f"Where do I turn with case {k}? <b>It's urgent & late</b>" for k in range(n))
    return requests, tuple(DEPARTMENTS[k % len(DEPARTMENTS)] for k in range(n))


def make_savings(*, tuned=0.93, hostile=True, prices=PRICES, resamples=299, n=300):
    result = token_savings(
        make_arm("prompted", 0.88, n=n),
        make_arm("tuned", tuned, n=n, hostile=hostile),
        make_arm("untuned", 0.21, n=n),
        margin=0.05,
        prices=prices,
        resamples=resamples,
        provenance={
            "model": "Qwen/Qwen3-0.6B",
            "baseline": "3f1c0a9be2d47716",
            "measured": "9d2b1f0c44aa8e05",
            "requests": n,
            "requests_available": 2 * n,
            "seed": 3,
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        },
    )
    requests, references = make_questions(n)
    return replace(result, requests=requests, references=references)


def make_retention(kl=0.031, *, top_k=None):
    from lightning_ft.evaluation.retention.arithmetic import RetentionResult

    return RetentionResult(
        kl_general=Interval(kl, kl * 0.86, kl * 1.17),
        ppl_ratio=Interval(1 + kl / 3, 1 + kl / 4, 1 + kl / 2),
        top1_agreement=Interval(1 - kl, 1 - 1.2 * kl, 1 - 0.8 * kl),
        kl_task=Interval(20 * kl, 18 * kl, 23 * kl),
        base="adapter_off" if top_k is None else "step_0",
        top_k=top_k,
        texts=64,
        tokens=16_320,
        task_rows=64,
        task_tokens=412,
        texts_hash="77aa10c2d3e4f506",
        step=375,
        provenance={"texts": "bundled"},
    )


def make_compute(flops=2.4e14, *, trainable=1_900_000, memory=3.1e9, seconds=512.0):
    from lightning_ft.evaluation.compute.arithmetic import ComputeResult

    return ComputeResult(
        flops=flops,
        flops_source="counted",
        sampled_steps=9,
        steps=375,
        tokens=1_204_000,
        supervised_tokens=61_300,
        train_seconds=seconds,
        peak_memory_bytes=int(memory),
        memory_source="cuda",
        trainable_parameters=trainable,
        parameters=596_000_000,
        available_flops=3.12e14,
        device="NVIDIA A100",
        dtype="bf16-mixed",
        memory_at_start_bytes=int(1.2e9),
    )


METHODS = {  # quality with all rows, FLOPs, trained parameters, memory, seconds, KL, bytes, learning rates
    "full": (0.94, 2.4e14, 596_000_000, 11.5e9, 640.0, 0.21, 1_192_000_000, (1e-5, 3e-5, 1e-4)),
    "lora": (0.93, 1.7e14, 10_100_000, 5.2e9, 455.0, 0.031, 40_400_000, (1e-4, 3e-4, 1e-3)),
    "frozen_trunk": (0.86, 3.1e13, 1_300_000, 2.4e9, 102.0, 0.012, 5_200_000, (3e-4, 1e-3, 3e-3)),
}


def make_trained(method, rate, seed, rows, reached, *, answers=True):
    """One run of a method that reached this quality."""
    from lightning_ft.evaluation.comparison.result import CurvePoint, RunResult

    _, flops, trainable, memory, seconds, kl, size, _ = METHODS[method]
    share = rows / 4000
    points = tuple(
        CurvePoint(
            int(375 * share * part),
            flops * share * part,
            seconds * share * part,
            0.21 + (reached - 0.21) * (1 - 0.001**part),
        )
        for part in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
    )
    return RunResult(
        method,
        seed,
        rate,
        rows,
        reached,
        make_arm(method, reached, seed=seed) if answers else None,
        points,
        make_compute(flops * share, trainable=trainable, memory=memory, seconds=seconds * share),
        make_retention(kl * (1 + 0.1 * seed), top_k=64 if method == "full" else None),
        size,
        seconds + 60,
        f"{method}-{rate:g}",
    )


def make_comparison(*, resamples=299):
    """Three methods with three seeds each, a grid of learning rates, and fewer rows."""
    from lightning_ft.evaluation.comparison.methods import EvaluationSet, compare_methods
    from lightning_ft.evaluation.comparison.result import RunResult

    runs = [
        RunResult(name, 0, None, None, quality, make_arm(name, quality))
        for name, quality in (("untuned", 0.21), ("prompted", 0.88))
    ]
    for method, (quality, *_, (low, rate, high)) in METHODS.items():
        runs += [make_trained(method, other, 0, 4000, quality - 0.06, answers=False) for other in (low, high)]
        runs += [make_trained(method, rate, seed, 4000, quality + 0.008 * (seed - 1)) for seed in range(3)]
        for rows, lost in ((100, 0.41), (500, 0.17), (1000, 0.07)):
            runs.append(make_trained(method, rate, 0, rows, quality - lost))
    test_set = EvaluationSet(*make_questions(300), margin=0.05, prices=PRICES, metrics=_metrics)
    provenance = {"data": "0c44aa8e059d2b1f", "model": "Qwen/Qwen3-0.6B", "seeds": [0, 1, 2]}
    return compare_methods(runs, test_set, provenance=provenance, resamples=resamples)


def _metrics(outputs, references):
    right = [output == reference for output, reference in zip(outputs, references, strict=True)]
    return {"intent accuracy": sum(right) / len(right), "macro-F1": 0.98 * sum(right) / len(right)}


def write(folder, name, result):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(result.to_dict(), allow_nan=False))


def write_run(folder, **options):
    """A run's folder, as the callbacks leave it."""
    write(folder / "token_savings", "token_savings.json", make_savings(**options))
    write(folder / "retention", "retention.json", make_retention())
    write(folder / "compute", "compute.json", make_compute())
    return folder


@pytest.fixture(scope="session")
def make():
    """Makers of results, and of the files and folders that hold them."""
    return SimpleNamespace(
        arm=make_arm,
        savings=make_savings,
        retention=make_retention,
        compute=make_compute,
        write=write,
        run=write_run,
        prices=PRICES,
        hostile=HOSTILE,
    )


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def comparison():
    return make_comparison()


@pytest.fixture(scope="session")
def comparison_folder(tmp_path_factory, comparison):
    folder = tmp_path_factory.mktemp("comparison")
    write(folder, "comparison.json", comparison)
    return folder
