"""Reward modeling: learning a number that is larger for preferred completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.arguments import check_nonnegative
from lightning_ft.data.batches import PreferenceBatch, PromptBatch
from lightning_ft.data.encode import encode_conversation
from lightning_ft.data.layout import TokenBatch
from lightning_ft.data.shared_prompts import last_positions
from lightning_ft.data.tokenizers import pad_token_id
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.losses.pairwise import bradley_terry_loss
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, as_forward, base_of, hidden_states
from lightning_ft.models.load import load_reward_model
from lightning_ft.models.reward_head import last_token_rewards, reward_head
from lightning_ft.modules.checks import check_batch, checked_inputs
from lightning_ft.modules.options import AdaptedOptions, Unpack
from lightning_ft.modules.preferences import BatchLosses, PreferenceLearning
from lightning_ft.types import Message


class RewardModeling(PreferenceLearning):
    """Train a reward model on preferences with the Bradley-Terry loss (https://arxiv.org/abs/2203.02155).

    The reward is read at the last token of a rendered conversation. The head that reads it is new and always trained,
    under LoRA too.

    Args:
        model: Hub name, local folder, or a loaded sequence-classification model with one label; of a causal language
            model the backbone is taken.
        centering: Weight of the squared sum of a pair's rewards, which keeps them around 0
            (https://arxiv.org/abs/2312.09244); TRL's `center_rewards_coefficient`.

    Raises:
        ConfigError: For settings that contradict each other.

    Example:
        >>> module = RewardModeling("Qwen/Qwen3-0.6B", lora=True, centering=0.01)  # no weights are loaded yet
        >>> module.hparams["lora"]["task_type"], module.hparams["centering"]
        ('SEQ_CLS', 0.01)
    """

    default_learning_rate: ClassVar[float] = 1e-5
    default_dtype: ClassVar[str] = "float32"

    def __init__(
        self, model: str | PreTrainedModel, *, centering: float = 0.0, **options: Unpack[AdaptedOptions]
    ) -> None:
        super().__init__(model, **options)
        check_nonnegative("centering", centering, ConfigError)
        if self._adaptation.mode == "adapter" and self._adaptation.base is not None and not _is_reward_adapter(model):
            raise ConfigError(
                f"{model!r} is an adapter of a language model, which has no reward head: export it with merge=True, "
                "and pass that folder."
            )
        if self._adaptation.lora is not None:  # without it PEFT leaves the new head frozen
            self._adaptation.lora = replace(self._adaptation.lora, task_type="SEQ_CLS")
        self.centering = float(centering)
        self.record_arguments({"lora": self._adaptation.as_json(), "centering": self.centering})

    def _load_base(self) -> PreTrainedModel:
        model = self._model_argument[0]
        if isinstance(model, PreTrainedModel):
            base = model.train()
        else:
            with torch.random.fork_rng(devices=[]):  # the new head must be the same on every rank, and when resumed
                torch.manual_seed(self.model_options.seed)
                base = load_reward_model(self._base_name(), **self._load_options())
        reward_head(base)
        if base.config.num_labels != 1:
            raise ModelError(
                f"The model classifies into {base.config.num_labels} labels, and a reward model has one: load it with "
                "num_labels=1."
            )
        _set_pad_token(base, self.tokenizer)
        return cast(PreTrainedModel, base)

    def _follow_tokenizer(self) -> None:
        super()._follow_tokenizer()
        _set_pad_token(base_of(self.model), self.tokenizer)

    def _adapt(self, base: PreTrainedModel) -> CausalLM:
        model = super()._adapt(base)
        _train_head_in_fp32(reward_head(model))
        return model

    # ---------------------------------------------------------------- training

    def check_paired(self, paired: bool) -> None:
        """Refuse completions with a label.

        Raises:
            ConfigError: If the rows aren't pairs.
        """
        if not paired:
            raise ConfigError("A reward model learns from pairs: rows need prompt, chosen and rejected.")

    def compute_loss(self, batch: PreferenceBatch) -> BatchLosses:
        """Bradley-Terry losses of pairs, and how often the chosen completion has the larger reward."""
        self.check_paired(batch.paired)
        tokens = self.lay_out(batch.prompts, batch.completions)
        rewards = as_forward(base_of(self.model), _last_rewards, tokens)[: 2 * len(batch)]  # [2 p]
        chosen, rejected = rewards.view(-1, 2).unbind(1)
        losses = bradley_terry_loss(chosen, rejected, batch.margins, self.centering)
        with torch.no_grad():
            metrics = {
                "accuracy": (chosen > rejected).float(),
                "margin": chosen - rejected,
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
            }
        return BatchLosses(losses, metrics)

    # ---------------------------------------------------------------- rewards

    def score_conversations(self, conversations: Sequence[Sequence[Message]], *, batch_size: int = 32) -> Tensor:
        """Compute the rewards of whole conversations, the answer last, in eval mode and without gradients.

        Args:
            conversations: The conversations.
            batch_size: Number of conversations per forward pass.

        Returns:
            ``float32 [n]``.

        Raises:
            ConfigError: For a single conversation instead of a list of them, or one that doesn't end with an answer.
        """
        conversations = checked_inputs(conversations, texts=False)
        self.configure_model()
        for number, turns in enumerate(conversations):
            if not turns or turns[-1].get("role") != "assistant":
                raise ConfigError(
                    f"Conversation {number} doesn't end with an answer: a reward model reads whole conversations, the "
                    "assistant's turn last."
                )
        rows = [encode_conversation(self.tokenizer, list(messages)).input_ids for messages in conversations]
        batch = PromptBatch([""] * len(rows), rows, {})
        check_batch(self.model, self.tokenizer, batch, name="A conversation")
        with evaluating(self.model):
            return last_token_rewards(self.model, rows, pad_token_id(self.tokenizer), batch_size=batch_size)

    def predict_step(self, batch: Sequence[Sequence[Message]], batch_idx: int, dataloader_idx: int = 0) -> list[float]:  # type: ignore[override]
        """Rewards of a batch of conversations."""
        return [float(reward) for reward in self.score_conversations(batch)]

    def generate(self, inputs: object, **options: object) -> list[str]:
        """Refused: a reward model generates nothing.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("A reward model doesn't generate: use score_conversations().")


def _last_rewards(base: PreTrainedModel, batch: TokenBatch) -> Tensor:
    hidden = hidden_states(base, batch)  # [b, s, d]
    last = hidden.flatten(0, 1).index_select(0, last_positions(batch))  # [c, d]
    return reward_head(base)(last)[:, 0].float()  # type: ignore[no-any-return]


def _train_head_in_fp32(head: nn.Module) -> None:
    """Keep the trained head over a frozen bf16 base in fp32, as PEFT keeps adapters: bf16 would lose small steps."""
    if isinstance(head, ModulesToSaveWrapper):
        trained = head.modules_to_save[head.active_adapters[0]].float()
        trained.register_forward_pre_hook(_to_own_dtype)


def _to_own_dtype(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].to(next(module.parameters()).dtype),)


def _is_reward_adapter(model: Any) -> bool:
    """Whether an adapter folder holds a reward model."""
    from peft import PeftConfig

    return str(getattr(PeftConfig.from_pretrained(model), "task_type", "")) in ("SEQ_CLS", "TaskType.SEQ_CLS")


def _set_pad_token(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a pad token in the model's configuration that is not an end token.

    An export is used with transformers' own forward pass, which reads the reward at the last token that isn't the pad
    token: if padding were the EOS token, it would read one token early.

    Raises:
        ModelError: If the tokenizer has no special token to spare.
    """
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or pad == end:
        special = [i for i in tokenizer.all_special_ids if i not in (end, tokenizer.bos_token_id)]
        if tokenizer.unk_token_id is not None:
            special.insert(0, tokenizer.unk_token_id)
        spare = [i for i in dict.fromkeys(special) if i != end]
        if not spare:
            raise ModelError(
                "The tokenizer pads with its EOS token and has no other special token to pad with, so an exported "
                "reward model would read its rewards one token early. Set tokenizer.pad_token to a token that appears "
                "in no conversation."
            )
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spare[0])
        pad = tokenizer.pad_token_id
        rank_zero_warn(
            f"The tokenizer padded with its EOS token and now pads with {tokenizer.pad_token!r}, so that an exported "
            "reward model finds the last token of a conversation."
        )
    base.config.pad_token_id = pad
    text = base.config.get_text_config()
    text.pad_token_id = pad
