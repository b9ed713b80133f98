"""Whose a run folder is: it is known by its config.json, and --overwrite deletes what a run writes there and no more."""

import json
import os

import pytest
from small import prepared, sft_step, tiny

from ta.data.loader import train_batches
from ta.data.micro import BatchConfig
from ta.files import hold_lock
from ta.training.loop import train
from ta.training.optim import OptimConfig, make_optimizer
from ta.training.run_folder import LoopConfig, Run, check_out


def trained(folder, steps=2, **more):
    """A finished run of `steps` steps in the folder."""
    model, optim = tiny(), OptimConfig(lr=1e-2)
    run = Run(LoopConfig(out=str(folder), log_every=1, **more))
    batches = train_batches(
        prepared(), BatchConfig(steps=steps, batch_size=8, max_tokens_per_micro=100)
    )
    train(run, model, batches, sft_step, make_optimizer(model, optim), optim)
    run.release()


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


FOREIGN = {
    "a model": {"config.json": '{"model_type": "llama"}', "notes.txt": "mine"},
    "checkpoints of another tool": {"checkpoints/epoch-1/model.bin": "x"},
    "a folder called final": {"final/thesis.txt": "x"},
    "lines called metrics": {"metrics.jsonl": '{"step": 1}\n'},
    "a torn config": {"config.json": '{"argv": ["sft"], "config"'},
    "a list": {"config.json": "[1]"},
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("how", ["overwrite", "resume", None])
def test_a_folder_that_is_not_ours_is_left_as_it_is(tmp_path, kind, how):
    for name, text in FOREIGN[kind].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="holds files that are no run"):
        trained(tmp_path, **({how: True} if how else {}))
    assert content(tmp_path) == before and not (tmp_path / ".lock").exists()


def test_overwrite_deletes_what_a_run_writes_and_keeps_the_rest(tmp_path, capsys):
    trained(tmp_path, steps=3)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "figures").mkdir()
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.safetensors").write_text("of the old run")
    with pytest.raises(ValueError, match="holds a finished run: give another folder, --resume"):
        trained(tmp_path)
    capsys.readouterr()
    trained(tmp_path, steps=2, overwrite=True)
    said = capsys.readouterr().err
    assert "does not write it: figures, notes.txt" in said
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "figures").is_dir()
    assert not (tmp_path / "final").exists()
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000002"]
    steps = [json.loads(line)["step"] for line in open(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2]


def test_left_overs_of_a_kill_do_not_bar_the_way_and_go(tmp_path):
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    host = os.uname().nodename
    (tmp_path / ".lock").touch()
    (tmp_path / f".config.json.{dead}@{host}.tmp").write_text("{")
    trained(tmp_path)
    (tmp_path / f".checkpoints.{dead}@{host}.tmp").mkdir()
    (tmp_path / f".final.{dead}@{host}.tmp").mkdir()
    (tmp_path / f".metrics.jsonl.{dead}@{host}.tmp").touch()
    kept = set((tmp_path / "checkpoints").iterdir())
    (tmp_path / "checkpoints" / f".step-00000001.{dead}@{host}.tmp").mkdir()
    trained(tmp_path, resume=True)
    assert set((tmp_path / "checkpoints").iterdir()) == kept
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".lock", "checkpoints", "config.json", "metrics.jsonl", "report.html"}


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    with hold_lock(tmp_path), pytest.raises(ValueError, match="is being written by another"):
        trained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    check_out(LoopConfig(out=str(tmp_path)))  # nothing is in the way
