"""Services that get the logged figures.

The function of each returns `write(step, figures, samples)`, where samples are the lines of
samples.jsonl of the step's evaluation.

A resumed run goes on in the service's own run, whose name stands in trackers.json of the folder.
Project, name, entity and tags are read from the service's own environment, such as WANDB_PROJECT,
WANDB_NAME, WANDB_ENTITY and WANDB_TAGS, or CLEARML_PROJECT, CLEARML_TASK and CLEARML_TAGS; without
them the project is ta and the name the folder's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ta.files import write_atomic
from ta.printable import printable

Write = Callable[[int, dict[str, float], Sequence[dict]], None]
IDS = "trackers.json"


def tensorboard(folder: Path, first: int, config: Mapping[str, Any]) -> Write:
    """Event files in the run folder; what an interrupted run wrote after step `first` is purged."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1 if first else None)
    if not first:
        writer.add_text("config", "    " + json.dumps(config, indent=1).replace("\n", "\n    "))

    def write(step: int, figures: dict[str, float], samples: Sequence[dict]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        if samples:
            names, rows = sample_rows(samples)
            lines = [names, ["---"] * len(names), *rows]
            shown = [
                [escape(str(x)).replace("\n", "<br>").replace("|", "\\|") for x in y] for y in lines
            ]
            writer.add_text("samples", "\n".join(f"| {' | '.join(line)} |" for line in shown), step)
        writer.flush()

    return write


def wandb(folder: Path, first: int, config: Mapping[str, Any]) -> Write:
    """A Weights & Biases run; WANDB_MODE=offline keeps it local."""
    import wandb as service

    run = service.init(
        project=os.environ.get("WANDB_PROJECT", "ta"),
        name=os.environ.get("WANDB_NAME", folder.name),
        dir=str(folder),
        config=dict(config),
        id=_id(folder, "wandb", first),
        resume="allow" if first else None,
    )
    _keep(folder, "wandb", run.id)
    return _with_table(run, service.Table)


def trackio(folder: Path, first: int, config: Mapping[str, Any]) -> Write:
    """A Trackio run, kept on this machine."""
    import trackio as service

    run = service.init(
        project=os.environ.get("TRACKIO_PROJECT", "ta"),
        name=_id(folder, "trackio", first) or folder.name,
        config=dict(config),
        resume="allow" if first else "never",
    )
    _keep(folder, "trackio", run.name)
    return _with_table(run, service.Table)


def _with_table(run: Any, table: Callable) -> Write:
    def write(step: int, figures: dict[str, float], samples: Sequence[dict]) -> None:
        shown = {"samples": table(*sample_rows(samples))} if samples else {}
        run.log(figures | shown, step=step)

    return write


def clearml(folder: Path, first: int, config: Mapping[str, Any]) -> Write:
    """A ClearML task."""
    from clearml import Task

    task = Task.init(
        project_name=os.environ.get("CLEARML_PROJECT", "ta"),
        task_name=os.environ.get("CLEARML_TASK", folder.name),
        tags=[tag for tag in os.environ.get("CLEARML_TAGS", "").split(",") if tag],
        continue_last_task=_id(folder, "clearml", first) or False,
    )
    task.connect_configuration(dict(config), name="config")
    _keep(folder, "clearml", task.id)
    logger = task.get_logger()

    def write(step: int, figures: dict[str, float], samples: Sequence[dict]) -> None:
        for name, value in figures.items():
            logger.report_scalar(name, name, value, step)
        if samples:
            names, rows = sample_rows(samples)
            logger.report_table("samples", "samples", step, [names, *rows])

    return write


def sample_rows(samples: Sequence[dict]) -> tuple[list[str], list[list]]:
    """The names of the fields of samples, and their values in a row each: text, numbers or None."""
    names = dict.fromkeys(key for sample in samples for key in sample)
    names = [key for key in names if key not in ("step", "row", "chat")]
    values = [[sample.get(name) for name in names] for sample in samples]
    plain = (float, type(None))
    return names, [
        [x if isinstance(x, plain) else printable(str(x)) for x in row] for row in values
    ]


def _id(folder: Path, service: str, first: int) -> str | None:
    """The service's name of the run that is resumed; None of a new one."""
    path = folder / IDS
    return json.loads(path.read_text()).get(service) if first and path.exists() else None


def _keep(folder: Path, service: str, name: str) -> None:
    path = folder / IDS
    ids = json.loads(path.read_text()) if path.exists() else {}
    write_atomic(path, json.dumps(ids | {service: name}))


TRACKERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Write]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "trackio": trackio,
    "clearml": clearml,
}


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for a service whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"--log {name}: the package is not installed: pip install {name}")


def open_trackers(
    names: Sequence[str], folder: Path, first: int = 0, config: Mapping[str, Any] | None = None
) -> list[Write]:
    """The write functions of the services in `names`, for a run that goes on after step `first`."""
    return [TRACKERS[name](folder, first, config or {}) for name in names]
