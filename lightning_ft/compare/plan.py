"""Which runs a comparison makes, and the configuration of each."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_ft.errors import ComparisonError
from lightning_ft.evaluation.savings.prompt import content_hash

GRID = (1 / 3, 1.0, 3.0)
"""Factors of the configured learning rate that are tried by default."""
EPOCHS_CAP = 10
"""A run on fewer rows makes more epochs, to make as many steps, but not more than so many times as many."""
_FULL_FROM_LORA = 0.25
"""Learning rate of full fine-tuning around which to look, to that of LoRA, where only the latter is configured."""
_BATCHING = {"batch_size", "packing", "num_workers", "cache_dir"}
"""Arguments of a DataModule that change how rows are laid out, not which."""
_OWN_CALLBACKS = ("TokenSavings", "ExportModel", "ModelCheckpoint", "ComputeMeter", "Retention")
"""Callbacks that a comparison takes its settings from, or makes itself."""


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        name: ``full``, ``lora``, or that of a configuration file.
        config: Its configuration.
        rates: Learning rates to try, from the smallest.
    """

    name: str
    config: Mapping[str, Any]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class PlannedRun:
    """A run to make.

    Args:
        method: Its method's name; ``original`` measures the weights as they are.
        learning_rate: Its peak; None for ``original``.
        seed: Seed of everything drawn at random.
        size: Training rows; None for all.
    """

    method: str
    learning_rate: float | None = None
    seed: int = 0
    size: int | None = None

    @property
    def name(self) -> str:
        """Of its folder.

        Example:
            >>> PlannedRun("lora", 2e-3, 1, 500).name
            'lora/lr0.002-seed1-n500'
        """
        if self.learning_rate is None:
            return self.method
        rows = "" if self.size is None else f"-n{self.size}"
        return f"{self.method}/lr{self.learning_rate:g}-seed{self.seed}{rows}"


@dataclass(frozen=True)
class Settings:
    """What is measured of every run, as the configuration's TokenSavings and Retention say.

    Args:
        savings: Arguments of `TokenSavings`.
        retention: Arguments of `Retention`.
        evaluations: Measurements on the validation rows during a run.
        validation_requests: Number of validation rows to measure on; None for all.
    """

    savings: Mapping[str, Any]
    retention: Mapping[str, Any] = field(default_factory=dict)
    evaluations: int = 8
    validation_requests: int | None = None


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a configuration of `lightning-ft fit`.

    Raises:
        ComparisonError: If it isn't there, or isn't a configuration.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ComparisonError(f"The configuration {str(path)!r} can't be read: {error}") from error
    missing = {"model", "data"} - set(found if isinstance(found, dict) else {})
    if missing:
        raise ComparisonError(f"{str(path)!r} has no {' and no '.join(sorted(missing))}: expected what fit takes.")
    config: dict[str, Any] = found.get("fit", found)
    return config


def read_settings(
    config: Mapping[str, Any], path: str, evaluations: int, validation_requests: int | None = None
) -> Settings:
    """What the configuration wants measured.

    Raises:
        ComparisonError: If it has no TokenSavings, so that there is neither a prompt nor a scorer.
    """
    found = {_kind(callback): callback.get("init_args", {}) for callback in _callbacks(config)}
    if "TokenSavings" not in found:
        raise ComparisonError(
            f"{path!r} has no TokenSavings among its trainer.callbacks: a comparison takes prompt, scorer and margin "
            "from there."
        )
    return Settings(found["TokenSavings"], found.get("Retention", {}), evaluations, validation_requests)


def planned_methods(
    config: Mapping[str, Any], path: str, names: Sequence[str], grids: Mapping[str, Sequence[float]]
) -> list[Method]:
    """The methods that are trained.

    Args:
        config: The configuration that `full` and `lora` are made from.
        path: Its file, for messages.
        names: ``prompted``, ``full``, ``lora``, or YAML files. ``prompted`` trains nothing and is always measured.
        grids: Learning rates by method, instead of `GRID` around the configured one.

    Raises:
        ComparisonError: For a name that is neither, and for methods that differ in data or precision.
    """
    found: list[Method] = []
    for name in names:
        if name == "prompted":
            continue
        if name in ("full", "lora"):
            found.append(_built_in(name, config, path, grids))
        elif Path(name).suffix in (".yaml", ".yml"):
            other = read_config(name)
            found.append(Method(Path(name).stem, other, _rates(Path(name).stem, other, grids)))
        else:
            raise ComparisonError(f"--methods: {name!r} is neither prompted, full, lora nor a YAML file.")
    if not found:
        raise ComparisonError("--methods: there is none that trains anything: give full, lora, or a YAML file.")
    twice = {m.name for m in found if [other.name for other in found].count(m.name) > 1}
    if twice:
        raise ComparisonError(f"--methods: two are called {', '.join(sorted(twice))}.")
    unknown = set(grids) - {m.name for m in found}
    if unknown:
        raise ComparisonError(f"--learning_rates names {', '.join(sorted(unknown))}, which --methods doesn't.")
    _check_alike(found)
    return found


def run_config(method: Method, run: PlannedRun, folder: Path, epochs_factor: float = 1.0) -> dict[str, Any]:
    """The configuration of one run.

    Args:
        method: The run's method.
        run: The run.
        folder: Where its files go.
        epochs_factor: How many times more epochs than configured, for runs on fewer rows.
    """
    config = copy.deepcopy(dict(method.config))
    trainer = config.setdefault("trainer", {})
    trainer["callbacks"] = [c for c in _callbacks(config) if _kind(c) not in _OWN_CALLBACKS]
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


def config_hash(config: Mapping[str, Any], settings: Settings, size: int | None, inputs: Sequence[str] = ()) -> str:
    """Names what a run's figures depend on, wherever its files are.

    Args:
        config: Configuration of the run.
        settings: What is measured.
        size: Training rows, None for all.
        inputs: Names of what the configuration only points to: rows, prompts, weights.
    """
    plain = copy.deepcopy(dict(config))
    for name in ("default_root_dir", "logger"):
        plain["trainer"].pop(name, None)
    named = [plain, asdict(settings), size, list(inputs)]
    return content_hash(json.loads(json.dumps(named, default=str)))  # YAML reads dates as such


def weights_hash(model: Any) -> str:
    """Names the files of a model's folder by what is in them; a hub name, which its revision names, by itself."""
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

    wanted: Any = {"full": FullFineTuning, "lora": LoRAFineTuning}[name]
    given = str(config["model"].get("class_path", "")).rpartition(".")[2]
    if given not in (FullFineTuning.__name__, LoRAFineTuning.__name__):
        raise ComparisonError(
            f"{path!r} trains {given or 'no class'}: `full` and `lora` are made from a configuration of "
            "FullFineTuning or LoRAFineTuning. Give a YAML file of its own for each method instead."
        )
    own = copy.deepcopy(dict(config))
    arguments = dict(own["model"].get("init_args", {}))
    if given != wanted.__name__:
        rate = arguments.get("learning_rate")
        if rate is not None:
            arguments["learning_rate"] = float(rate) * (_FULL_FROM_LORA if name == "full" else 1 / _FULL_FROM_LORA)
        accepted = inspect.signature(wanted.__init__).parameters
        arguments = {key: value for key, value in arguments.items() if key in accepted}
    own["model"] = {"class_path": f"lightning_ft.{wanted.__name__}", "init_args": arguments}
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
            f"{name}: its configuration has no learning_rate to look around, so say which ones to try: "
            f"--learning_rates.{name} '[1e-5, 3e-5, 1e-4]'."
        )
    return tuple(rounded(float(rate) * factor) for factor in GRID)


def rounded(rate: float) -> float:
    """To two digits.

    Example:
        >>> rounded(0.0066667)
        0.0067
    """
    return float(f"{rate:.1e}")


def _check_alike(found: Sequence[Method]) -> None:
    def data(method: Method) -> Any:
        given = method.config["data"]
        arguments = {k: v for k, v in given.get("init_args", {}).items() if k not in _BATCHING}
        return [str(given.get("class_path", "")).rpartition(".")[2], arguments]

    def precision(method: Method) -> dict[str, Any]:
        return {
            "trainer.precision": str(method.config.get("trainer", {}).get("precision", "32-true")),
            "model.init_args.dtype": method.config["model"].get("init_args", {}).get("dtype", "the class's default"),
        }

    first = found[0]
    for other in found[1:]:
        if data(other) != data(first):
            raise ComparisonError(
                f"{first.name} and {other.name} have different data sections: methods are compared on the same rows."
            )
        one, two = precision(first), precision(other)
        classes = {str(m.config["model"].get("class_path", "")).rpartition(".")[2] for m in (first, other)}
        defaults = "the class's default" in (one["model.init_args.dtype"], two["model.init_args.dtype"])
        if one != two or (defaults and len(classes) > 1):
            raise ComparisonError(
                f"{first.name} ({one}) and {other.name} ({two}) may run in different precision: say "
                "model.init_args.dtype and trainer.precision in the configuration, the same for both."
            )


def _callbacks(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: Any = config.get("trainer", {}).get("callbacks") or []
    return [dict(found)] if isinstance(found, Mapping) else list(found)


def _kind(callback: Mapping[str, Any]) -> str:
    return str(callback.get("class_path", "")).rpartition(".")[2]
