"""Everything that users may pass as rewards, how it is resolved, and the errors when it can't be."""

import functools
import sys

import pytest
import yaml
from jsonargparse import ArgumentParser
from trl.rewards import think_format_reward

from lightning_ft.errors import ConfigError, RewardError
from lightning_ft.rewards.functions import RewardFunctions
from lightning_ft.rewards.resolve import find_function

FILE = '''
"""A file that imports another one in its folder."""
from __future__ import annotations

from dataclasses import dataclass

from reward_words_of_a_test import WORD

runs = []
runs.append(1)


@dataclass
class Judge:  # dataclasses look up their module in sys.modules
    word: str = WORD
    worth: float = 1.0

    def __call__(self, completions, **kwargs):
        return [self.worth * (self.word in c) for c in completions]


class Needy:
    def __init__(self, word):
        self.word = word


def polite(completions, **kwargs):
    return [float(WORD in c) for c in completions]


number = 3
'''


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "reward_words_of_a_test.py").write_text("WORD = 'please'")
    (tmp_path / "mine" / "rewards.py").write_text(FILE)
    yield "mine/rewards.py"
    for name in [name for name in sys.modules if name.startswith(("rewards_", "reward_words_of_a_test"))]:
        del sys.modules[name]


def totals(rewards, **options):
    functions = RewardFunctions(rewards, **options)
    return functions.compute(["a", "a"], ["please", "no"], [[1], [2]], {"answer": ["please", "x"]}).total.tolist()


def correct(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


# -------------------------------------------------------------------- strings


def test_file_path_resolves_to_its_function(file):
    assert totals(f"{file}:polite") == [1.0, 0.0]
    assert RewardFunctions([f"{file}:polite", f"{file}:Judge"]).names == ("polite", "Judge")


def test_file_is_imported_once(file):
    import_path = next(iter(RewardFunctions([f"{file}:polite", f"./{file}:Judge"])._rewards)).reward.function.__module__
    assert sys.modules[import_path].runs == [1]


def test_file_does_not_shadow_installed_packages(file, tmp_path):
    (tmp_path / "mine" / "yaml.py").write_text("raise AssertionError")
    totals(f"{file}:polite")
    assert sys.path[-1] == str(tmp_path / "mine")


def test_unbound_method_in_a_file_is_refused(file):
    with pytest.raises(RewardError, match="'__call__' needs 'self'"):
        totals(f"{file}:Judge.__call__")  # found, but not bound to an instance


@pytest.mark.parametrize("path", ["trl.rewards.think_format_reward", "trl.rewards:think_format_reward"])
def test_import_path_resolves_to_its_function(path):
    functions = RewardFunctions(path)
    assert functions.names == ("think_format_reward",)
    assert functions._rewards[0].reward.function is think_format_reward


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("mine/others.py:f", r"there is no file 'mine/others.py' \(looked for '/"),
        ("mine/rewards.py:politely", "mine/rewards.py has no 'politely'"),
        ("mine/rewards.py:number", "can't be of type int"),
        ("mine/rewards.py:Needy", "Needy is a class that can't be instantiated without arguments.*init_args"),
        ("mine/broken.py:f", "importing it failed with ZeroDivisionError"),
        ("mine/gone.ckpt", r"checkpoint '/.*gone.ckpt' doesn't exist"),
        ("mine", "folder 'mine' contains no model: it has neither config.json nor adapter_config.json"),
        ("trl.rewards.no_such_reward", r"Tried: a folder .*; an import path \(.*no_such_reward.*\); a hub name"),
        ("no_such_package_of_mine.f", r"an import path \(No module named 'no_such_package_of_mine'\)"),
        ("broken_module_of_a_test.f", "importing it failed with ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("correct", r"an import path \(expected the form package.module.function\).*path/to/file.py:function"),
        (
            "no/such/folder",
            r"a folder \('/.*no/such/folder' doesn't exist\).*a hub name \(expected the form owner/name",
        ),
        ("", "could not be found"),
        ("operator.__doc__", "could not be found|can't be"),
    ],
)
def test_strings_that_name_no_reward_are_refused(file, tmp_path, reward, message):
    (tmp_path / "mine" / "broken.py").write_text("1 / 0")
    (tmp_path / "mine" / "broken_module_of_a_test.py").write_text("import nowhere_at_all")
    sys.path.append(str(tmp_path / "mine"))
    with pytest.raises(RewardError, match=message):
        RewardFunctions(reward)


def test_file_that_failed_can_be_fixed_and_imported(file, tmp_path):
    broken = tmp_path / "mine" / "rewards_soon.py"
    broken.write_text("1 / 0")
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        RewardFunctions(f"{broken}:f")
    broken.write_text("def f(completions):\n    return [1.0, 2.0]\n")
    assert totals(f"{broken}:f") == [1.0, 2.0]


def test_strings_resolve_in_order(file, tmp_path):
    """A folder precedes an import path, and an import path precedes the hub."""
    (tmp_path / "trl.rewards.think_format_reward").mkdir()
    with pytest.raises(RewardError, match="contains no model"):
        RewardFunctions("trl.rewards.think_format_reward")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "model").mkdir()
    with pytest.raises(RewardError, match="contains no model"):
        RewardFunctions("some/model")
    RewardFunctions("some/other-model")  # a hub name: nothing is loaded yet


# -------------------------------------------------------------------- dicts


def test_dict_resolves_with_weight_and_name(file):
    rewards = [
        {"function": correct, "weight": 2},
        {"function": f"{file}:Judge", "init_args": {"worth": 5}, "weight": 0.5, "name": "polite"},
        {"class_path": f"{file}:Judge", "init_args": {"word": "no"}},
        {
            "function": "trl.rewards.get_soft_overlong_punishment",
            "init_args": {"max_completion_len": 9, "soft_punish_cache": 0},
            "weight": 0.0,
        },
    ]
    functions = RewardFunctions(rewards)
    assert functions.names == ("correct", "polite", "Judge", "soft_overlong_punishment_reward")
    assert functions.weights.tolist() == [2.0, 0.5, 1.0, 0.0]
    assert totals(rewards) == [2 + 2.5, 1.0]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"weight": 1.0}, "needs either 'function' or 'model'; this one has .'weight'."),
        ({"function": correct, "model": "out"}, "needs either 'function' or 'model'"),
        ({"function": correct, "wieght": 1.0}, "has no option 'wieght'. Did you mean 'weight'"),
        ({"function": correct, "tokenizer": "x"}, "with 'function' has no option 'tokenizer'"),
        ({"model": "a/b", "init_args": {}}, "with 'model' has no option 'init_args'"),
        ({"model": correct}, "'model' of a reward can't be of type function"),
        ({"function": "owner/name"}, "expected package.module.function or path/to/file.py:function"),
        ({"function": "trl.rewards.nothing"}, "can't be imported"),
        (
            {"function": "trl.rewards.get_soft_overlong_punishment", "init_args": {"n": 1}},
            "can't be called with init_args={'n': 1}",
        ),
        (3, "can't be of type int"),
        (None, "can't be of type NoneType"),
        ([[correct]], "can't be of type list"),
    ],
)
def test_other_objects_are_refused(reward, message):
    with pytest.raises(RewardError, match=message):
        RewardFunctions(reward)


def test_rewards_of_a_config_file_resolve(file):
    """Through jsonargparse, as on the command line."""

    class Module:
        def __init__(self, rewards: str | dict | list, weights: list[float] | None = None) -> None:
            self.functions = RewardFunctions(rewards, weights)

    config = f"""
    module:
      rewards:
        - {file}:polite
        - trl.rewards.think_format_reward
        - class_path: {file}:Judge
          init_args: {{worth: 3.0}}
          weight: 0.5
        - {{function: trl.rewards.think_format_reward, name: thinks}}
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Module, "module")
    parsed = parser.parse_object(yaml.safe_load(config))
    functions = parser.instantiate_classes(parsed).module.functions
    assert functions.names == ("polite", "think_format_reward", "Judge", "thinks")
    assert functions.weights.tolist() == [1.0, 1.0, 0.5, 1.0]


# -------------------------------------------------------------------- names and weights


def test_default_names_are_unique():
    def f_2(completions):
        raise AssertionError

    f = functools.partial(functools.partial(correct, answer=[]), completions=[])
    rewards = [correct, f, lambda completions: [], lambda completions: [], f_2, f_2, {"function": f, "name": "f_2"}]
    assert RewardFunctions(rewards).names == ("correct", "correct_2", "reward", "reward_2", "f_2_2", "f_2_3", "f_2")


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ([], None, "expected at least one"),
        ([correct, correct], [1.0], "2 rewards with 1 weights"),
        ([{"function": correct, "weight": 1.0}, correct], [1.0, 1.0], "leave out one of them"),
        (correct, [float("nan")], "weight nan"),
        (correct, ["1"], "weight '1'"),
        ({"function": correct, "weight": True}, None, "weight True"),
        ([{"function": correct, "name": "f"}] * 2, None, "Two rewards are named 'f'"),
    ],
)
def test_mismatched_weights_and_names_are_refused(rewards, weights, message):
    with pytest.raises(ConfigError, match=message):
        RewardFunctions(rewards, weights)


@pytest.mark.parametrize(
    ("reward", "function"),
    [
        ("package.module.name", True),
        ("file.py:name", True),
        ("file.py:name.ckpt", True),  # imported, whatever its end
        ({"function": "package.name"}, True),
        ({"class_path": "package.Name"}, True),
        (["owner/model", "package.name"], True),
        ("model.ckpt", False),
        ("folder.of.a.model", False),
        ("owner/model", False),
        ({"model": "package.name"}, False),
        (None, False),
    ],
)
def test_find_function_knows_what_would_be_imported(reward, function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.of.a.model").mkdir()
    assert (find_function(reward) is not None) == function
