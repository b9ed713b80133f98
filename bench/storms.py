"""Are answers, scores, caches, indexes, merged models, figures and runs the same after any kill?

    python bench/storms.py --trials 30 --training 50

A trial starts a command in an empty folder, kills it up to three times with SIGKILL, at a random
moment or at a random one of its calls that write, and starts it again until it ends. Every byte of
the output must be that of an undisturbed run; logs of training are compared without times. Two at
once: a second process starts beside the first; one is refused in a line, or both end. A full disk:
no file may grow over a random size; the command ends with one line, and goes on without the limit.

Of the undisturbed run every sync and rename is looked at: what gets a name is on the disk before,
the name after. Commands run in forks of a process that has imported torch, so a start costs tenths
of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":  # in place of bench, whose tokenize.py hides python's own
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
CALLS = ("fsync", "rename", "replace", "unlink", "mkdir")  # of module os
APPENDED = ("metrics.jsonl", "samples.jsonl")  # logs, which no rename publishes
TIMES = re.compile(  # values in JSON that time passes into
    rb'"(\w*second\w*|memory_gb|logged|sha256|\w+_stamp)": '
    rb"(\[[^]]*\]|\{[^}]*\}|[^,}\n]*)"
)
KINDS = ("kill -9, any moment", "kill -9, at a write", "two at once", "full disk")


def write_inputs(folder: Path) -> None:
    """A tiny model, a reward model, an adapter, an encoder, chats, answers, passages, pictures."""
    import torch
    from peft import LoraConfig, get_peft_model
    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from ta.builtin import models, tasks
    from ta.builtin.tasks import chats

    folder.mkdir()
    models.write_tiny(folder / "model")
    models.write_encoder(folder / "encoder")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    settings = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(folder / "adapter")
    shutil.copytree(folder / "model", folder / "rm")
    head = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    head.save_pretrained(folder / "rm")
    tasks.write_jsonl(folder / "chats.jsonl", chats("held_out", 24))
    tasks.write_jsonl(folder / "candidates.jsonl", tasks.candidates("held_out", 24))
    tasks.write_jsonl(folder / "passages.jsonl", tasks.passages()[:60])
    answers = ({"id": i, "answer": str(i % 3), "reference": "1"} for i in range(24))
    tasks.write_jsonl(folder / "answers.jsonl", answers)
    (folder / "pictures").mkdir()
    for i in range(24):
        Image.new("RGB", (32, 32), (10 * i, 0, 255 - 10 * i)).save(folder / "pictures" / f"{i}.png")


class Command(NamedTuple):
    """A recipe, the name of its output, its flags, and the flag with which it goes on."""

    recipe: str
    output: str
    flags: tuple
    go_on: tuple = ()


def commands(given: Path) -> dict[str, Command]:
    """The commands that the storms meet, by name."""
    model = ("--model-path", given / "model")
    chats = ("--data", given / "chats.jsonl")
    training = (
        *(*model, *chats, "--val-data", given / "chats.jsonl", "--steps", 6, "--batch-size", 4),
        *("--save-every", 2, "--eval-every", 3, "--log-every", 2, "--sample-records", 3),
        *("--sample-max-new-tokens", 4, "--no-model-card"),
    )
    scored = ("--model-path", given / "rm", "--data", given / "candidates.jsonl")
    pictures = ("--root", given / "pictures", "--workers", 0, "--batch-size", 4)
    passages = ("--passages", given / "passages.jsonl", "--encoder-path", given / "encoder")
    answers = ("--answers", given / "answers.jsonl", "--metrics", "accuracy", "rouge_l")
    answering = ("--max-new-tokens", 8, "--slots", 5)
    again = ("--resume",)
    every = (
        Command("generate", "a.jsonl", (*model, *chats, *answering), again),
        Command("score", "s.jsonl", scored, again),
        Command("preprocess_images", "c.safetensors", pictures),
        Command("build_index", "index", passages, again),
        Command("merge", "merged", ("--model-path", given / "adapter")),
        Command("evaluate", "e.json", answers),
        Command("sft", "run", training, again),
    )
    return {command.recipe: command for command in every}


class Started(NamedTuple):
    """A process, and the end of a pipe where it says what it says."""

    pid: int
    said: int

    def end(self) -> tuple[int, str]:
        """Its exit code (negative: the signal that killed it) and what it said."""
        with open(self.said, "rb") as file:
            text = file.read().decode(errors="replace")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), text


def start(work: Callable[[], object], before: Callable[[], None] = lambda: None) -> Started:
    """A fork that does `before`, then `work`, in at most five minutes."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        return Started(pid, reading)
    code = 99
    try:
        os.dup2(writing, 1), os.dup2(writing, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        signal.alarm(300)
        before()
        work()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(code)


def command(recipe: str, *flags: object) -> Callable[[], None]:
    """What runs a recipe as its command does."""
    import judged
    from conftest import settings_of

    from ta.command_line import cli

    module = judged.recipe(recipe)
    return partial(cli, module.main, settings_of(module), [str(flag) for flag in flags])


def on_calls(before: Callable[[str, tuple], None]) -> None:
    """Have before(name, arguments) called ahead of each of CALLS."""

    def patch(name: str, real: Callable) -> None:
        def call(*given, **more):
            before(name, given)
            return real(*given, **more)

        setattr(os, name, call)

    for name in CALLS:
        patch(name, getattr(os, name))


def dying_at(count: int) -> Callable[[], None]:
    """Makes a process kill itself at its count-th call of CALLS."""
    left = iter(range(count))

    def die(name: str, given: tuple) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return partial(on_calls, die)


def watched(log: Path) -> Callable[[], None]:
    """Makes a process write its calls of CALLS to `log`: what it syncs, and all that it renames."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def state(path: str | Path | int) -> tuple[int, int]:
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns

    def tell(name: str, given: tuple) -> None:
        told = ()
        if name == "fsync":
            told = state(given[0])
        elif name in ("rename", "replace"):
            old, new = map(Path, given)
            moved = [state(path) for path in (old, *old.rglob("*"))]
            told = str(new), moved, new.parent.stat().st_ino
        os.write(file, json.dumps([name, *told]).encode() + b"\n")

    return partial(on_calls, tell)


def not_durable(log: Path, out: Path) -> list[str]:
    """What was named before it was on the disk, names that were not brought there, and files of
    `out` that no rename published and no sync brought there.
    """
    from ta.files import ASIDE

    synced, named, waiting, wrong = {}, set(), {}, []
    for name, *told in map(json.loads, log.read_text().splitlines()):
        if name == "fsync":
            inode, changed = told
            synced[inode] = changed
            waiting.pop(inode, None)
        elif name in ("rename", "replace") and not ASIDE.fullmatch(Path(told[0]).name):
            target, states, parent = told
            named |= {inode for inode, _ in states}
            waiting[parent] = target
            if any(synced.get(inode) != changed for inode, changed in states):
                wrong.append(f"{target} has its name before it is on the disk")
    wrong += [f"the name {target} is not on the disk" for target in waiting.values()]
    for path in (out, *out.rglob("*")):
        found = path.stat()
        written = found.st_ino in named or synced.get(found.st_ino) == found.st_mtime_ns
        if path.is_file() and path.name not in (*APPENDED, ".lock") and not written:
            wrong.append(f"{path} is written in place")
    return wrong


def outcome(out: Path) -> dict[str, object]:
    """{file: bytes}; of logs and manifests without what tells times, of settings the name."""
    paths = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    found: dict[str, object] = {"left over": [p.name for p in out.parent.iterdir() if p != out]}
    for path in paths:
        content = path.read_bytes()
        if path.name in (".lock", "report.html") or path == out / "config.json":
            content = b""
        elif path.name in ("metrics.jsonl", "manifest.json"):
            content = TIMES.sub(b"", content)
        found[str(path.relative_to(out.parent))] = content
    return found


class Storm:
    """One command, and what an undisturbed run of it leaves."""

    def __init__(self, one: Command, place: Path):
        self.one, self.place, self.random = one, place / one.recipe, random.Random(one.recipe)
        self.run, self.failures = 0, []
        out, log = self.fresh(), place / f"{one.recipe}.log"
        begun = time.perf_counter()
        code, said = self.begin(out, before=watched(log)).end()
        assert code == 0, said
        self.seconds, self.right = time.perf_counter() - begun, outcome(out)
        self.writes, self.wrong = len(log.read_text().splitlines()), not_durable(log, out)

    def fresh(self) -> Path:
        """The output in a new folder."""
        self.run += 1
        folder = self.place / str(self.run)
        folder.mkdir(parents=True)
        return folder / self.one.output

    def begin(self, out: Path, *more: object, before=lambda: None) -> Started:
        return start(command(self.one.recipe, *self.one.flags, "--out", out, *more), before)

    def finish(self, out: Path, *earlier: object) -> bool:
        """Go on to the end; whether the output is the right one, refused only where it is whole."""
        code, said = self.begin(out, *self.one.go_on).end()
        return self.judge(code in (0, 2) and outcome(out) == self.right, out, *earlier, code, said)

    def judge(self, good: bool, out: Path, *told: object) -> bool:
        """Take a good trial's output away, keep a bad one's with what is told of it."""
        if good:
            shutil.rmtree(out.parent)
        else:
            self.failures.append((out, *told))
        return good

    def killed(self, at_write: bool) -> bool:
        """One to three kills, then the end."""
        out, moments = self.fresh(), []
        for _ in range(self.random.randint(1, 3)):
            moment = self.random.uniform(0, 1)
            if at_write:
                moments.append(int(moment * self.writes))
                self.begin(out, *self.one.go_on, before=dying_at(moments[-1])).end()
            else:
                moments.append(moment * self.seconds)
                process = self.begin(out, *self.one.go_on)
                time.sleep(moments[-1])
                os.kill(process.pid, signal.SIGKILL)
                process.end()
        return self.finish(out, moments)

    def two_at_once(self) -> bool:
        """Two processes on one output: the right output, and each that fails says why in a line."""
        out = self.fresh()
        first = self.begin(out)
        time.sleep(self.random.uniform(0, 0.8) * self.seconds)
        ends = [process.end() for process in (self.begin(out), first)]
        refused = [said.splitlines()[-1] for code, said in ends if code == 2]
        codes = sorted(code for code, _ in ends)
        right = codes in ([0, 0], [0, 2]) and outcome(out) == self.right
        return self.judge(
            right and all(line.startswith("error: --out") for line in refused), out, ends
        )

    def full_disk(self) -> bool:
        """No file grows over a random size: one line that says what to do, then the right output."""
        largest = max(map(len, self.right.values()))
        out, size = self.fresh(), int(largest ** self.random.uniform(0.3, 1))
        full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        code, said = self.begin(out, before=full).end()
        told = code == 3 and "Traceback" not in said and "no room on the disk" in said
        if code and not told:
            return self.judge(False, out, size, code, said)
        return self.finish(out, size, code, said)


def storm(one: Command, place: Path, trials: Sequence[int]) -> tuple[list[int], list]:
    """Good ones of so many trials of each of KINDS, and what is to be known of the others."""
    met = Storm(one, place)
    kinds = (lambda: met.killed(False), lambda: met.killed(True), met.two_at_once, met.full_disk)
    good = [sum(trial() for _ in range(n)) for trial, n in zip(kinds, trials, strict=True)]
    return good, met.wrong + met.failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=30, help="of each kind")
    parser.add_argument("--training", type=int, default=50, help="trials of each kind, of sft")
    parser.add_argument("--tiny", action="store_true", help="one trial of each kind")
    parser.add_argument("--commands", nargs="+", choices=commands(Path()))
    given = parser.parse_args()
    import torch
    import transformers  # noqa: F401  (before the forks)

    torch.set_num_threads(1)
    failed = False
    print("| command |", " | ".join(KINDS), "|\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        tempfile.tempdir = temporary  # what killed commands leave of theirs goes with it
        place = Path(temporary)
        write_inputs(place / "given")
        for name, one in commands(place / "given").items():
            if given.commands and name not in given.commands:
                continue
            trials = 1 if given.tiny else given.training if name == "sft" else given.trials
            good, failures = storm(one, place, [trials] * 4)
            print(f"| {name} |", " | ".join(f"{n} of {trials}" for n in good), "|", flush=True)
            for failure in failures:
                print(failure, file=sys.stderr, flush=True)
            failed = failed or bool(failures)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
