"""Services that get the logged figures; the function of each returns `write(step, figures)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

Write = Callable[[int, dict[str, float]], None]


def tensorboard(folder: Path) -> Write:
    """Event files in the run folder."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def wandb(folder: Path) -> Write:
    """A Weights & Biases run named after the folder; WANDB_MODE=offline keeps it local."""
    import wandb as service

    run = service.init(project="ta", name=folder.name, dir=str(folder))
    return lambda step, figures: run.log(figures, step=step)


def trackio(folder: Path) -> Write:
    """A Trackio run named after the folder, kept on this machine."""
    import trackio as service

    run = service.init(project="ta", name=folder.name)
    return lambda step, figures: run.log(figures, step=step)


def clearml(folder: Path) -> Write:
    """A ClearML task named after the folder."""
    from clearml import Task

    logger = Task.init(project_name="ta", task_name=folder.name).get_logger()

    def write(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            logger.report_scalar(name, name, value, step)

    return write


TRACKERS: dict[str, Callable[[Path], Write]] = {
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


def open_trackers(names: Sequence[str], folder: Path) -> list[Write]:
    """The write functions of the services in `names`."""
    return [TRACKERS[name](folder) for name in names]
