"""Logging services, each run for real where its package is installed, offline, and read back from what it wrote."""

import json
import sqlite3
import zipfile

import pytest

from ta.training.trackers import TRACKERS, check_trackers, open_trackers

SAMPLES = [
    {"step": 1, "row": "0 0", "id": 7, "chat": [], "answer": "a | <b>\nc", "reward": 0.5},
    {"step": 1, "row": "1 0", "id": "x", "chat": [], "answer": "\x1b[2J", "reference": None},
]
ROWS = [["id", "answer", "reward", "reference"]]
ROWS += [["7", "a | <b>\nc", 0.5, None], ["x", "\\x1b[2J", None, None]]
FIGURES = [(1, {"loss": 2.5, "lr": 0.1}), (1, {"val_loss": 3.0}), (2, {"loss": 1.25, "lr": 0.2})]


def write(name, folder):
    pytest.importorskip(name)
    (log,) = open_trackers([name], folder, 0, {})
    for step, figures in FIGURES:
        log(step, figures, SAMPLES if "val_loss" in figures else [])


def test_a_service_that_is_not_installed_is_said_with_the_command(monkeypatch):
    monkeypatch.setattr("ta.training.trackers.find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(
            ValueError, match=f"--log {name}: the package is not installed: pip install {name}"
        ):
            check_trackers([name])


def test_tensorboard(tmp_path):
    write("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 1.25)]
    assert [(e.step, e.value) for e in events.Scalars("val_loss")] == [(1, 3.0)]
    (text,) = events.Tensors("samples/text_summary")[0].tensor_proto.string_val
    assert text.decode().split("\n")[2] == "| 7 | a \\| &lt;b&gt;<br>c | 0.5 | None |"


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path):
    """Stopped after step 7 with a checkpoint of step 4: what came after 4 is purged; the settings are there."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, steps in ((0, range(1, 8)), (4, range(5, 11))):
        (log,) = open_trackers(["tensorboard"], tmp_path, first, {"loop": {"out": "x"}})
        for step in steps:
            log(step, {"loss": float(step)}, [])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(n, n) for n in range(1, 11)]
    assert events.Tags()["tensors"] == ["config/text_summary"]


def test_wandb_goes_on_in_its_run(tmp_path, monkeypatch):
    """The id of the run and its settings stay through a resume; the project is the environment's."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name, value in (("PROJECT", "mine"), ("ENTITY", "us"), ("TAGS", "a,b"), ("NAME", "n")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    ids = []
    for first in (0, 1):
        (log,) = open_trackers(["wandb"], tmp_path, first, {"beta": 0.25})
        log(first + 1, {"loss": 1.0}, [])
        run = wandb.run
        named = run.project, run.entity, run.tags, run.name, run.config["beta"]
        ids.append((run.id, *named))
        wandb.finish()
    assert ids[0] == ids[1] and ids[0][1:] == ("mine", "us", ("a", "b"), "n", 0.25)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": ids[0][0]}


def test_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write("wandb", tmp_path)
    import wandb

    wandb.teardown()  # its file is whole when the service has ended
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert (
        b"val_loss" in file.read_bytes()
        and b"2.5" in file.read_bytes()
        and b"1.25" in file.read_bytes()
    )
    (file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*.json")
    table = json.loads(file.read_text())
    assert [table["columns"], *table["data"]] == ROWS


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    write("trackio", tmp_path)
    import trackio

    trackio.finish()
    (file,) = (tmp_path / "kept").glob("*.db")
    rows = sqlite3.connect(file).execute("select step, metrics from metrics order by id").fetchall()
    rows = [(step, json.loads(text)) for step, text in rows]
    table = rows[1][1].pop("samples")["_value"]
    assert rows == FIGURES and [list(table[0]), *(list(row.values()) for row in table)] == ROWS


def test_clearml(tmp_path, monkeypatch):
    clearml = pytest.importorskip("clearml")
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path / "kept"))
    clearml.Task.set_offline(True)
    write("clearml", tmp_path)
    task = clearml.Task.current_task()
    folder = task.get_offline_mode_folder()
    task.close()
    with zipfile.ZipFile(f"{folder}.zip") as kept:
        text = kept.read("metrics.jsonl").decode()
    events = [event for line in text.splitlines() for event in json.loads(line)]
    values = [
        (e["iter"], e["metric"], e["value"])
        for e in events
        if ":monitor" not in e["metric"] and "value" in e
    ]
    (table,) = [json.loads(e["plot_str"])["data"][0] for e in events if "plot_str" in e]
    columns = [table["header"]["values"], *zip(*table["cells"]["values"], strict=True)]
    assert [list(row) for row in columns] == ROWS
    assert values == [
        (step, name, value) for step, figures in FIGURES for name, value in figures.items()
    ]
