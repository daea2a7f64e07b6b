"""The support example's evaluation: metrics match hand-computed values, and gains are paired."""

import json
import math

import pytest
import torch


@pytest.fixture(scope="module")
def rows(support):
    return [json.loads(line) for line in (support / "data" / "test.jsonl").read_text("utf-8").splitlines()][:6]


@pytest.fixture(scope="module")
def loaded(tiny_base):
    from lightning_ft.data.tokenizers import load_tokenizer
    from lightning_ft.models.load import load_causal_lm

    return load_causal_lm(str(tiny_base), dtype="float32"), load_tokenizer(str(tiny_base))


@pytest.fixture
def other(loaded):
    """The same model with different weights in its last layer."""
    import copy

    model = copy.deepcopy(loaded[0])
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(0.5)
    return model


@pytest.fixture(scope="module")
def options():
    from evaluate import GenerationOptions

    return GenerationOptions(completions=3, max_new_tokens=8, batch_size=5)


def by_hand(model, ids, start):
    """Sum of the log-probabilities of all tokens from `start` on."""
    with torch.no_grad():
        logprobs = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logprobs[position - 1, ids[position]]) for position in range(start, len(ids)))


def test_logprobs_match_single_completions(loaded, rows, options):
    from evaluate import answers, logprobs

    from lightning_ft.data.encode import encode_prompt

    model, tokenizer = loaded
    repeated = [row for row in rows for _ in range(options.completions)]
    completions = answers(model, tokenizer, rows, options, greedy=False)
    found = logprobs(model, tokenizer, repeated, completions, batch_size=5)
    assert len(found) == len(completions) == 18
    for row, completion, value in zip(repeated, completions, found.tolist(), strict=True):
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": row["input"]}])
        assert value == pytest.approx(by_hand(model, [*prompt, *completion.tokens], len(prompt)), abs=1e-3)


def test_answers_are_deterministic_and_differ_within_a_message(loaded, rows, options):
    from evaluate import answers

    first, again = (answers(*loaded, rows, options, greedy=False) for _ in range(2))
    assert [c.tokens for c in first] == [c.tokens for c in again]
    assert len({c.tokens for c in first[:3]}) > 1
    assert len(answers(*loaded, rows, options, greedy=True)) == len(rows)


def test_measure_sums_over_completions_of_a_message(loaded, other, rows, options):
    from evaluate import measure
    from rewards import true_reward

    model, tokenizer = loaded
    columns, replies = measure(
        other, model, tokenizer, rows, options, lambda rows, texts: [float(len(t)) for t in texts]
    )
    assert {len(column) for column in columns.values()} == {len(rows)}
    assert columns["completions"] == [3.0] * len(rows)
    assert columns["reward_model"] == [sum(map(len, texts)) for texts in replies]
    assert all(0 <= fewer <= 3 for fewer in columns["truncated"])
    assert sum(columns["truncated"]) > 0  # eight tokens are too few
    for row, texts, truncated, worth in zip(rows, replies, columns["truncated"], columns["true_reward"], strict=True):
        if truncated == 0:
            assert worth == pytest.approx(sum(true_reward(text, row["output"]) for text in texts))
        if truncated == 3:
            assert worth == -3.0
    assert any(abs(kl) > 0.1 for kl in columns["kl"])


def test_metrics_of_the_start_model_have_no_kl_and_gain(loaded, rows, options):
    from evaluate import compute_metrics, measure

    model, tokenizer = loaded
    columns, _ = measure(model, model, tokenizer, rows, options)
    found = compute_metrics(columns, columns, [row["cluster"] for row in rows])
    assert found["kl"].value == found["kl_per_token"].value == 0.0
    assert (found["gain"].lo, found["gain"].value, found["gain"].hi) == (0.0, 0.0, 0.0)
    assert "reward_model" not in found


def test_compute_metrics_takes_ratios_of_sums_and_paired_gains():
    from evaluate import compute_metrics

    names = ["true_reward", "kl", "tokens", "courtesies", "malformed", "truncated", "completions"]
    ours = dict(
        zip(names, [[2.0, 0.0, 1.0], [1.0, 2.0, 6.0], [4.0, 6.0, 20.0], *[[0.0] * 3] * 3, [2.0] * 3], strict=True)
    )
    ours |= {"greedy_true_reward": [1.0, 0.0, 1.0], "right_route": [1.0, 0.0, 1.0], "spread": [0.5] * 3}
    ours["messages"] = [1.0] * 3
    start = {**ours, "true_reward": [1.0, -1.0, 0.0], "right_route": [0.0, 0.0, 1.0]}
    found = compute_metrics(ours, start, ["a", "b", "c"])
    assert found["true_reward"].value == pytest.approx(0.5)
    assert found["kl"].value == pytest.approx(1.5)
    assert found["kl_per_token"].value == pytest.approx(0.3)
    assert found["right_route"].value == pytest.approx(2 / 3)
    assert found["right_route_gain"].value == pytest.approx(1 / 3)
    gain = found["gain"]
    assert (
        gain.value == gain.lo == gain.hi == pytest.approx(0.5)
    )  # all messages have the same gain, so the interval is a point
    assert found["true_reward"].lo < found["true_reward"].hi


def test_main_writes_json(tiny_base, tmp_path, monkeypatch, capsys):
    import evaluate

    output = tmp_path / "out" / "figures.json"
    models = [f"base={tiny_base}", f"again={tiny_base}"]
    options = ["--rows", "4", "--completions", "2", "--max-new-tokens", "6", "--threads", "1", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *models, *options])
    evaluate.main()
    written = json.loads(output.read_text("utf-8"))
    assert set(written["figures"]) == {"base", "again"}
    assert written["figures"]["base"] == {
        name: {**figure, "value": pytest.approx(figure["value"])}
        for name, figure in written["figures"]["again"].items()
    }
    assert written["asked"]["messages"] == 4
    assert len(written["samples"]["base"][0]["replies"]) == 2
    assert all(math.isfinite(figure["lo"]) for figure in written["figures"]["base"].values())
    assert "true reward" in capsys.readouterr().out
