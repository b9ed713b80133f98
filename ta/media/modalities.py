"""The modalities of a model: which encoder reads which files, and how they stand in the text.

Features come from the encoder or from a cache. Letters: I inputs, F features of one, E width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from ta.builtin.model_folders import pictures_folder
from ta.chat.tokenizer import Placeholder
from ta.command_line import Range
from ta.data.sources import parse_source
from ta.files import hash_json
from ta.media.features import Features, check_features, read_features, take

if TYPE_CHECKING:
    from torch import Tensor

    from ta.media.encoders import Encoder

MANIFEST = "media.json"
# a folder of its own: vLLM takes every safetensors file beside config.json for the language model's
PROJECTORS = "projectors"


@dataclass(frozen=True)
class MediaFiles:
    """Where pictures, sounds, encoders and caches lie."""

    image_root: str = ""
    """Folder below which all pictures and sounds lie; records name them relative to it. Default:
    the folder of the data."""
    image_encoder_path: str | None = None
    """Folder of the picture encoder's weights; builtin needs none."""
    audio_encoder_path: str | None = None
    """Folder of the sound encoder's weights."""
    image_features: str | None = None
    """Cache made by recipes/preprocess_images.py, read in place of running the picture encoder."""
    audio_features: str | None = None
    """The same for sounds."""


@dataclass(frozen=True)
class MediaConfig:
    files: MediaFiles = MediaFiles()
    image_encoder: str | None = None
    """builtin, clip, siglip or imagebind. Default: builtin on built-in data; with --data none
    unless given."""
    audio_encoder: str | None = None
    """whisper or imagebind. Default: none."""
    image_projector: Literal["mlp", "llava", "c_abstractor", "c_abs"] = "mlp"
    """What turns features into embeddings: mlp keeps their number, c_abstractor can reduce it."""
    audio_projector: Literal["mlp", "llava", "c_abstractor", "c_abs"] = "mlp"
    """The same for sounds."""
    image_embeddings: Annotated[int | None, Range(1)] = None
    """Embeddings that stand for one picture. Default: as many as the encoder gives features."""
    audio_embeddings: Annotated[int | None, Range(1)] = None
    """Embeddings that stand for one sound."""
    image_projector_path: str | None = None
    """Safetensors file of weights that the picture projector starts from; a run's is
    RUN/final/projectors/image.safetensors."""
    audio_projector_path: str | None = None
    """The same for sounds."""
    projector_width: Annotated[int, Range(1)] = 1024
    """Channels of a c_abstractor."""
    projector_depth: Annotated[int, Range(1)] = 3
    """Blocks in each of its two stages."""
    projector_lr: Annotated[float | None, Range(0, above=True)] = None
    """Peak learning rate of the projectors. Default: 1e-3, or --lr where the projector or the
    built-in model is given."""
    freeze_language_model: bool = False
    """Train the projectors alone."""
    media_tokens: tuple[str, str] = ("<MS>", "</MS>")
    """Tokens before and after the placeholders of one picture or sound."""
    image_token: str = "<img>"
    """Placeholder of a picture's embeddings."""
    audio_token: str = "<audio>"
    """Placeholder of a sound's embeddings."""


class Modality(NamedTuple):
    """One kind of media: its encoder or cache, and where its files lie."""

    settings: dict[str, Any]  # what an export keeps: encoder, fingerprint, sizes, projector, tokens
    root: str  # folder below which the files lie
    read: Callable[[Path], Any]  # one file to one input of the encoder
    encode: Callable[[Tensor], Tensor] | None  # None where a cache takes its place
    cache: Features | None
    projector_path: str | None = None  # weights that the projector starts from


class Modalities(dict[str, Modality]):
    """The modalities of a model by name: "image", "audio" or both."""

    @property
    def placeholders(self) -> dict[str, Placeholder]:
        """The tokens that stand in the text for one picture or sound of each modality."""
        return {
            name: Placeholder(
                *(modality.settings[key] for key in ("start", "token", "end", "embeddings")),
                _file_check(modality),
                _files_key(modality),
            )
            for name, modality in self.items()
        }

    def save(self, folder: Path) -> None:
        """Write media.json, from which `reopen_media` opens the modalities again, into `folder`."""
        settings = {name: modality.settings for name, modality in self.items()}
        text = json.dumps({"format": 1, "modalities": settings}, indent=1)
        (folder / MANIFEST).write_text(text + "\n")


def media_root(image_root: str, sources: Sequence[str]) -> str:
    """The folder below which media lie: `image_root`, else the folder of the sources of records.

    Without sources it is that of the built-in pictures. ValueError where it does not exist or the
    sources lie in several folders.
    """
    if image_root:
        if not Path(image_root).is_dir():
            raise ValueError(
                f"--image-root {image_root}: no such folder; give the folder below which the "
                "pictures and sounds lie"
            )
        return image_root
    if not sources:
        return str(pictures_folder() / "images")
    folders = sorted({str(Path(parse_source(source).path).parent) for source in sources})
    if len(folders) > 1:
        raise ValueError(
            f"the sources lie in {len(folders)} folders ({', '.join(folders[:3])}): give the one "
            "below which media lie in --image-root"
        )
    return folders[0]


def open_media(
    config: MediaConfig, sources: Sequence[str], device: str, half: bool = False
) -> Modalities:
    """Load the encoders that `config` names, in bfloat16 with `half`, or open their caches.

    ValueError where none is named, where a cache is another encoder's, and where there is no folder
    of media.
    """
    from ta.media.encoders import load_with_fingerprint

    root = media_root(config.files.image_root, sources)
    encoders = {
        "image": config.image_encoder or (None if sources or config.audio_encoder else "builtin"),
        "audio": config.audio_encoder,
    }
    chosen = {name: encoder for name, encoder in encoders.items() if encoder not in (None, "none")}
    if not chosen:
        raise ValueError(
            "no encoder: give --image-encoder clip --image-encoder-path FOLDER (or siglip, "
            "imagebind), or --audio-encoder"
        )
    media = Modalities()
    for name, encoder_name in chosen.items():
        path = getattr(config.files, f"{name}_encoder_path")
        encoder, fingerprint = load_with_fingerprint(encoder_name, path, device, half)
        if encoder.modality != name:
            raise ValueError(
                f"--{name}-encoder {encoder_name} reads {encoder.modality}: "
                f"give an encoder of {name}"
            )
        embeddings = getattr(config, f"{name}_embeddings")
        settings = {
            "encoder": encoder_name,
            "path": str(Path(path).resolve()) if path else None,
            "fingerprint": fingerprint,
            "emb_dim": encoder.emb_dim,
            "features": encoder.n_modality_embs,
            "grid": list(encoder.grid) if encoder.grid else None,
            "projector": getattr(config, f"{name}_projector"),
            "projector_width": config.projector_width,
            "projector_depth": config.projector_depth,
            "embeddings": encoder.n_modality_embs if embeddings is None else embeddings,
            "start": config.media_tokens[0],
            "token": getattr(config, f"{name}_token"),
            "end": config.media_tokens[1],
        }
        cache_path = getattr(config.files, f"{name}_features")
        weights = getattr(config, f"{name}_projector_path")
        media[name] = _modality(settings, root, encoder, cache_path, weights)
    return media


def reopen_media(
    folder: str | Path, files: MediaFiles, sources: Sequence[str], device: str, half: bool = False
) -> Modalities | None:
    """The modalities of an exported model; None where it has none.

    ValueError where an encoder is not the one that the model was trained with.
    """
    from ta.media.encoders import load_with_fingerprint

    manifest = Path(folder) / MANIFEST
    if not manifest.exists():
        return None
    root, media = media_root(files.image_root, sources), Modalities()
    for name, settings in json.loads(manifest.read_text())["modalities"].items():
        path = getattr(files, f"{name}_encoder_path") or settings["path"]
        encoder, fingerprint = load_with_fingerprint(settings["encoder"], path, device, half)
        if fingerprint != settings["fingerprint"]:
            raise ValueError(
                f"{folder} was trained with another {settings['encoder']} encoder than {path} "
                f"holds ({settings['fingerprint'][:12]}, this one is {fingerprint[:12]}); "
                f"give its folder in --{name}-encoder-path"
            )
        weights = str(Path(folder) / PROJECTORS / f"{name}.safetensors")
        cache_path = getattr(files, f"{name}_features")
        media[name] = _modality(settings, root, encoder, cache_path, weights)
    return media


def _modality(
    settings: dict[str, Any],
    root: str,
    encoder: Encoder,
    cache_path: str | None,
    projector_path: str | None,
) -> Modality:
    features = read_features(cache_path, settings["fingerprint"]) if cache_path else None
    encode = None if features else encoder.encode
    return Modality(settings, root, encoder.read, encode, features, projector_path)


def _file_check(modality: Modality) -> Callable[[str], None]:
    """check(path): ValueError for a file that cannot be used; each is tried once.

    It must lie below the root and be readable, or be in the cache with its present content.
    """
    from ta.media.images import media_key, media_path

    @cache
    def reason(path: str) -> str:
        """Why the file cannot be used, or nothing."""
        try:
            file = media_path(modality.root, path)
            if modality.cache is not None:
                check_features(modality.cache, {media_key(path): file})
            else:
                modality.read(file)
        except ValueError as error:
            return str(error)
        return ""

    def check(path: str) -> None:
        if reason(path):
            raise ValueError(reason(path))

    return check


def _files_key(modality: Modality) -> str:
    """Changes when other files are read: another root, or a cache of other content."""
    hashes = modality.cache.hashes if modality.cache else None
    return hash_json([str(Path(modality.root).resolve()), hashes])


def inputs_of(modality: Modality, path: str) -> Tensor:
    """The encoder's input for one file, or its features (F, E) where they are cached."""
    import torch

    from ta.media.images import media_key, media_path

    if modality.cache is not None:
        return take(modality.cache, [media_key(path)])[0]
    return torch.from_numpy(modality.read(media_path(modality.root, path)))


def encoded(modality: Modality, inputs: Tensor | None) -> Tensor:
    """(I, F, E) features of what `inputs_of` gave for several files; of none at all, (0, F, E)."""
    import torch

    if inputs is None:
        return torch.empty(0, modality.settings["features"], modality.settings["emb_dim"])
    return inputs if modality.encode is None else modality.encode(inputs)
