"""Every cell of the table in docs/lightning.md."""

import re
from pathlib import Path

import pytest
from trainer_features import FEATURES
from trainer_run import MODULES, Run

from lightning_ft import LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer, _pl
from lightning_ft.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text(encoding="utf-8")
ROWS = {
    cells[0]: dict(zip(MODULES, cells[1:], strict=True))
    for cells in (line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| "))
    if cells[0] != "Feature"
}
"""What the page says of each feature and module: ``yes``, or ``no (N)``."""


def test_page_lists_each_feature_and_counts_the_cells():
    assert list(ROWS) == list(FEATURES)
    said = [cell for row in ROWS.values() for cell in row.values()]
    assert f"{said.count('yes')} work, {len(said) - said.count('yes')} are refused" in PAGE
    assert all(re.fullmatch(r"yes|no \([1-4]\)", cell) for cell in said)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature_does_what_the_page_says(feature, name, tmp_path):
    _pl.seed_everything(0, verbose=False)
    run = Run(name, tmp_path)
    if ROWS[feature][name] == "yes":
        FEATURES[feature](run)
    else:
        with pytest.raises(ConfigError):
            FEATURES[feature](run)


@pytest.mark.parametrize("callback", [_pl.callbacks.BackboneFinetuning, _pl.callbacks.ModelPruning])
def test_callbacks_that_need_loaded_weights_are_refused_without(callback, trainer_options, model_folder):
    made = callback("l1_unstructured") if callback is _pl.callbacks.ModelPruning else callback()
    trainer = Trainer(**trainer_options, max_epochs=1, callbacks=[made])
    with pytest.raises(ConfigError, match=rf"{callback.__name__}.*configure_model"):
        trainer.fit(LoRAFineTuning(model_folder), PairDataModule([{"input": "a", "output": "b"}], cache_dir=False))
