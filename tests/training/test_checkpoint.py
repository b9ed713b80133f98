"""Checkpoints are whole or absent; damage is found, named and skipped."""

import json
import shutil

import pytest
import torch
from small import prepared, sft_step, tiny

from ta.data.loader import BatchConfig, val_batches
from ta.training import checkpoint
from ta.training.optim import OptimConfig, adamw


@pytest.fixture
def trained(tmp_path):
    """A model after two steps, its optimizer, and checkpoints of both steps."""
    model = tiny()
    optimizer = adamw(model, OptimConfig(lr=1e-2))
    (batch,) = val_batches(prepared(), BatchConfig(max_tokens_per_micro=10_000))
    for step in (1, 2):
        sft_step(model, batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpoint.save(tmp_path, step, model, optimizer, {"data": "x"})
    return model, optimizer, tmp_path


def test_load_gives_back_every_bit(trained):
    model, optimizer, folder = trained
    other = tiny(seed=5)
    fresh = adamw(other, OptimConfig(lr=1e-2))
    found = checkpoint.newest(folder)
    assert found.path.name == "step-00000002" and checkpoint.load(found, other, fresh) == 2
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(
            torch.equal(optimizer.state[a][k], fresh.state[b][k])
            for k in ("exp_avg", "exp_avg_sq", "step")
        )


DAMAGE = {
    "truncated": (
        lambda p: (p / "shard-0.safetensors").write_bytes(
            (p / "shard-0.safetensors").read_bytes()[:-9]
        ),
        "bytes instead of",
    ),
    "flipped": (
        lambda p: (p / "shard-0.safetensors").write_bytes(
            (p / "shard-0.safetensors").read_bytes()[:-1] + b"?"
        ),
        "hash",
    ),
    "missing shard": (
        lambda p: (p / "shard-0.safetensors").unlink(),
        "shard-0.safetensors is missing",
    ),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "torn manifest": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text()[:40]),
        "manifest.json is damaged",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_is_skipped_by_name(trained, kind):
    _, _, folder = trained
    harm, message = DAMAGE[kind]
    harm(folder / "step-00000002")
    found = checkpoint.newest(folder)
    assert found.path.name == "step-00000001"
    assert (
        len(found.damaged) == 1
        and "step-00000002" in found.damaged[0]
        and message in found.damaged[0]
    )


def test_none_whole_of_several_is_refused(trained):
    _, _, folder = trained
    for path in folder.glob("step-*"):
        DAMAGE["missing shard"][0](path)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoint.newest(folder)


def test_an_empty_folder_has_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "absent") is None


def test_stale_temporary_folders_are_ignored_and_removed(trained):
    model, optimizer, folder = trained
    shutil.copytree(folder / "step-00000002", folder / ".tmp-step-00000009")
    assert checkpoint.newest(folder).path.name == "step-00000002"
    checkpoint.save(folder, 3, model, optimizer, {})
    assert not list(folder.glob(".tmp*"))


def test_only_the_last_are_kept(trained):
    model, optimizer, folder = trained
    for step in (3, 4):
        checkpoint.save(folder, step, model, optimizer, {}, keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003", "step-00000004"]
    checkpoint.save(folder, 5, model, optimizer, {}, keep=0)
    assert len(list(folder.iterdir())) == 3


def test_no_room_leaves_the_earlier_ones(trained, monkeypatch):
    model, optimizer, folder = trained
    import safetensors.torch

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(folder, 3, model, optimizer, {})
    assert checkpoint.newest(folder).manifest["step"] == 2 and not list(folder.glob(".tmp*"))


def test_other_tensors_are_refused(trained):
    _, _, folder = trained
    found = checkpoint.newest(folder)
    wider = tiny(n_layer=3)
    with pytest.raises(ValueError, match="trains other tensors"):
        checkpoint.load(found, wider, adamw(wider, OptimConfig(lr=1e-3)))


def test_manifest_is_plain_json_and_nothing_is_pickled(trained):
    _, _, folder = trained
    names = {p.name for p in (folder / "step-00000002").iterdir()}
    assert names == {"manifest.json", "shard-0.safetensors"}
    manifest = json.loads((folder / "step-00000002" / "manifest.json").read_text())
    assert (
        manifest["step"] == 2
        and manifest["identity"] == {"data": "x"}
        and len(manifest["shards"][0]["sha256"]) == 64
    )
