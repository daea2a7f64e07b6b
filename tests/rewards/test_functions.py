"""Functions as rewards: the arguments that they get, what they may return, and how they fail."""

import copy
import functools
import math
import pickle
import warnings

import numpy
import pytest
import torch
from reward_cases import (
    COLUMNS,
    IDS,
    MESSAGES,
    PROMPTS,
    TEXTS,
    call_arguments,
    compute_rewards,
    correct,
    length,
    slowly,
)
from trl.import_utils import is_math_verify_available
from trl.rewards import (
    accuracy_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    think_format_reward,
)

from lightning_ft.errors import LightningFTError, RewardError
from lightning_ft.losses.statistics import mean_and_std
from lightning_ft.rewards.batch import TrainerState
from lightning_ft.rewards.functions import RewardFunctions

# -------------------------------------------------------------------- arguments and rewards


def test_rewards_are_weighted_and_summed():
    rewards = compute_rewards([correct, length, slowly], weights=[1.0, -0.5, 2])
    assert rewards.names == ("correct", "length", "slowly")
    expected = torch.tensor([[1.0, 1.0, 0.25], [0.0, 4.0, math.nan], [0.0, 2.0, math.nan]])
    torch.testing.assert_close(rewards.per_function, expected, equal_nan=True)
    assert rewards.per_function.dtype == rewards.total.dtype == torch.float32
    torch.testing.assert_close(rewards.total, torch.tensor([1 - 0.5 + 0.5, -2.0, -1.0]))
    assert rewards.num_unrewarded == 0


def test_functions_get_strings_for_string_prompts():
    arguments = call_arguments()
    assert arguments["prompts"] == PROMPTS
    assert arguments["completions"] == TEXTS
    assert arguments["completion_ids"] == IDS
    assert arguments["answer"] == COLUMNS["answer"]


def test_functions_get_messages_for_message_prompts():
    arguments = call_arguments(prompts=MESSAGES)
    assert arguments["prompts"] == MESSAGES
    assert arguments["completions"] == [[{"role": "assistant", "content": text}] for text in TEXTS]


def test_functions_get_the_trainer_state():
    state = TrainerState(global_step=7, epoch=1.0, max_steps=20)
    assert call_arguments(state=state)["trainer_state"] is state
    assert call_arguments()["trainer_state"].global_step == 0
    with pytest.raises(AttributeError):
        state.global_step = 8


def test_functions_may_modify_their_arguments():
    def greedy(prompts, completions, completion_ids, answer):
        for taken in (prompts, completions, answer, completion_ids[0]):
            taken.clear()
        return [0.0] * 3

    assert compute_rewards([greedy, correct]).per_function[:, 1].tolist() == [1.0, 0.0, 0.0]
    assert COLUMNS == {"answer": ["4", "4", "6"]}
    assert IDS[0] == [11]


def test_functions_get_only_the_arguments_that_they_name():
    assert compute_rewards(lambda completion_ids, answer: [len(a) for a in answer]).total.tolist() == [1.0, 1.0, 1.0]
    assert compute_rewards(lambda *, completions, other=5: [other] * 3).total.tolist() == [5.0] * 3
    assert compute_rewards(functools.partial(correct, answer=["4"] * 3), columns={}).total.tolist() == [1.0, 0.0, 0.0]


def test_callable_objects_and_modules_are_rewards():
    class Judge:
        def __call__(self, completions, answer):
            return correct(completions, answer)

    class Net(torch.nn.Module):
        def forward(self, completion_ids):
            return torch.tensor([float(len(ids)) for ids in completion_ids], requires_grad=True) * 2

    rewards = compute_rewards([Judge(), Net()])
    assert rewards.names == ("Judge", "Net")
    assert rewards.per_function.tolist() == [[1, 2], [0, 8], [0, 4]]
    assert not rewards.total.requires_grad


def test_no_completions_call_no_function():
    """A rank may have no completions in a short last step."""
    rewards = RewardFunctions([correct, slowly]).compute([], [], [], {"answer": []})
    assert rewards.per_function.shape == (0, 2)
    assert rewards.total.shape == (0,)
    assert rewards.statistics()["reward"].tolist() == [0.0, 0.0, 0.0]


def test_rewards_are_fp32_without_gradients_for_any_default_dtype():
    def grad(completions):
        assert not torch.is_grad_enabled()
        return [0.1] * 3

    torch.set_default_dtype(torch.bfloat16)  # as precision="bf16-true" does around a step
    try:
        rewards = compute_rewards(grad)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rewards.total.dtype == torch.float32
    assert rewards.total[0].item() == pytest.approx(0.1)


# -------------------------------------------------------------------- rewards of TRL


def test_trl_rewards_work_unchanged():
    texts = ["<think>2 and 2</think>4", "<think>five", "no"]
    rewards = compute_rewards(
        [think_format_reward, get_soft_overlong_punishment(4, 2), get_repetition_penalty_reward(1)],
        prompts=MESSAGES,
        texts=texts,
        ids=[[1], [1, 2, 3], [4, 4, 4, 4]],
    )
    names = ("think_format_reward", "soft_overlong_punishment_reward", "repetition_penalty_reward")
    assert rewards.names == names
    assert rewards.per_function.tolist() == [[1, 0, 0], [0, -0.5, 0], [0, -1, -0.75]]


def test_trl_accuracy_reward_works():
    columns = {"solution": [r"\frac{1}{3}", r"\frac{1}{3}", "words"]}
    texts = [r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}", ""]
    if not is_math_verify_available():
        with pytest.raises(RewardError, match=r"'accuracy_reward' failed on completion 0 .*install the `math_verify`"):
            compute_rewards(accuracy_reward, prompts=MESSAGES, texts=texts, columns=columns)
        return
    with pytest.warns(UserWarning, match="No reward applied to 1 of 3"):
        rewards = compute_rewards(accuracy_reward, prompts=MESSAGES, texts=texts, columns=columns)
    assert rewards.total[:2].tolist() == [1.0, 0.0]
    assert set(rewards.extra) == {"solution", "gold_parsed", "answer_parsed"}


def test_failure_names_the_type_of_completions():
    with pytest.raises(RewardError, match="completions are strings, like their prompts"):
        compute_rewards(think_format_reward)


# -------------------------------------------------------------------- return values


@pytest.mark.parametrize(
    "returned",
    [
        (1, 0.5, None),
        [True, numpy.float32(0.5), None],
        [numpy.bool_(True), torch.tensor(0.5), None],
        numpy.array([1.0, 0.5, None], dtype=object),
    ],
)
def test_rewards_may_be_any_numbers_or_none(returned):
    rewards = compute_rewards([lambda completions: returned, lambda completions: [0, 0, 0]])
    torch.testing.assert_close(rewards.per_function[:, 0], torch.tensor([1.0, 0.5, math.nan]), equal_nan=True)


@pytest.mark.parametrize(
    "returned",
    [
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True),
        numpy.array([1, 2, 3], dtype=numpy.int8),
        numpy.array([1, 2, 3], dtype=numpy.float16),
    ],
)
def test_rewards_may_be_a_tensor_or_array(returned):
    assert compute_rewards(lambda completions: returned).total.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned a NoneType; expected 3 numbers"),
        (1.0, "returned a float; expected 3 numbers"),
        ({"reward": [1, 2, 3]}, "returned a dict"),
        ("abc", "returned a str"),
        (map(len, "abc"), "returned a map"),
        (torch.tensor(1.0), r"returned a Tensor of shape \(\)"),
        (torch.zeros(3, 1), r"returned a Tensor of shape \(3, 1\)"),
        ([1, 2], "returned 2 rewards; expected 3 numbers"),
        (torch.zeros(4), "returned 4 rewards"),
        ([1, math.nan, 1], r"returned nan for completion 1 \('five'\); expected a finite number"),
        ([1, 1, math.inf], r"returned inf for completion 2 \('6!'\)"),
        (torch.tensor([1, -math.inf, 1]), "returned -inf for completion 1"),
        ([1, 1e39, 1], r"returned 1e\+39 for completion 1"),  # infinite in fp32
        ([1, 10**400, 1], "returned 1000.* for completion 1"),
        ([1, "2", 1], r"returned '2', a str, for completion 1 \('five'\)"),
        ([1, [2.0], 1], r"returned \[2.0\], a list, for completion 1"),
        ([1, torch.ones(1), 1], r"returned tensor\(.*, a Tensor, for completion 1"),
        ([1, 2j, 1], "returned 2j, a complex, for completion 1"),
        ([1, torch.tensor(2j), 1], r"returned tensor\(.*, a Tensor, for completion 1"),
    ],
)
def test_other_return_values_are_refused(returned, message):
    with pytest.raises(RewardError, match=f"Reward 'judge' {message}"):
        compute_rewards({"function": lambda completions: returned, "name": "judge"})


def test_errors_shorten_long_completions():
    with pytest.raises(RewardError) as got:
        compute_rewards(lambda completions: [math.nan] * 3, texts=["x" * 200, "", ""])
    assert f"('{'x' * 80}...)" in str(got.value)
    assert "x" * 81 not in str(got.value)


def test_completions_without_reward_warn_once():
    functions = RewardFunctions([lambda completions: [1.0, None, None], lambda completions: [None, 1.0, None]])
    with pytest.warns(UserWarning, match=r"No reward applied to 1 of 3 .* completion 2 \('6!'\)"):
        rewards = functions.compute(PROMPTS, TEXTS, IDS)
    assert rewards.num_unrewarded == 1
    assert rewards.total.isnan().tolist() == [False, False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert functions.compute(PROMPTS, TEXTS, IDS).num_unrewarded == 1


# -------------------------------------------------------------------- failures


def test_failure_names_the_completion():
    calls = []

    def judge(completions, log_metric):
        calls.append(completions)
        log_metric("calls", 1.0)
        return [1 / (len(c) - 2) for c in completions]

    with pytest.raises(RewardError, match=r"'judge' failed on completion 2 \('6!'\) with ZeroDivisionError") as got:
        compute_rewards(judge)
    assert isinstance(got.value.__cause__, ZeroDivisionError)
    assert isinstance(got.value, (LightningFTError, ValueError))
    assert calls == [TEXTS, ["4"], ["five"], ["6!"]]


def test_failure_on_batches_only_names_the_batch():
    def judge(completions):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(
        RewardError, match=r"on a batch of 3 completions, though on none of them alone.*RuntimeError: too many"
    ):
        compute_rewards(judge)


def test_interrupts_are_not_wrapped():
    def judge(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_rewards(judge)


def test_exit_of_a_completion_that_is_run_as_code_names_the_completion():
    """It would end training with the completion's exit status and without a word."""

    def runs(completions):
        for text in completions:
            exec("raise SystemExit(0)" if text == "five" else "pass")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'runs' failed on completion 1 \('five'\) with SystemExit: 0"):
        compute_rewards(runs)


# -------------------------------------------------------------------- columns and arguments


@pytest.mark.parametrize(
    "name", ["prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"]
)
def test_columns_named_like_arguments_are_refused(name):
    with pytest.raises(RewardError, match=f"column '{name}' is named like an argument.*rename it"):
        compute_rewards(correct, columns={**COLUMNS, name: [0, 0, 0]})
    with pytest.raises(RewardError, match=f"column '{name}'"):
        RewardFunctions(length).check_columns([name])


def test_missing_column_is_named():
    for call in (lambda: compute_rewards(correct, columns={"reply": ["4"] * 3}), lambda: check(["reply"])):
        with pytest.raises(RewardError, match=r"'correct' needs 'answer', which is neither a column .*'reply'"):
            call()
    check(["answer", "reply"])


def check(columns):
    RewardFunctions([correct, length]).check_columns(columns)


def test_missing_column_is_named_for_functions_with_kwargs():
    def judge(completions, answer, **kwargs):
        raise AssertionError

    with pytest.raises(RewardError, match="needs 'answer'"):
        compute_rewards(judge, columns={})


def test_positional_only_arguments_are_refused():
    def judge(completions, /):
        raise AssertionError

    with pytest.raises(RewardError, match="'judge' has the positional-only argument 'completions'"):
        RewardFunctions(judge)


@pytest.mark.parametrize(
    ("prompts", "ids", "columns"), [(PROMPTS[:2], IDS, {}), (PROMPTS, IDS[:1], {}), (PROMPTS, IDS, {"answer": ["4"]})]
)
def test_inputs_of_other_lengths_are_refused(prompts, ids, columns):
    with pytest.raises(RewardError, match=r"3 completions with . .*Repeat the values of a prompt for each"):
        compute_rewards(length, prompts=prompts, ids=ids, columns=columns)


# -------------------------------------------------------------------- what functions log


def test_logged_metrics_are_averaged_over_calls():
    def one(completions, log_metric):
        log_metric("seen", 1)
        log_metric("seen", torch.tensor(3.0))
        return [0] * 3

    async def other(completions, log_metric, **kwargs):
        log_metric("seen", numpy.float32(5.0))
        log_metric("alone", True)
        return [0] * 3

    assert compute_rewards([one, other]).logged == {"seen": (9.0, 3), "alone": (1.0, 1)}


@pytest.mark.parametrize("value", ["1", None, math.nan, [1.0]])
def test_log_metric_refuses_other_values(value):
    def judge(completions, log_metric):
        log_metric("seen", value)
        return [0] * 3

    with pytest.raises(RewardError, match=r"'judge' failed .* log_metric\('seen', .*\): expected a finite number"):
        compute_rewards(judge)


def test_log_extra_collects_columns():
    def one(completions, log_extra):
        log_extra("verdict", [c.upper() for c in completions])
        return [0] * 3

    async def other(completions, log_extra):
        for completion in completions:  # one at a time, as TRL allows
            log_extra("verdict", [len(completion)])
        return [0] * 3

    rewards = compute_rewards([one, other])
    assert rewards.extra == {"verdict": ["4", "FIVE", "6!"], "other/verdict": [1, 4, 2]}


def test_log_extra_refuses_columns_of_other_lengths():
    def judge(completions, log_extra):
        log_extra("verdict", [1])
        return [0] * 3

    with pytest.raises(RewardError, match="'judge' logged 1 values in the column 'verdict' for 3 completions"):
        compute_rewards(judge)


# -------------------------------------------------------------------- statistics, copies


def test_statistics_add_up_over_ranks():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(10, 2, generator=generator)
    values[3, 1] = math.nan
    columns = {"one": values[:, 0].tolist(), "two": [None if math.isnan(x) else x for x in values[:, 1].tolist()]}
    functions = RewardFunctions([lambda one: one, lambda two: two], weights=[1.0, 2.0])

    def statistics(part):
        texts = [""] * 10
        sliced = {name: column[part] for name, column in columns.items()}
        return functions.compute(texts[part], texts[part], [[]] * len(texts[part]), sliced).statistics()

    total, ranks = statistics(slice(0, 10)), [statistics(slice(0, 4)), statistics(slice(4, 10))]
    assert list(total) == ["rewards/reward", "rewards/reward_2", "reward"]
    for name, sums in total.items():
        torch.testing.assert_close(ranks[0][name] + ranks[1][name], sums)
    mean, std = mean_and_std(total["rewards/reward_2"])
    assert mean.item() == pytest.approx(numpy.nanmean(values[:, 1].numpy()), abs=1e-6)
    assert std.item() == pytest.approx(numpy.nanstd(values[:, 1].numpy(), ddof=1), abs=1e-6)


def test_reward_functions_can_be_copied_and_pickled_after_use():
    functions = RewardFunctions([correct, slowly], weights=[1.0, 3.0])
    expected = functions.compute(PROMPTS, TEXTS, IDS, COLUMNS).total
    for again in (copy.deepcopy(functions), pickle.loads(pickle.dumps(functions))):
        assert again.names == functions.names
        torch.testing.assert_close(again.compute(PROMPTS, TEXTS, IDS, COLUMNS).total, expected)
