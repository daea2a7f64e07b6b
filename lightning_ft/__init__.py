"""Fine-tune Hugging Face language models with PyTorch Lightning, and measure the tokens that this saves.

Public names are imported when they are first used: `import lightning_ft` alone imports neither Lightning nor
transformers, and the choice between the two Lightning packages is made as late as possible (see
`lightning_ft._lightning`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lightning_ft import console

if TYPE_CHECKING:
    from lightning_ft.callbacks.answer_quality import AnswerQuality
    from lightning_ft.callbacks.compute import ComputeMeter
    from lightning_ft.callbacks.export import ExportModel
    from lightning_ft.callbacks.frontier import RetentionFrontier
    from lightning_ft.callbacks.retention import Retention
    from lightning_ft.callbacks.samples import SampleCompletions
    from lightning_ft.callbacks.token_mean import TokenMeanAccumulation
    from lightning_ft.callbacks.token_savings import TokenSavings
    from lightning_ft.callbacks.trainable_checkpoint import TrainableCheckpoint
    from lightning_ft.data.pairs import PairDataModule
    from lightning_ft.data.preferences import PreferenceDataModule
    from lightning_ft.data.prompt_baseline import PromptBaseline
    from lightning_ft.data.prompts import PromptDataModule
    from lightning_ft.evaluation.savings.arithmetic import Prices
    from lightning_ft.evaluation.savings.endpoint import Endpoint
    from lightning_ft.modules.distillation import PromptDistillation
    from lightning_ft.modules.dpo import DPO
    from lightning_ft.modules.grpo import GRPO
    from lightning_ft.modules.kto import KTO
    from lightning_ft.modules.ppo import PPO
    from lightning_ft.modules.reward import RewardModeling
    from lightning_ft.modules.sft import FullFineTuning, LoRAFineTuning
    from lightning_ft.modules.sharded_strategy import ShardedStrategy

__version__ = "0.1.0"

console.hide_log_messages()
console.hide_warnings()

_HOME = {
    "FullFineTuning": "lightning_ft.modules.sft",
    "LoRAFineTuning": "lightning_ft.modules.sft",
    "PromptDistillation": "lightning_ft.modules.distillation",
    "RewardModeling": "lightning_ft.modules.reward",
    "DPO": "lightning_ft.modules.dpo",
    "KTO": "lightning_ft.modules.kto",
    "GRPO": "lightning_ft.modules.grpo",
    "PPO": "lightning_ft.modules.ppo",
    "PairDataModule": "lightning_ft.data.pairs",
    "PreferenceDataModule": "lightning_ft.data.preferences",
    "PromptDataModule": "lightning_ft.data.prompts",
    "TokenSavings": "lightning_ft.callbacks.token_savings",
    "PromptBaseline": "lightning_ft.data.prompt_baseline",
    "Prices": "lightning_ft.evaluation.savings.arithmetic",
    "Endpoint": "lightning_ft.evaluation.savings.endpoint",
    "Retention": "lightning_ft.callbacks.retention",
    "RetentionFrontier": "lightning_ft.callbacks.frontier",
    "ComputeMeter": "lightning_ft.callbacks.compute",
    "SampleCompletions": "lightning_ft.callbacks.samples",
    "ExportModel": "lightning_ft.callbacks.export",
    "AnswerQuality": "lightning_ft.callbacks.answer_quality",
    "TokenMeanAccumulation": "lightning_ft.callbacks.token_mean",
    "TrainableCheckpoint": "lightning_ft.callbacks.trainable_checkpoint",
    "ShardedStrategy": "lightning_ft.modules.sharded_strategy",
}

__all__ = [
    "FullFineTuning",
    "LoRAFineTuning",
    "PromptDistillation",
    "RewardModeling",
    "DPO",
    "KTO",
    "GRPO",
    "PPO",
    "PairDataModule",
    "PreferenceDataModule",
    "PromptDataModule",
    "TokenSavings",
    "PromptBaseline",
    "Prices",
    "Endpoint",
    "Retention",
    "RetentionFrontier",
    "ComputeMeter",
    "SampleCompletions",
    "ExportModel",
    "AnswerQuality",
    "TokenMeanAccumulation",
    "TrainableCheckpoint",
    "ShardedStrategy",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
