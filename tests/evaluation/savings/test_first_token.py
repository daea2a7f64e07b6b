"""Times to first token: how they are shown, and whether a difference is more than noise."""

from dataclasses import replace

import pytest

from lightning_ft.evaluation.savings.arithmetic import ArmRecords, token_savings
from lightning_ft.evaluation.savings.first_token import TIMED_REQUESTS, first_token_text
from lightning_ft.evaluation.savings.sections import arms_tables
from lightning_ft.evaluation.savings.table import arm_rows

SLOW = (0.050, 0.052, 0.049, 0.051, 0.055, 0.050)
NOISY = (0.049, 0.053, 0.048, 0.052, 0.054, 0.050)  # sooner in 3, later in 2, the same in 1


def timed(prompted, tuned):
    """A result whose arms have these times by state."""

    def arm(tokens, seconds):
        ids = tuple(map(str, range(8)))
        return ArmRecords(ids, (tokens,) * 8, (2,) * 8, (1.0,) * 8, (False,) * 8, first_token_seconds=seconds)

    return token_savings(arm(90, prompted), arm(9, tuned), resamples=99)


def test_first_token_difference_within_the_noise():
    text = first_token_text(timed({"cold": SLOW}, {"cold": NOISY}))
    assert text.startswith(
        "Time to first token: the difference is within the noise, sooner tuned than prompted in 3 of 6 timed requests "
        "(sign test, p = 1). The arms are timed one after the other: "
    )


def test_first_token_difference_beyond_the_noise():
    faster = tuple(time / 2 for time in SLOW)
    expected = "in 6 of 6 timed requests, more than noise explains (sign test, p = 0.031)."
    text = first_token_text(timed({"cold": SLOW, "warm": faster}, {"cold": faster, "warm": SLOW}))
    assert f"Time to first token: sooner tuned than prompted {expected}" in text
    assert f"Time to first token, prefix cached: later tuned than prompted {expected}" in text


def test_first_token_of_fewer_requests_than_default_is_never_beyond_noise():
    """Five of five is what six of six is not: explained by chance with a probability above 5%."""
    text = first_token_text(timed({"cold": SLOW[:5]}, {"cold": (0.001,) * 5}))
    assert "sooner tuned than prompted in 5 of 5 timed requests, too few to tell from noise" in text
    assert f"at least {TIMED_REQUESTS} (timed_requests)" in text


def test_first_token_equal_times_are_within_the_noise():
    assert "the difference is within the noise" in first_token_text(timed({"cold": SLOW}, {"cold": SLOW}))


def test_first_token_of_different_numbers_of_requests():
    assert "6 prompted and 2 tuned requests were timed" in first_token_text(timed({"cold": SLOW}, {"cold": SLOW[:2]}))


@pytest.mark.parametrize(("prompted", "tuned"), [({}, {}), ({"cold": SLOW}, {}), ({"cold": ()}, {"cold": ()})])
def test_first_token_text_is_empty_unless_both_arms_were_timed(prompted, tuned):
    result = timed(prompted, tuned)
    assert first_token_text(result) == ""
    assert not any("first token:" in block for block in arms_tables(result) if isinstance(block, str))


def test_table_shows_spread_of_first_token_times():
    result = timed({"cold": SLOW}, {"cold": NOISY, "warm": (0.01,)})
    rows = {row[0]: row[1:] for row in arm_rows(result)}
    assert rows["first token, ms"] == ["50.5 (49 to 55)", "51 (48 to 54)"]
    assert rows["first token, prefix cached, ms"] == ["unknown", "10"]
    table = arms_tables(result)[1]
    assert (
        table.caption == "Mean per request, by arm; of times the median, and the fastest to the slowest of 6 requests"
    )


def test_records_of_older_files_have_one_time():
    arm = timed({"cold": SLOW}, {}).arms["prompted"]
    values = arm.to_dict()
    assert values["first_token_seconds"] == {"cold": list(SLOW)}
    assert ArmRecords.from_dict(values).first_token_seconds == arm.first_token_seconds
    older = ArmRecords.from_dict({**values, "first_token_seconds": {"cold": 0.05}})
    assert older.first_token_seconds == {"cold": (0.05,)}
    result = timed({"cold": SLOW[:1]}, {"cold": NOISY[:1]})
    assert "one time per arm was recorded, too few to tell a difference from noise" in first_token_text(result)
    untimed = {name: value for name, value in values.items() if name != "first_token_seconds"}
    assert ArmRecords.from_dict(untimed) == replace(arm, first_token_seconds={})
