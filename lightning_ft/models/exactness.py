"""Find out which fast paths are exact for a model.

Architectures differ in where their hidden states come from, in what they do after their head, in how they mix tokens
(state spaces and linear attention see across the sequences of a packed row) and in how padding affects them. No list of
names stays complete, so the model is probed: each fast path is compared with the model's own forward pass over each
sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_ft.data.layout import Example, TokenBatch, collate_examples
from lightning_ft.data.shared_prompts import lay_out_completions
from lightning_ft.errors import LightningFTError, ModelError
from lightning_ft.models.backbone import Backbone, head_of, takes_positions, up_to_head, without_positions
from lightning_ft.models.block_mask import takes_block_masks
from lightning_ft.models.head import (
    CausalLM,
    as_forward,
    base_of,
    hidden_states,
    input_device,
    project,
    takes_explicit_masks,
)
from lightning_ft.models.numerics import are_close, tolerance_of
from lightning_ft.read_errors import first_line

Rows = Literal["any", "equal", "one"]
_CLEARLY_DIFFERENT = 5e-2  # relative to the largest value: rounding explains less than that in every dtype
_NOT_FINITE = "gives logits that are not finite, so no fast path can be compared with them"


@dataclass(frozen=True)
class Exactness:
    """Which fast paths are exact for a model.

    Args:
        head: Why log-probs must be computed from the model's own logits; None if projecting selected hidden states
            gives the same, or if the model has no head for tokens.
        backbone: Callable that computes the hidden states; None for the model's base module.
        positions: Whether position ids counted from 0 are those that the model counts itself.
        packing: Why sequences can't share a row; None if packed sequences don't see each other.
        rows: Which rows may share a pass: any, only rows of equal length, or one row per pass.
        sharing: Why completions can't share a prompt that is computed once; None if they can.
        sliding_window: Maximum length of a sequence with a shared prompt. Beyond it the model's layers attend to a part
            of the sequence only, which the explicit mask of shared prompts doesn't express. None for no limit.
    """

    head: str | None
    backbone: Backbone | None
    positions: bool
    packing: str | None
    rows: Rows
    sharing: str | None
    sliding_window: int | None


@torch.no_grad()
def probe(model: CausalLM) -> Exactness:
    """Compare the fast paths with the model's own forward pass on a few tokens.

    Args:
        model: A causal language model, or one without a head for tokens if only its hidden states are used.

    Raises:
        ModelError: If the model's own forward pass fails.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _Probe(model).run()
    finally:
        for module, training in modes:
            module.training = training


def own_logits(model: CausalLM, batch: TokenBatch, *, positions: bool = True, **options: object) -> Any:
    """Output of the model's own forward pass, with logits ``[b, s, v]``.

    Args:
        model: A causal language model.
        batch: The batch, packed only if that is exact for the model.
        positions: Whether to pass the batch's position ids.
        options: Further arguments of the forward pass.

    Raises:
        ModelError: If the forward pass fails.
    """
    if positions and takes_positions(base_of(model)):
        options["position_ids"] = batch.position_ids
    try:
        out = model(input_ids=batch.input_ids, use_cache=False, **options)
        _ = out.logits
    except (torch.OutOfMemoryError, LightningFTError):
        raise
    except Exception as error:
        raise forward_fails(base_of(model), error) from error
    return out


class _Probe:
    """Runs two sequences with the same prompt alone, as rows of a batch, packed, and with the prompt computed once."""

    def __init__(self, model: CausalLM) -> None:
        self._model, self._base = model, base_of(model)
        self._device, self._tolerance = input_device(self._base), tolerance_of(self._base)
        self._prompt, *self._completions = some_tokens(self._base, (4, 3, 5))
        self._sequences = [_supervised(torch.cat([self._prompt, completion])) for completion in self._completions]

    def run(self) -> Exactness:
        head, backbone, alone = self._states_alone()
        if head == _NOT_FINITE:  # no comparison is possible
            return Exactness(head, None, True, head, "any", head, smallest_window(self._base.config))
        positions = self._counts_from_zero() if alone is None else not _counts_itself(backbone)
        features: Callable[[TokenBatch], Tensor]
        if alone is None:  # compare logits instead
            unscaled = [self._logits(self._batch([s]), 1.0, positions)[0] for s in self._sequences]
            scale = float(unscaled[0].std().clamp(min=1e-6))  # to unit scale, like hidden states after a norm
            features = partial(self._logits, scale=scale, positions=positions)
            alone = [logits / scale for logits in unscaled]
        else:
            features = partial(self._hidden, backbone)
        rows = self._rows(features, alone)
        packing: str | None = "its rows change each other"
        if rows == "any":
            why = self._differs(lambda: features(self._batch(self._sequences, packing=True))[0], torch.cat(alone))
            packing = None if why is None else "it doesn't keep packed sequences apart" if why == "differ" else why
        sharing = packing or (self._why_no_sharing(features, alone) if head is None else "its own forward pass is used")
        return Exactness(head, backbone, positions, packing, rows, sharing, smallest_window(self._base.config))

    # ------------------------------------------------------------ where hidden states come from

    def _states_alone(self) -> tuple[str | None, Backbone | None, list[Tensor] | None]:
        """Why hidden states can't be projected, the backbone, and the states of each sequence, ``[t, d]``."""
        if head_of(self._base) is None:  # a sequence classifier has no logits to compare with
            return None, None, [self._hidden(None, self._batch([s]))[0] for s in self._sequences]
        logits = [self._alone(s) for s in self._sequences]
        expected = self._expected = torch.cat(
            [_picked(own, s.input_ids) for own, s in zip(logits, self._sequences, strict=True)]
        )
        if not bool(expected.isfinite().all()):
            return _NOT_FINITE, None, None
        self._refuse_bidirectional(logits)
        whole = partial(up_to_head, self._base)
        backbones: list[Backbone | None] = [whole, partial(without_positions, whole)]
        if self._base.base_model is not self._base:
            backbones[:0] = [None, partial(without_positions, self._base.base_model)]
        reasons: list[str] = []
        for backbone in backbones:
            states: list[Tensor] = []

            def projected(backbone: Backbone | None = backbone, states: list[Tensor] = states) -> Tensor:
                states += [self._hidden(backbone, self._batch([s]))[0] for s in self._sequences]
                pairs = zip(states, self._sequences, strict=True)
                return torch.cat(
                    [
                        as_forward(self._base, project, h[:-1], s.input_ids[1:].to(self._device)).logprobs
                        for h, s in pairs
                    ]
                )

            if (why := self._differs(projected, expected)) is None:
                return None, backbone, states
            reasons.append("changes its logits after the head in an unknown way" if why == "differ" else why)
        return reasons[0], None, None

    def _alone(self, sequence: Example) -> Tensor:
        """Logits of a sequence from a plain call of the model, ``fp32 [t, v]``."""
        try:
            out = self._model(input_ids=sequence.input_ids[None].to(self._device), use_cache=False)
            return cast(Tensor, out.logits)[0].float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise forward_fails(self._base, error) from error

    def _refuse_bidirectional(self, logits: Sequence[Tensor]) -> None:
        """Refuse a model whose logits at a prompt depend on the tokens after it: a causal model's don't."""
        count = len(self._prompt)

        def alike(one: Tensor, other: Tensor) -> bool:
            return are_close(one[:count], other[:count], _CLEARLY_DIFFERENT)

        if alike(*logits):
            return
        longest = max(self._completions, key=len)  # compare sequences of equal length too: only the completions differ
        pair = [_supervised(torch.cat([self._prompt, completion])) for completion in (longest, longest.flip(0))]
        one, again, other = (self._alone(s) for s in (pair[0], *pair))
        if alike(one, again) and not alike(one, other):  # a model with random outputs proves nothing
            raise ModelError(
                f"{type(self._base).__name__}: its output at a token depends on the tokens after it, so it isn't a "
                "causal language model and would be trained on completions that it sees. Load BERT-like models with "
                "is_decoder=True; models that read a prompt in both directions can't be trained here."
            )

    def _hidden(self, backbone: Backbone | None, batch: TokenBatch) -> Tensor:
        states: Tensor = as_forward(self._base, hidden_states, batch, backbone)
        if states.shape[:2] != batch.input_ids.shape:
            raise ModelError(f"its states have the shape {tuple(states.shape)}")
        return states

    def _logits(self, batch: TokenBatch, scale: float, positions: bool) -> Tensor:
        return cast(Tensor, own_logits(self._model, batch, positions=positions).logits).float() / scale

    def _counts_from_zero(self) -> bool:
        """Whether the model's own pass gives the same output with a batch's position ids as without."""

        def with_positions() -> Tensor:
            logits = [own_logits(self._model, self._batch([s])).logits[0].float() for s in self._sequences]
            return torch.cat([_picked(own, s.input_ids) for own, s in zip(logits, self._sequences, strict=True)])

        return self._differs(with_positions, self._expected) is None

    # ------------------------------------------------------------ what may share a pass

    def _rows(self, features: Callable[[TokenBatch], Tensor], alone: list[Tensor]) -> Rows:
        def together(sequences: Sequence[Example]) -> Tensor:
            states = features(self._batch(sequences))
            return torch.cat([row[: len(s)] for row, s in zip(states, sequences, strict=True)])

        if self._differs(lambda: together(self._sequences), torch.cat(alone)) is None:
            return "any"
        first = self._sequences[0]
        if self._differs(lambda: features(self._batch([first]))[0], alone[0]) is not None:
            return "any"  # the model's output is random: the rows don't change each other
        other = _supervised(first.input_ids.flip(0))
        expected = torch.cat([alone[0], features(self._batch([other]))[0]])
        return "equal" if self._differs(lambda: together([first, other]), expected) is None else "one"

    def _why_no_sharing(self, features: Callable[[TokenBatch], Tensor], alone: list[Tensor]) -> str | None:
        if not (takes_explicit_masks(self._base) or takes_block_masks(self._base)):
            attention = self._base.config._attn_implementation
            return f"attn_implementation={attention!r} takes no explicit mask ('sdpa', 'eager' and 'flex_attention' do)"
        completions = [_supervised(completion) for completion in self._completions]
        shared = lay_out_completions([self._prompt], [completions]).to(self._device)
        expected = torch.cat([alone[0], *(states[len(self._prompt) :] for states in alone[1:])])
        why = self._differs(lambda: features(shared)[0], expected)
        return "its states differ under an explicit mask" if why == "differ" else why

    def _batch(self, sequences: Sequence[Example], *, packing: bool = False) -> TokenBatch:
        if not packing:
            return collate_examples(sequences, packing=False).to(self._device)
        return collate_examples(sequences).to(self._device)

    def _differs(self, attempt: Callable[[], Tensor], expected: Tensor) -> str | None:
        """Why a fast path isn't exact: it fails, has values that aren't finite, or differs; None if it is exact."""
        try:
            actual = attempt().float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an architecture may raise anything, and the plain path still works
            return f"fails on a fast path ({type(error).__name__}: {first_line(error)})"
        if actual.shape != expected.shape:
            return "differ"
        if not bool(actual.isfinite().all()) and bool(expected.isfinite().all()):
            return "gives values that are not finite on a fast path"
        return None if are_close(actual, expected.float(), self._tolerance) else "differ"


def _picked(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token except the first, ``[t - 1]``, from logits ``[t, v]``."""
    return logits[:-1].log_softmax(-1).gather(-1, ids[1:, None].to(logits.device))[:, 0]


def _counts_itself(backbone: Backbone | None) -> bool:
    return isinstance(backbone, partial) and backbone.func is without_positions


def some_tokens(base: PreTrainedModel, lengths: Sequence[int]) -> list[Tensor]:
    """Token ids to probe a model with, ``int64 [t]`` each, without using the global random generators."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(base.config.get_text_config().vocab_size)
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]


def smallest_window(config: PreTrainedConfig) -> int | None:
    """The smallest sliding window or attention chunk of any layer, in tokens; None without either."""
    text = config.get_text_config()
    layer_types = getattr(text, "layer_types", None)
    sizes = []
    if layer_types is None or any("sliding" in layer_type for layer_type in layer_types):
        sizes.append(getattr(text, "sliding_window", None))
    if layer_types is None or any("chunked" in layer_type for layer_type in layer_types):
        sizes.append(getattr(text, "attention_chunk_size", None))
    return min((int(size) for size in sizes if size), default=None)


def _supervised(ids: Tensor) -> Example:
    return Example(ids, torch.ones(len(ids), dtype=torch.bool))


def forward_fails(base: PreTrainedModel, error: Exception) -> ModelError:
    """The error for a model whose forward pass over token ids fails."""
    return ModelError(
        f"{type(base).__name__}: its own forward pass over token ids fails, so it can't be trained or evaluated here "
        f"({type(error).__name__}: {first_line(error)}). Check that it is a causal language model that needs only "
        "text, and that its configuration fits its weights."
    )
