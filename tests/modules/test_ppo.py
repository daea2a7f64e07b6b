"""PPO against its literal definition; critics, the KL coefficient, checkpoints and exports."""

import copy
from dataclasses import fields

import ppo_reference
import pytest
import torch
from given_rollouts import Records, WithSGD, draw_prompts, draw_rollout, largest_difference, run
from ppo_reference import Rollout, Settings
from tiny import make_model, make_tokenizer

from lightning_ft import PPO

TOLERANCE = 1e-6
LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.2}  # the dropout must be switched off, the critic's too
SCORES = [1.0, -0.5, 2.0, 0.25, 1.5, -1.0]
BATCH = draw_prompts(3, columns={"scores": [SCORES[:2], SCORES[2:4], SCORES[4:]]})
GIVEN = draw_rollout(6)


def reward(completions, scores, **columns):
    """The scores of the batch, in their order."""
    return [scores[i][i % 2] for i in range(len(completions))]


class InDouble(Records, WithSGD, PPO):
    """In double precision, with an adapter that isn't the base any more; keeps a copy from before the first step."""

    def configure_model(self):
        if self.model is None:
            super().configure_model()
            torch.manual_seed(5)
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
            for part in (self.model, self.critic, *(self._reference._copy if self._reference else ())):
                part.double()
            self.before = copy.deepcopy((self.model, self.critic.head))


def literal(module, rollout, settings, steps, rate):
    """Measures, and losses and gradients of each step of plain gradient descent, by the reference."""
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
    "truncated": {"mask_truncated": True, "whiten_rewards": True, "kl_coef": 0.3},
    "no-kl": {"kl_coef": 0.0, "clip_low": 0.05, "clip_high": 0.05},
}


@pytest.mark.parametrize("unscored", [False, True], ids=["", "unscored"])
@pytest.mark.parametrize("how", ["full", "lora", "critic-adapter"])
@pytest.mark.parametrize("case", CASES)
def test_by_the_letter(case, how, unscored, trainer_options):
    epochs, rate = 3, 0.5
    settings = Settings(**CASES[case])
    given = {f.name: getattr(settings, f.name) for f in fields(Settings)}
    scores = [None if unscored and i in (1, 4) else score for i, score in enumerate(SCORES)]
    options = {} if how == "full" else {"lora": LORA}
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight *= 0.3  # logits are rounded to fp32, so that they had better be small
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
    run(module, [BATCH], trainer_options, rollouts=[GIVEN])
    rollout = Rollout(
        [ids.tolist() for ids in BATCH.input_ids for _ in range(2)],
        [list(c.tokens) for c in GIVEN.completions],
        scores,
        [c.truncated for c in GIVEN.completions],
    )
    measured, losses, gradients = literal(module, rollout, settings, epochs, rate)
    ours = module.experience
    found = {}
    for name, have in {
        "old": ours.old_logprobs,
        "ref": ours.ref_logprobs,
        "values": ours.values,
        "advantages": ours.advantages,
        "returns": ours.returns,
    }.items():
        if have is not None:
            want = [torch.tensor(row) for row in measured[name]]
            found[name] = max(float((a - b).abs().max()) for a, b in zip(have, want, strict=True))
    pieces = len(module.results) // epochs
    have = [sum(float(r.loss.detach()) for _, r in module.results[i * pieces :][:pieces]) for i in range(epochs)]
    found["losses"] = max(abs(a - b) for a, b in zip(have, losses, strict=True))
    found["gradients"] = 0.0
    for a, b in zip(module.gradients, gradients, strict=True):
        assert a.keys() == b.keys()
        found["gradients"] = max(found["gradients"], *(float((a[n] - b[n]).abs().max()) for n in b))
    size = [max(float(g.abs().max()) for g in step.values()) for step in gradients]
    print("FOUND", case, how, {k: f"{v:.1e}" for k, v in found.items()}, losses, size)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_gradient_checkpointing_changes_nothing(critic, trainer_options):
    """A layer is computed again with the adapter that it was computed with, which isn't the active one by then."""
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
        run(module, [BATCH], trainer_options, rollouts=[GIVEN])
        found.append(module.gradients)
    for plain, recomputed in zip(*found, strict=True):
        assert largest_difference(recomputed, plain) < TOLERANCE
