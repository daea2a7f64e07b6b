"""Reward models as rewards: folders, checkpoints, modules and objects give the scores that were trained."""

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
from lightning_ft.rewards import model as reward_models
from lightning_ft.rewards.functions import RewardFunctions
from lightning_ft.rewards.model import RewardModel
from lightning_ft.rewards.resolve import _load_checkpoint

PROMPTS = ["where is my parcel", "where is my parcel", "refund please"]
MESSAGES = [[{"role": "system", "content": "answer in one line"}, {"role": "user", "content": p}] for p in PROMPTS]
TEXTS = ["with the lamp", "", "Billing B-417 please answer"]


def compute_rewards(rewards, prompts=PROMPTS, texts=TEXTS):
    functions = rewards if isinstance(rewards, RewardFunctions) else RewardFunctions(rewards)
    return functions.compute(prompts, texts, [[1]] * len(texts)).total


def expected(model, tokenizer, prompts=PROMPTS, texts=TEXTS):
    """The slow, obvious way: each conversation alone, with the head applied to its last token."""
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
def folder_path(tmp_path):
    return export(make_scorer(), tmp_path / "folder_path")


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
def test_folder_gives_trained_scores(folder_path, prompts):
    scores = compute_rewards(folder_path, prompts)
    torch.testing.assert_close(scores, expected(make_scorer(), make_tokenizer(), prompts), atol=1e-5, rtol=1e-5)
    assert scores.std() > 0.01
    assert RewardFunctions(folder_path).names == ("folder_path",)


def test_adapter_folder_over_a_language_model_gives_trained_scores(adapter):
    folder, model = adapter
    torch.testing.assert_close(compute_rewards(folder), expected(model, make_tokenizer()), atol=1e-5, rtol=1e-5)


def test_reward_model_uses_its_own_chat_template(tmp_path):
    loud = CHATML.replace("'<|im_start|>' + message.role", "'<|im_start|>' + message.role + ' says'")
    tokenizer = make_tokenizer(loud)
    folder = export(make_scorer(), tmp_path / "loud", tokenizer)
    scores = compute_rewards(folder)
    torch.testing.assert_close(scores, expected(make_scorer(), tokenizer), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores, expected(make_scorer(), make_tokenizer()), atol=1e-3)


def test_reward_model_may_pad_with_eos(tmp_path):
    tokenizer = make_tokenizer(pad="<|im_end|>")
    folder = export(make_scorer(pad_token_id=2), tmp_path / "eos", tokenizer)
    torch.testing.assert_close(
        compute_rewards(folder), expected(make_scorer(pad_token_id=2), tokenizer), atol=1e-5, rtol=1e-5
    )


def test_reward_model_is_frozen_and_in_eval_mode(adapter, folder_path):
    for folder in (adapter[0], folder_path):
        model = RewardModel.from_pretrained(folder).model
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_reward_model_is_loaded_on_first_use(folder_path, monkeypatch):
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

    functions = RewardFunctions({"model": folder_path, "batch_size": 2})
    assert not loaded
    functions.to("cpu")
    assert loaded == [folder_path]
    assert functions._rewards[0].reward.load().devices == [folder_path, 2, "cpu"]
    assert compute_rewards(functions, MESSAGES).tolist() == [3.0, 3.0, 3.0]
    assert loaded == [folder_path]


def test_reward_model_moves_to_a_device(folder_path):
    functions = RewardFunctions(folder_path).to("meta")
    assert functions._rewards[0].reward.load().model.device.type == "meta"


def test_reward_functions_are_not_a_submodule(folder_path):
    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rewards = RewardFunctions([folder_path, {"model": make_scorer(), "tokenizer": make_tokenizer()}]).to(
                "cpu"
            )

    assert not Policy().state_dict()
    assert not list(Policy().parameters())


def test_scores_are_independent_of_autocast_and_batch_size(folder_path):
    expected_scores = compute_rewards(folder_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compute_rewards(folder_path), expected_scores, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        compute_rewards({"model": folder_path, "batch_size": 1}), expected_scores, atol=1e-5, rtol=1e-5
    )
    half = compute_rewards({"model": folder_path, "dtype": "bfloat16"})
    torch.testing.assert_close(half, expected_scores, atol=0.1, rtol=0.1)
    assert not torch.equal(half, expected_scores)


# -------------------------------------------------------------------- other models


def test_language_model_is_refused(model_folder):
    with pytest.raises(RewardError, match="has no trained score head, so its rewards would be random"):
        RewardFunctions(model_folder).to("cpu")


def test_adapter_of_a_language_model_is_refused(tmp_path, model_folder):
    model = make_model()
    model.config._name_or_path = model_folder
    folder = export(get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM")), tmp_path / "lora")
    with pytest.raises(RewardError, match="has no trained score head"):
        compute_rewards(folder)


def test_several_labels_are_refused(tmp_path):
    model = make_scorer()
    model.score, model.config.num_labels = torch.nn.Linear(32, 3, bias=False), 3
    with pytest.raises(RewardError, match="a classifier with 3 labels"):
        compute_rewards(export(model, tmp_path / "three"))


def test_weights_in_other_formats_than_safetensors_are_refused(folder_path, tmp_path):
    (tmp_path / "folder_path" / "model.safetensors").rename(tmp_path / "folder_path" / "pytorch_model.bin")
    with pytest.raises(RewardError, match="no weights in safetensors"):
        compute_rewards(folder_path)


def test_sharded_weights_are_found(tmp_path):
    model = make_scorer()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    torch.testing.assert_close(
        compute_rewards(str(tmp_path / "sharded")), expected(model, make_tokenizer()), atol=1e-5, rtol=1e-5
    )


def test_folder_without_a_tokenizer_needs_one(tmp_path, folder_path):
    make_scorer().save_pretrained(tmp_path / "bare")
    with pytest.raises(TokenizerError, match="tokenizer="):
        RewardFunctions(str(tmp_path / "bare")).to("cpu")
    torch.testing.assert_close(
        compute_rewards({"model": str(tmp_path / "bare"), "tokenizer": folder_path}), compute_rewards(folder_path)
    )


def test_conversation_longer_than_the_context_is_refused(tmp_path):
    model = make_scorer()
    model.config.max_position_embeddings = 20
    with pytest.raises(
        RewardError, match=r"on completion 2 .* Conversation . has .* exceeds the reward model's context of 20"
    ) as got:
        compute_rewards(
            export(model, tmp_path / "short"), ["a", "a", "a"], ["b", "b", "where is my parcel with the lamp" * 3]
        )
    assert isinstance(got.value.__cause__, RewardError)


# -------------------------------------------------------------------- the hub


def test_hub_name_downloads_on_first_use(folder_path, monkeypatch):
    requested = []
    monkeypatch.setattr(
        reward_models, "snapshot_download", lambda name, **options: requested.append((name, options)) or folder_path
    )
    functions = RewardFunctions({"model": "someone/reward-1B", "revision": "v2"})
    assert not requested
    torch.testing.assert_close(compute_rewards(functions), compute_rewards(folder_path))
    assert requested[0][0] == "someone/reward-1B"
    assert requested[0][1]["revision"] == "v2"
    assert not {"*.py", "*.bin"} & set(requested[0][1]["allow_patterns"])
    assert RewardFunctions("someone/reward-1B").names == ("reward-1B",)


def test_unknown_hub_name_is_refused(monkeypatch):
    """The tests are offline."""
    requested, real = [], reward_models.snapshot_download
    monkeypatch.setattr(
        reward_models, "snapshot_download", lambda name, **options: requested.append(name) or real(name, **options)
    )
    with pytest.raises(RewardError, match="no folder 'someone/no-such-model', and no model of that name on the hub"):
        compute_rewards("someone/no-such-model")
    assert requested == ["someone/no-such-model"]  # not once per completion


# -------------------------------------------------------------------- objects


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_model_object_with_its_tokenizer_is_a_reward(wrap):
    model = make_scorer(dropout=0.5).train()
    scores = compute_rewards({"model": wrap(model), "tokenizer": make_tokenizer(), "batch_size": 2, "name": "mine"})
    torch.testing.assert_close(scores, expected(make_scorer(), make_tokenizer()), atol=1e-5, rtol=1e-5)
    assert model.training  # the mode is restored


def test_model_object_loads_the_tokenizer_of_its_folder(folder_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder_path)
    functions = RewardFunctions(model)
    assert functions.names == ("folder_path",)
    torch.testing.assert_close(compute_rewards(functions), compute_rewards(folder_path))


def test_model_object_without_a_tokenizer_is_refused():
    with pytest.raises(RewardError, match="LlamaForSequenceClassification was not loaded from a folder"):
        RewardFunctions(make_scorer())
    with pytest.raises(RewardError, match="'dtype' only applies to a reward model that is loaded by name"):
        RewardFunctions({"model": make_scorer(), "tokenizer": make_tokenizer(), "dtype": "auto"})


def test_language_model_object_is_refused():
    with pytest.raises(ModelError, match="LlamaForCausalLM has no head"):
        RewardFunctions({"model": make_model(), "tokenizer": make_tokenizer()}).to("cpu")


def test_any_object_with_score_conversations_is_a_reward():
    class Longest:
        def score_conversations(self, conversations):
            return torch.tensor([float(len(turns[-1]["content"])) for turns in conversations])

    functions = RewardFunctions([Longest(), {"model": Longest(), "name": "again", "weight": 2.0}])
    assert functions.names == ("Longest", "again")
    assert compute_rewards(functions).tolist() == [3.0 * len(text) for text in TEXTS]


def test_scorer_returning_another_shape_is_refused():
    class Wrong:
        def score_conversations(self, conversations):
            return torch.zeros(len(conversations), 1)

    with pytest.raises(RewardError, match=r"'Wrong' returned a Tensor of shape \(3, 1\)"):
        compute_rewards(Wrong())


# -------------------------------------------------------------------- completions that a template changes

STRIPS = CHATML.replace(
    "{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}",
    "{{- message.content.split('#')[0] + '<|im_end|>' -}}{%- endgeneration -%}",
)
"""A template that drops a part of completions, as those of reasoning models do."""


def test_template_that_changes_completions_warns_once(tmp_path):
    folder = export(make_scorer(), tmp_path / "strips", make_tokenizer(STRIPS))
    reward = RewardFunctions(folder)
    with pytest.warns(
        UserWarning, match="as the reward model's chat template renders them: the chat template drops or changes"
    ):
        scores = compute_rewards(reward, texts=["lamp#no", "lamp", "lamp#yes"])
    torch.testing.assert_close(scores, compute_rewards(reward, texts=["lamp"] * 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_rewards(reward, texts=["lamp#no", "lamp", "lamp#yes"])


# -------------------------------------------------------------------- RewardModeling


@pytest.fixture(params=[None, {"r": 4, "init_lora_weights": False}], ids=["full", "lora"])
def trained(request, model_folder, tmp_path):
    """A module as after training, with its checkpoint and its export."""
    module = RewardModeling(model_folder, lora=request.param)
    module.configure_model()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=str(tmp_path))
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "reward.ckpt")
    return module, str(tmp_path / "reward.ckpt"), str(module.export(tmp_path / "export"))


def test_module_checkpoint_and_export_give_equal_scores(trained):
    module, checkpoint, folder = trained
    expected_scores = module.score_conversations(
        [
            [{"role": "user", "content": p}, {"role": "assistant", "content": t}]
            for p, t in zip(PROMPTS, TEXTS, strict=True)
        ]
    ).cpu()
    assert expected_scores.std() > 0
    for reward in (module, checkpoint, folder):
        rng = torch.get_rng_state()
        torch.testing.assert_close(compute_rewards(reward), expected_scores, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(compute_rewards(reward), expected_scores, atol=1e-5, rtol=1e-5)
        assert torch.equal(torch.get_rng_state(), rng)  # the policy's samples don't depend on how the reward is loaded
    assert RewardFunctions([checkpoint, folder]).names == ("reward", "export")


def test_module_is_unchanged_by_scoring(trained):
    module, _, _ = trained
    before = [(name, p.requires_grad) for name, p in module.named_parameters()]
    modes = [m.training for m in module.modules()]
    compute_rewards(module)
    assert [(name, p.requires_grad) for name, p in module.named_parameters()] == before
    assert [m.training for m in module.modules()] == modes


def test_checkpoint_refuses_options_and_other_modules(trained, tmp_path):
    _, checkpoint, _ = trained
    with pytest.raises(RewardError, match="contains its own tokenizer"):
        RewardFunctions({"model": checkpoint, "tokenizer": "x"})
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "other.ckpt")
    with pytest.raises(RewardError, match="isn't a checkpoint of RewardModeling"):
        RewardFunctions(str(tmp_path / "other.ckpt")).to("cpu")


def test_checkpoint_does_not_request_remote_code(trained, tmp_path):
    _, checkpoint, _ = trained
    saved = torch.load(checkpoint, weights_only=True)
    saved["hyper_parameters"]["trust_remote_code"] = True
    torch.save(saved, tmp_path / "asks.ckpt")
    assert _load_checkpoint(str(tmp_path / "asks.ckpt")).hparams["trust_remote_code"] is False


def test_saved_head_is_named_score(adapter):
    """This name distinguishes an adapter of a reward model from one of a language model."""
    config = json.loads((Path(adapter[0]) / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert any(name.startswith("base_model.model.score.") for name in reward_models._saved_names(Path(adapter[0])))
