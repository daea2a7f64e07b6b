"""DPO's precomputed reference, and checkpoints: exact resuming and contents."""

import functools
import math

import pytest
import torch
from dpo_cases import LABELED, LORA, PAIRS, RecordingDPO, RecordingKTO, batches
from preference_runs import Records, make_pairs, train, trainable
from safetensors import safe_open
from safetensors.torch import load_file, save
from tiny import make_model, make_tokenizer

from lightning_ft import DPO, PreferenceDataModule
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models import tensors


class CountsReferences(Records, DPO):
    """DPO that counts forward passes of the reference."""

    runs = 0

    def _reference_logprobs(self, batch):
        self.runs += 1
        return super()._reference_logprobs(batch)


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_precomputed_reference_gives_equal_training(model_folder, trainer_options, tmp_path, lora):
    def run(precompute, folder="a", **options):
        module = CountsReferences(
            model_folder,
            lora=lora,
            dtype="float32",
            learning_rate=1e-3 if lora is None else 1e-2,
            precompute_reference=precompute,
            cache_dir=str(tmp_path / folder),
            **options,
        )
        data = {"validation": make_pairs(26)[20:], "shuffle": True, "batch_size": 3}
        trainer = train(module, PAIRS, trainer_options, data=data, max_epochs=2)
        return module, {name: float(value) for name, value in trainer.callback_metrics.items()}

    live, live_figures = run(False)
    first, first_figures = run(True)
    assert live.runs == 2 * 7 + 2 * 2 + 2  # steps, validation, and its sanity check
    assert first.runs == 3 + 1  # 20 and 6 rows, eight at a time
    assert len(list((tmp_path / "a").iterdir())) == 2  # one file per split, and no partial file
    again, again_figures = run(True)
    assert again.runs == 0
    assert again.step_losses == first.step_losses
    assert again_figures == first_figures
    assert first.step_losses == pytest.approx(live.step_losses, abs=1e-5)
    assert first_figures.keys() == live_figures.keys()
    for name, value in live_figures.items():
        assert first_figures[name] == pytest.approx(value, abs=1e-4), name
    # Shuffled rows are looked up by their number; a mix-up would show in the first step.
    assert first.step_losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_precomputed_reference_is_recomputed_if_damaged(model_folder, trainer_options, tmp_path, monkeypatch):
    def run():
        module = CountsReferences(model_folder, lora={"r": 2}, precompute_reference=True, cache_dir=str(tmp_path))
        train(module, PAIRS[:4], trainer_options, max_steps=1)
        return module

    first = run()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    changed = {"logprobs": load_file(file)["logprobs"] + 1}
    for harm in (content[:40], content[:-4], b"", save(changed), save(changed, safe_open(file, "pt").metadata())):
        file.write_bytes(harm)
        again = run()
        assert (again.runs, again.step_losses) == (first.runs, first.step_losses)
        assert file.read_bytes() == content
    assert run().runs == 0
    file.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.warns(UserWarning, match=r"can't be written \(No space left on device\).*computed again"):
        assert run().step_losses == first.step_losses
    assert list(tmp_path.iterdir()) == []


def test_precomputed_reference_cache_depends_on_reference_and_rows(model_folder, trainer_options, tmp_path):
    def runs(model, rows=PAIRS, **options):
        module = CountsReferences(
            model, tokenizer=make_tokenizer(), precompute_reference=True, cache_dir=str(tmp_path), **options
        )
        train(module, rows, trainer_options, max_steps=1)
        return module.runs

    assert runs(model_folder) == 3
    assert runs(model_folder, loss="ipo", beta=0.5) == 0
    assert runs(model_folder, lora={"r": 4}) == 3
    assert (
        runs(model_folder, lora={"r": 8}, seed=3) == 0
    )  # with the adapter switched off, its rank and seed don't matter
    assert runs(make_model(seed=1)) == 3
    assert runs(model_folder, rows=[*PAIRS[:-1], {**PAIRS[-1], "chosen": "something else"}]) == 3
    assert runs(model_folder, rows=PAIRS[::-1]) == 3


def test_precomputed_reference_is_not_reused_for_another_datamodule(model_folder, trainer_options, tmp_path):
    module = CountsReferences(model_folder, precompute_reference=True, cache_dir=str(tmp_path), learning_rate=1e-3)
    data = {"test": make_pairs(30)[20:24]}
    trainer = train(module, PAIRS, trainer_options, data=data)
    module.runs = 0
    own = trainer.test(module, trainer.datamodule, verbose=False)
    assert module.runs == 0
    other = PreferenceDataModule(PAIRS, test=make_pairs(30)[26:], cache_dir=False)
    found = trainer.test(module, other, verbose=False)[0]["test/loss"]
    assert module.runs == 1
    with torch.no_grad():
        want = float(module.compute_loss(batches(make_pairs(30)[26:])[0]).losses.mean())
    assert found == pytest.approx(want, abs=1e-6)
    assert found != own[0]["test/loss"]


def test_precomputed_reference_is_not_used_for_loaders_that_are_passed_later(model_folder, trainer_options, tmp_path):
    """A Trainer keeps the DataModule of an earlier call, whose rows have the same numbers."""
    module = CountsReferences(model_folder, precompute_reference=True, cache_dir=str(tmp_path), learning_rate=1e-3)
    trainer = train(module, PAIRS, trainer_options, data={"validation": make_pairs(30)[20:24]})
    other = PreferenceDataModule(PAIRS, validation=make_pairs(30)[26:], tokenizer=make_tokenizer(), cache_dir=False)
    other.setup("fit")
    module.runs = 0
    found = trainer.validate(module, other.val_dataloader(), verbose=False)[0]["val/loss"]
    assert module.runs == 1
    with torch.no_grad():
        want = float(module.compute_loss(batches(make_pairs(30)[26:])[0]).losses.mean())
    assert found == pytest.approx(want, abs=1e-6)
    with pytest.raises(ConfigError, match="PreferenceDataModule"):
        trainer.fit(module, other.train_dataloader())


def test_precomputed_reference_needs_a_datamodule(model_folder, trainer_options):
    data = PreferenceDataModule(PAIRS, tokenizer=make_tokenizer(), cache_dir=False)
    data.setup("fit")
    loader = data.train_dataloader()
    module = DPO(model_folder, precompute_reference=True)
    with pytest.raises(ConfigError, match="PreferenceDataModule"):
        Trainer(**trainer_options, max_steps=1).fit(module, loader)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": LORA, "disable_dropout": False},
        {"lora": {"r": 4, "init_lora_weights": "pissa"}},
        {"lora": LORA, "disable_dropout": False, "precompute_reference": True},
        {"kto": True, "lora": {"r": 4}},
    ],
    ids=["full", "lora with dropout", "pissa", "precomputed", "kto"],
)
@pytest.mark.parametrize("stop_at", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_dpo_run_resumes_exactly(model_folder, trainer_options, tmp_path, options, stop_at):
    """Three steps per epoch: stops within the first and within the second."""
    options, rows = dict(options), PAIRS
    kind = functools.partial(RecordingDPO, cache_dir=str(tmp_path / "cache"))
    if options.pop("kto", False):
        kind, rows = RecordingKTO, LABELED
    common = {
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "data": {"shuffle": True, "validation": rows[:3]},
    }

    def make():
        return kind(model_folder, learning_rate=1e-2, **options)

    torch.manual_seed(1)
    whole = make()
    saver = _pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    train(whole, rows, trainer_options, callbacks=[saver], enable_checkpointing=True, **common)
    torch.manual_seed(2)  # earlier random draws of the process must not matter
    resumed = make()
    trainer = train(resumed, rows, trainer_options, ckpt_path=tmp_path / f"step={stop_at}.ckpt", **common)
    assert trainer.global_step == 6
    assert resumed.step_losses == whole.step_losses[stop_at:]
    assert resumed.step_metrics == whole.step_metrics[stop_at:]
    for name, value in trainable(whole).items():
        assert torch.equal(trainable(resumed)[name], value), name


@pytest.mark.parametrize("options", [{}, {"lora": LORA}, {"lora": {"r": 4, "init_lora_weights": "olora"}}])
def test_dpo_checkpoint_contains_trainable_weights_only(model_folder, trainer_options, tmp_path, options):
    module = DPO(model_folder, learning_rate=1e-2, **options)
    trainer = train(module, PAIRS, trainer_options, max_steps=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == trainable(module).keys()
    assert not any("initial" in name for name in checkpoint["state_dict"])
    again = DPO.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    batch = batches(PAIRS)[1]
    with torch.no_grad():
        torch.testing.assert_close(
            again.compute_loss(batch).losses, module.compute_loss(batch).losses, rtol=0, atol=1e-6
        )
    with pytest.raises(ModelError, match="doesn't fit"):
        DPO(model_folder, lora={"r": 4, "target_modules": ["q_proj"]}).load_checkpoint(tmp_path / "a.ckpt")


def test_dpo_continued_adapter_trains_and_resumes(model_folder, trainer_options, tmp_path):
    first = DPO(model_folder, lora={"r": 4}, learning_rate=1e-2)
    train(first, PAIRS, trainer_options)
    folder = first.export(tmp_path / "first")
    second = RecordingDPO(str(folder), learning_rate=1e-2, dtype="float32")
    assert second.hparams["lora"] is None
    trainer = train(second, PAIRS, trainer_options)
    assert second.step_losses[0] == pytest.approx(math.log(2), abs=1e-6)  # the reference is the adapter, not its base
    assert second.step_losses[-1] < math.log(2) - 0.05
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    third = DPO.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    batch = batches(PAIRS)[1]
    with torch.no_grad():
        torch.testing.assert_close(
            third.compute_loss(batch).losses, second.compute_loss(batch).losses, rtol=0, atol=1e-6
        )
