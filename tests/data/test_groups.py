"""Groups of rows that belong together, and a draw of groups that meets a share as closely as possible."""

import random
from itertools import combinations

import pytest

from lightning_ft.data.formats import Conversation
from lightning_ft.data.groups import choose_groups, describe_group, group_rows, rows_to_hold_out


def rows(*talks):
    """Conversations of alternating turns; a cluster after a ``@``."""
    made = []
    for n, talk in enumerate(talks):
        text, _, cluster = talk.partition("@")
        turns = [
            {"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(text.split("|"))
        ]
        made.append(Conversation(tuple(turns), "train", n + 1, f"train:{n + 1}", cluster or None))
    return made


@pytest.mark.parametrize(
    ("talks", "groups"),
    [
        (["a|1", "b|1", "a|2", "c|1"], [[0, 2], [1], [3]]),  # one question
        (["a|1@x", "b|1@y", "c|1@x", "d|1"], [[0, 2], [1], [3]]),  # one cluster
        (["a|1", "b|1", "a|1|c|2", "a|1|c|2|d|3"], [[0, 2, 3], [1]]),  # a conversation exported turn by turn
        (["a|1|c|2|d|3", "a|1|c|2", "a|1"], [[0, 1, 2]]),  # in any order
        (["a|1", "a|2|c|2"], [[0, 1]]),  # its first question is that of the other row
        (["a|1|c|2", "a|2|c|2"], [[0], [1]]),  # no row has the question that they share
        (["a|1|c|2", "a|2|d|2", "a|9"], [[0, 1, 2]]),  # now one does
        (["c|1", "a|1|c|2"], [[0], [1]]),  # the same words, in another conversation
        (["a|1@x", "a|2@y", "b|1@y", "b|2|c|3", "d|1"], [[0, 1, 2, 3], [4]]),  # groups are transitive
    ],
)
def test_group_rows_joins_rows_that_belong_together(talks, groups):
    assert group_rows(rows(*talks)) == groups


def test_group_rows_agrees_with_comparing_all_pairs():
    def belong(one, other):
        def prompt(row):
            return [(m["role"], m["content"]) for m in row.prompt_messages]

        def starts(short, long):
            return prompt(long)[: len(prompt(short))] == prompt(short)

        same_cluster = one.cluster is not None and one.cluster == other.cluster
        return same_cluster or starts(one, other) or starts(other, one)

    draw = random.Random(0)
    for _ in range(60):
        talks = [
            "|".join(draw.choice("ab") for _ in range(2 * draw.randint(1, 3)))
            + draw.choice(["", "", f"@{draw.randint(0, 5)}"])
            for _ in range(draw.randint(2, 12))
        ]
        made = rows(*talks)
        slow = [{i} for i in range(len(made))]
        for i, j in combinations(range(len(made)), 2):
            if belong(made[i], made[j]):
                one, other = (next(group for group in slow if k in group) for k in (i, j))
                if one is not other:
                    one |= other
                    slow.remove(other)
        assert [set(group) for group in group_rows(made)] == sorted(slow, key=min)


def closest(sizes, target):
    """Distance of the best of all draws that leave a group."""
    sums = {
        sum(sizes[k] for k in chosen) for n in range(1, len(sizes)) for chosen in combinations(range(len(sizes)), n)
    }
    return min(abs(total - target) for total in sums)


def test_choose_groups_comes_as_close_as_any_draw():
    draw = random.Random(0)
    for seed in range(300):
        sizes = [draw.choice([1, 2, 3, 5, 8, 13]) for _ in range(draw.randint(2, 8))]
        share = draw.uniform(0.01, 0.99)
        chosen = choose_groups(sizes, share, seed)
        target = rows_to_hold_out(sum(sizes), share)
        assert 0 < len(chosen) < len(sizes)
        assert abs(sum(sizes[k] for k in chosen) - target) == closest(sizes, target)


def test_choose_groups_of_one_row_is_a_plain_draw():
    sizes = [1] * 1000
    chosen = choose_groups(sizes, 0.1, seed=3)
    assert chosen == set(random.Random(3).sample(range(1000), 100)) != choose_groups(sizes, 0.1, seed=4)


def test_choose_groups_draws_large_groups_as_often_as_small_ones():
    draw = random.Random(0)
    sizes = [draw.choice([1, 1, 2, 7, 40]) for _ in range(30_000)]
    chosen = choose_groups(sizes, 0.3, seed=0)
    assert sum(sizes[k] for k in chosen) == rows_to_hold_out(sum(sizes), 0.3)
    large = sum(sizes[k] == 40 for k in chosen) / sum(size == 40 for size in sizes)
    assert 0.27 < large < 0.33  # large groups are drawn as often as small ones


@pytest.mark.parametrize(
    ("sizes", "share", "held"),
    [
        ([4] * 100, 0.1, 40),
        ([4] * 5, 0.1, 4),  # the target is two rows
        ([300, *[1] * 100], 0.1, 40),
        ([399, 1], 0.1, 1),
        ([200, 200], 0.01, 200),
        ([1, 1], 0.9, 1),
    ],
)
def test_choose_groups_draws_the_closest_size(sizes, share, held):
    assert sum(sizes[k] for k in choose_groups(sizes, share, seed=0)) == held


@pytest.mark.parametrize(
    ("talks", "description"),
    [
        (["a|1@x", "b|1@x"], "the cluster 'x'"),
        (["a  b|1", "a b|2"], "the question 'a b'"),
        (["a|1", "a|1|c|2"], "the conversation that begins with 'a'"),
        (
            ["a|1@x", "a|2@y", "b|1@y"],
            "clusters and questions that lead from one to the next, such as the cluster 'y' (2)",
        ),
        ([f"{'long ' * 30}|1"] * 2, f"the question '{('long ' * 12)[:57]}...'"),
    ],
)
def test_describe_group_names_what_is_shared(talks, description):
    assert describe_group(rows(*talks)) == description
