"""PPO against a reference implementation; critics, the KL coefficient, checkpoints and exports."""

import copy
from dataclasses import fields

import ppo_reference
import pytest
import torch
from peft import PeftModel
from ppo_reference import Rollout, Settings
from predrawn_rollouts import Records, WithSGD, draw_prompts, draw_rollout, largest_difference, run
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from lightning_ft import PPO
from lightning_ft.errors import ConfigError

TOLERANCE = 1e-6
LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.2}  # dropout must be switched off, also the critic's
SCORES = [1.0, -0.5, 2.0, 0.25, 1.5, -1.0]
BATCH = draw_prompts(3, columns={"scores": [SCORES[:2], SCORES[2:4], SCORES[4:]]})
ROLLOUT = draw_rollout(6)


def reward(completions, scores, **columns):
    """The scores of the batch, in their order."""
    return [scores[i][i % 2] for i in range(len(completions))]


class InDouble(Records, WithSGD, PPO):
    """PPO in double precision with non-zero adapters and head; keeps a copy from before the first step."""

    def configure_model(self):
        if self.model is None:
            super().configure_model()
            torch.manual_seed(5)
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
            torch.nn.init.normal_(self.critic.head.weight, std=0.2)
            for part in (self.model, self.critic, *(self._reference._copy if self._reference else ())):
                part.double()
            self.before = copy.deepcopy((self.model, self.critic.head))


def literal(module, rollout, settings, steps, rate):
    """Values, losses and gradients of each SGD step by the reference implementation."""
    model, head = module.before
    adapted = hasattr(model, "peft_config")
    apart = module.hparams["critic"] == "adapter"
    policy, reference = (copy.deepcopy(model).eval() for _ in range(2))
    trunk = copy.deepcopy(model).eval() if apart else policy
    if apart:
        trunk.set_adapter("critic")
    measured = None
    losses, gradients = [], []
    for _ in range(steps):
        if measured is None:
            with reference.disable_adapter() if adapted else torch.no_grad():
                measured = ppo_reference.prepare(rollout, settings, policy, reference, trunk, head)
        held = {f"model.{n}": p for n, p in policy.named_parameters() if p.requires_grad and ".critic" not in n}
        held |= {f"model.{n}": p for n, p in trunk.named_parameters() if apart and ".critic" in n}
        held |= {f"critic.head.{n}": p for n, p in head.named_parameters()}
        loss = ppo_reference.loss(rollout, settings, policy, trunk, head, measured)
        found = dict(zip(held, torch.autograd.grad(loss, list(held.values()), allow_unused=True), strict=True))
        losses.append(float(loss.detach()))
        gradients.append(found)
        with torch.no_grad():
            for name, parameter in held.items():
                parameter -= rate * found[name]
    return measured, losses, gradients


CASES = {
    "defaults": {},
    "discounted": {"gamma": 0.9, "lam": 0.7, "value_clip": 0.05, "value_coef": 1.0, "clip_low": 0.1, "clip_high": 0.3},
    "returns": {"lam": 1.0, "value_clip": None, "whiten_advantages": False, "kl_coef": 0.5},
    "one-step": {"lam": 0.0, "whiten_rewards": True, "missing_eos_penalty": 1.5, "temperature": 0.7},
    "truncated": {"mask_truncated": True, "whiten_rewards": True, "kl_coef": 0.1},
    "no-kl": {"kl_coef": 0.0, "clip_low": 0.05, "clip_high": 0.05},
}


@pytest.mark.parametrize("how", ["full", "lora", "critic-adapter"])
@pytest.mark.parametrize("case", CASES)
def test_ppo_matches_reference_implementation(case, how, trainer_options):
    unrewarded = case in ("discounted", "one-step", "truncated")
    epochs, rate = 3, 0.1
    settings = Settings(**CASES[case])
    given = {f.name: getattr(settings, f.name) for f in fields(Settings)}
    scores = [None if unrewarded and i in (1, 4) else score for i, score in enumerate(SCORES)]
    options = {} if how == "full" else {"lora": LORA}
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight *= 0.3  # logits are rounded to fp32, so small ones are more precise
    module = InDouble(
        model,
        tokenizer=make_tokenizer(),
        rewards=lambda completions, **columns: scores,
        num_completions=2,
        max_new_tokens=9,
        epochs_per_rollout=epochs,
        micro_batch_size=None if case == "defaults" else 2,
        max_grad_norm=None,
        learning_rate=rate,
        lr_schedule="constant",
        warmup_ratio=0.0,
        critic="adapter" if how == "critic-adapter" else "shared",
        **given,
        **options,
    )
    run(module, [BATCH], trainer_options, rollouts=[ROLLOUT])
    rollout = Rollout(
        [ids.tolist() for ids in BATCH.input_ids for _ in range(2)],
        [list(c.tokens) for c in ROLLOUT.completions],
        scores,
        [c.truncated for c in ROLLOUT.completions],
    )
    measured, losses, gradients = literal(module, rollout, settings, epochs, rate)
    ours = module.rollout_batch
    found = {}
    for name, have in {
        "old": ours.old_logprobs,
        "ref": ours.ref_logprobs,
        "values": ours.values,
        "advantages": ours.advantages,
        "returns": ours.returns,
    }.items():
        if have is not None:
            want = torch.tensor([x for row in measured[name] for x in row], dtype=torch.float64)
            found[name] = float(((torch.cat(have) - want) / want.abs().clamp(min=1.0)).abs().max())
    pieces = len(module.results) // epochs
    have = [sum(float(r.loss.detach()) for _, r in module.results[i * pieces :][:pieces]) for i in range(epochs)]
    found["losses"] = max(abs(a - b) for a, b in zip(have, losses, strict=True))
    found["gradients"] = 0.0
    for a, b in zip(module.gradients, gradients, strict=True):
        assert a.keys() == b.keys()
        found["gradients"] = max(found["gradients"], *(float((a[n] - b[n]).abs().max()) for n in b))
    assert all(max(float(g.abs().max()) for g in step.values()) > 0.01 for step in gradients)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_ppo_gradient_checkpointing_gives_same_weights(critic, trainer_options):
    """Recomputation must use the adapter of the forward pass, which is no longer active then."""
    found = []
    for on in (False, True):
        module = InDouble(
            make_model(),
            tokenizer=make_tokenizer(),
            rewards=reward,
            lora=LORA,
            critic=critic,
            gradient_checkpointing=on,
            num_completions=2,
            max_new_tokens=9,
            epochs_per_rollout=2,
            max_grad_norm=None,
            learning_rate=0.1,
        )
        run(module, [BATCH], trainer_options, rollouts=[ROLLOUT])
        found.append(module.gradients)
    for plain, recomputed in zip(*found, strict=True):
        assert largest_difference(recomputed, plain) < TOLERANCE


# ---------------------------------------------------------------- critics


def make(kind=PPO, **options):
    settings = {"rewards": reward, "num_completions": 2, "max_new_tokens": 9, "learning_rate": 1e-2}
    return kind(make_model(), tokenizer=make_tokenizer(), **{**settings, **options})


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_value_loss_moves_only_shared_weights(critic, trainer_options):
    """A critic adapter leaves the policy's adapter unchanged; a shared one learns from both losses."""
    found = []
    for value_coef in (0.0, 10.0):
        options = {"value_coef": value_coef, "epochs_per_rollout": 1, "max_grad_norm": None}
        module = make(InDouble, lora=LORA, critic=critic, **options)
        run(module, [BATCH], trainer_options, rollouts=[ROLLOUT])
        found.append(module.gradients[0])
    moved = {name for name in found[0] if not torch.equal(found[0][name], found[1][name])}
    values = {name for name in found[0] if "critic" in name}
    assert {"critic.head.weight", "critic.head.bias"} <= values
    assert moved == (values if critic == "adapter" else set(found[0]))
    assert (len(values) > 2) == (critic == "adapter")


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_ppo_critic_has_its_own_learning_rate(critic, trainer_options):
    module = make(lora=LORA, critic=critic, value_learning_rate=0.5, lr_schedule="constant", warmup_ratio=0.0)
    run(module, [BATCH], trainer_options, rollouts=[ROLLOUT])
    rates = {id(p): group["lr"] for group in module.optimizers().param_groups for p in group["params"]}
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained)
    assert {name: rates[id(p)] for name, p in trained.items()} == {
        name: 0.5 if "critic" in name else 0.01 for name in trained
    }


def test_ppo_critic_accepts_adapters_that_change_the_base(trainer_options):
    """PiSSA changes the base's weights once; the critic's adapter starts at zero over the changed base."""
    module = make(lora={"r": 4, "init_lora_weights": "pissa"}, critic="adapter")
    trainer = run(module, [BATCH], trainer_options, rollouts=[ROLLOUT])
    assert trainer.global_step == 4
    assert float(trainer.callback_metrics["train/kl"]) > 0


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.slow), "lora", "adapter"])
def test_ppo_increases_rewards(kind, trainer_options):
    """The reward is the share of tokens in one half; values start at 0, since random ones would add noise."""
    explained, rewards = [], []

    class Watched(PPO):
        def log_dict(self, metrics, **options):
            explained.extend([metrics[n] for n in ("train/explained_variance",) if n in metrics])
            super().log_dict(metrics, **options)

        def log(self, name, value, **options):
            rewards.extend([value] if name == "train/reward" else [])
            super().log(name, value, **options)

    def low(completion_ids, **columns):
        return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]

    options = {"full": {}, "lora": {"lora": True}, "adapter": {"lora": True, "critic": "adapter"}}[kind]
    rate = 3e-3 if kind == "full" else 2e-2
    module = make(Watched, rewards=low, num_completions=16, kl_coef=0.001, lam=1.0, learning_rate=rate, **options)
    run(module, [draw_prompts(3)] * 12, trainer_options)
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.03
    assert explained[0] == pytest.approx(0.0, abs=1e-6)
    assert min(explained) > -5.0


# ---------------------------------------------------------------- metrics and the KL coefficient


def test_ppo_metrics_match_plain_python(trainer_options):
    module = make(InDouble, kl_coef=0.3, epochs_per_rollout=2, micro_batch_size=2, learning_rate=0.1)
    trainer = run(module, [BATCH], trainer_options, rollouts=[ROLLOUT])
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    returns = [float(x) for row in module.rollout_batch.returns for x in row]
    left = [r - float(v) for r, v in zip(returns, (x for row in module.rollout_batch.values for x in row), strict=True)]
    _, total = ppo_reference.mean_and_variance(returns)
    _, unexplained = ppo_reference.mean_and_variance(left)
    assert metrics["train/explained_variance"] == pytest.approx(1 - unexplained / total, abs=1e-5)
    assert metrics["train/kl_coef"] == pytest.approx(0.3)
    losses = []
    for batch, _ in module.results:
        for value, old, target in zip(batch.values, batch.old_values, batch.returns, strict=True):
            near = min(max(float(value), float(old) - 0.2), float(old) + 0.2)
            losses.append(0.5 * max((float(value) - float(target)) ** 2, (near - float(target)) ** 2))
    assert metrics["train/value_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_ppo_kl_coefficient_follows_the_adaptive_controller(trainer_options, tmp_path):
    """https://arxiv.org/abs/1909.08593, section 2.2: with an error that is clipped at 0.2."""
    used, measured = [], []

    class Watched(Records, PPO):
        def estimate_advantages(self, rollout_batch):
            used.append(self.kl_coef)
            pairs = zip(rollout_batch.old_logprobs, rollout_batch.ref_logprobs, strict=True)
            measured.append(sum(float((old - ref).sum()) for old, ref in pairs) / 6)
            super().estimate_advantages(rollout_batch)

    module = make(Watched, kl_coef=0.2, kl_target=0.7, kl_horizon=20, learning_rate=0.01, warmup_ratio=0.0)
    trainer = run(module, [BATCH] * 5, trainer_options)
    expected = [0.2]
    for kl in measured:
        error = min(max(kl / 0.7 - 1, -0.2), 0.2)
        expected.append(expected[-1] * (1 + error * 6 / 20))
    assert [*used, module.kl_coef] == pytest.approx(expected, rel=1e-5)
    errors = [kl / 0.7 - 1 for kl in measured]
    assert min(errors) < 0 < max(errors)  # the coefficient fell at first, then rose
    assert float(trainer.callback_metrics["train/kl_coef"]) == pytest.approx(used[-1])

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = PPO.load_from_checkpoint(
        tmp_path / "a.ckpt", weights_only=True, model=make_model(), tokenizer=make_tokenizer(), rewards=reward
    )
    assert again.kl_coef == again.kl_controller.coef == module.kl_coef
    assert (again.kl_controller.target, again.kl_controller.horizon) == (0.7, 20)


# ---------------------------------------------------------------- checkpoints and exports


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, ""),
        ({"lora": LORA}, "lora_"),
        ({"lora": LORA, "critic": "adapter"}, "lora_"),
        ({"lora": {"r": 4, "init_lora_weights": "pissa"}, "critic": "adapter"}, "lora_"),
    ],
    ids=["full", "lora", "critic-adapter", "pissa"],
)
def test_ppo_checkpoint_contains_policy_and_critic(options, part, trainer_options, tmp_path):
    """Checkpoints contain the critic, but no reference, including a reference adapter."""
    module = make(**options)
    trainer = run(module, [BATCH], trainer_options, rollouts=[ROLLOUT])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert held.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    assert {"critic.head.weight", "critic.head.bias"} <= held.keys()
    assert all(part in name or name.startswith("critic.head") for name in held)
    assert not any(".initial." in name for name in held)
    assert any(".critic." in name for name in held) == ("critic" in options)
    again = PPO.load_from_checkpoint(
        tmp_path / "a.ckpt", weights_only=True, model=make_model(), tokenizer=make_tokenizer(), rewards=reward
    )
    found = dict(again.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in held.items())


@pytest.mark.parametrize("init", [True, "pissa"])
def test_ppo_export_excludes_the_critic(init, trainer_options, tmp_path):
    module = make(lora={"r": 4, "init_lora_weights": init}, critic="adapter", epochs_per_rollout=2)
    run(module, [BATCH], trainer_options, rollouts=[ROLLOUT])
    module.export(tmp_path / "adapter")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not [path for path in (tmp_path / "adapter").iterdir() if path.is_dir()]
    assert not any("critic" in name or "initial" in name for name in written)
    whole = PeftModel.from_pretrained(make_model(), tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    module.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, module.model(ids).logits, rtol=0, atol=1e-4)
    module.export(tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, module.model(ids).logits, rtol=0, atol=1e-4)
    assert not any("critic" in name for name in merged.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic": "adapter"}, "pass lora=True"),
        ({"critic": "both"}, "critic='both'"),
        ({"gamma": 1.1}, "gamma=1.1"),
        ({"lam": -0.1}, "lam=-0.1"),
        ({"value_clip": 0.0}, "value_clip=0.0"),
        ({"value_learning_rate": 0.0}, "value_learning_rate=0.0"),
        ({"value_coef": -1.0}, "value_coef=-1.0"),
        ({"missing_eos_penalty": float("nan")}, "missing_eos_penalty=nan"),
        ({"kl_coef": 0.0, "kl_target": 6.0}, "kl_target"),
        ({"kl_target": 0.0}, "target=0"),
    ],
)
def test_ppo_rejects_contradicting_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        PPO("no/such-model", rewards=reward, **options)
