"""Write what plain transformers and PEFT load, and refuse what would not give the same output."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.errors import ExportError
from lightning_ft.models.adapt import InitialAdapter, rounds_base
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.models.sequence_scores import last_token_scores
from lightning_ft.models.shard import is_sharded

CHECK_TOKENS = 16


def export(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    merge: bool = False,
    initial: InitialAdapter | None = None,
    check_prompts: list[list[int]] | None = None,
    overwrite: bool = False,
    write: bool = True,
) -> Path:
    """Write an adapter folder, or a model folder, with the tokenizer and its chat template.

    Args:
        model: The trained model.
        tokenizer: Its tokenizer.
        folder: Where to write; created.
        merge: Fold the adapter into the base weights and write a whole model.
        initial: The adapter as initialised, where that changed the base.
        check_prompts: Token ids of prompts whose greedy continuation a merged model must repeat; a few made-up ones by
            default.
        overwrite: Write into a folder that isn't empty.
        write: False on ranks that only take part in gathering the weights of a sharded model.

    Returns:
        `folder`.

    Raises:
        ExportError: If the folder isn't empty, or the merged model's greedy output differs.
    """
    path = Path(folder)
    gathered = _gathered(model, merge=merge, initial=initial)
    if not write:
        return path
    check_folder(path, overwrite=overwrite)
    if isinstance(model, PeftModel) and not merge:
        if rounds_base(cast(LoraConfig, model.active_peft_config)):
            raise ExportError(
                "LoftQ rounded the base weights, so its adapter fits no other base: export with merge=True."
            )
        options = {} if initial is None else {"path_initial_model_for_weight_conversion": str(initial.path)}
        path.mkdir(parents=True, exist_ok=True)
        _save_adapter(model, path, gathered | options)
    elif isinstance(model, PeftModel):
        _merged(model, check_prompts).save_pretrained(path)
    else:
        model.save_pretrained(path, **gathered)
    tokenizer.save_pretrained(path)
    _write_card(path, model, merge)
    return path


def check_folder(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder that can't be written to, or whose files an export would mix with.

    Raises:
        ExportError: If it is a file, or isn't empty and may not be overwritten.
    """
    if path.exists() and not path.is_dir():
        raise ExportError(f"{path} is a file; export needs a folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ExportError(f"{path} isn't empty: choose another folder, or pass overwrite=True.")


def _gathered(model: CausalLM, *, merge: bool, initial: InitialAdapter | None) -> dict[str, Any]:
    """The whole weights of a sharded model, on rank 0, as an argument of `save_pretrained`."""
    if not is_sharded(model):
        return {}
    if merge or initial is not None:
        raise ExportError(
            "A sharded model is exported as it is: it can't be merged, nor can an adapter that changed the base be "
            "converted. Use `lightning-ft export` on its checkpoint, which loads it on one device."
        )
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {"state_dict": get_model_state_dict(model, options=options)}


def _save_adapter(model: PeftModel, path: Path, options: dict[str, Any]) -> None:
    # The trained adapter alone, not those that stand beside it for a reference or for values.
    cast(Any, model).save_pretrained(str(path), selected_adapters=[model.active_adapter], **options)
    _plain_initialisation(path / "adapter_config.json")


def _plain_initialisation(config: Path) -> None:
    """The weights are trained ones: whoever loads them must not initialise (and split the base) again."""
    written = json.loads(config.read_text())
    written["init_lora_weights"] = True
    for name in ("eva_config", "corda_config", "loftq_config", "lora_ga_config"):
        if name in written:
            written[name] = {} if name == "loftq_config" else None
    config.write_text(json.dumps(written, indent=2, sort_keys=True))


def _merged(model: PeftModel, check_prompts: list[list[int]] | None) -> PreTrainedModel:
    """The adapter folded into a copy of the base, after its greedy output was compared."""
    base = base_of(model)
    if getattr(base, "is_quantized", False):
        raise ExportError(
            "An adapter over quantized weights can't be merged exactly. Export it unmerged, or load the base "
            "unquantized, put the exported adapter on it and merge there."
        )
    prompts = check_prompts or _made_up_prompts(base)
    expected = [_output(model, prompt) for prompt in prompts]
    try:
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"PEFT can't merge this adapter: {str(error).strip()} Export it unmerged.") from error
    for prompt, want in zip(prompts, expected, strict=True):
        got = _output(merged, prompt)
        same = torch.equal(got, want) if not want.is_floating_point() else torch.allclose(got, want, 1e-2, 1e-3)
        if not same:
            raise ExportError(
                f"The merged model answers the prompt {prompt[:8]}... with {got.tolist()}, the live one with "
                f"{want.tolist()}. Merging in {base.dtype} loses too much: export unmerged, or load the model with "
                "dtype='float32'."
            )
    return cast(PreTrainedModel, merged)


def _made_up_prompts(base: PreTrainedModel) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.config.get_text_config().vocab_size
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in (4, 9, 16)]


def _output(model: CausalLM, prompt: list[int]) -> Tensor:
    """What a model makes of a prompt: its greedy continuation, or of a reward model its score."""
    if base_of(model).can_generate():
        return greedy(model, prompt)
    with evaluating(model):
        return last_token_scores(model, [torch.tensor(prompt)], 0).cpu()


def greedy(model: CausalLM, prompt: list[int], tokens: int = CHECK_TOKENS) -> Tensor:
    """Greedy continuation of token ids in eval mode, ``int64 [tokens]`` or fewer where it ended."""
    ids = torch.tensor([prompt], device=input_device(model))
    with evaluating(model):
        out = cast(Any, model).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, num_beams=1
        )
    return cast(Tensor, out[0, len(prompt) :].cpu())


def _write_card(path: Path, model: CausalLM, merge: bool) -> None:
    base = base_of(model)
    name = base.config._name_or_path or type(base).__name__
    adapter = isinstance(model, PeftModel) and not merge
    kind = "LoRA adapter for" if adapter else "Fine-tuned from"
    library = "peft" if adapter else "transformers"
    generates = base.can_generate()
    auto = "AutoModelForCausalLM" if generates else "AutoModelForSequenceClassification"
    # without the pad token that the tokenizer was exported with, scores of padded batches would be read elsewhere
    options = "" if generates else f", num_labels=1, pad_token_id={base.config.get_text_config().pad_token_id}"
    task = "text-generation" if generates else "text-classification"
    header = f"---\nbase_model: {name}\nlibrary_name: {library}\npipeline_tag: {task}\n---\n"
    imports = ("from peft import PeftModel\n" if adapter else "") + f"from transformers import {auto}\n"
    load = (
        f'model = PeftModel.from_pretrained({auto}.from_pretrained("{name}"{options}), "{path.name}")'
        if adapter
        else f'model = {auto}.from_pretrained("{path.name}")'
    )
    (path / "README.md").write_text(
        f"{header}\n# {path.name}\n\n{kind} `{name}`, made with lightning_ft.\n\n```python\n{imports}\n{load}\n```\n"
    )
