"""Folders of models, and of built-in parts that are written into the cache as ordinary files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ta.builtin import models, pictures
from ta.files import cache_folder, content_hash, hash_json, publishing

TUNED, SMALL, READER, SEEING = (
    "builtin-sft",
    "builtin-small",
    "builtin-reader",
    "builtin-pictures",
)  # what --model-path calls them
PICTURES = (5000, 100)  # training, held out


def place() -> Path:
    """A cache folder of this version of the built-in parts."""
    return cache_folder("") / "builtin" / models.fingerprint()


def tiny_folder() -> Path:
    """The seeded tiny model with its tokenizer, as a folder that from_pretrained loads; written once."""
    return written("model", models.write_tiny)


def small_folder() -> Path:
    """A smaller one for the built-in passages, likewise."""
    return written("small", models.write_small)


def encoder_folder(path: str = "builtin") -> str:
    """The folder of a text encoder; "builtin" is a seeded tiny one, likewise."""
    return (
        str(written("encoder", models.write_encoder)) if path == "builtin" else model_folder(path)
    )


def written(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of built-in parts of that name, which `write` makes where it is not there yet."""
    folder = place() / name
    if not folder.exists():
        with suppress(FileExistsError), publishing(folder) as aside:  # or another was first
            write(aside)
    return folder


def tuned_folder(name: str = TUNED) -> Path:
    """Where a built-in model lies after fine-tuning (ta/builtin/fine_tuned.py): the tiny one on chats, or READER, the small one, on questions with passages."""
    return place() / ("tuned" if name == TUNED else name)


def seeing_folder() -> Path:
    """The seeded language model for the built-in pictures, likewise."""
    return written(
        f"model-pictures-{pictures.fingerprint()}",
        lambda folder: models.write_pictures_model(folder, pictures.texts()),
    )


def pictures_folder() -> Path:
    """Generated pictures with their records (ta/builtin/pictures.py), drawn once; the pictures lie in its folder images."""
    name = f"pictures-{PICTURES[0]}-{PICTURES[1]}-{pictures.fingerprint()}"
    return written(name, lambda folder: pictures.write_pictures(folder, *PICTURES))


def model_folder(path: str, hub: bool = False) -> str:
    """The folder (or, with `hub`, the name) to load; "builtin" is written to the cache once. ValueError where there is no such folder."""
    if path.startswith("builtin") and not Path(path).exists():
        made = {"builtin": tiny_folder, SMALL: small_folder, SEEING: seeing_folder}
        if path in made:
            return str(made[path]())
        if path in (TUNED, READER) and tuned_folder(path).exists():
            return str(tuned_folder(path))
    if not Path(path).is_dir() and not hub:
        raise ValueError(
            f"no model folder at {path}: give a folder with config.json and *.safetensors, or add --hub to look the name up on the hub"
        )
    if Path(path).is_dir() and not any(
        (Path(path) / name).exists() for name in ("config.json", "adapter_config.json")
    ):
        raise ValueError(
            f"{path} holds no config.json: give the folder of a saved model (a run's export is RUN/final)"
        )
    return path


def fingerprint(path: str, hub: bool = False) -> str:
    """Hash of a model folder's config and weights (each file is read once and remembered)."""
    folder = Path(model_folder(path, hub))
    if not folder.is_dir():
        return path
    notes = cache_folder("") / "hashes"
    files = sorted(
        p
        for p in folder.iterdir()
        if p.suffix == ".safetensors" or p.name in ("config.json", "adapter_config.json")
    )
    return hash_json([[p.name, content_hash(str(p), notes)] for p in files])[:16]
