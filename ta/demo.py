"""The built-in model and data written into the cache as ordinary files, so that a run without flags is an ordinary run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ta import builtin, pictures
from ta.store import cache_folder

TUNED = "builtin-sft"  # what --model-path calls it
SIZES = {
    "chats": (builtin.TINY_STEPS * builtin.TINY_BATCH, 256),
    "preferences": (4_000, 256),
    "labelled": (3_200, 256),
    "classes": (4_800, 256),
    "candidates": (256, 64),
}
PICTURES = (3000, 60)  # training, held out


def _place() -> Path:
    """A cache folder of this version of the built-in parts."""
    return cache_folder("") / "builtin" / builtin.fingerprint()


def tiny_folder() -> Path:
    """The seeded tiny model with its tokenizer, as a folder that from_pretrained loads; written once."""
    folder = _place() / "model"
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
    return _place() / "tuned"


def pictures_folder() -> Path:
    """Generated pictures with their records (ta/pictures.py), drawn once; the pictures lie in its folder images."""
    folder = _place() / f"pictures-{PICTURES[0]}-{PICTURES[1]}-{pictures.fingerprint()}"
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        pictures.write_pictures(temporary, *PICTURES)
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was first
            shutil.rmtree(temporary)
    return folder


def data_or_builtin(data: Sequence[str], val_data: Sequence[str], kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sources given, or where no --data is given the built-in records of `kind` (training, held out), written once."""
    if data:
        return tuple(data), tuple(val_data)
    if kind == "pictures":
        folder = pictures_folder()
        return (str(folder / "train.jsonl"),), tuple(val_data) or (str(folder / "held_out.jsonl"),)
    paths = []
    for split, n in zip(("train", "held_out"), SIZES[kind], strict=True):
        path = _place() / f"{kind}-{split}-{n}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            builtin.write_jsonl(temporary, getattr(builtin, kind)(split, n))
            with suppress(FileExistsError):  # another process was first: its file stays as it is
                os.link(temporary, path)
            temporary.unlink()
        paths.append(str(path))
    return (paths[0],), tuple(val_data) or (paths[1],)
