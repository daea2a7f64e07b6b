"""Small policies shared by the tests of the policy-gradient modules."""

from predrawn_rollouts import (
    Records,
    WithSGD,
    draw_prompts,
    draw_rollout,
)
from tiny import make_model, make_tokenizer

from lightning_ft import GRPO, PPO

LORA = {"r": 4, "lora_alpha": 16}
BATCHES = [draw_prompts(4, seed=n) for n in range(2)]
PREDRAWN = [draw_rollout(12, seed=n) for n in range(2)]


def by_tokens(completion_ids, **columns):
    """A reward that differs between completions."""
    return [(sum(ids) % 11) / 4 for ids in completion_ids]


class Policy(Records, WithSGD, GRPO):
    pass


class Actor(Records, WithSGD, PPO):
    pass


def make(module_class, **options):
    settings = {
        "rewards": by_tokens,
        "num_completions": 3,
        "max_new_tokens": 9,
        "learning_rate": 0.05,
        "lr_schedule": "constant",
        "warmup_ratio": 0.0,
        "max_grad_norm": None,
    }
    return module_class(make_model(), tokenizer=make_tokenizer(), **{**settings, **options})
