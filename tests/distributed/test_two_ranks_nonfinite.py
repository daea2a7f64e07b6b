"""A value that is not finite on one rank stops or skips the step on all ranks."""

import math

import pytest
import torch
from predrawn_rollouts import largest_difference, weights
from ranks import as_rank, free_port, run_ranks, trainer_options
from tiny import make_rows

from lightning_ft import GRPO, FullFineTuning, PairDataModule, PromptDataModule
from lightning_ft._lightning import Callback, Trainer
from lightning_ft.errors import NonFiniteError


class Spike(Callback):
    """Sets an infinite gradient on rank 1 only, before the second optimizer step."""

    def __init__(self):
        self.states = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.states.append(weights(module))
        if trainer.global_step == 1 and trainer.global_rank == 1:
            gradient = next(p.grad for p in module.parameters() if p.grad is not None and p.grad.ndim == 2)
            (gradient.to_local() if hasattr(gradient, "to_local") else gradient)[0, 0] = math.inf


class Broken(FullFineTuning):
    def compute_logprobs(self, batch, reduction="none", **options):
        result = super().compute_logprobs(batch, reduction, **options)
        if self.trainer.global_step == 1 and self.global_rank == 1:
            return result._replace(logprobs=result.logprobs * math.nan)
        return result


def trainer(strategy, out, *callbacks):
    return Trainer(**trainer_options(strategy, out), callbacks=list(callbacks))


def run_all(rank, strategy, model, out, port):
    as_rank(rank, port)

    def reward(completion_ids, trainer_state):
        numbers = [float(sum(ids) % 11) for ids in completion_ids]
        return [math.nan, *numbers[1:]] if rank and trainer_state.global_step == 1 else numbers

    options = {"batch_size": 2, "shuffle": False, "cache_dir": False}
    cases = {
        "supervised": (FullFineTuning, {}, PairDataModule(make_rows(12), **options)),
        "grpo": (
            GRPO,
            {"rewards": reward, "num_completions": 2, "max_new_tokens": 4},
            PromptDataModule(make_rows(12), **options),
        ),
    }
    found = {}
    for name, (module_class, options_of_case, data) in cases.items():
        module = module_class(
            model, dtype="float32", learning_rate=1e-2, weight_decay=0.5, on_nonfinite="skip", **options_of_case
        )
        spike = Spike()
        trainer(strategy, out, spike).fit(module, data)
        states = [*spike.states, weights(module)]
        moved = [largest_difference(a, b) > 0 for a, b in zip(states[1:], states, strict=False)]
        found[name] = {"moved": moved, "skipped": module.skipped_steps, "weights": states[-1]}
    with pytest.raises(NonFiniteError) as error:
        trainer(strategy, out).fit(Broken(model, dtype="float32"), cases["supervised"][2])
    found["error"] = str(error.value)
    torch.save(found, f"{out}/{rank}.pt")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_nonfinite_step_on_one_rank_is_skipped_on_all(strategy, model_folder, tmp_path):
    run_ranks(run_all, (strategy, model_folder, str(tmp_path), free_port()), limit=120)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in ("supervised", "grpo"):
        assert first[name]["moved"] == second[name]["moved"] == [True, False, True]
        assert first[name]["skipped"] == second[name]["skipped"] == 1
        assert largest_difference(first[name]["weights"], second[name]["weights"]) == 0.0
    assert first["error"] == second["error"]
    assert "Optimizer step 2 is not finite" in first["error"]
    assert "It is made of rank 1, batch 1 of epoch 0: rows 7, 8 of train." in first["error"]
