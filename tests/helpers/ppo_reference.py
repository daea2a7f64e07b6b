"""PPO for language models written out: one sequence, one token at a time, in double precision.

Nothing of lightning_ft is used. Log-probabilities and values come from plain forward passes of whole sequences,
advantages from their recursive definition, losses from loops, gradients from autograd.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class Settings:
    temperature: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.05
    clip_low: float = 0.2
    clip_high: float = 0.2
    value_coef: float = 0.1
    value_clip: float | None = 0.2
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    missing_eos_penalty: float = 0.0
    mask_truncated: bool = False


@dataclass
class Rollout:
    """`prompts` and `completions` are lists of lists of ids; a score may be None."""

    prompts: list
    completions: list
    scores: list
    truncated: list


def token_logprobs(model, prompt, completion, temperature):
    """Log-probability of each token of a completion, by a forward pass over the whole sequence."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    found = []
    for place, token in enumerate(completion):
        every = torch.log_softmax(logits[len(prompt) + place - 1].double() / temperature, dim=0)
        found.append(every[token])
    return found


def token_values(trunk, head, prompt, completion):
    """What the critic says in the state in which each token was chosen."""
    ids = torch.tensor([prompt + completion])
    states = trunk(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0]
    return [head(states[len(prompt) + place - 1])[0] for place in range(len(completion))]


def advantage(t, rewards, values, gamma, lam):
    """Of token `t`, by the recursion itself."""
    last = t == len(rewards) - 1
    following = 0.0 if last else values[t + 1]
    delta = rewards[t] + gamma * following - values[t]
    return delta if last else delta + gamma * lam * advantage(t + 1, rewards, values, gamma, lam)


def mean_and_variance(numbers):
    mean = sum(numbers) / len(numbers)
    return mean, sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)


def whitened(rows, result, shift):
    """Numbers of each completion scaled to variance 1, over the completions that were result."""
    mean, variance = mean_and_variance([x for row, counts in zip(rows, result, strict=True) if counts for x in row])
    scale = math.sqrt(variance + 1e-8)
    return [[(x - mean) / scale + (0.0 if shift else mean) for x in row] for row in rows]


def prepare(rollout, settings, policy, reference, trunk, head):
    """What is measured before any step: a dictionary of lists, one list of numbers for each completion."""
    pairs = list(zip(rollout.prompts, rollout.completions, strict=True))
    with torch.no_grad():
        old = [[float(x) for x in token_logprobs(policy, p, c, settings.temperature)] for p, c in pairs]
        ref = [[float(x) for x in token_logprobs(reference, p, c, settings.temperature)] for p, c in pairs]
        values = [[float(x) for x in token_values(trunk, head, p, c)] for p, c in pairs]
    result = [score is not None for score in rollout.scores]
    rewards = []
    for number, score in enumerate(rollout.scores):
        row = [-settings.kl_coef * (a - b) for a, b in zip(old[number], ref[number], strict=True)]
        score = 0.0 if score is None else score
        row[-1] += score - (settings.missing_eos_penalty if rollout.truncated[number] else 0.0)
        rewards.append(row)
    if settings.whiten_rewards:
        rewards = whitened(rewards, result, shift=False)
    advantages, returns = [], []
    for row, value in zip(rewards, values, strict=True):
        found = [advantage(t, row, value, settings.gamma, settings.lam) for t in range(len(row))]
        advantages.append(found)
        returns.append([a + v for a, v in zip(found, value, strict=True)])
    if settings.whiten_advantages:
        advantages = whitened(advantages, result, shift=True)
    for number, counts in enumerate(result):
        if not counts:  # teaches nothing
            advantages[number] = [0.0] * len(advantages[number])
            returns[number] = values[number]
    return {"old": old, "ref": ref, "values": values, "advantages": advantages, "returns": returns}


def loss(rollout, settings, policy, trunk, head, measured):
    """Of a whole step, with gradient: means over the tokens that count."""
    policy_total, value_total, tokens = 0.0, 0.0, 0
    for number, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        if settings.mask_truncated and rollout.truncated[number]:
            continue
        logprobs = token_logprobs(policy, prompt, completion, settings.temperature)
        values = token_values(trunk, head, prompt, completion)
        for t in range(len(completion)):
            ratio = torch.exp(logprobs[t] - measured["old"][number][t])
            gain = measured["advantages"][number][t]
            bounded = torch.clamp(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
            policy_total = policy_total - torch.minimum(ratio * gain, bounded * gain)
            target, before = measured["returns"][number][t], measured["values"][number][t]
            error = (values[t] - target) ** 2
            if settings.value_clip is not None:
                low, high = before - settings.value_clip, before + settings.value_clip
                near = torch.clamp(values[t], low, high)
                error = torch.maximum(error, (near - target) ** 2)
            value_total = value_total + 0.5 * error
            tokens += 1
    return policy_total / tokens + settings.value_coef * value_total / tokens
