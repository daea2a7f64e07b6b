"""Distillation of a prompt into the weights, from requests without answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.data.batches import PromptBatch
from lightning_ft.data.layout import Example, TokenBatch
from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.data.prompts import Prompt, Prompts
from lightning_ft.data.row_types import RowType
from lightning_ft.data.tokenizers import load_tokenizer, pad_token_id
from lightning_ft.errors import ConfigError
from lightning_ft.losses.distillation import DistillationLoss, Divergence, check_divergence
from lightning_ft.models.generate import end_token_ids, evaluating, restoring_modes
from lightning_ft.models.head import CausalLM, distill
from lightning_ft.models.load import LoadOptions, load_causal_lm
from lightning_ft.models.reference import Reference
from lightning_ft.models.vocabulary import embedding_rows
from lightning_ft.modules.adapted import AdaptedFineTuning
from lightning_ft.modules.options import DistillationOptions, Unpack
from lightning_ft.modules.sft import SupervisedFineTuning
from lightning_ft.modules.step_metrics import MeanMetrics, TokenMetrics, with_mean_value
from lightning_ft.modules.teacher import PromptedTeacher
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling

Answers = Literal["teacher", "student"]
_LONGEST = 16
"""Number of rows, the longest by their characters, whose lengths with the prompt are checked before training."""


class PromptDistillation(SupervisedFineTuning, AdaptedFineTuning):
    """Train a prompt into the weights, from requests alone: the model with the prompt teaches the model without it.

    The teacher reads the prompt before each request, the student the request alone. The loss is the divergence of the
    student's next-token distributions from the teacher's at the tokens of an answer, a mean over the tokens of the
    whole optimizer step. It is known as context distillation (Askell et al. 2021, https://arxiv.org/abs/2112.00861;
    Snell et al. 2022, https://arxiv.org/abs/2209.15189), with the divergences and the student's own answers as in GKD
    (Agarwal et al. 2024, https://arxiv.org/abs/2306.13649).

    Requests come from a `PromptDataModule`. Whether it worked, `TokenSavings` measures with the same prompt.

    Args:
        model: Hub name, local folder, or a loaded model.
        prompt: The prompt to train in: a `PromptBaseline`, a dict of its arguments, or the path of a JSON file. The
            column `prompt_context` of a row ends the system prompt.
        teacher: Model that reads the prompt: a hub name, local folder or loaded model with the same tokenizer. By
            default the model itself as it was before training, which with an adapter takes no memory.
        answers: Whose answers are learned from: the ``teacher``'s, or the ``student``'s own as it learns (on-policy).
        temperature: Temperature that answers are sampled with; 0 takes the most probable tokens. The teacher's most
            probable answers are generated once per request.
        max_new_tokens: Largest number of tokens of an answer.
        divergence: ``forward_kl`` (KL from teacher to student), ``reverse_kl``, or ``jsd``, a mixture of both.
        beta: Share of the teacher in the mixture of ``jsd``.
        ce_coef: Weight of the cross-entropy of the answers' tokens.
        rollout_batch_size: Number of answers generated at a time per rank.
        options: Arguments of `AdaptedFineTuning` and `FineTuning`.

    Raises:
        ConfigError: For settings that contradict each other, and for a teacher with another tokenizer.
        SavingsError: For a prompt that can't be read.

    Example:
        >>> module = PromptDistillation("Qwen/Qwen3-0.6B", prompt={"system": "Answer in French."}, lora=True)
        >>> module.prompt.system, module.hparams["learning_rate"]  # no weights are loaded yet
        ('Answer in French.', 0.0002)
    """

    default_learning_rate: ClassVar[float] = 2e-5
    default_dtype: ClassVar[str] = "float32"
    trains_router_loss: ClassVar[bool] = False
    accuracy_name: ClassVar[str] = "token_agreement"
    row_type: ClassVar[type[RowType[Any]] | None] = Prompts
    purpose: ClassVar[str] = "answers requests"

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        prompt: PromptBaseline | dict[str, Any] | str,
        teacher: str | PreTrainedModel | None = None,
        answers: Answers = "teacher",
        temperature: float = 1.0,
        max_new_tokens: int = 128,
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        ce_coef: float = 0.0,
        rollout_batch_size: int = 64,
        **options: Unpack[DistillationOptions],
    ) -> None:
        super().__init__(model, **options)
        for name, number in (("max_new_tokens", max_new_tokens), ("rollout_batch_size", rollout_batch_size)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"{name}={number!r}: expected a whole number of at least 1.")
        if answers not in ("teacher", "student"):
            raise ConfigError(f"answers={answers!r}: expected 'teacher' or 'student'.")
        check_divergence(divergence, beta, ce_coef)
        self.prompt = _as_baseline(prompt)
        self.needs_reference = teacher is None
        self.answers, self.max_new_tokens, self.rollout_batch_size = answers, max_new_tokens, rollout_batch_size
        self.sampling = None if temperature == 0 else Sampling(float(temperature))
        self.divergence: Divergence = divergence
        self.beta, self.ce_coef = float(beta), float(ce_coef)
        self._teacher_argument = (teacher,)  # in a tuple, so that a model is no submodule
        self._reference: Reference | None = None
        self._teacher_model: list[PreTrainedModel] = []
        self._teacher: PromptedTeacher | None = None
        self._greedy_answers: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.record_arguments(
            {
                "prompt": asdict(self.prompt),
                "teacher": teacher if isinstance(teacher, str) or teacher is None else teacher.config._name_or_path,
                "answers": answers,
                "temperature": float(temperature),
                "max_new_tokens": max_new_tokens,
                "divergence": divergence,
                "beta": self.beta,
                "ce_coef": self.ce_coef,
                "rollout_batch_size": rollout_batch_size,
            }
        )

    # ---------------------------------------------------------------- setup

    def configure_model(self) -> None:
        """As in `FineTuning`; load the teacher, or keep the model as it is now."""
        if self.model is not None:
            return
        if self.sharded:
            raise ConfigError(
                "PromptDistillation can't train a sharded model (ModelParallelStrategy): use DDP or one device, where "
                "lora=True needs no second copy of the weights."
            )
        super().configure_model()
        (teacher,) = self._teacher_argument
        if teacher is None:
            self._reference = self.new_reference()
            return
        if isinstance(teacher, str):
            own = load_tokenizer(teacher, trust_remote_code=self.model_options.trust_remote_code)
            check_same_vocabulary(self.tokenizer, own, teacher)
            options: LoadOptions = {**self._load_options(), "revision": None, "quantization": None}
            teacher = load_causal_lm(teacher, **options)
        elif teacher is self._model_argument[0]:
            raise ConfigError(
                "teacher= is the model that is trained: leave it out, since by default the model as it was before "
                "training is the teacher."
            )
        if (rows := embedding_rows(teacher)) < len(self.tokenizer):
            raise ConfigError(
                f"teacher= has embeddings for {rows:,} tokens, and the tokenizer of the student has "
                f"{len(self.tokenizer):,}: pass a teacher with the same tokenizer."
            )
        self._teacher_model.append(cast(PreTrainedModel, teacher.requires_grad_(False).eval()))

    def on_fit_start(self) -> None:
        """As in `FineTuning`; move the teacher to the device."""
        super().on_fit_start()
        self._move_teacher()
        self._check_requests()
        self.seed_by_rank()

    def _check_requests(self) -> None:
        """Refuse requests that have the prompt already, or don't fit the teacher's context with it, before training."""
        data = self._row_data()
        for parts in data.splits.rows.values() if data is not None else ():
            rows = [row for part in parts for row in part if isinstance(row, Prompt)]
            having = sum(self.prompt.is_in(row.prompt) for row in rows if not isinstance(row.prompt, str))
            if having:
                raise ConfigError(
                    f"The system turn of {having:,} requests has the prompt already, so the student would read it, "
                    "too, and the teacher twice. Leave it out of the rows."
                )
            rows.sort(key=_characters, reverse=True)
            for row in rows[:_LONGEST]:
                self.teacher.check_request(row, self.max_new_tokens)

    def _move_teacher(self) -> None:
        if self._reference is not None:
            self._reference.to(self.device)
        for model in self._teacher_model:
            cast(torch.nn.Module, model).to(self.device)

    @property
    def teacher(self) -> PromptedTeacher:
        """The model that reads the prompt."""
        self.configure_model()
        if self._teacher is None:
            use = self._reference.use if self._reference is not None else lambda: _frozen(self._teacher_model[0])
            self._teacher = PromptedTeacher(self.prompt, self.tokenizer, use, batch_size=self.rollout_batch_size)
        return self._teacher

    def _follow_tokenizer(self) -> None:
        super()._follow_tokenizer()
        self._teacher = None
        self._greedy_answers.clear()

    # ---------------------------------------------------------------- steps

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:  # type: ignore[override]
        """Mean divergence per token, with the gradients of the sum, as in `SupervisedFineTuning`."""
        tokens, result = self.compare(batch, self.sampling, own=self.answers == "student")
        self._step_metrics.add(result.loss, result.agreed, tokens)
        loss = self.anchored(result.loss, tokens.num_targets, batch_idx)
        self.note_loss(batch_idx, loss)
        return with_mean_value(loss, tokens.num_targets)

    def compare(
        self, batch: PromptBatch, sampling: Sampling | None = None, *, own: bool = False
    ) -> tuple[TokenBatch, DistillationLoss]:
        """Answer requests, and compare the student with the teacher on the answers.

        Args:
            batch: The requests; none on a rank that has none left.
            sampling: How tokens of the answers are chosen; None for the most probable ones.
            own: Whether the answers are the student's own.

        Returns:
            Requests with answers as a batch, and the loss, summed over the answers' tokens.

        Raises:
            ConfigError: If the batch is no `PromptBatch`.
        """
        if not isinstance(batch, PromptBatch):
            raise self.wrong_data(type(batch).__name__)
        prompts = self.teacher.prompts(batch)
        requests = [ids.tolist() for ids in batch.input_ids]
        with restoring_modes(self.model):
            answers = self._own_answers(requests, sampling) if own else self._teacher_answers(prompts, sampling)
            teacher_states = self.teacher.states(prompts, answers)
        completions = [[Example(torch.tensor(a), torch.ones(len(a), dtype=torch.bool))] for a in answers]
        tokens = self.lay_out(batch.input_ids, completions)
        logprob_model = self._required_logprob_model()
        tokens = logprob_model.arranged(self.model, tokens)
        states = logprob_model.states(self.model, tokens)
        result = distill(
            self.model,
            states,
            tokens.targets,
            teacher_states.to(states.device),
            self.teacher.logits(),
            divergence=self.divergence,
            beta=self.beta,
            ce_coef=self.ce_coef,
        )
        return tokens, result

    def _own_answers(self, requests: list[list[int]], sampling: Sampling | None) -> list[tuple[int, ...]]:
        engine = LocalEngine(
            self.model,
            end_token_ids=end_token_ids(self.model, self.tokenizer),
            pad_token_id=pad_token_id(self.tokenizer),
            batch_size=self.rollout_batch_size,
        )
        rollouts = engine.generate(requests, max_new_tokens=self.max_new_tokens, sampling=sampling)
        return [tuple(completion.tokens) for completion in rollouts.completions]

    def _teacher_answers(self, prompts: list[list[int]], sampling: Sampling | None) -> list[tuple[int, ...]]:
        if sampling is not None:
            return self.teacher.answers(prompts, max_new_tokens=self.max_new_tokens, sampling=sampling)
        known = self._greedy_answers
        new = list(dict.fromkeys(key for prompt in prompts if (key := tuple(prompt)) not in known))
        if new:
            known.update(
                zip(new, self.teacher.answers(new, max_new_tokens=self.max_new_tokens, sampling=None), strict=True)
            )
        return [known[tuple(prompt)] for prompt in prompts]

    # ---------------------------------------------------------------- evaluation

    def on_validation_start(self) -> None:
        """Move the teacher to the device, for a validation without training."""
        self._move_teacher()

    def on_test_start(self) -> None:
        """As `on_validation_start`."""
        self._move_teacher()

    def add_evaluation(self, sums: Any, batch: PromptBatch, batch_idx: int) -> Any:  # type: ignore[override]
        """Compare student and teacher on the teacher's most probable answers."""
        with evaluating(self.model):
            tokens, result = self.compare(batch)
        sums = _Agreement() if sums is None else sums
        sums.add(result, tokens, len(batch))
        return sums

    def evaluation_metrics(self, sums: Any) -> dict[str, float]:
        """Loss and agreement over all batches and ranks.

        Returns:
            ``loss``; ``token_agreement``, the share of the teacher's answers' tokens at which both find the same token
            most probable; ``answer_agreement``, the share of answers for which that holds at every token, so that the
            student's most probable answer is the same.
        """
        totals, answers = sums.tokens.reduce(self.device), sums.answers.reduce(self.device)
        return {"loss": totals.loss, "token_agreement": totals.accuracy, "answer_agreement": 0.0, **answers}


class _Agreement:
    """Sums of an evaluation: token metrics, and on how many answers student and teacher agree."""

    def __init__(self) -> None:
        self.tokens = TokenMetrics()
        self.answers = MeanMetrics()

    def add(self, result: DistillationLoss, batch: TokenBatch, count: int) -> None:
        """Add a batch of `count` answers."""
        self.tokens.add(result.loss, result.agreed, batch)
        disagreements = torch.zeros(max(count, batch.num_groups), dtype=torch.float32, device=result.agreed.device)
        disagreements.index_add_(0, batch.groups, (~result.agreed).float())
        self.answers.add({"answer_agreement": (disagreements[:count] == 0).float()})


def _characters(row: Prompt) -> int:
    """Number of characters that a row adds to the prompt, tools and other variables of its template included."""
    return len(f"{row.columns.get('prompt_context') or ''}{row.prompt}{row.template_kwargs or ''}")


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[CausalLM]:
    with evaluating(model):
        yield model


def _as_baseline(prompt: PromptBaseline | Mapping[str, Any] | str) -> PromptBaseline:
    if isinstance(prompt, str):
        return PromptBaseline.from_file(prompt)
    if isinstance(prompt, Mapping):
        if unknown := set(prompt) - {"system", "few_shot"}:
            raise ConfigError(f"prompt= has no {min(unknown)!r}: expected the keys system and few_shot.")
        return PromptBaseline(**prompt)
    if not isinstance(prompt, PromptBaseline):
        raise ConfigError(
            f"prompt= is a {type(prompt).__name__}: expected PromptBaseline(system=..., few_shot=[...]), a dict of its "
            "arguments, or the path of a JSON file with them."
        )
    return prompt


def check_same_vocabulary(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a teacher whose token ids mean something else.

    Args:
        tokenizer: Tokenizer of the student.
        other: Tokenizer of the teacher.
        name: Name of the teacher, for the message.

    Raises:
        ConfigError: If a token has another id, or only one of them has it.
    """
    own, theirs = tokenizer.get_vocab(), other.get_vocab()
    differing = [token for token in {**own, **theirs} if own.get(token) != theirs.get(token)]
    if differing:
        raise ConfigError(
            f"teacher={name!r} has another vocabulary ({len(differing):,} tokens differ, such as {differing[0]!r}), so "
            "its distributions can't be compared token by token. Pass a teacher with the same tokenizer."
        )
