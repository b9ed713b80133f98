"""Pictures from disk to arrays: paths below a root, decoding with limits, and preprocessing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ta.data.jsonl import naming, regular_file
from ta.folders import loading, read_json, value_of

if TYPE_CHECKING:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

MAX_PIXELS = 64_000_000
# Formats whose decoders read pixels only: no scripts (EPS), nested files (ICNS), vectors or video
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


class Preprocessing(NamedTuple):
    """How an encoder's pictures are made: resize, crop in the middle, scale, normalise."""

    # the shorter edge in pixels, or (height, width); None leaves the size alone
    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None  # (height, width)
    mean: tuple[float, ...] | None  # per channel, after scaling; None does not normalise
    std: tuple[float, ...] | None
    resample: int = 3  # pillow's number of the filter: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic
    scale: float | None = 1 / 255


def media_key(relative: str) -> str:
    """The key of a relative media path in a cache: "./a//b.png" is "a/b.png"."""
    return PurePosixPath(relative).as_posix()


def media_path(root: str | Path, relative: str) -> Path:
    """The file that `relative` names below `root`, symlinks followed.

    ValueError for a path that leaves the root, and where there is no regular file.
    """
    if not isinstance(relative, str) or not relative or "\0" in relative:
        raise ValueError(
            f"media path {relative!r}: not a path; give the file's path relative to the media root"
        )
    if "://" in relative or relative.startswith("data:"):
        raise ValueError(
            f"media path {relative[:80]!r}: nothing is fetched from a URL; save the file below the "
            "media root and give its path"
        )
    named = PurePosixPath(relative)
    if named.is_absolute():
        raise ValueError(
            f"media path {relative!r} is absolute; give it relative to the media root {root}"
        )
    if ".." in named.parts:
        raise ValueError(
            f"media path {relative!r} has '..' in it; give a path that stays below the media root "
            f"{root}"
        )
    base = Path(root).resolve()
    try:
        path = (base / relative).resolve()
    # RuntimeError: Python before 3.13 says so of a loop of links
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"media path {relative[:80]!r} cannot be followed ({str(error)[:40]}); give the path "
            "of a file"
        ) from None
    if not path.is_relative_to(base):
        raise ValueError(
            f"media path {relative!r} leads through a symlink to {path}, outside the media root "
            f"{root}"
        )
    check_file(path)
    return path


def find_media(
    root: str | Path, modality: str, skip_bad: bool = False
) -> tuple[dict[str, Path], list[tuple[str, str]]]:
    """The files of a modality below `root` in order, hidden ones left out: {key: path}.

    Beside them (key, why) of those left out. ValueError for a file that cannot be used, such as a
    link that leaves the root; with `skip_bad` it is left out.
    """
    if not Path(root).is_dir():
        raise ValueError(f"{root} is not a folder; give the folder that holds the files")
    paths, skipped = {}, []
    for path in sorted(Path(root).rglob("*"), key=str):
        key = path.relative_to(root).as_posix()
        known = path.suffix.lower() in (ENDINGS if modality == "image" else (".wav",))
        if not known or path.is_dir() or "/." in f"/{key}":
            continue
        try:
            paths[key] = media_path(root, key)
        except ValueError as error:
            if not skip_bad:
                raise
            skipped.append((key, str(error)))
    return paths, skipped


def check_file(path: str | Path) -> None:
    """ValueError unless `path` is a regular file with something in it."""
    if not regular_file(path, "check the media root and the path in the record").st_size:
        raise ValueError(f"{path} is empty (0 bytes); remove it or write it again")


def read_image(path: str | Path) -> np.ndarray:
    """Decode a picture, or the first frame of an animation, to (H, W, 3) uint8 RGB.

    It is turned upright by its EXIF orientation.

    Transparent pixels are put over white, 16-bit grey is scaled to 8 bits. Width x height is read
    from the header and checked against MAX_PIXELS before anything is decoded. ValueError names
    the path of what is missing, empty, huge, broken or no picture.
    """
    check_file(path)
    with open(path, "rb") as file, warnings.catch_warnings():
        # Pillow warns of big pictures and wrong metadata; here a limit is an error
        warnings.simplefilter("ignore")
        with loading(path, f"a picture ({', '.join(FORMATS)} are read)"):
            image = Image.open(file, formats=FORMATS)
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise ValueError(
                f"{path}: {image.width} x {image.height} is {pixels} pixels, the limit is "
                f"{MAX_PIXELS}; scale it down first"
            )
        with loading(path, "a whole picture (it is broken or cut short: write it again)"):
            image.load()
            upright = ImageOps.exif_transpose(image)
        with naming(str(path)):
            return np.asarray(_to_rgb(upright, image.format))


def _to_rgb(image: Image.Image, kind: str | None) -> Image.Image:
    # Pillow reads 16-bit grey of these kinds into 32 bits
    if image.mode == "F" or (image.mode == "I" and kind not in ("PNG", "PPM")):
        numbers = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(
            f"its pixels are {numbers} without a known range; save it with 8 or 16 bits"
        )
    # 16-bit grey: plain convert("RGB") would make everything above 255 white
    if image.mode.startswith("I"):
        values, clear = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def preprocess(image: np.ndarray, how: Preprocessing) -> np.ndarray:
    """(H, W, 3) uint8 to (3, height, width) float32, by transformers' image processor of CLIP.

    SigLIP's differs in its settings alone. ValueError for a long strip whose short edge would have
    to grow so far that it has more than MAX_PIXELS.
    """
    if isinstance(how.size, int):
        height, width = image.shape[:2]
        longer = int(how.size * max(height, width) / min(height, width))
        if how.size * longer > MAX_PIXELS:
            new_width, new_height = (how.size, longer) if width <= height else (longer, how.size)
            raise ValueError(
                f"{width} x {height} pixels would grow to {new_width} x {new_height}; "
                "cut the picture to a milder shape"
            )
    pixels = _processor(how)(image, input_data_format="channels_last", return_tensors="np")
    return np.ascontiguousarray(pixels["pixel_values"][0], np.float32)


@cache
def _processor(how: Preprocessing) -> CLIPImageProcessorPil:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    def sides(size: int | tuple[int, int] | None) -> dict[str, int] | None:
        if isinstance(size, int):
            return {"shortest_edge": size}
        return size and {"height": size[0], "width": size[1]}

    return CLIPImageProcessorPil(
        do_convert_rgb=False,
        do_resize=how.size is not None,
        do_center_crop=how.crop is not None,
        do_rescale=how.scale is not None,
        do_normalize=how.mean is not None,
        resample=how.resample,
        size=sides(how.size),
        crop_size=sides(how.crop),
        rescale_factor=how.scale,
        image_mean=how.mean,
        image_std=how.std,
    )


def read_pixels(path: str | Path, how: Preprocessing) -> np.ndarray:
    """Read and preprocess one picture: (3, height, width) float32; ValueError names the path."""
    image = read_image(path)
    with naming(str(path)):
        return preprocess(image, how)


CLIP = Preprocessing(
    224, (224, 224), (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
SIGLIP = Preprocessing((224, 224), None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def processor_settings(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of a folder that transformers reads its image processor from, and the settings.

    ValueError where there is none.
    """
    path = Path(folder) / "processor_config.json"
    if given := value_of(path, "image_processor", dict):
        return path, given
    path = path.with_name("preprocessor_config.json")
    if not path.is_file():
        raise ValueError(
            f"{folder}: no preprocessor_config.json; "
            "save the model's image processor into its folder"
        )
    return path, read_json(path)


def read_preprocessing(folder: str | Path, default: Preprocessing) -> Preprocessing:
    """The settings of a folder's image processor.

    A key left out has the `default`'s value. ValueError for another processor than CLIP's and
    SigLIP's, and for sizes that are not understood.
    """
    path, given = processor_settings(folder)
    kinds = given.get("image_processor_type"), given.get("feature_extractor_type")
    kind = str(kinds[0] or kinds[1] or "CLIP")
    other = [f"{key}: true" for key in ("do_pad", "use_square_size") if given.get(key)]
    if other or not kind.startswith(("CLIP", "SiglipImage")):
        raise ValueError(
            f"{path}: {', '.join([kind, *other])} is not known here; CLIP's and SigLIP's image "
            "processors are"
        )
    mean, std = given.get("image_mean", default.mean), given.get("image_std", default.std)
    normalises = given.get("do_normalize", True)
    crops = given.get("do_center_crop", default.crop is not None)
    rescales, factor = given.get("do_rescale", True), given.get("rescale_factor", 1 / 255)
    with loading(path, "the settings of an image processor"):
        return Preprocessing(
            size=_edge(given.get("size", default.size)) if given.get("do_resize", True) else None,
            crop=_edge(given.get("crop_size", default.crop), square=True) if crops else None,
            mean=_channels(mean) if normalises else None,
            std=_channels(std) if normalises else None,
            resample=int(given.get("resample", default.resample)),
            scale=float(factor) if rescales else None,
        )


def _channels(values: float | Sequence[float]) -> tuple[float, ...]:
    red, green, blue = (values,) * 3 if isinstance(values, int | float) else values
    return float(red), float(green), float(blue)


def _edge(size: Any, square: bool = False) -> int | tuple[int, int]:
    """The shorter edge, or (height, width), which a bare number is where it means a `square`."""
    from transformers.image_processing_utils import get_size_dict

    sizes = get_size_dict(size, default_to_square=square)
    if sizes.keys() == {"shortest_edge"}:
        return sizes["shortest_edge"]
    if sizes.keys() != {"height", "width"}:
        raise ValueError(f"size {size}: give shortest_edge, or height and width")
    return sizes["height"], sizes["width"]
