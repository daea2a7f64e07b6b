"""Export as a GGUF file, the format of llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The `gguf` package writes the file. Before it counts as written, transformers reads it back: its tokenizer must encode
as the model's does, and its greedy answers must agree with the model's.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.distributed import rank_zero_info
from lightning_ft.errors import ExportError, MissingDependencyError
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import input_device
from lightning_ft.models.load import context_length
from lightning_ft.read_errors import first_line

if TYPE_CHECKING:
    from gguf import GGUFWriter

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
FILE_NAME = "model.gguf"
MIN_AGREEMENT = {"f32": 1.0, "f16": 0.98, "bf16": 0.95, "q8_0": 0.9}
"""Smallest share of greedy tokens that must be the model's own, by type of the weights."""
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Architecture in GGUF by `model_type`; the weights of queries and keys are reordered for ``llama`` only."""
_TEXTS = (
    "The capital of France is",
    "My order hasn't arrived yet. Where is it?",
    "def add(a, b):\n    return a +",
    "1, 2, 3, 4, 5,",
    "Dear customer, thank you for your message of 12 May.",
    "  Two spaces, a tab\tand ünïcödé: 東京.",
)
"""Texts that are encoded and continued for the comparison."""
_NEW_TOKENS = 24


def check_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, dtype: GGUFType = "f16"
) -> None:
    """Refuse a model that can't be written as GGUF, as far as that is known before training.

    Args:
        model: The transformers model.
        tokenizer: Its tokenizer; None if it isn't known yet.
        dtype: Type of the matrices, as in :func:`export_gguf`.

    Raises:
        ExportError: For a type, and an architecture, scaled positions, attention windows or a tokenizer that can't be
            written.
        MissingDependencyError: If `gguf` isn't installed.
    """
    if dtype not in MIN_AGREEMENT:
        raise ExportError(f"gguf_dtype={dtype!r}: a GGUF export writes {', '.join(MIN_AGREEMENT)}.")
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError("A GGUF export needs the package gguf: pip install 'lightning-ft[gguf]'.")
    _architecture(model)
    if tokenizer is not None:
        _byte_level(tokenizer)


def export_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: GGUFType = "f16"
) -> float:
    """Write ``model.gguf`` into a folder, and compare what transformers reads back with the model.

    Args:
        model: The whole model; an adapter must be merged before.
        tokenizer: Its tokenizer.
        folder: Folder to write to.
        dtype: Type of the matrices: ``f32``, ``f16``, ``bf16`` or ``q8_0``; vectors are ``f32``.

    Returns:
        Share of the greedy tokens of the file's model that are the model's own.

    Raises:
        ExportError: If the architecture or tokenizer can't be written, the tokenizer that is read back encodes
            differently, or fewer tokens agree than `MIN_AGREEMENT` says.
        MissingDependencyError: If `gguf` isn't installed.
    """
    check_gguf(model, tokenizer, dtype=dtype)
    import gguf

    architecture = _architecture(model)
    path = folder / FILE_NAME
    writer = gguf.GGUFWriter(path, architecture)
    _add_config(writer, model, dtype)
    _add_tokenizer(writer, tokenizer, model)
    names = gguf.get_tensor_name_map(
        {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], model.config.num_hidden_layers
    )
    for name, weight in _weights(model).items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ExportError(
                f"The weight {name} of {type(model).__name__} has no place in a GGUF file of {architecture}."
            )
        values = weight.detach().cpu().float().numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
            values = _reordered(values, _heads(model, queries=".q_proj." in name))
        tensor_type = gguf.GGMLQuantizationType[("f32" if values.ndim == 1 else dtype).upper()]
        if tensor_type == gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:  # blocks of 32 values
            tensor_type = gguf.GGMLQuantizationType.F16
        stored = values if tensor_type == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(values, tensor_type)
        writer.add_tensor(target, stored, raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _compare(model, tokenizer, path, dtype)


def _architecture(model: PreTrainedModel) -> str:
    model_type = str(model.config.model_type)
    if model_type not in _ARCHITECTURES:
        raise ExportError(
            f"A GGUF export supports {', '.join(_ARCHITECTURES)}; {type(model).__name__} is {model_type!r}. Export the "
            "folder, and convert it with llama.cpp's convert_hf_to_gguf.py."
        )
    rope = dict(getattr(model.config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        raise ExportError(
            f"A GGUF export doesn't write scaled positions (rope_type={rope['rope_type']!r}). Convert the exported "
            "folder with llama.cpp's convert_hf_to_gguf.py."
        )
    window = getattr(model.config, "sliding_window", None)
    if window and getattr(model.config, "use_sliding_window", True) and window < model.config.max_position_embeddings:
        raise ExportError(f"A GGUF export doesn't write attention windows (sliding_window={window:,}).")
    return _ARCHITECTURES[model_type]


def _heads(model: PreTrainedModel, *, queries: bool) -> int:
    config = model.config
    return int(config.num_attention_heads if queries else config.num_key_value_heads)


def _reordered(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Weights of queries or keys, whose rotated pairs are neighbors in llama.cpp and halves in transformers."""
    shape = values.shape
    pairs = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    reordered: np.ndarray[Any, Any] = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(shape)
    return reordered


def _weights(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Weights by name; a head that is tied to the embeddings isn't written twice."""
    tied = bool(model.config.tie_word_embeddings)
    return {n: w for n, w in model.state_dict().items() if not (tied and n == "lm_head.weight") and "rotary" not in n}


def _add_config(writer: GGUFWriter, model: PreTrainedModel, dtype: GGUFType) -> None:
    import gguf

    config = model.config
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    writer.add_name(str(config._name_or_path or config.model_type).replace("mistral", "m"))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(model) or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10_000.0))))
    writer.add_rope_dimension_count(head_dim)
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "bf16": gguf.LlamaFileType.MOSTLY_BF16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[dtype]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _byte_level(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], Sequence[Mapping[str, Any]]]:
    """A byte-level BPE tokenizer as its file describes it, and the steps before its merges; others are refused."""
    core = json.loads(tokenizer.backend_tokenizer.to_str()) if getattr(tokenizer, "is_fast", False) else {}
    encoding = core.get("model", {}).get("type")
    steps = core.get("pre_tokenizer") or {}
    parts: Sequence[Mapping[str, Any]] = steps.get("pretokenizers", [steps])
    byte_level = encoding == "BPE" and any(part.get("type") == "ByteLevel" for part in parts)
    if not byte_level or (core.get("normalizer") or {}).get("type") not in (None, "NFC"):
        raise ExportError(
            f"A GGUF export writes byte-level BPE tokenizers; this one is {encoding or type(tokenizer).__name__}. "
            "Convert the exported folder with llama.cpp's convert_hf_to_gguf.py."
        )
    if any(part.get("add_prefix_space") for part in parts):
        raise ExportError(
            "A GGUF export can't write a tokenizer that adds a space before each text (add_prefix_space). Convert the "
            "exported folder with llama.cpp's convert_hf_to_gguf.py."
        )
    return core, parts


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    import gguf

    core, parts = _byte_level(tokenizer)
    added = {item["id"]: item for item in core.get("added_tokens", [])}
    by_id = {index: token for token, index in core["model"]["vocab"].items()} | {
        i: t["content"] for i, t in added.items()
    }
    tokens, types = [], []
    for index in range(model.config.vocab_size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif index in added:
            types.append(gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in core["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(parts, str(model.config.model_type)))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if index is not None:
            add(index)
    plain = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(plain) and plain[0] == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(parts: Sequence[Mapping[str, Any]], model_type: str) -> str:
    """Name of the pre-tokenizer in llama.cpp, which doesn't read its regular expression from the file."""
    if model_type.startswith("qwen"):
        return "qwen2"
    if any(part.get("type") == "Digits" for part in parts):
        return "smollm"
    if any(part.get("type") == "Split" for part in parts):
        return "llama-bpe"
    return "gpt-2"


def _compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, dtype: GGUFType) -> float:
    """Read the file back and compare tokens; returns the share of greedy tokens that agree."""
    own = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    special = "".join(str(token) + " a" for token in tokenizer.all_special_tokens)
    for text in (*_TEXTS, special):
        expected, found = tokenizer(text)["input_ids"], own(text)["input_ids"]
        if expected != found:
            raise ExportError(
                f"The tokenizer of {path.name} encodes {text!r} as {found[:8]}... instead of {expected[:8]}..., so it "
                "would misread requests. Convert the exported folder with llama.cpp's convert_hf_to_gguf.py."
            )
    try:
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    except (RuntimeError, ValueError, KeyError) as error:  # transformers doesn't read every size of an architecture
        raise ExportError(
            f"transformers can't read {path.name} back, so it isn't known whether its answers are right: "
            f"{first_line(error)}. Export the folder."
        ) from error
    agreed = total = 0
    with evaluating(model):
        for text in _TEXTS:
            prompt = tokenizer(text)["input_ids"]
            expected = _greedy(model, prompt)
            # given the model's own tokens, so that one difference doesn't make all later ones differ
            logits = read(torch.tensor([[*prompt, *expected]])).logits[0, len(prompt) - 1 : -1]
            agreed += int((logits.argmax(-1) == torch.tensor(expected)).sum())
            total += len(expected)
    share = agreed / total
    if share < MIN_AGREEMENT[dtype]:
        raise ExportError(
            f"Read back by transformers, {path.name} ({dtype}) finds the model's own token most probable at "
            f"{share:.1%} of {total} positions, expected at least {MIN_AGREEMENT[dtype]:.0%}. Export with "
            "gguf_dtype='f32', or the folder."
        )
    rank_zero_info(f"{path.name} ({dtype}): {share:.1%} of {total} greedy tokens are the model's own.")
    return share


@torch.no_grad()
def _greedy(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    ids, device = list(prompt), input_device(model)
    for _ in range(_NEW_TOKENS):
        ids.append(int(model(torch.tensor([ids], device=device)).logits[0, -1].argmax()))
    return ids[len(prompt) :]
