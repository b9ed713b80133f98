"""Folders of models, and of built-in parts that are written into the cache as ordinary files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ta import builtin, pictures
from ta.store import cache_folder, content_hash, hash_json

TUNED = "builtin-sft"  # what --model-path calls it
PICTURES = (3000, 60)  # training, held out


def place() -> Path:
    """A cache folder of this version of the built-in parts."""
    return cache_folder("") / "builtin" / builtin.fingerprint()


def tiny_folder() -> Path:
    """The seeded tiny model with its tokenizer, as a folder that from_pretrained loads; written once."""
    folder = place() / "model"
    if not (folder / "config.json").exists():
        temporary = folder.with_name(f".model.{os.getpid()}.tmp")
        builtin.write_tiny(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was first
            shutil.rmtree(temporary)
    return folder


def tuned_folder() -> Path:
    """Where the tiny model lies after fine-tuning on the built-in chats (ta/warm.py)."""
    return place() / "tuned"


def pictures_folder() -> Path:
    """Generated pictures with their records (ta/pictures.py), drawn once; the pictures lie in its folder images."""
    folder = place() / f"pictures-{PICTURES[0]}-{PICTURES[1]}-{pictures.fingerprint()}"
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        pictures.write_pictures(temporary, *PICTURES)
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was first
            shutil.rmtree(temporary)
    return folder


def model_folder(path: str, hub: bool = False) -> str:
    """The folder (or, with `hub`, the name) to load; "builtin" is written to the cache once. ValueError where there is no such folder."""
    if path.startswith("builtin") and not Path(path).exists():
        if path == "builtin":
            return str(tiny_folder())
        if path == TUNED and tuned_folder().exists():
            return str(tuned_folder())
    if not Path(path).is_dir() and not hub:
        raise ValueError(
            f"no model folder at {path}: give a folder with config.json and *.safetensors, or add --hub to look the name up on the hub"
        )
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{path} holds no config.json: give the folder of a saved model (a run's export is RUN/final)")
    return path


def fingerprint(path: str, hub: bool = False) -> str:
    """Hash of a model folder's config and weights (each file is read once and remembered)."""
    folder = Path(model_folder(path, hub))
    if not folder.is_dir():
        return path
    notes = cache_folder("") / "hashes"
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name in ("config.json", "adapter_config.json"))
    return hash_json([[p.name, content_hash(str(p), notes)] for p in files])[:16]
