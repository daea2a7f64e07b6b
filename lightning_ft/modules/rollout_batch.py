"""What a rollout gives a policy to learn from, and the pieces of it that one pass takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_ft.data.batches import PromptBatch
from lightning_ft.data.layout import Example
from lightning_ft.rewards.batch import Rewards
from lightning_ft.rollout.protocol import Rollouts


@dataclass
class RolloutBatch:
    """Completions of one rollout, `g` to each of `p` prompts, with all that was measured of them before any step.

    Lists over completions are prompt by prompt.

    Args:
        source: What was answered.
        texts: What was answered to it, `p * g`.
        prompts: Token ids, ``int64 [t]`` each.
        completions: Tokens of each completion, all of them supervised.
        num_completions: `g`.
        truncated: Whether each was stopped by the limit of tokens, ``bool [p * g]``.
        sampling_logprobs: What the engine sampled each token with, nats, ``float32 [t]`` each; empty if it didn't say.
        judged: What each completion is worth; None until it was judged.
        old_logprobs: Under the policy that sampled, ``float32 [t]`` each; None where it won't have moved.
        ref_logprobs: Under the reference, likewise; none without a reference.
        advantages: Of each token, ``float32 [t]`` each, or of each completion, ``[1]`` each.
        values: The critic's at each token, ``float32 [t]`` each; none without a critic.
        returns: Their targets, likewise.
        nonfinite: What wasn't finite on this rank, so that nothing can be learnt from the rollout; None if all was.
    """

    source: PromptBatch
    texts: list[str]
    prompts: list[Tensor]
    completions: list[Example]
    num_completions: int
    truncated: Tensor
    sampling_logprobs: list[Tensor]
    judged: Rewards | None = None
    old_logprobs: list[Tensor] | None = None
    ref_logprobs: list[Tensor] | None = None
    advantages: list[Tensor] = field(default_factory=list)
    values: list[Tensor] | None = None
    returns: list[Tensor] | None = None
    nonfinite: str | None = None

    @classmethod
    def of(cls, batch: PromptBatch, rollouts: Rollouts, texts: list[str], num_completions: int) -> RolloutBatch:
        """The completions of a batch of prompts."""
        every = rollouts.completions
        return cls(
            source=batch,
            texts=texts,
            prompts=batch.input_ids,
            completions=[
                Example(torch.tensor(c.tokens, dtype=torch.int64), torch.ones(len(c.tokens), dtype=torch.bool))
                for c in every
            ],
            num_completions=num_completions,
            truncated=torch.tensor([c.truncated for c in every], dtype=torch.bool),
            sampling_logprobs=[torch.tensor(c.logprobs, dtype=torch.float32) for c in every],
        )

    @property
    def rewards(self) -> Tensor:
        """Total reward of each completion, NaN where no reward applied, ``float32 [p * g]``."""
        assert self.judged is not None, "roll_out() has them judged"
        return self.judged.total

    @property
    def repeated_prompts(self) -> list[Any]:
        """The prompt of each completion as it stood in its row, `p * g`."""
        return [prompt for prompt in self.source.prompts for _ in range(self.num_completions)]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, ``int64 [p * g]``."""
        return torch.tensor([len(completion) for completion in self.completions], dtype=torch.int64)

    @property
    def unscored(self) -> list[int]:
        """Completions that were sampled from logits that aren't finite, as their log-probabilities tell."""
        return [c for c, logprobs in enumerate(self.sampling_logprobs) if not bool(logprobs.isfinite().all())]

    def groups(self, steps: int = 1) -> list[list[int]]:
        """What is dealt out over the optimizer steps of a pass: groups of completions, those of a prompt together.

        Where there are more steps than prompts, completions are dealt out one by one.

        Args:
            steps: How many optimizer steps.

        Example:
            >>> nothing = torch.zeros(0)
            >>> rollout_batch = RolloutBatch(PromptBatch([], [], {}), [], [nothing] * 2, [], 2, nothing, [])
            >>> rollout_batch.groups(2), rollout_batch.groups(3)
            ([[0, 1], [2, 3]], [[0], [1], [2], [3]])
        """
        g = self.num_completions if steps <= len(self.prompts) else 1
        return [list(range(start, start + g)) for start in range(0, len(self.prompts) * self.num_completions, g)]

    @staticmethod
    def pieces(groups: Sequence[Sequence[int]], size: int | None) -> list[list[int]]:
        """Groups of completions, cut into pieces that one pass takes, those of a group together where they fit.

        Args:
            groups: All of one size.
            size: Most completions of a piece; None for all at once.

        Example:
            >>> RolloutBatch.pieces([[4, 5], [0, 1]], 3)
            [[4, 5], [0, 1]]
        """
        if size is None or not groups:
            return [[c for group in groups for c in group]] if groups else []
        g = len(groups[0])
        if size < g:
            return [list(group[start : start + size]) for group in groups for start in range(0, g, size)]
        together = size // g
        parts = (groups[start : start + together] for start in range(0, len(groups), together))
        return [[c for group in part for c in group] for part in parts]

    def split(self, values: Tensor, piece: Sequence[int]) -> tuple[Tensor, ...]:
        """Values of a piece's tokens, ``[n]``, by its completions."""
        return values.split([len(self.completions[c]) for c in piece]) if piece else ()

    def rows(self, piece: Sequence[int]) -> tuple[list[Tensor], list[list[Example]]]:
        """Prompts and their completions of a piece, ready to be laid out."""
        prompts: list[Tensor] = []
        completions: list[list[Example]] = []
        before = None
        for c in piece:
            if (prompt := c // self.num_completions) != before:
                prompts.append(self.prompts[prompt])
                completions.append([])
                before = prompt
            completions[-1].append(self.completions[c])
        return prompts, completions


@dataclass(frozen=True)
class PolicyBatch:
    """What a policy loss is made of: `n` tokens of `s` completions, flat.

    Args:
        logprobs: Under the policy, with gradient, nats, ``[n]``.
        old_logprobs: Under the policy that sampled, ``[n]``.
        ref_logprobs: Under the reference, ``[n]``, or None without one.
        advantages: ``[n]``.
        sequences: Which completion each token belongs to, ``int64 [n]``, never decreasing.
        mask: Which tokens count, ``bool [n]``.
        weights: Weight of the tokens of each completion in the loss of the whole step, ``[s]``.
        entropy: Of the distribution that each token was drawn from, without gradient, nats, ``[n]``.
        values: The critic's, with gradient, ``[n]``; None without a critic.
        old_values: At the time of the rollout, ``[n]``.
        returns: The critic's targets, ``[n]``.
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


def picked(values: Mapping[int, Tensor] | list[Tensor] | None, piece: Sequence[int], like: Tensor) -> Tensor | None:
    """The values of a piece's completions one behind the other, where there are any."""
    if values is None:
        return None
    return torch.cat([values[c] for c in piece]).to(like) if piece else like.detach()[:0]
