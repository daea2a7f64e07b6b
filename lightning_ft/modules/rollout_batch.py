"""Rollout batches: completions with their rewards and log-probabilities, to learn from, and their micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_ft.data.batches import PromptBatch
from lightning_ft.data.layout import Example
from lightning_ft.errors import ConfigError
from lightning_ft.rewards.batch import Prompt, Rewards
from lightning_ft.rollout.protocol import Rollouts

TOKENS_PER_PASS = 8192
"""Largest number of tokens of a micro-batch whose size isn't set: memory doesn't grow with the size of a rollout."""


@dataclass
class RolloutBatch:
    """Completions of one rollout, `g` per prompt of `p` prompts, with all that was measured before any step.

    Lists over completions are ordered by prompt.

    Args:
        source: The prompts as the DataModule gave them.
        texts: Text of each completion, `p * g`.
        prompts: Token ids of each prompt, ``int64 [t]``.
        completions: Tokens of each completion, all of them supervised.
        num_completions: `g`, the number of completions per prompt.
        truncated: Whether the token limit stopped each completion, ``bool [p * g]``.
        sampling_logprobs: Log-probability of each token under the engine that sampled it, nats, ``float32 [t]`` per
            completion; empty if the engine reports none.
        rewards: Rewards of the completions; None until they are computed.
        old_logprobs: Log-probabilities under the policy that sampled, ``float32 [t]`` per completion; None where it
            can't have moved.
        ref_logprobs: Log-probabilities under the reference, likewise; None without a reference.
        advantages: Advantage of each token, ``float32 [t]``, or of each completion, ``[1]``.
        values: The critic's value of each token, ``float32 [t]`` per completion; None without a critic.
        returns: The critic's target of each token, likewise.
        nonfinite: Why nothing can be learned from the rollout: what is not finite on this rank; None if all is.
    """

    source: PromptBatch
    texts: list[str]
    prompts: list[Tensor]
    completions: list[Example]
    num_completions: int
    truncated: Tensor
    sampling_logprobs: list[Tensor]
    rewards: Rewards | None = None
    old_logprobs: list[Tensor] | None = None
    ref_logprobs: list[Tensor] | None = None
    advantages: list[Tensor] = field(default_factory=list)
    values: list[Tensor] | None = None
    returns: list[Tensor] | None = None
    nonfinite: str | None = None

    @classmethod
    def of(cls, batch: PromptBatch, rollouts: Rollouts, texts: list[str], num_completions: int) -> RolloutBatch:
        """The completions of a batch of prompts."""
        sampled = rollouts.completions
        return cls(
            source=batch,
            texts=texts,
            prompts=batch.input_ids,
            completions=[
                Example(torch.tensor(c.tokens, dtype=torch.int64), torch.ones(len(c.tokens), dtype=torch.bool))
                for c in sampled
            ],
            num_completions=num_completions,
            truncated=torch.tensor([c.truncated for c in sampled], dtype=torch.bool),
            sampling_logprobs=[torch.tensor(c.logprobs, dtype=torch.float32) for c in sampled],
        )

    @property
    def total_rewards(self) -> Tensor:
        """Total reward of each completion, NaN where no reward applied, ``float32 [p * g]``."""
        assert self.rewards is not None, "roll_out() computes them"
        return self.rewards.total

    @property
    def repeated_prompts(self) -> list[Prompt]:
        """The prompt of each completion as in its row, `p * g`."""
        return [prompt for prompt in self.source.prompts for _ in range(self.num_completions)]

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each completion, ``int64 [p * g]``."""
        return torch.tensor([len(completion) for completion in self.completions], dtype=torch.int64)

    @property
    def without_logprobs(self) -> list[int]:
        """Indices of completions that were sampled from non-finite logits, which their log-probabilities show."""
        return [c for c, logprobs in enumerate(self.sampling_logprobs) if not bool(logprobs.isfinite().all())]

    def check_advantages(self) -> None:
        """Refuse advantages that a subclass has set in another form than a tensor per completion.

        Raises:
            ConfigError: For them.
        """
        found = self.advantages
        if not isinstance(found, (list, tuple)) or len(found) != len(self.completions):
            shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f" of {len(found)}"
            problem = f"are a {type(found).__name__}{shape}"
        else:
            lengths = map(len, self.completions)
            wrong = [
                f"of completion {c}, which has {length} tokens, are a {type(one).__name__}"
                + (f" of shape {tuple(one.shape)}" if isinstance(one, Tensor) else "")
                for c, (one, length) in enumerate(zip(found, lengths, strict=True))
                if not isinstance(one, Tensor) or one.shape not in ((1,), (length,))
            ]
            if not wrong:
                return
            problem = wrong[0]
        raise ConfigError(
            f"The advantages that estimate_advantages has set {problem}: expected a list of {len(self.completions)} "
            "tensors, each with one advantage for its completion or one for each of its tokens, such as "
            "list(advantages[:, None])."
        )

    def groups(self, steps: int = 1) -> list[list[int]]:
        """Groups of completions that are distributed over the optimizer steps of a pass: one group per prompt.

        With more steps than prompts, each completion is a group of its own.

        Args:
            steps: Number of optimizer steps.

        Example:
            >>> nothing = torch.zeros(0)
            >>> rollout_batch = RolloutBatch(PromptBatch([], [], {}), [], [nothing] * 2, [], 2, nothing, [])
            >>> rollout_batch.groups(2), rollout_batch.groups(3)
            ([[0, 1], [2, 3]], [[0], [1], [2], [3]])
        """
        g = self.num_completions if steps <= len(self.prompts) else 1
        return [list(range(start, start + g)) for start in range(0, len(self.prompts) * self.num_completions, g)]

    def micro_batch_size(self) -> int:
        """Largest number of completions that have at most `TOKENS_PER_PASS` tokens with their prompts, at least 1."""
        sequences = [len(self.prompts[c // self.num_completions]) + len(e) for c, e in enumerate(self.completions)]
        size, g = max(1, TOKENS_PER_PASS // max([1, *sequences])), self.num_completions
        return math.ceil(g / math.ceil(g / size)) if size < g else size  # parts of a group are of equal size

    @staticmethod
    def micro_batches(groups: Sequence[Sequence[int]], size: int) -> list[list[int]]:
        """Split groups of completions into micro-batches, keeping each group together where it fits.

        Args:
            groups: Indices of completions, all groups of one size.
            size: Largest number of completions per micro-batch.

        Example:
            >>> RolloutBatch.micro_batches([[4, 5], [0, 1]], 3)
            [[4, 5], [0, 1]]
        """
        if not groups:
            return []
        g = len(groups[0])
        if size < g:
            return [list(group[start : start + size]) for group in groups for start in range(0, g, size)]
        together = size // g
        parts = (groups[start : start + together] for start in range(0, len(groups), together))
        return [[c for group in part for c in group] for part in parts]

    def split(self, values: Tensor, micro_batch: Sequence[int]) -> tuple[Tensor, ...]:
        """Split values of a micro-batch's tokens, ``[n]``, by completion."""
        return values.split([len(self.completions[c]) for c in micro_batch]) if micro_batch else ()

    def rows(self, micro_batch: Sequence[int]) -> tuple[list[Tensor], list[list[Example]]]:
        """Prompts of a micro-batch and their completions, ready to be laid out."""
        prompts: list[Tensor] = []
        completions: list[list[Example]] = []
        previous = None
        for c in micro_batch:
            if (prompt := c // self.num_completions) != previous:
                prompts.append(self.prompts[prompt])
                completions.append([])
                previous = prompt
            completions[-1].append(self.completions[c])
        return prompts, completions


@dataclass(frozen=True)
class PolicyBatch:
    """A micro-batch of a policy loss: `n` tokens of `s` completions, flat.

    Args:
        logprobs: Log-probability of each token under the policy, with gradient, nats, ``[n]``.
        old_logprobs: Log-probabilities under the policy that sampled, ``[n]``.
        ref_logprobs: Log-probabilities under the reference, ``[n]``; None without one.
        advantages: Advantage of each token, ``[n]``.
        sequences: Index of the completion of each token, ``int64 [n]``, never decreasing.
        mask: Whether each token counts, ``bool [n]``.
        weights: Weight of the tokens of each completion in the loss of the whole step, ``[s]``.
        entropy: Entropy of the distribution that each token was drawn from, without gradient, nats, ``[n]``.
        values: The critic's value of each token, with gradient, ``[n]``; None without a critic.
        old_values: The critic's values at the time of the rollout, ``[n]``.
        returns: The critic's targets, ``[n]``.
        correction: Factor of each token's loss that corrects for the engine that sampled it, ``[n]``; None without one.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    sequences: Tensor
    mask: Tensor
    weights: Tensor
    entropy: Tensor
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    correction: Tensor | None = None


def concatenated(
    values: Mapping[int, Tensor] | list[Tensor] | None, micro_batch: Sequence[int], like: Tensor
) -> Tensor | None:
    """Values of a micro-batch's completions, concatenated; None without values."""
    if values is None:
        return None
    return torch.cat([values[c] for c in micro_batch]).to(like) if micro_batch else like.detach()[:0]
