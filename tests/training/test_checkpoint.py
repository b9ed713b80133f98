"""Checkpoints are whole or absent; damage is found, named and skipped."""

import json
import os
import shutil

import pytest
import torch
from small import prepared, sft_step, tiny

from ta.data.loader import val_batches
from ta.data.micro import BatchConfig
from ta.training import checkpoint
from ta.training.optim import OptimConfig, make_optimizer


@pytest.fixture
def trained(tmp_path):
    """A model after two steps, its optimizer, and checkpoints of both steps."""
    model = tiny()
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2))
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
    fresh = make_optimizer(other, OptimConfig(lr=1e-2))
    found = checkpoint.newest(folder)
    assert found.path.name == "step-00000002" and checkpoint.load(found, other, fresh) == 2
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(
            torch.equal(optimizer.state[a][k], fresh.state[b][k])
            for k in ("exp_avg", "exp_avg_sq", "step")
        )


def test_a_large_one_is_cut_into_files(trained, monkeypatch):
    """Each of about FILE_SIZE bytes; every bit comes back, and one file that is damaged is seen."""
    model, optimizer, folder = trained
    monkeypatch.setattr(checkpoint, "FILE_SIZE", 20_000)
    path = checkpoint.save(folder, 3, model, optimizer, {"data": "x"})
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(files) > 5 and files[0].startswith("shard-0") and "shard-0.safetensors" in files
    largest = max(p.numel() * 4 for p in model.parameters())
    assert max((path / file).stat().st_size for file in files) < 20_000 + largest + 5_000
    other = tiny(seed=5)
    fresh = make_optimizer(other, OptimConfig(lr=1e-2))
    assert checkpoint.load(checkpoint.newest(folder), other, fresh) == 3
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["exp_avg"], fresh.state[b]["exp_avg"])
    (path / files[3]).unlink()
    assert checkpoint.newest(folder).path.name == "step-00000002"


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
    assert found.damaged.keys() == {"step-00000002"} and message in found.damaged["step-00000002"]


def test_none_whole_of_several_is_refused(trained):
    _, _, folder = trained
    for path in folder.glob("step-*"):
        DAMAGE["missing shard"][0](path)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoint.newest(folder)


def test_an_empty_folder_has_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "absent") is None


def test_left_overs_of_a_kill_are_ignored_and_removed(trained):
    model, optimizer, folder = trained
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    host = os.uname().nodename
    for name in ("step-00000009", "step-00000003"):
        shutil.copytree(folder / "step-00000002", folder / f".{name}.{dead}@{host}.tmp")
    assert checkpoint.newest(folder).path.name == "step-00000002"
    checkpoint.save(folder, 3, model, optimizer, {})
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_written_again_and_never_counted(trained, kind):
    model, optimizer, folder = trained
    DAMAGE[kind][0](folder / "step-00000002")
    damaged = checkpoint.newest(folder).damaged
    (folder / "step-00000003").write_text("a file in the way")
    assert damaged.keys() == {"step-00000002"}
    for step in (2, 3, 4):
        checkpoint.save(folder, step, model, optimizer, {}, keep=3, damaged=damaged)
        found = checkpoint.newest(folder)
        whole = {p.name for p in folder.iterdir() if isinstance(checkpoint.read_manifest(p), dict)}
        assert found.manifest["step"] == max(step, 2) and f"step-{step:08d}" in whole
    assert sorted(whole) == ["step-00000002", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_between_goes_when_it_is_passed(trained, kind):
    """The run goes on from step 1 and saves at other steps."""
    model, optimizer, folder = trained
    DAMAGE[kind][0](folder / "step-00000002")
    damaged = checkpoint.newest(folder).damaged
    checkpoint.save(folder, 5, model, optimizer, {}, keep=2, damaged=damaged)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000001", "step-00000005"]


def test_what_a_newer_version_wrote_is_neither_read_nor_deleted(trained):
    model, optimizer, folder = trained
    path = folder / "step-00000002" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))
    found = checkpoint.newest(folder)
    assert found.damaged == {"step-00000002": "format 9, this version reads 2"}
    checkpoint.save(folder, 5, model, optimizer, {}, keep=1)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000005"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"step": 7}, "does not have its own hash"),
        (lambda m: {k: v for k, v in m.items() if k != "sha256"} | {"step": 7}, "is of step 7"),
        (lambda m: m | {"optimizer": {}}, "does not have its own hash"),
        (lambda m: [m], "is damaged"),
    ],
)
def test_a_manifest_is_not_believed_where_it_and_its_folder_differ(trained, change, message):
    _, _, folder = trained
    path = folder / "step-00000002" / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    found = checkpoint.newest(folder)
    assert found.manifest["step"] == 1 and message in found.damaged["step-00000002"]


def test_only_the_last_are_kept(trained):
    model, optimizer, folder = trained
    for step in (3, 4):
        checkpoint.save(folder, step, model, optimizer, {}, keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003", "step-00000004"]
    checkpoint.save(folder, 5, model, optimizer, {}, keep=0)
    assert len(list(folder.iterdir())) == 3


def test_no_room_leaves_the_earlier_ones(trained, monkeypatch):
    model, optimizer, folder = trained

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(folder, 3, model, optimizer, {})
    assert checkpoint.newest(folder).manifest["step"] == 2 and len(list(folder.iterdir())) == 2


def test_other_tensors_are_refused(trained):
    _, _, folder = trained
    found = checkpoint.newest(folder)
    wider = tiny(n_layer=3)
    with pytest.raises(ValueError, match="trains other tensors"):
        checkpoint.load(found, wider, make_optimizer(wider, OptimConfig(lr=1e-3)))


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
