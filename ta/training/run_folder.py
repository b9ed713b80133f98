"""The run folder: its lock, its settings, and one JSON object for each logged step."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from ta import parallel
from ta.command_line import Range, check_config
from ta.files import (
    ASIDE,
    clean_inside,
    clean_up,
    foreign,
    hold_lock,
    is_ours,
    json_text,
    keep_inputs,
    read_json_lines,
    remove_whole,
    write_atomic,
    write_jsonl,
)
from ta.flags import changed_settings, command_of
from ta.folders import fingerprint, resolve
from ta.model.settings import check_quantize
from ta.printable import masked
from ta.training.progress import Figures
from ta.training.trackers import check_trackers

# what steps leave in a run's folder
OF_STEPS = ("checkpoints", "final", "non_finite.jsonl", "rollouts")
# what a run writes into its folder; config.json has MARKS, by which the folder is known as ours, so
# it is the first that is written and none goes without being written anew
RUN_NAMES = (
    *OF_STEPS,
    *("metrics.jsonl", "samples.jsonl", "drops.jsonl", "report.html"),
    *("weights", "tensorboard", "wandb", "trackers.json", "config.json"),
)
MARKS = ("config", "versions", "identity")

Json = dict[str, Any]  # an object of JSON


def read_settings(folder: Path) -> Json:
    """The object of config.json; {} where there is none."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def truncate_log(path: Path, step: int, evaluated: bool = True) -> None:
    """Drop logged objects of steps after `step`, so that a resumed run logs no step twice.

    Where the evaluation of `step` was not finished, all of that step goes but its rollouts.
    """

    def stays(record: Json) -> bool:
        at = record.get("step", 0)
        return at < step or (at == step and (evaluated or "round" in record))

    if path.exists():
        write_jsonl(path, [record for record in read_json_lines(path) if stays(record)])


@dataclass(frozen=True)
class LoopConfig:
    out: str = "runs/run"
    """Run folder: settings, metrics, samples, checkpoints and the export in OUT/final."""
    save_every: Annotated[int, Range(0)] = 0
    """Steps between checkpoints; 0 saves at a stop and at the end only."""
    keep: Annotated[int, Range(0)] = 2
    """Checkpoints to keep; 0 keeps all."""
    eval_every: Annotated[int | None, Range(0)] = None
    """Steps between evaluations; 0 evaluates before and after training only. Default: a tenth of
    the steps, and at least 20."""
    keep_best: str = ""
    """Figure of the evaluations, such as loss or accuracy, by which the best checkpoint is kept,
    whatever --keep says, and exported in place of the last one."""
    best_is: Literal["auto", "lower", "higher"] = "auto"
    """Which value of --keep-best is better; auto is lower for losses, perplexities and distances
    (kl), else higher."""
    patience: Annotated[int, Range(0)] = 0
    """Evaluations without a better --keep-best after which training ends; 0 goes on to the last
    step."""
    log_every: Annotated[int, Range(1)] = 10
    """Steps between lines of metrics.jsonl."""
    resume: bool = False
    """Go on from the newest whole checkpoint in --out."""
    allow_change: tuple[str, ...] = ()
    """Settings that may differ from the checkpoint's on --resume, such as lr; any other difference
    is refused."""
    overwrite: bool = False
    """Delete the run that --out holds and start anew."""
    dry_run: bool = False
    """Open data and model, print parameters, steps and memory by part, write nothing and end."""
    model_card: bool = True
    """Write README.md into the export: what the model is and how it came to be."""
    log: tuple[Literal["tensorboard", "wandb", "trackio", "clearml"], ...] = ()
    """Services that get figures, settings and samples too; project, name, entity and tags are in
    their own environment: WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY, WANDB_TAGS, TRACKIO_PROJECT,
    CLEARML_PROJECT, CLEARML_TASK, CLEARML_TAGS."""


@dataclass
class Run:
    """A training run: its folder, its device, and the settings that it was started with."""

    loop: LoopConfig
    device: str = "cpu"
    # the recipe's config, for config.json and for the comparison on a resume
    config: Any = None
    seed: int = 0
    # the day it began, YYYY-MM-DD: chat templates that write the date keep it on a resume
    day: str = ""
    # folder below which the pictures of its records lie, for the report
    pictures: str = ""
    lock: Any = field(default=None, repr=False)
    # whether this process has written config.json
    recorded: bool = field(default=False, repr=False)

    @property
    def folder(self) -> Path:
        return Path(self.loop.out)

    def settings(self) -> Json:
        """The recipe's config as JSON values, secrets masked."""
        return masked(dataclasses.asdict(self.config)) if self.config else {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, take its lock (rank 0), and delete the run that it holds if asked to.

        An error inside removes the folder of a run without a step, and a stop gives the lock back;
        else it is held for the export. ValueError where another process writes the folder or where
        it holds files that must not be overwritten.
        """
        if self.lock is None:
            self.lock = parallel.on_rank_zero(self._open)
        try:
            yield
        except ValueError:
            self.forget()
            raise
        except SystemExit:
            self.release()
            raise

    def _open(self) -> Any:
        check_out(self.loop)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = hold_lock(self.folder)
        check_out(self.loop)  # no other process has written it meanwhile
        for name in RUN_NAMES:
            clean_up(self.folder / name)
        for name in ("checkpoints", "rollouts"):
            clean_inside(self.folder / name)
        if self.loop.overwrite:
            for name in RUN_NAMES[:-1]:
                remove_whole(self.folder / name)
            if others := foreign(self.folder, RUN_NAMES):
                names = ", ".join(path.name for path in others)
                parallel.say(f"kept in {self.folder}, as a run does not write it: {names}")
        return lock

    def record(self, key: Json, records: Json) -> None:
        """Write config.json (rank 0); `key` holds the settings that must not differ on a resume,
        and `records` says what there is to learn from.

        No other file may be written before: by this one a folder is known as ours.
        """
        if parallel.rank():
            return
        config = self.config
        about = {
            "command": config and command_of(config),
            "config": self.settings(),
            "changed": sorted(changed_settings(config)) if config else [],
            "versions": versions(),
            "identity": key,
            "records": records,
            "pictures": self.pictures,
            "machine": parallel.machine(),
            "day": self.day,
        }
        write_atomic(self.folder / "config.json", json_text(about, indent=1, ensure_ascii=False))
        self.recorded = True

    def forget(self) -> None:
        """Remove the folder of a run that keeps nothing of a step.

        It holds settings, drops and the evaluation before training, which a new run makes again.
        """
        opening = {".lock", *RUN_NAMES} - set(OF_STEPS)
        holder = self.recorded and self.lock is not None and self.folder.is_dir()
        if holder and {path.name for path in self.folder.iterdir()} <= opening:
            stepped = any(record["step"] for record in read_metrics(self.folder))
            if not stepped:
                shutil.rmtree(self.folder)
        self.release()

    def release(self) -> None:
        """Release the lock of a run that ends before its export."""
        if parallel.rank() == 0 and self.lock is not None:
            self.lock.close()
        self.lock = None


def check_held_out(config: Any) -> None:
    """ValueError for settings of evaluation in a run without held-out data, where they do nothing.

    A run without any data of its own has built-in data, held-out records too.
    """
    loop, data = config.loop, getattr(config, "data", None)
    if loop.patience and not loop.keep_best:
        raise ValueError("--patience waits for a better figure: name it in --keep-best")
    if loop.best_is != "auto" and not loop.keep_best:
        raise ValueError(f"--best-is {loop.best_is} says nothing without --keep-best FIGURE")
    samples = getattr(getattr(config, "samples", None), "samples_data", ())
    if not getattr(data, "data", ()) or data.val_data or samples:
        return
    for name in ("eval_every", "keep_best", "patience"):
        if value := getattr(loop, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} {value} without held-out data has nothing to evaluate: give --val-data, "
                f"or leave {flag} out"
            )


def best_step(folder: Path, loop: LoopConfig) -> tuple[int | None, int]:
    """(step of the best evaluation that is logged, evaluations since); None where none is logged.

    It is a function of metrics.jsonl, so that a resumed run goes on as the first one would have.
    Of equal values the first is the best, and one that is not finite is none. ValueError where the
    evaluations lack the figure.
    """
    name, logged = loop.keep_best, evaluations(folder)
    values = {step: figures[name] for step, figures in logged.items() if name in figures}
    if logged and not values:
        *_, last = logged.values()
        raise ValueError(f"--keep-best {name}: the evaluations give {', '.join(last)}; name one")
    finite = [step for step, value in values.items() if math.isfinite(value)]
    if not finite:
        return None, 0
    lower = loop.best_is == "lower"
    if loop.best_is == "auto":
        lower = name.startswith(("loss", "perplexity", "kl"))
    best = (min if lower else max)(finite, key=values.get)
    return best, len(values) - 1 - list(values).index(best)


def evaluations(folder: Path) -> dict[int, Figures]:
    """{step: its figures of held-out records} of metrics.jsonl."""
    logged: dict[int, Figures] = {}
    for record in read_metrics(folder):
        for key, value in record.items():
            if key.startswith("val_"):
                logged.setdefault(record["step"], {})[key.removeprefix("val_")] = value
    return logged


def read_metrics(folder: Path) -> list[Figures]:
    """The objects of metrics.jsonl, with nan for null, as which figures that are not finite stand.

    None where there is no file.
    """
    records = read_json_lines(folder / "metrics.jsonl")
    return [{k: math.nan if v is None else v for k, v in record.items()} for record in records]


def start_run(config: Any) -> Run:
    """The run of a recipe's config, checked; nothing is written yet.

    It reads the groups loop, model, adapter, compute and batches, joins the process group under
    torchrun and picks this process's device. ValueError where --out holds something else, where a
    service of --log is not installed, or where --quantize cannot work.
    """
    check_config(config)
    loop = config.loop
    check_held_out(config)
    sources = resolve(config.model)
    keep_inputs(loop.out, sources)
    adapted = config.adapter.adapter != "none" or sources.adapter is not None
    check_quantize(config.compute.quantize, adapted, parallel.world())
    device = parallel.init()
    if config.model.model_path.startswith("builtin"):
        parallel.one_thread()
    check_out(loop)
    check_trackers(loop.log)
    day = parallel.gather_objects(first_day(loop))[0]
    return Run(loop, device, config, config.batches.seed, day)


def first_day(loop: LoopConfig) -> str:
    """The day (YYYY-MM-DD) on which a run that is resumed began, else today."""
    began = read_settings(Path(loop.out)).get("day") if loop.resume else ""
    return began or date.today().isoformat()


def check_out(loop: LoopConfig) -> None:
    """ValueError where the run folder must not be written."""
    out, folder = loop.out, Path(loop.out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    if loop.resume and loop.overwrite:
        raise ValueError(
            "--resume goes on with a run and --overwrite deletes it: give one of the two"
        )
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    # a killed process may have left its lock and files that it had not finished
    held = [name for name in names if name != ".lock" and not ASIDE.fullmatch(name)]
    if held and not is_ours(folder, "config.json", MARKS):
        raise ValueError(
            f"--out {out} holds files that are no run ({', '.join(held[:3])}): give a new folder"
        )
    if held and not (loop.resume or loop.overwrite):
        state = "a finished run" if "final" in held else "an unfinished run"
        raise ValueError(
            f"--out {out} holds {state}: give another folder, --resume to go on, "
            "or --overwrite to start anew"
        )


# groups of settings that a resume does not compare one by one: they are compared by content (data,
# model, media, index) or by name below, or they change no result
COMPARED_OTHERWISE = [
    "batches",
    "chat",
    "compute",
    "context",
    "data",
    "loop",
    "media",
    "model",
    "optim",
    "retrieval",
    "samples",
    "tokenizer",
]


def identity_of(run: Run, batches: Any, optimizer: Any, optim: Any, more: Json) -> dict:
    """Settings that must not differ when a run resumes: data, model, steps, optimizer, method.

    The method's settings are all fields of the recipe's own config and of its groups that are not
    in COMPARED_OTHERWISE. `more` adds to these, and its values win.
    """
    key = {"data": batches.prepared.info["fingerprint"]}
    config = run.config
    if config is not None:
        model, sources = config.model, resolve(config.model)
        key |= {
            "model": fingerprint(sources.base, model.hub),
            "adapter_path": model.adapter_path,
            "adapter_content": sources.adapter and fingerprint(sources.adapter),
            "dtype": model.dtype,
            "model_args": masked(model.model_args),
            "quantize": config.compute.quantize,
        }
        for name, value in vars(config).items():
            if not dataclasses.is_dataclass(value):
                key[name] = value
            elif name not in COMPARED_OTHERWISE:
                key |= dataclasses.asdict(value)
    key |= {"steps": batches.steps, "batch_size": batches.batch_size, "seed": batches.seed}
    plain = (bool, int, float, str, tuple, list)
    settings = {k: v for k, v in optimizer.defaults.items() if isinstance(v, plain) and k != "lr"}
    # float32, the default of --weights, stands in no older key
    key |= {k: v for k, v in dataclasses.asdict(optim).items() if v != "float32"}
    key |= {"optimizer": type(optimizer).__name__, "optimizer_settings": settings, **more}
    return {name: value for name, value in key.items() if value is not None}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": sys.version.split()[0]}
    for name in ("ta", "torch", "transformers", "peft", "tokenizers"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out
