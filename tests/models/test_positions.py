import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_ft.models.load import context_length
from lightning_ft.models.positions import reads_position

LIMIT = 24
SIZES = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": LIMIT}
LLAMA = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
OPT = {"hidden_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
BART = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 32, "is_decoder": True}
KINDS = {
    "gpt2": (GPT, False),
    "gptj": ({**GPT, "rotary_dim": 4}, False),
    "ctrl": ({**GPT, "dff": 32}, False),
    "opt": ({**OPT, "max_position_embeddings": LIMIT}, False),
    "bart": ({**BART, "max_position_embeddings": LIMIT}, False),
    "mpt": ({"d_model": 32, "n_layers": 1, "n_heads": 4, "expansion_ratio": 1, "max_seq_len": LIMIT}, False),
    "llama": ({**LLAMA, "max_position_embeddings": LIMIT}, True),
    "gpt_neox": ({**LLAMA, "max_position_embeddings": LIMIT}, True),
}


def make(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **KINDS[kind][0]))


@pytest.mark.parametrize("kind", KINDS)
def test_reads_position_agrees_with_a_pass_of_that_length(kind):
    model = make(kind)
    assert context_length(model) == LIMIT
    for length, fits in ((LIMIT, True), (LIMIT + 1, KINDS[kind][1])):
        assert reads_position(model, length - 1) == fits
        try:
            model(input_ids=torch.arange(3, 3 + length)[None], use_cache=False)
            read = True
        except (IndexError, RuntimeError):
            read = False
        assert read == fits
    assert model.training


def test_reads_position_does_not_blame_positions_for_another_failure():
    model = make("gpt2")

    def fails(*args, **kwargs):
        raise RuntimeError("no kernel image")

    model.transformer.h[0].forward = fails
    assert reads_position(model, 10 * LIMIT)


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (None, LIMIT),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LIMIT}, 4 * LIMIT),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LIMIT // 4}, LIMIT),
        ({"rope_type": "linear", "factor": 2.0}, 2 * LIMIT),
    ],
)
def test_context_length_is_that_of_the_rotary_scaling(rope, length):
    options = {} if rope is None else {"rope_parameters": {"rope_theta": 10000.0, **rope}}
    config = AutoConfig.for_model("llama", **SIZES, **LLAMA, max_position_embeddings=LIMIT, **options)
    assert context_length(AutoModelForCausalLM.from_config(config)) == length
