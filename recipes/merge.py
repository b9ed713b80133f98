"""Merge a trained adapter into its base: one folder that plain transformers and vLLM load.

    python recipes/merge.py --model-path BASE --adapter-path runs/sft/final --out merged

The sum is made in float32, checked against base + adapter on logits, written in the base's own dtype, and read back and checked once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ta.command_line import cli


@dataclass(frozen=True)
class MergeConfig:
    model_path: str
    """Folder of the base that the adapter was trained on."""
    adapter_path: str
    """Folder of the adapter; its tokenizer, if it has one, goes with the merged model."""
    out: str
    """Folder to write."""
    overwrite: bool = False
    """Replace what OUT holds."""
    hub: bool = False
    """Allow the base to be looked up by name on the Hugging Face hub."""


def main(config: MergeConfig) -> None:
    from ta.folders import ModelConfig, resolve
    from ta.model.adapters import load_adapter, merge_adapter
    from ta.model.export import copy_media, published
    from ta.model.load import cast_parameters
    from ta.model.new_rows import check_vocabulary

    source = ModelConfig(config.model_path, config.adapter_path, "float32", hub=config.hub)
    sources = resolve(source)
    out, adapter = Path(config.out).resolve(), sources.adapter
    check_out(out, [Path(sources.base).resolve(), Path(adapter).resolve()], config.overwrite)
    model, dtype = load_adapted_base(source, adapter)
    tokenizer = load_tokenizer(adapter, sources.base, config.hub)
    merged = merge_adapter(load_adapter(model, adapter))
    if tokenizer is not None:
        check_vocabulary(tokenizer, merged)
    with published(out) as folder:
        cast_parameters(merged, dtype)
        save(merged, tokenizer, adapter, folder)
        copy_media(adapter, folder)
        check_saved(merged, folder)
    print(
        f"{config.model_path} + {config.adapter_path} -> {config.out} ({str(dtype).removeprefix('torch.')}; logits agree)"
    )


def check_out(out: Path, inputs: list[Path], overwrite: bool) -> None:
    """ValueError when writing `out` would lose something: what it holds already, or one of the inputs."""
    for path in inputs:
        if path.exists() and (out == path or out in path.parents):
            raise ValueError(
                f"--out {out} is or holds {path}, which is read from: give another folder"
            )
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(
            f"--out {out} is not empty: give a new folder, or add --overwrite True to replace it"
        )


def load_adapted_base(source, adapter_path: str):
    """The base in float32, as the model that the adapter is for, and the dtype that it is stored in."""
    import torch
    from transformers import AutoConfig

    from ta.folders import resolve
    from ta.model.adapters import labels_of, read_config
    from ta.model.language_model import native_attention
    from ta.model.load import load_base

    task = read_config(adapter_path)["task_type"]
    if task not in TASKS:
        raise ValueError(f"{adapter_path} is an adapter for {task}: known are {', '.join(TASKS)}")
    labels = labels_of(adapter_path) if task == "SEQ_CLS" else {}
    model = load_base(source, TASKS[task], labels.get("num_labels", 1), whole=True)
    if labels.get("id2label"):
        model.config.id2label = labels["id2label"]
        model.config.label2id = {label: i for i, label in labels["id2label"].items()}
    model.set_attn_implementation(native_attention(model))
    stored = AutoConfig.from_pretrained(resolve(source).base, local_files_only=not source.hub)
    stored = stored.get_text_config().dtype or torch.float32
    return model, getattr(torch, stored) if isinstance(stored, str) else stored


def load_tokenizer(adapter_path: str, base: str, hub: bool):
    """The adapter's own tokenizer (it knows the new tokens and the template that was trained), else the base's, else none."""
    from transformers import AutoTokenizer

    for folder in (adapter_path, base):
        if any(
            (Path(folder) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")
        ) or (folder == base and hub):
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=not hub
            )
    return None


def save(model, tokenizer, adapter_path: str, folder: Path) -> None:
    """Weights, config, tokenizer, and the generation config that the adapter's run wrote (where answers stop)."""
    from transformers import GenerationConfig

    if model.can_generate() and (Path(adapter_path) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(adapter_path)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_saved(model, folder: Path) -> None:
    """ValueError unless the folder gives the very logits of the model that was written to it."""
    from ta.model.adapters import logits_agree, probe_logits

    again = (
        type(model)
        .from_pretrained(folder, dtype=model.dtype, local_files_only=True, use_safetensors=True)
        .eval()
    )
    if not logits_agree(probe_logits(model), probe_logits(again), 1e-5):
        raise ValueError(
            "the merged model does not read back as it was written: is the disk sound?"
        )


# peft's names of what an adapter is for
TASKS = {"CAUSAL_LM": "causal", "SEQ_CLS": "seq_cls", "FEATURE_EXTRACTION": "encoder"}

if __name__ == "__main__":
    cli(main, MergeConfig)
