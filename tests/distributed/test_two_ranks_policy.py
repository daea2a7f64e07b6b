"""Two ranks of half the prompts make the steps that one process makes of all; each samples completions of its own."""

import pytest
import torch
from given_rollouts import EngineOfPrompts, Records, WithSGD, draw_prompts, largest_difference, run, weights
from ranks import as_rank, free_port, run_ranks, trainer_options
from tiny import make_rows

from lightning_ft import GRPO, PPO, PromptDataModule
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.errors import ConfigError

TOLERANCE = 1e-5
LORA = {"r": 4, "lora_alpha": 16}
GROUP = {"num_completions": 3, "scale_rewards": "batch", "kl_coef": 0.1}
ACTOR = {"num_completions": 2, "whiten_rewards": True, "kl_target": 0.5, "kl_horizon": 100}
GIVEN = {
    "grpo": (GRPO, {**GROUP, "mask_truncated": True}),
    "grpo-lora": (GRPO, {**GROUP, "loss_type": "grpo", "lora": LORA}),
    "rloo": (GRPO, {**GROUP, "loss_type": "rloo", "learning_rate": 0.002}),
    "ppo": (PPO, ACTOR),
    "ppo-adapter": (PPO, {**ACTOR, "lora": LORA, "critic": "adapter"}),
}


def by_tokens(completion_ids, **columns):
    """Something that differs between completions, and no reward for a few."""
    return [None if sum(ids) % 13 == 0 else (sum(ids) % 11) / 4 for ids in completion_ids]


def make(kind, model, *, mixed_in=(Records, WithSGD), **options):
    recording = type("Recording", (*mixed_in, kind), {})
    settings = {"max_new_tokens": 9, "epochs_per_rollout": 2, "micro_batch_size": 3, "learning_rate": 0.02}
    settings |= {"lr_schedule": "constant", "warmup_ratio": 0.0, "dtype": "float32"}
    return recording(model, rewards=by_tokens, **{**settings, **options})


def prompts(how):
    """Four rows in the first step, one in the second, in which the second rank has none."""
    size = 4 if how == "one" else 2
    return PromptDataModule(make_rows(5), validation=make_rows(9)[6:], batch_size=size, shuffle=False, cache_dir=False)


def with_given_completions(kind, how, model, out, more):
    module = make(kind, model, **more)
    module._engine = EngineOfPrompts(9)
    trainer = Trainer(**trainer_options(how, out))
    trainer.fit(module, prompts(how))
    return {
        "gradients": module.gradients,
        "weights": weights(module),
        "advantages": module.advantages,
        "kl_coef": module.kl_coef,
        "metrics": {n: float(v) for n, v in trainer.callback_metrics.items() if not n.endswith("seconds")},
        "steps": trainer.global_step,
    }


def with_its_own_completions(how, model, out, lora):
    torch.manual_seed(0)
    module = make(GRPO, model, lora=lora, num_completions=3, kl_coef=0.1, max_new_tokens=25, stop=["e", "o"])
    same = [draw_prompts(3, seed=n) for n in range(2)]  # on every rank
    trainer = run(module, same, trainer_options(how, out))
    even = {"samples": module.samples, "weights": weights(module), "steps": trainer.global_step}
    even["gap"] = float(trainer.callback_metrics["train/sampling_gap"])
    uneven = resumed_halfway(how, model, f"{out}/{'full' if lora is None else 'lora'}", lora)
    return even, uneven


def resumed_halfway(how, model, out, lora):
    """A run of two rollouts, and one that goes on from the checkpoint between them."""
    found = []
    for path in (None, f"{out}/step=4.ckpt"):
        torch.manual_seed(0 if path is None else 5)
        options = {"num_completions": 3, "steps_per_rollout": 2, "max_new_tokens": 25, "stop": ["e", "o"]}
        module = make(GRPO, model, mixed_in=(Records,), lora=lora, **options)  # AdamW has a state to be restored
        saver = _pl.callbacks.ModelCheckpoint(out, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = Trainer(**{**trainer_options(how, out), "enable_checkpointing": True}, callbacks=[saver])
        trainer.fit(module, prompts(how), ckpt_path=path)
        found.append({"samples": module.samples, "weights": weights(module), "steps": trainer.global_step})
    return found


def everything(rank, how, model, out, port):
    """What one rank finds, written to a file of its own."""
    as_rank(rank, None if how == "one" else port)
    found = {
        name: with_given_completions(kind, how, model, out, more)
        for name, (kind, more) in GIVEN.items()
        if how != "fsdp" or kind is GRPO
    }
    if how != "one":
        for name, lora in (("full", None), ("lora", LORA)):
            found[f"sampled-{name}"], found[f"uneven-{name}"] = with_its_own_completions(how, model, out, lora)
    if how == "fsdp":
        with pytest.raises(ConfigError, match="PPO's critic can't be sharded yet"):
            Trainer(**trainer_options(how, out)).fit(make(PPO, model), prompts(how))
    torch.save(found, f"{out}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(model_folder, tmp_path_factory):
    """What each rank finds, run once for each way."""
    done = {}

    def once(how):
        if how not in done:
            out = str(tmp_path_factory.mktemp(how))
            count = 1 if how == "one" else 2
            run_ranks(everything, (how, model_folder, out, free_port()), count)
            done[how] = [torch.load(f"{out}/{rank}.pt", weights_only=True) for rank in range(count)]
        return done[how]

    return once


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_gradients_weights_and_figures(ranks, how):
    (one,), (first, second) = ranks("one"), ranks(how)
    names = [name for name in one if how == "ddp" or "ppo" not in name]
    assert names == [name for name in first if name in GIVEN]
    for name in names:
        want, have, other = one[name], first[name], second[name]
        assert want["steps"] == have["steps"] == other["steps"] == 4
        for a, b in zip(have["gradients"], want["gradients"], strict=True):
            assert largest_difference(a, b) < TOLERANCE
            assert max(float(g.abs().max()) for g in b.values()) > 0.01
        assert largest_difference(have["weights"], want["weights"]) < TOLERANCE
        assert largest_difference(have["weights"], other["weights"]) == 0.0
        together = [torch.cat(parts) for parts in zip(have["advantages"], other["advantages"], strict=True)]
        for a, b in zip(together, want["advantages"], strict=True):
            torch.testing.assert_close(a.sort().values, b.sort().values, rtol=0, atol=TOLERANCE)
        assert len(other["advantages"][1]) == 0 < len(have["advantages"][1])
        assert have["kl_coef"] == pytest.approx(want["kl_coef"], abs=1e-7)
        assert want["kl_coef"] != 0.05  # PPO's has moved
        assert have["metrics"].keys() == want["metrics"].keys()
        assert {"train/kl", "train/reward_std", "val/reward", "val/completion_length"} <= want["metrics"].keys()
        for figure, value in want["metrics"].items():
            assert have["metrics"][figure] == pytest.approx(value, abs=TOLERANCE), (name, figure)
            assert other["metrics"][figure] == pytest.approx(value, abs=TOLERANCE), (name, figure)


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_ranks_sample_for_themselves(ranks, how):
    first, second = ranks(how)
    for name in ("sampled-full", "sampled-lora"):
        assert first[name]["steps"] == second[name]["steps"] == 4
        for a, b in zip(first[name]["samples"], second[name]["samples"], strict=True):
            assert len(a) == len(b) == 9
            assert not set(a) & set(b)
        lengths = {len(ids) for found in (first, second) for part in found[name]["samples"] for ids in part}
        assert len(lengths) > 8
        assert first[name]["gap"] < 1e-4
        assert largest_difference(first[name]["weights"], second[name]["weights"]) == 0.0


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_uneven_and_empty_steps_end_and_resume(ranks, how):
    """Two steps a pass: of one prompt on each rank; then of some completions of one prompt, on one rank only."""
    first, second = ranks(how)
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
