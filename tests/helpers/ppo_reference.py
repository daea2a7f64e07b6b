"""A reference implementation of PPO for language models: one sequence and one token at a time, in double precision.

It uses nothing from lightning_ft. Log-probabilities and values come from plain forward passes over whole sequences,
advantages from their recursive definition, losses from loops, and gradients from autograd.
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
    """Prompts and completions as lists of lists of token ids, with rewards, which may be None."""

    prompts: list
    completions: list
    rewards: list
    truncated: list


def token_logprobs(model, prompt, completion, temperature):
    """Log-probability of each token of a completion, from a forward pass over the whole sequence."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    logprobs = []
    for position, token in enumerate(completion):
        distribution = torch.log_softmax(logits[len(prompt) + position - 1].double() / temperature, dim=0)
        logprobs.append(distribution[token])
    return logprobs


def token_values(backbone, head, prompt, completion):
    """The critic's value in the state from which each token was sampled."""
    ids = torch.tensor([prompt + completion])
    states = backbone(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0]
    return [head(states[len(prompt) + position - 1])[0] for position in range(len(completion))]


def advantage(t, rewards, values, gamma, lam):
    """Advantage of token `t`, from its recursive definition."""
    last = t == len(rewards) - 1
    following = 0.0 if last else values[t + 1]
    delta = rewards[t] + gamma * following - values[t]
    return delta if last else delta + gamma * lam * advantage(t + 1, rewards, values, gamma, lam)


def mean_and_variance(numbers):
    mean = sum(numbers) / len(numbers)
    return mean, sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)


def whitened(rows, rewarded, shift):
    """Values of each completion scaled to variance 1, with statistics over the rewarded completions."""
    mean, variance = mean_and_variance([x for row, counts in zip(rows, rewarded, strict=True) if counts for x in row])
    scale = math.sqrt(variance + 1e-8)
    return [[(x - mean) / scale + (0.0 if shift else mean) for x in row] for row in rows]


def prepare(rollout, settings, policy, reference, backbone, head):
    """Everything computed before the first step: a dictionary of lists, with one list of numbers per completion."""
    pairs = list(zip(rollout.prompts, rollout.completions, strict=True))
    with torch.no_grad():
        old = [[float(x) for x in token_logprobs(policy, p, c, settings.temperature)] for p, c in pairs]
        ref = [[float(x) for x in token_logprobs(reference, p, c, settings.temperature)] for p, c in pairs]
        values = [[float(x) for x in token_values(backbone, head, p, c)] for p, c in pairs]
    rewarded = [reward is not None for reward in rollout.rewards]
    rewards = []
    for number, reward in enumerate(rollout.rewards):
        row = [-settings.kl_coef * (a - b) for a, b in zip(old[number], ref[number], strict=True)]
        reward = 0.0 if reward is None else reward
        row[-1] += reward - (settings.missing_eos_penalty if rollout.truncated[number] else 0.0)
        rewards.append(row)
    if settings.whiten_rewards:
        rewards = whitened(rewards, rewarded, shift=False)
    advantages, returns = [], []
    for row, value in zip(rewards, values, strict=True):
        of_tokens = [advantage(t, row, value, settings.gamma, settings.lam) for t in range(len(row))]
        advantages.append(of_tokens)
        returns.append([a + v for a, v in zip(of_tokens, value, strict=True)])
    if settings.whiten_advantages:
        advantages = whitened(advantages, rewarded, shift=True)
    for number, counts in enumerate(rewarded):
        if not counts:  # without a reward it gives no gradient
            advantages[number] = [0.0] * len(advantages[number])
            returns[number] = values[number]
    return {"old": old, "ref": ref, "values": values, "advantages": advantages, "returns": returns}


def loss(rollout, settings, policy, backbone, head, measured):
    """Loss of a whole step, with gradient, as means over the tokens that count."""
    policy_total, value_total, tokens = 0.0, 0.0, 0
    for number, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        if settings.mask_truncated and rollout.truncated[number]:
            continue
        logprobs = token_logprobs(policy, prompt, completion, settings.temperature)
        values = token_values(backbone, head, prompt, completion)
        for t in range(len(completion)):
            ratio = torch.exp(logprobs[t] - measured["old"][number][t])
            advantage_t = measured["advantages"][number][t]
            bounded = torch.clamp(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
            policy_total = policy_total - torch.minimum(ratio * advantage_t, bounded * advantage_t)
            target, old_value = measured["returns"][number][t], measured["values"][number][t]
            error = (values[t] - target) ** 2
            if settings.value_clip is not None:
                low, high = old_value - settings.value_clip, old_value + settings.value_clip
                clipped = torch.clamp(values[t], low, high)
                error = torch.maximum(error, (clipped - target) ** 2)
            value_total = value_total + 0.5 * error
            tokens += 1
    return policy_total / tokens + settings.value_coef * value_total / tokens
