"""Engines of a user's own, passed as `engine=`: equal to the built-in engine, saved nowhere, and checked."""

import math
from pathlib import Path

import pytest
import torch
from policies import BATCHES, Actor, Policy, make
from predrawn_rollouts import END

from lightning_ft import GRPO, PPO
from lightning_ft._lightning import Trainer
from lightning_ft.errors import ConfigError, NonFiniteError, RolloutError
from lightning_ft.parser import FineTuningParser
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
    module = make(module_class, engine=engine, sampling_correction=None)  # its log-probabilities differ by rounding
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


def engine_of_the_documentation():
    """Source code of the engine in docs/rlhf.md."""
    page = (Path(__file__).parents[2] / "docs" / "rlhf.md").read_text(encoding="utf-8")
    example = next(block for block in page.split("```python\n") if "class TransformersEngine" in block)
    return example.split("\n\n\nengine = ")[0]


def test_engine_of_the_documentation_trains(trainer_options):
    names = {}
    exec(engine_of_the_documentation(), names)
    module = make(Policy, engine=names["TransformersEngine"]([END]))
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

"""

REWARD = """

def reward(completions, **columns):
    return [0.0 for _ in completions]
"""


def configured_engine(code, engine, tmp_path, monkeypatch, name):
    """The engine of a module that is built from a configuration, with the engine's code in a module of this name."""
    (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    parser = FineTuningParser()
    parser.add_subclass_arguments(GRPO, "model")
    arguments = {"model": "some/model", "rewards": f"{name}.reward", "engine": engine}
    model = {"class_path": "lightning_ft.GRPO", "init_args": arguments}
    return parser.instantiate(parser.parse_object({"model": model})).model._engine_argument[0]


def test_engine_object_comes_from_a_configuration_file(tmp_path, monkeypatch):
    engine = {"class_path": "own_engines.Engine", "init_args": {"size": 3}}
    assert configured_engine(ANNOTATED_ENGINE + REWARD, engine, tmp_path, monkeypatch, "own_engines").size == 3


def test_engine_of_the_documentation_comes_from_a_configuration_file(tmp_path, monkeypatch):
    code = engine_of_the_documentation() + REWARD
    engine = {"class_path": "documented_engines.TransformersEngine", "init_args": {"end_token_ids": [7, 8]}}
    engine = configured_engine(code, engine, tmp_path, monkeypatch, "documented_engines")
    assert engine.end_token_ids == [7, 8]


UNANNOTATED_ENGINE = """
class Engine:
    def generate(self, prompts, *, max_new_tokens, sampling=None, num_completions=1, on_answered=None):
        raise NotImplementedError

    def sync_weights(self, model):
        pass
"""


def test_engine_object_without_annotations_in_a_configuration_file_is_explained(tmp_path, monkeypatch, capsys):
    engine = {"class_path": "bare_engines.Engine"}
    with pytest.raises(SystemExit):
        configured_engine(UNANNOTATED_ENGINE + REWARD, engine, tmp_path, monkeypatch, "bare_engines")
    message = capsys.readouterr().err
    assert "bare_engines.Engine does not implement protocol RolloutEngine. Its methods are compared with" in message
    assert message.count("annotate their parameters and returned values as there") == 1


def test_engine_object_with_vllm_is_refused():
    with pytest.raises(ConfigError, match="engine= and vllm= each say"):
        GRPO("some/model", rewards=len, engine=WrappingEngine(), vllm=True)


@pytest.mark.parametrize("module_class", [GRPO, PPO])
def test_engine_object_without_sync_weights_is_refused(module_class):
    class Incomplete:
        def generate(self, prompts, **options):
            raise NotImplementedError

    with pytest.raises(ConfigError, match="engine= got an object of type Incomplete, which has no sync_weights"):
        module_class("some/model", rewards=len, engine=Incomplete())


@pytest.mark.parametrize("module_class", [GRPO, PPO])
def test_engine_class_instead_of_an_object_is_refused(module_class):
    message = r"engine= got the class WrappingEngine instead of an object: pass engine=WrappingEngine\(...\)."
    with pytest.raises(ConfigError, match=message):
        module_class("some/model", rewards=len, engine=WrappingEngine)


class GeneratesFromPromptsOnly(WrappingEngine):
    def generate(self, prompts):
        raise NotImplementedError


class GeneratesFromPromptsAndMore(WrappingEngine):
    def generate(self, prompts, device, **options):
        raise NotImplementedError


class SyncsNothing(WrappingEngine):
    def sync_weights(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("engine_class", "message"),
    [
        (
            GeneratesFromPromptsOnly,
            "whose generate(prompts) can't be called as generate(prompts, max_new_tokens=..., sampling=..., "
            "num_completions=...): got an unexpected keyword argument 'max_new_tokens'. Give it the parameters of "
            "lightning_ft.rollout.protocol.RolloutEngine.generate.",
        ),
        (GeneratesFromPromptsAndMore, "missing a required argument: 'device'"),
        (SyncsNothing, "whose sync_weights() can't be called as sync_weights(model): too many positional arguments"),
    ],
)
def test_engine_object_with_other_parameters_is_refused(engine_class, message):
    with pytest.raises(ConfigError) as error:
        GRPO("some/model", rewards=len, engine=engine_class())
    assert f"engine= got an object of type {engine_class.__name__}, whose " in str(error.value)
    assert message in str(error.value)


class ModeChangingEngine(WrappingEngine):
    """Leaves the model in eval mode, and one of its modules in train mode."""

    def generate(self, prompts, **options):
        rollouts = super().generate(prompts, **options)
        self.change_modes(self.local.model)
        return rollouts

    def sync_weights(self, model):
        super().sync_weights(model)
        self.change_modes(model)

    @staticmethod
    def change_modes(model):
        model.eval()
        next(iter(model.children())).training = True


def test_modes_of_the_model_are_restored_after_an_engine_object(trainer_options):
    module = make(Policy, engine=ModeChangingEngine())
    module.configure_model()
    modules = list(module.model.modules())
    for number, part in enumerate(modules):
        part.training = number % 3 > 0
    modes = [part.training for part in modules]
    module.roll_out(BATCHES[0])
    assert [part.training for part in modules] == modes


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
        (
            rollouts(Completion((5, 6, END, 7, 7, 7), False)),
            "returned tokens after the end token 2 in completion 0: cut each completion after its first end token",
        ),
        (rollouts(Completion((5, END, END), False)), "returned tokens after the end token 2 in completion 0"),
        (rollouts(Completion((5, 6), True, (-1.0,))), "returned 1 log-probabilities for 2 tokens in completion 0"),
        (
            rollouts(Completion((5,), True, (math.nan,))),
            "a log-probability that is not finite in completion 0",
        ),
        (
            rollouts(Completion((5, 6), True, (-0.5, 3.0))),
            "returned the log-probability 3 in completion 0, which is above 0: expected natural logarithms",
        ),
        (
            rollouts(Completion((5,), True, None)),
            "returned logprobs of type NoneType in completion 0: expected a tuple",
        ),
        (rollouts(Completion((5,), True, torch.zeros(1))), "returned logprobs of type Tensor in completion 0"),
        (rollouts(Completion((5,), True, "a")), "returned logprobs of type str in completion 0"),
        (rollouts(Completion((5,), True, ("a",))), "returned 'a', a str, as a log-probability in completion 0"),
        (
            rollouts(Completion(None, True)),
            "returned tokens of type NoneType in completion 0: expected a tuple of ints",
        ),
        (rollouts(Completion((5,), None)), "returned truncated=None in completion 0: expected True or False"),
        (
            rollouts(((5, 6), False)),
            "returned an object of type tuple as completion 0: expected a lightning_ft.rollout.protocol.Completion",
        ),
        (Rollouts(None, 0, 0), "returned Rollouts whose completions are of type NoneType: expected a tuple of"),
    ],
)
def test_output_of_an_engine_object_is_checked(returned, message, trainer_options):
    module = make(Policy, engine=FixedEngine(returned))
    with pytest.raises(RolloutError) as error:
        fit(module, trainer_options)
    assert "The engine FixedEngine" in str(error.value)
    assert message in str(error.value)
    assert not isinstance(error.value, NonFiniteError)


def test_rounding_of_logprobs_of_an_engine_object_is_allowed(trainer_options):
    module = make(Policy, engine=FixedEngine(rollouts(Completion((5, END), False, (-0.5, 1e-5)))))
    assert fit(module, trainer_options, BATCHES[:1]).global_step == 1


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
