"""Features of Lightning's Trainer, each as a function that uses one with a module and checks its effect."""

import pytest
import torch
from ranks import as_rank, free_port, run_ranks, trainer_options
from tiny import make_model, make_rows, make_tokenizer
from tiny_scorer import make_scorer
from trainer_run import BATCHES, Run, Seen, length, same, weights

from lightning_ft import ComputeMeter, PairDataModule, PromptBaseline, Retention, SampleCompletions, TokenSavings
from lightning_ft._lightning import _pl
from lightning_ft.types import Message


def limits(run):
    seen = Seen()
    assert run.fit(seen, max_epochs=2, limit_train_batches=2, limit_val_batches=1).current_epoch == 2
    assert len(seen.batches) == 4


def max_steps(run):
    assert run.fit(max_epochs=-1, max_steps=3).global_step == 3


def val_check_interval(run):
    seen = Seen()
    run.fit(seen, val_check_interval=2)
    assert seen.validations == BATCHES // 2


def check_val_every_n_epoch(run):
    seen = Seen()
    run.fit(seen, max_epochs=2, check_val_every_n_epoch=2)
    assert seen.validations == 1


def overfit_batches(run):
    seen = Seen()
    run.fit(seen, max_epochs=3, overfit_batches=1)
    assert len(seen.batches) == 3
    assert len(set(seen.batches)) == 1


def fast_dev_run(run):
    assert run.fit(fast_dev_run=True).global_step == 1


def barebones(run):
    assert run.fit(barebones=True).global_step == BATCHES


def reload_dataloaders(run):
    seen = Seen()
    run.fit(seen, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    assert len(seen.batches) == 2 * BATCHES


def accumulation(run):
    assert run.fit(accumulate_grad_batches=2).global_step == BATCHES // 2


def accumulation_scheduler(run):
    scheduler = _pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    assert run.fit(scheduler, max_epochs=2).global_step == BATCHES + BATCHES // 2


def clipping(run):
    seen = Seen()
    run.fit(seen, gradient_clip_val=1e-3)
    assert max(seen.norms) <= 1e-3 * 1.001


def bf16_mixed(run):
    run.fit(precision="bf16-mixed")
    assert {p.dtype for p in run.module.parameters() if p.requires_grad} == {torch.float32}


def bf16_true(run):
    run.fit(precision="bf16-true")
    assert torch.bfloat16 in {p.dtype for p in run.module.parameters()}


def early_stopping(run):
    stopping = _pl.callbacks.EarlyStopping(run.monitor, patience=1, min_delta=1e9)
    assert run.fit(stopping, max_epochs=9).current_epoch < 4


def best_checkpoint(run):
    saver = _pl.callbacks.ModelCheckpoint(run.folder / "best", monitor=run.monitor, save_top_k=1)
    run.fit(saver, enable_checkpointing=True)
    assert saver.best_model_path
    assert float(saver.best_model_score) == float(saver.current_score)


def checkpoints_by_step(run):
    saver = _pl.callbacks.ModelCheckpoint(run.folder / "steps", every_n_train_steps=2, save_top_k=-1)
    run.fit(saver, enable_checkpointing=True)
    assert len(list((run.folder / "steps").glob("*.ckpt"))) == BATCHES // 2


def resume_from_last(run):
    saver = _pl.callbacks.ModelCheckpoint(run.folder / "last", save_last=True)
    run.fit(saver, enable_checkpointing=True, max_epochs=2)
    whole = weights(run.module)
    half, rest = run.new(), run.new()
    first = _pl.callbacks.ModelCheckpoint(run.folder / "half", save_last=True)
    run.fit(first, enable_checkpointing=True, max_epochs=1, module=half)
    run.fit(max_epochs=2, module=rest, ckpt_path=str(run.folder / "half" / "last.ckpt"))
    assert same(weights(rest), whole)


def load_from_checkpoint(run):
    trainer = run.fit()
    path = str(run.folder / "end.ckpt")
    trainer.save_checkpoint(path)
    base = make_scorer() if run.name == "reward" else make_model()
    given = {"rewards": length} if run.sampled else {}
    loaded = run.kind.load_from_checkpoint(path, model=base, tokenizer=make_tokenizer(), **given)
    assert same(weights(loaded), weights(run.module))


def two_fits(run):
    run.fit()
    before = weights(run.module)
    run.fit()
    assert not same(weights(run.module), before)


def validate_and_test(run):
    trainer = run.trainer()
    assert run.monitor in trainer.validate(run.module, run.data, verbose=False)[0]
    assert run.monitor.replace("val", "test") in trainer.test(run.module, run.data, verbose=False)[0]


def predict(run):
    questions = [{"input": row["input"]} for row in make_rows(3)]
    if run.name == "reward":  # whole conversations, which are scored
        turns = [[Message(role="user", content="a"), Message(role="assistant", content=text)] for text in "bcd"]
        predicted = run.trainer().predict(run.module, torch.utils.data.DataLoader(turns, batch_size=2, collate_fn=list))
    else:
        data = PairDataModule(make_rows(3), predict=questions, cache_dir=False, batch_size=2)
        predicted = run.trainer().predict(run.module, data)
    assert sum(len(batch) for batch in predicted) == 3


def own_optimizer(run):
    def changed(kind):
        class Own(kind):
            def configure_optimizers(self):
                return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)

        return Own

    run = Run(run.name, run.folder, changed)
    trainer = run.fit()
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert trainer.global_step == BATCHES


def scheduler_per_epoch(run):
    def changed(kind):
        class Own(kind):
            def configure_optimizers(self):
                optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)]

        return Own

    seen = Seen()
    Run(run.name, run.folder, changed).fit(seen, max_epochs=2)
    wanted = [0.1] * BATCHES + [0.01] * BATCHES
    assert all(abs(rate - want) < 1e-9 for rate, want in zip(seen.rates, wanted, strict=True))


def own_loaders(run):
    run.data.share_tokenizer(run.module)
    run.data.setup("fit")
    trainer = run.trainer()
    trainer.fit(run.module, run.data.train_dataloader(), run.data.val_dataloader())
    assert trainer.global_step == BATCHES


def learning_rate_monitor(run):
    monitor = _pl.callbacks.LearningRateMonitor("step")
    run.fit(monitor, logger=_pl.loggers.CSVLogger(run.folder), log_every_n_steps=1)
    assert len(next(iter(monitor.lrs.values()))) == BATCHES


def several_loggers(run):
    loggers = [_pl.loggers.CSVLogger(run.folder / "csv"), _pl.loggers.TensorBoardLogger(run.folder / "tb")]
    run.fit(logger=loggers, log_every_n_steps=1)
    assert "train/learning_rate" in next((run.folder / "csv").rglob("metrics.csv")).read_text()
    assert list((run.folder / "tb").rglob("events.out*"))


def mlflow_logger(run):
    pytest.importorskip("mlflow", reason="MLflow is missing: pip install mlflow")
    address = f"sqlite:///{run.folder / 'mlflow.db'}"
    logger = _pl.loggers.MLFlowLogger("features", tracking_uri=address, artifact_location=str(run.folder / "artifacts"))
    run.fit(*measuring(run), logger=logger, log_every_n_steps=1)
    logged = logger.experiment.get_run(logger.run_id).data
    assert {"train/learning_rate", run.monitor, *measured(run)} <= logged.metrics.keys()
    assert logged.params["learning_rate"] == "0.01"
    assert len(logger.experiment.get_metric_history(logger.run_id, "train/learning_rate")) == BATCHES
    if run.sampled:
        files = [found.path for found in logger.experiment.list_artifacts(logger.run_id)]
        assert files == ["completions.json"]


def wandb_logger(run):
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is missing: pip install wandb")
    logger = _pl.loggers.WandbLogger("features", save_dir=run.folder, offline=True)
    run.fit(*measuring(run), logger=logger, log_every_n_steps=1)
    summary, settings = dict(logger.experiment.summary), dict(logger.experiment.config)
    wandb.finish()
    assert {"train/learning_rate", run.monitor, *measured(run)} <= summary.keys()
    assert settings["learning_rate"] == 0.01
    assert list(run.folder.glob("wandb/offline-run-*/run-*.wandb"))
    if run.sampled:
        assert summary["completions"]["nrows"] > 0


def measuring(run):
    """Callbacks that write to a logger by themselves."""
    callbacks = [ComputeMeter(log_every_n_steps=1)]
    if run.sampled:
        callbacks.append(SampleCompletions(num_samples=2))
    if run.name in ("full", "lora"):
        options = {"max_new_tokens": 4, "timed_requests": 1, "resamples": 99, "progress": False}
        callbacks.append(TokenSavings(PromptBaseline(system="Answer."), scorer=half, **options))
        callbacks.append(Retention([row["input"] for row in make_rows(4)], progress=False))
    return callbacks


def measured(run):
    """Metrics that they log."""
    found = ["compute/flops"]
    if run.name in ("full", "lora"):
        found += ["token_savings/total", "token_savings/total_lo", "retention/kl_general"]
    return found


def half(output, reference):
    return 0.5


def profiler(run):
    trainer = run.fit(profiler="simple")
    assert trainer.profiler.recorded_durations


def pytorch_profiler(run):
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=1)
    profiler = _pl.profilers.PyTorchProfiler(run.folder, "profile", schedule=schedule, export_to_chrome=True)
    _pl.seed_everything(0, verbose=False)
    plain = run.new()
    run.fit(module=plain)
    _pl.seed_everything(0, verbose=False)
    profiled = run.new()
    trainer = run.fit(module=profiled, profiler=profiler)
    assert trainer.global_step == BATCHES
    assert same(weights(profiled), weights(plain))
    assert "aten::" in next(run.folder.glob("*.pt.trace.json")).read_text()


def two_devices(run):
    run_ranks(one_of_two, (run.name, run.folder, free_port()))
    first, second = (torch.load(run.folder / f"{rank}.pt") for rank in (0, 1))
    assert same(first, second)
    run.module.configure_model()
    assert not same(first, weights(run.module))


def one_of_two(rank, name, folder, port):
    as_rank(rank, port)
    _pl.seed_everything(0, verbose=False)
    run = Run(name, folder)
    options = trainer_options("ddp", folder)
    trainer = run.fit(devices=options["devices"], strategy=options["strategy"])
    assert trainer.global_step == BATCHES // 2
    assert run.monitor in trainer.callback_metrics
    torch.save(weights(run.module), folder / f"{rank}.pt")


def model_summary(run):
    found = []

    class Summary(_pl.callbacks.ModelSummary):
        @staticmethod
        def summarize(summary_data, total_parameters, trainable_parameters, *rest, **options):
            found.append((total_parameters, trainable_parameters))

    run.fit(Summary(), enable_model_summary=True)
    assert found == [
        (sum(p.numel() for p in run.module.parameters()), sum(p.numel() for p in weights(run.module).values()))
    ]


def progress_bar(run):
    bar = _pl.callbacks.TQDMProgressBar()
    run.fit(bar, enable_progress_bar=True)
    assert bar.train_progress_bar.n == BATCHES


def ema(run):
    run.fit(_pl.callbacks.EMAWeightAveraging(decay=0.9))
    averaged, plain = weights(run.module), run.new()
    run.fit(module=plain)
    assert not same(averaged, weights(plain))


def swa(run):
    options = {"swa_epoch_start": 1, "annealing_epochs": 1}
    run.fit(_pl.callbacks.StochasticWeightAveraging(1e-2, **options), max_epochs=3)
    averaged, plain = weights(run.module), run.new()
    run.fit(module=plain, max_epochs=3)
    assert not same(averaged, weights(plain))


def learning_rate_finder(run):
    finder = _pl.callbacks.LearningRateFinder(min_lr=1e-4, max_lr=1.0, num_training_steps=20)
    trainer = run.fit(finder, max_epochs=8, enable_checkpointing=True)
    rate = run.module.hparams["learning_rate"]
    assert rate != 1e-2
    assert abs(trainer.optimizers[0].param_groups[0]["lr"] - rate) < 1e-9


def batch_size_finder(run):
    seen = Seen()
    finder = _pl.callbacks.BatchSizeFinder("power", steps_per_trial=1, init_val=1, max_trials=3)
    trainer = run.fit(finder, seen, enable_checkpointing=True)
    assert run.data.hparams["batch_size"] != 2
    assert trainer.num_training_batches == -(-8 // run.data.hparams["batch_size"])


def finetuning_callback(run):
    class Unfreeze(_pl.callbacks.BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze([m for name, m in module.named_modules() if "layers.0" in name])

        def finetune_function(self, module, epoch, optimizer):
            layer = [m for name, m in module.named_modules() if "layers.0" in name]
            moved.append(not same(start, first_layer(module)))
            if epoch == 1:
                self.unfreeze_and_add_param_group(layer, optimizer, lr=1e-2)

    def first_layer(module):
        return {name: p.detach().clone() for name, p in module.named_parameters() if "layers.0" in name}

    run.module.configure_model()
    start, moved = first_layer(run.module), []
    saver = _pl.callbacks.ModelCheckpoint(run.folder / "epochs", save_top_k=-1, filename="{epoch}")
    run.fit(Unfreeze(), saver, enable_checkpointing=True, max_epochs=2)
    assert moved == [False, False]
    assert not same(start, first_layer(run.module))
    for epoch, expected in enumerate((start, first_layer(run.module))):
        again = run.new()
        run.trainer().validate(again, run.data, ckpt_path=run.folder / "epochs" / f"epoch={epoch}.ckpt", verbose=False)
        assert same(first_layer(again), expected)


def pruning(run):
    run.module.configure_model()
    run.fit(_pl.callbacks.ModelPruning("l1_unstructured", amount=0.5))
    zeros = [float((p == 0).float().mean()) for p in run.module.parameters() if p.dim() == 2]
    assert max(zeros) > 0.3


FEATURES = {
    "`limit_train_batches`, `limit_val_batches`": limits,
    "`max_steps`": max_steps,
    "`val_check_interval`": val_check_interval,
    "`check_val_every_n_epoch`": check_val_every_n_epoch,
    "`overfit_batches`": overfit_batches,
    "`fast_dev_run`": fast_dev_run,
    "`barebones`": barebones,
    "`reload_dataloaders_every_n_epochs`": reload_dataloaders,
    "`accumulate_grad_batches`": accumulation,
    "`GradientAccumulationScheduler`": accumulation_scheduler,
    "`gradient_clip_val`": clipping,
    '`precision="bf16-mixed"`': bf16_mixed,
    '`precision="bf16-true"`': bf16_true,
    "`EarlyStopping`": early_stopping,
    "`ModelCheckpoint(monitor=...)`": best_checkpoint,
    "`ModelCheckpoint(every_n_train_steps=...)`": checkpoints_by_step,
    "resuming from `last.ckpt`, exactly": resume_from_last,
    "`load_from_checkpoint`": load_from_checkpoint,
    "two fits of one module": two_fits,
    "`validate` and `test` before training": validate_and_test,
    "`predict`": predict,
    "`configure_optimizers` of a subclass": own_optimizer,
    "a scheduler stepped per epoch": scheduler_per_epoch,
    "loaders instead of a DataModule": own_loaders,
    "`LearningRateMonitor`": learning_rate_monitor,
    "CSV and TensorBoard loggers together": several_loggers,
    "MLflow logger": mlflow_logger,
    "Weights & Biases logger, offline": wandb_logger,
    '`profiler="simple"`': profiler,
    "`PyTorchProfiler`": pytorch_profiler,
    "two processes, DDP": two_devices,
    "`ModelSummary`": model_summary,
    "`TQDMProgressBar`": progress_bar,
    "`EMAWeightAveraging`": ema,
    "`StochasticWeightAveraging`": swa,
    "`LearningRateFinder`": learning_rate_finder,
    "`BatchSizeFinder`": batch_size_finder,
    "`BaseFinetuning`": finetuning_callback,
    "`ModelPruning`": pruning,
}
"""Features by the name that `docs/lightning.md` gives them."""
