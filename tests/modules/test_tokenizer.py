"""Rows, answers, measurements, checkpoints and exports use the same tokenizer and chat template."""

import pytest
import torch
from full_disk import full_disk
from tiny import CHATML, make_model, make_rows, make_tokenizer
from transformers import AutoTokenizer

from lightning_ft import (
    DPO,
    GRPO,
    FullFineTuning,
    LoRAFineTuning,
    PairDataModule,
    PreferenceDataModule,
    PromptBaseline,
    PromptDataModule,
    RewardModeling,
    SampleCompletions,
    TokenSavings,
)
from lightning_ft._lightning import Callback, Trainer
from lightning_ft.data.encode import encode_prompt
from lightning_ft.data.templates import PLAIN_TEMPLATE
from lightning_ft.errors import ConfigError, FileWriteError
from lightning_ft.models.tokenizer_state import tokenizer_state

ROWS = make_rows(8)
PREFERENCES = [{"prompt": r["input"], "chosen": r["output"], "rejected": r["output"] + " no"} for r in ROWS]
PROMPTS = [{"prompt": r["input"]} for r in ROWS]
ASKED = [{"role": "user", "content": "where is the parcel"}]


def question(tokenizer):
    return tokenizer.decode(encode_prompt(tokenizer, ASKED))


PLAIN_QUESTION = "User:\nwhere is the parcel\nAssistant:\n"


def longer(completions, **columns):
    return [float(len(completion)) for completion in completions]


MODULES = {
    "pairs": (lambda folder: LoRAFineTuning(folder, lora={"r": 2}), PairDataModule, ROWS),
    "preferences": (lambda folder: DPO(folder, lora={"r": 2}), PreferenceDataModule, PREFERENCES),
    "scores": (lambda folder: RewardModeling(folder, lora={"r": 2}), PreferenceDataModule, PREFERENCES),
    "prompts": (
        lambda folder: GRPO(folder, lora={"r": 2}, rewards=longer, num_completions=2, max_new_tokens=3),
        PromptDataModule,
        PROMPTS,
    ),
}


def data_of(kind, rows, **options):
    return kind(rows, batch_size=4, cache_dir=False, **options)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("given", ["template", "template and name", "template and object"])
def test_module_uses_and_checkpoints_the_rows_tokenizer(name, given, model_folder, trainer_options, tmp_path):
    make, kind, rows = MODULES[name]
    tokenizer = {"template": None, "template and name": model_folder}.get(given, make_tokenizer())
    data = data_of(kind, rows, tokenizer=tokenizer, chat_template="plain")
    module = make(model_folder)
    trainer = Trainer(**trainer_options, max_steps=1)
    trainer.fit(module, data)
    assert module.tokenizer is data.tokenizer
    assert question(module.tokenizer) == PLAIN_QUESTION

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)["lightning_ft"]["tokenizer"]
    assert bool(held["files"]) == (given != "template")  # otherwise the name suffices
    rewards = {"rewards": longer} if name == "prompts" else {}
    again = type(module).load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, **rewards)
    later = make(model_folder)
    later.load_checkpoint(tmp_path / "a.ckpt")
    for loaded in (module, again, later):
        folder = loaded.export(tmp_path / f"out{id(loaded)}")
        assert question(loaded.tokenizer) == question(AutoTokenizer.from_pretrained(folder)) == PLAIN_QUESTION


def test_checkpoint_contains_added_tokens(fit, tmp_path, trainer_options):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    module = FullFineTuning(str(tmp_path / "base"), tokenizer=tokenizer)
    trainer = fit(module, [{"input": "a", "output": "<call>"}] * 4, max_steps=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = FullFineTuning.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.tokenizer.convert_tokens_to_ids("<call>") == len(tokenizer) - 1
    assert again.tokenizer.name_or_path == ""
    exported = AutoTokenizer.from_pretrained(again.export(tmp_path / "out"))
    assert exported("a<call>")["input_ids"] == tokenizer("a<call>")["input_ids"]


def test_conflicting_tokenizers_are_refused(model_folder, trainer_options):
    module = LoRAFineTuning(model_folder, tokenizer=make_tokenizer(eos="<|pad|>"))
    with pytest.raises(ConfigError, match=r"of the module and of the DataModule differ in their vocabulary:"):
        Trainer(**trainer_options, max_steps=1).fit(module, data_of(PairDataModule, ROWS, tokenizer=make_tokenizer()))
    module = LoRAFineTuning(model_folder, tokenizer=make_tokenizer())
    other = make_tokenizer(CHATML.replace("assistant", "bot"))
    with pytest.raises(ConfigError, match="differ in their chat template:"):
        Trainer(**trainer_options, max_steps=1).fit(module, data_of(PairDataModule, ROWS, tokenizer=other))


def test_equal_tokenizers_are_no_conflict(model_folder, trainer_options):
    for template in (None, "plain"):
        module = LoRAFineTuning(model_folder, tokenizer=make_tokenizer())
        data = data_of(PairDataModule, ROWS, tokenizer=make_tokenizer(), chat_template=template)
        Trainer(**trainer_options, max_steps=1).fit(module, data)
        assert module.tokenizer is data.tokenizer


def test_datamodule_passes_its_tokenizer_to_a_second_module(model_folder, trainer_options):
    data = data_of(PairDataModule, ROWS, chat_template="plain")
    for module in (LoRAFineTuning(model_folder), LoRAFineTuning(model_folder)):
        Trainer(**trainer_options, max_steps=1).fit(module, data)
        assert question(module.tokenizer) == PLAIN_QUESTION


def test_checkpoint_without_the_rows_template_is_reported(fit, model_folder, trainer_options, tmp_path):
    trainer = fit(LoRAFineTuning(model_folder), ROWS, max_steps=1, data={"chat_template": "plain"})
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    data = data_of(PairDataModule, ROWS, validation=ROWS)
    with pytest.warns(UserWarning, match="another chat template of the tokenizer than the rows"):
        Trainer(**trainer_options).validate(LoRAFineTuning(model_folder), data, ckpt_path=tmp_path / "a.ckpt")
    module = LoRAFineTuning(model_folder)
    inputs = torch.utils.data.DataLoader([[ASKED]], collate_fn=lambda batch: batch[0])
    Trainer(**trainer_options).predict(module, inputs, ckpt_path=tmp_path / "a.ckpt")
    assert question(module.tokenizer) == PLAIN_QUESTION


def test_checkpoint_tokenizer_overrides_the_passed_one(fit, model_folder, tmp_path):
    model = make_model()
    trainer = fit(LoRAFineTuning(model, tokenizer=make_tokenizer()), ROWS, max_steps=1, data={"chat_template": "plain"})
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="`tokenizer` isn't the one that the checkpoint was trained with"):
        again = LoRAFineTuning.load_from_checkpoint(
            tmp_path / "a.ckpt", weights_only=True, model=make_model(), tokenizer=make_tokenizer()
        )
    assert question(again.tokenizer) == PLAIN_QUESTION


def test_measurements_and_rollouts_use_the_rows_template(model_folder, trainer_options, tmp_path):
    seen = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen["asked"] = pl_module.tokenizer.decode(savings._measurement.plan.bare.prompts[0])

    rows = [{"input": "where is the parcel", "output": "lamp"}] * 8
    savings = TokenSavings(
        PromptBaseline(system="hi"),
        scorer=lambda *texts: 1.0,
        max_new_tokens=2,
        timed_requests=0,
        resamples=50,
        output_dir=False,
    )
    data = data_of(PairDataModule, rows, test=rows[:2], tokenizer=make_tokenizer(), chat_template="plain")
    Trainer(**trainer_options, max_steps=1, callbacks=[savings, Look()]).fit(FullFineTuning(model_folder), data)
    assert seen["asked"] == PLAIN_QUESTION

    module = GRPO(make_model(), tokenizer=make_tokenizer(), rewards=longer, num_completions=2, max_new_tokens=3)
    data = data_of(PromptDataModule, [{"prompt": "where is the parcel"}] * 4, chat_template="plain")
    samples = SampleCompletions(path=str(tmp_path / "samples.jsonl"))
    before = module.engine
    Trainer(**trainer_options, max_steps=1, callbacks=[samples]).fit(module, data)
    assert module.tokenizer.chat_template == PLAIN_TEMPLATE
    assert module.engine.end_token_ids == before.end_token_ids


def test_engine_uses_end_tokens_of_the_rows_template(trainer_options):
    plain = make_tokenizer(eos="<|pad|>")  # and CHATML ends turns with another token
    module = GRPO(make_model(), tokenizer=plain, rewards=longer, num_completions=2, max_new_tokens=3)
    ends = {plain.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|pad|>")}
    assert set(module.engine.end_token_ids) == ends
    ending = CHATML.replace("message.content + '<|im_end|>'", "message.content + '<|bos|>'")
    data = data_of(PromptDataModule, PROMPTS, chat_template=ending)
    Trainer(**trainer_options, max_steps=1).fit(module, data)
    assert module.tokenizer.convert_tokens_to_ids("<|bos|>") in module.engine.end_token_ids


def test_full_temporary_folder_is_named_when_a_checkpoint_is_written(tokenizer):
    with (
        full_disk(500),
        pytest.raises(FileWriteError, match=r"temporary folder in .* \(File too large\).*set .*TMPDIR"),
    ):
        tokenizer_state(tokenizer, whole=True)
