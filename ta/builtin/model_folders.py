"""The built-in models and pictures as folders in the cache, each written once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ta.builtin import models, pictures
from ta.files import cache_folder, publishing

# what --model-path calls them
TUNED = "builtin-sft"
WORDY = "builtin-wordy"
SMALL = "builtin-small"
READER = "builtin-reader"
PICTURES_MODEL = "builtin-pictures"
PICTURES = (5000, 100)  # training, held out


def builtin_cache() -> Path:
    """A cache folder of this version of the built-in parts."""
    return cache_folder("") / "builtin" / models.models_version()


def builtin_model(path: str) -> Path | None:
    """The folder of the built-in model that --model-path calls `path`; None where there is none.

    A fine-tuned one is there once ta/builtin/fine_tuned.py has made it.
    """
    match path:
        case "builtin":
            return tiny_folder()
        case "builtin-small":
            return written("small", models.write_small)
        case "builtin-pictures":
            return written(
                f"model-pictures-{pictures.pictures_version()}",
                lambda folder: models.write_pictures_model(folder, pictures.texts()),
            )
    tuned = path in (TUNED, WORDY, READER) and tuned_folder(path).exists()
    return tuned_folder(path) if tuned else None


def tiny_folder() -> Path:
    """The seeded tiny model with its tokenizer, as a folder that from_pretrained loads."""
    return written("model", models.write_tiny)


def builtin_encoder() -> Path:
    """A seeded tiny text encoder."""
    return written("encoder", models.write_encoder)


def tuned_folder(name: str = TUNED) -> Path:
    """Where a built-in model lies after fine-tuning (ta/builtin/fine_tuned.py).

    TUNED is the tiny one after chats, WORDY that one after wordy chats, READER the small one after
    questions with passages.
    """
    return builtin_cache() / ("tuned" if name == TUNED else name)


def pictures_folder() -> Path:
    """Generated pictures with their records; the pictures lie in its folder images."""
    name = f"pictures-{PICTURES[0]}-{PICTURES[1]}-{pictures.pictures_version()}"
    return written(name, lambda folder: pictures.write_pictures(folder, *PICTURES))


def written(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of built-in parts of that name, which `write` makes where it is not there yet."""
    folder = builtin_cache() / name
    if not folder.exists():
        with suppress(FileExistsError), publishing(folder) as aside:  # or another was first
            write(aside)
    return folder
