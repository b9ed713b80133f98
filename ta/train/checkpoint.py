"""Checkpoints that are whole or absent: trained tensors and AdamW moments in safetensors shards, a manifest with hashes, one rename to publish.

A folder step-N holds shard-R.safetensors of every rank R and manifest.json. Sharded tensors are cut along their first dimension; a checkpoint of
any number of processes loads on any other.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ta.files import content_hash, sync, write_atomic
from ta.parallel import barrier, gather_objects, local_rows, rank, world

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


class Found(NamedTuple):
    """A whole checkpoint and what was passed over on the way to it."""

    path: Path
    manifest: dict[str, Any]
    damaged: list[str]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training changes, by name."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    keep: int = 2,
    extra: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Publish folder/step-N and delete all but the newest `keep`; OSError (no room) leaves earlier checkpoints as they were.

    `extra` names further tensors that training changes, such as a reference that follows the policy.
    """
    from safetensors.torch import save_file

    target = folder / f"step-{step:08d}"
    if (target / "manifest.json").exists():
        return target
    temporary = folder / f".tmp-step-{step:08d}"
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".tmp-step-*"):
            shutil.rmtree(stale)
        temporary.mkdir()
    barrier()
    tensors, rows = {}, {}
    for name, parameter in (trained(model) | (extra or {})).items():
        local, start, whole = _local(parameter)
        if local is None:
            continue
        rows[name] = {"start": start, "rows": len(local) if local.dim() else 1, "shape": whole}
        tensors[name] = local.detach().contiguous()
        for moment in MOMENTS:
            state = optimizer.state.get(parameter, {}).get(moment)
            if state is not None:
                tensors[f"{moment}/{name}"] = _local(state)[0].contiguous()
    name = f"shard-{rank()}.safetensors"
    failure = None
    try:
        save_file(tensors, temporary / name)
        sync(temporary / name)
        entry = {"file": name, "rows": rows, **_digest(temporary / name)}
    except (
        Exception
    ) as error:  # told to all ranks first: one without room must not leave the others waiting
        failure, entry = error, {"failed": f"rank {rank()}: {error}"}
    entries = gather_objects(entry)
    if failed := [e["failed"] for e in entries if "failed" in e]:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise (
            failure
            if isinstance(failure, OSError)
            else OSError(
                28, f"checkpoint of step {step} not written, earlier ones are kept ({failed[0]})"
            )
        )
    if rank() == 0:
        manifest = {
            "format": FORMAT,
            "step": step,
            "world": world(),
            "identity": identity,
            "shards": entries,
        }
        write_atomic(temporary / "manifest.json", json.dumps(manifest))
        os.rename(temporary, target)
        sync(folder)
        for old in _published(folder)[keep:] if keep else []:
            shutil.rmtree(old)
    barrier()
    return target


def newest(folder: Path) -> Found | None:
    """The newest checkpoint whose every file has the size and hash of its manifest; None where there is none at all.

    ValueError where checkpoints exist and none of them is whole: starting over unasked would throw work away.
    """
    damaged = []
    for path in _published(folder):
        if reason := _damage(path):
            damaged.append(f"{path.name}: {reason}")
        else:
            return Found(path, json.loads((path / "manifest.json").read_text()), damaged)
    if damaged:
        raise ValueError(
            f"no whole checkpoint in {folder} ({'; '.join(damaged)}): restore one or start anew with --overwrite"
        )
    return None


def load(
    found: Found,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, torch.Tensor] | None = None,
) -> int:
    """Copy tensors and moments into `model`, `extra` and `optimizer` and return the number of steps done; ValueError names what does not fit."""
    import torch
    from safetensors import safe_open

    parameters = trained(model) | (extra or {})
    shards = found.manifest["shards"]
    stored = {name for shard in shards for name in shard["rows"]}
    if stored != set(parameters):
        odd = sorted(stored ^ set(parameters))
        raise ValueError(
            f"{found.path} trains other tensors than this run ({len(odd)} differ, such as {odd[0]}): give the settings it was made with"
        )
    files = [safe_open(found.path / shard["file"], "pt") for shard in shards]
    for name, parameter in parameters.items():
        local, start, whole = _local(parameter, owner_only=False)
        for key in ("", *MOMENTS) if name not in (extra or {}) else ("",):
            pieces = []
            for shard, file in zip(shards, files, strict=True):
                have = shard["rows"].get(name)
                if have is None:
                    continue
                if have["shape"] != whole:
                    raise ValueError(
                        f"{found.path}: {name} has shape {have['shape']}, this run's has {whole}"
                    )
                full = f"{key}/{name}" if key else name
                if full not in file.keys():  # noqa: SIM118 safe_open is no mapping
                    continue
                low = max(start, have["start"])
                high = min(start + (len(local) if local.dim() else 1), have["start"] + have["rows"])
                if low < high:
                    part = (
                        file.get_slice(full)[low - have["start"] : high - have["start"]]
                        if local.dim()
                        else file.get_tensor(full)
                    )
                    pieces.append(part)
            if key and not pieces and local.numel():
                continue
            value = (
                (torch.cat(pieces) if local.dim() else pieces[0])
                if pieces
                else local.new_empty(local.shape)
            )
            _put(parameter, local, optimizer, key, value, found.manifest["step"])
    return found.manifest["step"]


def _put(parameter, local, optimizer, key: str, value, step: int) -> None:
    import torch

    if not key:
        with torch.no_grad():
            local.copy_(value)
        return
    state = optimizer.state[parameter]
    if key not in state:
        state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] = torch.tensor(
            float(step),
            dtype=torch.float32,
            device=parameter.device if optimizer.defaults.get("fused") else "cpu",
        )
    _local(state[key], owner_only=False)[0].copy_(value)


def _local(tensor, owner_only: bool = True):
    """(this rank's rows, their first row, whole shape); replicated tensors belong to rank 0, others get None when `owner_only`."""
    whole = list(tensor.shape)
    if not hasattr(tensor, "to_local"):
        return (None if owner_only and rank() else tensor.detach()), 0, whole
    return tensor.to_local().detach(), local_rows(tensor)[0], whole


def _published(folder: Path) -> list[Path]:
    """step-N folders, newest first."""
    return (
        sorted(
            (p for p in folder.glob("step-*") if p.name[5:].isdigit()),
            key=lambda p: -int(p.name[5:]),
        )
        if folder.exists()
        else []
    )


def _damage(path: Path) -> str:
    """Why a checkpoint is not whole, or nothing."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        for shard in manifest["shards"]:
            file = path / shard["file"]
            if not file.exists():
                return f"{shard['file']} is missing"
            if file.stat().st_size != shard["size"]:
                return f"{shard['file']} has {file.stat().st_size} bytes instead of {shard['size']}"
            if _digest(file)["sha256"] != shard["sha256"]:
                return f"{shard['file']} does not have the hash in its manifest"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is damaged"
    return ""


def _digest(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": content_hash(path)}
