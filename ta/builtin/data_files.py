"""The built-in data written into the cache as ordinary files, so that a run without flags is an ordinary run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ta.builtin import models
from ta.builtin.model_folders import builtin_cache, pictures_folder
from ta.files import locked

NAMES = {
    "chat": "chats",
    "pair": "preferences",
    "labelled": "labelled",
    "class": "classes",
    "media": "pictures",
    "question": "questions",
}
SIZES = {
    "chats": (models.TINY_STEPS * models.TINY_BATCH, 256),
    "wordy": (2_400, 256),
    "preferences": (4_000, 256),
    "concise": (2_400, 256),
    "labelled": (3_200, 256),
    "classes": (4_800, 256),
    "candidates": (256, 64),
    "questions": (9_600, 128),
    "readings": (4_800, 128),
}


def data_or_builtin(
    data: Sequence[str], val_data: Sequence[str], kind: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sources given, or where no --data is given the built-in records of `kind` (training, held out), written once."""
    if data:
        return tuple(data), tuple(val_data)
    if kind == "pictures":
        folder = pictures_folder()
        return (str(folder / "train.jsonl"),), tuple(val_data) or (str(folder / "held_out.jsonl"),)
    paths = []
    for split, n in zip(("train", "held_out"), SIZES[kind], strict=True):
        paths.append(
            str(records_file(f"{kind}-{split}-{n}.jsonl", partial(getattr(models, kind), split, n)))
        )
    return (paths[0],), tuple(val_data) or (paths[1],)


def records_file(name: str, make: Callable[[], list[dict]]) -> Path:
    """The file of built-in records of that name, which `make` gives where it is not there yet."""
    path = builtin_cache() / name
    if not path.exists():
        with locked(path, waiting=lambda: None):
            if not path.exists():  # else another process was first: its file stays as it is
                models.write_jsonl(path, make())
    return path


def passages_file() -> Path:
    """The built-in passages, which built-in questions ask about."""
    return records_file("passages.jsonl", models.passages)
