"""The built-in models and pictures as folders in the cache, each written once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ta.builtin import models, pictures
from ta.files import cache_folder, locked, publishing

# names for --model-path
TUNED = "builtin-sft"
WORDY = "builtin-wordy"
BEGUN = "builtin-begun"
SMALL = "builtin-small"
READER = "builtin-reader"
# numbers of training and held-out pictures
PICTURES = (5000, 100)


def builtin_cache() -> Path:
    """The cache folder of this version of the built-in parts."""
    return cache_folder("") / "builtin" / models.models_version()


def builtin_model(path: str) -> Path | None:
    """The folder of the built-in model that --model-path names `path`; None for another name.

    A fine-tuned model exists once ta/builtin/fine_tuned.py has made it.
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
    folder = tuned_folder(path)
    return folder if path in (TUNED, WORDY, BEGUN, READER) and folder.exists() else None


def tiny_folder() -> Path:
    """The seeded tiny model with its tokenizer, as a folder that from_pretrained loads."""
    return written("model", models.write_tiny)


def builtin_encoder() -> Path:
    """The folder of a seeded tiny text encoder."""
    return written("encoder", models.write_encoder)


def tuned_folder(name: str = TUNED) -> Path:
    """The folder of a built-in model after fine-tuning (ta/builtin/fine_tuned.py).

    TUNED is the tiny model after chats, BEGUN after fewer of them, WORDY is TUNED after wordy
    chats, READER is the small model after questions with passages.
    """
    return builtin_cache() / ("tuned" if name == TUNED else name)


def pictures_folder() -> Path:
    """The folder of the generated pictures (in its folder images) and their records."""
    name = f"pictures-{PICTURES[0]}-{PICTURES[1]}-{pictures.pictures_version()}"
    return written(name, lambda folder: pictures.write_pictures(folder, *PICTURES))


def written(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of built-in parts of that name; `write` makes it where it does not exist."""
    folder = builtin_cache() / name
    if not folder.exists():
        # FileExistsError: another process published it first
        with (
            locked(folder, waiting=lambda: None),
            suppress(FileExistsError),
            publishing(folder) as temporary,
        ):
            write(temporary)
    return folder
