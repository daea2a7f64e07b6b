"""Engines of a user's own, passed as `engine=`: equal to the built-in engine, saved nowhere, and checked."""

import math
from pathlib import Path

import pytest
import torch
from policies import BATCHES, Actor, Policy, make
from predrawn_rollouts import END

from lightning_ft import GRPO, PPO
from lightning_ft._lightning import Trainer
from lightning_ft.cli import FineTuningParser
from lightning_ft.errors import ConfigError, NonFiniteError, RolloutError
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Completion, RolloutEngine, Rollouts


class WrappingEngine:
    """Samples with a `LocalEngine` of the model that it is passed."""

    def __init__(self):
        self.local, self.synced = None, 0

    def generate(self, prompts, **options):
        return self.local.generate(prompts, **options)

    def sync_weights(self, model):
        self.synced += 1
        self.local = self.local or LocalEngine(model, end_token_ids=[END], batch_size=64)


class FixedEngine:
    """Returns the object that it was created with."""

    def __init__(self, returned):
        self.returned = returned

    def generate(self, prompts, **options):
        return self.returned

    def sync_weights(self, model):
        pass


class ModuleEngine(WrappingEngine, torch.nn.Module):
    """An engine that is a torch module, with weights of its own."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        WrappingEngine.__init__(self)
        self.extra_weights = torch.nn.Linear(2, 2)


def fit(module, options, batches=BATCHES, validation=None):
    torch.manual_seed(3)
    trainer = Trainer(**{**options, "max_epochs": 1})
    loaders = [
        torch.utils.data.DataLoader(part, batch_size=None, generator=torch.Generator())
        for part in (batches, validation)
        if part
    ]
    trainer.fit(module, *loaders)
    return trainer


@pytest.mark.parametrize("module_class", [Policy, Actor])
def test_engine_object_trains_as_the_built_in_engine(module_class, trainer_options):
    built_in = make(module_class)
    fit(built_in, trainer_options)
    engine = WrappingEngine()
    module = make(module_class, engine=engine)
    trainer = fit(module, trainer_options)
    assert trainer.global_step >= 2
    assert engine.synced == 2
    assert module.samples == built_in.samples
    for one, other in zip(module.gradients, built_in.gradients, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    ours, theirs = module.state_dict(), built_in.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_engine_object_syncs_weights_before_validation(trainer_options):
    engine = WrappingEngine()
    module = make(Policy, engine=engine)
    fit(module, {**trainer_options, "num_sanity_val_steps": 0}, validation=BATCHES[:1])
    assert engine.synced == 3


def test_engine_object_is_neither_hyperparameter_nor_submodule(trainer_options, tmp_path):
    engine = ModuleEngine()
    module = make(Policy, engine=engine)
    trainer = fit(module, trainer_options, BATCHES[:1])
    assert module.engine is engine
    assert "engine" not in module.hparams
    assert engine not in set(module.modules())
    assert not any("extra_weights" in name for name in module.state_dict())
    path = tmp_path / "step.ckpt"
    trainer.save_checkpoint(path)
    assert "engine" not in torch.load(path, weights_only=True)["hyper_parameters"]


def test_engine_of_the_documentation_trains(trainer_options):
    page = (Path(__file__).parents[2] / "docs" / "rlhf.md").read_text(encoding="utf-8")
    example = next(block for block in page.split("```python\n") if "class TransformersEngine" in block)
    names = {}
    exec(example.split("\n\n\nmodule = ")[0], names)
    module = make(Policy, engine=names["TransformersEngine"](END))
    assert fit(module, trainer_options).global_step == 2


ANNOTATED_ENGINE = """
from collections.abc import Sequence
from lightning_ft.models.head import CausalLM
from lightning_ft.rollout.protocol import OnAnswered, Rollouts, Sampling


class Engine:
    def __init__(self, size: int = 1):
        self.size = size

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling | None = None,
        num_completions: int = 1, on_answered: OnAnswered | None = None
    ) -> Rollouts:
        raise NotImplementedError

    def sync_weights(self, model: CausalLM) -> None:
        pass


def reward(completions, **columns):
    return [0.0 for _ in completions]
"""


def test_engine_object_comes_from_a_configuration_file(tmp_path, monkeypatch):
    (tmp_path / "own_engines.py").write_text(ANNOTATED_ENGINE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    parser = FineTuningParser()
    parser.add_subclass_arguments(GRPO, "model")
    model = {"class_path": "lightning_ft.GRPO", "init_args": {"model": "some/model", "rewards": "own_engines.reward"}}
    model["init_args"]["engine"] = {"class_path": "own_engines.Engine", "init_args": {"size": 3}}
    module = parser.instantiate(parser.parse_object({"model": model})).model
    assert module._engine_argument[0].size == 3


def test_engine_object_with_vllm_is_refused():
    with pytest.raises(ConfigError, match="Both engine= and vllm="):
        GRPO("some/model", rewards=len, engine=WrappingEngine(), vllm=True)


@pytest.mark.parametrize("module_class", [GRPO, PPO])
def test_engine_object_without_sync_weights_is_refused(module_class):
    class Incomplete:
        def generate(self, prompts, **options):
            raise NotImplementedError

    with pytest.raises(ConfigError, match="engine= got an object of type Incomplete, which has no sync_weights"):
        module_class("some/model", rewards=len, engine=Incomplete())


def test_built_in_engines_fulfill_the_protocol():
    from lightning_ft.rollout.vllm import VLLMEngine

    assert issubclass(LocalEngine, RolloutEngine)
    assert issubclass(VLLMEngine, RolloutEngine)


def rollouts(*changed, count=12):
    """Rollouts of 4 prompts with 3 completions each, the first ones as passed."""
    usual = Completion((5, 6, 2), truncated=False, logprobs=(-1.0, -1.0, -1.0))
    return Rollouts((*changed, *[usual] * (count - len(changed))), 0, 0)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([], "returned a list: `generate` returns a lightning_ft.rollout.protocol.Rollouts"),
        (rollouts(count=4), "returned 4 completions instead of 12"),
        (rollouts(Completion((), False)), "returned 0 tokens in completion 0: expected 1 to max_new_tokens=9"),
        (rollouts(Completion((5,) * 10, True)), "returned 10 tokens in completion 0"),
        (rollouts(Completion((5, 400), True)), "returned token 400 in completion 0, but the model has 400 embeddings"),
        (rollouts(Completion((-1,), True)), "returned token -1 in completion 0"),
        (rollouts(Completion((5.0,), True)), "returned 5.0, a float, as a token in completion 0"),
        (rollouts(Completion((5, 6), True, (-1.0,))), "returned 1 log-probabilities for 2 tokens in completion 0"),
        (
            rollouts(Completion((5,), True, (math.nan,))),
            "a log-probability that is not finite in completion 0",
        ),
    ],
)
def test_output_of_an_engine_object_is_checked(returned, message, trainer_options):
    module = make(Policy, engine=FixedEngine(returned))
    with pytest.raises(RolloutError) as error:
        fit(module, trainer_options)
    assert "The engine FixedEngine" in str(error.value)
    assert message in str(error.value)
    assert not isinstance(error.value, NonFiniteError)


def test_nonfinite_logprobs_of_an_engine_object_are_skipped(trainer_options):
    module = make(Policy, engine=FixedEngine(rollouts(Completion((5,), True, (math.nan,)))), on_nonfinite="skip")
    with pytest.warns(UserWarning, match="sampled from logits that"):
        trainer = fit(module, trainer_options, BATCHES[:1])
    assert trainer.callback_metrics["train/skipped_steps"] == 1


def test_engine_object_may_leave_out_logprobs(trainer_options):
    completions = [Completion((5 + n, 6, 2), truncated=False) for n in range(12)]
    module = make(Policy, engine=FixedEngine(Rollouts(tuple(completions), 0, 0)))
    trainer = fit(module, trainer_options)
    assert trainer.global_step == 2
