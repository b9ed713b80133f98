"""Keyword arguments of from_pretrained: those of the user, and those that quantize weights."""

from __future__ import annotations

import ast
from typing import Any

# keyword arguments that have a flag of their own
FLAGS = {
    "dtype": "--dtype",
    "torch_dtype": "--dtype",
    "quantization_config": "--quantize",
    "load_in_4bit": "--quantize",
    "load_in_8bit": "--quantize",
    "num_labels": "--num-labels",
    "trust_remote_code": "--trust-remote-code",
    "local_files_only": "--hub",
}


def parsed(pairs: tuple[str, ...]) -> dict[str, Any]:
    """A dict of key=value strings; values that are no Python literals stay text.

    ValueError for a string of another form, and for what a flag says already.
    """
    out = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise ValueError(f"--model-args {pair!r} is not of the form key=value")
        if key in FLAGS:
            raise ValueError(f"--model-args {key}=...: give {FLAGS[key]} instead")
        try:
            out[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[key] = value
    return out


def check_quantize(quantize: str, adapted: bool, world: int) -> None:
    """ValueError where a quantized base cannot work.

    That is without an adapter to train, on several processes, or without its package.
    """
    from importlib.util import find_spec

    if quantize == "none":
        return
    if not adapted:
        raise ValueError(
            f"--quantize {quantize}: weights of so few bits cannot be trained; give --adapter "
            "lora, or leave it out"
        )
    if world > 1:
        raise ValueError(
            f"--quantize {quantize}: such weights cannot be sharded over {world} processes; run on "
            "one, or leave it out"
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"--quantize {quantize} needs bitsandbytes, which is not installed: pip install "
            "bitsandbytes"
        )


def quantization(quantize: str, half: bool, device: str) -> dict[str, Any]:
    """The arguments of from_pretrained that hold linear layers in 8 or 4 bits; {} for "none".

    8 bits is LLM.int8 (arXiv 2208.07339); 4 bits is NF4 as in QLoRA (arXiv 2305.14314).
    """
    if quantize == "none":
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if half else torch.float32
    four_bits = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute,
    }
    bits = four_bits if quantize == "4bit" else {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(**bits), "device_map": {"": device}}
