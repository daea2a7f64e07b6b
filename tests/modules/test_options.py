"""Arguments of the modules: complete signatures and docstrings, one type for each, and misspelled names."""

import copy
import inspect
import typing

import pytest

from lightning_ft import DPO, GRPO, KTO, PPO, FullFineTuning, LoRAFineTuning, PromptDistillation, RewardModeling
from lightning_ft.errors import ConfigError, UnknownArgumentError
from lightning_ft.modules import options

MODULES = (FullFineTuning, LoRAFineTuning, PromptDistillation, RewardModeling, DPO, KTO, GRPO, PPO)
TYPED = {
    FullFineTuning: options.SupervisedOptions,
    LoRAFineTuning: options.SupervisedOptions,
    PromptDistillation: options.DistillationOptions,
    RewardModeling: options.AdaptedOptions,
    DPO: options.AdaptedOptions,
    KTO: options.AdaptedOptions,
    GRPO: options.PolicyOptions,
    PPO: options.CriticOptions,
}


@pytest.mark.parametrize("kind", MODULES)
def test_signature_and_docstring_name_every_argument(kind):
    parameters = inspect.signature(kind).parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert {"model", "tokenizer", "learning_rate", "on_nonfinite", "seed"} <= set(parameters)
    documented = [name for name in parameters if f"\n    {name}: " in kind.__doc__]
    assert documented == list(parameters)
    assert kind.__doc__.count("\nArgs:\n") == 1
    assert kind.__doc__.index("\nRaises:\n") < kind.__doc__.index("\nExample:\n")


@pytest.mark.parametrize("kind", MODULES)
def test_typed_options_match_the_forwarded_arguments(kind):
    own = set(inspect.signature(kind.__init__).parameters) - {"self", "options"}
    passed_on = set(inspect.signature(kind).parameters) - own
    assert set(typing.get_type_hints(TYPED[kind])) == passed_on


@pytest.mark.parametrize("kind", MODULES)
def test_option_types_match_the_constructors(kind):
    hints = typing.get_type_hints(TYPED[kind], include_extras=False)
    for base in kind.__mro__:
        if "__init__" in vars(base) and base.__module__.startswith("lightning_ft.modules"):
            for name, hint in typing.get_type_hints(base.__init__).items():
                if name in hints and base is not kind:
                    assert hints[name] == hint, f"{base.__name__}.{name}"


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (GRPO, {"rewards": len, "num_completion": 4}, "no argument 'num_completion'. Did you mean 'num_completions'?"),
        (PPO, {"rewards": len, "clip_hi": 0.2}, "Did you mean 'clip_high'?"),
        (DPO, {"lern_rate": 1.0}, "Did you mean 'learning_rate'?"),
        (KTO, {"precompute_reference": True}, "KTO has no argument 'precompute_reference'"),
        (FullFineTuning, {"quantization": "4bit"}, "FullFineTuning has no argument 'quantization'"),
        (GRPO, {"rewards": len, "num_generations": 4}, "'num_generations'. Did you mean 'num_completions'?"),
        (GRPO, {"reward_funcs": len}, "GRPO has no argument 'reward_funcs'. Did you mean 'rewards'?"),
        (GRPO, {"reward_funcs": len, "rewards": len}, "'reward_funcs'. Did you mean 'rewards'?"),
        (LoRAFineTuning, {"rank": 8}, "'rank'. It belongs into lora=, such as lora={'r': ...}."),
        (LoRAFineTuning, {"per_device_train_batch_size": 8}, "batch_size= is an argument of the DataModule."),
        (FullFineTuning, {"num_train_epochs": 3}, "max_epochs= is an argument of the Trainer."),
    ],
)
def test_misspelled_argument_gets_the_nearest_name(kind, arguments, message):
    with pytest.raises(UnknownArgumentError) as error:
        kind("some/model", **arguments)
    assert message in str(error.value)
    assert isinstance(error.value, TypeError)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (DPO, {"beta": "0.1"}, "DPO: beta='0.1': expected a number. Leave out the quotes."),
        (DPO, {"beta": "1e-1"}, "Leave out the quotes; in YAML write 1.0e-4, since 1e-4 is a text there."),
        (LoRAFineTuning, {"learning_rate": "high"}, "LoRAFineTuning: learning_rate='high': expected a number or None."),
        (GRPO, {"rewards": len, "temperature": None}, "GRPO: temperature=None: expected a number."),
        (GRPO, {"rewards": len, "max_new_tokens": 12.5}, "GRPO: max_new_tokens=12.5: expected an integer."),
        (LoRAFineTuning, {"lora": 8}, "lora=8: expected True, or a dict of arguments of peft.LoraConfig"),
        (LoRAFineTuning, {"lora": "r=8"}, "lora='r=8': expected True, or a dict"),
        (PPO, {}, "PPO needs rewards=: it has no default."),
        (PromptDistillation, {}, "PromptDistillation needs prompt=: it has no default."),
    ],
)
def test_wrong_or_missing_value_names_argument_and_class(cls, arguments, message):
    with pytest.raises(ConfigError) as error:
        cls("some/model", **arguments)
    assert message in str(error.value)


def test_file_as_model_is_told_from_a_folder(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    with pytest.raises(ConfigError, match=r"rows\.jsonl'` is a file: expected a hub name, the folder of a model"):
        LoRAFineTuning(str(rows))
    for name in (str(tmp_path / "model.gguf"), "owner/repo/model.gguf"):
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        with pytest.raises(ConfigError, match=r"model\.gguf'` is a file: .*Dequantize it once into a folder"):
            LoRAFineTuning(name)


def test_modules_are_copied_without_their_arguments():
    module = copy.deepcopy(DPO("some/model", beta=0.2))
    assert module.hparams["beta"] == 0.2


def test_subclass_may_take_its_own_arguments():
    class Mine(DPO):
        def __init__(self, *args, extra=1, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = extra
            self.save_hyperparameters()

    assert Mine("some/model", extra=3, beta=0.2).hparams["extra"] == 3
    with pytest.raises(TypeError, match="betta"):
        Mine("some/model", betta=0.2)


def test_lora_false_is_rejected():
    with pytest.raises(ConfigError, match="use FullFineTuning"):
        LoRAFineTuning("some/model", lora=False)


def test_earlier_name_of_activation_cache_still_works(tmp_path):
    with pytest.warns(UserWarning, match="`trunk_cache` is now called `activation_cache`"):
        module = LoRAFineTuning("some/model", trunk_cache=str(tmp_path))
    assert module.hparams["activation_cache"] == str(tmp_path)
