"""All layouts of prompts and completions have the same targets, and every completion's last token is found."""

import itertools

import pytest
import torch

from lightning_ft.data.layout import Example, contiguous_rows
from lightning_ft.data.masks import attention_mask
from lightning_ft.data.row_costs import rows_cost
from lightning_ft.data.shared_prompts import last_positions, lay_out_completions
from lightning_ft.errors import ConfigError

LAYOUTS = [{"shared": True}, {"shared": False}, {"shared": False, "packing": False}]


def make(shapes=((4, (3, 1)), (1, (2,)), (6, (5, 2, 7)))):
    """Prompts and completions in which no token appears twice; a completion's last token isn't always supervised."""
    fresh = iter(range(1, 10_000))

    def take(count):
        return torch.tensor([next(fresh) for _ in range(count)])

    prompts, completions = [], []
    for n, (length, lengths) in enumerate(shapes):
        prompts.append(take(length))
        completions.append([])
        for i, size in enumerate(lengths):
            supervised = torch.ones(size, dtype=torch.bool)
            supervised[0] = (n + i) % 3 != 2 or size == 1  # a shared beginning of an answer that isn't supervised
            supervised[-1] = size < 3  # a line break after the end token
            completions[-1].append(Example(take(size), supervised))
    return prompts, completions


def every(completions):
    return [completion for behind in completions for completion in behind]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lay_out_completions_orders_targets_by_completion(layout):
    prompts, completions = make()
    batch = lay_out_completions(prompts, completions, **layout)
    want = [(g, int(t)) for g, c in enumerate(every(completions)) for t in c.input_ids[c.supervised]]
    assert list(zip(batch.groups.tolist(), batch.targets.tolist(), strict=True)) == want
    assert batch.num_groups == len(every(completions))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lay_out_completions_predicts_targets_from_preceding_tokens_only(layout):
    prompts, completions = make()
    batch = lay_out_completions(prompts, completions, **layout)
    allowed = attention_mask(batch)[:, 0]
    length = batch.input_ids.shape[1]
    before = {}  # each token's context, computed the slow way
    for prompt, behind in zip(prompts, completions, strict=True):
        for completion in behind:
            whole = torch.cat([prompt, completion.input_ids]).tolist()
            before |= {token: whole[:i] for i, token in enumerate(whole)}
    for predictor, target in zip(batch.predictors.tolist(), batch.targets.tolist(), strict=True):
        row, place = divmod(predictor, length)
        seen = batch.input_ids[row][allowed[row, place]].tolist()
        assert seen == before[target]
        assert batch.position_ids[row, place] == len(seen) - 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shapes", [((4, (3, 1)), (1, (2,)), (6, (5, 2, 7))), ((2, (1, 1)), (2, (1, 1))), ((3, (4,)),)])
def test_last_positions_are_those_of_the_completions(layout, shapes):
    prompts, completions = make(shapes)
    batch = lay_out_completions(prompts, completions, **layout)
    found = batch.input_ids.flatten()[last_positions(batch)].tolist()
    assert found == [int(completion.input_ids[-1]) for completion in every(completions)]


def test_lay_out_completions_contains_a_shared_prompt_once():
    prompts, completions = make()
    shared = lay_out_completions(prompts, completions)
    assert shared.num_tokens == sum(map(len, prompts)) + sum(map(len, every(completions)))
    assert shared.has_shared_prefixes
    repeated = lay_out_completions(prompts, completions, shared=False)
    extra = sum(len(p) * (len(behind) - 1) for p, behind in zip(prompts, completions, strict=True))
    assert repeated.num_tokens == shared.num_tokens + extra
    assert not repeated.has_shared_prefixes
    assert len(repeated.input_ids) == 1
    apart = lay_out_completions(prompts, completions, shared=False, packing=False, pad_token_id=9_999)
    assert len(apart.input_ids) == len(every(completions))
    assert not apart.packed
    assert (apart.input_ids == 9_999).sum() == apart.input_ids.numel() - apart.num_tokens > 0


@pytest.mark.parametrize(
    ("shapes", "rows", "tokens", "shares"),
    [
        (((400, (50,) * 4),), 1, 600, True),  # a long prompt once
        (((16, (240,) * 8),), 8, 8 * 256, False),  # a short one before each long completion
        (((300, (400,) * 8),), 4, 4 * (300 + 800), True),  # in between: two completions to a row
        (((600, (40, 50)), (20, (900, 900))), 3, 690 + 2 * 920, True),  # per prompt
        (((4, (3, 1)), (1, (2,)), (6, (5, 2, 7))), 1, 31, True),  # short ones together, without padding
        (((5, (2000,)),), 1, 2005, False),
    ],
)
def test_completions_share_their_prompt_where_that_is_cheaper(shapes, rows, tokens, shares):
    batch = lay_out_completions(*make(shapes))
    assert len(batch.input_ids) == rows
    assert batch.num_tokens == tokens
    assert batch.has_shared_prefixes == shares


@pytest.mark.parametrize(
    "shapes",
    [
        ((16, (240,) * 8),),
        ((5, (90, 400, 3, 77)), (300, (20, 30)), (2, (600,))),
        ((600, (300, 380)), (50, (390, 400)), (200, (350, 350)), (600, (100, 390))),
    ],
)
def test_layout_is_the_cheapest_of_all_numbers_of_rows(shapes):
    """Compared with a row per prompt, a row per completion, all in one row, and packed prompts or completions."""
    prompts, completions = make(shapes)

    def cost(batch):
        return rows_cost(*batch.input_ids.shape)

    chosen = cost(lay_out_completions(prompts, completions))
    per_prompt = [len(p) + sum(map(len, children)) for p, children in zip(prompts, completions, strict=True)]
    each = [len(p) + len(c) for p, children in zip(prompts, completions, strict=True) for c in children]
    for count, length in ((len(per_prompt), max(per_prompt)), (len(each), max(each)), (1, sum(each))):
        assert chosen <= rows_cost(count, length)
    for lengths in (per_prompt, each):
        for count in range(1, len(lengths) + 1):
            rows = contiguous_rows(lengths, count)
            assert chosen <= rows_cost(len(rows), max(sum(lengths[i] for i in row) for row in rows)) * 1.1
    assert chosen <= cost(lay_out_completions(prompts, completions, shared=False))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_contiguous_rows_are_as_short_as_possible(count):
    lengths = [5, 1, 9, 2, 2, 6, 0]
    rows = contiguous_rows(lengths, count)
    assert [i for row in rows for i in row] == list(range(7))
    cuts = itertools.combinations(range(1, 7), min(count, 7) - 1)
    parts = [[range(a, b) for a, b in itertools.pairwise((0, *cut, 7))] for cut in cuts]
    longest = min(max(sum(lengths[i] for i in row) for row in part) for part in parts)
    assert max(sum(lengths[i] for i in row) for row in rows) == longest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_last_positions_are_the_same_after_moving_the_batch(layout):
    batch = lay_out_completions(*make(), **layout)
    assert torch.equal(last_positions(batch.to("cpu")), last_positions(batch))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((2, (1,)), (0, (1,))), "Prompt 1 of a batch has no tokens"), (((2, ()),), "Prompt 0 of a batch has no compl")],
)
def test_lay_out_completions_rejects_empty_prompts_and_completions(shapes, message):
    with pytest.raises(ConfigError, match=message):
        lay_out_completions(*make(shapes))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        lay_out_completions([torch.tensor([1])], [])
