import json
import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import make_model, make_rows, make_tokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lightning_ft import (
    DPO,
    GRPO,
    KTO,
    PPO,
    FullFineTuning,
    LoRAFineTuning,
    PairDataModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModeling,
)
from lightning_ft._lightning import Trainer
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.adapt import add_lora, lora_config

CALL = "<call>"
LONG = "where is the lamp " * 30


def reward(completions, **columns):
    return [float(len(text)) for text in completions]


def tokenizer_with(*tokens):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def few_positions(length=64):
    """A model with learned positions."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 400, "n_positions": length}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=2, pad_token_id=0))


def policy(kind):
    return lambda model, **options: kind(model, rewards=reward, num_completions=2, max_new_tokens=4, **options)


def pair_rows(last):
    return [*make_rows(6), {"input": last, "output": "fox"}]


def preference_rows(last):
    rows = [{"prompt": row["input"], "chosen": row["output"], "rejected": "no"} for row in make_rows(6)]
    return [*rows, {"prompt": last, "chosen": "fox", "rejected": "dog"}]


def labelled_rows(last):
    rows = [{"prompt": r["input"], "completion": r["output"], "label": n % 2} for n, r in enumerate(make_rows(6))]
    return [*rows, {"prompt": last, "completion": "fox", "label": 1}]


def prompt_rows(last):
    return [*({"prompt": row["input"]} for row in make_rows(6)), {"prompt": last}]


MODULES = {
    "full": (FullFineTuning, PairDataModule, pair_rows),
    "lora": (LoRAFineTuning, PairDataModule, pair_rows),
    "reward": (RewardModeling, PreferenceDataModule, preference_rows),
    "dpo": (DPO, PreferenceDataModule, preference_rows),
    "kto": (KTO, PreferenceDataModule, labelled_rows),
    "grpo": (policy(GRPO), PromptDataModule, prompt_rows),
    "ppo": (policy(PPO), PromptDataModule, prompt_rows),
}


@pytest.fixture
def small(tmp_path, model_folder):
    """A folder of a model with one embedding fewer than its tokenizer has tokens."""
    tokenizer = tokenizer_with(CALL)
    make_model(vocab_size=len(tokenizer) - 1).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    return str(tmp_path / "small")


def data_of(kind, last, split="train", **options):
    _, data, rows = MODULES[kind]
    settings = {"batch_size": 2, "shuffle": False, "cache_dir": False, **options}
    if split == "train":
        return data(rows(last), **settings)
    return data(rows("where"), **{split: rows(last)}, **settings)


@pytest.fixture
def train(trainer_options):
    def run(module, data, **options):
        trainer = Trainer(**{**trainer_options, "max_steps": 1, "num_sanity_val_steps": 0, **options})
        try:
            trainer.fit(module, data)
        finally:
            run.steps = trainer.global_step
        return trainer

    return run


# ---- tokens


@pytest.mark.parametrize(
    ("kind", "split"),
    [*((kind, "train") for kind in MODULES), *((k, s) for k in ("full", "grpo") for s in ("validation", "test"))],
)
def test_token_without_an_embedding_is_named_before_the_first_step(kind, split, small, train):
    module = MODULES[kind][0](small)
    with pytest.raises(ModelError, match=rf"{split} \({split}, row 7\) has the token '{CALL}' \(id \d+\).*embeddings"):
        train(module, data_of(kind, f"where {CALL}", split))
    assert train.steps == 0


@pytest.mark.parametrize("kind", ["full", "dpo", "grpo"])
def test_tokenizer_may_exceed_embeddings_if_no_row_needs_it(kind, small, train):
    train(MODULES[kind][0](small), data_of(kind, "where"))
    assert train.steps == 1


@pytest.mark.parametrize("kind", MODULES)
def test_batches_of_a_custom_loader_are_checked(kind, small, train):
    tokenizer = tokenizer_with(CALL)
    data = data_of(kind, f"where {CALL}", tokenizer=tokenizer, batch_size=7)
    data.setup("fit")
    batches = DataLoader(list(data.train_dataloader()), batch_size=None)
    with pytest.raises(ModelError, match=f"A row of this batch has the token '{CALL}'"):
        train(MODULES[kind][0](small), batches)


def test_generate_names_a_token_without_an_embedding(small):
    module = LoRAFineTuning(small)
    assert len(module.generate(["where"], max_new_tokens=2)) == 1
    with pytest.raises(ModelError, match=f"Input 1 has the token '{CALL}'"):
        module.generate(["where", f"where {CALL}"], max_new_tokens=2)


def test_score_conversations_names_a_token_without_an_embedding(small):
    module = RewardModeling(small)
    turns = [{"role": "user", "content": CALL}, {"role": "assistant", "content": "fox"}]
    with pytest.raises(ModelError, match=f"A conversation has the token '{CALL}'"):
        module.score_conversations([turns])


def test_padding_token_without_an_embedding_is_refused(model_folder, train):
    tokenizer = make_tokenizer()
    while len(tokenizer) < 400:
        tokenizer.add_tokens([f"<{len(tokenizer)}>"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ModelError, match=r"pads with '\[PAD\]' \(id 400\)"):
        train(FullFineTuning(model_folder, tokenizer=tokenizer), data_of("full", "where"))


def test_rows_of_a_second_run_are_checked(small, train):
    module = FullFineTuning(small)
    train(module, data_of("full", "where"))
    with pytest.raises(ModelError, match=CALL):
        train(module, data_of("full", CALL))


def test_validate_checks_its_rows(small, trainer_options):
    module = FullFineTuning(small)
    Trainer(**trainer_options).validate(module, data_of("full", "where", "validation"), verbose=False)
    with pytest.raises(ModelError, match=r"validation \(validation, row 7\)"):
        Trainer(**trainer_options).validate(module, data_of("full", CALL, "validation"), verbose=False)


# ---- positions


@pytest.mark.parametrize("kind", ["full", "lora", "dpo", "kto", "reward"])
def test_row_beyond_a_table_of_positions_is_named_before_the_first_step(kind, tmp_path, train):
    few_positions().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"train \(train, row 7\) has \d+ tokens.* 64 positions\. Set max_length=64"):
        train(MODULES[kind][0](str(tmp_path)), data_of(kind, LONG))
    assert train.steps == 0
    train(MODULES[kind][0](str(tmp_path)), data_of(kind, LONG, max_length=64, on_overlong="drop"))


def test_row_beyond_rotary_positions_is_reported_and_trained(tmp_path, train):
    model = make_model()
    model.config.max_position_embeddings = 64
    with pytest.warns(UserWarning, match=r"train \(train, row 7\) has \d+ tokens, more than the 64 positions") as told:
        train(FullFineTuning(model, tokenizer=make_tokenizer()), data_of("full", LONG))
    assert train.steps == 1
    assert sum("more than the 64 positions" in str(warning.message) for warning in told) == 1


def test_batch_beyond_a_table_of_positions_is_refused(train):
    tokenizer = make_tokenizer()
    data = data_of("full", LONG, tokenizer=tokenizer, batch_size=7)
    data.setup("fit")
    batches = DataLoader(list(data.train_dataloader()), batch_size=None)
    with pytest.raises(ModelError, match=r"A row of this batch has \d+ tokens, and GPT2LMHeadModel has 64 positions"):
        train(FullFineTuning(few_positions(), tokenizer=tokenizer), batches)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_prompt_without_room_for_a_completion_is_named_before_the_first_step(kind, split, train):
    module = MODULES[kind][0](few_positions(), tokenizer=make_tokenizer())
    with pytest.raises(ConfigError, match=rf"{split} \({split}, row 7\) has a prompt of \d+ tokens.*max_length=60"):
        train(module, data_of(kind, LONG, split))
    assert train.steps == 0


def test_predict_names_a_prompt_without_room_before_the_first_answer(trainer_options):
    answered = []

    class Told(FullFineTuning):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            answered.append(batch)

    module = Told(few_positions(), tokenizer=make_tokenizer(), generation={"max_new_tokens": 8})
    data = PairDataModule(make_rows(2), predict=[{"input": "where"}, {"input": LONG}], batch_size=1, cache_dir=False)
    message = r"predict \(predict, row 2\) has a prompt of \d+ tokens.*, or shorten such rows or leave them out"
    with pytest.raises(ConfigError, match=message):
        Trainer(**trainer_options).predict(module, data)
    assert answered == []


# ---- new tokens


@pytest.fixture(params=[False, True], ids=["head", "tied"])
def grown(request, tmp_path):
    """A folder of a model and a tokenizer with an added token, saved in the usual way."""
    tokenizer = tokenizer_with(CALL)
    model = make_model(vocab_size=len(tokenizer) - 1, tie=request.param)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    return str(tmp_path / "grown")


def untrained(caught):
    return [str(w.message) for w in caught if "embedding was never trained" in str(w.message)]


def call_rows():
    return [*make_rows(4), *({"input": f"where {n}", "output": CALL} for n in range(4))]


def test_untrained_tokens_are_reported_with_a_working_remedy(grown, tmp_path, train):
    token = len(tokenizer_with(CALL)) - 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(LoRAFineTuning(grown, lora={"r": 2}), PairDataModule(call_rows(), cache_dir=False))
    (told,) = untrained(caught)
    assert f"'{CALL}' (id {token}) in 4 rows" in told
    advice = told[told.index("trainable_token_indices") - 2 :]
    lora = json.loads(advice[: advice.rindex("}") + 1].replace("'", '"'))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = LoRAFineTuning(grown, lora={"r": 2, **lora}, learning_rate=0.1)
        train(module, PairDataModule(call_rows(), cache_dir=False), max_steps=3)
    assert untrained(caught) == []
    ids = torch.tensor([[5, 6, token, 7]])
    module.eval()
    expected = module.model(input_ids=ids).logits
    before = AutoModelForCausalLM.from_pretrained(grown)
    with module.model.disable_adapter():
        torch.testing.assert_close(module.model(input_ids=ids).logits, before(input_ids=ids).logits)
    moved = module.model.get_input_embeddings()(torch.tensor([token])) - before.get_input_embeddings().weight[token]
    assert moved.abs().max() > 0.01
    module.export(tmp_path / "out")
    again = PeftModel.from_pretrained(before, tmp_path / "out")
    torch.testing.assert_close(again(input_ids=ids).logits, expected)


def test_new_tokens_with_a_frozen_row_of_the_head_are_reported_where_they_are_answers(grown, train):
    token = len(tokenizer_with(CALL)) - 1
    is_tied = AutoModelForCausalLM.from_pretrained(grown).config.tie_word_embeddings
    asked = [{"input": CALL, "output": row["output"]} for row in make_rows(4)]
    for rows, is_told in ((call_rows(), not is_tied), (asked, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = LoRAFineTuning(grown, lora={"r": 2, "trainable_token_indices": [token]})
            train(module, PairDataModule(rows, cache_dir=False))
        assert [f"{{'embed_tokens': [{token}], 'lm_head': [{token}]}}" in each for each in untrained(caught)] == (
            [True] * is_told
        )


def test_tokens_missing_in_the_checkpoint_count_as_new(model_folder, train):
    tokenizer = tokenizer_with(CALL)  # within the embedding matrix, whose last rows are unused
    with pytest.warns(UserWarning, match=rf"'{CALL}' \(id {len(tokenizer) - 1}\) in 4 rows"):
        train(
            LoRAFineTuning(model_folder, tokenizer=tokenizer, lora={"r": 2}),
            PairDataModule(call_rows(), cache_dir=False),
        )


@pytest.mark.parametrize("kind", ["full", "rows", "known"])
def test_token_checks_are_silent_about_trained_or_unused_tokens(kind, grown, model_folder, train):
    module = {
        "full": lambda: FullFineTuning(grown),
        "rows": lambda: LoRAFineTuning(grown, lora={"r": 2}),
        "known": lambda: LoRAFineTuning(model_folder, lora={"r": 2}),
    }[kind]()
    rows = call_rows() if kind == "full" else make_rows(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(module, PairDataModule(rows, cache_dir=False))
    assert untrained(caught) == []


# ---- another vocabulary


def test_tokenizer_of_another_model_is_reported(model_folder, train):
    core = json.loads(make_tokenizer().backend_tokenizer.to_str())
    words = core["model"]["vocab"]
    other = {text: (number if number < 4 else 4 + (number + 50) % (len(words) - 4)) for text, number in words.items()}
    core["model"]["vocab"] = other
    tokenizer = make_tokenizer()
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(core))
    with pytest.warns(UserWarning, match=r"The tokenizer isn't the model's: of the \d+ tokens .* it lacks \d+"):
        train(FullFineTuning(model_folder, tokenizer=tokenizer), data_of("full", "where"))


def test_end_token_of_ordinary_text_is_reported(train):
    model = make_model()
    model.generation_config.eos_token_id = 77
    with pytest.warns(UserWarning, match=r"ends answers at .* \(id 77\), which is ordinary text"):
        train(FullFineTuning(model, tokenizer=make_tokenizer()), data_of("full", "where"))


# ---- arguments of a wrong type


@pytest.mark.parametrize("rows", [("grpo", "PromptBatch"), ("dpo", "PreferenceBatch")])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_sft_error_names_the_datamodule_that_it_needs(kind, rows, model_folder, train):
    given, batch = rows
    data = data_of(given, "where", tokenizer=make_tokenizer())
    data.setup("fit")
    with pytest.raises(ConfigError, match=f"got a {batch}: pass a PairDataModule to the Trainer"):
        train(MODULES[kind][0](model_folder), DataLoader(list(data.train_dataloader()), batch_size=None))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_sft_error_of_other_batches_says_what_to_pass(kind, model_folder, train):
    with pytest.raises(ConfigError, match="got a Tensor: pass a PairDataModule to the Trainer, or a loader of dicts"):
        train(MODULES[kind][0](model_folder), DataLoader([1, 2]))


def test_reward_model_refuses_a_loaded_classifier(model_folder, train):
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=3)
    with pytest.raises(ModelError, match="classifies into 3 labels"):
        train(RewardModeling(model, tokenizer=make_tokenizer()), data_of("reward", "where"))


@pytest.mark.parametrize("turns", [[], [{"role": "user", "content": "where"}]])
def test_score_conversations_refuses_a_conversation_without_answer(turns, model_folder):
    with pytest.raises(ConfigError, match="Conversation 0 doesn't end with an answer"):
        RewardModeling(model_folder).score_conversations([turns])


@pytest.mark.parametrize("kind", MODULES)
def test_adapted_model_is_refused_where_a_base_is_expected(kind):
    adapted = add_lora(make_model(), lora_config({"r": 2}))
    with pytest.raises(ConfigError, match="`model` is a PeftModelForCausalLM: expected"):
        MODULES[kind][0](adapted)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (b"PK and so on", "is damaged or isn't a checkpoint"), ({"a": 1}, "contains no 'state_dict'")],
)
def test_load_checkpoint_names_a_file_that_is_not_a_checkpoint(content, says, model_folder, tmp_path):
    file = tmp_path / "some.ckpt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ModelError, match=rf"some\.ckpt' .*{says}"):
        FullFineTuning(model_folder).load_checkpoint(file)


# ---------------------------------------------------------------- inputs to answer

TURN = {"role": "user", "content": "where is my parcel"}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("where", r"single text .* pass \['where'\]"),
        ([TURN], "Input 0 is a dict with the keys role, content, not a conversation"),
        ([{"prompt": "where"}], "Input 0 is a dict with the keys prompt, not a conversation"),
        ([{"role": ["user"], "content": ["where"]}], "collate_fn=list"),
        ({"role": "user"}, "dict with the keys role"),
        (["where", 3], "Input 1 is of type int"),
        (["where", ["where"]], "Input 1 is of type list"),
        (["where", []], "Input 1 has no messages"),
    ],
)
def test_generate_refuses_what_is_no_list_of_inputs(inputs, message):
    module = GRPO(make_model(), tokenizer=make_tokenizer(), rewards=lambda completions: [0.0] * len(completions))
    with pytest.raises(ConfigError, match=message):
        module.generate(inputs)


@pytest.mark.parametrize("conversations", ["where", [TURN], ["where"]])
def test_score_conversations_refuses_what_is_no_list_of_conversations(conversations):
    module = RewardModeling(make_model(), tokenizer=make_tokenizer())
    with pytest.raises(ConfigError, match=r"Input 0|single text"):
        module.score_conversations(conversations)


def test_generate_takes_columns_that_pandas_has_read():
    module, turns = DPO(make_model(), tokenizer=make_tokenizer()), np.empty(1, dtype=object)
    turns[0] = TURN
    assert module.generate(np.array(["where"]), max_new_tokens=2) == module.generate(["where"], max_new_tokens=2)
    assert module.generate([turns, turns], max_new_tokens=2) == module.generate([[TURN]] * 2, max_new_tokens=2)
    with pytest.raises(ConfigError, match="Input 0 is of type ndarray"):
        module.generate([np.array(["where"])])


def test_generate_takes_tuples_and_generators():
    module = DPO(make_model(), tokenizer=make_tokenizer())
    inputs = ["where", (TURN,)]
    assert module.generate(iter(inputs), max_new_tokens=2) == module.generate(inputs, max_new_tokens=2)
