"""Mistakes of the first hour: each message says what to do next."""

import logging
import subprocess
import sys

import pytest
from tiny import make_model, make_rows, make_tokenizer

from lightning_ft import DPO, FullFineTuning, LoRAFineTuning, PairDataModule, TokenSavings
from lightning_ft._lightning import Trainer
from lightning_ft.compare.plan import read_config
from lightning_ft.errors import CheckpointError, ConfigError, LightningFTError, SavingsError, TokenizerError
from lightning_ft.models.load import adapter_config, load_causal_lm, load_config
from lightning_ft.report.write import write_report


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder `runs` with a folder `support` and a file `prompt.json`."""
    (tmp_path / "runs" / "support").mkdir(parents=True)
    (tmp_path / "runs" / "prompt.json").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("call", "suggested"),
    [
        (lambda: FullFineTuning("runs/suport").tokenizer, "runs/support"),
        (lambda: load_causal_lm("runs/suport"), "runs/support"),
        (lambda: load_config("runs/suport"), "runs/support"),
        (lambda: adapter_config("runs/suport"), "runs/support"),
        (lambda: write_report("runs/suport"), "runs/support"),
        (lambda: read_config("runs/promp.json"), "runs/prompt.json"),
        (lambda: TokenSavings("runs/promp.json"), "runs/prompt.json"),
        (lambda: FullFineTuning(make_model()).load_checkpoint("run/prompt.json"), "runs/prompt.json"),
        (lambda: PairDataModule("rnus/prompt.json").load_rows(), "runs/prompt.json"),
    ],
)
def test_mistyped_path_is_corrected(folders, call, suggested):
    with pytest.raises(LightningFTError, match=f"Did you mean '{suggested}'"):
        call()


@pytest.mark.parametrize(
    "call", [lambda: FullFineTuning("bases/tiny_bse").tokenizer, lambda: load_causal_lm("bases/tiny_bse")]
)
def test_name_that_may_be_a_folder_or_of_the_hub_says_where_a_folder_was_looked_for(folders, tmp_path, call):
    with pytest.raises(LightningFTError) as raised:
        call()
    assert f"there is no such folder in {str(tmp_path)!r}, and as a name on the hub: " in str(raised.value)


def test_folder_without_tokenizer_says_where_to_get_one(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match=r"contains no tokenizer\. Pass tokenizer=.*save_pretrained"):
        _ = LoRAFineTuning(str(tmp_path)).tokenizer


def test_prompt_in_place_of_a_file_names_prompt_baseline():
    with pytest.raises(SavingsError, match=r"pass PromptBaseline\(system=\.\.\.\)"):
        TokenSavings("You are a helpful assistant. Answer with a code.")


def messages_of(caplog, data, tokenizer):
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with caplog.at_level(logging.INFO):
        trainer.fit(LoRAFineTuning(make_model(), tokenizer=tokenizer), data)
    return [record.getMessage() for record in caplog.records]


def test_batch_larger_than_the_data_is_told_once(caplog):
    data = PairDataModule(make_rows(6), batch_size=16, cache_dir=False)
    found = [text for text in messages_of(caplog, data, make_tokenizer()) if "batch_size" in text]
    assert found == [
        "batch_size=16 is more than the 6 training rows, so an epoch is one batch. Lower batch_size for more steps."
    ]


@pytest.mark.parametrize("batch_size", [4, 6])
def test_batch_that_the_data_fill_is_not_told(caplog, batch_size):
    data = PairDataModule(make_rows(6), batch_size=batch_size, cache_dir=False)
    assert not [text for text in messages_of(caplog, data, make_tokenizer()) if "batch_size" in text]


def test_missing_chat_template_names_the_one_in_use(caplog):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    data = PairDataModule(make_rows(8), cache_dir=False)
    found = [text for text in messages_of(caplog, data, tokenizer) if "no chat template" in text]
    assert len(found) == 1
    assert "chat_template='plain'" in found[0]


@pytest.mark.parametrize(
    ("first", "second", "warned"),
    [("lightning_ft.modules.sft", "lightning.pytorch", True), ("lightning.pytorch", "lightning_ft.modules.sft", False)],
)
def test_late_import_of_the_other_lightning_is_warned_of(first, second, warned):
    code = (
        f"import {first}\nimport {second}\nimport warnings\nfrom lightning_ft import LoRAFineTuning\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n    LoRAFineTuning('base/')\n"
        "print([str(w.message) for w in caught if 'LIGHTNING_FT_NAMESPACE' in str(w.message)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert ("import lightning.pytorch before lightning_ft" in done.stdout) == warned


def test_checkpoint_of_another_class_names_the_class_to_load_it_with(tmp_path, model_folder, trainer_options):
    module = FullFineTuning(model_folder, dtype="float32")
    trainer = Trainer(**trainer_options, max_steps=1)
    trainer.fit(module, PairDataModule(make_rows(), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert isinstance(FullFineTuning.load_from_checkpoint(tmp_path / "last.ckpt"), FullFineTuning)
    for cls in (DPO, LoRAFineTuning):
        with pytest.raises(CheckpointError, match=f"load it with FullFineTuning.load_from_.* model= to {cls.__name__}"):
            cls.load_from_checkpoint(tmp_path / "last.ckpt")


def test_own_module_that_unpacks_a_token_batch_is_told_of_the_other_batches():
    data = PairDataModule(make_rows(), batch_size=4, tokenizer=make_tokenizer())
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    for use in (lambda: make_model()(**batch), lambda: batch["input_ids"]):
        with pytest.raises(ConfigError, match="pass batch_format='hf' to the PairDataModule"):
            use()


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        (0.9, "betas=0.9: expected 2 numbers"),
        ((0.9,), "expected 2 numbers"),
        (["a", 1], "expected 2 numbers"),
        ((0.9, 1.0), r"betas=\(0.9, 1.0\): expected two numbers of at least 0 and below 1"),
    ],
)
def test_wrong_betas_are_refused(betas, message):
    with pytest.raises(ConfigError, match=message):
        FullFineTuning("some/model", betas=betas)


def test_mixing_of_more_rows_than_an_epoch_can_have_is_refused():
    rows = make_rows()
    for weight in (1e9, 1e30):
        data = PairDataModule([rows[:8], rows[8:]], mixing=[weight, 1], batch_size=4, tokenizer=make_tokenizer())
        data.setup("fit")
        with pytest.raises(ConfigError, match="A weight is how often the rows of a source appear per epoch"):
            data.train_dataloader()
