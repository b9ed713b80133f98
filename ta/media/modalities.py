"""The modalities of a model: which encoder reads which files, and how they stand in the text.

Features come from the encoder or from a cache. Letters: I inputs, F features of one, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ta.builtin.model_folders import pictures_folder
from ta.chat.tokenizer import Placeholder
from ta.data.readers import files_of
from ta.data.sources import parse_source
from ta.files import hash_json, json_text
from ta.folders import local_folder, read_json
from ta.media.encoders import Encoder, load_with_fingerprint
from ta.media.features import Features, check_features, read_features
from ta.media.images import media_key, media_path
from ta.media.settings import MediaConfig, MediaFiles

MANIFEST = "media.json"
# a folder of its own: vLLM takes every safetensors file beside config.json for the language model's
PROJECTORS = "projectors"
# projectors with two names
SAME = {"llava": "mlp", "c_abs": "c_abstractor", "c_abstractor": "c_abstractor"}
# what MANIFEST says of a modality
KEYS = {
    "encoder",
    "path",
    "fingerprint",
    "emb_dim",
    "features",
    "grid",
    "projector",
    "projector_width",
    "projector_depth",
    "embeddings",
    "start",
    "token",
    "end",
}


class Modality(NamedTuple):
    """One kind of media: its encoder or cache, and where its files lie."""

    settings: dict[str, Any]  # what an export keeps: encoder, fingerprint, sizes, projector, tokens
    root: str  # folder below which the files lie
    read: Callable[[Path], Any]  # one file to one input of the encoder
    encode: Callable[[Tensor], Tensor] | None  # None where a cache takes its place
    cache: Features | None
    projector_path: str | None = None  # weights that the projector starts from

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that say what it computes, wherever its encoder lies."""
        return {key: value for key, value in self.settings.items() if key != "path"}

    def inputs_of(self, path: str) -> Tensor:
        """The encoder's input for one file, or its features (F, E) where they are cached."""
        if self.cache is not None:
            return self.cache.handle.get_tensor(media_key(path))
        return torch.from_numpy(self.read(media_path(self.root, path)))

    def features_of(self, inputs: Tensor | None) -> Tensor:
        """(I, F, E) features of what `inputs_of` gave for several files; of none, (0, F, E)."""
        if inputs is None:
            return torch.empty(0, self.settings["features"], self.settings["emb_dim"])
        return inputs if self.encode is None else self.encode(inputs)


class Modalities(dict[str, Modality]):
    """The modalities of a model by name: "image", "audio" or both."""

    @property
    def placeholders(self) -> dict[str, Placeholder]:
        """The tokens that stand in the text for one picture or sound of each modality."""
        placeholders = {}
        for name, modality in self.items():
            known = modality.settings
            text = known["start"], known["token"], known["end"], known["embeddings"]
            # it changes when other files are read: another root, or a cache of other content
            files = [str(Path(modality.root).resolve()), modality.cache and modality.cache.hashes]
            placeholders[name] = Placeholder(*text, _file_check(modality), hash_json(files))
        return placeholders

    def save(self, folder: Path) -> None:
        """Write media.json, from which `reopen_media` opens the modalities again, into `folder`."""
        settings = {name: modality.settings for name, modality in self.items()}
        text = json_text({"format": 1, "modalities": settings}, indent=1)
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
    files = [file for source in sources for file in files_of(parse_source(source).path)]
    folders = sorted({str(Path(file).parent) for file in files})
    if len(folders) > 1:
        raise ValueError(
            f"the sources lie in {len(folders)} folders ({', '.join(folders[:3])}): give the one "
            "below which media lie in --image-root"
        )
    return folders[0]


def open_media(
    config: MediaConfig,
    sources: Sequence[str],
    device: str,
    folder: str | None = None,
    hub: bool = False,
) -> Modalities:
    """Load the encoders that `config` names, or open their caches.

    `folder` is that of a model which sees or hears already: its encoders and projectors go on, and
    `config` may add a modality. With `hub` an encoder may be a name on the hub. ValueError where no
    encoder is named, where a flag contradicts `folder`, where an encoder is not the one that the
    model was trained with, where a cache is another encoder's, and where there is no folder of
    media.
    """
    kept = media_settings(folder) if folder else {}
    _check_kept(config, folder, kept)
    root, media = media_root(config.files.image_root, sources), Modalities()
    builtin = None if sources or config.audio_encoder or folder else "builtin"
    encoders = {"image": config.image_encoder or builtin, "audio": config.audio_encoder}
    for name in dict.fromkeys((*kept, *encoders)):
        settings = kept.get(name)
        kind = settings["encoder"] if settings else encoders[name]
        if kind in (None, "none"):
            continue
        given = getattr(config.files, f"{name}_encoder_path")
        path = local_folder(given, hub) if given else settings and settings["path"]
        if settings and path and not Path(path).is_dir():
            raise ValueError(
                f"the {kind} encoder of {folder} is not at {path}: give its folder in "
                f"--{name}-encoder-path"
            )
        # an export of this run says where the encoder is now
        path = path and str(Path(path).resolve())
        encoder, fingerprint = load_with_fingerprint(kind, path, device)
        if encoder.modality != name:
            raise ValueError(
                f"--{name}-encoder {kind} reads {encoder.modality}: give an encoder of {name}"
            )
        if settings:
            weights = str(Path(folder, PROJECTORS, f"{name}.safetensors"))
        else:
            settings = {"encoder": kind, "path": path, "fingerprint": fingerprint}
            settings |= _new_settings(config, name, encoder, media)
            weights = _projector_path(getattr(config, f"{name}_projector_path"), name)
        if fingerprint != settings["fingerprint"]:
            raise ValueError(
                f"{folder} was trained with another {kind} encoder than {path} "
                f"holds ({settings['fingerprint'][:12]}, this one is {fingerprint[:12]}); "
                f"give its folder in --{name}-encoder-path"
            )
        cached = getattr(config.files, f"{name}_features")
        features = read_features(cached, fingerprint) if cached else None
        encode = None if features else encoder.encode
        settings = settings | {"path": path}
        media[name] = Modality(settings, root, encoder.read, encode, features, weights)
    if not media:
        raise ValueError(
            "no encoder: give --image-encoder clip --image-encoder-path FOLDER (or siglip, "
            "imagebind), or --audio-encoder"
        )
    _check_idle(config, media)
    return media


def _projector_path(given: str | None, name: str) -> str | None:
    """The file of a projector's weights; `given` may be a run folder or its export."""
    inside = Path(local_folder(given or ""), PROJECTORS, f"{name}.safetensors")
    return str(inside) if given and inside.is_file() else given


def _check_idle(config: MediaConfig, media: Modalities) -> None:
    """ValueError for a flag of a modality or projector that the model has not."""
    without = {name: f"--{name}-encoder" for name in {"image", "audio"} - media.keys()}
    if "c_abstractor" not in {SAME.get(m.settings["projector"]) for m in media.values()}:
        without["projector"] = "a c_abstractor"
    for flag, value in (vars(config.files) | vars(config)).items():
        kind, _, what = flag.partition("_")
        if value is not None and kind in without and what not in ("encoder", "root", "lr"):
            raise ValueError(
                f"--{flag.replace('_', '-')} {value} has no effect without {without[kind]}: leave "
                "it out"
            )


def _new_settings(
    config: MediaConfig, name: str, encoder: Encoder, others: Modalities
) -> dict[str, Any]:
    """What the settings of a modality that the model learns to read say besides its encoder."""
    borders = [(known.settings["start"], known.settings["end"]) for known in others.values()]
    start, end = config.media_tokens or (borders or [("<MS>", "</MS>")])[0]
    token = {"image": "<img>", "audio": "<audio>"}[name]
    return {
        "emb_dim": encoder.emb_dim,
        "features": encoder.n_modality_embs,
        "grid": list(encoder.grid) if encoder.grid else None,
        "projector": getattr(config, f"{name}_projector") or "mlp",
        "projector_width": config.projector_width or 1024,
        "projector_depth": config.projector_depth or 3,
        "embeddings": getattr(config, f"{name}_embeddings") or encoder.n_modality_embs,
        "start": start,
        "token": getattr(config, f"{name}_token") or token,
        "end": end,
    }


def media_settings(folder: str | Path) -> dict[str, dict[str, Any]]:
    """What media.json of `folder` says of each modality; ValueError where it is not complete."""
    path = Path(folder) / MANIFEST
    modalities = read_json(path).get("modalities")
    whole = isinstance(modalities, dict) and set() < modalities.keys() <= {"image", "audio"}
    if not whole or not all(isinstance(s, dict) and s.keys() >= KEYS for s in modalities.values()):
        raise ValueError(f"{path} does not say which encoders it belongs to: give a whole folder")
    return modalities


def _check_kept(config: MediaConfig, folder: str | None, modalities: dict[str, dict]) -> None:
    """ValueError for a flag that contradicts what `folder` says of a modality that goes on."""
    for name, kept in modalities.items():
        flags = {
            f"{name}_encoder": kept["encoder"],
            f"{name}_projector": kept["projector"],
            f"{name}_embeddings": kept["embeddings"],
            f"{name}_projector_path": None,
            f"{name}_token": kept["token"],
            "media_tokens": (kept["start"], kept["end"]),
        }
        if SAME.get(kept["projector"]) == "c_abstractor":
            flags |= {key: kept[key] for key in ("projector_width", "projector_depth")}
        for flag, value in flags.items():
            given = getattr(config, flag)
            if given is not None and SAME.get(given, given) != SAME.get(value, value):
                shown = " ".join(given) if isinstance(given, tuple) else given
                raise ValueError(
                    f"--{flag.replace('_', '-')} {shown}: {folder} goes on with its own "
                    f"{value or 'projector'}; leave the flag out, or start from a model without "
                    f"{name}"
                )


def reopen_media(
    folder: str | Path,
    files: MediaFiles,
    sources: Sequence[str],
    device: str,
    hub: bool = False,
) -> Modalities | None:
    """The modalities of an exported model; None where it has none.

    ValueError where an encoder is not the one that the model was trained with.
    """
    if not (Path(folder) / MANIFEST).exists():
        return None
    return open_media(MediaConfig(files), sources, device, str(folder), hub)


def _file_check(modality: Modality) -> Callable[[str], None]:
    """check(path): ValueError for a file that cannot be used; each is tried once.

    It must lie below the root and be readable, or be in the cache with its present content.
    """

    @cache
    def reason(path: str) -> str:
        """Why the file cannot be used, or nothing."""
        try:
            file = media_path(modality.root, path)
            if modality.cache is not None:
                check_features(modality.cache, media_key(path), file)
            else:
                modality.read(file)
        except ValueError as error:
            return str(error)
        return ""

    def check(path: str) -> None:
        if reason(path):
            raise ValueError(reason(path))

    return check
