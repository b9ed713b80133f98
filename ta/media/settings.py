"""The modalities of a model: which encoder reads which files, how many embeddings stand for one, and where the features of a cache come in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ta.builtin.model_folders import pictures_folder
from ta.chat.tokenizer import Placeholder
from ta.data.sources import parse_source
from ta.files import hash_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ta.media.encoders import Encoder
    from ta.media.features import Features

MANIFEST = "media.json"
PROJECTORS = "projectors"  # a folder of its own: vLLM takes every safetensors file beside config.json for the language model's


@dataclass(frozen=True)
class MediaFiles:
    """Where pictures, sounds, encoders and caches lie."""

    image_root: str = ""
    """Folder below which all pictures and sounds lie; records name them relative to it. Default: the folder of the data."""
    image_encoder_path: str | None = None
    """Folder of the picture encoder's weights; builtin needs none."""
    audio_encoder_path: str | None = None
    """Folder of the sound encoder's weights."""
    image_features: str | None = None
    """Cache made by recipes/preprocess_images.py, read in place of running the picture encoder."""
    audio_features: str | None = None
    """The same for sounds."""


@dataclass(frozen=True)
class MediaConfig(MediaFiles):
    image_encoder: str | None = None
    """builtin, clip, siglip or imagebind. Default: builtin on built-in data; with --data none unless given."""
    audio_encoder: str | None = None
    """whisper or imagebind. Default: none."""
    image_projector: Literal["mlp", "llava", "c_abstractor", "c_abs"] = "mlp"
    """What turns features into embeddings: mlp keeps their number, c_abstractor can reduce it."""
    audio_projector: Literal["mlp", "llava", "c_abstractor", "c_abs"] = "mlp"
    """The same for sounds."""
    image_embeddings: int | None = None
    """Embeddings that stand for one picture. Default: as many as the encoder gives features."""
    audio_embeddings: int | None = None
    """Embeddings that stand for one sound."""
    image_projector_path: str | None = None
    """Safetensors file of weights that the picture projector starts from; a run's is RUN/final/projectors/image.safetensors."""
    audio_projector_path: str | None = None
    """The same for sounds."""
    projector_width: int = 1024
    """Channels of a c_abstractor."""
    projector_depth: int = 3
    """Blocks in each of its two stages."""
    projector_lr: float | None = None
    """Peak learning rate of the projectors. Default: 1e-3, or --lr where the projector or the built-in model is given."""
    freeze_language_model: bool = False
    """Train the projectors alone."""
    media_tokens: tuple[str, str] = ("<MS>", "</MS>")
    """Tokens before and after the placeholders of one picture or sound."""
    image_token: str = "<img>"
    """Placeholder of a picture's embeddings."""
    audio_token: str = "<audio>"
    """Placeholder of a sound's embeddings."""


class Modality(NamedTuple):
    """One kind of media, opened."""

    settings: dict[
        str, Any
    ]  # what an export tells of it: encoder, path, fingerprint, sizes, projector, tokens
    root: str
    read: Callable[[Path], Any]  # one file to one input of the encoder
    encode: Callable[[Tensor], Tensor] | None  # None where a cache takes its place
    cache: Features | None
    projector_path: str | None = None


class Opened(NamedTuple):
    """All modalities of a model."""

    modalities: dict[str, Modality]

    @property
    def placeholders(self) -> dict[str, Placeholder]:
        """How each stands in the text."""
        return {
            name: Placeholder(
                *(m.settings[key] for key in ("start", "token", "end", "embeddings")),
                _checker(m),
                _mark(m),
            )
            for name, m in self.modalities.items()
        }

    def write(self, folder: Path) -> None:
        """Write what inference needs to know into `folder`."""
        text = json.dumps(
            {"format": 1, "modalities": {name: m.settings for name, m in self.modalities.items()}},
            indent=1,
        )
        (folder / MANIFEST).write_text(text + "\n")


def root_of(image_root: str, sources: Sequence[str]) -> str:
    """The folder below which media lie: the one given, else that of the sources, or of the built-in pictures where there are none."""
    if image_root:
        if not Path(image_root).is_dir():
            raise ValueError(
                f"--image-root {image_root}: no such folder; give the folder below which the pictures and sounds lie"
            )
        return image_root
    if not sources:
        return str(pictures_folder() / "images")
    folders = sorted({str(Path(parse_source(source).path).parent) for source in sources})
    if len(folders) > 1:
        raise ValueError(
            f"the sources lie in {len(folders)} folders ({', '.join(folders[:3])}): give the one below which media lie in --image-root"
        )
    return folders[0]


def open_media(
    config: MediaConfig, sources: Sequence[str], device: str, half: bool = False
) -> Opened:
    """Load the encoders that `config` names, or open their caches. ValueError: none named, a cache of another encoder, no folder of media."""
    root = root_of(config.image_root, sources)
    names = {
        "image": config.image_encoder or (None if sources or config.audio_encoder else "builtin"),
        "audio": config.audio_encoder,
    }
    chosen = {name: encoder for name, encoder in names.items() if encoder not in (None, "none")}
    if not chosen:
        raise ValueError(
            "no encoder: give --image-encoder clip --image-encoder-path FOLDER (or siglip, imagebind), or --audio-encoder"
        )
    found = {}
    for name, encoder_name in chosen.items():
        own = lambda key, name=name: getattr(config, f"{name}_{key}")
        encoder, mark = load_marked(encoder_name, own("encoder_path"), device, half)
        if encoder.modality != name:
            raise ValueError(
                f"--{name}-encoder {encoder_name} reads {encoder.modality}: give an encoder of {name}"
            )
        settings = {
            "encoder": encoder_name,
            "path": str(Path(own("encoder_path")).resolve()) if own("encoder_path") else None,
            "fingerprint": mark,
            "emb_dim": encoder.emb_dim,
            "features": encoder.n_modality_embs,
            "grid": list(encoder.grid) if encoder.grid else None,
            "projector": own("projector"),
            "projector_width": config.projector_width,
            "projector_depth": config.projector_depth,
            "embeddings": encoder.n_modality_embs
            if own("embeddings") is None
            else own("embeddings"),
            "start": config.media_tokens[0],
            "token": own("token"),
            "end": config.media_tokens[1],
        }
        found[name] = _modality(settings, root, encoder, own("features"), own("projector_path"))
    return Opened(found)


def reopen_media(
    folder: str | Path, files: MediaFiles, sources: Sequence[str], device: str, half: bool = False
) -> Opened | None:
    """The modalities of an export, None of one that has none. ValueError where an encoder is not the one that the model was trained with."""
    if not (Path(folder) / MANIFEST).exists():
        return None
    root, found = root_of(files.image_root, sources), {}
    for name, settings in json.loads((Path(folder) / MANIFEST).read_text())["modalities"].items():
        path = getattr(files, f"{name}_encoder_path") or settings["path"]
        encoder, mark = load_marked(settings["encoder"], path, device, half)
        if mark != settings["fingerprint"]:
            raise ValueError(
                f"{folder} was trained with another {settings['encoder']} encoder than {path} holds "
                f"({settings['fingerprint'][:12]}, this one is {mark[:12]}); give its folder in --{name}-encoder-path"
            )
        weights = str(Path(folder) / PROJECTORS / f"{name}.safetensors")
        found[name] = _modality(
            settings, root, encoder, getattr(files, f"{name}_features"), weights
        )
    return Opened(found)


def load_marked(
    name: str, path: str | None, device: str, half: bool = False
) -> tuple[Encoder, str]:
    """An encoder on `device`, in bfloat16 with `half`, and the fingerprint of its settings and weights as they lie on the disk."""
    import torch

    from ta.media.encoders import fingerprint, load_encoder

    encoder = load_encoder(name, path, "cpu")
    mark = fingerprint(encoder)
    encoder.module.to(device, torch.bfloat16 if half else torch.float32)
    return encoder, mark


def _modality(
    settings: dict[str, Any],
    root: str,
    encoder: Encoder,
    cache: str | None,
    projector_path: str | None,
) -> Modality:
    from ta.media.features import read_features

    features = read_features(cache, settings["fingerprint"]) if cache else None
    return Modality(
        settings, root, encoder.read, None if features else encoder.encode, features, projector_path
    )


def _checker(modality: Modality) -> Callable[[str], None]:
    """check(path): ValueError unless the file lies below the root and can be read, or is in the cache with its present content."""
    from ta.media.features import check_features
    from ta.media.images import media_key, media_path

    @cache
    def reason(path: str) -> str:
        """Why a file cannot be used, or nothing; each is tried once."""
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
        if why := reason(path):
            raise ValueError(why)

    return check


def _mark(modality: Modality) -> str:
    return hash_json(
        [str(Path(modality.root).resolve()), modality.cache.hashes if modality.cache else None]
    )


def inputs_of(modality: Modality, path: str) -> torch.Tensor:
    """The encoder's input for one file, or its features (F, E) where they are cached."""
    import torch

    from ta.media.features import take
    from ta.media.images import media_key, media_path

    if modality.cache is not None:
        return take(modality.cache, [media_key(path)])[0]
    return torch.from_numpy(modality.read(media_path(modality.root, path)))


def encoded(modality: Modality, values: torch.Tensor | None) -> torch.Tensor:
    """(I, F, E) features of what `inputs_of` gave for several files; of none at all, (0, F, E)."""
    import torch

    if values is None:
        return torch.empty(0, modality.settings["features"], modality.settings["emb_dim"])
    return values if modality.encode is None else modality.encode(values)
