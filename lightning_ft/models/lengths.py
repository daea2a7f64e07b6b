"""Models in which a long sequence changes the output for shorter ones in the same pass.

Rotary scalings such as LongRoPE and dynamic NTK choose their frequencies by the largest position of a pass, so a short
sequence gets other log-probs next to a long one than alone. Dynamic NTK also remembers the longest pass so far. Whether
a model does so, and beyond which length, is found by probing it: four tokens suffice, at positions that are far apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.distributed import device_of_passes
from lightning_ft.models.backbone import accepts, first_tensor, head_of

_TOKENS = 4
_NEAR, _WIDE = 3, 255  # last positions of the two observed rows
_BEYOND_TABLES = 4  # multiple of the model's positions to probe up to: some rotary scalings change only beyond them
_Value = Tensor | int | float
"""State of a module other than its parameters."""
_known: WeakKeyDictionary[PreTrainedModel, LengthSwitch | None] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class LengthSwitch:
    """The length from which the longest sequence of a pass changes the others.

    Args:
        at: Length in tokens up to which sequences don't change each other.
        mixed_beyond: Whether longer sequences of different lengths may share a pass (LongRoPE has two sets of
            frequencies); if not, only sequences of equal length may (dynamic NTK).
        state: State that modules carry from one pass to the next, as it was before any long pass: module, name, value.
    """

    at: int
    mixed_beyond: bool
    state: tuple[tuple[nn.Module, str, _Value], ...] = ()

    @property
    def why(self) -> str:
        """Explanation for a user whose batch takes several passes."""
        return f"changes the positions of all sequences of a pass with one of more than {self.at:,} tokens"

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Group sequences that may share a pass.

        Args:
            lengths: Number of tokens of each sequence.

        Returns:
            Indices of the sequences of each group, in order.

        Example:
            >>> LengthSwitch(at=64, mixed_beyond=True).groups([10, 100, 64, 80])
            [[0, 2], [1, 3]]
            >>> LengthSwitch(at=64, mixed_beyond=False).groups([10, 100, 64, 80, 100])
            [[0, 2], [3], [1, 4]]
        """
        groups: dict[int, list[int]] = {}
        for i, length in enumerate(lengths):
            key = 0 if length <= self.at else 1 if self.mixed_beyond else length
            groups.setdefault(key, []).append(i)
        return [groups[key] for key in sorted(groups)]

    def forget(self) -> None:
        """Reset the state that modules carry from earlier passes, so that the next pass doesn't depend on them."""
        for module, name, value in self.state:
            current = getattr(module, name, None)
            if not isinstance(value, Tensor):
                setattr(module, name, value)
            elif isinstance(current, Tensor) and current.shape == value.shape:
                setattr(module, name, value.to(current.device, current.dtype, copy=True))


def length_switch(base: PreTrainedModel) -> LengthSwitch | None:
    """The length from which a model's passes depend on their longest sequence, probed once per model.

    Call it through :func:`lightning_ft.models.head.as_forward`, since it runs forward passes.

    Args:
        base: A transformers model.

    Returns:
        None if no sequence changes another one, or if the model takes no position ids to probe it with.
    """
    if base not in _known:
        modes = [(module, module.training) for module in base.modules()]
        base.eval()
        try:
            with torch.no_grad():
                _known[base] = _LengthProbe(base).switch()
        finally:
            for module, training in modes:
                module.training = training
    return _known[base]


class _LengthProbe:
    """Finds the length switch of a model with passes of four rows of four tokens.

    The first rows stay the same while the positions of the last row move, for example near=3, wide=255, last=4095:

        row 0    positions 0 1 2 3                  observed: a short sequence
        row 1    positions 0 85 170 255             observed: a longer sequence
        row 2    positions 0 1 2 3
        row 3    positions 4092 4093 4094 4095      the longest sequence, which moves

    If a larger position in row 3 changes row 0 or row 1, bisection finds the length from which it does.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        run = base.base_model
        self._run = run
        self._can_be_probed = accepts(run, "position_ids") and accepts(run, "attention_mask")
        text = base.config.get_text_config()
        self._far = _far(base, int(getattr(text, "max_position_embeddings", None) or 0))
        vocabulary = int(getattr(text, "vocab_size", 0) or 0)
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(0, max(vocabulary, 1), (4, _TOKENS), generator=generator)
        self._state: tuple[tuple[nn.Module, str, _Value], ...] = ()

    def switch(self) -> LengthSwitch | None:
        if not self._can_be_probed or self._far <= 2 * _TOKENS:
            return None
        wide = min(_WIDE, self._far // 2 - 1)
        try:
            near = self._pass(_NEAR, wide=_NEAR, last=_NEAR)
            far = self._pass(_NEAR, wide=wide, last=self._far - 1)
            middle = self._pass(_NEAR, wide=wide, last=wide)
            moved = [not torch.equal(near[0], far[0]), not torch.equal(middle[1], far[1])]
            if not any(moved):  # to the bit: same shapes, same kernels
                return None
            return self._bisect(wide)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a forward pass may raise anything: such a model can't be probed by positions
            return None

    def _bisect(self, wide: int) -> LengthSwitch | None:
        noise = self._noise()
        self._pass(_NEAR, wide=_NEAR, last=_NEAR)  # a short pass resets state that resets itself
        before = _snapshot(self._base)
        self._pass(_NEAR, wide=_NEAR, last=self._far - 1)
        self._state = _changed(self._base, before)

        def depends(row: int, top: int, length: int) -> bool:
            one = self._pass(_NEAR, wide=top, last=top)[row]
            other = self._pass(_NEAR, wide=top, last=length - 1)[row]
            return not _alike(one, other, noise)

        for row, top in ((0, _NEAR), (1, wide)):
            if not depends(row, top, self._far):
                continue
            low, high = top + 1, self._far  # it doesn't depend on `low`, it does on `high`
            for hint in _hints(self._base):
                if low < hint < high and depends(row, top, hint + 1) and not depends(row, top, hint):
                    low, high = hint, hint + 1
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if depends(row, top, middle) else (middle, high)
            one = self._pass(_NEAR, wide=low + _TOKENS, last=low + _TOKENS)[1]
            other = self._pass(_NEAR, wide=low + _TOKENS, last=self._far - 1)[1]
            return LengthSwitch(low, mixed_beyond=_alike(one, other, noise), state=self._state)
        return None

    def _pass(self, near: int, *, wide: int, last: int, ids: Tensor | None = None) -> Tensor:
        """Output of four rows whose positions go up to `near`, `wide`, `near` and `last`, ``[4, 4, d]``."""
        LengthSwitch(0, False, self._state).forget()
        spread = [torch.linspace(0, top, _TOKENS).long() for top in (near, wide, near)]
        rows = torch.stack([*spread, torch.arange(last - _TOKENS + 1, last + 1)])
        device = device_of_passes(cast(Tensor, self._base.get_input_embeddings().weight))
        input_ids = (self._ids if ids is None else ids).to(device)
        # Without a mask, transformers takes gaps between positions for the start of another sequence.
        options = {"attention_mask": torch.ones_like(input_ids), "position_ids": rows.to(device)}
        return first_tensor(self._run(input_ids=input_ids, use_cache=False, **options)).float()

    def _noise(self) -> float:
        """How much rows change with the tokens (not the length) of a neighbor, as with batch-dependent routing."""
        other = self._ids.clone()
        other[3] = self._ids[0].flip(0)
        one = self._pass(_NEAR, wide=_NEAR, last=_NEAR)
        return float((one - self._pass(_NEAR, wide=_NEAR, last=_NEAR, ids=other))[:3].abs().max())


def _alike(one: Tensor, other: Tensor, noise: float) -> bool:
    rounding = 0.1 * torch.finfo(torch.float32).eps * float(one.abs().max())
    return float((one - other).abs().max()) <= 8 * noise + rounding


def _far(base: PreTrainedModel, positions: int) -> int:
    """The largest length to probe: more than the model's positions, unless it looks positions up in a table."""
    embeddings = (base.get_input_embeddings(), head_of(base))
    for module in base.modules():
        if module in embeddings or isinstance(module, nn.Linear):
            continue
        weights = [p.shape[:1] for p in module.parameters(recurse=False) if p.ndim > 1]
        kept = [buffer.shape for buffer in module.buffers(recurse=False)]
        if any(positions <= size <= positions + 8 for shape in (*weights, *kept) for size in shape):
            return positions
    return _BEYOND_TABLES * positions


def _hints(base: PreTrainedModel) -> list[int]:
    """Lengths that the configuration names, which are probed first."""
    text = base.config.get_text_config()
    lengths = [getattr(text, "max_position_embeddings", None), getattr(text, "original_max_position_embeddings", None)]
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        lengths.append(part.get("original_max_position_embeddings"))
    return sorted({int(length) for length in lengths if length})


def _snapshot(base: nn.Module) -> dict[tuple[int, str], _Value]:
    return {(id(m), name): _copy(value) for m in base.modules() for name, value in _kept(m)}


def _changed(base: nn.Module, before: dict[tuple[int, str], _Value]) -> tuple[tuple[nn.Module, str, _Value], ...]:
    """State of modules that has changed since a snapshot, with its earlier value."""
    return tuple(
        (module, name, before[id(module), name])
        for module in base.modules()
        for name, value in _kept(module)
        if (id(module), name) in before and not _same(before[id(module), name], value)
    )


def _kept(module: nn.Module) -> list[tuple[str, _Value]]:
    plain = [(n, v) for n, v in vars(module).items() if n != "training" and isinstance(v, (Tensor, int, float))]
    return plain + [(name, value) for name, value in module._buffers.items() if value is not None]


def _copy(value: _Value) -> _Value:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(one: _Value, other: _Value) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return one == other
