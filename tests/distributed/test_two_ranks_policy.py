"""Two ranks with half of the prompts each take the same steps as one process; each rank samples independently."""

import pytest
import torch
from predrawn_rollouts import EngineOfPrompts, Records, WithSGD, draw_prompts, largest_difference, run, weights
from ranks import as_rank, free_port, run_ranks, trainer_options
from tiny import make_rows

from lightning_ft import GRPO, PPO, PromptDataModule
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.errors import ConfigError

TOLERANCE = 1e-5
LORA = {"r": 4, "lora_alpha": 16}
GROUP = {"num_completions": 3, "scale_rewards": "batch", "kl_coef": 0.1}
ACTOR = {"num_completions": 2, "whiten_rewards": True, "kl_target": 0.5, "kl_horizon": 100}
CASES = {
    "grpo": (GRPO, {**GROUP, "mask_truncated": True}),
    "grpo-lora": (GRPO, {**GROUP, "loss_type": "grpo", "lora": LORA}),
    "rloo": (GRPO, {**GROUP, "loss_type": "rloo", "learning_rate": 0.002}),
    "ppo": (PPO, ACTOR),
    "ppo-adapter": (PPO, {**ACTOR, "lora": LORA, "critic": "adapter"}),
}


def by_tokens(completion_ids, log_metric, **columns):
    """A reward that differs between completions, and is None for a few; it logs for some of the completions."""
    for ids in completion_ids:
        if len(ids) % 2:
            log_metric("first_token_of_odd", ids[0])
    return [None if sum(ids) % 13 == 0 else (sum(ids) % 11) / 4 for ids in completion_ids]


def make(module_class, model, *, mixed_in=(Records, WithSGD), **options):
    recording = type("Recording", (*mixed_in, module_class), {})
    settings = {"max_new_tokens": 9, "epochs_per_rollout": 2, "micro_batch_size": 3, "learning_rate": 0.02}
    settings |= {"lr_schedule": "constant", "warmup_ratio": 0.0, "dtype": "float32"}
    return recording(model, rewards=by_tokens, **{**settings, **options})


def prompts(strategy):
    """Four rows in the first step, and one in the second, where the second rank has none."""
    size = 4 if strategy == "one" else 2
    return PromptDataModule(make_rows(5), validation=make_rows(9)[6:], batch_size=size, shuffle=False, cache_dir=False)


def with_recorded_completions(module_class, strategy, model, out, more):
    module = make(module_class, model, **more)
    module._engine = EngineOfPrompts(9)
    trainer = Trainer(**trainer_options(strategy, out))
    trainer.fit(module, prompts(strategy))
    return {
        "gradients": module.gradients,
        "weights": weights(module),
        "advantages": module.advantages,
        "kl_coef": module.kl_coef,
        "metrics": {n: float(v) for n, v in trainer.callback_metrics.items() if not n.endswith("seconds")},
        "steps": trainer.global_step,
    }


def with_sampled_completions(strategy, model, out, lora):
    torch.manual_seed(0)
    module = make(GRPO, model, lora=lora, num_completions=3, kl_coef=0.1, max_new_tokens=25, stop=["e", "o"])
    same = [draw_prompts(3, seed=n) for n in range(2)]  # on every rank
    trainer = run(module, same, trainer_options(strategy, out))
    even = {"samples": module.samples, "weights": weights(module), "steps": trainer.global_step}
    even["gap"] = float(trainer.callback_metrics["train/sampling_gap"])
    uneven = resumed_halfway(strategy, model, f"{out}/{'full' if lora is None else 'lora'}", lora)
    return even, uneven


def resumed_halfway(strategy, model, out, lora):
    """A run of two rollouts, and a run that resumes from the checkpoint between them."""
    found = []
    for path in (None, f"{out}/step=4.ckpt"):
        torch.manual_seed(0 if path is None else 5)
        options = {"num_completions": 3, "steps_per_rollout": 2, "max_new_tokens": 25, "stop": ["e", "o"]}
        module = make(GRPO, model, mixed_in=(Records,), lora=lora, **options)  # AdamW has a state to restore
        checkpointing = _pl.callbacks.ModelCheckpoint(out, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = Trainer(**{**trainer_options(strategy, out), "enable_checkpointing": True}, callbacks=[checkpointing])
        trainer.fit(module, prompts(strategy), ckpt_path=path)
        found.append({"samples": module.samples, "weights": weights(module), "steps": trainer.global_step})
    return found


def run_all(rank, strategy, model, out, port):
    """Run all cases on one rank, and save the results in the rank's own file."""
    as_rank(rank, None if strategy == "one" else port)
    found = {
        name: with_recorded_completions(module_class, strategy, model, out, more)
        for name, (module_class, more) in CASES.items()
        if strategy != "fsdp" or module_class is GRPO
    }
    if strategy != "one":
        for name, lora in (("full", None), ("lora", LORA)):
            found[f"sampled-{name}"], found[f"uneven-{name}"] = with_sampled_completions(strategy, model, out, lora)
    if strategy == "fsdp":
        with pytest.raises(ConfigError, match="The critic of PPO can't be sharded yet"):
            Trainer(**trainer_options(strategy, out)).fit(make(PPO, model), prompts(strategy))
    torch.save(found, f"{out}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(model_folder, tmp_path_factory):
    """Function that runs all cases with a strategy, once per strategy, and returns the results of each rank."""
    done = {}

    def once(strategy):
        if strategy not in done:
            out = str(tmp_path_factory.mktemp(strategy))
            count = 1 if strategy == "one" else 2
            run_ranks(run_all, (strategy, model_folder, out, free_port()), count)
            done[strategy] = [torch.load(f"{out}/{rank}.pt", weights_only=True) for rank in range(count)]
        return done[strategy]

    return once


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_match_one_process_in_rl(ranks, strategy):
    (one,), (first, second) = ranks("one"), ranks(strategy)
    names = [name for name in one if strategy == "ddp" or "ppo" not in name]
    assert names == [name for name in first if name in CASES]
    for name in names:
        expected, actual, other = one[name], first[name], second[name]
        assert expected["steps"] == actual["steps"] == other["steps"] == 4
        for a, b in zip(actual["gradients"], expected["gradients"], strict=True):
            assert largest_difference(a, b) < TOLERANCE
            assert max(float(g.abs().max()) for g in b.values()) > 0.01
        assert largest_difference(actual["weights"], expected["weights"]) < TOLERANCE
        assert largest_difference(actual["weights"], other["weights"]) == 0.0
        together = [torch.cat(parts) for parts in zip(actual["advantages"], other["advantages"], strict=True)]
        for a, b in zip(together, expected["advantages"], strict=True):
            torch.testing.assert_close(a.sort().values, b.sort().values, rtol=0, atol=TOLERANCE)
        assert len(other["advantages"][1]) == 0 < len(actual["advantages"][1])
        assert actual["kl_coef"] == pytest.approx(expected["kl_coef"], abs=1e-7)
        assert expected["kl_coef"] != 0.05  # PPO's coefficient has changed
        assert actual["metrics"].keys() == expected["metrics"].keys()
        assert {"train/kl", "train/reward_std", "val/reward", "val/completion_length"} <= expected["metrics"].keys()
        assert {"train/first_token_of_odd", "val/first_token_of_odd"} <= expected["metrics"].keys()
        for metric, value in expected["metrics"].items():
            assert actual["metrics"][metric] == pytest.approx(value, abs=TOLERANCE), (name, metric)
            assert other["metrics"][metric] == pytest.approx(value, abs=TOLERANCE), (name, metric)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_ranks_sample_independently(ranks, strategy):
    first, second = ranks(strategy)
    for name in ("sampled-full", "sampled-lora"):
        assert first[name]["steps"] == second[name]["steps"] == 4
        for a, b in zip(first[name]["samples"], second[name]["samples"], strict=True):
            assert len(a) == len(b) == 9
            assert not set(a) & set(b)
        lengths = {len(ids) for found in (first, second) for part in found[name]["samples"] for ids in part}
        assert len(lengths) > 8
        assert first[name]["gap"] < 1e-4
        assert largest_difference(first[name]["weights"], second[name]["weights"]) == 0.0


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_uneven_and_empty_steps_finish_and_resume(ranks, strategy):
    """Two steps per epoch: one prompt on each rank, then some completions of one prompt on one rank only."""
    first, second = ranks(strategy)
    for name in ("uneven-full", "uneven-lora"):
        for found, counts in ((first, [6, 3]), (second, [6, 0])):
            whole, *resumed = found[name]
            assert [len(part) for part in whole["samples"]] == counts
            assert whole["steps"] == 8
            assert len(resumed) == 1
            for again in resumed:
                assert again["steps"] == 8
                assert again["samples"] == whole["samples"][1:]
                assert largest_difference(again["weights"], whole["weights"]) == 0.0
        assert largest_difference(first[name][0]["weights"], second[name][0]["weights"]) == 0.0
