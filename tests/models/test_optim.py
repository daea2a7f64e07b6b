"""The default optimizer: one kernel on a CPU, unless a gradient scaler would be undone in it."""

import pytest
import torch
from tiny import make_model

from lightning_ft import FullFineTuning, PairDataModule
from lightning_ft._lightning import Trainer
from lightning_ft.models.optim import adamw, parameter_groups


def test_it_is_one_kernel_on_a_cpu_unless_gradients_may_be_scaled():
    groups = parameter_groups(make_model(), 0.1)
    assert adamw(groups, 1e-3, (0.9, 0.99)).defaults["fused"] is True
    assert adamw(groups, 1e-3, (0.9, 0.99), scaled=True).defaults["fused"] is None
    whole = [{"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)]}]
    assert adamw(whole, 1e-3, (0.9, 0.99)).defaults["fused"] is None


def test_it_takes_the_steps_that_adamw_takes():
    models = [make_model() for _ in range(2)]
    made = [adamw(parameter_groups(m, 0.1), 1e-2, (0.9, 0.99), scaled=s) for m, s in zip(models, (0, 1), strict=True)]
    for step in range(5):
        for model, optimizer in zip(models, made, strict=True):
            ids = torch.randint(0, 400, (2, 9), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", None)])
def test_gradients_can_be_clipped_in_every_precision(precision, fused, model_folder, rows, tmp_path):
    module = FullFineTuning(str(model_folder), learning_rate=1e-3)
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=2,
        gradient_clip_val=0.1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, PairDataModule(rows[:8], batch_size=4, cache_dir=False))
    assert trainer.optimizers[0].defaults["fused"] is fused
