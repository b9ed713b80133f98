"""Checkpoints that are complete or absent: trained tensors and optimizer state in shards.

A folder step-N holds shard-R.safetensors of every rank R (shard-R-1 and so on of a large one) and
manifest.json with sizes and hashes, its own too; one rename publishes it. Sharded tensors are cut
along their first dimension; a checkpoint of any number of processes loads on any other number. Any
optimizer's state is stored: tensors as KEY/NAME, those of which a tensor is made as KEY.PART/NAME,
numbers in the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ta.files import clean_inside, damage, digest, hash_json, json_text, remove_whole, sync
from ta.model.export import failing_together, published
from ta.parallel import gather_objects, local_rows, rank, world
from ta.training.optim import set_lr

Tensors = dict[str, Tensor]  # by name

FORMAT = 2
# bytes of a file, about
FILE_SIZE = 4_000_000_000


class Found(NamedTuple):
    """A complete checkpoint, and by name why the newer ones are damaged."""

    path: Path
    manifest: dict[str, Any]
    damaged: dict[str, str]


def trained(model: nn.Module) -> Tensors:
    """The tensors that training changes, by name."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    identity: dict[str, Any],
    keep: int = 2,
    more_state: Tensors | None = None,
    damaged: dict[str, str] | None = None,
    logged: dict[str, float] | None = None,
    pinned: int | None = None,
) -> Path:
    """Publish folder/step-N, in place of what stands there, and delete all but the newest `keep`
    whole checkpoints.

    `more_state` names further tensors that training changes, such as a reference that follows the
    policy. `damaged` are those of `Found`: as the run passes a step, its damaged checkpoint is
    replaced or goes, and leaves `damaged`. `logged` is kept as it is; the checkpoint of step
    `pinned` stays. OSError (no room) leaves earlier checkpoints as they were.
    """
    target = folder_of(folder, step)
    states, numbers = _optimizer_state(model, optimizer)
    tensors, rows = {}, {}
    for name, tensor in (trained(model) | (more_state or {}) | states).items():
        local, start, whole = _local(tensor)
        # what is not sharded belongs to rank 0
        if rank() == 0 or hasattr(tensor, "to_local"):
            rows[name] = {"start": start, "rows": len(local) if local.dim() else 1, "shape": whole}
            tensors[name] = local.contiguous()
    own = []
    with published(target) as temporary:
        with failing_together(target):
            for number, names in enumerate(_shares(tensors)):
                path = temporary / f"shard-{rank()}{f'-{number}' * bool(number)}.safetensors"
                # the copies on the host are those of one file
                save_file({name: tensors[name] for name in names}, path)
                sync(path)
                kept = {name: rows[name] for name in names}
                own.append({"file": path.name, "rows": kept, **digest(path)})
        entries = [entry for entries in gather_objects(own) for entry in entries]
        if rank() == 0:
            manifest = {
                "format": FORMAT,
                "step": step,
                "world": world(),
                "identity": identity,
                "optimizer": numbers,
                "shards": entries,
                "logged": logged,
            }
            # the hash is of what is read
            own = {"sha256": hash_json(json.loads(json_text(manifest)))}
            (temporary / "manifest.json").write_text(json_text(manifest | own))
    passed = [name for name in damaged or () if int(name[5:]) <= step]
    if rank() == 0:
        prune(folder, step, keep, {*passed} - {target.name}, pinned)
    for name in passed:
        del damaged[name]
    return target


def _shares(tensors: Tensors) -> list[list[str]]:
    """The names, in files of about FILE_SIZE bytes; one file where there is nothing."""
    starts = accumulate((tensor.nbytes for tensor in tensors.values()), initial=0)
    files = groupby(zip(tensors, starts, strict=False), lambda pair: pair[1] // FILE_SIZE)
    return [[name for name, _ in file] for _, file in files] or [[]]


def prune(folder: Path, step: int, keep: int, damaged: Collection[str], pinned: int | None) -> None:
    """Delete whole ones beyond the newest `keep` but that of step `pinned`, damaged ones before
    `step`, and left-overs.
    """
    clean_inside(folder)
    whole = []
    for path in _checkpoints(folder):
        manifest = "damaged" if path.name in damaged else read_manifest(path, hashes=False)
        if not isinstance(manifest, str):
            whole.append(path)
        elif _number(path) < step and not manifest.startswith("format"):
            remove_whole(path)
    for old in whole[keep:] if keep else []:
        if _number(old) != pinned:
            remove_whole(old)


def _optimizer_state(
    model: nn.Module, optimizer: Optimizer
) -> tuple[Tensors, dict[str, dict[str, float]]]:
    """({KEY/NAME: tensor}, {NAME: {KEY: number}}) of an optimizer's state for each parameter."""
    tensors, numbers = {}, {}
    for name, parameter in trained(model).items():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if hasattr(value, "__tensor_flatten__") and not hasattr(value, "to_local"):
                # a moment in 8 bits: its codes, their scales and what they stand for
                for part in value.__tensor_flatten__()[0]:
                    tensors[f"{key}.{part}/{name}"] = getattr(value, part)
            elif torch.is_tensor(value) and (value.dim() or key != "step"):
                tensors[f"{key}/{name}"] = value
            elif value is not None:
                numbers.setdefault(name, {})[key] = float(value)
    return tensors, numbers


def newest(folder: Path) -> Found | None:
    """The newest checkpoint whose files have the sizes and hashes of its manifest.

    None where there is no checkpoint. ValueError where checkpoints exist and none is complete,
    because a new start would throw work away.
    """
    damaged = {}
    for path in _checkpoints(folder):
        manifest = read_manifest(path)
        if not isinstance(manifest, str):
            return Found(path, manifest, damaged)
        damaged[path.name] = manifest
    if damaged:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in damaged.items())
        raise ValueError(
            f"no whole checkpoint in {folder} ({reasons}): restore one or start anew with "
            "--overwrite"
        )
    return None


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands in the folder of checkpoints."""
    return folder / f"step-{step:08d}"


def at_step(folder: Path, step: int) -> Found | None:
    """The checkpoint of a step, or None where it is not there or damaged."""
    path = folder_of(folder, step)
    manifest = read_manifest(path)
    return None if isinstance(manifest, str) else Found(path, manifest, {})


def load(
    found: Found,
    model: nn.Module,
    optimizer: Optimizer,
    more_state: Tensors | None = None,
) -> int:
    """Copy tensors and optimizer state into place; returns the number of steps done.

    ValueError names the first tensor that does not fit.
    """
    parameters = trained(model)
    wanted = parameters | (more_state or {})
    shards = Shards(found)
    # the others are KEY/NAME of optimizer state
    stored = {n for n in shards.names if n in wanted or n.partition("/")[2] not in wanted}
    if stored != set(wanted):
        differ = sorted(stored ^ set(wanted))
        raise ValueError(
            f"{found.path} trains other tensors than this run ({len(differ)} differ, such as "
            f"{differ[0]}): give the settings it was made with"
        )
    for name, tensor in wanted.items():
        shards.copy_to(tensor, name)
    states = sorted(shards.names - stored)
    if any("." in full.partition("/")[0] for full in states):
        _make_state(optimizer)
    for full in states:
        key, _, name = full.partition("/")
        key, _, part = key.partition(".")
        parameter = parameters[name]
        state = optimizer.state[parameter]
        if part:
            shards.copy_to(getattr(state[key], part), full)
            continue
        shape = shards.shape(full)
        like_parameter = shape == list(parameter.shape)
        state[key] = torch.zeros_like(parameter) if like_parameter else parameter.new_zeros(shape)
        shards.copy_to(state[key], full)
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for name, parameter in parameters.items():
        device = parameter.device if on_device else "cpu"
        for key, value in found.manifest["optimizer"].get(name, {}).items():
            number = torch.tensor(value, dtype=torch.float32, device=device)
            optimizer.state[parameter][key] = number
    return found.manifest["step"]


def _make_state(optimizer: Optimizer) -> None:
    """Let an optimizer make its own state, by a step that moves nothing."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    set_lr(optimizer, [0.0] * len(rates))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    set_lr(optimizer, rates)


class Shards:
    """The tensors of a checkpoint, read from the files of all ranks that wrote it."""

    def __init__(self, found: Found):

        self.path = found.path
        self.files = [
            (dict(shard["rows"]), safe_open(found.path / shard["file"], "pt"))
            for shard in found.manifest["shards"]
        ]
        self.names = {name for rows, _ in self.files for name in rows}

    def shape(self, name: str) -> list[int]:
        """The shape of the whole tensor."""
        return next(rows[name]["shape"] for rows, _ in self.files if name in rows)

    def copy_to(self, tensor: Tensor, name: str) -> None:
        """Fill this process's rows of `tensor`; ValueError where the shapes differ."""
        local, start, whole = _local(tensor)
        if self.shape(name) != whole:
            raise ValueError(
                f"{self.path}: {name} has shape {self.shape(name)}, this run's has {whole}"
            )
        pieces = []
        for rows, file in self.files:
            if (held := rows.get(name)) is None:
                continue
            first, end = held["start"], start + (len(local) if local.dim() else 1)
            low, high = max(start, first), min(end, first + held["rows"])
            if low < high and whole:
                pieces.append(file.get_slice(name)[low - first : high - first])
            elif low < high:
                pieces.append(file.get_tensor(name)[None])
        if pieces:
            with torch.no_grad():
                local.copy_(torch.cat(pieces).view_as(local))


def _local(tensor: Tensor) -> tuple[Tensor, int, list[int]]:
    """(this rank's rows, index of the first, whole shape) of a tensor."""
    whole = list(tensor.shape)
    if not hasattr(tensor, "to_local"):
        return tensor.detach(), 0, whole
    return tensor.to_local().detach(), local_rows(tensor)[0], whole


def _checkpoints(folder: Path) -> list[Path]:
    """The step-N folders, newest first."""
    folders = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(folders, key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name[5:])


def read_manifest(path: Path, hashes: bool = True) -> dict[str, Any] | str:
    """The manifest of a checkpoint, or the reason why it is not complete; without `hashes` the
    sizes of its files alone count.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        known = manifest.pop("sha256", None)
        if known and known != hash_json(manifest):
            return "manifest.json does not have its own hash"
        if manifest["step"] != _number(path):
            return f"its manifest is of step {manifest['step']}"
        for shard in manifest["shards"]:
            if reason := damage(path / shard["file"], shard, hashes):
                return reason
    except (FileNotFoundError, NotADirectoryError):
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is damaged"
    return manifest
