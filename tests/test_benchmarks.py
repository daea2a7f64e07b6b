"""The contenders of the benchmarks compute the same on a tiny model, as they must before anything is timed."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    """Benchmarks are programs whose modules lie next to each other."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if (FOLDER / f"{name}.py").exists():
            del sys.modules[name]


def tiny_case(name):
    """A benchmark's module, a small case of it, and the differences that it allows."""
    from models import Size

    size, untied = Size(512, 64, 2), Size(512, 64, 2, tied=False)
    if name == "sft":
        import sft

        case = sft.Case(size, lora=True, prompt=20, answer=8, batch=4, steps=2)
        return sft, case, sft.agree(case)
    if name == "pairs":
        import pairs

        return pairs, pairs.Case("dpo", True, size, prompt=20, answer=8, batch=2, steps=2), pairs.AGREE["dpo"]
    if name == "grpo":
        import grpo

        return grpo, grpo.Case(True, 0.0, size, prompt=20, completion=8, group=4, steps=2), grpo.AGREE
    import rollouts

    return rollouts, rollouts.Case(20, 8, untied, group=4), {"greedy": 0.0, "lengths": 0.0}


@pytest.mark.parametrize("name", ["sft", "pairs", "grpo", "rollouts"])
def test_contenders_agree(name):
    import harness

    module, case, agree = tiny_case(name)
    ours, peer = module.ours(case)(), module.trl(case)()
    for value, limit in agree.items():
        assert harness._apart(ours[value], peer[value]) <= limit, value


def test_cached_activations_give_the_same_step():
    import activation_cache
    from models import Size

    case = activation_cache.Case(Size(512, 64, 2), top=1)
    activation_cache.check(case)
    assert activation_cache.frozen(case)()["loss"] == pytest.approx(activation_cache.full(case)()["loss"], abs=1e-5)
