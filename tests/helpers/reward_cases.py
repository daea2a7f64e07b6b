"""Prompts, completions and rewards that the tests of reward functions share."""

import asyncio

from lightning_ft.rewards.functions import RewardFunctions

PROMPTS = ["2+2?", "2+2?", "3+3?"]
MESSAGES = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
TEXTS = ["4", "five", "6!"]
IDS = [[11], [12, 13, 14, 15], [16, 17]]
COLUMNS = {"answer": ["4", "4", "6"]}


def correct(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def length(completion_ids, **kwargs):
    return [len(ids) for ids in completion_ids]


async def slowly(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.25 if c.isdigit() else None for c in completions]


def compute_rewards(rewards, prompts=PROMPTS, texts=TEXTS, ids=IDS, columns=COLUMNS, state=None, **options):
    return RewardFunctions(rewards, **options).compute(prompts, texts, ids, columns, state)


def call_arguments(**options):
    """Return the keyword arguments that a reward function is called with."""
    seen = []

    def reward(**kwargs):
        seen.append(kwargs)
        return [0.0] * 3

    compute_rewards(reward, **options)
    return seen[0]
