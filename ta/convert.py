"""Pickled weights of other programs -> safetensors, tokenizer.model -> tokenizer.json.

Tables that hold pictures and sounds -> records.jsonl and files.

Only tensors are unpickled (torch.load with weights_only); nothing in a file is run.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from ta.data.readers import read_rows
from ta.files import HUB, publishing, write_atomic
from ta.folders import loading, write_tensors
from ta.media.imagebind import AUDIO_HUGE, IMAGE_HUGE, write_trunk

PICKLED = (".bin", ".pt", ".pth")
MODALITIES = ("image", "audio")
TABLES = (".parquet", ".arrow")
# the first bytes of pictures and sounds, and the endings of their files
SIGNS = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\x00": ".tif",
    b"MM\x00*": ".tif",
}
RIFF = {b"WEBP": ".webp", b"WAVE": ".wav"}


def convert(given: str, out: str) -> str:
    """Write what lies at `given` as this library reads it to `out`; says what was made.

    A folder with adapter_model.bin or pytorch_model*.bin becomes a folder with safetensors and the
    other files as they were; one with tokenizer.model and no tokenizer.json gets one. A file of
    projectors (modality_adapters.pt of turbo-alignment, or one projector's state dict) becomes
    OUT/image.safetensors and OUT/audio.safetensors; the published imagebind_huge.pth becomes the
    folders OUT/image and OUT/audio. A table (parquet or Arrow: a file, a folder, FOLDER/SPLIT or
    hf:OWNER/NAME/SPLIT) becomes OUT/records.jsonl with the pictures and sounds of its cells in
    OUT/media. ValueError where there is nothing to convert, where a file is no checkpoint of
    weights alone, and where `out` exists.
    """
    source, target = Path(given), Path(out)
    if target.exists():
        raise ValueError(f"{out} exists: give a new folder")
    folder = source if source.is_dir() else source.parent
    inside = folder.rglob("*") if folder == source or not source.exists() else [source]
    if given.startswith(HUB) or any(path.suffix in TABLES for path in inside):
        return _table(given, target)
    if not source.exists():
        raise ValueError(f"{given}: no such file or folder")
    if source.is_dir():
        return _folder(source, target)
    if source.suffix not in PICKLED:
        raise ValueError(f"{given}: give a folder or a file of {', '.join(PICKLED)}")
    weights = load_pickled(source)
    if not any(name.startswith("modality_trunks.") for name in weights):
        return _projectors(weights, target)
    with publishing(target) as folder:
        for config in (IMAGE_HUGE, AUDIO_HUGE):
            write_trunk(weights, source, folder / config.modality, config)
    return f"{target}: image and audio, for --image-encoder-path and --audio-encoder-path"


def load_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict by name; ValueError for any other content."""
    with loading(path, "a checkpoint of weights alone"):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    whole = isinstance(loaded, dict) and all(isinstance(t, torch.Tensor) for t in loaded.values())
    if not whole or not loaded:
        raise ValueError(f"{path} holds something else than tensors by name")
    return loaded


def _table(source: str, target: Path) -> str:
    """A table whose cells hold pictures and sounds: as JSON lines, with the cells as files."""
    kept: dict[str, str] = {}
    with publishing(target) as folder:
        (folder / "media").mkdir()

        def keep(data: bytes) -> str:
            name = hashlib.sha256(data).hexdigest()[:32]
            if name not in kept:
                endings = (end for begin, end in SIGNS.items() if data.startswith(begin))
                ending = RIFF.get(data[8:12]) if data[:4] == b"RIFF" else next(endings, None)
                if ending is None:
                    raise ValueError(
                        f"{source}: a cell holds bytes that begin with {data[:4]!r}, which are no "
                        "picture or sound known here"
                    )
                kept[name] = f"media/{name}{ending}"
                (folder / kept[name]).write_bytes(data)
            return kept[name]

        with open(folder / "records.jsonl", "wb") as file:
            count = sum(file.write(row + b"\n") > 0 for _, row in read_rows(source, keep))
    return f"{target}: records.jsonl with {count:,} records, {len(kept):,} files in media"


def _folder(source: Path, target: Path) -> str:
    """A folder of a model, an adapter or a tokenizer."""
    pickled = sorted(source.glob("pytorch_model*.bin")) + sorted(source.glob("adapter_model.bin"))
    spm = (source / "tokenizer.model").exists() and not (source / "tokenizer.json").exists()
    if not pickled and not spm:
        raise ValueError(
            f"{source} holds no pytorch_model*.bin, no adapter_model.bin and no tokenizer.model "
            "without tokenizer.json: nothing is to be converted"
        )
    made = []
    with publishing(target) as folder:
        for path in pickled:
            name = path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            write_tensors(load_pickled(path), folder / name, format="pt")
            made.append(name)
        for path in sorted(source.iterdir()):
            if path.name == "pytorch_model.bin.index.json":
                text = path.read_text(encoding="utf-8")
                text = text.replace("pytorch_model", "model").replace(".bin", ".safetensors")
                write_atomic(folder / "model.safetensors.index.json", text)
            elif path.is_file() and path.suffix not in PICKLED:
                shutil.copyfile(path, folder / path.name)
        if spm:
            with loading(source, "a tokenizer (pip install sentencepiece protobuf)"):
                tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            tokenizer.save_pretrained(folder)
            made.append("tokenizer.json")
    return f"{target}: {', '.join(made)}"


def _projectors(weights: dict[str, Tensor], target: Path) -> str:
    """The projectors of a file, one file a modality; the loader knows other tools' names."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        kind, _, rest = name.partition(".")
        kind, rest = (kind, rest) if kind in MODALITIES else ("image", name)
        parts.setdefault(kind, {})[rest] = tensor
    with publishing(target) as folder:
        for kind, part in parts.items():
            write_tensors(part, folder / f"{kind}.safetensors", format="pt")
    return f"{target}: {', '.join(f'{kind}.safetensors' for kind in parts)}"
