"""Modules that train every weight, or with `lora` an adapter: reward modelling, preferences and policies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.data.layout import Example, TokenBatch
from lightning_ft.errors import ConfigError
from lightning_ft.models.adapt import InitialAdapter, needs_data, rounds_base
from lightning_ft.models.adaptation import Adaptation
from lightning_ft.models.head import CausalLM
from lightning_ft.models.reference import Reference
from lightning_ft.models.shard import shard
from lightning_ft.modules.evaluation import EvaluatedFineTuning


class AdaptedFineTuning(EvaluatedFineTuning):
    """Base of the RLHF modules: full weights or LoRA by one argument, without dropout, completions behind prompts.

    Args:
        model: Hub name, local folder, or a loaded model. A folder that holds an adapter is continued on its own base.
        lora: True for the default adapter (every linear layer, rank 16, alpha 32), or `peft.LoraConfig` or a dict of
            its arguments over that; None trains every weight.
        learning_rate: Peak of the schedule; with an adapter the default is ten times that of full fine-tuning.
        dtype: Of the weights: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``. By default
            ``float32`` for full fine-tuning and ``auto`` under an adapter, which is fp32 itself.
        disable_dropout: Set every dropout to 0. Likelihood ratios compare two passes over the same tokens, and dropout
            would make them differ without any training.
        share_prompts: Compute a prompt once for all of its completions, where the model's attention can take it.
        options: Further arguments of `FineTuning`.
    """

    needs_reference: bool = False
    """Whether training compares with the model as it was before."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        lora: dict[str, Any] | LoraConfig | bool | None = None,
        learning_rate: float | None = None,
        dtype: str | None = None,
        disable_dropout: bool = True,
        share_prompts: bool = True,
        **options: Any,
    ) -> None:
        adaptation = Adaptation(model, lora, None)
        full = adaptation.kind == "full"
        if learning_rate is None:
            learning_rate = round(self.default_learning_rate * (1 if full else 10), 12)  # 1e-5, not 9.99...e-06
        super().__init__(model, learning_rate=learning_rate, dtype=dtype or ("float32" if full else "auto"), **options)
        self._adaptation = adaptation
        self._starting_adapter: InitialAdapter | None = None
        self._unsharded: list[PreTrainedModel] = []  # not a submodule
        self._hyper |= {
            "lora": adaptation.as_json(),
            "disable_dropout": disable_dropout,
            "share_prompts": share_prompts,
        }
        if adaptation.lora is not None and needs_data(adaptation.lora):
            raise ConfigError(
                "init_lora_weights='eva' is computed from input-output pairs: train such an adapter with "
                "LoRAFineTuning first, and give its folder as model=."
            )
        if full and self._hyper["quantization"] is not None:
            raise ConfigError("Quantized weights can't be trained: pass lora=True to train an adapter over them.")

    def _adapt(self, base: PreTrainedModel) -> CausalLM:
        copies = self.needs_reference and self._adaptation.kind == "full"
        sharded = getattr(self, "_device_mesh", None) is not None
        if copies and sharded and isinstance(self._given[0], PreTrainedModel):
            self._unsharded.append(copy.deepcopy(base))  # now: it can't be copied once it is sharded, or loaded again
        model = super()._adapt(base)
        if self._hyper["disable_dropout"]:
            without_dropout(model)
        lora = self._adaptation.lora
        self._starting_adapter = self._initial
        if self._initial is None and isinstance(model, PeftModel) and (lora is None or rounds_base(lora)):
            self._starting_adapter = InitialAdapter(model)  # now: once it is sharded it can't be saved
        return model

    def new_reference(self) -> Reference:
        """The model as it is now, to compare with; call it before the first step.

        Raises:
            ConfigError: If the adapter trains biases of the base, which no reference without a copy of it could undo.
        """
        if isinstance(self.model, PeftModel):
            bias = getattr(self.model.active_peft_config, "bias", "none")
            if bias != "none":
                raise ConfigError(
                    f"lora's bias={bias!r} trains biases of the base, so the model without its adapter would no longer "
                    "be the reference that training started from. Leave bias out (lora_bias=True trains biases of the "
                    "adapter), or train every weight with lora=None."
                )
        mesh = getattr(self, "_device_mesh", None)
        load: Callable[[], PreTrainedModel] | None = self._load_base
        if isinstance(self._given[0], PreTrainedModel):
            load = self._unsharded.pop if self._unsharded else None
        return Reference(
            self.model,
            initial=self._starting_adapter,
            load=load,
            place=(lambda copied: shard(copied, mesh)) if mesh is not None else lambda copied: None,
        )

    def lay_out(self, prompts: Sequence[Tensor], completions: Sequence[Sequence[Example]]) -> TokenBatch:
        """Prompts and their completions as one batch on the model's device.

        Args:
            prompts: Token ids, ``int64 [t]`` each; none at all gives a batch without targets, with which a rank takes
                part in a step that it has no rows for.
            completions: For each prompt what follows it.
        """
        if not prompts:
            pad = torch.tensor([self._required_logprob_model().pad_token_id])
            prompts, completions = [pad], [[Example(pad, torch.zeros(1, dtype=torch.bool))]]
        return self._required_logprob_model().lay_out(
            self.model, prompts, completions, share_prompts=self._hyper["share_prompts"]
        )


def per_completion(values: Tensor, batch: TokenBatch, count: int) -> Tensor:
    """Sum of the targets' values of each completion.

    Args:
        values: One for each target, ``[n]``.
        batch: Theirs.
        count: `c`, how many completions there are; 0 for a batch that only takes part.

    Returns:
        ``[c]``, attached to `values` also where there is none.
    """
    sums = values.new_zeros(max(count, batch.num_groups)).index_add(0, batch.groups, values)
    return sums[:count]


def without_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, those that attention layers keep as numbers too."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _dropout_numbers(module):
            setattr(module, name, 0.0)


def _dropout_numbers(module: nn.Module) -> Iterator[str]:
    for name, value in list(vars(module).items()):
        if "dropout" in name and isinstance(value, float):
            yield name
