"""The default optimizer, and its schedule without a zero step."""

import math

import pytest
import torch
from tiny import make_model
from torch._subclasses import FakeTensorMode
from transformers import get_scheduler

from lightning_ft import FullFineTuning, LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer
from lightning_ft.errors import ConfigError
from lightning_ft.models.optim import adamw, make_optimizer, parameter_groups, schedule_factor


def test_optimizer_is_fused_where_a_kernel_exists():
    groups = parameter_groups(make_model(), 0.1)
    assert adamw(groups, 1e-3, (0.9, 0.99)).defaults["fused"] is True
    with FakeTensorMode():  # stands in for weights on a GPU
        on_gpu = [{"params": [torch.nn.Parameter(torch.empty(2, 2, device="cuda"))]}]
        assert adamw(on_gpu, 1e-3, (0.9, 0.99)).defaults["fused"] is True
    whole = [{"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)]}]
    assert adamw(whole, 1e-3, (0.9, 0.99)).defaults["fused"] is None


def test_optimizer_matches_adamw():
    models = [make_model() for _ in range(2)]
    groups = [parameter_groups(model, 0.1) for model in models]
    made = [adamw(groups[0], 1e-2, (0.9, 0.99)), torch.optim.AdamW(groups[1], lr=1e-2, betas=(0.9, 0.99))]
    for step in range(5):
        for model, optimizer in zip(models, made, strict=True):
            ids = torch.randint(0, 400, (2, 9), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_fused_optimizer_steps_with_a_gradient_scaler():
    """The scaler unscales the gradients, skips a step that is not finite, and takes the others unchanged."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    scaled, plain = (adamw([{"params": [weight]}], 0.1, (0.9, 0.99)) for weight in weights)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for factor in (1.0, math.inf, 0.5):
        scaler.scale((weights[0] ** 2).sum() * factor).backward()
        scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        if math.isfinite(factor):
            ((weights[1] ** 2).sum() * factor).backward()
            plain.step()
        scaled.zero_grad()
        plain.zero_grad()
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)
    assert weights[0].max() < 0.9


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_can_be_clipped_in_every_precision(precision, model_folder, rows, tmp_path):
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
    assert trainer.optimizers[0].defaults["fused"] is True


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("total", [1, 2, 3, 10, 101])
def test_schedule_factor_reaches_its_peak_once_and_no_zero_step(kind, ratio, total):
    factor = schedule_factor(kind, warmup_ratio=ratio, total_steps=lambda: total)
    rates = [factor(step) for step in range(total)]
    top = rates.index(max(rates))
    assert max(rates) == 1.0
    assert min(rates) > 0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert top == min(math.ceil(total * ratio), total - 1)
    assert factor(total) == pytest.approx(1.0 if kind == "constant" else 0.0, abs=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedule_factor_matches_transformers_one_step_later(kind):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=5, num_training_steps=21).lr_lambdas[0]
    factor = schedule_factor(kind, warmup_ratio=0.2, total_steps=lambda: 20)
    assert [factor(step) for step in range(20)] == pytest.approx([theirs(step + 1) for step in range(20)])


def test_schedule_factor_requires_the_number_of_steps():
    factor = schedule_factor("cosine", warmup_ratio=0.1, total_steps=lambda: None)
    assert factor(0) == 1.0
    with pytest.raises(ConfigError, match="needs the number of training steps"):
        factor(1)


class Watched(FullFineTuning):
    """Records the learning rate of each optimizer step."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.rates = [*getattr(self, "rates", []), optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("length", [{"max_steps": 1}, {"max_epochs": 1}])
def test_single_step_run_changes_every_weight(length, model_folder, rows, trainer_options):
    module = Watched(model_folder, learning_rate=1e-2)
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    Trainer(**trainer_options, **length).fit(module, PairDataModule(rows[:8], batch_size=8, cache_dir=False))
    assert module.rates == [1e-2]
    assert not any(torch.equal(p, before[name]) for name, p in module.named_parameters() if "embed" not in name)


@pytest.mark.parametrize("length", [{"max_steps": 6}, {"max_epochs": 2}, {"max_epochs": 9, "max_steps": 6}])
def test_first_step_uses_its_own_learning_rate(length, model_folder, rows, trainer_options):
    module = Watched(model_folder, learning_rate=1.0, lr_schedule="linear", warmup_ratio=0.5)
    Trainer(**trainer_options, **length).fit(module, PairDataModule(rows[:24], batch_size=8, cache_dir=False))
    assert module.rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 2 / 3, 1 / 3])


class Plain(torch.optim.SGD):
    """An optimizer of one's own, with a required option."""

    def __init__(self, params, lr, *, momentum):
        super().__init__(params, lr=lr, momentum=momentum)


OWN = f"{__file__}:Plain"


@pytest.mark.parametrize("module_class", [FullFineTuning, LoRAFineTuning])
def test_module_trains_with_an_optimizer_class_of_its_own(module_class, model_folder, rows, trainer_options, tmp_path):
    """Given by its import path, without decay of norms, and again after loading a checkpoint, if it is passed."""
    optimizer = {"class_path": OWN, "init_args": {"momentum": 0.5}}
    module = module_class(str(model_folder), learning_rate=1e-2, optimizer=optimizer, weight_decay=0.2)
    trainer = Trainer(**trainer_options, max_steps=2)
    trainer.fit(module, PairDataModule(rows[:8], batch_size=4, cache_dir=False))
    (used,) = trainer.optimizers
    assert type(used).__name__ == "Plain"
    assert all(group["momentum"] == 0.5 for group in used.param_groups)
    decays = {p.ndim >= 2: group["weight_decay"] for group in used.param_groups for p in group["params"]}
    assert decays[True] == 0.2
    assert decays.get(False, 0.0) == 0.0
    checkpoint = tmp_path / "last.ckpt"
    trainer.save_checkpoint(checkpoint)
    with pytest.raises(ConfigError, match="a checkpoint doesn't decide which code runs"):
        module_class.load_from_checkpoint(checkpoint)
    assert module_class.load_from_checkpoint(checkpoint, optimizer=optimizer).hparams["optimizer"] == optimizer


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("sgd", "expected 'adamw' or the import path"),
        ({"class_path": "torch.optim.SGD", "options": {}}, "a dict has class_path and init_args"),
        ({"init_args": {}}, "expected 'adamw'"),
        ("loraplus", "expected 'adamw' or the import path"),
    ],
)
def test_module_refuses_what_is_no_optimizer(optimizer, message):
    with pytest.raises(ConfigError, match=message):
        FullFineTuning("some/model", optimizer=optimizer)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("torch.nn.Linear", "is no subclass of torch.optim.Optimizer"),
        ("torch.optim.Missing", "Missing"),
        ({"class_path": "torch.optim.SGD", "init_args": {"momentum": -1.0}}, "refuses .*momentum"),
        (OWN, "refuses"),
    ],
)
def test_optimizer_classes_are_checked(optimizer, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(optimizer, parameter_groups(make_model(), 0.1), 1e-3, (0.9, 0.99))
