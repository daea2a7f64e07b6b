"""Log-probs by the fastest path that is exact for a model, or by its own forward pass if none is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.data.layout import Example, TokenBatch
from lightning_ft.data.rearrange import in_one_row, padded_to_multiple, unpack
from lightning_ft.data.row_costs import RowCosts, computes_seen_only
from lightning_ft.data.shared_prompts import lay_out_completions
from lightning_ft.distributed import warn
from lightning_ft.errors import LightningFTError, ModelError
from lightning_ft.losses.logprobs import SelectedLogProbs
from lightning_ft.models.backbone import Backbone
from lightning_ft.models.block_mask import takes_block_masks
from lightning_ft.models.exactness import Exactness, forward_fails, own_logits, probe
from lightning_ft.models.head import (
    CausalLM,
    Reduction,
    as_forward,
    base_of,
    completion_logprobs,
    hidden_states,
    input_device,
    refuse_several_passes,
)
from lightning_ft.models.lengths import LengthSwitch, length_switch
from lightning_ft.models.passes import Part, parts_of, sequence_lengths

if TYPE_CHECKING:
    from typing_extensions import Unpack


def for_attention(base: PreTrainedModel, batch: TokenBatch) -> TokenBatch:
    """Rows that hold several sequences joined to one, if the attention computes only what each token sees.

    FlashAttention also keeps sequences apart within a single row only. It can't express shared prefixes.
    """
    attention = base.config._attn_implementation
    several = batch.packed or (batch.has_shared_prefixes and takes_block_masks(base))
    return in_one_row(batch) if several and len(batch.input_ids) > 1 and computes_seen_only(attention) else batch


def row_costs(base: PreTrainedModel, device: torch.device) -> RowCosts:
    """Constants that layouts for a model on a device depend on."""
    width = getattr(base.config.get_text_config(), "hidden_size", None)
    return RowCosts.of(device.type, base.config._attn_implementation, None if width is None else int(width))


def full_logits_logprobs(
    model: CausalLM,
    batch: TokenBatch,
    reduction: Reduction,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    states: bool = False,
    positions: bool = True,
) -> SelectedLogProbs:
    """:func:`completion_logprobs` by the model's own forward pass, for models whose hidden states can't be projected.

    Raises:
        ModelError: If that forward pass fails.
    """
    out = own_logits(model, batch, positions=positions, **({"output_hidden_states": True} if states else {}))
    logits = out.logits.flatten(0, 1).index_select(0, batch.predictors).float() / temperature  # [n, v]
    every = logits.log_softmax(-1)
    logprobs = every.gather(-1, batch.targets[:, None])[:, 0]
    return SelectedLogProbs(
        logprobs.sum() if reduction == "sum" else logprobs,
        logits.argmax(-1) == batch.targets,
        -(every.exp() * every).sum(-1).detach() if entropy else None,
        out.hidden_states[-1].flatten(0, 1).index_select(0, batch.predictors) if states else None,
    )


class LogProbOptions(TypedDict, total=False):
    """Options of :func:`completion_logprobs`, which documents them and has their defaults."""

    temperature: float
    entropy: bool
    states: bool


class LogProbModel:
    """Computes log-probs with :func:`completion_logprobs`, or by the plain path if that isn't exact for the model.

    The model is probed once.

    Args:
        pad_token_id: Id of the padding token, put after the shorter rows of an unpacked batch.
        backbone: A compiled backbone to use in training.
    """

    def __init__(self, pad_token_id: int = 0, backbone: Backbone | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.backbone = backbone
        self._exactness: Exactness | None = None
        self._warned: set[str] = set()
        self._compiled_with_mask = False

    def exactness(self, model: PreTrainedModel | PeftModel) -> Exactness:
        """Which fast paths are exact for the model, probed once.

        Raises:
            ModelError: If the model's own forward pass fails.
        """
        if self._exactness is None:
            self._exactness = probe(model)
        return self._exactness

    def __call__(
        self, model: CausalLM, batch: TokenBatch, reduction: Reduction = "none", **options: Unpack[LogProbOptions]
    ) -> SelectedLogProbs:
        """Log-probs of a batch's targets; see :func:`completion_logprobs` for the options."""
        exactness = self.exactness(model)
        if exactness.head is not None:
            self._warn_once(
                model,
                f"{exactness.head}: its own forward pass is used, which holds the logits of the whole batch and takes "
                "more memory and time.",
            )
        batch = self.arranged(model, batch)
        parts = self._parts(model, batch)
        if parts is None:
            return self._one_pass(model, batch, reduction, options)
        return _merged([self._one_pass(model, part.batch, reduction, options) for part in parts], parts)

    def states(self, model: CausalLM, batch: TokenBatch) -> Tensor:
        """Hidden states that predict a batch's targets, ``[n, d]``, in the order of its targets.

        Raises:
            ModelError: If the logits of the model aren't a function of its last hidden states.
        """
        exactness, base = self.exactness(model), base_of(model)
        if exactness.head is not None:
            raise ModelError(f"{type(base).__name__}: {exactness.head}, so its hidden states can't be used alone.")
        batch = self.arranged(model, batch)
        parts = self._parts(model, batch)
        backbone = self._backbone(model)

        def run(part: TokenBatch) -> Tensor:
            hidden = as_forward(base, hidden_states, part, backbone)
            return hidden.flatten(0, 1).index_select(0, part.predictors)

        if parts is None:
            return run(batch)
        order = torch.cat([part.targets for part in parts]).argsort()
        return torch.cat([run(part.batch) for part in parts])[order]

    def _backbone(self, model: CausalLM) -> Backbone | None:
        """The compiled backbone, where it is the model's own and exact, or the one that is."""
        backbone = self.exactness(model).backbone
        if getattr(self.backbone, "_orig_mod", None) is base_of(model).base_model and backbone is None:
            return self.backbone  # a reference has its own
        return backbone

    def _one_pass(
        self, model: CausalLM, batch: TokenBatch, reduction: Reduction, options: LogProbOptions
    ) -> SelectedLogProbs:
        exactness, base = self.exactness(model), base_of(model)
        if exactness.head is not None:
            if (switch := self._switch(model)) is not None:
                switch.forget()
            return full_logits_logprobs(model, batch, reduction, positions=exactness.positions, **options)
        try:
            return completion_logprobs(model, batch, reduction=reduction, backbone=self._backbone(model), **options)
        except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
            if isinstance(error, LightningFTError):
                raise
            raise forward_fails(base, error) from error  # in train mode some models need more than token ids

    # ------------------------------------------------------------ which rows share a pass

    def arranged(self, model: PreTrainedModel | PeftModel, batch: TokenBatch) -> TokenBatch:
        """A batch in the layout that the model handles exactly: unpacked, or in one row, if packed rows would mix.

        Probes the model if that hasn't happened yet.

        Args:
            model: The model that will run the batch.
            batch: The batch.
        """
        exactness = self.exactness(model)
        if exactness.packing is not None and batch.packed:
            reason = exactness.packing.removeprefix("it ")
            self._warn_once(model, f"{reason}, so batches are unpacked and padded. Set packing=False to silence this.")
            return unpack(batch, pad_token_id=self.pad_token_id)
        base = base_of(model)
        return self._aligned(base, self._masked_once(base, for_attention(base, batch)))

    def _masked_once(self, base: PreTrainedModel, batch: TokenBatch) -> TokenBatch:
        """A packed batch with an explicit mask, if the model takes one and its sliding windows allow it.

        SDPA converts the mask that transformers derives from positions in every layer, and keeps each result for the
        backward pass. An explicit mask in the right dtype is shared by all layers. For FlexAttention, transformers
        compiles a function that forms a mask, for every new length.

        Code that is compiled with a mask is another than that without one. So once a compiled backbone has had one, all
        of its batches get one, also those whose rows happen to hold one sequence each.
        """
        if batch.has_shared_prefixes:
            self._compiled_with_mask = self.backbone is not None
            return batch
        exactness = self.exactness(base)
        attention = base.config._attn_implementation
        takes_one = exactness.sharing is None and (attention == "sdpa" or takes_block_masks(base))
        window = exactness.sliding_window
        if not takes_one or not (batch.packed or self._compiled_with_mask):
            return batch
        if window is not None and int(batch.position_ids.max()) >= window:
            return batch
        self._compiled_with_mask = self.backbone is not None
        return replace(batch, explicit_mask=True)

    def _aligned(self, base: PreTrainedModel, batch: TokenBatch) -> TokenBatch:
        """A batch whose rows have a length that masks are fast for on its device, if it gets a mask."""
        masked = batch.packed or batch.explicit_mask or batch.has_shared_prefixes
        multiple = row_costs(base, batch.input_ids.device).multiple if masked else 1
        return padded_to_multiple(batch, multiple, pad_token_id=self.pad_token_id)

    def takes_one_pass(self, model: CausalLM, batch: TokenBatch) -> bool:
        """Whether the sequences of an arranged batch can go through the model together."""
        return self._parts(model, batch) is None

    def _switch(self, model: CausalLM) -> LengthSwitch | None:
        switch: LengthSwitch | None = as_forward(base_of(model), length_switch)
        return switch

    def _parts(self, model: CausalLM, batch: TokenBatch) -> list[Part] | None:
        """The parts of a batch that need a pass each; None if one pass is enough."""
        rows, switch = self.exactness(model).rows, self._switch(model)
        if rows == "any" and switch is None:
            return None
        lengths = sequence_lengths(batch)
        if rows == "any":
            assert switch is not None
            groups, why = switch.groups(lengths), switch.why
        else:
            why = "lets the rows of a pass change each other"
            groups = [[i] for i in range(len(lengths))]
            if rows == "equal":
                why = "isn't exact for a row next to a longer one"
                groups = [[i for i, n in enumerate(lengths) if n == length] for length in sorted(set(lengths))]
        if len(groups) <= 1:
            return None
        refuse_several_passes(base_of(model), why)
        self._warn_once(model, f"{why}, so such a batch takes several passes. Its loss is right, it is only slower.")
        return parts_of(batch, groups)

    def lay_out(
        self,
        model: PreTrainedModel | PeftModel,
        prompts: Sequence[Tensor],
        completions: Sequence[Sequence[Example]],
        *,
        share_prompts: bool = True,
    ) -> TokenBatch:
        """Prompts and completions as one batch on the model's device, each prompt computed once where that is exact.

        Args:
            model: The model that will run the batch.
            prompts: Token ids of each prompt, ``int64 [t]``.
            completions: Completions of each prompt.
            share_prompts: False to repeat prompts even if the model can share them.
        """
        exactness = self.exactness(model)
        shared = share_prompts and any(len(group) > 1 for group in completions)
        if shared:
            lengths = [
                len(prompt) + len(completion)
                for prompt, group in zip(prompts, completions, strict=True)
                for completion in group
            ]
            reason = self._why_no_sharing(model, lengths)
            if reason is not None:
                self._warn_once(model, f"computes each prompt once for each completion, because {reason}.")
            shared = reason is None
        base, device = base_of(model), input_device(model)
        batch = lay_out_completions(
            prompts,
            completions,
            shared=shared,
            packing=exactness.packing is None,
            pad_token_id=self.pad_token_id,
            square=row_costs(base, device).square,
        )
        return self._aligned(base, batch.to(device))

    def _why_no_sharing(self, model: CausalLM, lengths: Sequence[int]) -> str | None:
        exactness, switch, longest = self.exactness(model), self._switch(model), max(lengths)
        if exactness.sharing is not None:
            return exactness.sharing
        if exactness.sliding_window is not None and longest > exactness.sliding_window:
            return f"{longest:,} tokens are more than its attention window of {exactness.sliding_window:,}"
        if switch is not None and len(switch.groups(lengths)) > 1:
            return f"it {switch.why}"
        return None

    def _warn_once(self, model: PreTrainedModel | PeftModel, what: str) -> None:
        key = what[:40]  # the numbers later in the message change from batch to batch
        if key not in self._warned:
            self._warned.add(key)
            warn(f"{type(base_of(model)).__name__} {what}", stacklevel=3)


def _merged(results: Sequence[SelectedLogProbs], parts: Sequence[Part]) -> SelectedLogProbs:
    """Merge the results of a batch's parts, in the order of the batch's targets."""
    order = torch.cat([part.targets for part in parts]).argsort()

    def whole(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present)[order] if present else None

    summed = results[0].logprobs.ndim == 0
    logprobs = [result.logprobs for result in results]
    correct = whole([result.correct for result in results])
    assert correct is not None
    return SelectedLogProbs(
        torch.stack(logprobs).sum() if summed else torch.cat(logprobs)[order],
        correct,
        whole([result.entropy for result in results]),
        whole([result.states for result in results]),
    )
