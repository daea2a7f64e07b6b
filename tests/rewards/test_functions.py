"""Functions as rewards: what they are given, what they may give back, and how they fail."""

import copy
import functools
import math
import pickle
import warnings

import numpy
import pytest
import torch
from reward_cases import COLUMNS, IDS, MESSAGES, PROMPTS, TEXTS, correct, given_to, length, score, slowly
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

# -------------------------------------------------------------------- what they are given, what comes out


def test_several_weighted():
    rewards = score([correct, length, slowly], weights=[1.0, -0.5, 2])
    assert rewards.names == ("correct", "length", "slowly")
    expected = torch.tensor([[1.0, 1.0, 0.25], [0.0, 4.0, math.nan], [0.0, 2.0, math.nan]])
    torch.testing.assert_close(rewards.per_function, expected, equal_nan=True)
    assert rewards.per_function.dtype == rewards.total.dtype == torch.float32
    torch.testing.assert_close(rewards.total, torch.tensor([1 - 0.5 + 0.5, -2.0, -1.0]))
    assert rewards.unscored == 0


def test_string_prompts_give_strings():
    given = given_to(None)
    assert given["prompts"] == PROMPTS
    assert given["completions"] == TEXTS
    assert given["completion_ids"] == IDS
    assert given["answer"] == COLUMNS["answer"]


def test_messages_give_messages():
    given = given_to(None, prompts=MESSAGES)
    assert given["prompts"] == MESSAGES
    assert given["completions"] == [[{"role": "assistant", "content": text}] for text in TEXTS]


def test_the_state_of_the_trainer():
    state = TrainerState(global_step=7, epoch=1.0, max_steps=20)
    assert given_to(None, state=state)["trainer_state"] is state
    assert given_to(None)["trainer_state"].global_step == 0
    with pytest.raises(AttributeError):
        state.global_step = 8


def test_a_function_may_change_what_it_gets():
    def greedy(prompts, completions, completion_ids, answer):
        for taken in (prompts, completions, answer, completion_ids[0]):
            taken.clear()
        return [0.0] * 3

    assert score([greedy, correct]).per_function[:, 1].tolist() == [1.0, 0.0, 0.0]
    assert COLUMNS == {"answer": ["4", "4", "6"]}
    assert IDS[0] == [11]


def test_only_what_it_names():
    assert score(lambda completion_ids, answer: [len(a) for a in answer]).total.tolist() == [1.0, 1.0, 1.0]
    assert score(lambda *, completions, other=5: [other] * 3).total.tolist() == [5.0] * 3
    assert score(functools.partial(correct, answer=["4"] * 3), columns={}).total.tolist() == [1.0, 0.0, 0.0]


def test_objects_and_modules_that_can_be_called():
    class Judge:
        def __call__(self, completions, answer):
            return correct(completions, answer)

    class Net(torch.nn.Module):
        def forward(self, completion_ids):
            return torch.tensor([float(len(ids)) for ids in completion_ids], requires_grad=True) * 2

    rewards = score([Judge(), Net()])
    assert rewards.names == ("Judge", "Net")
    assert rewards.per_function.tolist() == [[1, 2], [0, 8], [0, 4]]
    assert not rewards.total.requires_grad


def test_no_completions_ask_nobody():
    """A rank may have none in a short last step."""
    rewards = RewardFunctions([correct, slowly]).score([], [], [], {"answer": []})
    assert rewards.per_function.shape == (0, 2)
    assert rewards.total.shape == (0,)
    assert rewards.statistics()["reward"].tolist() == [0.0, 0.0, 0.0]


def test_without_gradients_and_in_fp32_whatever_the_default():
    def grad(completions):
        assert not torch.is_grad_enabled()
        return [0.1] * 3

    torch.set_default_dtype(torch.bfloat16)  # as precision="bf16-true" does around a step
    try:
        rewards = score(grad)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rewards.total.dtype == torch.float32
    assert rewards.total[0].item() == pytest.approx(0.1)


# -------------------------------------------------------------------- TRL's own


def test_trls_rewards_work_unchanged():
    texts = ["<think>2 and 2</think>4", "<think>five", "no"]
    rewards = score(
        [think_format_reward, get_soft_overlong_punishment(4, 2), get_repetition_penalty_reward(1)],
        prompts=MESSAGES,
        texts=texts,
        ids=[[1], [1, 2, 3], [4, 4, 4, 4]],
    )
    names = ("think_format_reward", "soft_overlong_punishment_reward", "repetition_penalty_reward")
    assert rewards.names == names
    assert rewards.per_function.tolist() == [[1, 0, 0], [0, -0.5, 0], [0, -1, -0.75]]


def test_trls_accuracy_reward():
    columns = {"solution": [r"\frac{1}{3}", r"\frac{1}{3}", "words"]}
    texts = [r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}", ""]
    if not is_math_verify_available():
        with pytest.raises(RewardError, match=r"'accuracy_reward' failed on completion 0 .*install the `math_verify`"):
            score(accuracy_reward, prompts=MESSAGES, texts=texts, columns=columns)
        return
    with pytest.warns(UserWarning, match="No reward applied to 1 of 3"):
        rewards = score(accuracy_reward, prompts=MESSAGES, texts=texts, columns=columns)
    assert rewards.total[:2].tolist() == [1.0, 0.0]
    assert set(rewards.extra) == {"solution", "gold_parsed", "answer_parsed"}


def test_a_reward_for_messages_on_strings_says_what_it_got():
    with pytest.raises(RewardError, match="completions are strings, as their prompts are"):
        score(think_format_reward)


# -------------------------------------------------------------------- what they may give back


@pytest.mark.parametrize(
    "returned",
    [
        (1, 0.5, None),
        [True, numpy.float32(0.5), None],
        [numpy.bool_(True), torch.tensor(0.5), None],
        numpy.array([1.0, 0.5, None], dtype=object),
    ],
)
def test_numbers_of_all_kinds(returned):
    rewards = score([lambda completions: returned, lambda completions: [0, 0, 0]])
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
def test_tensors_and_arrays(returned):
    assert score(lambda completions: returned).total.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("returned", "said"),
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
        ([1, math.nan, 1], r"gave nan for completion 1 \('five'\); expected a finite number"),
        ([1, 1, math.inf], r"gave inf for completion 2 \('6!'\)"),
        (torch.tensor([1, -math.inf, 1]), "gave -inf for completion 1"),
        ([1, 1e39, 1], r"gave 1e\+39 for completion 1"),  # infinite in fp32
        ([1, 10**400, 1], "gave 1000.* for completion 1"),
        ([1, "2", 1], r"gave '2', a str, for completion 1 \('five'\)"),
        ([1, [2.0], 1], r"gave \[2.0\], a list, for completion 1"),
        ([1, torch.ones(1), 1], r"gave tensor\(.*, a Tensor, for completion 1"),
        ([1, 2j, 1], "gave 2j, a complex, for completion 1"),
        ([1, torch.tensor(2j), 1], r"gave tensor\(.*, a Tensor, for completion 1"),
    ],
)
def test_anything_else_is_refused(returned, said):
    with pytest.raises(RewardError, match=f"Reward 'judge' {said}"):
        score({"function": lambda completions: returned, "name": "judge"})


def test_a_long_completion_is_shortened():
    with pytest.raises(RewardError) as got:
        score(lambda completions: [math.nan] * 3, texts=["x" * 200, "", ""])
    assert f"('{'x' * 80}...)" in str(got.value)
    assert "x" * 81 not in str(got.value)


def test_none_of_all_is_told_once():
    functions = RewardFunctions([lambda completions: [1.0, None, None], lambda completions: [None, 1.0, None]])
    with pytest.warns(UserWarning, match=r"No reward applied to 1 of 3 .* completion 2 \('6!'\)"):
        rewards = functions.score(PROMPTS, TEXTS, IDS)
    assert rewards.unscored == 1
    assert rewards.total.isnan().tolist() == [False, False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert functions.score(PROMPTS, TEXTS, IDS).unscored == 1


# -------------------------------------------------------------------- failures


def test_a_failure_names_the_completion():
    calls = []

    def judge(completions, log_metric):
        calls.append(completions)
        log_metric("calls", 1.0)
        return [1 / (len(c) - 2) for c in completions]

    with pytest.raises(RewardError, match=r"'judge' failed on completion 2 \('6!'\) with ZeroDivisionError") as got:
        score(judge)
    assert isinstance(got.value.__cause__, ZeroDivisionError)
    assert isinstance(got.value, (LightningFTError, ValueError))
    assert calls == [TEXTS, ["4"], ["five"], ["6!"]]


def test_a_failure_that_only_the_batch_has():
    def judge(completions):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(RewardError, match=r"on 3 completions, though on none of them alone.*RuntimeError: too many"):
        score(judge)


def test_interrupts_are_not_failures():
    def judge(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(judge)


# -------------------------------------------------------------------- columns and arguments


@pytest.mark.parametrize(
    "name", ["prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"]
)
def test_columns_named_like_arguments(name):
    with pytest.raises(RewardError, match=f"column '{name}' is named like an argument.*rename it"):
        score(correct, columns={**COLUMNS, name: [0, 0, 0]})
    with pytest.raises(RewardError, match=f"column '{name}'"):
        RewardFunctions(length).check_columns([name])


def test_a_column_that_is_missing():
    for ask in (lambda: score(correct, columns={"reply": ["4"] * 3}), lambda: check(["reply"])):
        with pytest.raises(RewardError, match=r"'correct' needs 'answer', which is neither a column .*'reply'"):
            ask()
    check(["answer", "reply"])


def check(columns):
    RewardFunctions([correct, length]).check_columns(columns)


def test_a_missing_column_is_told_also_with_kwargs():
    def judge(completions, answer, **kwargs):
        raise AssertionError

    with pytest.raises(RewardError, match="needs 'answer'"):
        score(judge, columns={})


def test_arguments_by_place_are_refused():
    def judge(completions, /):
        raise AssertionError

    with pytest.raises(RewardError, match="'judge' takes 'completions' by its place"):
        RewardFunctions(judge)


@pytest.mark.parametrize(
    ("prompts", "ids", "columns"), [(PROMPTS[:2], IDS, {}), (PROMPTS, IDS[:1], {}), (PROMPTS, IDS, {"answer": ["4"]})]
)
def test_one_of_each_for_every_completion(prompts, ids, columns):
    with pytest.raises(RewardError, match=r"3 completions with . .*repeated for all of its completions"):
        score(length, prompts=prompts, ids=ids, columns=columns)


# -------------------------------------------------------------------- what functions log


def test_metrics_are_means_over_calls():
    def one(completions, log_metric):
        log_metric("seen", 1)
        log_metric("seen", torch.tensor(3.0))
        return [0] * 3

    async def other(completions, log_metric, **kwargs):
        log_metric("seen", numpy.float32(5.0))
        log_metric("alone", True)
        return [0] * 3

    assert score([one, other]).metrics == {"seen": 3.0, "alone": 1.0}


@pytest.mark.parametrize("value", ["1", None, math.nan, [1.0]])
def test_metrics_are_numbers(value):
    def judge(completions, log_metric):
        log_metric("seen", value)
        return [0] * 3

    with pytest.raises(RewardError, match=r"'judge' failed .* log_metric\('seen', .*\): expected a finite number"):
        score(judge)


def test_extra_columns():
    def one(completions, log_extra):
        log_extra("verdict", [c.upper() for c in completions])
        return [0] * 3

    async def other(completions, log_extra):
        for completion in completions:  # one after the other, as TRL allows
            log_extra("verdict", [len(completion)])
        return [0] * 3

    rewards = score([one, other])
    assert rewards.extra == {"verdict": ["4", "FIVE", "6!"], "other/verdict": [1, 4, 2]}


def test_extra_columns_of_the_wrong_length():
    def judge(completions, log_extra):
        log_extra("verdict", [1])
        return [0] * 3

    with pytest.raises(RewardError, match="'judge' logged 1 values in the column 'verdict' for 3 completions"):
        score(judge)


# -------------------------------------------------------------------- figures, copies


def test_figures_add_up_over_ranks():
    generator = torch.Generator().manual_seed(0)
    given = torch.rand(10, 2, generator=generator)
    given[3, 1] = math.nan
    columns = {"one": given[:, 0].tolist(), "two": [None if math.isnan(x) else x for x in given[:, 1].tolist()]}
    functions = RewardFunctions([lambda one: one, lambda two: two], weights=[1.0, 2.0])

    def figures(part):
        texts = [""] * 10
        sliced = {name: values[part] for name, values in columns.items()}
        return functions.score(texts[part], texts[part], [[]] * len(texts[part]), sliced).statistics()

    whole, ranks = figures(slice(0, 10)), [figures(slice(0, 4)), figures(slice(4, 10))]
    assert list(whole) == ["rewards/reward", "rewards/reward_2", "reward"]
    for name, sums in whole.items():
        torch.testing.assert_close(ranks[0][name] + ranks[1][name], sums)
    mean, std = mean_and_std(whole["rewards/reward_2"])
    assert mean.item() == pytest.approx(numpy.nanmean(given[:, 1].numpy()), abs=1e-6)
    assert std.item() == pytest.approx(numpy.nanstd(given[:, 1].numpy(), ddof=1), abs=1e-6)


def test_copies_and_pickles_after_use():
    functions = RewardFunctions([correct, slowly], weights=[1.0, 3.0])
    wanted = functions.score(PROMPTS, TEXTS, IDS, COLUMNS).total
    for again in (copy.deepcopy(functions), pickle.loads(pickle.dumps(functions))):
        assert again.names == functions.names
        torch.testing.assert_close(again.score(PROMPTS, TEXTS, IDS, COLUMNS).total, wanted)
