"""Fine-tuned built-in models, from which methods start without --model-path.

They are made once, in the cache, by recipes/sft.py in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ta import parallel
from ta.builtin.data_files import data_or_builtin, passages_file
from ta.builtin.model_folders import (
    BEGUN,
    READER,
    SMALL,
    TUNED,
    WORDY,
    tuned_folder,
    written,
)
from ta.builtin.models import TINY_BATCH, TINY_LR, TINY_STEPS
from ta.recipe_files import PACKAGE, RECIPES


class FineTuning(NamedTuple):
    """How a built-in model is fine-tuned before a method starts from it."""

    # --model-path
    base: str
    # the kind of built-in records
    records: str
    steps: int
    # for the user
    description: str
    batch_size: int = TINY_BATCH
    lr: float = TINY_LR


FINE_TUNINGS = {
    TUNED: FineTuning("builtin", "chats", TINY_STEPS, "the built-in model on built-in chats"),
    WORDY: FineTuning(
        TUNED,
        "wordy",
        150,
        'that model on chats whose answers are mostly wordy ("5, of course!")',
        16,
        3e-4,
    ),
    BEGUN: FineTuning(
        "builtin", "chats", 350, "the built-in model on a quarter of the built-in chats"
    ),
    READER: FineTuning(
        SMALL, "readings", 150, "a small built-in model on questions with their passages", 32, 3e-3
    ),
}


def train_builtin_first(config: Any, name: str = TUNED, flag: str = "--model-path") -> Any:
    """The config, with a fine-tuned built-in model in place of the random one.

    Preferences among answers need a model that answers; passages need a model that reads them. A
    config whose model is given, by `flag`, is returned unchanged.
    """
    if config.model.model_path != "builtin":
        return config
    parallel.init()
    if parallel.gather_objects(not tuned_folder(name).exists())[0]:
        parallel.on_rank_zero(lambda: fine_tune(name))
    parallel.say(f"no {flag}: starting from the fine-tuned built-in model in {tuned_folder(name)}")
    return replace(config, model=replace(config.model, model_path=name))


def prefer_trained_builtin(config: Any) -> Any:
    """The config, with the fine-tuned built-in model in place of the random one, if there is one.

    Otherwise a line says that the answers of the random one mean nothing.
    """
    if config.model.model_path != "builtin":
        return config
    if not tuned_folder(TUNED).exists():
        parallel.say(
            "no --model-path: the built-in model has learned nothing, so its answers mean nothing; "
            "train one with recipes/sft.py and give --model-path runs/sft"
        )
        return config
    parallel.say(f"no --model-path: the fine-tuned built-in model in {tuned_folder(TUNED)} answers")
    return replace(config, model=replace(config.model, model_path=TUNED))


def fine_tune(name: str = TUNED) -> None:
    """Train a built-in model into the cache, and first the one that it starts from.

    This runs `python recipes/sft.py` in a process of its own. ValueError where that fails.
    """
    folder, tuning = tuned_folder(name), FINE_TUNINGS[name]
    if tuning.base in FINE_TUNINGS and not tuned_folder(tuning.base).exists():
        fine_tune(tuning.base)
    steps = tuning.steps
    parallel.say(f"no --model-path: fine-tuning {tuning.description} first, once ({steps} steps)")
    files, _ = data_or_builtin((), (), tuning.records)
    flags = ("--model-path", tuning.base, "--data", *files, "--steps", steps)
    flags += ("--batch-size", tuning.batch_size, "--lr", tuning.lr, "--log-every", steps)
    _made(folder.name, "sft", *flags)


def builtin_index() -> Path:
    """The index of the built-in passages by the built-in encoder; it is built once."""
    return _made("index", "build_index", "--passages", passages_file())


def _made(name: str, recipe: str, *flags: object) -> Path:
    """The built-in folder of that name; where it is not there, a recipe makes it."""

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as place:
            out = Path(place, "out")
            _run(recipe, *flags, "--out", out)
            made = out / "final" if (out / "final").exists() else out
            shutil.copytree(made, folder, dirs_exist_ok=True)

    return written(name, make)


def _run(recipe: str, *flags: object) -> None:
    """Run a recipe on one process; ValueError where it fails."""
    alone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in alone}
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), *sys.path])
    command = [sys.executable, str(RECIPES / f"{recipe}.py"), *map(str, flags)]
    done = subprocess.run(command, env=environment, stdout=sys.stderr)
    if done.returncode:
        raise ValueError(f"{recipe}.py, which makes a built-in part, ended with {done.returncode}")
