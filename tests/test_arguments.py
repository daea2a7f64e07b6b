"""Misspelled arguments of the public callbacks and measurements, and their help on the command line."""

import copy
import inspect
import pickle
import re

import pytest
from jsonargparse import ArgumentParser

from lightning_ft import (
    DPO,
    GRPO,
    ComputeMeter,
    ExportModel,
    FullFineTuning,
    LoRAFineTuning,
    PairDataModule,
    PromptBaseline,
    Retention,
    SampleCompletions,
    TokenSavings,
)
from lightning_ft.arguments import check_requests, did_you_mean_path
from lightning_ft.errors import ConfigError, SavingsError, UnknownArgumentError
from lightning_ft.evaluation.savings.measurement import SavingsMeasurement, measure_token_savings
from lightning_ft.types import Request

CALLBACKS = [ComputeMeter, ExportModel, Retention, SampleCompletions, TokenSavings]
MISSPELLED = [
    (ComputeMeter, (), "every_n_step", "every_n_steps"),
    (ExportModel, (), "overwrit", "overwrite"),
    (Retention, (["a b"],), "max_ppl_ration", "max_ppl_ratio"),
    (SampleCompletions, (), "num_sample", "num_samples"),
    (TokenSavings, (PromptBaseline("Be brief."),), "min_qualty", "min_quality"),
]


@pytest.mark.parametrize(("callback", "args", "name", "nearest"), MISSPELLED)
def test_callbacks_name_the_nearest_argument(callback, args, name, nearest):
    message = f"{callback.__name__} has no argument '{name}'. Did you mean '{nearest}'"
    with pytest.raises(UnknownArgumentError, match=message):
        callback(*args, **{name: 1})


@pytest.mark.parametrize(
    ("cls", "args", "options", "message"),
    [
        (PairDataModule, ("rows.jsonl",), {"batch_size": "8"}, r"batch_size='8': expected an integer\. Leave out the"),
        (ComputeMeter, (), {"peak_flops": "h100"}, r"ComputeMeter: peak_flops='h100': expected a number or None\."),
        (SavingsMeasurement, ("tokenizer",), {}, r"SavingsMeasurement needs requests=: it has no default\."),
    ],
)
def test_values_of_another_type_and_missing_ones_are_named(cls, args, options, message):
    with pytest.raises(ConfigError, match=message):
        cls(*args, **options)


def test_measure_token_savings_names_the_nearest_argument():
    with pytest.raises(UnknownArgumentError, match=r"has no argument 'marginn'\. Did you mean 'margin'"):
        measure_token_savings(None, None, [], PromptBaseline("Be brief."), marginn=0.02)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_help_lists_every_argument_of_callbacks(callback):
    parser = ArgumentParser()
    parser.add_class_arguments(callback, "callback")
    text, names = parser.format_help(), list(inspect.signature(callback.__init__).parameters)[1:]
    assert list(inspect.signature(callback).parameters) == names
    assert [name for name in names if f"--callback.{name}" not in text] == []


def test_subclass_of_a_callback_may_take_other_arguments():
    class Verbose(ComputeMeter):
        def __init__(self, level, **options):
            super().__init__(**options)
            self.level = level

    meter = Verbose(level=2, every_n_steps=5)
    for same in (copy.deepcopy(meter), Verbose(2, every_n_steps=5)):
        assert (same.level, same._options) == (meter.level, meter._options)
    assert pickle.loads(pickle.dumps(ComputeMeter(every_n_steps=5)))._options == meter._options


@pytest.mark.parametrize(
    ("module", "name", "hint"),
    [
        (GRPO, "beta", " Did you mean 'kl_coef'?"),
        (GRPO, "epsilon", " Did you mean 'clip_low'?"),
        (GRPO, "importance_sampling_level", " Did you mean 'importance'?"),
        (GRPO, "ref_model", " The reference is the model before training."),
        (DPO, "ref_model", " The reference is the model before training."),
        (DPO, "max_grad_norm", " gradient_clip_val= is an argument of the Trainer."),
        (DPO, "bf16", " precision= is an argument of the Trainer."),
        (PairDataModule, "formatting_func", " Did you mean 'format'?"),
        (PairDataModule, "test_size", " Did you mean 'validation'?"),  # 'batch_size' is nearer in spelling
        (PairDataModule, "truncation", " Did you mean 'on_overlong'?"),
        (FullFineTuning, "torch_dtype", " Did you mean 'dtype'?"),  # and not 'torch_compile'
        (FullFineTuning, "model_name_or_path", " Did you mean 'model'?"),
        (FullFineTuning, "completion_only_loss", " supervise= is an argument of the DataModule."),
        (FullFineTuning, "load_in_4bit", " Quantized weights can't be trained themselves: use LoRAFineTuning("),
        (FullFineTuning, "bias", " It belongs into lora= of LoRAFineTuning: lora={'bias': ...}."),
        (LoRAFineTuning, "load_in_4bit", " Did you mean 'quantization'?"),
        (LoRAFineTuning, "use_dora", " It belongs into lora=, such as lora={'use_dora': ...}."),
        (LoRAFineTuning, "devices", " devices= is an argument of the Trainer."),
    ],
)
def test_names_of_other_packages_are_answered_with_those_of_this_package(module, name, hint):
    options = {"rewards": "trl.rewards.think_format_reward"} if module is GRPO else {}
    with pytest.raises(UnknownArgumentError, match=re.escape(f"has no argument {name!r}.{hint}")):
        module("model", **options, **{name: 1})


@pytest.mark.parametrize("path", ["suport/data/train.jsonl", "support/date/train.jsonl", "support/data/trainn.jsonl"])
def test_did_you_mean_path_corrects_any_part(tmp_path, monkeypatch, path):
    (tmp_path / "support" / "data").mkdir(parents=True)
    (tmp_path / "support" / "data" / "train.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert did_you_mean_path(path) == " Did you mean 'support/data/train.jsonl'?"
    assert did_you_mean_path(tmp_path / path) == f" Did you mean {str(tmp_path / 'support/data/train.jsonl')!r}?"
    assert did_you_mean_path("support/data/train.jsonl") == ""


def test_did_you_mean_path_suggests_nothing_without_a_similar_name(tmp_path):
    (tmp_path / "file").touch()
    for path in ("Qwen/Qwen3-0.6B", "a\0b", str(tmp_path / "fil" / "b")):
        assert did_you_mean_path(path) == ""


@pytest.mark.parametrize("messages", ["My parcel", {"role": "user", "content": "My parcel"}, (("user", "My parcel"),)])
def test_request_without_messages_is_named(messages):
    with pytest.raises(SavingsError, match=r"requests\[0\]\.messages is .*My parcel.*: expected messages such as"):
        check_requests([Request(id="1", messages=messages, reference="late")], SavingsError)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": 0}, r"requests\[0\]\.id is 0: expected a text, not a value of type int"),
        ({"reference": None}, r"requests\[0\]\.reference is None: expected a text, not a value of type NoneType"),
        ({"reference": 5}, r"requests\[0\]\.reference is 5: expected a text, not a value of type int"),
    ],
)
def test_request_with_another_type_as_id_or_reference_is_named(fields, message):
    request = Request(**{"id": "1", "messages": ({"role": "user", "content": "a"},), "reference": "b", **fields})
    with pytest.raises(SavingsError, match=message):
        check_requests([request], SavingsError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"system": "prompt.json"}, r"system='prompt\.json' is a file, and would be sent as these characters"),
        ({"few_shot": {"input": "a", "output": "b"}}, r"few_shot is a dict: expected a list of examples"),
        ({"few_shot": "rows.jsonl"}, r"few_shot is a str: expected a list of examples"),
    ],
)
def test_prompt_baseline_refuses_files_and_single_examples(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "prompt.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SavingsError, match=message):
        PromptBaseline(**arguments)
