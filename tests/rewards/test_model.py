"""Reward models as rewards: the scores they were trained to give, from folders, checkpoints, modules and objects."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import CHATML, make_model, make_tokenizer
from tiny_scorer import make_scorer
from transformers import AutoModelForSequenceClassification

from lightning_ft._lightning import Trainer
from lightning_ft.data.encode import encode_conversation
from lightning_ft.errors import ModelError, RewardError, TokenizerError
from lightning_ft.modules.reward import RewardModeling
from lightning_ft.rewards import model as folders
from lightning_ft.rewards.functions import RewardFunctions
from lightning_ft.rewards.model import RewardModel

PROMPTS = ["where is my parcel", "where is my parcel", "refund please"]
MESSAGES = [[{"role": "system", "content": "answer in one line"}, {"role": "user", "content": p}] for p in PROMPTS]
TEXTS = ["with the lamp", "", "Billing B-417 please answer"]


def score(rewards, prompts=PROMPTS, texts=TEXTS):
    functions = rewards if isinstance(rewards, RewardFunctions) else RewardFunctions(rewards)
    return functions.score(prompts, texts, [[1]] * len(texts)).total


def expected(model, tokenizer, prompts=PROMPTS, texts=TEXTS):
    """The slow twin: each conversation by itself, the head at its last token."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    scores = []
    for prompt, text in zip(prompts, texts, strict=True):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = encode_conversation(tokenizer, [*turns, {"role": "assistant", "content": text}]).input_ids
        with torch.no_grad():
            scores.append(base.score(base.model(input_ids=ids[None]).last_hidden_state[:, -1])[0, 0])
    return torch.stack(scores)


def export(model, path, tokenizer=None):
    model.save_pretrained(path)
    (tokenizer or make_tokenizer()).save_pretrained(path)
    return str(path)


@pytest.fixture
def whole(tmp_path):
    return export(make_scorer(), tmp_path / "whole")


@pytest.fixture
def adapter(tmp_path):
    """An adapter of a reward model over a causal language model, as RewardModeling exports it."""
    base = export(make_model(), tmp_path / "base")
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), config).eval()
    return export(model, tmp_path / "adapter"), model


# -------------------------------------------------------------------- folders


@pytest.mark.parametrize("prompts", [PROMPTS, MESSAGES], ids=["strings", "messages"])
def test_a_folder(whole, prompts):
    scores = score(whole, prompts)
    torch.testing.assert_close(scores, expected(make_scorer(), make_tokenizer(), prompts), atol=1e-5, rtol=1e-5)
    assert scores.std() > 0.01
    assert RewardFunctions(whole).names == ("whole",)


def test_an_adapter_folder_over_a_language_model(adapter):
    folder, model = adapter
    torch.testing.assert_close(score(folder), expected(model, make_tokenizer()), atol=1e-5, rtol=1e-5)


def test_its_own_template(tmp_path):
    loud = CHATML.replace("'<|im_start|>' + message.role", "'<|im_start|>' + message.role + ' says'")
    tokenizer = make_tokenizer(loud)
    folder = export(make_scorer(), tmp_path / "loud", tokenizer)
    scores = score(folder)
    torch.testing.assert_close(scores, expected(make_scorer(), tokenizer), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores, expected(make_scorer(), make_tokenizer()), atol=1e-3)


def test_a_model_that_pads_with_eos(tmp_path):
    tokenizer = make_tokenizer(pad="<|im_end|>")
    folder = export(make_scorer(pad_token_id=2), tmp_path / "eos", tokenizer)
    torch.testing.assert_close(score(folder), expected(make_scorer(pad_token_id=2), tokenizer), atol=1e-5, rtol=1e-5)


def test_frozen_and_in_eval_mode(adapter, whole):
    for folder in (adapter[0], whole):
        model = RewardModel.from_pretrained(folder).model
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_loaded_when_it_is_needed(whole, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        RewardModel, "from_pretrained", lambda name, **options: loaded.append(name) or Scores(name, **options)
    )

    class Scores:
        def __init__(self, name, batch_size):
            self.devices = [name, batch_size]

        def to(self, device):
            self.devices.append(device)

        def score_conversations(self, conversations):
            return torch.tensor([float(len(turns)) for turns in conversations])

    functions = RewardFunctions({"model": whole, "batch_size": 2})
    assert not loaded
    functions.to("cpu")
    assert loaded == [whole]
    assert functions._rewards[0].judge.load().devices == [whole, 2, "cpu"]
    assert score(functions, MESSAGES).tolist() == [3.0, 3.0, 3.0]
    assert loaded == [whole]


def test_moved_with_the_policy(whole):
    functions = RewardFunctions(whole).to("meta")
    assert functions._rewards[0].judge.load().model.device.type == "meta"


def test_no_part_of_a_module(whole):
    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rewards = RewardFunctions([whole, {"model": make_scorer(), "tokenizer": make_tokenizer()}]).to("cpu")

    assert not Policy().state_dict()
    assert not list(Policy().parameters())


def test_the_same_in_every_precision_and_batch(whole):
    wanted = score(whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(score(whole), wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(score({"model": whole, "batch_size": 1}), wanted, atol=1e-5, rtol=1e-5)
    half = score({"model": whole, "dtype": "bfloat16"})
    torch.testing.assert_close(half, wanted, atol=0.1, rtol=0.1)
    assert not torch.equal(half, wanted)


# -------------------------------------------------------------------- what is no reward model


def test_a_language_model_is_refused(model_folder):
    with pytest.raises(RewardError, match="without a trained score head, which would score at random"):
        RewardFunctions(model_folder).to("cpu")


def test_an_adapter_of_a_language_model_is_refused(tmp_path, model_folder):
    model = make_model()
    model.config._name_or_path = model_folder
    folder = export(get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM")), tmp_path / "lora")
    with pytest.raises(RewardError, match="without a trained score head"):
        score(folder)


def test_several_labels_are_refused(tmp_path):
    model = make_scorer()
    model.score, model.config.num_labels = torch.nn.Linear(32, 3, bias=False), 3
    with pytest.raises(RewardError, match="a classifier of 3 labels"):
        score(export(model, tmp_path / "three"))


def test_weights_that_are_no_safetensors_are_refused(whole, tmp_path):
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "whole" / "pytorch_model.bin")
    with pytest.raises(RewardError, match="no weights in safetensors"):
        score(whole)


def test_sharded_weights(tmp_path):
    model = make_scorer()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    torch.testing.assert_close(
        score(str(tmp_path / "sharded")), expected(model, make_tokenizer()), atol=1e-5, rtol=1e-5
    )


def test_a_folder_without_a_tokenizer(tmp_path, whole):
    make_scorer().save_pretrained(tmp_path / "bare")
    with pytest.raises(TokenizerError, match="tokenizer="):
        RewardFunctions(str(tmp_path / "bare")).to("cpu")
    torch.testing.assert_close(score({"model": str(tmp_path / "bare"), "tokenizer": whole}), score(whole))


def test_longer_than_its_context(tmp_path):
    model = make_scorer()
    model.config.max_position_embeddings = 20
    with pytest.raises(RewardError, match=r"on completion 2 .* Conversation . has .* more than the 20") as got:
        score(export(model, tmp_path / "short"), ["a", "a", "a"], ["b", "b", "where is my parcel with the lamp" * 3])
    assert isinstance(got.value.__cause__, RewardError)


# -------------------------------------------------------------------- the hub


def test_a_hub_name(whole, monkeypatch):
    asked = []
    monkeypatch.setattr(folders, "snapshot_download", lambda name, **options: asked.append((name, options)) or whole)
    functions = RewardFunctions({"model": "someone/reward-1B", "revision": "v2"})
    assert not asked
    torch.testing.assert_close(score(functions), score(whole))
    assert asked[0][0] == "someone/reward-1B"
    assert asked[0][1]["revision"] == "v2"
    assert not {"*.py", "*.bin"} & set(asked[0][1]["allow_patterns"])
    assert RewardFunctions("someone/reward-1B").names == ("reward-1B",)


def test_a_hub_name_of_nothing(monkeypatch):
    """The tests are offline."""
    asked, real = [], folders.snapshot_download
    monkeypatch.setattr(
        folders, "snapshot_download", lambda name, **options: asked.append(name) or real(name, **options)
    )
    with pytest.raises(RewardError, match="no folder 'someone/no-such-model', nor a model of that name on the hub"):
        score("someone/no-such-model")
    assert asked == ["someone/no-such-model"]  # not once more for every completion


# -------------------------------------------------------------------- objects


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_a_model_with_its_tokenizer(wrap):
    model = make_scorer(dropout=0.5).train()
    scores = score({"model": wrap(model), "tokenizer": make_tokenizer(), "batch_size": 2, "name": "mine"})
    torch.testing.assert_close(scores, expected(make_scorer(), make_tokenizer()), atol=1e-5, rtol=1e-5)
    assert model.training  # as it was found


def test_a_model_that_knows_where_it_came_from(whole):
    model = AutoModelForSequenceClassification.from_pretrained(whole)
    functions = RewardFunctions(model)
    assert functions.names == ("whole",)
    torch.testing.assert_close(score(functions), score(whole))


def test_a_model_without_a_tokenizer():
    with pytest.raises(RewardError, match="LlamaForSequenceClassification comes without a tokenizer"):
        RewardFunctions(make_scorer())
    with pytest.raises(RewardError, match="'dtype' is for a reward model that is loaded by its name"):
        RewardFunctions({"model": make_scorer(), "tokenizer": make_tokenizer(), "dtype": "auto"})


def test_a_language_model_object_is_refused():
    with pytest.raises(ModelError, match="LlamaForCausalLM has no head"):
        RewardFunctions({"model": make_model(), "tokenizer": make_tokenizer()}).to("cpu")


def test_whatever_scores_conversations():
    class Longest:
        def score_conversations(self, conversations):
            return torch.tensor([float(len(turns[-1]["content"])) for turns in conversations])

    functions = RewardFunctions([Longest(), {"model": Longest(), "name": "again", "weight": 2.0}])
    assert functions.names == ("Longest", "again")
    assert score(functions).tolist() == [3.0 * len(text) for text in TEXTS]


def test_a_scorer_that_gives_the_wrong_number():
    class Wrong:
        def score_conversations(self, conversations):
            return torch.zeros(len(conversations), 1)

    with pytest.raises(RewardError, match=r"'Wrong' returned a Tensor of shape \(3, 1\)"):
        score(Wrong())


# -------------------------------------------------------------------- completions that a template changes

STRIPS = CHATML.replace(
    "{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}",
    "{{- message.content.split('#')[0] + '<|im_end|>' -}}{%- endgeneration -%}",
)
"""A template that leaves a part of answers out, as those of reasoning models do."""


def test_a_template_that_changes_completions(tmp_path):
    folder = export(make_scorer(), tmp_path / "strips", make_tokenizer(STRIPS))
    reward = RewardFunctions(folder)
    with pytest.warns(UserWarning, match="given completions as it renders them: the chat template drops or changes"):
        scores = score(reward, texts=["lamp#no", "lamp", "lamp#yes"])
    torch.testing.assert_close(scores, score(reward, texts=["lamp"] * 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(reward, texts=["lamp#no", "lamp", "lamp#yes"])


# -------------------------------------------------------------------- RewardModeling


@pytest.fixture(params=[None, {"r": 4, "init_lora_weights": False}], ids=["full", "lora"])
def trained(request, model_folder, tmp_path):
    """A module, as if it had been trained, with its checkpoint and its export."""
    module = RewardModeling(model_folder, lora=request.param)
    module.configure_model()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=str(tmp_path))
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "reward.ckpt")
    return module, str(tmp_path / "reward.ckpt"), str(module.export(tmp_path / "export"))


def test_module_checkpoint_and_export_score_alike(trained):
    module, checkpoint, folder = trained
    wanted = module.score_conversations(
        [
            [{"role": "user", "content": p}, {"role": "assistant", "content": t}]
            for p, t in zip(PROMPTS, TEXTS, strict=True)
        ]
    ).cpu()
    assert wanted.std() > 0
    for reward in (module, checkpoint, folder):
        rng = torch.get_rng_state()
        torch.testing.assert_close(score(reward), wanted, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(score(reward), wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(torch.get_rng_state(), rng)  # the policy samples alike, wherever its reward came from
    assert RewardFunctions([checkpoint, folder]).names == ("reward", "export")


def test_a_module_is_not_changed_by_being_asked(trained):
    module, _, _ = trained
    before = [(name, p.requires_grad) for name, p in module.named_parameters()]
    modes = [m.training for m in module.modules()]
    score(module)
    assert [(name, p.requires_grad) for name, p in module.named_parameters()] == before
    assert [m.training for m in module.modules()] == modes


def test_checkpoints_of_something_else_and_options(trained, tmp_path):
    _, checkpoint, _ = trained
    with pytest.raises(RewardError, match="brings its own tokenizer"):
        RewardFunctions({"model": checkpoint, "tokenizer": "x"})
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "other.ckpt")
    with pytest.raises(RewardError, match="isn't a checkpoint of RewardModeling"):
        RewardFunctions(str(tmp_path / "other.ckpt")).to("cpu")


def test_the_name_of_the_saved_head(adapter):
    """What tells an adapter of a reward model from one of a language model."""
    config = json.loads((Path(adapter[0]) / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert any(name.startswith("base_model.model.score.") for name in folders._saved_names(Path(adapter[0])))
