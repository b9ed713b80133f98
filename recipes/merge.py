"""Merge a trained adapter into its base: one folder that plain transformers and vLLM load.

    python recipes/merge.py --model-path BASE --adapter-path runs/sft/final --out merged
    python recipes/merge.py --model-path runs/sft/final --out merged     # its base is where it was

The sum is made in float32, checked against base + adapter on logits, written in the base's own
dtype, and read back and checked once more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import ta
from ta.chat.tokenizer_files import UNCHANGED, VOCABULARIES, read_tokenizer, save_tokenizer
from ta.files import check_replaceable, json_text, keep_inputs, locked, publishing


@dataclass(frozen=True)
class Config:
    out: str
    """Folder to write."""
    model: ta.ModelConfig = ta.ModelConfig()
    overwrite: bool = False
    """Replace what OUT holds."""
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights that are written. Default: the one in which the base is stored."""

    def check(self) -> None:
        """ValueError for settings of the model that a merge has no use for."""
        if self.model.dtype != "auto" or self.model.model_args:
            raise ValueError(
                "--dtype and --model-args are of no use to a merge: it adds in float32 and writes "
                "in the base's own dtype (or --export-dtype); leave them out"
            )


# in a merged model: what it was made of, by which a later --overwrite knows it
MARK = "merged_from.json"
NAMES = (
    *(
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
    ),
    *("tokenizer.json", "tokenizer_config.json", *VOCABULARIES, *UNCHANGED),
    *("chat_template.jinja", "additional_chat_templates", "media.json", "projectors", MARK),
)

# peft's names of what an adapter is for
TASKS = {"CAUSAL_LM": "causal", "SEQ_CLS": "seq_cls", "FEATURE_EXTRACTION": "encoder"}


def check_out(config: Config, inputs: list) -> None:
    """ValueError when writing OUT would lose something: what it holds already, or an input."""
    out = Path(config.out).resolve()
    keep_inputs(out, inputs)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()):
        if not config.overwrite:
            raise ValueError(
                f"--out {out} is not empty: give a new folder, or add --overwrite to replace it"
            )
        check_replaceable(out, "merged model", MARK, ("base", "adapter"), NAMES)


def load_base(config: ta.ModelConfig, adapter: str):
    """The base in float32, as the model that the adapter is for.

    It has the labels and the generation config of the adapter's run, which says where answers stop.
    """
    from transformers import GenerationConfig

    task = ta.model.adapters.read_config(adapter)["task_type"]
    if task not in TASKS:
        raise ValueError(f"{adapter} is an adapter for {task}: known are {', '.join(TASKS)}")
    labels = ta.model.adapters.adapter_labels(adapter) if task == "SEQ_CLS" else {}
    exact = replace(config, dtype="float32")
    model = ta.load_base(exact, TASKS[task], labels.get("num_labels", 1), whole=True)
    if labels.get("id2label"):
        model.config.id2label = labels["id2label"]
        model.config.label2id = {label: i for i, label in labels["id2label"].items()}
    if model.can_generate() and (Path(adapter) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(adapter)
        ta.model.load.check_generation(adapter, model.generation_config)
    return model


def load_tokenizer(adapter: str, base: str):
    """The adapter's own tokenizer, else the base's, else none.

    The adapter's knows the new tokens and the template that was trained.
    """
    for folder in (Path(adapter), Path(base)):
        names = ("tokenizer.json", "tokenizer_config.json")
        if any((folder / name).exists() for name in names):
            return read_tokenizer(folder)
    return None


def check_saved(model, folder: Path) -> None:
    """ValueError unless the folder gives the very logits of the model that was written to it."""
    settings = {"dtype": model.dtype, "local_files_only": True}
    again, _ = ta.model.load.from_pretrained(type(model), folder, **settings)
    if not ta.logits_agree(ta.probe_logits(model), ta.probe_logits(again.eval()), 1e-5):
        raise ValueError(
            "the merged model does not read back as it was written: is the disk sound?"
        )


def main(config: Config) -> None:
    base, adapter, media, _ = ta.resolve(config.model)
    if adapter is None:
        raise ValueError(
            f"{config.model.model_path} is no adapter: give the adapter in --adapter-path"
        )
    export = ta.model.export
    out = Path(config.out).resolve()
    inputs = [Path(base).resolve(), Path(adapter).resolve()]
    with locked(out):
        check_out(config, [*inputs, media])
        model = load_base(config.model, adapter)
        dtype = export.stored_dtype(base, config.export_dtype)
        export.check_room(out, export.model_bytes(model, dtype))
        tokenizer = load_tokenizer(adapter, base)
        if tokenizer is not None:
            export.check_tokenizer(tokenizer, model.config)
        merged = ta.merge_adapter(ta.load_adapter(model, adapter))
        if tokenizer is not None:
            ta.check_vocabulary(tokenizer, merged)
            if not merged.can_generate():
                # a classifier's score is read at the last token that is not padding
                merged.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        ta.cast_parameters(merged, dtype)
        with publishing(out, replace=True) as folder:
            export.save_model(merged, folder)
            if tokenizer is not None:
                save_tokenizer(tokenizer, folder)
            if media:
                ta.copy_media(media, folder)
            made_of = {"base": str(inputs[0]), "adapter": str(inputs[1])}
            (folder / MARK).write_text(json_text(made_of))
            check_saved(merged, folder)
    ta.parallel.tell(
        f"{base} + {adapter} -> {config.out} ({str(dtype).removeprefix('torch.')}; logits agree)"
    )


if __name__ == "__main__":
    ta.cli(main, Config)
