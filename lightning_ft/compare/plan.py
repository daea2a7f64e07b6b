"""Plans the runs of a comparison and the configuration of each."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import get_loader

from lightning_ft.arguments import did_you_mean_path
from lightning_ft.data.texts import load_texts
from lightning_ft.errors import ComparisonError
from lightning_ft.evaluation.retention.choices import load_choices
from lightning_ft.evaluation.scorers import SCORERS, Scorer
from lightning_ft.importing import is_file_path
from lightning_ft.modules.anchor import SAMPLES
from lightning_ft.printable import content_hash

if TYPE_CHECKING:
    from lightning_ft.modules.base import FineTuning

GRID = (1 / 3, 1.0, 3.0)
"""Multiples of the configured learning rate that are tried by default."""
EPOCHS_CAP = 10
"""Largest factor by which a run on fewer rows trains for more epochs, to take as many optimizer steps."""
_FULL_TO_LORA = 0.25
"""Ratio of the learning rate tried for full fine-tuning to that of LoRA, where only one of them is configured."""
_BATCHING = {"batch_size", "packing", "num_workers", "cache_dir"}
"""Arguments of a DataModule that change how rows are batched, but not which rows are used."""
_ONLY_TRAINING = {
    "anchor",
    "betas",
    "gradient_checkpointing",
    "learning_rate",
    "loraplus_lr_ratio",
    "lr_schedule",
    "on_nonfinite",
    "optimizer",
    "seed",
    "warmup_ratio",
    "weight_decay",
}
"""Arguments of a module that the answers of the untrained weights don't depend on."""
_OF_FIT_ALONE = ("ckpt_path", "weights_only")
"""Options that `fit` writes into the configuration of a run, next to those that every command has."""
_MEASUREMENTS = {"TokenSavings": "token_savings", "Retention": "retention"}
"""Callbacks that measure every run, and the prefixes of their metrics by default."""
_OWN_CALLBACKS = (*_MEASUREMENTS, "ExportModel", "ModelCheckpoint", "ComputeMeter")
"""Callbacks that a comparison reads its settings from, or adds itself."""


@dataclass(frozen=True)
class Method:
    """A method of training.

    Args:
        name: ``full``, ``lora``, or the stem of a configuration file's name.
        config: Configuration of the method, as for `lightning-ft fit`.
        rates: Learning rates to try, in ascending order.
    """

    name: str
    config: Mapping[str, Any]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Args:
        method: Name of the method; ``original`` measures the untrained weights.
        learning_rate: Learning rate at the peak of the schedule; None for ``original``.
        seed: Seed of all random draws.
        size: Number of training rows; None for all.
        search: Whether the run only serves a choice, on `size` rows: it answers validation rows, and no test rows.
    """

    method: str
    learning_rate: float | None = None
    seed: int = 0
    size: int | None = None
    search: bool = False

    @property
    def name(self) -> str:
        """Name of the run, and path of its folder.

        Example:
            >>> PlannedRun("lora", 2e-3, 1, 500).name
            'lora/lr0.002-seed1-n500'
        """
        if self.learning_rate is None:
            return f"{self.method}-search" if self.search else self.method
        rows = "" if self.size is None else f"-{'search' if self.search else 'n'}{self.size}"
        return f"{self.method}/lr{self.learning_rate:g}-seed{self.seed}{rows}"


@dataclass(frozen=True)
class Settings:
    """Options of the measurements of each run, from TokenSavings and Retention in the configuration.

    Args:
        savings: Arguments of `TokenSavings`.
        retention: Arguments of `Retention`; empty if forgetting isn't measured.
        evaluations: Number of measurements on the validation rows during a run.
        validation_requests: Number of validation rows to measure on; None for all.
    """

    savings: Mapping[str, Any]
    retention: Mapping[str, Any] = field(default_factory=dict)
    evaluations: int = 8
    validation_requests: int | None = None


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a configuration of `lightning-ft fit`.

    Args:
        path: Path of a file, or of several, separated by commas: later ones replace values of earlier ones, and a key
            such as ``callbacks+`` extends a list, as with several ``--config`` on the command line.

    Raises:
        ComparisonError: If a file can't be read, or they aren't a configuration.
    """
    config: dict[str, Any] = {}
    for name in str(path).split(","):
        config = _merged(config, _read_yaml(name.strip()))
    if missing := {"model", "data"} - set(config):
        raise ComparisonError(
            f"{str(path)!r} has no {' and no '.join(sorted(missing))}. Pass a configuration of `lightning-ft fit`."
        )
    return config


def _read_yaml(name: str) -> dict[str, Any]:
    """Read one file of a configuration, which may be a part of it."""
    try:
        found = get_loader("yaml")(Path(name).read_text(encoding="utf-8"))  # as `fit` does: PyYAML reads 1e3 as text
    except (OSError, yaml.YAMLError) as error:
        raise ComparisonError(f"The configuration {name!r} can't be read: {error}.{did_you_mean_path(name)}") from error
    if not isinstance(found, dict):
        raise ComparisonError(f"{name!r} isn't a configuration of `lightning-ft fit`: expected a mapping.")
    return {key: value for key, value in found.get("fit", found).items() if key not in _OF_FIT_ALONE}


def _merged(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the values of another one added."""
    merged = dict(config)
    for key, value in other.items():
        name = key.removesuffix("+")
        earlier = merged.get(name)
        if isinstance(value, Mapping) and "class_path" in value and isinstance(earlier, Mapping):
            same = value["class_path"] == earlier.get("class_path")  # arguments belong to their class
            merged[name] = _merged(earlier, value) if same else dict(value)
        elif isinstance(value, Mapping) and isinstance(earlier, Mapping):
            merged[name] = _merged(earlier, value)
        elif key != name:
            merged[name] = [*_as_list(earlier), *_as_list(value)]
        else:
            merged[name] = value if not isinstance(value, Mapping) else _merged({}, value)
    return merged


def _as_list(value: object) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def read_settings(
    config: Mapping[str, Any], path: str, evaluations: int, validation_requests: int | None = None
) -> Settings:
    """Read the options of TokenSavings and Retention from a configuration.

    Raises:
        ComparisonError: If it has no TokenSavings, which defines prompt, scorer and margin, or one with an endpoint
            or rows of its own, or several of it or of Retention.
    """
    found: dict[str, list[Mapping[str, Any]]] = {name: [] for name in _MEASUREMENTS}
    for callback in _callbacks(config):
        if (name := _class_name(callback)) in found:
            found[name].append(callback.get("init_args") or {})
    if not found["TokenSavings"]:
        raise ComparisonError(
            f"{path!r} has no TokenSavings among its trainer.callbacks. Add it: a comparison takes prompt, scorer and "
            "margin from there."
        )
    for name, several in found.items():
        if len(several) > 1:
            names = ", ".join(str(arguments.get("name", "without a name")) for arguments in several)
            raise ComparisonError(
                f"{path!r} has {len(several)} {name} among its trainer.callbacks ({names}), but every run is measured "
                "with the options of one. Leave the others out."
            )
    savings = found["TokenSavings"][0]
    prefixes = [str(several[0].get("name", _MEASUREMENTS[name])) for name, several in found.items() if several]
    _refuse_monitors(config, prefixes, path)
    if savings.get("endpoint") is not None:
        raise ComparisonError(
            f"{path!r}: the endpoint of TokenSavings can't answer in `lightning-ft compare` and `plan`, whose prompted "
            "arm is that of the original weights. Leave endpoint out and pass the prices of the original weights, or "
            "compare one tuned model with the endpoint by `lightning-ft fit`."
        )
    for name in ("requests", "train_rows", "split"):
        if savings.get(name) not in (None, "test"):
            raise ComparisonError(
                f"{path!r}: {name} of TokenSavings has no effect in `lightning-ft compare` and `plan`, which choose on "
                f"the validation rows of `data` and measure on its test rows. Leave {name} out."
            )
    retention = found["Retention"][0] if found["Retention"] else {}
    return Settings(savings, retention, evaluations, validation_requests)


def planned_methods(
    config: Mapping[str, Any], path: str, names: Sequence[str], grids: Mapping[str, Sequence[float]]
) -> list[Method]:
    """Build the methods that are trained.

    Args:
        config: Configuration that `full` and `lora` are derived from.
        path: Path of this configuration, for error messages.
        names: Names of the methods: ``prompted``, ``full``, ``lora``, or paths of YAML files. ``prompted`` needs no
            training and is always measured. A file without a model or data contains what differs from `config`.
        grids: Learning rates by method, instead of multiples (`GRID`) of the configured one.

    Raises:
        ComparisonError: For an unknown name, and for methods that differ in data or precision.
    """
    found: list[Method] = []
    for name in names:
        if name == "prompted":
            continue
        if name in ("full", "lora"):
            found.append(_built_in(name, config, path, grids))
        elif Path(name).suffix in (".yaml", ".yml"):
            part = _read_yaml(name)
            other = _merged({} if {"model", "data"} <= set(part) else config, part)
            found.append(Method(Path(name).stem, other, _rates(Path(name).stem, other, grids)))
        else:
            raise ComparisonError(f"--methods: {name!r} is neither prompted, full, lora nor a YAML file.")
    if not found:
        raise ComparisonError("--methods contains no method that trains. Add full, lora, or a YAML file.")
    duplicates = {m.name for m in found if [other.name for other in found].count(m.name) > 1}
    if duplicates:
        raise ComparisonError(
            f"--methods contains {', '.join(sorted(duplicates))} more than once. Remove or rename one."
        )
    unknown = set(grids) - {m.name for m in found}
    if unknown:
        raise ComparisonError(f"--learning_rates contains {', '.join(sorted(unknown))}, but --methods doesn't.")
    _check_comparable(found)
    return found


def run_config(method: Method, run: PlannedRun, folder: Path, epochs_factor: float = 1.0) -> dict[str, Any]:
    """Build the configuration of one run.

    Args:
        method: Method of the run.
        run: Run to configure.
        folder: Folder of the run's files.
        epochs_factor: Factor that the configured number of epochs is multiplied by, for runs on fewer rows.
    """
    config = copy.deepcopy(dict(method.config))
    trainer = config.setdefault("trainer", {})
    trainer["callbacks"] = [c for c in _callbacks(config) if _class_name(c) not in _OWN_CALLBACKS]
    trainer |= {
        "default_root_dir": str(folder),
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "logs", "version": "0"}},
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if epochs_factor != 1.0 and trainer.get("max_epochs", -1) not in (None, -1):
        trainer["max_epochs"] = max(1, round(trainer["max_epochs"] * epochs_factor))
    config["seed_everything"] = run.seed
    arguments = config["model"].setdefault("init_args", {})
    arguments["seed"] = run.seed
    if run.learning_rate is not None:
        arguments["learning_rate"] = run.learning_rate
    return config


def checked_config(method: Method, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Build a configuration that is parsed before any run, with the measurements, to find errors in their options.

    Args:
        method: Method whose configuration is parsed.
        config: Configuration with the measurements.
        folder: Folder of its files.
    """
    checked = run_config(method, PlannedRun("original"), folder)
    checked["trainer"]["callbacks"] += copy.deepcopy([c for c in _callbacks(config) if _class_name(c) in _MEASUREMENTS])
    return checked


def config_hash(config: Mapping[str, Any], settings: Settings, size: int | None, inputs: Sequence[str] = ()) -> str:
    """Hash everything that the results of a run depend on, but not the paths of its files.

    Args:
        config: Configuration of the run.
        settings: Options of the measurements.
        size: Number of training rows; None for all.
        inputs: Hashes of what the configuration refers to by name: rows, prompts, weights.
    """
    plain = copy.deepcopy(dict(config))
    for name in ("default_root_dir", "logger"):
        plain["trainer"].pop(name, None)
    return _hash([plain, asdict(settings), size, list(inputs)])


def original_hash(config: Mapping[str, Any], settings: Settings, inputs: Sequence[str] = ()) -> str:
    """Hash everything that the results of the untrained weights depend on.

    That isn't how they will be trained: methods can be added and epochs changed without measuring them again.

    Args:
        config: Configuration of the run.
        settings: Options of the measurements.
        inputs: As in :func:`config_hash`.
    """
    model, trainer = config["model"], config.get("trainer", {})
    arguments = {name: value for name, value in model.get("init_args", {}).items() if name not in _ONLY_TRAINING}
    loaded_by = None if arguments.get("dtype") else model.get("class_path")  # each class has a default dtype
    run_by = [trainer.get("accelerator"), trainer.get("precision")]
    return _hash([loaded_by, arguments, run_by, settings.savings, settings.validation_requests, list(inputs)])


def _hash(values: list[object]) -> str:
    return content_hash(json.loads(json.dumps(values, default=str)))  # default=str for the dates of YAML


def text_hashes(config: Mapping[str, Any], settings: Settings) -> list[str]:
    """Hash the texts of an anchor, unless they are samples, and the texts and questions of Retention.

    Args:
        config: Configuration of a run.
        settings: Options of the measurements.

    Raises:
        RetentionError: If they can't be read.
    """
    anchor = config["model"].get("init_args", {}).get("anchor")
    texts = anchor.get("texts", SAMPLES) if isinstance(anchor, Mapping) else SAMPLES
    found = [] if texts == SAMPLES else [content_hash(load_texts(texts))]
    if (measured := settings.retention.get("texts")) is not None:
        found.append(content_hash(load_texts(measured)))
    if (questions := settings.retention.get("choices")) is not None:
        found.append(content_hash([asdict(question) for question in load_choices(questions)]))
    return found


def scorer_hashes(name: str, scorer: Scorer) -> list[str]:
    """Hash the file that a scorer's import path names, and the one that defines it.

    Args:
        name: Name or import path of the scorer.
        scorer: The scorer.

    Returns:
        The hashes; empty for the scorers with a name, and for those without source.
    """
    if name in (*SCORERS, "label"):
        return []
    files = [name.rpartition(":")[0]] if is_file_path(name) else []
    function = inspect.unwrap(scorer)
    with suppress(TypeError, OSError):  # of what is compiled
        files.append(inspect.getsourcefile(function if inspect.isroutine(function) else type(function)) or "")
    return sorted({hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in files if file})


def weights_hash(model: object) -> str:
    """Hash the contents of a model's folder; a hub name is returned unchanged, since its revision identifies them."""
    folder = Path(str(model))
    if not folder.is_dir():
        return str(model)
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json")):
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while part := content.read(2**24):
                digest.update(part)
    return digest.hexdigest()[:16]


def _built_in(name: str, config: Mapping[str, Any], path: str, grids: Mapping[str, Sequence[float]]) -> Method:
    from lightning_ft.modules.sft import FullFineTuning, LoRAFineTuning

    target: type[FineTuning] = {"full": FullFineTuning, "lora": LoRAFineTuning}[name]
    configured = str(config["model"].get("class_path", "")).rpartition(".")[2]
    if configured not in (FullFineTuning.__name__, LoRAFineTuning.__name__):
        raise ComparisonError(
            f"{path!r} trains {configured or 'no class'}, but `full` and `lora` need a configuration of "
            "FullFineTuning or LoRAFineTuning. Pass one YAML file per method instead."
        )
    own = copy.deepcopy(dict(config))
    arguments = dict(own["model"].get("init_args", {}))
    if configured != target.__name__:
        rate = arguments.get("learning_rate")
        if rate is not None:
            arguments["learning_rate"] = float(rate) * (_FULL_TO_LORA if name == "full" else 1 / _FULL_TO_LORA)
        accepted = inspect.signature(target).parameters
        arguments = {key: value for key, value in arguments.items() if key in accepted}
    own["model"] = {"class_path": f"lightning_ft.{target.__name__}", "init_args": arguments}
    return Method(name, own, _rates(name, own, grids))


def _rates(name: str, config: Mapping[str, Any], grids: Mapping[str, Sequence[float]]) -> tuple[float, ...]:
    if name in grids:
        rates = tuple(sorted(set(grids[name])))
        if not rates or rates[0] <= 0:
            raise ComparisonError(f"--learning_rates {name}: expected numbers above 0, got {list(grids[name])}.")
        return rates
    rate = config["model"].get("init_args", {}).get("learning_rate")
    if rate is None:
        raise ComparisonError(
            f"{name}: its configuration has no learning_rate to derive a grid from. Pass the learning rates to try: "
            f"--learning_rates.{name} '[1e-5, 3e-5, 1e-4]'."
        )
    return tuple(round_rate(float(rate) * factor) for factor in GRID)


def round_rate(rate: float) -> float:
    """Round a learning rate to two significant digits.

    Example:
        >>> round_rate(0.0066667)
        0.0067
    """
    return float(f"{rate:.1e}")


def _check_comparable(methods: Sequence[Method]) -> None:
    def data(method: Method) -> list[object]:
        section = method.config["data"]
        arguments = {k: v for k, v in section.get("init_args", {}).items() if k not in _BATCHING}
        return [str(section.get("class_path", "")).rpartition(".")[2], arguments]

    def precision(method: Method) -> dict[str, object]:
        return {
            "trainer.precision": str(method.config.get("trainer", {}).get("precision", "32-true")),
            "model.init_args.dtype": method.config["model"].get("init_args", {}).get("dtype", "the class's default"),
        }

    first = methods[0]
    for other in methods[1:]:
        if data(other) != data(first):
            raise ComparisonError(
                f"{first.name} and {other.name} have different data sections. Make them equal, since methods are "
                "compared on the same rows."
            )
        one, two = precision(first), precision(other)
        classes = {str(m.config["model"].get("class_path", "")).rpartition(".")[2] for m in (first, other)}
        defaults = "the class's default" in (one["model.init_args.dtype"], two["model.init_args.dtype"])
        if one != two or (defaults and len(classes) > 1):
            raise ComparisonError(
                f"{first.name} ({one}) and {other.name} ({two}) may run in different precision. Set "
                "model.init_args.dtype and trainer.precision to the same values in both configurations."
            )


def _refuse_monitors(config: Mapping[str, Any], prefixes: Sequence[str], path: str) -> None:
    """Refuse a callback that would decide during training by what a comparison measures after it."""
    for callback in _callbacks(config):
        metric = str((callback.get("init_args") or {}).get("monitor", ""))
        if _class_name(callback) not in _OWN_CALLBACKS and metric.startswith(tuple(f"{name}/" for name in prefixes)):
            raise ComparisonError(
                f"{path!r}: {_class_name(callback)} monitors {metric}, which a comparison measures after training "
                "only. Monitor val/loss, or val/quality of AnswerQuality."
            )


def _callbacks(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: Any = config.get("trainer", {}).get("callbacks") or []
    return [dict(found)] if isinstance(found, Mapping) else list(found)


def _class_name(callback: Mapping[str, object]) -> str:
    return str(callback.get("class_path", "")).rpartition(".")[2]
