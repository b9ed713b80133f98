"""The built-in data, written into the cache as ordinary files.

A run without flags is therefore an ordinary run on files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ta.builtin import models, tasks
from ta.builtin.model_folders import builtin_cache, pictures_folder
from ta.files import fetch_datasets, locked

SIZES = {
    "chats": (models.TINY_STEPS * models.TINY_BATCH, 256),
    "practice": (8_000, 256),
    "wordy": (2_400, 256),
    "preferences": (9_600, 256),
    "concise": (2_400, 256),
    "labelled": (3_200, 256),
    "classes": (4_800, 256),
    "candidates": (256, 64),
    "questions": (9_600, 128),
    "readings": (4_800, 128),
}


def data_or_builtin(
    data: Sequence[str], val_data: Sequence[str], kind: str, hub: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The (training, held-out) sources given, or the built-in records of `kind` without --data.

    Built-in files are written once. With `hub` data sets on the hub (hf:OWNER/NAME) are fetched.
    """
    if hub:
        fetch_datasets((*data, *val_data))
    if data:
        return tuple(data), tuple(val_data)
    if kind == "pictures":
        folder = pictures_folder()
        return (str(folder / "train.jsonl"),), tuple(val_data) or (str(folder / "held_out.jsonl"),)
    paths = []
    for split, n in zip(("train", "held_out"), SIZES[kind], strict=True):
        make = partial(getattr(tasks, kind), split, n)
        paths.append(str(records_file(f"{kind}-{split}-{n}.jsonl", make)))
    return (paths[0],), tuple(val_data) or (paths[1],)


def given_or_held_out(data: Sequence[str], kind: str, hub: bool = False) -> tuple[str, ...]:
    """The sources given, or the built-in held-out records of `kind`."""
    given, held_out = data_or_builtin(data, (), kind, hub)
    return given if data else held_out


def records_file(name: str, make: Callable[[], list[dict]]) -> Path:
    """The file of built-in records of that name, or else `make` gives the records for it."""
    path = builtin_cache() / name
    if not path.exists():
        with locked(path, waiting=lambda: None):
            # another process may have written the file while this one waited
            if not path.exists():
                tasks.write_jsonl(path, make())
    return path


def passages_file() -> Path:
    """The built-in passages, about which the built-in questions ask."""
    return records_file("passages.jsonl", tasks.passages)
