"""The support example's metrics match hand-computed values."""

import pytest


@pytest.fixture
def metrics():
    from support_metrics import metrics

    return metrics


RIGHT = ["refund 417 Harbor", "login 902 Korima", "login 902 Korima", "color 100 Harbor"]


def test_references_get_perfect_metrics(metrics):
    assert metrics(RIGHT, RIGHT) == {
        "topic_accuracy": 1.0,
        "topic_macro_f1": 1.0,
        "code_accuracy": 1.0,
        "team_accuracy": 1.0,
        "unknown_topic_rate": 0.0,
    }


def test_metrics_count_parts_separately(metrics):
    found = metrics(["refund 417 Harbor", "login 111 Korima", "refund", ""], RIGHT)
    assert found["topic_accuracy"] == 0.5
    # refund: precision 1/2, recall 1; login: precision 1, recall 1/2; color: nothing
    assert found["topic_macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert (found["code_accuracy"], found["team_accuracy"]) == (0.25, 0.5)
    assert found["unknown_topic_rate"] == 0.25
