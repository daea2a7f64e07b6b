"""Requests that also appear in the training rows, measured in a custom training loop."""

import json

import pytest
from tiny import make_model, make_tokenizer

from lightning_ft import PairDataModule, PromptBaseline
from lightning_ft.errors import DataError
from lightning_ft.evaluation.savings.measurement import SavingsMeasurement, measure_token_savings
from lightning_ft.evaluation.savings.overlap import request_overlap, training_index
from lightning_ft.types import Message, Request

BASELINE = PromptBaseline("Answer in one word.")
QUICK = {"max_new_tokens": 2, "resamples": 99, "timed_requests": 0, "progress": False, "margin": 0.05}


def request(name, text, cluster=None):
    return Request(name, (Message(role="user", content=text),), "here", cluster)


REQUESTS = [request("r0", "where is the parcel"), request("r1", "where is the lamp"), request("r2", "where is the dog")]
ROWS = [{"input": "where  is the parcel", "output": "there"}, {"input": "where is the dog", "output": "here"}]


def right(output, reference):
    return 1.0


def write(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.mark.parametrize("source", ["rows", "file", "sources", "requests", "index"])
def test_training_index_of_each_source(tmp_path, source):
    data = PairDataModule(ROWS)
    data.load_rows()
    rows = {
        "rows": ROWS,
        "file": write(tmp_path),
        "sources": [ROWS[:1], write(tmp_path)],
        "requests": data.requests("train"),
        "index": data.splits.training_index(),
    }[source]
    assert request_overlap(REQUESTS, training_index(rows)).in_training == ("r0", "r2")


def test_training_index_refuses_bad_rows():
    with pytest.raises(
        DataError, match=r"train_rows: 1 of its rows .*train_rows, row 2, 'input': empty input.* as requests"
    ):
        training_index([ROWS[0], {"input": "", "output": "a"}])


def test_request_overlap_finds_training_clusters():
    train = [request("t0", "why", "Ann"), request("t1", "where is the lamp", "Bob")]
    requests = [
        request("r0", "where is the parcel", "Ann"),
        request("r1", "where is the lamp"),
        request("r2", "when", "Cid"),
    ]
    found = request_overlap(requests, training_index(train))
    assert (found.in_training, found.in_training_clusters, found.n) == (("r1",), ("r0",), 3)
    assert found.cluster_warnings[0].startswith("1 of 3 requests belong to a cluster that also has training rows")
    assert request_overlap(requests[1:], training_index(train)).cluster_warnings == ()


def measured(**options):
    measurement = SavingsMeasurement(make_tokenizer(), REQUESTS, BASELINE, scorer=right, **QUICK, **options)
    measurement.before(make_model())
    return measurement.after(make_model(seed=1))


def test_measurement_counts_requests_in_training():
    found = measured(train_rows=[*ROWS, {"input": "where is the lamp post", "output": "there"}])
    assert found.in_training == ("r0", "r2")
    assert "; 2 of 3 requests (66.6%) also appear in the training rows." in found.headline
    assert found.provenance["requests_in_training"] == 2
    drawn = measured(train_rows=ROWS, max_requests=1)
    assert (drawn.n, len(drawn.in_training)) == (1, sum(i in ("r0", "r2") for i in drawn.arms["tuned"].ids))
    unknown = measured()
    assert unknown.in_training is None
    assert unknown.provenance["requests_in_training"] == "not checked: pass train_rows="


def test_measure_token_savings_warns_of_training_clusters():
    clusters = [request(r.id, r.messages[0]["content"], "Ann") for r in REQUESTS]
    options = {"original": make_model(), "scorer": right, "train_rows": [request("t", "why", "Ann")], **QUICK}
    found = measure_token_savings(make_model(seed=1), make_tokenizer(), clusters, BASELINE, **options)
    assert found.in_training == ()
    assert "3 of 3 requests belong to a cluster that also has training rows" in found.warnings[-1]
