"""PairDataModule in a Trainer."""

import inspect
import json
import re
import warnings

import datasets
import pytest
import torch
from recorder import Recorder
from tiny import make_rows

from lightning_ft._lightning import NAMESPACE, _pl, cli_module
from lightning_ft.data import splits as splits_module
from lightning_ft.data.pairs import PairDataModule
from lightning_ft.data.preferences import PreferenceDataModule
from lightning_ft.data.prompts import PromptDataModule
from lightning_ft.errors import ConfigError, DataError, NamespaceError, UnknownArgumentError

TURNS = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def trainer(trainer_options):
    return lambda **options: _pl.Trainer(**{"max_epochs": 2, **trainer_options, **options})


def test_pair_data_module_serves_all_stages(trainer, tokenizer, pairs, write):
    data = PairDataModule(
        write("train.jsonl", pairs[:16]),
        write("validation.jsonl", pairs[16:20]),
        pairs[20:],
        predict=[{"input": "where is it"}, {"input": "and now"}, TURNS["messages"] and {"input": "so", "output": "x"}],
        batch_size=4,
    )
    module = Recorder(tokenizer)
    trainer(num_sanity_val_steps=0).fit(module, data)
    assert [s[0] for s in module.seen] == [0, 0, 0, 0, "validation", 1, 1, 1, 1, "validation"]
    targets = [sorted(t for s in module.seen if s[0] == epoch for t in s[2]) for epoch in (0, 1)]
    assert targets[0] == targets[1]
    assert module.seen[0][1] != module.seen[5][1]  # another order
    assert data.report["train"].kept == 16
    module.seen = []
    trainer().validate(module, data, verbose=False)
    trainer().test(module, data, verbose=False)
    assert [s[0] for s in module.seen] == ["validation", "test"]
    batches = trainer().predict(module, data)
    assert [[m["content"] for m in conversation] for batch in batches for conversation in batch] == [
        ["where is it"], ["and now"], ["so"]
    ]  # fmt: skip


def test_requests_alone_are_answered_and_only_fit_needs_training_rows(trainer, tokenizer, pairs):
    module = Recorder(tokenizer)
    data = PairDataModule(predict=[{"input": "where is it"}], validation=pairs[:4], test=pairs[4:8])
    assert [[m["content"] for m in turns] for (turns,) in trainer().predict(module, data)] == [["where is it"]]
    trainer().validate(module, data, verbose=False)
    trainer().test(module, data, verbose=False)
    assert [s[0] for s in module.seen] == ["validation", "test"]
    assert data.training_rows() == ({}, ())
    without = PairDataModule(pairs, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="no predict rows: pass predict="):
        without.setup("predict")  # before the weights are loaded
    for use in (lambda: trainer().fit(module, data), lambda: data.require_rows("lightning-ft plan")):
        with pytest.raises(ConfigError, match="PairDataModule has no train rows: pass train="):
            use()


@pytest.mark.parametrize("option", [{"validation": 0.1}, {"mixing": [1.0]}, {"streaming": True}])
def test_options_of_training_rows_are_refused_without_them(option):
    ((name, value),) = option.items()
    with pytest.raises(ConfigError, match=re.escape(f"{name}={value!r} is about training rows, and there are none")):
        PairDataModule(predict=[{"input": "a"}], **option)


@pytest.mark.parametrize("packing", [True, False])
def test_packing_changes_only_the_layout(tokenizer, pairs, packing):
    data = PairDataModule(pairs, tokenizer=tokenizer, batch_size=5, packing=packing, cache_dir=False)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [b.num_groups for b in batches] == [5, 5, 5, 5, 4]
    other_way = PairDataModule(pairs, tokenizer=tokenizer, batch_size=5, packing=not packing, cache_dir=False)
    others = list(other_way.train_dataloader())
    places, other_places = (sum(b.input_ids.numel() for b in way) for way in (batches, others))
    assert (places < other_places) == packing
    for one, other in zip(batches, others, strict=True):
        assert one.targets.tolist() == other.targets.tolist()
        assert one.groups.tolist() == other.groups.tolist()


def test_pairs_are_checked_before_weights_are_loaded(trainer, tokenizer, pairs):
    module = Recorder(tokenizer)
    with pytest.raises(DataError, match="1 bad row"):
        trainer().fit(module, PairDataModule([*pairs, {"input": "a", "output": ""}]))
    assert not module.loaded
    with pytest.raises(DataError, match="overlong answer"):  # in test rows too, before training starts
        trainer().fit(module, PairDataModule(pairs, test=[{"input": "a", "output": "b " * 99}], max_length=64))
    assert not module.loaded


@pytest.mark.parametrize(
    ("stage", "loaded", "encoded"),
    [
        ("fit", {"train", "validation", "test"}, {"train", "validation", "test"}),
        ("validate", {"train", "validation"}, {"validation"}),  # train is read since rows are held out of it
        ("test", {"test"}, {"test"}),
        ("predict", {"predict"}, set()),
    ],
)
def test_setup_does_the_work_of_a_stage_once(trainer, tokenizer, pairs, monkeypatch, stage, loaded, encoded):
    done = []
    for name in ("load_source", "tokenize"):
        original = getattr(splits_module, name)

        def counted(*args, original=original, name=name, **kwargs):
            done.append((name, args[2] if name == "load_source" else kwargs["label"]))
            return original(*args, **kwargs)

        monkeypatch.setattr(splits_module, name, counted)
    data = PairDataModule(pairs, 0.25, pairs[:4], predict=[{"input": "a"}], cache_dir=False)
    run = getattr(trainer(max_epochs=1), stage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(Recorder(tokenizer), datamodule=data)
    assert set(data.splits.rows) == loaded
    assert set(data.splits.encoded) == encoded
    assert len(done) == len(set(done))


def test_pair_data_module_works_without_validation(trainer, tokenizer, pairs):
    module = Recorder(tokenizer)
    trainer(max_epochs=1).fit(module, PairDataModule(pairs))
    assert len(module.seen) == 3


def test_no_validation_rows_are_no_reason_to_warn(trainer, tokenizer, pairs, recwarn):
    trainer(max_epochs=1, num_sanity_val_steps=2).fit(Recorder(tokenizer), PairDataModule(pairs))
    assert not [str(w.message) for w in recwarn if "across ranks is zero" in str(w.message)]


@pytest.mark.parametrize("batches", [1, 2])
def test_overfit_batches_repeats_the_same_batches(trainer, tokenizer, pairs, batches):
    module = Recorder(tokenizer)
    data = PairDataModule(pairs[:16], validation=pairs[16:], batch_size=4, shuffle=True)
    trainer(max_epochs=3, overfit_batches=batches).fit(module, data)
    seen = [epoch_of_rows for stage, *epoch_of_rows in module.seen if stage != "validation"]
    assert len(seen) == 3 * batches
    assert seen[:batches] == seen[batches : 2 * batches] == seen[2 * batches :]


def test_batch_size_of_hparams_is_used(trainer, tokenizer, pairs):
    """BatchSizeFinder writes it there."""
    data = PairDataModule(pairs[:12], tokenizer=tokenizer, batch_size=4)
    assert len(data.train_dataloader()) == 3
    data.hparams["batch_size"] = 6
    assert data.batch_size == 6
    assert len(data.train_dataloader()) == 2
    data.batch_size = 3
    assert data.hparams["batch_size"] == 3
    assert len(data.train_dataloader()) == 4
    with pytest.raises(ConfigError, match="batch_size=0"):
        data.batch_size = 0


def test_missing_splits_and_tokenizer_are_named_in_errors(tokenizer, pairs, trainer):
    data = PairDataModule(pairs, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="no test rows: pass test="):
        trainer().test(Recorder(), data)
    with pytest.raises(ConfigError, match="no predict rows: pass predict="):
        trainer().predict(Recorder(), data)
    with pytest.raises(ConfigError, match="no tokenizer: pass tokenizer=, or use it with a module that has one"):
        trainer().fit(Recorder(), PairDataModule(pairs))


def test_pair_data_module_needs_no_pad_token(make_tokenizer, pairs):
    tokenizer = make_tokenizer(pad=None)
    for packing in (True, False):
        data = PairDataModule(pairs[:5], tokenizer=tokenizer, packing=packing, batch_size=5, shuffle=False)
        data.setup("fit")
        (batch,) = data.train_dataloader()
        filler = batch.input_ids[batch.segment_ids < 0]
        assert set(filler.tolist()) <= {tokenizer.eos_token_id}
        assert len(filler) or packing
        lengths = data.report["train"]
        assert (batch.num_tokens, batch.num_targets) == (sum(lengths.lengths), sum(lengths.supervised))
    assert tokenizer.pad_token is None  # no token was added


def test_tokenizer_is_loaded_by_name(tmp_path, tokenizer, pairs):
    tokenizer.save_pretrained(tmp_path)
    data = PairDataModule(pairs, tokenizer=str(tmp_path))
    data.setup("fit")
    assert data.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert data.hparams["tokenizer"] == str(tmp_path)


def test_tokenizer_that_differs_from_the_modules_is_rejected(trainer, make_tokenizer, pairs):
    with pytest.warns(UserWarning, match=r"The DataModule's tokenizer .* differs from the module's"):
        trainer(max_epochs=1).fit(Recorder(make_tokenizer("llama")), PairDataModule(pairs, tokenizer=make_tokenizer()))


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_encoded_again_for_a_module_with_another_tokenizer(trainer, make_tokenizer, pairs, write, streaming):
    long = {"input": "where " * 90, "output": "x"}
    rows = {"validation": pairs[20:]} if streaming else {"validation": 0.2}
    data = PairDataModule(
        write("rows.jsonl", [*pairs, long]), **rows, streaming=streaming, max_length=80, on_overlong="drop",
        batch_size=4, shuffle=False, cache_dir=False,
    )  # fmt: skip
    seen, reports = [], []
    for template in ("chatml", "headers_only", "chatml"):
        module = Recorder(make_tokenizer(template))
        trainer(max_epochs=1).fit(module, data)
        assert data.tokenizer.chat_template == module.tokenizer.chat_template
        seen.append(list(module.seen))
        reports.append({name: (r.read, r.kept, dict(r.notes)) for name, r in data.report.items()})
    assert seen[0] == seen[2] != seen[1]
    assert reports[0] == reports[2]
    own = PairDataModule(data.hparams["train"], **rows, tokenizer=make_tokenizer("llama"), max_length=80,
                         on_overlong="drop", cache_dir=False)  # fmt: skip
    with pytest.warns(UserWarning, match="differs from the module's"):
        trainer(max_epochs=1).fit(Recorder(make_tokenizer("chatml")), own)
    assert own.tokenizer.chat_template == make_tokenizer("llama").chat_template


def test_chat_template_is_set_on_the_modules_tokenizer(trainer, tokenizer, pairs):
    module = Recorder(tokenizer)
    data = PairDataModule(pairs[:1], chat_template="text")
    trainer(max_epochs=1).fit(module, data)
    assert tokenizer.decode(module.seen[0][1][0]) == "<|bos|>where is the parcel 0parcel 0<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|bos|>x"


def test_sources_are_mixed_by_weight(tokenizer, pairs):
    data = PairDataModule([pairs[:4], pairs[4:]], mixing=[2.0, 0.5], tokenizer=tokenizer, batch_size=3)
    data.setup("fit")
    assert sum(b.num_groups for b in data.train_dataloader()) == 18
    data = PairDataModule([pairs[:4], pairs[4:]], mixing=[2.0], tokenizer=tokenizer)
    data.setup("fit")
    with pytest.raises(ConfigError, match=r"mixing=\[2.0\]: expected one weight for each of 2 sources"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([float("nan"), 1], "finite numbers"),
        ([float("inf"), 1], "finite numbers"),
        (["1", 1], "finite numbers"),
        ([True, False], "finite numbers"),
        ([0, 0], "one above"),
        ([1e-9, 0.0], "an epoch would have no row"),
    ],
)
def test_weights_that_make_no_epoch_are_refused(tokenizer, pairs, weights, message):
    data = PairDataModule([pairs[:4], pairs[4:]], mixing=weights, tokenizer=tokenizer)
    data.setup("fit")
    with pytest.raises(ConfigError, match=rf"mixing=.*{message}"):
        data.train_dataloader()


def test_iterable_dataset_is_read_once_before_training(trainer, tokenizer, pairs):
    read = []

    def stream():
        for row in pairs:
            read.append(row)
            yield row

    module = Recorder(tokenizer)
    data = PairDataModule(datasets.IterableDataset.from_generator(stream), streaming=False, batch_size=8)
    trainer().fit(module, data)
    assert len(module.seen) == 6
    assert len(read) == 24


def test_pair_data_module_hyperparameters_are_json(trainer, tokenizer, pairs, write, tmp_path):
    path = write("train.jsonl", pairs)
    for data in (
        PairDataModule(path, 0.25, columns={"input": "input"}, mixing=[1.0], cache_dir=str(tmp_path / "cache")),
        PairDataModule([path, path], pairs, tokenizer=tokenizer),
        PairDataModule(datasets.Dataset.from_list(pairs), predict=pairs),
    ):
        assert json.loads(json.dumps(dict(data.hparams))) == dict(data.hparams)
    data = PairDataModule(path, 0.25, batch_size=3)
    one = trainer(max_epochs=1, limit_val_batches=0)
    one.fit(Recorder(tokenizer), data)
    one.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["datamodule_hyper_parameters"]["batch_size"] == 3
    again = PairDataModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert dict(again.hparams) == dict(data.hparams)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"max_length": 1}, "max_length=1: expected at least 2"),
        ({"on_overlong": "cut"}, "on_overlong='cut': expected one of 'error', 'drop', 'truncate_prompt'"),
        ({"on_bad_row": "warn"}, "on_bad_row='warn': expected one of 'error', 'skip'"),
        ({"validation": 1.5}, "validation=1.5: a share must lie between 0 and 1"),
        ({"validation": 0}, "validation=0: a share"),
        ({"validation": True}, "validation=True: a share"),
        ({"cache_dir": True}, "cache_dir=True: expected a folder"),
    ],
)
def test_pair_data_module_rejects_invalid_arguments(options, said):
    with pytest.raises(ConfigError, match=said):
        PairDataModule([], **options)


def test_other_lightning_package_is_rejected(tokenizer, pairs):
    other = pytest.importorskip("lightning.pytorch" if NAMESPACE == "pytorch_lightning" else "pytorch_lightning")
    data = PairDataModule(pairs, tokenizer=tokenizer)
    data.trainer = other.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    data.trainer.strategy.connect(Recorder(tokenizer))
    with pytest.raises(NamespaceError, match="LIGHTNING_FT_NAMESPACE"):
        data.setup("fit")


def cli(*arguments):
    return (
        cli_module()
        .LightningCLI(Recorder, PairDataModule, run=False, save_config_callback=None, args=list(arguments))
        .datamodule
    )


def test_pair_data_module_is_read_from_cli_and_yaml(write, pairs, tmp_path):
    a, b = write("a.jsonl", pairs), write("b.jsonl", pairs)
    data = cli(f"--data.train={a}", "--data.validation=0.25", "--data.cache_dir=false", "--data.columns.input=question")
    assert data.splits.sources == {"train": a, "validation": 0.25}
    assert data.rules.cache is None
    assert data.rules.columns == {"input": "question"}
    config = {"data": {"train": [a, b], "mixing": [1, 0.5], "validation": b, "on_overlong": "drop", "tokenizer": None}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    data = cli(f"--config={path}")
    assert data.splits.sources == {"train": [a, b], "validation": b}
    assert data.rules.on_overlong == "drop"
    with pytest.raises(SystemExit):
        cli(f"--data.train={a}", "--data.on_overlong=cut")


def test_help_lists_arguments(capsys):
    with pytest.raises(SystemExit):
        cli("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "--data.max_length" in said
    assert "Maximum number of tokens per row, answer included" in said


def test_reorder_keeps_the_rows_of_each_split(tokenizer):
    def rows(reordered):
        data = PairDataModule(make_rows(24), validation=0.25, tokenizer=tokenizer, batch_size=4)
        if reordered is not None:
            data.reorder(reordered)
        data.setup("fit")
        batches = [batch.input_ids.tolist() for batch in data.train_dataloader()]
        return batches, [r.id for r in data.requests("train")], [r.id for r in data.requests("validation")]

    plain, again, other = rows(None), rows(0), rows(1)
    assert plain == again
    assert plain[1:] == other[1:]
    assert plain[0] != other[0]


@pytest.mark.parametrize("data_module", [PairDataModule, PreferenceDataModule, PromptDataModule])
def test_data_modules_name_the_nearest_argument(data_module):
    with pytest.raises(
        UnknownArgumentError, match=r"DataModule has no argument 'max_lenght'. Did you mean 'max_length'\?"
    ):
        data_module([{"input": "a", "output": "b"}], max_lenght=16)
    with pytest.raises(TypeError, match=r"has no argument 'zzz'\. It accepts train, validation, test, "):
        data_module([{"input": "a", "output": "b"}], zzz=1)


def test_pair_data_module_subclass_may_take_other_arguments():
    class Shortened(PairDataModule):
        def __init__(self, *args, limit, **options):
            super().__init__(*args[:1], **options)
            self.limit = limit

    assert Shortened([TURNS], limit=3).limit == 3


def test_requests_have_the_fields_that_only_measurements_use(tokenizer):
    rows = [
        {"input": "a", "output": "b", "context": "only prompted", "structured_output": {"choices": ["b", "c"]}},
        {"input": "c", "output": "d", "context": "", "structured_output": '{"regex": "d+"}'},
        {"input": "e", "output": "f", "context": None, "structured_output": {"choices": None}},
    ]
    data = PairDataModule(
        rows[:1], test=rows, columns={"prompt_context": "context"}, tokenizer=tokenizer, cache_dir=False
    )
    data.setup("test")
    requests = data.requests("test")
    assert [r.prompt_context for r in requests] == ["only prompted", None, None]
    assert [r.structured_output for r in requests] == [{"choices": ["b", "c"]}, {"regex": "d+"}, None]
    data = PairDataModule([{"input": "a", "output": "b", "structured_output": ["b"]}], tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"structured_output.*found list"):
        data.setup("fit")


@pytest.mark.parametrize("kind", [PairDataModule, PreferenceDataModule, PromptDataModule])
def test_docstring_describes_every_argument(kind):
    described = re.findall(r"^    (\w+): ", kind.__doc__.partition("\nArgs:\n")[2].partition("\n\n")[0], re.MULTILINE)
    assert described == list(inspect.signature(kind).parameters)
