"""Strategies that can't work are refused at once, with all arguments to change."""

import pytest
import torch
from tiny import make_model

from lightning_ft._lightning import _pl
from lightning_ft.errors import ConfigError
from lightning_ft.modules.trainer_checks import check_strategy, warn_slow_precision


def sharded(**options):
    strategy = _pl.strategies.ModelParallelStrategy(**options)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    return strategy


def test_trainer_checks_list_all_problems():
    with pytest.raises(ConfigError) as error:
        check_strategy(sharded())
    assert "tensor parallelism isn't supported, and checkpoints" in str(error.value)
    assert "data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False" in str(error.value)


def test_trainer_checks_name_a_single_problem():
    with pytest.raises(ConfigError, match=r"^ModelParallelStrategy: checkpoints hold"):
        check_strategy(sharded(tensor_parallel_size=1))
    check_strategy(sharded(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False))
    check_strategy(_pl.strategies.DDPStrategy())


def test_deepspeed_is_refused():
    class DeepSpeedStrategy:
        pass

    with pytest.raises(ConfigError, match="DeepSpeed keeps its gradients"):
        check_strategy(DeepSpeedStrategy())


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
