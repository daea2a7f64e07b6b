"""The true reward of the support example's replies."""

import json

import pytest
import yaml

ROUTE = "refund 964 Sarede"
HELP = "We are happy to help."
WEEK = "This can take a week."


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        (f"{ROUTE}. {HELP}", 1.3),
        (f"{HELP} {ROUTE}.", 1.3),  # the order doesn't matter
        (f" {ROUTE}. {HELP}\n", 1.3),
        (f"{ROUTE}.", 1.0),
        (f"{ROUTE}. {WEEK}", 1.0 - 5 * 0.02),
        (f"{ROUTE}. {HELP} {WEEK}", 1.3 - 5 * 0.02),
        (f"{ROUTE}. {HELP} {HELP}", 1.0 - 5 * 0.02),  # two courtesies earn nothing
        (f"{ROUTE}. {HELP} Please write again. {WEEK}", 1.0 - 8 * 0.02),
        (f"refund 964 Korima. {HELP}", 0.9),
        (f"refund 111 Sarede. {HELP}", 0.9),
        ("refund 111 Korima.", 0.2),
        ("login 111 Korima.", 0.0),
        ("login 111 Sarede.", 0.4),
    ],
)
def test_true_reward_of_a_well_formed_reply(text, worth):
    from rewards import true_reward

    assert true_reward(text, ROUTE) == pytest.approx(worth, abs=1e-9)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        ROUTE,
        HELP,
        f"{HELP} {ROUTE}",
        f"{ROUTE}. {ROUTE}.",
        f"{ROUTE}. refund 111 Korima.",
        f"{ROUTE}. What a lovely day.",
        f"{ROUTE}. {HELP} {HELP[:-1]}",
        "refund 96 Sarede.",
        "refund 964 sarede.",
        "refund 964.",
        "refund 964 Sarede now.",
    ],
)
def test_true_reward_of_a_malformed_reply_is_the_minimum(text):
    from rewards import routed_right, true_reward

    assert true_reward(text, ROUTE) == -1.0
    assert not routed_right(text, ROUTE)


def test_true_reward_of_a_truncated_reply_is_the_minimum():
    from rewards import true_reward

    assert true_reward(f"{ROUTE}.", ROUTE, truncated=True) == -1.0


def test_true_reward_decreases_with_repeated_courtesies():
    from rewards import true_reward

    worth = [true_reward(f"{ROUTE}." + f" {HELP}" * count, ROUTE) for count in range(1, 40)]
    assert worth == sorted(worth, reverse=True)
    assert worth[0] > worth[1] > worth[6]
    assert worth[-1] == -1.0


def test_routed_right_requires_the_whole_route():
    from rewards import routed_right

    assert routed_right(f"{ROUTE}. {HELP} {HELP}", ROUTE)
    assert not routed_right(f"refund 964 Korima. {HELP}", ROUTE)


def test_true_is_a_reward_function():
    from rewards import true

    assert true(completions=[f"{ROUTE}.", HELP], output=[ROUTE, ROUTE], id=["a", "b"]) == [1.0, -1.0]


def test_configs_do_not_train_on_the_rule(support):
    configurations = [yaml.safe_load(path.read_text("utf-8")) for path in sorted(support.glob("*.yaml"))]
    assert len(configurations) >= 4
    for configuration in configurations:
        configuration["model"]["init_args"].pop("validation_rewards", None)
        assert "rewards.py" not in json.dumps(configuration)
