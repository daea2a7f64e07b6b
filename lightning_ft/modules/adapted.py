"""The base class of reward modeling, preference and policy learning: full weights, or an adapter by one argument."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.data.layout import Example, TokenBatch
from lightning_ft.errors import ConfigError
from lightning_ft.models.adapt import InitialAdapter, needs_data
from lightning_ft.models.adaptation import Adaptation
from lightning_ft.models.head import CausalLM
from lightning_ft.models.load_once import load_once
from lightning_ft.models.reference import Reference
from lightning_ft.modules.base import FineTuning
from lightning_ft.modules.options import CommonOptions, Unpack


class AdaptedFineTuning(FineTuning):
    """Base of the RLHF modules: full weights or LoRA, no dropout, and batches in which completions share prompts.

    Args:
        model: Hub name, local folder, or a loaded model. A folder that holds an adapter is continued on its own base.
        lora: Configuration of a new adapter: True for the default (every linear layer, rank 16, alpha 32), or a
            `peft.LoraConfig` or a dict of its arguments that override the default; None trains every weight.
        learning_rate: Learning rate at the peak of the schedule; with an adapter the default is ten times that of full
            fine-tuning.
        dtype: Dtype of the weights: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``. The default
            is ``float32`` for full fine-tuning and ``auto`` for the base of an adapter, which is fp32 itself.
        quantization: Quantization of a frozen base under an adapter: ``4bit`` (QLoRA), ``8bit``, or a dict of arguments
            for `BitsAndBytesConfig`.
        disable_dropout: Set every dropout to 0. Likelihood ratios compare two passes over the same tokens, and dropout
            would make them differ without any training.
        share_prompts: Compute each prompt once for all of its completions, where the model's attention allows it.
        options: Arguments of `FineTuning`.
    """

    needs_reference: bool = False
    """Whether training compares the model with what it was before."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        lora: dict[str, Any] | LoraConfig | bool | None = None,
        learning_rate: float | None = None,
        dtype: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        disable_dropout: bool = True,
        share_prompts: bool = True,
        **options: Unpack[CommonOptions],
    ) -> None:
        adaptation = Adaptation(model, lora, None)
        full = adaptation.mode == "full"
        if learning_rate is None:
            learning_rate = round(self.default_learning_rate * (1 if full else 10), 12)  # 1e-5, not 9.99...e-06
        dtype = dtype or ("float32" if full else "auto")
        super().__init__(model, learning_rate=learning_rate, dtype=dtype, **options)
        self.model_options = replace(self.model_options, quantization=quantization)
        self.disable_dropout, self.share_prompts = disable_dropout, share_prompts
        self._adaptation = adaptation
        self._starting_adapter: InitialAdapter | None = None
        self._unsharded: list[PreTrainedModel] = []  # not a submodule
        if adaptation.lora is not None and needs_data(adaptation.lora):
            raise ConfigError(
                "init_lora_weights='eva' is computed from input-output pairs: train such an adapter with "
                "LoRAFineTuning first, and pass its folder as `model`."
            )
        if full and quantization is not None:
            raise ConfigError("Quantized weights can't be trained: pass lora=True to train an adapter over them.")
        self.record_arguments(
            {
                "lora": adaptation.as_json(),
                "quantization": quantization,
                "disable_dropout": disable_dropout,
                "share_prompts": share_prompts,
            }
        )

    def _adapt(self, base: PreTrainedModel) -> CausalLM:
        copies = self.needs_reference and self._adaptation.mode == "full"
        if copies and self.sharded and isinstance(self._model_argument[0], PreTrainedModel):
            self._unsharded.append(copy.deepcopy(base))  # now: once sharded it can't be copied, nor loaded again
        model = super()._adapt(base)
        if self.disable_dropout:
            without_dropout(model)
        self._starting_adapter = self._adaptation.starting_adapter(model, self._initial)
        return model

    def new_reference(self) -> Reference:
        """The model as it is now, as a reference; call it before the first step.

        Raises:
            ConfigError: If the adapter trains biases of the base, which only a copy of the base could undo.
        """
        if isinstance(self.model, PeftModel):
            bias = getattr(self.model.active_peft_config, "bias", "none")
            if bias != "none":
                raise ConfigError(
                    f"bias={bias!r} in `lora` trains biases of the base, so the model without its adapter would no "
                    "longer be the reference that training started from. Leave bias out (lora_bias=True trains biases "
                    "of the adapter), or train every weight with lora=None."
                )
        load: Callable[[], PreTrainedModel] | None = self._load_base
        if self._loads_once:
            load = partial(load_once, self._load_base)
        if isinstance(self._model_argument[0], PreTrainedModel):
            load = self._unsharded.pop if self._unsharded else None
        return Reference(
            self.model,
            initial=self._starting_adapter,
            load=load,
            prepare_copy=self.shard if self.sharded else lambda copied: None,
        )

    def lay_out(self, prompts: Sequence[Tensor], completions: Sequence[Sequence[Example]]) -> TokenBatch:
        """Prompts and their completions as one batch on the model's device.

        Args:
            prompts: Token ids, ``int64 [t]`` each. Without any, the batch has no supervised token; a rank without rows
                takes part in a step with it.
            completions: The completions of each prompt.
        """
        if not prompts:
            pad = torch.tensor([self._required_logprob_model().pad_token_id])
            prompts, completions = [pad], [[Example(pad, torch.zeros(1, dtype=torch.bool))]]
        logprob_model = self._required_logprob_model()
        return logprob_model.lay_out(self.model, prompts, completions, share_prompts=self.share_prompts)


def per_completion(values: Tensor, batch: TokenBatch, count: int) -> Tensor:
    """Sum of the values of each completion's tokens.

    Args:
        values: One value per supervised token, ``[n]``.
        batch: The batch of these tokens.
        count: `c`, the number of completions; 0 for a batch that only takes part.

    Returns:
        ``[c]``, attached to the graph of `values` also where it is empty.
    """
    sums = values.new_zeros(max(count, batch.num_groups)).index_add(0, batch.groups, values)
    return sums[:count]


def without_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, including those that attention layers keep as numbers."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _dropout_numbers(module):
            setattr(module, name, 0.0)


def _dropout_numbers(module: nn.Module) -> Iterator[str]:
    for name, value in list(vars(module).items()):
        if "dropout" in name and isinstance(value, float):
            yield name
