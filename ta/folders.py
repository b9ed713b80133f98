"""The contents of a folder (a model, an adapter, a run), read from JSON alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ta.builtin.model_folders import builtin_encoder, builtin_model
from ta.files import cache_folder, content_hash, hash_json

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelConfig:
    """The model that a command opens."""

    model_path: str = "builtin"
    """Folder of a model with its tokenizer, of an adapter whose base is still where it was, or of a
    run (its final/ is taken); "builtin" is a seeded model of a million weights made in code, which
    has learned nothing yet."""
    adapter_path: str | None = None
    """Folder of a trained adapter for the model, to go on with or to use; its own settings hold."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Arithmetic of the forward pass; auto is bfloat16 on accelerators and float32 on CPU. Master
    weights that train stay float32 (or float64)."""
    model_args: tuple[str, ...] = ()
    """Further key=value arguments of from_pretrained, such as
    attn_implementation=flash_attention_2."""
    hub: bool = False
    """Take a name that is no folder from the Hugging Face hub, or from its cache where there is no
    network."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for folders you trust."""


class Folder(NamedTuple):
    """The contents of a folder."""

    # the folder itself, or the final/ of a run
    path: str
    kind: Literal["model", "classifier", "adapter"]
    # the folder or name of the base that an adapter was trained on
    base: str | None
    # config.json, or an adapter's adapter_config.json
    config: dict[str, Any]

    @property
    def num_labels(self) -> int:
        """The number of scores of a classifier's head; transformers leaves 2 unsaid."""
        return len(self.config.get("id2label") or (0,) * self.config.get("num_labels", 2))


class Sources(NamedTuple):
    """The folders that a ModelConfig names."""

    # weights
    base: str
    adapter: str | None
    # holds media.json and projectors
    media: str | None
    # holds the tokenizer
    tokenizer: str


def read_folder(path: str, hub: bool = False) -> Folder:
    """The contents of a folder, of the `final/` of a run folder, or of a name on the hub.

    ValueError for a folder that does not exist or holds none of these.
    """
    folder = Path(model_folder(path, hub))
    if not _holds(folder, "config.json"):
        file = folder / "adapter_config.json"
        base = value_of(file, "base_model_name_or_path", str)
        return Folder(str(folder), "adapter", base, read_json(file))
    config = read_json(folder / "config.json")
    with loading(folder / "config.json", "the settings of a model"):
        head = any("SequenceClassification" in name for name in config.get("architectures") or ())
        found = Folder(str(folder), "classifier" if head else "model", None, config)
        assert not head or found.num_labels > 0, "num_labels"
    return found


def resolve(config: ModelConfig) -> Sources:
    """The folders to load: an adapter given as the model is that adapter on the base it names.

    ValueError for a folder that holds no model, for an adapter whose base is not here, and for two
    adapters.
    """
    folder = read_folder(config.model_path, config.hub)
    base, adapter = folder.path, config.adapter_path
    if folder.kind == "adapter":
        if adapter is not None:
            raise ValueError(
                f"--model-path {config.model_path} is an adapter, and --adapter-path {adapter} "
                "is another: give one of them, or merge the first with recipes/merge.py"
            )
        base, adapter = folder.base, folder.path
        if not base or not (config.hub or Path(base).is_dir()):
            raise ValueError(
                f"{config.model_path} is an adapter of base {base!r}, which is not here: give the "
                "base in --model-path, this in --adapter-path"
            )
        base = read_folder(base, config.hub).path
    elif adapter is not None:
        adapter = local_folder(adapter, config.hub)
    folders = [Path(path) for path in (adapter, base) if path]
    own = adapter and _holds(folders[0], "tokenizer.json", "tokenizer_config.json")
    media = next((str(path) for path in folders if _holds(path, "media.json")), None)
    if media and not Path(media, "projectors").is_dir():
        raise ValueError(f"{media} has media.json and no projectors: give the whole folder")
    return Sources(base, adapter, media, adapter if own else base)


def _holds(folder: Path, *names: str) -> bool:
    return any((folder / name).exists() for name in names)


def copy_media(source: str, folder: Path) -> None:
    """Copy projectors and media.json of the folder `source` into `folder`."""
    shutil.copy(Path(source) / "media.json", folder)
    shutil.copytree(Path(source) / "projectors", folder / "projectors")


def read_json(path: Path, kind: type = dict) -> Any:
    """The object (or list) in a JSON file; ValueError, in one line, for a file that holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): give a whole file") from error
    if not isinstance(data, kind):
        raise ValueError(f"{path} holds a {type(data).__name__}, not settings: give a whole file")
    return data


def value_of(path: Path, key: str, kind: Any, many: bool = False) -> Any:
    """The value of a key in a JSON file; None where it is absent or null, or there is no file.

    ValueError where it is not of the type `kind`, or, with `many`, a list of such.
    """
    value = read_json(path).get(key) if path.exists() else None
    values = value if many and isinstance(value, list) else [value]
    if value is not None and not all(isinstance(one, kind) for one in values):
        raise ValueError(f"{path}: {key} cannot be {value!r}; mend it")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError, in one line, for a file that is not whole."""
    from safetensors.torch import load_file

    with loading(path, "a complete safetensors file"):
        return load_file(path)


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, **metadata: str) -> None:
    """Write tensors as one safetensors file; those that share memory are written apart."""
    from safetensors.torch import save_file

    own = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    save_file(own, path, metadata or None)


def differing(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[str, str, str] | None:
    """(name, shape given, shape wanted) of a tensor that is not in both or has another shape."""
    for name in sorted(given.keys() | wanted.keys()):
        shapes = [str(tuple(t[name].shape)) if name in t else "absent" for t in (given, wanted)]
        if shapes[0] != shapes[1]:
            return name, *shapes
    return None


@contextmanager
def loading(path: str | Path, kind: str) -> Iterator[None]:
    """ValueError, in one line, for whatever a library raises because `path` is no whole `kind`.

    transformers, peft and safetensors raise errors of many types for the same faults. Errors of
    permission, memory and devices say nothing about the path and stay as they are.
    """
    try:
        yield
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):
            raise
        why = " ".join(str(error).split())[:200]
        if not isinstance(error, (ImportError, OSError, RuntimeError, ValueError)):
            why = f"{type(error).__name__}: {why}"
        if any(Path(path).glob("*.bin")) and not any(Path(path).glob("*.safetensors")):
            why += "; ta convert makes safetensors of its weights"
        raise ValueError(f"{path} does not load as {kind}: {why}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing but errors, and shows no bars of its own."""
    from transformers import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def model_folder(path: str, hub: bool = False) -> str:
    """The folder to load; "builtin" is written to the cache once, and with `hub` a name is fetched.

    ValueError where there is no such folder.
    """
    if path.startswith("builtin") and not Path(path).exists():
        path = str(builtin_model(path) or path)
    path = local_folder(path, hub)
    if not Path(path).is_dir():
        raise ValueError(
            f"no model folder at {path}: give a folder with config.json and *.safetensors, or add "
            "--hub to look the name up on the hub"
        )
    if not _holds(Path(path), "config.json", "adapter_config.json"):
        raise ValueError(
            f"{path} holds no config.json: give the folder of a saved model (a run's export is "
            "RUN/final)"
        )
    return path


@cache
def _downloaded(name: str) -> str:
    """The folder of the hub's cache that holds `name`, fetched where it is absent or old.

    A folder stands for itself. Weights come as safetensors only. ValueError for a name that neither
    the hub nor its cache has.
    """
    if Path(name).exists():
        return name
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return snapshot_download(name, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} is no folder, and the hub does not give it ({why}): give a folder or the name "
            "of a model on the hub"
        ) from error


def local_folder(path: str, hub: bool = False) -> str:
    """The folder at `path`, the `final/` of a run folder, or that of a name on the hub."""
    path = _downloaded(path) if hub else path
    final, config = Path(path, "final"), Path(path, "config.json")
    run = final.is_dir() and not Path(path, "adapter_config.json").exists()
    if run and config.exists():
        run = "model_type" not in read_json(config)
    return str(final) if run else path


def encoder_folder(path: str = "builtin", hub: bool = False) -> str:
    """The folder of a text encoder; "builtin" is a seeded tiny one in the cache.

    What rag.py exports stands for the encoder in it. ValueError for an adapter.
    """
    if path == "builtin":
        return str(builtin_encoder())
    folder = read_folder(path, hub)
    if folder.kind == "adapter":
        raise ValueError(
            f"{folder.path} is an adapter, not a text encoder: merge it with recipes/merge.py and "
            "give the merged folder"
        )
    trained = Path(folder.path) / "encoder"
    return str(trained) if _holds(trained, "config.json") else folder.path


def index_folder(path: str) -> str:
    """The folder of an index; a run folder of rag.py, or its export, stands for the index in it."""
    inside = Path(local_folder(path)) / "index"
    return str(inside) if inside.is_dir() else path


def fingerprint(path: str, hub: bool = False) -> str:
    """Hash of a model folder's config and weights; the cache keeps the hash of each file."""
    folder = Path(model_folder(path, hub))
    hashes = cache_folder("") / "hashes"
    names = ("*.safetensors", "config.json", "adapter_config.json")
    files = sorted(path for name in names for path in folder.glob(name))
    return hash_json([[p.name, content_hash(p, hashes)] for p in files])[:16]
