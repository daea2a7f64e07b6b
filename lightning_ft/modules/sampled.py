"""Completions sampled from a module's own model, and their rewards."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.data.batches import PromptBatch
from lightning_ft.data.prompts import Prompt, Prompts
from lightning_ft.data.row_types import RowType
from lightning_ft.data.splits import SplitName
from lightning_ft.distributed import rank_zero_warn, sum_over_ranks
from lightning_ft.errors import ConfigError, NonFiniteError, RolloutError
from lightning_ft.losses.statistics import mean_and_std, power_sums
from lightning_ft.models.generate import NEUTRAL_SETTINGS, altering_settings, end_token_ids, restoring_modes
from lightning_ft.models.vocabulary import embedding_rows
from lightning_ft.modules.adapted import AdaptedFineTuning
from lightning_ft.modules.checkpoint_io import refuse_code_of_checkpoint
from lightning_ft.modules.options import AdaptedOptions, Unpack
from lightning_ft.modules.rollout_batch import RolloutBatch
from lightning_ft.modules.samples import RolloutSamples
from lightning_ft.modules.waiting import PatientRanks
from lightning_ft.rewards.batch import Rewards, TrainerState
from lightning_ft.rewards.functions import RewardFunctions
from lightning_ft.rewards.logged import Logged, add_logged, means_over_ranks
from lightning_ft.rewards.model import check_context_length
from lightning_ft.rewards.resolve import find_function
from lightning_ft.rollout.choice import check_choice, make_engine
from lightning_ft.rollout.protocol import RolloutEngine, Sampling, check_rollouts
from lightning_ft.types import Message, Request

_VALIDATION_SEED = 0
_SPLITS_OF_STAGE: dict[str, tuple[SplitName, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
}


class SampledCompletions(AdaptedFineTuning):
    """Samples completions of prompts and computes their rewards, in training and in validation.

    Args:
        model: Hub name, local folder, or a loaded model; usually one that was fine-tuned on pairs before.
        rewards: Reward functions: a function with TRL's signature, a reward model, an import path, or a list of them;
            see `lightning_ft.rewards.functions.RewardFunctions`.
        reward_weights: Weight of each reward function in the total; 1 by default.
        validation_rewards: Further reward functions for validation prompts only, never trained on. A true reward that
            falls while the trained one rises reveals reward hacking.
        num_completions: Number of completions per prompt.
        max_new_tokens: Largest number of tokens of a completion.
        temperature: Temperature of the distribution that is sampled from, and trained.
        top_p: Sample only from the likeliest tokens that together have this probability.
        top_k: Sample only from this many of the likeliest tokens; 0 for all.
        min_p: Sample only from tokens at least this probable, as a share of the likeliest token's probability.
        stop: Strings that end a completion.
        rollout_batch_size: Number of completions sampled at a time per rank.
        vllm: Sample on a vLLM server: True, or arguments of `lightning_ft.rollout.vllm.VLLMEngine`. With ``mode:
            colocated`` on the GPU of training: arguments of `lightning_ft.rollout.vllm_colocated.ColocatedVLLMEngine`.
        continuous_batching: Sample with transformers' continuous batching: True, or arguments of its
            `ContinuousBatchingConfig`, see `lightning_ft.rollout.continuous_batching.ContinuousBatchingEngine`.
        merge_adapter: Sample with the adapter merged into copies of the weights it changes: faster, and takes their
            memory during a rollout. In half precision their rounding changes probabilities a little.
        engine: Engine of your own that samples the completions, see `lightning_ft.rollout.protocol.RolloutEngine`; None
            for the built-in ones. It is not saved: pass it to `load_from_checkpoint` again.
        options: Arguments of `AdaptedFineTuning` and `FineTuning`.
    """

    row_type: ClassVar[type[RowType[Any]] | None] = Prompts
    purpose: ClassVar[str] = "samples completions of prompts"

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        rewards: Any,
        reward_weights: list[float] | None = None,
        validation_rewards: Any = None,
        num_completions: int = 8,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: str | list[str] | None = None,
        rollout_batch_size: int = 64,
        vllm: bool | dict[str, Any] = False,
        continuous_batching: bool | dict[str, Any] = False,
        merge_adapter: bool = False,
        engine: RolloutEngine | None = None,
        **options: Unpack[AdaptedOptions],
    ) -> None:
        super().__init__(model, **options)
        for name, number in (
            ("num_completions", num_completions),
            ("max_new_tokens", max_new_tokens),
            ("rollout_batch_size", rollout_batch_size),
        ):
            if number < 1:
                raise ConfigError(f"{name}={number}: expected at least 1.")
        check_choice(engine, vllm, continuous_batching, merge_adapter)
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        self.sampling = Sampling(float(temperature), float(top_p), int(top_k), float(min_p), stops)
        for argument, value in (("rewards", rewards), ("validation_rewards", validation_rewards)):
            refuse_code_of_checkpoint(argument, find_function(value))
        on_nonfinite = self.optimizer_options.on_nonfinite
        self.rewards = RewardFunctions(rewards, reward_weights, on_nonfinite=on_nonfinite)
        if not self.rewards.weights.any():
            raise ConfigError(
                f"The weights of {', '.join(self.rewards.names)} are all 0, so nothing would be learned: a reward of "
                "weight 0 is only logged. Give at least one another weight."
            )
        self.validation_rewards = (
            None
            if validation_rewards is None
            else RewardFunctions(validation_rewards, taken=self.rewards.names, on_nonfinite=on_nonfinite)
        )
        self.num_completions, self.max_new_tokens = num_completions, max_new_tokens
        ends = {"max_new_tokens": max_new_tokens, **({"stop_strings": list(stops)} if stops else {})}
        self.generation_options = {**self.generation_options, **ends, **(options.get("generation") or {})}
        self.rollout_batch_size, self._vllm = rollout_batch_size, vllm
        self._continuous_batching, self._merge_adapter = continuous_batching, merge_adapter
        self.record_arguments(
            {
                "rewards": _as_json(rewards),
                "reward_weights": reward_weights,
                "validation_rewards": _as_json(validation_rewards),
                "num_completions": num_completions,
                "max_new_tokens": max_new_tokens,
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "top_k": self.sampling.top_k,
                "min_p": self.sampling.min_p,
                "stop": list(stops),
                "rollout_batch_size": rollout_batch_size,
                "vllm": vllm,
                "continuous_batching": continuous_batching,
                "merge_adapter": merge_adapter,
            }
        )
        self.last_rollout: RolloutSamples | None = None
        """Samples of the last training step, for inspection."""
        self._engine: RolloutEngine | None = None
        self._engine_argument = (engine,)  # in a tuple, so that an engine that is a torch module is no submodule
        self._ranks = PatientRanks()
        self._warned_settings = False

    def setup(self, stage: str) -> None:
        """As in `FineTuning`; refuse rows without a column that a reward needs, before weights are loaded.

        Raises:
            RewardError: For them. What the user's own module or DataModule adds to the rows isn't known here.
        """
        super().setup(stage)
        data = self._row_data()
        if data is None or not all(type(part).__module__.startswith("lightning_ft.") for part in (self, data)):
            return
        for split in _SPLITS_OF_STAGE.get(stage, ()):
            if split == "validation" and self.trainer.limit_val_batches == 0:
                continue
            used = (self.rewards,) if split == "train" else (self.rewards, self.validation_rewards)
            parts = data.splits.rows.get(split, ())
            for row in [part[0] for part in parts if len(part) and isinstance(part[0], Prompt)][:1]:
                for rewards in used:
                    if rewards is not None:
                        rewards.check_columns(row.columns, "training rows" if split == "train" else f"{split} rows")

    # ---------------------------------------------------------------- sampling

    @property
    def engine(self) -> RolloutEngine:
        """The engine that samples, always with the current weights."""
        (passed,) = self._engine_argument
        if passed is not None:
            self.configure_model()
            return passed
        if self._engine is None:
            self.configure_model()
            self._engine = make_engine(
                self.model,
                self.tokenizer,
                batch_size=self.rollout_batch_size,
                vllm=self._vllm,
                continuous_batching=self._continuous_batching,
                merge_adapter=self._merge_adapter,
            )
        return self._engine

    @property
    def _new_tokens(self) -> int:
        return self.max_new_tokens

    def _follow_tokenizer(self) -> None:
        super()._follow_tokenizer()
        ends = getattr(self._engine, "end_token_ids", None)
        if ends is not None and list(ends) != end_token_ids(self.model, self.tokenizer):
            self._engine = None

    def on_fit_start(self) -> None:
        """As in `FineTuning`; load the reward models, so that a faulty one fails now."""
        super().on_fit_start()
        for rewards in (self.rewards, self.validation_rewards):
            if rewards is not None:
                rewards.to(self.device)
                if (data := self._row_data()) is not None:
                    check_context_length(rewards.models(), data.splits, self._new_tokens)

    def roll_out(self, batch: PromptBatch) -> RolloutBatch:
        """Sample completions of each prompt, and compute their rewards.

        Args:
            batch: The prompts; none on a rank that has none left.
        """
        rollout_batch = self._sample(batch, self.num_completions)
        rollout_batch.rewards = self._compute_rewards(self.rewards, rollout_batch)
        if rollout_batch.rewards.nonfinite:
            rollout_batch.nonfinite = f"{rollout_batch.rewards.nonfinite} rewards are not finite"
        return rollout_batch

    def _sample(self, batch: PromptBatch, count: int) -> RolloutBatch:
        if not isinstance(batch, PromptBatch):
            raise self.wrong_data(type(batch).__name__)
        engine = self.engine
        with restoring_modes(self.model):  # an engine may leave the model in eval mode
            if hasattr(engine, "sync_weights"):  # the `engine` of a subclass may do without
                engine.sync_weights(self.model)
            rollouts = engine.generate(
                [ids.tolist() for ids in batch.input_ids],
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                num_completions=count,
            )
        if engine is self._engine_argument[0]:
            self._check_rollouts(rollouts, type(engine).__name__, len(batch.input_ids) * count)
        ids = [list(completion.tokens) for completion in rollouts.completions]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []
        rollout_batch = RolloutBatch.of(batch, rollouts, list(texts), count)
        rollout_batch.nonfinite = self._nonfinite_logits(rollout_batch)
        return rollout_batch

    def _check_rollouts(self, rollouts: object, engine: str, expected: int) -> None:
        """Refuse what an engine of the user's own returned unless it fits; call it on all ranks."""
        problem: RolloutError | None = None
        try:
            check_rollouts(
                rollouts,
                engine,
                expected=expected,
                max_new_tokens=self.max_new_tokens,
                vocabulary=embedding_rows(self.model),
                end_token_ids=end_token_ids(self.model, self.tokenizer),
                finite=self.optimizer_options.on_nonfinite == "error",
            )
        except RolloutError as error:
            problem = error
        refused = int(sum_over_ranks(torch.tensor(float(problem is not None)), self.device))
        if problem is not None:
            raise problem
        if refused:
            raise RolloutError(f"What the engine {engine} returned on another rank was refused: see that rank's error.")

    def _nonfinite_logits(self, rollout_batch: RolloutBatch) -> str | None:
        """A message about completions that were sampled from non-finite logits, or None; call it on all ranks.

        Raises:
            NonFiniteError: If there are any on any rank, and ``on_nonfinite="error"``.
        """
        affected = rollout_batch.without_logprobs
        count = int(sum_over_ranks(torch.tensor(float(len(affected)), dtype=torch.float32), self.device))
        if not count:
            return None
        first = (
            f", the first of {str(rollout_batch.repeated_prompts[affected[0]])[:200]!r}"
            if affected
            else " on another rank"
        )
        problem = f"{count} completions were sampled from logits that are not finite{first}"
        if self.optimizer_options.on_nonfinite == "error":
            raise NonFiniteError(
                f"At optimizer step {self.trainer.global_step + 1} {problem}. The weights are those after step "
                f"{self.trainer.global_step}. Load the model in float32 or bfloat16, or skip such steps with "
                "on_nonfinite='skip'."
            )
        return problem

    def _compute_rewards(self, functions: RewardFunctions, rollout_batch: RolloutBatch) -> Rewards:
        repeats = range(rollout_batch.num_completions)
        columns = {name: [v for v in values for _ in repeats] for name, values in rollout_batch.source.columns.items()}
        ids = [completion.input_ids.tolist() for completion in rollout_batch.completions]
        trainer = self._trainer
        state = None
        if trainer is not None:
            state = TrainerState(trainer.global_step, trainer.current_epoch, trainer.max_steps)
        rewards = self._ranks.run(
            lambda: functions.compute(rollout_batch.repeated_prompts, rollout_batch.texts, ids, columns, state)
        )
        for c in rollout_batch.without_logprobs:  # its tokens were arbitrary
            rewards.per_function[c] = rewards.total[c] = torch.nan
        return rewards

    def generate(self, inputs: Sequence[str | list[Message] | Request], **options: Any) -> list[str]:
        """As in `FineTuning`; answers end where completions do, and ``do_sample=True`` samples as rollouts do.

        Penalties of the model's generation config, which rollouts don't apply, make answers differ from those of
        validation; a warning lists them once.
        """
        settings = {**self.generation_options, **options}
        if settings.get("do_sample"):
            sampling = {name: getattr(self.sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")}
            options = {**{name: value for name, value in sampling.items() if name not in settings}, **options}
        self.configure_model()
        altering = altering_settings(self.model, settings)
        if altering and not self._warned_settings:
            self._warned_settings = True
            names = ", ".join(f"{name}={value!r}" for name, value in altering.items())
            neutral = {name: NEUTRAL_SETTINGS[name] for name in altering}
            rank_zero_warn(
                f"Answers are generated with {names} (from the model's generation_config, or `generation`), which "
                "rollouts and validation don't apply, so they differ from the completions that were rewarded. To get "
                f"those, pass generation={neutral!r}; a server of the export applies its generation_config too."
            )
        return super().generate(inputs, **options)

    # ---------------------------------------------------------------- metrics

    def record(self, rollout_batch: RolloutBatch) -> RolloutSamples:
        """The samples of a rollout."""
        assert rollout_batch.rewards is not None
        return RolloutSamples(
            step=self.trainer.global_step,
            prompts=rollout_batch.repeated_prompts,
            completions=rollout_batch.texts,
            rewards=rollout_batch.rewards,
            advantages=[float(a.mean()) for a in rollout_batch.advantages],
            truncated=rollout_batch.truncated.tolist(),
            lengths=rollout_batch.lengths.tolist(),
        )

    def rollout_metrics(self, rollout_batch: RolloutBatch) -> dict[str, float]:
        """Means and standard deviations of a rollout over all ranks, by logged name."""
        assert rollout_batch.rewards is not None
        sums = _rollout_sums(rollout_batch, rollout_batch.rewards)
        means = [advantages.mean() for advantages in rollout_batch.advantages]
        sums["advantage"] = power_sums(torch.stack(means) if means else torch.zeros(0))
        metrics = self._means(sums)
        metrics.pop("advantage")
        return {f"train/{name}": value for name, value in metrics.items()}

    def _means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        totals = sum_over_ranks(torch.stack([value.cpu() for value in sums.values()]), self.device)
        metrics: dict[str, float] = {}
        for name, total in zip(sums, totals, strict=True):
            if not total[0]:
                continue  # no reward applied anywhere
            mean, std = mean_and_std(total)
            metrics[name] = float(mean)
            if name.startswith(("reward", "advantage")):
                metrics[f"{name}_std"] = float(std.nan_to_num(0.0))
        return metrics

    # ---------------------------------------------------------------- validation

    def add_evaluation(self, sums: _EvaluationSums | None, batch: PromptBatch, batch_idx: int) -> _EvaluationSums:
        """Sample one completion of each prompt, and compute its training and validation rewards."""
        with _own_random_stream(_VALIDATION_SEED + batch_idx * self.trainer.world_size + self.global_rank, self.device):
            rollout_batch = self._sample(batch, 1)
            rewards = self._compute_rewards(self.rewards, rollout_batch)
            added, logged = _rollout_sums(rollout_batch, rewards), rewards.logged
            if self.validation_rewards is not None:
                others = self._compute_rewards(self.validation_rewards, rollout_batch)
                added |= {name: value for name, value in others.statistics().items() if name != "reward"}
                logged = add_logged(logged, others.logged)
        added |= self._further_sums(rollout_batch)
        if sums is None:
            return _EvaluationSums({name: value.cpu() for name, value in added.items()}, logged)
        return _EvaluationSums(
            {name: value.cpu() + sums.values[name] for name, value in added.items()}, add_logged(sums.logged, logged)
        )

    def _further_sums(self, rollout_batch: RolloutBatch) -> dict[str, Tensor]:
        """Further metrics of validation completions, as `power_sums` by name."""
        return {}

    def evaluation_metrics(self, sums: _EvaluationSums) -> dict[str, float]:
        """Mean rewards and lengths over all completions of all ranks, and what reward functions logged."""
        metrics = self._means(sums.values)
        return metrics | means_over_ranks(sums.logged, metrics)


@dataclass(frozen=True)
class _EvaluationSums:
    """`power_sums` of an evaluation's metrics by name, and what its reward functions logged."""

    values: dict[str, Tensor]
    logged: Logged


@contextmanager
def _own_random_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a stream of this seed, and leave the training streams as they are."""
    before = random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)


def _rollout_sums(rollout_batch: RolloutBatch, rewards: Rewards) -> dict[str, Tensor]:
    return {
        **rewards.statistics(),
        "completion_length": power_sums(rollout_batch.lengths.float()),
        "truncated_fraction": power_sums(rollout_batch.truncated.float()),
    }


def _as_json(rewards: object) -> object:
    """Reward functions as JSON values: the import path of a function, not the function."""
    if isinstance(rewards, (list, tuple)):
        return [_as_json(reward) for reward in rewards]
    if isinstance(rewards, dict):
        return {str(name): _as_json(value) for name, value in rewards.items()}
    if rewards is None or isinstance(rewards, (str, int, float)):
        return rewards
    return f"{getattr(rewards, '__module__', '')}.{getattr(rewards, '__qualname__', type(rewards).__name__)}"
