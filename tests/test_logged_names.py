"""The names in docs/metrics.md are exactly those that modules and callbacks log."""

import re
from pathlib import Path

import pytest
from preference_runs import make_labeled, make_pairs
from tiny import make_model, make_rows, make_tokenizer
from tiny_scorer import make_scorer

from lightning_ft import (
    DPO,
    GRPO,
    KTO,
    PPO,
    ComputeMeter,
    FullFineTuning,
    PairDataModule,
    PreferenceDataModule,
    Prices,
    PromptBaseline,
    PromptDataModule,
    PromptDistillation,
    Retention,
    RetentionFrontier,
    RewardModeling,
    TokenSavings,
)
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.evaluation.retention.choices import ChoiceQuestion

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
NOT_RUN = {"train/router_loss"}  # only for mixtures of experts, tested in tests/modules/test_training.py
LIGHTNINGS_OWN = {"epoch"}


class NameLogger(_pl.loggers.logger.Logger):
    """Logger that records the names of metrics."""

    name = version = "names"

    def __init__(self):
        super().__init__()
        self.names = set()

    def log_metrics(self, metrics, step=None):
        self.names |= set(metrics)

    def log_hyperparams(self, *_, **__):
        pass


def length(completion_ids, **_):
    return [len(ids) / 8 for ids in completion_ids]


def commas(completions, **_):
    return [float(str(text).count(",")) for text in completions]


def callbacks():
    baseline = PromptBaseline(system="Say what it is.", few_shot=[make_rows(1)[0]])
    prices = Prices(input=1.0, output=2.0, cached_input=0.1, currency="USD", date="2026-01-01", training=1.0)
    savings = TokenSavings(
        baseline,
        prices=prices,
        scorer=lambda output, reference: 0.5,
        max_new_tokens=4,
        output_dir=False,
        progress=False,
    )
    texts = ["the quick brown fox jumps over the lazy dog " * 3] * 2
    retention = Retention(texts, choices=[ChoiceQuestion("Q:", ("a", "b"), 0)], output_dir=False, progress=False)
    frontier = RetentionFrontier(texts, scorer=lambda output, reference: 0.5, scales=(1.0,), max_new_tokens=4)
    return [ComputeMeter(peak_flops=1e12, output_dir=False), savings, retention, frontier]


def make_run(name):
    """Build a module, its DataModule, and callbacks."""
    options = {"tokenizer": make_tokenizer(), "on_nonfinite": "skip"}
    sampled = {"num_completions": 2} | options
    sampled |= {"rewards": length, "validation_rewards": commas, "max_new_tokens": 4, "kl_coef": 0.1}
    data = {"cache_dir": False, "batch_size": 4}
    prompts = [{"prompt": row["input"]} for row in make_rows(8)]
    if name == "sft":
        rows = make_rows(60)
        data = PairDataModule(train=rows[:16], validation=rows[20:28], test=rows[30:], **data)
        anchor = {"texts": ["the quick brown fox jumps over the lazy dog"]}
        return FullFineTuning(make_model(), anchor=anchor, **options), data, callbacks()
    if name == "reward":
        pairs = make_pairs(16)
        data = PreferenceDataModule(pairs[:8], validation=pairs[8:12], test=pairs[12:], **data)
        return RewardModeling(make_scorer(), **options), data, []
    if name in ("dpo", "kto"):
        rows = make_pairs(16) if name == "dpo" else make_labeled(16)
        data = PreferenceDataModule(rows[:8], validation=rows[8:12], test=rows[12:], **data)
        return (DPO if name == "dpo" else KTO)(make_model(), **options), data, []
    data = PromptDataModule(prompts[:4], validation=prompts[4:6], test=prompts[6:], **{**data, "batch_size": 2})
    if name == "distillation":
        return PromptDistillation(make_model(), prompt={"system": "Say it."}, max_new_tokens=4, **options), data, []
    if name == "ppo":
        sampled.pop("num_completions")
    sampled["sampling_correction"] = "token_truncate"  # as for engines of one's own
    return (GRPO if name == "grpo" else PPO)(make_model(), **sampled), data, []


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Names that each module logs in a small run, keyed by module."""
    names = {}
    for run in ("sft", "reward", "distillation", "dpo", "kto", "grpo", "ppo"):
        module, data, extra = make_run(run)
        logger = NameLogger()
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            log_every_n_steps=1,
            logger=logger,
            callbacks=extra,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=str(tmp_path_factory.mktemp(run)),
        )
        trainer.fit(module, data)
        names[run] = logger.names | set(trainer.callback_metrics)
        trainer.test(module, data, verbose=False)
        names[run] |= logger.names
    return names


def documented():
    """Return the names in the first column of the page's tables."""
    cells = re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def generalized(names):
    """Replace names of reward functions by NAME."""
    return {re.sub(r"/rewards/(length|commas)(_std)?$", r"/rewards/NAME\2", name) for name in names}


def test_logged_names_are_documented(logged):
    missing = {run: sorted(generalized(names) - documented() - LIGHTNINGS_OWN) for run, names in logged.items()}
    assert not any(missing.values()), f"Describe them in docs/metrics.md: {missing}"


def test_documented_names_are_logged(logged):
    unknown = documented() - generalized(set().union(*logged.values())) - NOT_RUN
    assert not unknown, f"Nothing logs these names of docs/metrics.md: {sorted(unknown)}"
