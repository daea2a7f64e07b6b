"""The global random streams, as values that a checkpoint may hold.

Lightning doesn't restore them, so that a resumed run would draw other dropout masks than the uninterrupted one.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from lightning_ft.rollout.ranks import gathered


def own_rng_state() -> dict[str, Any]:
    """The state of this process: torch's streams, Python's and NumPy's."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
    }


def rng_state(world_size: int = 1, own: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The state of every rank, in order; all ranks must call it.

    Args:
        world_size: Number of ranks.
        own: State to keep for this rank, by default the present one.
    """
    own = own_rng_state() if own is None else own
    return [own] if world_size == 1 else gathered(own)


def set_rng_state(states: Any, rank: int) -> None:
    """Put back what :func:`rng_state` returned; ranks beyond those saved keep the stream they have."""
    if rank >= len(states):
        return
    state = states[rank]
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
