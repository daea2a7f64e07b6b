"""Model card of an export: code that loads and runs the model, how it was trained, and what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
import transformers
import yaml
from peft import PeftModel
from transformers import PreTrainedModel

from lightning_ft.models.card_facts import CardFacts
from lightning_ft.models.card_sections import card_metadata, card_sections
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.load import text_class_name
from lightning_ft.models.lora_checks import peft_method

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")


class BaseOptions(TypedDict, total=False):
    """Further arguments that the base of an adapter is loaded with.

    Args:
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code of the base's repository runs.
        dtype: Name of the dtype of its weights.
        quantization: Arguments of `transformers.BitsAndBytesConfig`.
    """

    revision: str
    trust_remote_code: bool
    dtype: str
    quantization: dict[str, object]


def hub_name(name: str | None) -> str | None:
    """Return the hub name of a model that was loaded from the hub; None for a local folder or no name.

    Args:
        name: Hub name, folder, or folder of the hub's cache.

    Example:
        >>> hub_name("Qwen/Qwen3-0.6B"), hub_name("/home/me/model"), hub_name("")
        ('Qwen/Qwen3-0.6B', None, None)
        >>> hub_name("/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899d")
        'Qwen/Qwen3-0.6B'
    """
    if not name:
        return None
    if (cached := _HUB_CACHE.search(Path(name).as_posix())) is not None:
        return f"{cached['owner']}/{cached['name']}"
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def model_card(
    folder: str,
    model: CausalLM,
    *,
    merge: bool = False,
    base_options: BaseOptions | None = None,
    end_tokens: list[int] | None = None,
    facts: CardFacts | None = None,
    weights: str | None = None,
    chat: bool = True,
) -> str:
    """Write a model card in Markdown, without any local path and any text of rows.

    Args:
        folder: Last part of the path of the export's folder.
        model: Exported model.
        merge: Whether its adapter was folded into the base.
        base_options: Further arguments that the base was loaded with, such as ``{"revision": "main"}``.
        end_tokens: Ids of the tokens that end an answer, if the base itself doesn't stop at all of them.
        facts: How the weights were trained and what was measured; by default neither is known.
        weights: :func:`lightning_ft.models.card_facts.weights_hash` of the trained weights.
        chat: Whether the tokenizer has a chat template.

    Returns:
        Text of the card.
    """
    base = base_of(model)
    source: str = getattr(base.config, "_name_or_path", None) or ""
    name = hub_name(source)
    adapter = isinstance(model, PeftModel) and not merge
    shown = f"`{name or Path(source).name or type(base).__name__}`"
    remote = ", trust_remote_code=True" if (base_options or {}).get("trust_remote_code") else ""
    facts = facts or CardFacts()
    metadata = card_metadata(folder, model, facts, weights, base=name, adapter=adapter)
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=10_000).rstrip(),
        "---",
        "",
        f"# {folder}",
        "",
        f"{f'{_method(model)} adapter for' if adapter else 'Fine-tuned from'} {shown}, made with lightning_ft.",
        "",
        "```python",
        *(_adapter_code(folder, base, source, base_options or {}) if adapter else _whole_code(folder, base, remote)),
        *_example(base, chat=chat),
        "```",
        "",
    ]
    if adapter and name is None:
        lines += [
            "The base was a local folder. Before you publish the adapter, replace `base_model_name_or_path` in "
            "`adapter_config.json` by the base's name on the hub.",
            "",
        ]
    if adapter and end_tokens:
        lines += [
            "Tools that load the adapter without `generation_config.json` (`pipeline`, servers) take the end tokens "
            f"from the base, which doesn't stop at all of them: pass `eos_token_id={end_tokens}` (vLLM: "
            "`stop_token_ids`).",
            "",
        ]
    return "\n".join([*lines, *card_sections(model, facts, weights)])


def _method(model: CausalLM) -> str:
    """Name of the method of an adapter, as its users write it."""
    method = peft_method(cast(PeftModel, model))
    return "LoRA" if method == "LORA" else method.replace("_", " ").lower()


_AUTO: tuple[Any, ...] = (
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForTokenClassification,
    transformers.AutoModelForMaskedLM,
)
"""Auto classes of models that aren't causal language models, as a module that isn't this package's may train them."""


def _auto(base: PreTrainedModel) -> str:
    """Name of the class that loads a model as its own class."""
    for auto in _AUTO:
        models = auto._model_mapping.get(type(base.config), None)
        if type(base) in (models if isinstance(models, (list, tuple)) else (models,)):
            return str(auto.__name__)
    if base.can_generate():
        return text_class_name(base)
    own = type(base).__name__
    return own if hasattr(transformers, own) else "AutoModelForSequenceClassification"


def _adapter_code(folder: str, base: PreTrainedModel, source: str, options: BaseOptions) -> list[str]:
    auto, name = _auto(base), hub_name(source)
    imports = [auto, "AutoTokenizer", *(["GenerationConfig"] if base.can_generate() else [])]
    classifier: dict[str, object] = {}
    if not base.can_generate():
        # without the tokenizer's pad token, rewards of padded batches would be read at other tokens
        classifier = {"num_labels": base.config.num_labels, "pad_token_id": base.config.get_text_config().pad_token_id}
    arguments = [f"{key}={value!r}" for key, value in {**classifier, **options}.items() if key != "quantization"]
    if quantization := options.get("quantization"):
        settings = ", ".join(f"{key}={_literal(value)}" for key, value in quantization.items())
        arguments.append(f"quantization_config=BitsAndBytesConfig({settings})")
        imports.append("BitsAndBytesConfig")
    remark = "" if name else "  # it was a local folder: its path, or the base's name on the hub, goes here"
    remote = ", trust_remote_code=True" if options.get("trust_remote_code") else ""
    end = [f'model.generation_config = GenerationConfig.from_pretrained("{folder}")  # where answers end']
    return [
        "from peft import PeftModel",
        f"from transformers import {', '.join(sorted(imports))}",
        "",
        f'base = "{name or Path(source).name or "base"}"{remark}',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}"{remote})',
        f"model = {auto}.from_pretrained({', '.join(['base', *arguments])})",
        f'model = PeftModel.from_pretrained(model, "{folder}").eval()',
        *(end if base.can_generate() else []),
    ]


def _literal(value: object) -> str:
    """Format a setting of `BitsAndBytesConfig` as code; it accepts dtypes by name."""
    return repr(str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value)


def _whole_code(folder: str, base: PreTrainedModel, remote: str) -> list[str]:
    return [
        f"from transformers import {_auto(base)}, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}"{remote})',
        f'model = {_auto(base)}.from_pretrained("{folder}"{remote})',
    ]


def _example(base: PreTrainedModel, *, chat: bool) -> list[str]:
    """Code that asks the model: for an answer, a reward, or what else its head computes."""
    scores_chats = not base.can_generate() and base.config.num_labels == 1
    if chat and (base.can_generate() or scores_chats):
        answer = ', {"role": "assistant", "content": "..."}' if scores_chats else ""
        header = "" if scores_chats else "add_generation_prompt=True, "
        tokenized = [
            f'chat = [{{"role": "user", "content": "..."}}{answer}]',
            f'inputs = tokenizer.apply_chat_template(chat, {header}return_tensors="pt", return_dict=True)',
        ]
    else:
        tokenized = ['inputs = tokenizer("...", return_tensors="pt")']
    if not base.can_generate():
        read = "logits[0, 0].item()" if scores_chats else "logits[0].tolist()"
        return ["", *tokenized, f"print(model(**inputs).{read})"]
    start = "" if base.config.is_encoder_decoder else ', inputs["input_ids"].shape[1] :'
    return [
        "",
        *tokenized,
        "output = model.generate(**inputs, max_new_tokens=256)",
        f"print(tokenizer.decode(output[0{start}], skip_special_tokens=True))",
    ]
