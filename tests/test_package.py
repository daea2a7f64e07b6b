"""Imports of the package: lazy, without network access, and with either Lightning package."""

import os
import subprocess
import sys

import pytest

from lightning_ft import __all__ as public

SCRIPT = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network access")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
sys.path.insert(0, TESTS)
from tiny import make_model, make_rows, make_tokenizer
"""

SHORT = """
import {namespace} as L
from lightning_ft import ExportModel, LoRAFineTuning, PairDataModule, PromptBaseline, TokenSavings

model = LoRAFineTuning(make_model(), tokenizer=make_tokenizer(), learning_rate=1e-2)
data = PairDataModule(train=make_rows(40), validation=0.2, test=make_rows(60)[40:], cache_dir=False)
baseline = PromptBaseline(system="Say what it is.", few_shot=[make_rows(1)[0]])
savings = TokenSavings(
    baseline, scorer=lambda output, reference: 0.5, max_new_tokens=4, output_dir=False, progress=False
)
trainer = L.Trainer(
    accelerator="cpu",
    max_epochs=2,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[savings, ExportModel(sys.argv[1])],
)
trainer.fit(model, data)
home = "lightning.pytorch" if "{namespace}" == "lightning.pytorch" else "pytorch_lightning"
assert any(c.__module__.startswith(home) and c.__name__ == "LightningModule" for c in type(model).__mro__)
assert savings.result.n == 20
assert 0 < savings.result.savings["total"].value < 1
from peft import PeftModel
PeftModel.from_pretrained(make_model(), sys.argv[1] + "/last")
print("done")
"""


def python(code, *args, **environment):
    tests = os.path.join(os.path.dirname(__file__), "helpers")
    env = {name: value for name, value in os.environ.items() if name != "LIGHTNING_FT_NAMESPACE"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("TESTS", repr(tests)) + code if code else SCRIPT, *map(str, args)],
        capture_output=True,
        text=True,
        env={**env, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )


@pytest.mark.parametrize("namespace", ["pytorch_lightning", pytest.param("lightning.pytorch", marks=pytest.mark.slow)])
def test_readme_script_runs_without_network(tmp_path, namespace):
    done = python(SHORT.format(namespace=namespace), tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("done")


def test_import_of_package_imports_no_heavy_dependency():
    """These imports are the slow ones; without them, importing the package takes milliseconds after torch."""
    heavy = [
        "pytorch_lightning",
        "lightning",
        "transformers",
        "peft",
        "trl",
        "datasets",
        "torchmetrics",
        "scipy",
        "rich",
    ]
    code = f"""
import sys, torch
before = set(sys.modules)
import lightning_ft
print([name for name in {heavy} if name in set(sys.modules) - before])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_package_exports_all_public_names():
    import lightning_ft

    for name in public:
        assert getattr(lightning_ft, name) is not None
    assert set(public) <= set(dir(lightning_ft))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lightning_ft.Nothing


@pytest.mark.parametrize("variable", [pytest.param("pytorch_lightning", marks=pytest.mark.slow), "lightning"])
def test_namespace_follows_environment_variable(variable):
    code = "import lightning_ft._lightning as n; print(n.NAMESPACE)"
    done = python(code, LIGHTNING_FT_NAMESPACE=variable)
    assert done.stdout.strip() == variable.split(".")[0], done.stderr[-2000:]


def test_namespace_refuses_unknown_value():
    done = python("import lightning_ft._lightning", LIGHTNING_FT_NAMESPACE="torch_lightning")
    assert "expected 'pytorch_lightning' or 'lightning'" in done.stderr


def test_namespace_warns_if_both_imported_and_callbacks_inherit_from_both():
    code = """
import warnings
import lightning.pytorch, pytorch_lightning
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from lightning_ft import ExportModel, PairDataModule
assert any("LIGHTNING_FT_NAMESPACE" in str(w.message) for w in caught)
for base in (lightning.pytorch, pytorch_lightning):
    assert issubclass(ExportModel, base.Callback) and issubclass(PairDataModule, base.LightningDataModule)
print("fine")
"""
    done = python(code)
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


def test_data_module_refuses_trainer_of_other_namespace():
    code = """
import lightning.pytorch as L
from lightning_ft import PairDataModule
from pytorch_lightning.demos.boring_classes import BoringModel
data = PairDataModule(make_rows(), tokenizer=make_tokenizer(), cache_dir=False)
trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
data.trainer = trainer
trainer.strategy._lightning_module = BoringModel()
data.setup("fit")
"""
    done = python(code, LIGHTNING_FT_NAMESPACE="lightning")
    assert "NamespaceError" in done.stderr
    assert "LIGHTNING_FT_NAMESPACE" in done.stderr
