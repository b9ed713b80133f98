"""Loading a language model from a folder, and the thin wrapper whose forward gives log-probabilities or scores of a Batch.

Letters: B rows, T columns, N sequences, M learned targets, V vocabulary, D model width, C classes.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    model_path: str = "builtin"
    """Folder with config, safetensors and tokenizer; "builtin" is a seeded model of a million weights made in code."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Arithmetic of the forward pass; auto is bfloat16 on accelerators and float32 on CPU. Master weights that train stay float32 (or float64)."""
    packing: bool = True
    """Lay sequences one after another in one row. Models whose documents would see each other are found out at the start and padded instead."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    model_args: tuple[str, ...] = ()
    """Further key=value arguments of from_pretrained, such as attn_implementation=flash_attention_2."""
    hub: bool = False
    """Allow model names to be looked up on the Hugging Face hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for folders you trust."""


def model_folder(path: str, hub: bool = False) -> str:
    """The folder (or, with `hub`, the name) to load; "builtin" is written to the cache once. ValueError where there is no such folder."""
    if path == "builtin":
        from ta.builtin import tiny_folder

        return str(tiny_folder())
    if not Path(path).is_dir() and not hub:
        raise ValueError(
            f"no model folder at {path}: give a folder with config.json and *.safetensors, or add --hub to look the name up on the hub"
        )
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{path} holds no config.json: give the folder of a saved model (a run's export is RUN/final)")
    return path


def load_model(config: ModelConfig, kind: Literal["causal", "seq_cls", "encoder"] = "causal", num_labels: int = 1, device: str = "cpu"):
    """The transformers model in `config.model_path`, its weights in float32 (float64 where asked), on `device`, in eval mode."""
    import torch
    import transformers

    from ta.attention import register

    folder = model_folder(config.model_path, config.hub)
    arguments = {"attn_implementation": register(), **_arguments(config.model_args)}
    if kind == "seq_cls":
        arguments["num_labels"] = num_labels
    auto = {"causal": "AutoModelForCausalLM", "seq_cls": "AutoModelForSequenceClassification", "encoder": "AutoModel"}[kind]
    if kind == "encoder" and arguments["attn_implementation"] == "ta":
        arguments.pop("attn_implementation")
    try:
        model = getattr(transformers, auto).from_pretrained(
            folder,
            dtype=torch.float64 if config.dtype == "float64" else torch.float32,
            trust_remote_code=config.trust_remote_code,
            local_files_only=not config.hub,
            use_safetensors=True,
            **arguments,
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} does not load as a {kind} model: {str(error).splitlines()[0]}") from error
    return model.to(device).eval()


def _arguments(pairs: tuple[str, ...]) -> dict[str, Any]:
    """key=value strings with Python literals as values; anything else stays text."""
    out = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise ValueError(f"--model-args {pair!r} is not of the form key=value")
        try:
            out[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[key] = value
    return out
