"""Whether the steps of an optimizer are larger than what the trained weights can tell apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor

from lightning_ft.distributed import rank_zero_warn
from lightning_ft.models.head import CausalLM

_LOOKED_AT = 4096  # weights of each tensor


def tell_lost_steps(model: CausalLM, learning_rate: float, precision: str) -> None:
    """Warn of weights that are trained in 16 bits, where that loses steps.

    Args:
        model: In the dtypes that it is trained in.
        learning_rate: Peak of the schedule.
        precision: The Trainer's.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if not trained:
        return
    dtype = str(trained[0].dtype).removeprefix("torch.")
    mixed = "bf16-mixed" if trained[0].dtype == torch.bfloat16 else "16-mixed"
    if isinstance(model, PeftModel) and precision.endswith("-true"):
        rank_zero_warn(
            f"precision={precision!r} has turned the adapter and AdamW's moments into {dtype}, which loses small "
            f"steps. With precision={mixed!r} the adapter is in float32, over a base in the dtype it was loaded in."
        )
    elif (lost := lost_steps(trained, learning_rate)) > 0.5:
        rank_zero_warn(
            f"A step of learning_rate={learning_rate:.3g} is less than {dtype} can tell apart for {lost:.0%} of the "
            f"trained weights: they would hardly move. Train with dtype='float32' and precision={mixed!r}, which "
            "computes as fast, or raise learning_rate."
        )


@torch.no_grad()
def lost_steps(weights: Sequence[Tensor], step: float) -> float:
    """Share of weights that a step leaves as they are, since it is rounded away in their dtype.

    Args:
        weights: Tensors of floating point numbers; of each only the first few thousand are looked at.
        step: What is added to each, as AdamW does of about the learning rate.

    Example:
        >>> lost_steps([torch.tensor([0.0, 0.25, 1.0, 2.0], dtype=torch.bfloat16)], 1e-3)
        0.5
    """
    lost = total = 0.0
    for weight in weights:
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        some = local.detach().flatten()[:_LOOKED_AT]
        share = float(((some + step) == some).float().mean()) if len(some) else 0.0
        lost, total = lost + share * weight.numel(), total + weight.numel()
    return lost / max(total, 1.0)
