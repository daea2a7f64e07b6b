"""KTO in a Trainer: its loss against plain Python, mismatched completions, and refusals."""

import pytest
import torch
from dpo_cases import LABELED, PAIRS, assert_metrics, batches, mismatched, plain_logprobs, shake
from preference_runs import train
from tiny import make_model

from lightning_ft import KTO
from lightning_ft.errors import ConfigError, UnknownArgumentError


@pytest.mark.parametrize("rows", [LABELED, PAIRS], ids=["labeled", "pairs"])
def test_kto_loss_and_metrics_match_plain_python(model_folder, rows):
    module = KTO(model_folder, beta=0.2, desirable_weight=1.2, undesirable_weight=0.7)
    module.configure_model()
    shake(module)
    batch = batches(rows)[0]
    result = module.compute_loss(batch)
    logps, entropies, _ = plain_logprobs(module.model, batch)
    reference, *_ = plain_logprobs(make_model(), batch)
    kl = (
        plain_logprobs(module.model, mismatched(batch))[0] - plain_logprobs(make_model(), mismatched(batch))[0]
    ).mean()
    ratios, kl, good = (logps - reference).detach(), kl.detach().clamp(min=0), batch.labels
    losses = torch.where(
        good, 1.2 * (1 - torch.sigmoid(0.2 * (ratios - kl))), 0.7 * (1 - torch.sigmoid(0.2 * (kl - ratios)))
    )
    margins = 0.2 * (ratios[0::2] - ratios[1::2]) if batch.paired else ratios[:0]
    torch.testing.assert_close(result.losses, losses.view(len(batch), -1).mean(1), rtol=0, atol=1e-5)
    want = {
        "kl": kl.expand(len(batch)),
        "rewards/chosen": 0.2 * ratios[good],
        "rewards/rejected": 0.2 * ratios[~good],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
        "logps/chosen": logps.detach()[good],
        "logps/rejected": logps.detach()[~good],
        "entropy": entropies,
    }
    assert_metrics(result, want)
    assert good.any()
    assert not good.all()


def test_kto_kl_of_single_prompt_is_zero_with_warning(model_folder):
    module = KTO(model_folder)
    module.configure_model()
    shake(module)
    one = batches(LABELED, 1)[0]
    with pytest.warns(UserWarning, match="Set batch_size to 2 or more .* leaves no single row at the end of an epoch"):
        result = module.compute_loss(one)
    assert result.metrics["kl"].tolist() == [0.0]
    logratio = result.metrics["rewards/chosen"] / 0.1
    torch.testing.assert_close(result.losses, torch.sigmoid(-0.1 * logratio))


def test_kto_counts_pairs_as_two_labeled_completions(model_folder, trainer_options):
    train(KTO(model_folder), PAIRS, trainer_options, max_steps=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": 0.0}, ConfigError, "beta"),
        ({"desirable_weight": -1.0}, ConfigError, "desirable_weight=-1.0"),
        ({"undesirable_weight": float("nan")}, ConfigError, "undesirable_weight=nan"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, ConfigError, "nothing would be learned"),
        ({"label_smoothing": 0.1}, UnknownArgumentError, "label_smoothing"),
    ],
)
def test_kto_rejects_settings_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        KTO("some/model", **options)
