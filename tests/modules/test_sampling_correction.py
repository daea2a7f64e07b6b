"""The policy-gradient modules correct for an engine whose log-probabilities differ from the model's."""

import dataclasses

import pytest
import torch
from policies import BATCHES, PREDRAWN, Actor, Policy, by_tokens, make
from predrawn_rollouts import ReplayEngine, largest_difference, run
from tiny import make_model, make_tokenizer

from lightning_ft import GRPO
from lightning_ft.errors import ConfigError
from lightning_ft.losses.sampling_correction import sampling_correction
from lightning_ft.rollout.protocol import Rollouts


def rollouts_with(offset):
    """The predrawn completions, with log-probabilities near those of the tiny model."""
    return [
        Rollouts(
            tuple(
                dataclasses.replace(c, logprobs=tuple(-7.0 - offset * (n % 3) for _ in c.tokens))
                for n, c in enumerate(rollout.completions)
            ),
            0,
            0,
        )
        for rollout in PREDRAWN
    ]


class PassedEngine(ReplayEngine):
    """As an engine of a user's own."""

    def sync_weights(self, model):
        pass


def trained(module_class, rollouts, trainer_options, **options):
    module = make(module_class, engine=PassedEngine(rollouts), **options)
    return module, run(module, BATCHES[:1], trainer_options)


@pytest.mark.parametrize("module_class", [Policy, Actor])
def test_gradient_depends_on_the_log_probabilities_of_a_passed_engine(module_class, trainer_options):
    near, far = (trained(module_class, rollouts_with(offset), trainer_options)[0] for offset in (0.0, 0.3))
    assert largest_difference(near.gradients[0], far.gradients[0]) > 1e-3
    ignoring = [
        trained(module_class, rollouts_with(offset), trainer_options, sampling_correction=None)[0]
        for offset in (0.0, 0.3)
    ]
    assert largest_difference(ignoring[0].gradients[0], ignoring[1].gradients[0]) == 0


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_correction_of_a_step_is_that_of_the_loss(micro_batch_size, trainer_options):
    module, trainer = trained(
        Policy,
        rollouts_with(0.3),
        trainer_options,
        sampling_correction="token_truncate",
        sampling_ratio_max=1.1,
        micro_batch_size=micro_batch_size,
        mask_truncated=True,
    )
    weights, outside, tokens = 0.0, 0, 0
    sampled = [torch.tensor(c.logprobs) for c in rollouts_with(0.3)[0].completions]
    for batch, _ in module.results:
        count = len(batch.weights)
        mine, sampled = torch.cat(sampled[:count]), sampled[count:]
        expected, out_of_bounds = sampling_correction(
            batch.old_logprobs,
            mine,
            batch.sequences,
            count,
            batch.mask,
            mode="token_truncate",
            largest=1.1,
        )
        torch.testing.assert_close(batch.correction, expected)
        weights += float(expected[batch.mask].sum())
        outside += int(out_of_bounds[batch.mask].sum())
        tokens += int(batch.mask.sum())
    assert trainer.callback_metrics["train/sampling_ratio"] == pytest.approx(weights / tokens, rel=1e-5)
    assert trainer.callback_metrics["train/sampling_out_of_bounds"] == pytest.approx(outside / tokens)
    assert 0 < outside < tokens


@pytest.mark.parametrize("module_class", [Policy, Actor])
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_completions_without_log_probabilities_have_a_weight_of_one(module_class, mode, trainer_options):
    """Completion by completion, so that the step doesn't depend on micro-batches."""
    rollouts = rollouts_with(0.3)
    completions = list(rollouts[0].completions)
    completions[5] = dataclasses.replace(completions[5], logprobs=())
    rollouts[0] = Rollouts(tuple(completions), 0, 0)
    found = []
    for size in (None, 3, 1):
        options = {"sampling_correction": mode, "sampling_ratio_max": 5.0, "micro_batch_size": size}
        module, trainer = trained(module_class, rollouts, trainer_options, **options)
        found.append((module, float(trainer.callback_metrics["train/sampling_ratio"])))
    whole, _ = found[0][0].results[0]
    assert (whole.correction[whole.sequences == 5] == 1).all()
    assert (whole.correction[whole.sequences != 5] != 1).all()
    for module, ratio in found[1:]:
        assert largest_difference(module.gradients[0], found[0][0].gradients[0]) < 1e-5
        assert ratio == pytest.approx(found[0][1], rel=1e-4)


def test_built_in_engine_is_not_corrected_unless_requested(trainer_options):
    module = make(Policy)
    trainer = run(module, BATCHES[:1], trainer_options, rollouts=rollouts_with(0.3))
    assert "train/sampling_ratio" not in trainer.callback_metrics
    assert all(batch.correction is None for batch, _ in module.results)
    module = make(Policy, sampling_correction="sequence_truncate")
    run(module, BATCHES[:1], trainer_options, rollouts=rollouts_with(0.3))
    assert all(batch.correction is not None for batch, _ in module.results)


def test_engine_without_log_probabilities_is_not_corrected(trainer_options):
    module, trainer = trained(Policy, PREDRAWN, trainer_options)
    assert "train/sampling_ratio" not in trainer.callback_metrics
    assert all(batch.correction is None for batch, _ in module.results)


def test_sampling_correction_is_on_for_vllm():
    def module(**options):
        return GRPO(make_model(), tokenizer=make_tokenizer(), rewards=by_tokens, vllm=True, **options)

    assert module().correction.mode == "sequence_mask"
    assert module(sampling_correction=None).correction.mode is None
    with pytest.warns(UserWarning, match="can't be corrected"):
        assert module(top_p=0.9).correction.mode is None
    with pytest.raises(ConfigError, match="sampling_correction='token_mask': With top_p, top_k or min_p"):
        module(top_k=5, sampling_correction="token_mask")


def test_warning_if_most_tokens_are_out_of_bounds(trainer_options):
    with pytest.warns(UserWarning, match=r"For \d+% of the tokens of a rollout .* so they don't count"):
        trained(Policy, rollouts_with(4.0), trainer_options, sampling_correction="token_mask", sampling_ratio_max=1.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling_correction": "sequences"}, "sampling_correction='sequences'"),
        ({"sampling_ratio_max": 0.2}, r"sampling_ratio_max=0\.2"),
    ],
)
def test_module_refuses_wrong_settings_of_the_correction(options, message):
    with pytest.raises(ConfigError, match=message):
        make(Policy, **options)
