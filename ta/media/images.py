"""Pictures between disk and array: paths that stay below a root, decoding with limits, the published preprocessing, and drawing."""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000
# Formats whose decoders read pixels and nothing else: no scripts (EPS), no nested files (ICNS), no vector or video containers.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


class Preprocessing(NamedTuple):
    """How an encoder wants its pictures; the order is resize, crop in the middle, scale, normalise."""

    size: (
        int | tuple[int, int] | None
    )  # the shorter edge in pixels, or (height, width); None leaves the size alone
    crop: tuple[int, int] | None  # (height, width)
    mean: tuple[float, ...] | None  # per channel, after scaling; None does not normalise
    std: tuple[float, ...] | None
    resample: int = 3  # pillow's number of the filter: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic
    scale: float | None = 1 / 255


def media_key(relative: str) -> str:
    """The one spelling of a relative media path, by which caches know it: "./a//b.png" is "a/b.png"."""
    return PurePosixPath(relative).as_posix()


def media_path(root: str | Path, relative: str) -> Path:
    """The existing regular file that `relative` names below `root`, symlinks followed; whatever leaves the root is a ValueError."""
    if not isinstance(relative, str) or not relative or "\0" in relative:
        raise ValueError(
            f"media path {relative!r}: not a path; give the file's path relative to the media root"
        )
    if "://" in relative or relative.startswith("data:"):
        raise ValueError(
            f"media path {relative[:80]!r}: nothing is fetched from a URL; save the file below the media root and give its path"
        )
    if PurePosixPath(relative).is_absolute():
        raise ValueError(
            f"media path {relative!r} is absolute; give it relative to the media root {root}"
        )
    if ".." in PurePosixPath(relative).parts:
        raise ValueError(
            f"media path {relative!r} has '..' in it; give a path that stays below the media root {root}"
        )
    base = Path(root).resolve()
    path = (base / relative).resolve()
    if not path.is_relative_to(base):
        raise ValueError(
            f"media path {relative!r} leads through a symlink to {path}, outside the media root {root}"
        )
    check_file(path)
    return path


def find_files(root: str | Path, endings: Sequence[str] = ENDINGS) -> list[str]:
    """The keys of all picture files below `root`, known by their `endings`, in order; hidden files and folders are left out."""
    if not Path(root).is_dir():
        raise ValueError(f"{root} is not a folder; give the folder that holds the files")
    names = (
        path.relative_to(root)
        for path in Path(root).rglob("*")
        if path.suffix.lower() in endings and not path.is_dir()
    )
    return sorted(
        name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)
    )


def check_file(path: str | Path) -> None:
    """ValueError unless `path` is a regular file with something in it; never opens it, so that a FIFO cannot block."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path}: no such file; check the media root and the path in the record"
        ) from None
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{path} is a folder; give a file")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file (a FIFO, socket or device); give a file")
    if found.st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); remove it or write it again")


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a picture to (H, W, 3) uint8 RGB, upright by its EXIF orientation; the first frame of an animation.

    Transparent pixels are laid over white, 16-bit grey is scaled to 8 bits. Width x height is read from the header and checked against
    `max_pixels` before anything is decoded. ValueError names the path of what is missing, empty, huge, broken or no picture.
    """
    check_file(path)
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow warns of big pictures and odd metadata; the limit below is an error, not a warning
        try:
            image = Image.open(file, formats=FORMATS)
            pixels = image.width * image.height
        except Image.DecompressionBombError as error:
            raise ValueError(f"{path}: the picture is too large to decode: {error}") from error
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error and more for a file they cannot read
            raise ValueError(
                f"{path}: not a picture that can be read ({error}); give one of {', '.join(FORMATS)}"
            ) from error
        if pixels > max_pixels:
            raise ValueError(
                f"{path}: {image.width} x {image.height} is {pixels} pixels, the limit is {max_pixels}; scale it down first"
            )
        try:
            image.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
        except Exception as error:
            raise ValueError(
                f"{path}: the picture is broken or cut short ({error}); write it again or remove it"
            ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers without a known range; save it with 8 or 16 bits"
        )
    if image.mode.startswith(
        "I"
    ):  # 16-bit grey; plain convert("RGB") would clip everything above 255 to white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits; save it with 8 or 16 bits")
        image = Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def preprocess(image: np.ndarray, how: Preprocessing) -> np.ndarray:
    """(H, W, 3) uint8 to (3, height, width) float32, bit for bit what transformers' CLIP and SigLIP image processors (pillow) give."""
    if how.size is not None:
        height, width = _resized(image.shape[0], image.shape[1], how.size)
        if height * width > MAX_PIXELS:  # a 1 x 60000 strip, grown until its short edge fits
            raise ValueError(
                f"{image.shape[1]} x {image.shape[0]} pixels would grow to {width} x {height}; cut the picture to a milder shape"
            )
        image = np.asarray(Image.fromarray(image).resize((width, height), resample=how.resample))
    pixels = image.transpose(2, 0, 1)  # (3, H, W)
    if how.crop is not None:
        pixels = _crop_middle(pixels, *how.crop)
    if how.scale is not None:
        pixels = (pixels.astype(np.float64) * how.scale).astype(np.float32)
    pixels = pixels.astype(np.float32)
    if how.mean is not None:
        mean, std = (
            np.array(values, dtype=np.float32)[:, None, None] for values in (how.mean, how.std)
        )
        pixels = (pixels - mean) / std
    return np.ascontiguousarray(pixels)


def read_pixels(path: str | Path, how: Preprocessing, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read and preprocess one picture: (3, height, width) float32; ValueError names the path."""
    image = read_image(path, max_pixels)
    try:
        return preprocess(image, how)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _resized(height: int, width: int, size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, tuple):
        return size
    short, long = min(height, width), max(height, width)
    grown = int(size * long / short)
    return (grown, size) if width <= height else (size, grown)


def _crop_middle(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut (C, H, W) to (C, height, width) in the middle, with zeros where it is too small, rounding as transformers does."""
    before = [
        max(0, -((have - want) // 2))
        for have, want in zip(pixels.shape[1:], (height, width), strict=True)
    ]
    after = [
        max(0, want - have - lead)
        for have, want, lead in zip(pixels.shape[1:], (height, width), before, strict=True)
    ]
    pixels = np.pad(pixels, ((0, 0), (before[0], after[0]), (before[1], after[1])))
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]


CLIP = Preprocessing(
    224, (224, 224), (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
SIGLIP = Preprocessing((224, 224), None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def read_preprocessing(folder: str | Path, default: Preprocessing) -> Preprocessing:
    """The settings in a model folder's preprocessor_config.json (or processor_config.json); a key left out takes the `default`'s value."""
    path = Path(folder) / "preprocessor_config.json"
    if path.is_file():
        given = json.loads(path.read_text())
    elif (path := Path(folder) / "processor_config.json").is_file():
        given = json.loads(path.read_text()).get("image_processor", {})
    else:
        raise ValueError(
            f"{folder}: no preprocessor_config.json; save the model's image processor into its folder"
        )
    kind = str(
        given.get("image_processor_type", given.get("feature_extractor_type", "CLIPImageProcessor"))
    )
    if not kind.startswith(("CLIP", "SiglipImage")) or given.get("do_pad"):
        raise ValueError(
            f"{path}: {kind} (do_pad={given.get('do_pad')}) is not known here; CLIP's and SigLIP's image processors are"
        )
    mean, std = given.get("image_mean", default.mean), given.get("image_std", default.std)
    normalises = given.get("do_normalize", True) and mean is not None
    crops = given.get("do_center_crop", default.crop is not None)
    return Preprocessing(
        size=_edge(given.get("size", default.size), path) if given.get("do_resize", True) else None,
        crop=_pair(given.get("crop_size", default.crop), path) if crops else None,
        mean=_channels(mean) if normalises else None,
        std=_channels(std) if normalises else None,
        resample=int(given.get("resample", default.resample)),
        scale=float(given.get("rescale_factor", 1 / 255))
        if given.get("do_rescale", True)
        else None,
    )


def _channels(values: float | Sequence[float]) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(values)


def _edge(size: object, path: Path) -> int | tuple[int, int]:
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    return size if isinstance(size, int) else _pair(size, path)


def _pair(size: object, path: Path) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    if isinstance(size, Sequence) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise ValueError(
        f"{path}: size {size!r} is not understood; give a number, shortest_edge, or height and width"
    )
