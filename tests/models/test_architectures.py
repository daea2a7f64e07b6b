"""Any causal language model of transformers trains for a step, or is refused by an error of this package."""

import pytest
from many_models import make
from tiny import make_rows, make_tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_ft import FullFineTuning, LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer
from lightning_ft.errors import LightningFTError

FAST = [
    "gpt2",
    "bloom",
    "rwkv",
    "mamba",
    "gemma2",
    "phimoe",
    "gpt_oss",
    "deepseek_v3",
    "jamba",
    "opt",
    "recurrent_gemma",
]
LARGEST = 30_000_000  # parameters; a few configs can't be shrunk by the usual names


def train(kind, lora, trainer_options):
    try:
        model = make(kind)
    except Exception as error:
        pytest.skip(f"no tiny one can be made: {error}"[:100])
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        pytest.skip("no tiny one can be made")
    module_class, options = (LoRAFineTuning, {"lora": {"r": 2}}) if lora else (FullFineTuning, {})
    module = module_class(model, tokenizer=make_tokenizer(), learning_rate=1e-2, **options)
    data = PairDataModule(make_rows(4), batch_size=2, cache_dir=False)
    Trainer(**trainer_options, max_steps=1).fit(module, data)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", FAST)
def test_architecture_trains(kind, lora, trainer_options):
    train(kind, lora, trainer_options)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(FAST)))
def test_architecture_trains_or_is_refused_by_name(kind, lora, trainer_options):
    refusal = ""
    try:
        train(kind, lora, trainer_options)
    except LightningFTError as error:
        refusal = str(error)
    assert not refusal or len(refusal) > 40  # the error gives the reason
