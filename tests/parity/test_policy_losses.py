"""Policy losses and advantages against TRL's GRPO and RLOO code on the same tensors."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from trl import GRPOTrainer, RLOOTrainer

from lightning_ft.losses.advantages import combine_rewards, group_advantages, leave_one_out_advantages
from lightning_ft.losses.kl import k1
from lightning_ft.losses.policy import policy_loss, token_weights

TOLERANCE = 1e-6
LENGTHS = torch.tensor([3, 1, 7, 5, 2, 6])
LONGEST, MAX_NEW_TOKENS, KL_COEF = 7, 9, 0.2
NAN = float("nan")
G = 3


@pytest.fixture(autouse=True)
def _one_process():
    PartialState()  # accelerate's gather needs it


def accelerator():
    return SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
    )


def draw(seed=0):
    """Six completions in TRL's layout, padded on the right; the fifth is masked like a truncated one."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(6, LONGEST, generator=generator)
    mask = (torch.arange(LONGEST) < LENGTHS[:, None]).long()
    mask[4] = 0
    return SimpleNamespace(
        old=old,
        new=(old + 0.5 * torch.randn(6, LONGEST, generator=generator)).requires_grad_(),
        ref=old + 0.5 * torch.randn(6, LONGEST, generator=generator),
        mask=mask,
        advantages=torch.tensor([1.0, -2.0, 0.5, -0.7, 0.3, 1.5]),
    )


def part_of(step, first, last):
    return SimpleNamespace(**{name: value[first:last] for name, value in vars(step).items()})


def grpo_loss(step, loss_type, micro_batches=1, on_policy=False, **options):
    """TRL's loss of one micro-batch, and the metrics it logs."""
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        args=SimpleNamespace(
            use_bias_correction_kl=options.get("corrected", True),
            delta=options.get("delta"),
            steps_per_generation=micro_batches,
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (step.new, torch.zeros_like(step.new), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=options.get("level", "token"),
        beta=KL_COEF,
        loss_type=loss_type,
        epsilon_low=options.get("low", 0.2),
        epsilon_high=options.get("high", 0.28),
        use_vllm=False,
        current_gradient_accumulation_steps=micro_batches,
        max_completion_length=MAX_NEW_TOKENS,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    nothing = step.mask[:, :0]
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": torch.zeros_like(step.mask),
        "completion_mask": step.mask,
        "advantages": step.advantages,
        "ref_per_token_logps": step.ref,
        "num_items_in_batch": options.get("total_tokens", step.mask.sum()),
    }
    if not on_policy:
        inputs["old_per_token_logps"] = step.old
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


def our_loss(part, loss_type, *, step, on_policy=False, low=0.2, high=0.28, level="token", corrected=True, **options):
    """Our loss, on flat tensors without padding; masked completions are kept and masked."""
    first = int(step.advantages.eq(part.advantages[0]).nonzero()[0])
    lengths = LENGTHS[first : first + len(part.advantages)]
    here = torch.arange(LONGEST) < lengths[:, None]
    total = {"total_sequences": len(step.advantages), "total_tokens": step.mask.sum(), "max_new_tokens": MAX_NEW_TOKENS}
    return policy_loss(
        part.new[here],
        None if on_policy else part.old[here],
        part.advantages,
        torch.arange(len(lengths)).repeat_interleave(lengths),
        weights=token_weights(loss_type, part.mask.sum(1), **total),
        mask=part.mask[here].bool(),
        ref_logprobs=part.ref[here],
        kl_coef=KL_COEF,
        loss_type=loss_type,
        level=level,
        clip_low=low,
        clip_high=high,
        bias_corrected_kl=corrected,
        **options,
    )


OPTIONS = [
    {},
    {"on_policy": True},
    {"level": "sequence", "low": 0.05, "high": 0.06},
    {"corrected": False},
    {"delta": 1.5},
    {"on_policy": True, "level": "sequence"},
]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_grpo_loss_matches_trl(loss_type, options):
    step, options = draw(), dict(options)
    if loss_type == "cispo":
        options = {**options, "high": 1.3}
        options.pop("delta", None)
    theirs, logged = grpo_loss(step, loss_type, **options)
    ours = our_loss(step, loss_type, step=step, **options)
    torch.testing.assert_close(ours.loss, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    (expected,) = torch.autograd.grad(theirs, step.new)
    (grad,) = torch.autograd.grad(ours.loss, step.new)
    torch.testing.assert_close(grad, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert grad.abs().sum() > 0.1

    assert (ours.kl / ours.tokens).item() == pytest.approx(logged["kl"][0], abs=TOLERANCE)
    if options.get("level") != "sequence":  # there TRL counts completions, masked ones included, instead of tokens
        names = (
            {"clipped_high": "cispo_clip_ratio"}
            if loss_type == "cispo"
            else {
                "clipped_low": "clip_ratio/low_mean",
                "clipped_high": "clip_ratio/high_mean",
            }
        )
        for name, theirs_name in names.items():
            assert (getattr(ours, name) / ours.tokens).item() == pytest.approx(logged[theirs_name][0], abs=TOLERANCE)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo"])
def test_grpo_loss_over_micro_batches_matches_trl(loss_type):
    step = draw()
    parts = [part_of(step, first, first + 2) for first in (0, 2, 4)]
    options = {"high": 1.3} if loss_type == "cispo" else {}
    theirs = sum(grpo_loss(part, loss_type, 3, total_tokens=step.mask.sum(), **options)[0] for part in parts)
    ours = sum(our_loss(part, loss_type, step=step, **options).loss for part in parts)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, step.new)[0] for loss in (ours, theirs)), atol=TOLERANCE, rtol=TOLERANCE
    )


def test_rloo_loss_matches_trl():
    step = draw()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        _get_per_token_logps_and_entropies=lambda *_, **__: (step.new, torch.zeros_like(step.new), None),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.3,
        _metrics={"train": defaultdict(list)},
    )
    nothing = step.mask[:, :0]
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": torch.zeros_like(step.mask),
        "completion_mask": step.mask,
        "advantages": step.advantages,
        "old_logps": (step.old * step.mask).sum(1),
    }
    theirs = RLOOTrainer._compute_loss(trainer, None, inputs)
    here = torch.arange(LONGEST) < LENGTHS[:, None]
    ours = policy_loss(
        step.new[here],
        step.old[here],
        step.advantages,
        torch.arange(6).repeat_interleave(LENGTHS),
        weights=token_weights("rloo", step.mask.sum(1), total_sequences=6, total_tokens=step.mask.sum()),
        mask=step.mask[here].bool(),
        loss_type="rloo",
        clip_low=0.2,
        clip_high=0.3,
    )
    # TRL's loss includes the advantage of a completion without tokens, which has no gradient.
    torch.testing.assert_close(ours.loss - step.advantages[4] / 6, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, step.new)[0] for loss in (ours.loss, theirs)), atol=TOLERANCE, rtol=TOLERANCE
    )


# --- advantages, from the methods that compute the rewards of rollouts

PER_FUNCTION = torch.tensor(
    [
        *([1.0, 0.5], [0.0, NAN], [2.0, -1.0]),
        *([1.0, 1.0], [NAN, NAN], [0.5, 0.25]),
        *([NAN, NAN], [NAN, NAN], [3.0, 1.0]),
        *([2.0, 2.0], [2.0, 2.0], [2.0, 2.0]),
        *([NAN, NAN], [NAN, NAN], [NAN, NAN]),
    ]
)
WEIGHTS = torch.tensor([1.0, 0.5])


def fake_trainer(per_function, generated, num_completions, **options):
    """The attributes of a trainer that TRL's methods read between rollouts and advantages."""
    n = len(per_function)
    logprobs = torch.randn(2, n, 2, generator=torch.Generator().manual_seed(0))
    calls = iter(logprobs)  # the policy's, then the reference's
    trainer = SimpleNamespace(
        accelerator=accelerator(),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        ref_model=object(),
        args=SimpleNamespace(
            per_device_train_batch_size=n,
            gradient_checkpointing_kwargs=None,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        environment_factories=None,
        environments=None,
        tools=None,
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        num_iterations=1,
        use_vllm=False,
        beta=0.0,
        log_multimodal=False,
        num_generations=num_completions,
        multi_objective_aggregation="sum_then_normalize",
        reward_clip_range=None,
        reward_weights=WEIGHTS,
        reward_func_names=["one", "other"],
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _generate=lambda prompts: generated,
        _calculate_rewards=lambda *_: per_function,
        _get_per_token_logps_and_entropies=lambda *_, **__: (next(calls), None, None),
        _metrics={"train": defaultdict(list)},
        _logs={"prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list), "extra": {}},
        _pending_extra_logs={},
        _pending_metrics={},
    )
    vars(trainer).update(options)
    return trainer, logprobs


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("num_completions", [G, 1])
def test_group_advantages_match_trl(scale, num_completions):
    n = len(PER_FUNCTION)
    generated = ([[1]] * n, [[2, 3]] * n, None, ["x"] * n, None, None, None, None)
    trainer, _ = fake_trainer(PER_FUNCTION, generated, num_completions, scale_rewards=scale)
    rows = [{"prompt": "p"}] * n
    theirs = GRPOTrainer._generate_and_score_completions(trainer, rows)["advantages"]
    ours = group_advantages(combine_rewards(PER_FUNCTION, WEIGHTS), num_completions, scale=scale)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    assert ours.any() == (num_completions > 1)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("num_completions", [G, 1])
def test_leave_one_out_advantages_match_trl(normalize, beta, num_completions):
    n = len(PER_FUNCTION)
    generated = ([[1]] * n, [[2, 3]] * n, ["x"] * n)
    options = {"normalize_advantages": normalize, "beta": beta}
    trainer, (logprobs, ref_logprobs) = fake_trainer(PER_FUNCTION, generated, num_completions, **options)
    theirs = RLOOTrainer._generate_and_score_completions(trainer, [{"prompt": "p"}] * n)["advantages"]
    rewards = combine_rewards(PER_FUNCTION, WEIGHTS) - beta * k1(logprobs, ref_logprobs).sum(1)
    ours = leave_one_out_advantages(rewards, num_completions, normalize=normalize)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    assert ours.any() == (num_completions > 1)
