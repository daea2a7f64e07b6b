"""GRPO: learning, custom losses, and reward models in every form."""

import pytest
import torch
from predrawn_rollouts import Records, WithSGD, draw_prompts, draw_rollout, run
from tiny import make_model, make_tokenizer
from tiny_scorer import make_scorer

from lightning_ft import GRPO, RewardModeling
from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.data.layout import Example
from lightning_ft.errors import ConfigError, RewardError

BATCH = draw_prompts(3)
ROLLOUT = draw_rollout(9)


def by_tokens(completion_ids, **columns):
    return [(sum(ids) % 11) / 4 for ids in completion_ids]


class Policy(Records, WithSGD, GRPO):
    pass


def make(kind=Policy, **options):
    settings = {"rewards": by_tokens, "num_completions": 3, "max_new_tokens": 9, "max_grad_norm": None}
    settings |= {"learning_rate": 0.05, "lr_schedule": "constant", "warmup_ratio": 0.0}
    return kind(make_model(), tokenizer=make_tokenizer(), **{**settings, **options})


# ---------------------------------------------------------------- custom losses and advantages


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda rewards: rewards, r"are a Tensor of shape \(9,\): expected a list of 9 tensors"),
        (lambda rewards: list(rewards), r"of completion 0, which has \d tokens, are a Tensor of shape \(\)"),
        (lambda rewards: list(rewards[1:, None]), "are a list of 8"),
        (lambda rewards: rewards.tolist(), "of completion 0, .* are a float"),
    ],
)
def test_advantages_in_another_form_are_refused(form, message, trainer_options):
    class Own(Policy):
        def estimate_advantages(self, rollout_batch):
            rollout_batch.advantages = form(rollout_batch.total_rewards)

    with pytest.raises(ConfigError, match=message):
        run(make(Own), [BATCH], trainer_options, rollouts=[ROLLOUT])


@pytest.mark.parametrize("per_token", [False, True])
def test_own_advantages_of_completions_or_tokens_are_used(per_token, trainer_options):
    class Own(Policy):
        def estimate_advantages(self, rollout_batch):
            lengths = rollout_batch.lengths.tolist()
            rollout_batch.advantages = tuple(torch.full((n if per_token else 1,), 0.5) for n in lengths)

    module = make(Own)
    run(module, [BATCH], trainer_options, rollouts=[ROLLOUT])
    assert set(module.last_rollout.advantages) == {0.5}
    assert module.trainer.callback_metrics["train/no_signal_fraction"] == 0


class Reinforce(GRPO):
    """https://link.springer.com/article/10.1007/BF00992696, a mean over tokens."""

    def compute_loss(self, batch):
        per_token = -batch.advantages * batch.logprobs * batch.mask
        return (batch.weights[batch.sequences] * per_token).sum()


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_grpo_subclass_may_compute_its_own_loss(micro_batch_size, mask_truncated, trainer_options):
    class Recording(Records, WithSGD, Reinforce):
        pass

    module = make(Recording, scale_rewards="none", micro_batch_size=micro_batch_size, mask_truncated=mask_truncated)
    trainer = run(module, [BATCH], trainer_options, rollouts=[ROLLOUT])

    model, total, tokens = make_model(), 0.0, 0
    rewards = by_tokens([c.tokens for c in ROLLOUT.completions])
    for number, completion in enumerate(ROLLOUT.completions):
        group = rewards[number // 3 * 3 :][:3]
        if mask_truncated and completion.truncated:
            continue
        prompt = BATCH.input_ids[number // 3].tolist()
        ids = torch.tensor([prompt + list(completion.tokens)])
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        for place, token in enumerate(completion.tokens):
            total = total - (rewards[number] - sum(group) / 3) * logprobs[len(prompt) + place - 1, token]
            tokens += 1
    (total / tokens).backward()
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(total / tokens), abs=1e-5)
    assert float(trainer.callback_metrics["train/entropy"]) > 0
    assert "train/clip_fraction/low" not in trainer.callback_metrics  # which the custom loss doesn't report
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(module.gradients[0][f"model.{name}"], parameter.grad, rtol=0, atol=1e-5)
    assert max(float(g.abs().max()) for g in module.gradients[0].values()) > 0.05


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learning_rate": 0.02, "lora": True, "kl_coef": 0.01},
        {"loss_type": "rloo", "kl_coef": 0.01},
        {"loss_type": "cispo", "epochs_per_rollout": 2},
    ],
    ids=["full", "lora", "rloo", "cispo"],
)
def test_grpo_increases_rewards(options, trainer_options):
    """The reward is the share of tokens in one half of the vocabulary."""

    class WithAdamW(Records, GRPO):
        pass

    def low(completion_ids, **columns):
        return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]

    settings = {"rewards": low, "num_completions": 16, "max_grad_norm": 1.0, "learning_rate": 5e-3}
    module = make(WithAdamW, **{**settings, **options})
    run(module, [BATCH] * 12, trainer_options)
    means = [sum(low(sample)) / len(sample) for sample in module.samples]
    assert sum(means[-3:]) / 3 > sum(means[:3]) / 3 + 0.06


# ---------------------------------------------------------------- reward models


def test_grpo_accepts_reward_models_in_every_form(model_folder, tmp_path, trainer_options):
    """An exported folder, a checkpoint and the module itself, whole and as an adapter, give the same rewards."""
    from lightning_ft._lightning import Trainer

    ones = [Example(torch.arange(4, 4 + n), torch.ones(n, dtype=torch.bool)) for n in (3, 5)]
    pairs = PreferenceBatch([torch.tensor([5, 6])], [tuple(ones)], torch.tensor([True, False]), None, torch.arange(1))
    for lora in (None, {"r": 4}):
        reward_model = RewardModeling(model_folder, lora=lora, learning_rate=1e-2)
        trainer = Trainer(**trainer_options, max_epochs=2)
        trainer.fit(reward_model, torch.utils.data.DataLoader([pairs], batch_size=None))
        path = tmp_path / ("whole" if lora is None else "adapter")
        trainer.save_checkpoint(f"{path}.ckpt")
        reward_model.export(path)
        found = []
        for reward in (str(path), f"{path}.ckpt", reward_model):
            module = make(rewards=reward, scale_rewards="none")
            run(module, [BATCH], trainer_options, rollouts=[ROLLOUT])
            found.append(module.rollout_batch.total_rewards)
            assert not any("score" in name or "reward" in name for name in dict(module.named_parameters()))
        assert found[0].std() > 0.01
        assert torch.equal(found[0], found[2])
        torch.testing.assert_close(found[1], found[2], rtol=0, atol=1e-6)


def test_grpo_combines_a_reward_model_with_a_function(trainer_options):
    scorer = make_scorer()
    reward_model = {"model": scorer, "tokenizer": make_tokenizer(), "weight": 0.5, "name": "reward_model"}
    module = make(rewards=[by_tokens, reward_model])
    trainer = run(module, [BATCH], trainer_options, rollouts=[ROLLOUT])
    given = module.rollout_batch.rewards.per_function
    torch.testing.assert_close(module.rollout_batch.total_rewards, given[:, 0] + 0.5 * given[:, 1])
    assert "train/rewards/reward_model" in trainer.callback_metrics
    trainer.save_checkpoint(f"{trainer_options['default_root_dir']}/a.ckpt")
    torch.load(
        f"{trainer_options['default_root_dir']}/a.ckpt", weights_only=True
    )  # its hyperparameters are plain values


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_completions": 1}, "num_completions=1"),
        (
            {"loss_type": "gspo"},
            "loss_type='gspo', expected one of dapo.* is loss_type='grpo' with importance='sequence'",
        ),
        ({"reward_weights": [0.0]}, "weights of by_tokens are all 0, so nothing would be learned"),
        ({"advantage": "gae"}, "advantage='gae'"),
        ({"scale_rewards": True}, "scale_rewards=True"),
        ({"importance": "word"}, "importance='word'"),
        ({"kl_in": "prompt"}, "kl_in='prompt'"),
        ({"loss_type": "rloo", "importance": "token"}, "leave it out"),
        ({"delta": 1.1}, "delta=1.1"),
        ({"loss_type": "cispo", "delta": 2.0}, "means nothing to cispo"),
        ({"clip_high": -0.1}, "clip_high=-0.1"),
    ],
)
def test_grpo_rejects_contradicting_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        GRPO("no/such-model", rewards=by_tokens, **options)


def test_grpo_rejects_rewards_that_do_not_exist():
    with pytest.raises(RewardError, match="could not be found"):
        GRPO("no/such-model", rewards="no_such_reward")
