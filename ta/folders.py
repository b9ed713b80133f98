"""Folders of models: which one a path means, and a hash of what lies in it."""

from __future__ import annotations

from pathlib import Path

from ta.store import cache_folder, content_hash, hash_json


def model_folder(path: str, hub: bool = False) -> str:
    """The folder (or, with `hub`, the name) to load; "builtin" is written to the cache once. ValueError where there is no such folder."""
    if path.startswith("builtin") and not Path(path).exists():
        from ta import demo

        if path == "builtin":
            return str(demo.tiny_folder())
        if path == demo.TUNED and demo.tuned_folder().exists():
            return str(demo.tuned_folder())
    if not Path(path).is_dir() and not hub:
        raise ValueError(
            f"no model folder at {path}: give a folder with config.json and *.safetensors, or add --hub to look the name up on the hub"
        )
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{path} holds no config.json: give the folder of a saved model (a run's export is RUN/final)")
    return path


def fingerprint(path: str, hub: bool = False) -> str:
    """Hash of a model folder's config and weights (each file is read once and remembered)."""
    folder = Path(model_folder(path, hub))
    if not folder.is_dir():
        return path
    notes = cache_folder("") / "hashes"
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name in ("config.json", "adapter_config.json"))
    return hash_json([[p.name, content_hash(str(p), notes)] for p in files])[:16]
