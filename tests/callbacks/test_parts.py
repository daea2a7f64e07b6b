"""Parts for LightningModules that aren't ours: accumulation, checkpoints, exact resumption, quality, export."""

import contextlib
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from their_module import Resumable, Theirs, fit, hf_loader
from tiny import make_model, make_rows
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_ft import (
    AnswerQuality,
    ExportModel,
    FullFineTuning,
    PairDataModule,
    TokenMeanAccumulation,
    TrainableCheckpoint,
)
from lightning_ft._lightning import Callback, _pl
from lightning_ft.data.hf_batches import from_hf
from lightning_ft.data.resumable_loader import ResumableLoader
from lightning_ft.errors import CheckpointError, ConfigError, ExportError
from lightning_ft.modules.exact_resume import ExactResume
from lightning_ft.modules.token_mean import TokenMean

PROJECT = Path(__file__).parents[2] / "examples" / "existing_project"


def trained(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- accumulation


class KeepGradients(Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        if not hasattr(self, "gradients"):
            self.gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def test_eight_batches_of_one_give_the_gradient_of_one_batch_of_eight(trainer_options, tokenizer):
    def gradients(batch_size, *callbacks):
        keep = KeepGradients()
        loader = hf_loader(tokenizer, 8, batch_size)
        options = {"accumulate_grad_batches": 8 // batch_size, "max_steps": 1}
        fit(trainer_options, Theirs(), loader, *callbacks, keep, **options)
        return keep.gradients

    whole = gradients(8)
    parts, plain = gradients(1, TokenMeanAccumulation()), gradients(1)
    same = gradients(8, TokenMeanAccumulation())
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(same[name], expected, rtol=1e-4, atol=1e-6)
    assert any((plain[name] - expected).abs().max() > 1e-4 for name, expected in whole.items())


def test_short_last_window_is_weighted_by_its_own_tokens(trainer_options, tokenizer):
    def weights(batch_size, accumulate):
        module = Theirs()
        loader = hf_loader(tokenizer, 6, batch_size)
        fit(
            trainer_options,
            module,
            loader,
            TokenMeanAccumulation(),
            accumulate_grad_batches=accumulate,
            max_epochs=1,
            max_steps=-1,
        )
        return trained(module)

    first, second = weights(4, 1), weights(1, 4)  # steps of four rows and of two
    for name, expected in first.items():
        torch.testing.assert_close(second[name], expected, rtol=0, atol=2e-5)


def test_batches_without_labels_and_manual_optimization_are_refused(trainer_options, tokenizer):
    class Manual(Theirs):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ConfigError, match="needs automatic optimization, and Manual takes its own"):
        fit(trainer_options, Manual(), hf_loader(tokenizer), TokenMeanAccumulation())
    unlabeled = DataLoader([torch.arange(5)] * 4)
    with pytest.raises(ConfigError, match="supervised tokens of a Tensor without labels can't be counted"):
        fit(trainer_options, Theirs(), unlabeled, TokenMeanAccumulation())


@pytest.mark.parametrize("count", [-3, "7", None, 2.5, float("inf")])
def test_count_of_tokens_is_a_number(count):
    with pytest.raises(ConfigError, match=r"count= returned .* for a list: expected the number of tokens"):
        TokenMean(count=lambda batch: count).weigh(torch.tensor(1.0), [1, 2])
    assert [TokenMean(count=lambda batch: batch).count(n) for n in (torch.tensor(3), 3.0)] == [3, 3]


# ---------------------------------------------------------------- checkpoints


def test_micro_batch_without_supervised_tokens_is_refused_where_its_loss_is_nan(trainer_options, tokenizer):
    batches = list(hf_loader(tokenizer, 8))
    batches[1]["labels"][:] = -100
    loader = DataLoader(batches, batch_size=None)
    module = Theirs()
    with pytest.raises(ConfigError, match=r"no supervised token .* so its mean loss is NaN"):
        fit(trainer_options, module, loader, TokenMeanAccumulation(), accumulate_grad_batches=2)
    assert all(bool(p.isfinite().all()) for p in module.parameters())

    class Skipping(Theirs):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if bool((batch["labels"] != -100).any()) else None

    fit(trainer_options, skipping := Skipping(), loader, TokenMeanAccumulation(), accumulate_grad_batches=2)
    assert all(bool(p.isfinite().all()) for p in skipping.parameters())
    with pytest.raises(ConfigError, match="no supervised token"):
        TokenMean().weigh(torch.tensor(float("nan")), batches[1])
    assert float(TokenMean().weigh(torch.tensor(0.0), batches[1])) == 0.0


def test_checkpoints_have_trainable_weights_only_and_resume(trainer_options, tokenizer, tmp_path):
    module = Theirs()
    trainer = fit(trainer_options, module, hf_loader(tokenizer), TrainableCheckpoint())
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    saved = torch.load(tmp_path / "small.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {name for name, p in module.named_parameters() if p.requires_grad}
    fresh = Theirs()
    fit(trainer_options, fresh, hf_loader(tokenizer), TrainableCheckpoint(), ckpt_path=tmp_path / "small.ckpt")
    for name, value in trained(module).items():
        assert torch.equal(trained(fresh)[name], value)  # max_steps is reached: nothing more is trained


class Gradual(Theirs):
    """Trains one layer after the other: the first in epoch 0, the second in epoch 1, none after that."""

    def __init__(self):
        super().__init__(lora=False)
        self.model.requires_grad_(False)
        self.layers = self.model.model.layers
        self.layers[0].requires_grad_(True)

    def on_train_epoch_start(self):
        for number, layer in enumerate(self.layers):
            layer.requires_grad_(self.current_epoch == number)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if self.current_epoch < 2 else None

    def configure_optimizers(self):
        return torch.optim.SGD(self.layers.parameters(), lr=0.1)


def test_checkpoints_keep_layers_that_were_trained_and_then_frozen(trainer_options, tokenizer, tmp_path):
    module = Gradual()
    options = {"max_steps": -1, "limit_train_batches": 1}
    trainer = fit(trainer_options, module, hf_loader(tokenizer), TrainableCheckpoint(), max_epochs=2, **options)
    path, later = tmp_path / "small.ckpt", tmp_path / "later.ckpt"
    trainer.save_checkpoint(path)
    layers = {name for name, _ in module.named_parameters(remove_duplicate=False) if "layers." in name}
    assert set(torch.load(path, weights_only=True)["state_dict"]) == layers
    resumed = Gradual()
    callback = TrainableCheckpoint()
    trainer = fit(trainer_options, resumed, hf_loader(tokenizer), callback, ckpt_path=path, max_epochs=3, **options)
    trainer.save_checkpoint(later)  # of a run in which no layer was trained
    for checkpoint in (path, later):
        loaded = Gradual.load_from_checkpoint(checkpoint, strict=False)
        for name, value in module.named_parameters():
            assert torch.equal(loaded.get_parameter(name), value), name


def test_checkpoints_that_do_not_fit_and_modules_without_frozen_weights_are_refused(
    trainer_options, tokenizer, tmp_path
):
    trainer = fit(trainer_options, Theirs(), hf_loader(tokenizer), TrainableCheckpoint())
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    other = Theirs(lora=False)
    other.model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"lacks .* weights that are trained .* of its weights don't exist here"):
        fit(trainer_options, other, hf_loader(tokenizer), TrainableCheckpoint(), ckpt_path=tmp_path / "small.ckpt")
    with pytest.raises(ConfigError, match="no weight of Theirs is frozen"):
        fit(trainer_options, Theirs(lora=False), hf_loader(tokenizer), TrainableCheckpoint())


# ---------------------------------------------------------------- exact resumption


class Kill(Callback):
    """Saves a checkpoint after a number of batches and interrupts the run."""

    def __init__(self, path, batches):
        self.path, self.batches, self.seen = path, batches, 0

    def on_train_batch_end(self, trainer, *_):
        self.seen += 1
        if self.seen == self.batches:
            trainer.save_checkpoint(self.path)
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("batches", [1, 2, 3, 4, 6, 7])
def test_killed_run_resumes_bit_for_bit(trainer_options, tokenizer, tmp_path, batches, accumulate):
    def run(*callbacks, ckpt_path=None):
        torch.manual_seed(11)
        module = Resumable(dropout=0.3)
        torch.manual_seed(5 if ckpt_path is None else 6)
        loader = ResumableLoader(hf_loader(tokenizer, shuffle=True))
        options = {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": accumulate}
        try:
            fit(trainer_options, module, loader, *callbacks, ckpt_path=ckpt_path, **options)
        except KeyboardInterrupt:
            pass
        except SystemExit:
            pass
        return module

    whole = run()
    run(Kill(tmp_path / "killed.ckpt", batches))
    resumed = run(ckpt_path=tmp_path / "killed.ckpt")
    assert resumed.losses == whole.losses[-len(resumed.losses) :]
    assert len(resumed.losses) == 8 - batches + (batches % accumulate)
    for name, value in trained(whole).items():
        assert torch.equal(trained(resumed)[name], value), name


def test_hooks_of_the_module_are_called_after_those_of_the_mixin(trainer_options, tokenizer):
    class Mine(Theirs):
        def __init__(self):
            super().__init__()
            self.called = []

        def on_train_epoch_start(self):
            self.called.append("epoch")

        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    class Mixed(ExactResume, Mine):
        pass

    module = Mixed()
    fit(trainer_options, module, hf_loader(tokenizer), max_epochs=2, max_steps=-1)
    assert module.called == ["epoch"] * 2
    assert len(module.losses) == 4  # two batches of each epoch


@pytest.mark.parametrize("batches", [2, 3, 4])
def test_epochs_shorter_than_the_loader_resume(trainer_options, tokenizer, tmp_path, batches):
    def run(*callbacks, ckpt_path=None):
        torch.manual_seed(11)
        module = Resumable()
        torch.manual_seed(5 if ckpt_path is None else 6)
        loader = ResumableLoader(hf_loader(tokenizer, shuffle=True))
        options = {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 3}
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            fit(trainer_options, module, loader, *callbacks, ckpt_path=ckpt_path, **options)
        return module

    whole = run()
    run(Kill(tmp_path / "killed.ckpt", batches))
    resumed = run(ckpt_path=tmp_path / "killed.ckpt")
    assert resumed.losses == whole.losses[batches:]


def test_rows_that_draw_random_numbers_draw_the_same_after_a_resumption():
    def collate(rows):
        return torch.stack(rows) + torch.rand(())

    def make():
        return ResumableLoader(DataLoader(list(torch.arange(12.0)), batch_size=2, shuffle=True, collate_fn=collate))

    torch.manual_seed(0)
    loader, seen, state, rng = make(), [], None, None
    for epoch in range(2):
        for number, batch in enumerate(loader):
            seen.append(batch.tolist())
            if (epoch, number) == (0, 2):
                state, rng = loader.state_dict(), torch.get_rng_state()
    torch.manual_seed(1)
    resumed = make()
    resumed.load_state_dict(state)
    torch.set_rng_state(rng)
    assert [batch.tolist() for _ in range(2) for batch in resumed] == seen[3:]


def test_loaders_that_cannot_be_resumed_are_refused(monkeypatch):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(ConfigError, match="can't return to a position of an IterableDataset"):
        ResumableLoader(DataLoader(Endless()))
    monkeypatch.setattr("lightning_ft.data.resumable_loader.rank_and_world_size", lambda: (0, 2))
    with pytest.raises(ConfigError, match="Every rank would read all rows"):
        next(iter(ResumableLoader(DataLoader(list(range(4))))))
    sampler = torch.utils.data.DistributedSampler(list(range(4)), num_replicas=2, rank=0, shuffle=False)
    assert [int(batch) for batch in ResumableLoader(DataLoader(list(range(4)), sampler=sampler))] == [0, 2]


# ---------------------------------------------------------------- export


def test_export_of_a_module_that_is_not_ours_loads_with_peft(trainer_options, tokenizer, tmp_path, model_folder):
    module = Theirs(tokenizer)
    module.model.get_base_model().config._name_or_path = model_folder
    module.model.active_peft_config.base_model_name_or_path = model_folder
    fit(trainer_options, module, hf_loader(tokenizer), ExportModel(str(tmp_path / "export")))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "export" / "last")
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, module.model.eval()(ids).logits)
    with pytest.raises(ConfigError, match="found no tokenizer in Theirs: pass tokenizer="):
        fit(trainer_options, Theirs(), hf_loader(tokenizer), ExportModel(str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: None, "changed the base weights, so the adapter alone doesn't fit"),
        (
            lambda model: model.base_model.model.model.norm.requires_grad_(True),
            "1 weights outside the adapter are trained",
        ),
    ],
)
def test_adapters_that_an_export_would_not_hold_are_refused(trainer_options, tokenizer, tmp_path, change, message):
    module = Theirs(tokenizer)
    if "changed" in message:
        config = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"], task_type="CAUSAL_LM")
        module.model = get_peft_model(make_model(), config)
    change(module.model)
    with pytest.raises(ExportError, match=message):
        fit(trainer_options, module, hf_loader(tokenizer), ExportModel(str(tmp_path / "out")))


def test_parts_that_contradict_each_other_are_refused(trainer_options, tokenizer, model_folder):
    averaging = _pl.callbacks.WeightAveraging()
    with pytest.raises(ConfigError, match="can't be used with WeightAveraging"):
        fit(trainer_options, Theirs(), hf_loader(tokenizer), TrainableCheckpoint(), averaging)
    with pytest.raises(ConfigError, match="FullFineTuning weights its loss by token itself"):
        fit(trainer_options, FullFineTuning(model_folder), hf_loader(tokenizer), TokenMeanAccumulation())


# ---------------------------------------------------------------- batches


def test_our_modules_train_on_batches_of_transformers_as_on_our_own(trainer_options, tokenizer, model_folder):
    def weights(loader_or_data):
        module = FullFineTuning(model_folder, learning_rate=1e-2)
        fit(trainer_options, module, loader_or_data)
        return trained(module)

    ours = weights(PairDataModule(make_rows(16), batch_size=4, packing=False, shuffle=False, cache_dir=False))
    theirs = weights(hf_loader(tokenizer))
    as_data = weights(PairDataModule(make_rows(16), batch_size=4, batch_format="hf", shuffle=False, cache_dir=False))
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name
        assert torch.equal(as_data[name], value), name


def test_batches_without_rows_repeat_one_so_that_their_loss_is_a_number(tokenizer, tmp_path):
    data = PairDataModule(
        make_rows(6), batch_size=2, batch_format="hf", tokenizer=tokenizer, shuffle=False, cache_dir=False
    )
    data.setup("fit")
    empty, first = data.collate("train")([]), next(iter(data.train_dataloader()))
    assert (empty["labels"] != -100).any()
    assert empty["input_ids"][0].tolist() == first["input_ids"][0][first["attention_mask"][0].bool()].tolist()

    rows = [*make_rows(3), {"input": "long " * 90, "output": "a"}, *make_rows(2)]
    stream = PairDataModule(
        rows, streaming=True, batch_size=1, batch_format="hf", tokenizer=tokenizer, shuffle=False, max_length=64,
        on_overlong="drop",
    )  # fmt: skip
    stream.setup("fit")
    batches = list(stream.train_dataloader())
    assert len(batches) == 6
    assert batches[3]["input_ids"].tolist() == batches[0]["input_ids"].tolist()
    assert all((batch["labels"] != -100).any() for batch in batches)


def test_left_padding_and_bad_batches(tokenizer):
    ids, labels = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[-100, -100, 6], [-100, 8, 9]])
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    found = from_hf(batch, pad_token_id=1)
    assert found.input_ids.tolist() == [[5, 6, 1], [7, 8, 9]]
    assert found.targets.tolist() == [6, 8, 9]
    for change, message in (
        ({"labels": labels[:, :2]}, r"expected input_ids and labels of the same shape"),
        ({"attention_mask": torch.zeros(2, 3)}, "labels supervise padding"),
        ({"labels": labels.clone().fill_(4)}, "labels differ from input_ids"),
        ({"attention_mask": torch.ones(2, 2)}, r"attention_mask has the shape \(2, 2\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_hf({**batch, "attention_mask": torch.ones(2, 3), **change})
    with pytest.raises(ConfigError, match="A batch has 'pixel_values', which these modules don't pass"):
        from_hf({**batch, "pixel_values": torch.ones(1)})
    packed = {"input_ids": ids[1:], "labels": labels[1:], "position_ids": torch.tensor([[0, 0, 1]])}
    assert from_hf(packed).targets.tolist() == [9]  # the first token of a sequence isn't predicted
    with pytest.raises(ConfigError, match="batch_format='torch': expected 'tokens' or 'hf'"):
        PairDataModule(make_rows(2), batch_format="torch")


# ---------------------------------------------------------------- the example


def test_example_gains_each_part_by_a_line(trainer_options, tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT.parents[1])
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.delitem(sys.modules, "project", raising=False)
    spec = importlib.util.spec_from_file_location("with_parts", PROJECT / "with_parts.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    module = example.ResumableLM("examples/tiny_base")
    rows = PairDataModule("examples/support/data/train.jsonl", validation=0.01, tokenizer=module.tokenizer)
    rows.load_rows()
    loader = ResumableLoader(example.make_loader(module.tokenizer, "examples/support/data/train.jsonl", limit=32))
    requests = rows.requests("validation")[:4]
    quality = AnswerQuality("exact", requests=requests, max_new_tokens=4, progress=False)
    export = ExportModel(str(tmp_path / "export"))
    trainer = fit(
        trainer_options, module, loader, TokenMeanAccumulation(), TrainableCheckpoint(), quality, export, max_steps=2
    )
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert (tmp_path / "run.ckpt").stat().st_size < 3e6
    assert "val/quality" in trainer.callback_metrics
    assert (tmp_path / "export" / "last" / "adapter_model.safetensors").exists()
