"""Strategies that can't work are refused at once, with all arguments to change."""

import pytest
import torch
from tiny import make_model, make_rows, make_tokenizer

from lightning_ft import FullFineTuning, PairDataModule
from lightning_ft._lightning import _pl
from lightning_ft.errors import ConfigError
from lightning_ft.modules.sharded_strategy import ShardedStrategy, adopt
from lightning_ft.modules.trainer_checks import check_strategy, warn_slow_precision


def sharded(**options):
    strategy = _pl.strategies.ModelParallelStrategy(**options)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    return strategy


def checked(strategy):
    adopt(strategy)
    check_strategy(strategy)
    return strategy


def test_trainer_checks_list_all_problems():
    with pytest.raises(ConfigError) as error:
        checked(sharded(data_parallel_size=3, tensor_parallel_size=2))
    assert "tensor_parallel_size=2, but tensor parallelism isn't supported, and data_parallel_size=3" in str(
        error.value
    )
    assert "the Trainer has 2 processes. Leave both arguments out" in str(error.value)


def test_trainer_checks_name_a_single_problem():
    with pytest.raises(ConfigError, match=r"^ModelParallelStrategy: tensor_parallel_size=2, but.* supported\. Leave"):
        checked(sharded(data_parallel_size=2, tensor_parallel_size=2))
    checked(_pl.strategies.DDPStrategy())


@pytest.mark.parametrize("chosen", [True, False])
def test_folder_of_checkpoints_that_cannot_be_written_is_refused_before_training(tmp_path, chosen):
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "runs")
    checkpoints = _pl.callbacks.ModelCheckpoint(dirpath=folder if chosen else None)
    root = str(tmp_path) if chosen else folder
    trainer = _pl.Trainer(max_steps=1, accelerator="cpu", logger=False, callbacks=[checkpoints], default_root_dir=root)
    with pytest.raises(ConfigError, match=rf"ModelCheckpoint can't write into '{folder}': '.*file' is a file\."):
        trainer.fit(FullFineTuning(make_model(), tokenizer=make_tokenizer()), PairDataModule(make_rows(4)))
    assert trainer.global_step == 0


@pytest.mark.parametrize("options", [{}, {"tensor_parallel_size": 1}, {"data_parallel_size": 2}])
def test_adopted_strategy_shares_weights_among_all_ranks(options):
    strategy = checked(sharded(**options))
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (2, 1)


def test_adopted_strategy_keeps_methods_of_the_users_own():
    class Own(_pl.strategies.ModelParallelStrategy):
        def barrier(self, name=None):
            return "mine"

    strategy = Own()
    strategy.parallel_devices = [torch.device("cpu")]
    adopt(strategy)
    adopt(strategy)
    assert isinstance(strategy, Own)
    assert isinstance(strategy, ShardedStrategy)
    assert type(strategy).__name__ == "Own"
    assert strategy.barrier() == "mine"


def test_deepspeed_is_refused_with_what_it_would_take():
    class DeepSpeedStrategy:
        pass

    with pytest.raises(ConfigError, match="It would take the number of these tokens before") as error:
        check_strategy(DeepSpeedStrategy())
    assert "ModelParallelStrategy()" in str(error.value)


@pytest.mark.parametrize(
    ("device", "precision", "dtype", "warned"),
    [
        ("cuda", "32-true", "float32", True),
        ("cuda", "bf16-mixed", "float32", False),
        ("cuda", "32-true", "bfloat16", False),  # a frozen base in half precision
        ("cpu", "32-true", "float32", False),
    ],
)
def test_float32_products_on_a_gpu_are_warned_of(device, precision, dtype, warned, recwarn):
    warn_slow_precision(make_model().to(getattr(torch, dtype)), torch.device(device), precision)
    assert [("bf16-mixed" in str(w.message)) for w in recwarn.list] == [True] * warned
