"""Services that get the logged figures.

The function of each gets the folder, the step after which the run goes on, its config and, where it
goes on, the service's name of the run. It returns `write(step, figures, samples)`, where samples
are the lines of samples.jsonl of the step's evaluation, and that name.

A resumed run goes on in the service's own run, whose name stands in trackers.json of the folder.
Project, name, entity and tags are read from the service's own environment, such as WANDB_PROJECT,
WANDB_NAME, WANDB_ENTITY and WANDB_TAGS, or CLEARML_PROJECT, CLEARML_TASK and CLEARML_TAGS; without
them the project is ta and the name the folder's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from ta.files import json_text, write_atomic
from ta.printable import markdown_table, printable
from ta.training.progress import Figures

Write = Callable[[int, Figures, Sequence[dict]], None]
Settings = Mapping[str, Any]
Started = tuple[Write, str | None]


def tensorboard(folder: Path, first: int, config: Settings, _: str | None) -> Started:
    """Event files in the run folder; what an interrupted run wrote after step `first` is purged."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1 if first else None)
    if not first:
        writer.add_text("config", "    " + json.dumps(config, indent=1).replace("\n", "\n    "))

    def write(step: int, figures: Figures, samples: Sequence[dict]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        if samples:
            writer.add_text("samples", markdown_table(*sample_rows(samples)), step)
        writer.flush()

    return write, None


def wandb(folder: Path, first: int, config: Settings, known: str | None) -> Started:
    """A Weights & Biases run; WANDB_MODE=offline keeps it local."""
    import wandb as service

    run = service.init(
        project=os.environ.get("WANDB_PROJECT", "ta"),
        name=os.environ.get("WANDB_NAME", folder.name),
        dir=str(folder),
        config=dict(config),
        id=known,
        resume="allow" if first else None,
    )
    return _with_table(run, service.Table), run.id


def trackio(folder: Path, first: int, config: Settings, known: str | None) -> Started:
    """A Trackio run, kept on this machine."""
    import trackio as service

    run = service.init(
        project=os.environ.get("TRACKIO_PROJECT", "ta"),
        name=known or folder.name,
        config=dict(config),
        resume="allow" if first else "never",
    )
    return _with_table(run, service.Table), run.name


def _with_table(run: Any, table: Callable) -> Write:
    def write(step: int, figures: Figures, samples: Sequence[dict]) -> None:
        shown = {"samples": table(*sample_rows(samples))} if samples else {}
        run.log(figures | shown, step=step)

    return write


def clearml(folder: Path, _: int, config: Settings, known: str | None) -> Started:
    """A ClearML task."""
    from clearml import Task

    task = Task.init(
        project_name=os.environ.get("CLEARML_PROJECT", "ta"),
        task_name=os.environ.get("CLEARML_TASK", folder.name),
        tags=[tag for tag in os.environ.get("CLEARML_TAGS", "").split(",") if tag],
        continue_last_task=known or False,
    )
    task.connect_configuration(dict(config), name="config")
    logger = task.get_logger()

    def write(step: int, figures: Figures, samples: Sequence[dict]) -> None:
        for name, value in figures.items():
            logger.report_scalar(name, name, value, step)
        if samples:
            names, rows = sample_rows(samples)
            logger.report_table("samples", "samples", step, [names, *rows])

    return write, task.id


def sample_rows(samples: Sequence[dict]) -> tuple[list[str], list[list]]:
    """The names of the fields of samples, and their values in a row each: text, numbers or None."""
    names = [name for name in dict.fromkeys(chain(*samples)) if name not in ("step", "row", "chat")]
    rows = [[sample.get(name) for name in names] for sample in samples]
    plain = (float, type(None))
    return names, [[x if isinstance(x, plain) else printable(str(x)) for x in row] for row in rows]


TRACKERS: dict[str, Callable[..., Started]] = {
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


def open_trackers(names: Sequence[str], folder: Path, first: int, config: Settings) -> list[Write]:
    """The write functions of the services in `names`, for a run that goes on after step `first`."""
    path, writers = folder / "trackers.json", []
    known = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        earlier = known.get(name) if first else None
        write, own = TRACKERS[name](folder, first, config, earlier)
        writers.append(write)
        if own:
            known[name] = own
            write_atomic(path, json_text(known))
    return writers
