"""Each module refuses rows of another type before it loads weights."""

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_ft
from lightning_ft._lightning import Trainer, _pl, active_datamodule
from lightning_ft.data.layout import Example, collate_examples
from lightning_ft.data.row_types import Pairs, RowType
from lightning_ft.errors import ConfigError

REWARD = {"rewards": lambda completions, **columns: [1.0] * len(completions)}
MODULES = {
    "FullFineTuning": (lightning_ft.FullFineTuning, {}, "PairDataModule"),
    "LoRAFineTuning": (lightning_ft.LoRAFineTuning, {}, "PairDataModule"),
    "PromptDistillation": (lightning_ft.PromptDistillation, {"prompt": {"system": "Be brief."}}, "PromptDataModule"),
    "RewardModeling": (lightning_ft.RewardModeling, {}, "PreferenceDataModule"),
    "DPO": (lightning_ft.DPO, {}, "PreferenceDataModule"),
    "KTO": (lightning_ft.KTO, {}, "PreferenceDataModule"),
    "GRPO": (lightning_ft.GRPO, REWARD, "PromptDataModule"),
    "PPO": (lightning_ft.PPO, REWARD, "PromptDataModule"),
}
ROWS = {
    "PairDataModule": {"input": "a", "output": "b"},
    "PreferenceDataModule": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "PromptDataModule": {"prompt": "a"},
}


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize(
    ("name", "found"), [(name, found) for name, (*_, wanted) in MODULES.items() for found in ROWS if found != wanted]
)
def test_other_rows_are_refused_before_weights_are_loaded(model_folder, trainer_options, name, found, stage):
    module_class, options, wanted = MODULES[name]
    module = module_class(model_folder, **options)
    data = getattr(lightning_ft, found)([ROWS[found]] * 4, validation=[ROWS[found]] * 2, batch_size=2, cache_dir=False)
    trainer = Trainer(**trainer_options, max_steps=1)
    with pytest.raises(ConfigError, match=rf"^{name} .* and got a {found}: pass a {wanted} to the Trainer\.$"):
        getattr(trainer, stage)(module, datamodule=data)
    assert module.model is None, "weights were loaded first"


@pytest.mark.parametrize("name", ["GRPO", "PromptDistillation"])
def test_other_batches_are_refused(model_folder, trainer_options, name):
    module_class, options, wanted = MODULES[name]
    module = module_class(model_folder, **options)
    with pytest.raises(ConfigError, match=rf"^{name} .* and got a Tensor: pass a {wanted} to the Trainer\.$"):
        Trainer(**trainer_options, max_steps=1).fit(module, DataLoader([1, 2]))


class OwnMethod(lightning_ft.LoRAFineTuning):
    """Trains on the chosen completions of preferences."""

    def training_step(self, batch, batch_idx):
        return super().training_step(collate_examples([chosen for chosen, _ in batch.completions]), batch_idx)


class OwnData(lightning_ft.PreferenceDataModule):
    """Preferences whose batches are those of pairs."""

    def make_collate(self):
        example = Example(torch.arange(4), torch.ones(4, dtype=torch.bool))
        return lambda rows: lambda encoded: collate_examples([example] * len(encoded))


parts = {name: part for name, part in vars(Pairs).items() if name not in ("__dict__", "__module__", "__weakref__")}
OwnRows = type("OwnRows", (RowType,), parts)  # like Pairs, and no subclass of it


@pytest.mark.parametrize("own", [OwnMethod, OwnData, OwnRows])
def test_what_a_subclass_makes_of_other_rows_is_its_own_affair(model_folder, trainer_options, own):
    """They are checked batch by batch."""
    name = "PairDataModule" if own is OwnRows else "PreferenceDataModule"
    data_class = own if own is OwnData else getattr(lightning_ft, name)
    data = data_class([ROWS[name]] * 4, batch_size=2, cache_dir=False)
    if own is OwnRows:
        data.row_type = own()
    module = (own if own is OwnMethod else lightning_ft.LoRAFineTuning)(model_folder)
    trainer = Trainer(**trainer_options, max_steps=1)
    trainer.fit(module, data)
    assert trainer.global_step == 1


def test_error_of_a_row_type_of_ones_own():
    class Method(lightning_ft.LoRAFineTuning):
        row_type, purpose = OwnRows, "trains on such rows"

    error = Method("model").wrong_data("PairDataModule")
    assert (
        str(error)
        == "Method trains on such rows and got a PairDataModule: pass a DataModule of such rows to the Trainer."
    )


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_trainer_that_is_passed_loaders_leaves_an_earlier_datamodule_alone(model_folder, trainer_options, stage):
    rows = [ROWS["PairDataModule"]] * 4
    module = lightning_ft.LoRAFineTuning(model_folder)
    trainer = Trainer(**trainer_options, max_steps=1)
    trainer.fit(module, lightning_ft.PairDataModule(rows, batch_size=2, cache_dir=False))
    other = lightning_ft.PairDataModule(rows, predict=[{"input": "a"}], tokenizer=module.tokenizer, cache_dir=False)
    loader = other.predict_dataloader() if stage == "predict" else other.train_dataloader()
    trainer.fit_loop.epoch_loop.max_steps = 2
    checked = []
    module._check_batch = checked.append
    getattr(trainer, stage)(module, loader)
    assert len(checked) == (stage != "predict"), "each batch of a user's loader is checked"
    assert active_datamodule(trainer) is None
    assert module._fit_data is (None if stage == "fit" else trainer.datamodule)


def test_active_datamodule_is_that_of_the_running_loop(model_folder, trainer_options):
    rows, seen = [ROWS["PairDataModule"]] * 4, []

    class Seen(_pl.callbacks.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(active_datamodule(trainer))

        def on_validation_batch_end(self, trainer, *_):
            seen.append(active_datamodule(trainer))

    data = lightning_ft.PairDataModule(rows, validation=rows[:1], test=rows[:1], batch_size=4, cache_dir=False)
    trainer = Trainer(**trainer_options, max_steps=1, num_sanity_val_steps=1, callbacks=[Seen()])
    assert active_datamodule(trainer) is None
    module = lightning_ft.LoRAFineTuning(model_folder)
    trainer.fit(module, data)
    assert seen == [data] * 3
    for stage in ("validate", "test"):
        getattr(trainer, stage)(module, data, verbose=False)
        assert active_datamodule(trainer) is data
    trainer.fit_loop.epoch_loop.max_steps = 2
    seen.clear()
    trainer.fit(module, data.train_dataloader(), data.val_dataloader())
    assert seen == [None] * 3
    assert active_datamodule(None) is None


def test_data_of_an_earlier_run_of_the_trainer_are_not_checked(model_folder, trainer_options):
    trainer = Trainer(**trainer_options, max_steps=1)
    pairs = lightning_ft.PairDataModule([ROWS["PairDataModule"]] * 4, batch_size=2, cache_dir=False)
    trainer.fit(lightning_ft.LoRAFineTuning(model_folder), pairs)
    prompts = lightning_ft.PromptDataModule([ROWS["PromptDataModule"]] * 4, batch_size=2, tokenizer=pairs.tokenizer)
    prompts.setup("fit")
    module = lightning_ft.GRPO(model_folder, **REWARD, num_completions=2, max_new_tokens=2)
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(module, prompts.train_dataloader())
    assert module.last_rollout is not None
