"""What is found out about a model before it is trusted with the fast paths.

Architectures differ in where their hidden states come from, in what they do after their head, in how they mix tokens
(state spaces and linear attention see through a packed row) and in what padding does. No list of names stays complete,
so the model itself is asked: each fast path is compared with the model's own forward pass over each sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.data.layout import Example, TokenBatch, collate_examples
from lightning_ft.data.shared_prompts import lay_out_completions
from lightning_ft.errors import LightningFTError, ModelError
from lightning_ft.models.backbone import head_of, takes_positions, up_to_head, without_positions
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

Rows = Literal["any", "equal", "one"]
Backbone = Callable[..., Any]
_PLAINLY = 5e-2  # of the largest value: no rounding in any dtype explains more
_NOT_FINITE = "gives logits that are not finite, so no fast path can be compared with them"


@dataclass(frozen=True)
class Exactness:
    """What was found out about a model before it was trusted with the fast paths.

    Args:
        head: Why log-probabilities are taken from the model's own logits; None where projecting selected hidden states
            gives them, or where the model has no such head.
        backbone: Gives those hidden states; None for the module that the model's class names.
        positions: Whether the position ids of a batch, from 0, are those that the model would count itself.
        packing: Why sequences can't share a row; None if packed ones don't see each other.
        rows: Which rows may share a pass: any, those of equal length, or none.
        sharing: Why completions can't share a prompt that is computed once; None if they can.
        window: Most tokens of a sequence that may share a prompt: beyond it the model's own layers attend to a part of
            the sequence only, which the explicit mask of shared prompts would not. None for no limit.
    """

    head: str | None
    backbone: Backbone | None
    positions: bool
    packing: str | None
    rows: Rows
    sharing: str | None
    window: int | None


@torch.no_grad()
def probe(model: CausalLM) -> Exactness:
    """Compare the fast paths with the model's own forward pass on a few tokens.

    Args:
        model: A causal language model or, where only its hidden states are wanted, one without a head for tokens.

    Raises:
        ModelError: If the model's own forward pass fails.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _Probe(model).found()
    finally:
        for module, training in modes:
            module.training = training


def own_logits(model: CausalLM, batch: TokenBatch, *, positions: bool = True, **options: Any) -> Any:
    """Output of the model's own forward pass, with logits ``[b, s, v]``.

    Args:
        model: A causal language model.
        batch: Its rows, packed only if that was found to be exact.
        positions: Whether to pass its position ids.
        options: Further arguments of the forward pass.

    Raises:
        ModelError: If it fails.
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
    """Two sequences that begin alike, ``[t]`` tokens each: alone, next to each other, in one row, with one prompt."""

    def __init__(self, model: CausalLM) -> None:
        self._model, self._base = model, base_of(model)
        self._device, self._tolerance = input_device(self._base), tolerance_of(self._base)
        self._prompt, *self._answers = some_tokens(self._base, (4, 3, 5))
        self._sequences = [_supervised(torch.cat([self._prompt, answer])) for answer in self._answers]

    def found(self) -> Exactness:
        head, backbone, alone = self._states_alone()
        if head == _NOT_FINITE:  # then no comparison says anything
            return Exactness(head, None, True, head, "any", head, smallest_window(self._base.config))
        positions = self._counts_from_zero() if alone is None else not _counts_itself(backbone)
        features: Callable[[TokenBatch], Tensor]
        if alone is None:  # compare logits instead
            rough = [self._logits(self._batch([s]), 1.0, positions)[0] for s in self._sequences]
            scale = float(rough[0].std().clamp(min=1e-6))  # of one size, as states behind a norm are
            features = partial(self._logits, scale=scale, positions=positions)
            alone = [logits / scale for logits in rough]
        else:
            features = partial(self._hidden, backbone)
        rows = self._rows(features, alone)
        packing: str | None = "its rows change each other"
        if rows == "any":
            why = self._differs(lambda: features(self._batch(self._sequences, packing=True))[0], torch.cat(alone))
            packing = None if why is None else "it doesn't keep packed sequences apart" if why == "differ" else why
        sharing = packing or (self._why_no_sharing(features, alone) if head is None else "its own forward pass is used")
        return Exactness(head, backbone, positions, packing, rows, sharing, smallest_window(self._base.config))

    # ------------------------------------------------------------ where states come from

    def _states_alone(self) -> tuple[str | None, Backbone | None, list[Tensor] | None]:
        """Why there are no states to project, what gives them, and those of each sequence, ``[t, d]``."""
        if head_of(self._base) is None:  # a sequence classifier: nothing to compare its states with
            return None, None, [self._hidden(None, self._batch([s]))[0] for s in self._sequences]
        logits = [self._alone(s) for s in self._sequences]
        expected = self._expected = torch.cat(
            [_picked(own, s.input_ids) for own, s in zip(logits, self._sequences, strict=True)]
        )
        if not bool(expected.isfinite().all()):
            return _NOT_FINITE, None, None
        self._refuse_sight_of_what_follows(logits)
        whole = partial(up_to_head, self._base)
        ways: list[Backbone | None] = [whole, partial(without_positions, whole)]
        if self._base.base_model is not self._base:
            ways[:0] = [None, partial(without_positions, self._base.base_model)]
        reasons: list[str] = []
        for way in ways:
            states: list[Tensor] = []

            def projected(way: Backbone | None = way, states: list[Tensor] = states) -> Tensor:
                states += [self._hidden(way, self._batch([s]))[0] for s in self._sequences]
                pairs = zip(states, self._sequences, strict=True)
                return torch.cat(
                    [
                        as_forward(self._base, project, h[:-1], s.input_ids[1:].to(self._device)).logprobs
                        for h, s in pairs
                    ]
                )

            if (why := self._differs(projected, expected)) is None:
                return None, way, states
            reasons.append(
                "changes its logits after the head in a way that isn't known here" if why == "differ" else why
            )
        return reasons[0], None, None

    def _alone(self, sequence: Example) -> Tensor:
        """Logits of a sequence as a user would ask for them, ``fp32 [t, v]``."""
        try:
            out = self._model(input_ids=sequence.input_ids[None].to(self._device), use_cache=False)
            return cast(Tensor, out.logits)[0].float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise forward_fails(self._base, error) from error

    def _refuse_sight_of_what_follows(self, logits: Sequence[Tensor]) -> None:
        """The sequences begin alike, so a model that predicts the next token gives their beginnings the same logits."""
        count = len(self._prompt)

        def alike(one: Tensor, other: Tensor) -> bool:
            return are_close(one[:count], other[:count], _PLAINLY)

        if alike(*logits):
            return
        longest = max(self._answers, key=len)  # once more with equally many tokens: only what follows differs
        pair = [_supervised(torch.cat([self._prompt, answer])) for answer in (longest, longest.flip(0))]
        one, again, other = (self._alone(s) for s in (pair[0], *pair))
        if alike(one, again) and not alike(one, other):  # one that draws at random says nothing of what it sees
            raise ModelError(
                f"{type(self._base).__name__}: what it gives at a token depends on the tokens after it, so it isn't a "
                "causal language model as it is called here, and would learn answers that it sees. Load BERT and its "
                "kin with is_decoder=True; models that read a prompt in both directions can't be trained here."
            )

    def _hidden(self, backbone: Backbone | None, batch: TokenBatch) -> Tensor:
        states: Tensor = as_forward(self._base, hidden_states, batch, backbone)
        if states.shape[:2] != batch.input_ids.shape:
            raise ModelError(f"its states have the shape {tuple(states.shape)}")
        return states

    def _logits(self, batch: TokenBatch, scale: float, positions: bool) -> Tensor:
        return cast(Tensor, own_logits(self._model, batch, positions=positions).logits).float() / scale

    def _counts_from_zero(self) -> bool:
        """Whether the model's own pass gives the same with the positions of a batch as without."""

        def told() -> Tensor:
            found = [own_logits(self._model, self._batch([s])).logits[0].float() for s in self._sequences]
            return torch.cat([_picked(own, s.input_ids) for own, s in zip(found, self._sequences, strict=True)])

        return self._differs(told, self._expected) is None

    # ------------------------------------------------------------ what may share a pass

    def _rows(self, features: Callable[[TokenBatch], Tensor], alone: list[Tensor]) -> Rows:
        def together(sequences: Sequence[Example]) -> Tensor:
            states = features(self._batch(sequences))
            return torch.cat([row[: len(s)] for row, s in zip(states, sequences, strict=True)])

        if self._differs(lambda: together(self._sequences), torch.cat(alone)) is None:
            return "any"
        first = self._sequences[0]
        if self._differs(lambda: features(self._batch([first]))[0], alone[0]) is not None:
            return "any"  # it draws at random: not the rows change each other
        other = _supervised(first.input_ids.flip(0))
        expected = torch.cat([alone[0], features(self._batch([other]))[0]])
        return "equal" if self._differs(lambda: together([first, other]), expected) is None else "one"

    def _why_no_sharing(self, features: Callable[[TokenBatch], Tensor], alone: list[Tensor]) -> str | None:
        if not takes_explicit_masks(self._base):
            kind = self._base.config._attn_implementation
            return f"attn_implementation={kind!r} takes no explicit mask ('sdpa' and 'eager' do)"
        behind = [_supervised(answer) for answer in self._answers]
        forest = lay_out_completions([self._prompt], [behind]).to(self._device)
        want = torch.cat([alone[0], *(states[len(self._prompt) :] for states in alone[1:])])
        why = self._differs(lambda: features(forest)[0], want)
        return "its states differ under an explicit mask" if why == "differ" else why

    def _batch(self, sequences: Sequence[Example], *, packing: bool = False) -> TokenBatch:
        if not packing:
            return collate_examples(sequences, packing=False).to(self._device)
        return collate_examples(sequences).to(self._device)

    def _differs(self, attempt: Callable[[], Tensor], expected: Tensor) -> str | None:
        """Why a fast path can't be taken: it fails, isn't finite where the model's own pass is, or gives other values.

        None if it is exact.
        """
        try:
            actual = attempt().float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an architecture raises: the plain path is left
            return f"fails where a fast path is tried ({type(error).__name__}: {first_line(error)})"
        if actual.shape != expected.shape:
            return "differ"
        if not bool(actual.isfinite().all()) and bool(expected.isfinite().all()):
            return "gives values that are not finite where a fast path is tried"
        return None if are_close(actual, expected.float(), self._tolerance) else "differ"


def _picked(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token but the first, ``[t - 1]``, from logits ``[t, v]``."""
    return logits[:-1].log_softmax(-1).gather(-1, ids[1:, None].to(logits.device))[:, 0]


def _counts_itself(backbone: Backbone | None) -> bool:
    return isinstance(backbone, partial) and backbone.func is without_positions


def some_tokens(base: PreTrainedModel, lengths: Sequence[int]) -> list[Tensor]:
    """Token ids to try a model with, ``int64 [t]`` each; no number of the global generators is drawn."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(base.config.get_text_config().vocab_size)
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]


def smallest_window(config: Any) -> int | None:
    """The smallest window that any layer attends to."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    found = []
    if kinds is None or any("sliding" in kind for kind in kinds):
        found.append(getattr(text, "sliding_window", None))
    if kinds is None or any("chunked" in kind for kind in kinds):
        found.append(getattr(text, "attention_chunk_size", None))
    return min((int(size) for size in found if size), default=None)


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return next(iter(str(error).splitlines()), "")[:200]


def _supervised(ids: Tensor) -> Example:
    return Example(ids, torch.ones(len(ids), dtype=torch.bool))


def forward_fails(base: PreTrainedModel, error: Exception) -> ModelError:
    """What to raise where a model's forward pass fails over nothing but token ids."""
    return ModelError(
        f"{type(base).__name__}: its own forward pass over token ids fails, so it can't be trained or asked here "
        f"({type(error).__name__}: {first_line(error)}). Check that it is a causal language model that needs nothing "
        "but text, and that its configuration fits its weights."
    )
