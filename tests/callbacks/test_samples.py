"""SampleCompletions: which completions are shown and where, and files of resumed runs."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from lightning_ft._lightning import LightningModule, Trainer, _pl
from lightning_ft.callbacks.samples import (
    MAX_CELL_LENGTH,
    SampleCompletions,
    log_samples,
    samples_columns,
    samples_markdown,
)
from lightning_ft.errors import ConfigError
from lightning_ft.modules.samples import RolloutSamples, drop_samples, read_samples, rename_existing, write_samples
from lightning_ft.rewards.batch import Rewards

PER_STEP, STEPS = 4, 6


def make_record(step, count=PER_STEP, **fields):
    values = torch.arange(float(count)) + step
    per_function = torch.stack([values, torch.full((count,), math.nan)], dim=1)
    defaults = {
        "prompts": [f"prompt {i // 2} of {step}" for i in range(count)],
        "completions": [f"completion {i} of {step}" for i in range(count)],
        "rewards": Rewards(("correct", "short"), per_function, values),
        "advantages": [i - 0.5 for i in range(count)],
        "truncated": [i % 2 == 1 for i in range(count)],
        "lengths": [i + 1 for i in range(count)],
    }
    return RolloutSamples(step, **{**defaults, **fields})


class Policy(LightningModule):
    """Minimal module with the `last_rollout` of GRPO and PPO."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.last_rollout = None
        self.fails_at = fails_at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fails_at:
            raise RuntimeError("out of memory")
        self.last_rollout = make_record(self.global_step)
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(options, *callbacks, module=None, ckpt_path=None, **more):
    trainer = Trainer(**{"max_epochs": 1, **options, **more}, callbacks=list(callbacks))
    trainer.fit(module or Policy(), torch.utils.data.DataLoader(range(STEPS)), ckpt_path=ckpt_path)
    return trainer


def rows_per_step(path):
    """Return the number of rows of each step, in the order of the file."""
    steps = [row["step"] for row in read_samples(path)]
    return {step: steps.count(step) for step in steps}


# -------------------------------------------------------------------- rows


def test_rollout_record_rows_are_json():
    rewards = Rewards(
        ("correct",),
        torch.tensor([[1.0], [math.nan]]),
        torch.tensor([2.0, math.nan]),
        extra={"verdict": ["yes", None], "odd": [torch.tensor(0.5), {"why": {3}}], "nan": [math.nan, (1, 2)]},
    )
    messages = [[{"role": "user", "content": "é\n2+2?"}]] * 2
    record = RolloutSamples(3, messages, ["4", ""], rewards, [0.5, math.nan], [False, True], [1, 0])
    first = {
        "step": 3,
        "prompt": messages[0],
        "completion": "4",
        "rewards": {"correct": 1.0},
        "reward": 2.0,
        "advantage": 0.5,
        "truncated": False,
        "length": 1,
        "extra": {"verdict": "yes", "odd": 0.5, "nan": None},
    }
    second = {
        **first,
        "completion": "",
        "rewards": {"correct": None},
        "reward": None,
        "advantage": None,
        "truncated": True,
        "length": 0,
        "extra": {"verdict": None, "odd": {"why": "{3}"}, "nan": [1, 2]},
    }
    assert record.rows() == [first, second]
    assert json.loads(json.dumps(record.rows(), allow_nan=False)) == [first, second]


@pytest.mark.parametrize(
    ("num_samples", "chosen"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 5]), (8, range(8)), (9, range(8)), (None, range(8))]
)
def test_rollout_record_rows_spreads_samples_over_prompts(num_samples, chosen):
    rows = make_record(0, 8).rows(num_samples)
    assert [row["length"] - 1 for row in rows] == list(chosen)


@pytest.mark.parametrize("field", ["prompts", "rewards", "advantages", "truncated", "lengths"])
def test_rollout_record_refuses_fields_of_different_lengths(field):
    wrong = Rewards((), torch.zeros(1, 0), torch.zeros(1)) if field == "rewards" else [0]
    with pytest.raises(ConfigError, match=f"of 4 completions has 1 {field}"):
        make_record(0, **{field: wrong})


# -------------------------------------------------------------------- files


def test_write_samples_appends(tmp_path):
    path = tmp_path / "new" / "samples.jsonl"
    rows = write_samples(make_record(0), path) + write_samples(make_record(1), path, num_samples=2)
    assert read_samples(path) == rows
    assert rows_per_step(path) == {0: 4, 1: 2}


def test_drop_samples_removes_rows_from_step_on(tmp_path):
    path = tmp_path / "samples.jsonl"
    for step in (0, 2, 3, 5):
        write_samples(make_record(step), path)
    kept = path.read_text(encoding="utf-8").splitlines()[: 2 * PER_STEP]
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "prom')  # as left by a run that was killed
    assert drop_samples(path, 3) == 2 * PER_STEP
    assert path.read_text(encoding="utf-8").splitlines() == kept
    assert drop_samples(path, 3) == 0
    assert drop_samples(tmp_path / "none.jsonl", 3) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize("line", ["notes", '{"prompt": 1}', "[1]"])
def test_drop_samples_refuses_other_files(tmp_path, line):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine.jsonl, line 1, isn't a sample"):
        drop_samples(path, 0)
    assert path.read_text(encoding="utf-8") == f"{line}\n"


def test_set_aside_renames_with_number(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert rename_existing(path) is None
    for number in (1, 2):
        path.write_text(str(number))
        assert rename_existing(path) == tmp_path / f"samples.{number}.jsonl"
        assert (tmp_path / f"samples.{number}.jsonl").read_text() == str(number)
    assert not path.exists()


# -------------------------------------------------------------------- in a Trainer


def test_samples_show_every_rollout_by_default(trainer_options, tmp_path):
    samples = SampleCompletions()
    fit(trainer_options, samples)
    assert samples.written_to == tmp_path / "completions.jsonl"
    assert read_samples(samples.written_to) == [row for step in range(STEPS) for row in make_record(step).rows()]


def test_samples_follow_every_n_steps_and_num_samples(trainer_options, tmp_path):
    path = tmp_path / "own" / "file.jsonl"
    fit(trainer_options, SampleCompletions(path, every_n_steps=4, num_samples=2))
    assert rows_per_step(path) == {0: 2, 4: 2}


def test_samples_support_rollouts_of_several_steps(trainer_options, tmp_path):
    """With rollouts every 3 steps and `every_n_steps=4`, each first rollout after a multiple of 4 is shown."""
    samples = SampleCompletions(tmp_path / "file.jsonl", every_n_steps=4)
    trainer = SimpleNamespace(
        log_dir=None,
        default_root_dir=str(tmp_path),
        global_step=0,
        is_global_zero=True,
        loggers=[],
        callback_metrics={},
    )
    module = SimpleNamespace(last_rollout=None)
    samples.on_train_start(trainer, module)
    for batch, step in enumerate((0, 3, 6, 9, 12)):
        module.last_rollout = make_record(step)
        for _ in range(2):  # several batches per rollout, which is shown once
            samples.on_train_batch_end(trainer, module, None, None, batch)
    assert rows_per_step(samples.written_to) == {0: 4, 6: 4, 9: 4, 12: 4}


def test_samples_of_resumed_run_equal_uninterrupted_one(trainer_options, tmp_path):
    uninterrupted = SampleCompletions(tmp_path / "uninterrupted.jsonl", every_n_steps=2)
    fit(trainer_options, uninterrupted)
    path = tmp_path / "resumed.jsonl"
    saver = _pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_top_k=-1)
    options = {**trainer_options, "enable_checkpointing": True}
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(options, SampleCompletions(path, every_n_steps=2), saver, module=Policy(fails_at=5))
    assert rows_per_step(path) == {0: 4, 2: 4, 4: 4}
    checkpoint = next((tmp_path / "ckpt").glob("*step=3.ckpt"))
    fit(options, SampleCompletions(path, every_n_steps=2), saver, ckpt_path=checkpoint)
    assert path.read_text() == uninterrupted.written_to.read_text()


def test_samples_of_new_run_replace_renamed_file(trainer_options, tmp_path):
    fit(trainer_options, SampleCompletions())
    old = (tmp_path / "completions.jsonl").read_text()
    samples = SampleCompletions(num_samples=1)
    fit(trainer_options, samples)
    assert rows_per_step(samples.written_to) == dict.fromkeys(range(STEPS), 1)
    assert (tmp_path / "completions.1.jsonl").read_text() == old


def test_samples_continue_with_same_trainer(trainer_options, tmp_path):
    samples = SampleCompletions(num_samples=1)
    trainer = fit(trainer_options, samples)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, torch.utils.data.DataLoader(range(STEPS)))
    assert rows_per_step(samples.written_to) == dict.fromkeys(range(2 * STEPS), 1)


def test_samples_with_two_names_write_two_files(trainer_options, tmp_path):
    some = SampleCompletions(num_samples=1, every_n_steps=6, name="some")
    fit(trainer_options, SampleCompletions(), some)
    assert rows_per_step(tmp_path / "completions.jsonl") == dict.fromkeys(range(STEPS), PER_STEP)
    assert rows_per_step(tmp_path / "some.jsonl") == {0: 1}


def test_samples_are_written_on_rank_zero_only(tmp_path):
    samples = SampleCompletions()
    trainer = SimpleNamespace(
        log_dir=str(tmp_path),
        default_root_dir="no",
        global_step=0,
        is_global_zero=False,
        loggers=[],
        callback_metrics={},
    )
    (tmp_path / "completions.jsonl").write_text("of rank 0")
    samples.on_train_start(trainer, None)
    samples.on_train_batch_end(trainer, SimpleNamespace(last_rollout=make_record(0)), None, None, 0)
    assert [file.name for file in tmp_path.iterdir()] == ["completions.jsonl"]
    assert (tmp_path / "completions.jsonl").read_text() == "of rank 0"


def test_samples_ignore_empty_rollouts(tmp_path):
    samples = SampleCompletions(print_samples=True)
    trainer = SimpleNamespace(
        log_dir=str(tmp_path),
        default_root_dir="no",
        global_step=0,
        is_global_zero=True,
        loggers=[],
        callback_metrics={},
    )
    samples.on_train_start(trainer, None)
    for record in (None, make_record(0, 0)):
        samples.on_train_batch_end(trainer, SimpleNamespace(last_rollout=record), None, None, 0)
    assert not list(tmp_path.iterdir())


def test_samples_refuse_module_without_rollouts(trainer_options):
    class Other(Policy):
        def __init__(self):
            super().__init__()
            del self.last_rollout

    with pytest.raises(ConfigError, match=r"Other has no `last_rollout`\. Use it with GRPO or PPO"):
        fit(trainer_options, SampleCompletions(), module=Other())


@pytest.mark.parametrize("argument", ["every_n_steps", "num_samples"])
def test_samples_refuse_numbers_below_one(argument):
    with pytest.raises(ConfigError, match=f"{argument}=0: expected at least 1"):
        SampleCompletions(**{argument: 0})


def test_samples_are_printed_with_print_samples(trainer_options, capsys):
    fit(trainer_options, SampleCompletions(), max_steps=1)
    assert "completion" not in capsys.readouterr().out
    fit(trainer_options, SampleCompletions(print_samples=True, num_samples=1), max_steps=2)
    out = capsys.readouterr().out
    assert "Completions of step 0" in out
    assert "Completions of step 1" in out


# -------------------------------------------------------------------- loggers


def test_samples_of_fast_dev_run_are_not_written(trainer_options, tmp_path):
    (tmp_path / "completions.jsonl").write_text("of a real run")
    samples = SampleCompletions()
    fit(trainer_options, samples, fast_dev_run=True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("completions.jsonl", "of a real run")]
    assert (samples.written_to, samples.failures) == (None, ())


def test_samples_are_written_to_csv_logger_folder(trainer_options, tmp_path):
    logger = _pl.loggers.CSVLogger(tmp_path / "logs", name="run", version=3)
    fit({**trainer_options, "logger": logger}, SampleCompletions())
    assert rows_per_step(tmp_path / "logs" / "run" / "version_3" / "completions.jsonl") == dict.fromkeys(
        range(STEPS), PER_STEP
    )
    assert not log_samples(logger, "completions", make_record(0).rows())


def test_log_samples_writes_text_to_tensorboard(trainer_options, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = _pl.loggers.TensorBoardLogger(tmp_path / "tb")
    fit({**trainer_options, "logger": logger}, SampleCompletions(every_n_steps=3))
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    written = events.Tensors("completions/text_summary")
    assert [event.step for event in written] == [0, 3]
    text = written[1].tensor_proto.string_val[0].decode()
    assert text == samples_markdown(make_record(3).rows())
    assert "| completion 2 of 3 |" in text


def test_log_samples_writes_table_to_wandb(trainer_options):
    class Logger(_pl.loggers.Logger):
        """Logger whose `log_table` has the signature of WandbLogger's."""

        name, version = "run", 0
        tables = ()

        def log_metrics(self, metrics, step=None):
            pass

        def log_hyperparams(self, params):
            pass

        def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
            assert all(len(row) == len(columns) for row in data)
            self.tables = (*self.tables, (key, columns, len(data), step))

    logger = Logger()
    fit({**trainer_options, "logger": logger}, SampleCompletions(every_n_steps=3, num_samples=2, name="samples"))
    columns = samples_columns(make_record(0).rows())[0]
    assert logger.tables == (("samples", columns, 2, 0), ("samples", columns, 2, 3))
    assert {"rewards/correct", "rewards/short", "reward", "advantage", "truncated"} <= set(columns)


def test_log_samples_writes_table_to_mlflow():
    class Client:
        """Client whose `log_table` has the signature of MlflowClient's."""

        def log_table(self, run_id, data, artifact_file):
            self.logged = run_id, data, artifact_file

    logger = SimpleNamespace(experiment=Client(), run_id="42")
    assert log_samples(logger, "completions", make_record(3).rows(2))
    run_id, data, file = logger.experiment.logged
    assert (run_id, file) == ("42", "completions.json")
    assert data["completion"] == ["completion 0 of 3", "completion 2 of 3"]
    assert data["rewards/short"] == [None, None]


def test_log_samples_skips_unsupported_loggers():
    """Comet's experiment has a `log_table` with other arguments, and no `run_id`."""

    class Comet:
        def log_table(self, filename, tabular_data=None, headers=False):
            raise AssertionError

    assert not log_samples(SimpleNamespace(experiment=Comet()), "completions", make_record(0).rows())
    assert not log_samples(object(), "completions", make_record(0).rows())


# -------------------------------------------------------------------- tables


def test_samples_markdown_has_one_line_per_row():
    messages = [[{"role": "system", "content": "a|b"}, {"role": "user", "content": "c\nd"}]] * PER_STEP
    extra = {"why": ["x\ny"] * PER_STEP}
    rewards = Rewards(("f",), torch.full((PER_STEP, 1), 1 / 3), torch.zeros(PER_STEP), extra=extra)
    record = make_record(0, prompts=messages, rewards=rewards, completions=["z" * (MAX_CELL_LENGTH + 1000)] * PER_STEP)
    lines = samples_markdown(record.rows()).splitlines()
    assert len(lines) == 2 + PER_STEP
    assert "system: a\\|b<br>user: c<br>d" in lines[2]
    assert "x<br>y" in lines[2]
    assert "| 0.3333 |" in lines[2]
    assert f"{'z' * MAX_CELL_LENGTH}... (and 1,000 characters more)" in lines[2]


def test_samples_table_does_not_interpret_markup(capsys, trainer_options):
    class Brackets(Policy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.last_rollout = make_record(self.global_step, completions=["[/b] [x]"] * PER_STEP)
            return loss

    fit(trainer_options, SampleCompletions(print_samples=True), module=Brackets(), max_steps=1)
    assert "[/b]" in capsys.readouterr().out
