"""Each module refuses rows of another type before it loads weights."""

import pytest
from torch.utils.data import DataLoader

import lightning_ft
from lightning_ft._lightning import Trainer
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


def test_row_type_of_ones_own_is_not_refused(model_folder, trainer_options):
    parts = {name: part for name, part in vars(Pairs).items() if name not in ("__dict__", "__weakref__")}
    own_type = type("OwnRows", (RowType,), parts)  # like Pairs, and no subclass of it
    data = lightning_ft.PairDataModule([ROWS["PairDataModule"]] * 4, batch_size=2, cache_dir=False)
    data.row_type = own_type()
    module = lightning_ft.LoRAFineTuning(model_folder)
    Trainer(**trainer_options, max_steps=1).fit(module, data)
    assert module.model is not None
