"""Preference and reward-model losses against TRL's on the same tensors: values and gradients."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from lightning_ft.losses.kto import kto_kl, kto_loss
from lightning_ft.losses.pairwise import bradley_terry_loss
from lightning_ft.losses.preference import (
    SequenceLogProbs,
    preference_loss,
    weighted_preference_loss,
)

TOLERANCE = 1e-6
LENGTHS = torch.tensor([3, 1, 7, 4])  # of two pairs: the chosen completions, then the rejected
PROMPT, LONGEST = 2, 7


def accelerator():
    return SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def draw(seed):
    """Log-probabilities of tokens after a prompt of two tokens, 0 outside the completion, as from TRL's fused head."""
    mask = torch.zeros(4, PROMPT + LONGEST, dtype=torch.int64)
    for row, length in zip(mask, LENGTHS, strict=True):
        row[PROMPT : PROMPT + length] = 1
    logprobs = -3 * torch.rand(mask[:, 1:].shape, generator=torch.Generator().manual_seed(seed))
    return mask, logprobs * mask[:, 1:]


class FakeModel(torch.nn.Module):
    """A model that returns these log-probabilities for any input."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs):
        super().__init__()
        self.logprobs = logprobs

    def forward(self, **_):
        zeros = torch.zeros_like(self.logprobs)
        return SimpleNamespace(log_probs=self.logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def sides(logprobs, ref_logprobs):
    whole = SequenceLogProbs(logprobs.sum(1), ref_logprobs.sum(1), LENGTHS)
    return [SequenceLogProbs(*(x[part] for x in whole)) for part in (slice(0, 2), slice(2, 4))]


def dpo_loss(mask, logprobs, ref_logprobs, losses, beta, label_smoothing):
    model = FakeModel(logprobs)
    trainer = SimpleNamespace(
        model=model,
        ref_model=FakeModel(ref_logprobs),
        accelerator=accelerator(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=list(losses),
        loss_weights=list(losses.values()),
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _tp_size=1,
        _total_train_tokens=0,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


def agree(ours, theirs, *leaves):
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    for grad, expected in zip(
        *(torch.autograd.grad(x, leaves, retain_graph=True) for x in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(grad, expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert expected.any()


@pytest.mark.parametrize(
    ("losses", "label_smoothing"),
    [
        ({"sigmoid": 1.0}, 0.0),
        ({"hinge": 1.0}, 0.0),
        ({"ipo": 1.0}, 0.0),
        ({"robust": 1.0}, 0.0),
        ({"robust": 1.0}, 0.1),
        ({"sigmoid": 0.7, "hinge": 0.2, "ipo": 0.1}, 0.0),
    ],
)
def test_dpo_losses_match_trl(losses, label_smoothing):
    (mask, logprobs), (_, ref_logprobs) = draw(0), draw(1)
    logprobs.requires_grad_()
    theirs = dpo_loss(mask, logprobs, ref_logprobs, losses, 0.3, label_smoothing)
    options = {"beta": 0.3, "label_smoothing": label_smoothing}
    ours = weighted_preference_loss(losses, *sides(logprobs, ref_logprobs), **options)
    agree(ours.mean(), theirs, logprobs)
    if len(losses) == 1:
        one = preference_loss(next(iter(losses)), *sides(logprobs, ref_logprobs), **options)
        torch.testing.assert_close(one, ours, atol=0, rtol=0)


def test_sft_loss_of_single_pair_matches_trl():
    """TRL takes the mean over all chosen tokens of the micro-batch, which is the same for a single pair."""
    (mask, logprobs), (_, ref_logprobs) = draw(0), draw(1)
    pair = torch.tensor([0, 2])
    leaf = logprobs.clone().requires_grad_()
    logprobs = leaf * mask[:, 1:]  # TRL's gradient stays within the completion
    theirs = dpo_loss(mask[pair], logprobs[pair], ref_logprobs[pair], {"sft": 1.0}, 0.3, 0.0)
    ours = preference_loss("sft", *sides(logprobs, ref_logprobs))[:1]
    agree(ours.mean(), theirs, leaf)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_loss_matches_trl(label_smoothing):
    _, logprobs = draw(0)
    logprobs.requires_grad_()
    chosen, rejected = sides(logprobs, logprobs.detach())
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=0.5,
        beta=2.0,
        label_smoothing=label_smoothing,
        accelerator=accelerator(),
    )
    theirs = CPOTrainer.cpo_loss(trainer, chosen.average, rejected.average)[0]
    ours = preference_loss("simpo", chosen, rejected, beta=2.0, gamma=0.5, label_smoothing=label_smoothing)
    agree(ours.mean(), theirs.mean(), logprobs)


def test_orpo_loss_matches_trl():
    _, logprobs = draw(0)
    logprobs.requires_grad_()
    chosen, rejected = sides(logprobs, logprobs.detach())
    trainer = SimpleNamespace(beta=0.2, accelerator=accelerator())
    odds = ORPOTrainer.odds_ratio_loss(trainer, chosen.average, rejected.average)[0]
    theirs = -chosen.average - odds
    agree(preference_loss("orpo", chosen, rejected, beta=0.2).mean(), theirs.mean(), logprobs)


@pytest.mark.parametrize("labels", [[True, False, False, True], [True] * 4, [False] * 4])
@pytest.mark.parametrize("kl_logprobs", [(2, 3), (3, 2)], ids=["above", "below"])  # the second is clamped at 0
def test_kto_loss_matches_trl(labels, kl_logprobs):
    (mask, logprobs), (_, ref_logprobs) = draw(0), draw(1)
    kl, ref_kl = (draw(seed)[1] for seed in kl_logprobs)
    logprobs.requires_grad_()
    labels = torch.tensor(labels)
    model = FakeModel(logprobs)
    mismatched = iter([kl.sum(1), ref_kl.sum(1)])  # TRL computes them in a separate method
    trainer = SimpleNamespace(
        model=model,
        ref_model=FakeModel(ref_logprobs),
        accelerator=accelerator(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _compute_kl_logps=lambda *_: next(mismatched),
        _tp_size=1,
        _total_train_tokens=0,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.ones_like(mask)
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": mask, "label": labels}
    theirs = KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    point = kto_kl(kl.sum(1) - ref_kl.sum(1))
    options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    ours = kto_loss((logprobs - ref_logprobs).sum(1), labels, point, **options)
    agree(ours.mean(), theirs, logprobs)
    assert trainer._metrics["train"]["kl"] == pytest.approx([point.item()], abs=TOLERANCE)


@pytest.mark.parametrize("margins", [None, [0.5, -1.0, 3.0]])
@pytest.mark.parametrize("centering", [None, 0.01])
def test_bradley_terry_loss_matches_trl(margins, centering):
    rewards = torch.tensor([2.0, -1.0, 0.0, 1.0, 3.0, 0.5], requires_grad=True)  # chosen, then rejected
    model = lambda **_: SimpleNamespace(logits=rewards[:, None])  # noqa: E731
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=accelerator(),
        _tp_size=1,
        _total_train_tokens=0,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {"attention_mask": torch.ones(6, 2)}
    margins = None if margins is None else torch.tensor(margins)
    if margins is not None:
        inputs["margin"] = margins
    theirs = RewardTrainer.compute_loss(trainer, model, inputs)
    agree(bradley_terry_loss(rewards[:3], rewards[3:], margins, centering or 0.0).mean(), theirs, rewards)
