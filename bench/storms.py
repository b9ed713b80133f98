"""Are answers, scores, caches, indexes, merged models and runs the same after any kill?

    python bench/storms.py --trials 30

A trial starts the command in an empty folder, kills it with SIGKILL, at a random moment or at its
n-th call that writes (fsync, rename, replace, unlink, mkdir), starts it again until it ends, and
compares every byte of the output with those of an undisturbed run; logs of training are compared
without times. Two at once: a second process starts beside the first; one of them is refused or both
end, and the output is right. A full disk: files may not grow over a limit; the command ends, and
without the limit it goes on to the same bytes. Commands run in forked processes
that have imported torch already, so a trial costs tenths of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":  # in place of bench, whose tokenize.py hides python's own
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
CALLS = ("fsync", "rename", "replace", "unlink", "mkdir")  # of module os
PASSING = ("seconds", "memory_gb", "tokens_a_second")


def write_inputs(folder: Path) -> None:
    """A tiny model, a reward model's head, an adapter, chats, candidates, passages, pictures."""
    import torch
    from peft import LoraConfig, get_peft_model
    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from ta.builtin import models
    from ta.builtin.tasks import chats

    models.write_tiny(folder / "model")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    settings = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(folder / "adapter")
    shutil.copytree(folder / "model", folder / "rm")
    head = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    head.save_pretrained(folder / "rm")
    models.write_jsonl(folder / "chats.jsonl", chats("held_out", 24))
    models.write_jsonl(folder / "candidates.jsonl", models.candidates("held_out", 24))
    models.write_jsonl(folder / "passages.jsonl", models.passages()[:60])
    models.write_encoder(folder / "encoder")
    (folder / "pictures").mkdir()
    for i in range(24):
        Image.new("RGB", (32, 32), (10 * i, 0, 255 - 10 * i)).save(folder / "pictures" / f"{i}.png")


def commands(given: Path) -> dict[str, tuple]:
    """{name: (recipe, name of the output, flags, flag that goes on)}."""
    model = ("--model-path", given / "model")
    chats = ("--data", given / "chats.jsonl")
    return {
        "generate": ("generate", "a.jsonl", (*model, *chats, "--max-new-tokens", 8), "--resume"),
        "score": (
            "score",
            "s.jsonl",
            ("--model-path", given / "rm", "--data", given / "candidates.jsonl"),
            "--resume",
        ),
        "preprocess_images": (
            "preprocess_images",
            "c.safetensors",
            ("--root", given / "pictures", "--workers", 0, "--batch-size", 4),
            "",
        ),
        "build_index": (
            "build_index",
            "index",
            ("--passages", given / "passages.jsonl", "--encoder-path", given / "encoder"),
            "--resume",
        ),
        "merge": ("merge", "merged", ("--model-path", given / "adapter"), ""),
        "sft": (
            "sft",
            "run",
            (
                *(*model, *chats, "--val-data", given / "chats.jsonl", "--steps", 6),
                *("--batch-size", 4, "--save-every", 2, "--eval-every", 3, "--log-every", 2),
                *("--no-model-card", "--sample-records", 3, "--sample-max-new-tokens", 4),
            ),
            "--resume",
        ),
    }


def start(recipe: str, flags: tuple, said: Path, before=lambda: None) -> int:
    """The pid of a forked process that runs a recipe and prints into a file."""
    import judged
    from conftest import settings_of

    module = judged.recipe(recipe)
    if pid := os.fork():
        return pid
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        from ta.command_line import cli

        before()
        cli(module.main, settings_of(module), [str(flag) for flag in flags])
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(99)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying_at(count: int):
    """Makes a process kill itself at its count-th call of CALLS."""

    def arm() -> None:
        left = iter(range(count))

        def dying(real):
            def call(*rest, **more):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*rest, **more)

            return call

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))

    return arm


def outcome(out: Path) -> dict[str, object]:
    """{file: bytes}; of logs the records without times, of config.json and the report nothing."""
    found: dict[str, object] = {}
    paths = [out] if out.is_file() else sorted(p for p in out.rglob("*") if p.is_file())
    for path in paths:
        name = str(path.relative_to(out.parent))
        if path.name in (".lock", "report.html") or name == "run/config.json":
            continue
        if path.name == "metrics.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: x for k, x in r.items() if k not in PASSING} for r in records]
        elif path.name == "manifest.json":
            about = json.loads(path.read_text())
            found[name] = {
                k: x for k, x in about.items() if k not in ("logged", "sha256", "passages_stamp")
            }
        else:
            found[name] = path.read_bytes()
    left = [p.name for p in out.parent.iterdir() if p != out and p.name != "said"]
    return found | ({"left over": left} if left else {})


class Storm:
    """One command, its inputs, and what an undisturbed run of it leaves."""

    def __init__(self, name: str, given: Path, place: Path):
        self.recipe, self.output, self.flags, self.go_on = commands(given)[name]
        self.place, self.random = place / name, random.Random(name)
        self.run = 0
        out = self.fresh()
        begun = time.perf_counter()
        assert self.once(out) == 0, self.said(out)
        self.seconds, self.right = time.perf_counter() - begun, outcome(out)

    def fresh(self) -> Path:
        """The output in a new folder."""
        self.run += 1
        folder = self.place / str(self.run)
        folder.mkdir(parents=True)
        return folder / self.output

    def flags_for(self, out: Path, again: bool) -> tuple:
        more = (self.go_on,) if again and self.go_on else ()
        return (*self.flags, "--out", out, *more)

    def begin(self, out: Path, again: bool = False, before=lambda: None) -> int:
        return start(self.recipe, self.flags_for(out, again), out.parent / "said", before)

    def once(self, out: Path, again: bool = False, before=lambda: None) -> int:
        return ended(self.begin(out, again, before))

    def said(self, out: Path) -> str:
        return (out.parent / "said").read_text(errors="replace")[-2000:]

    def finish(self, out: Path) -> bool:
        """Go on to the end; whether the output is the right one. A refusal must name the way on."""
        code = self.once(out, again=out_began(out))
        if code == 2 and "exists" in self.said(out) and outcome(out) == self.right:
            return True  # it had been finished before the kill
        if code == 2 and "give --resume" in self.said(out):
            code = self.once(out, again=True)
        if code == 2 and self.go_on and "exists: give another" in self.said(out):
            code = self.once(out)
        if code == 2 and "--overwrite to replace it" in self.said(out):
            # killed after it had its name: the way on that the refusal names
            flags = (*self.flags_for(out, False), "--overwrite")
            code = ended(start(self.recipe, flags, out.parent / "said"))
        return code == 0 and outcome(out) == self.right

    def killed(self, at_write: bool) -> bool:
        """One trial: one to three kills, then the end."""
        out = self.fresh()
        for attempt in range(self.random.randint(1, 3)):
            again = attempt > 0 and out_began(out)
            if at_write:
                self.once(out, again, dying_at(self.random.randint(0, 40)))
            else:
                pid = self.begin(out, again)
                time.sleep(self.random.uniform(0, 1) * self.seconds)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        good = self.finish(out)
        if good:
            shutil.rmtree(out.parent)
        return good

    def two_at_once(self) -> bool:
        """Two processes on one output: the right output, and each that fails says why in a line."""
        out = self.fresh()
        first = self.begin(out)
        time.sleep(self.random.uniform(0, 0.8) * self.seconds)
        second = start(self.recipe, self.flags_for(out, False), out.parent / "said2")
        codes = ended(first), ended(second)
        said = [(out.parent / name).read_text().splitlines()[-1:] for name in ("said", "said2")]
        (out.parent / "said2").unlink()
        told = all(
            code == 0 or (code == 2 and line and line[0].startswith("error: --out"))
            for code, line in zip(codes, said, strict=True)
        )
        return told and 0 in codes and outcome(out) == self.right

    def full_disk(self) -> bool:
        """No file may grow over a random size: a line and an exit code, then the right output."""
        out, limit = self.fresh(), self.random.randint(100, 200_000)

        def full() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        code = self.once(out, before=full)
        return code in (0, 2, 3, 99) and self.finish(out)


def out_began(out: Path) -> bool:
    """Whether anything is there to go on with."""
    return any(path.name != "said" for path in out.parent.iterdir())


def storm(names: list[str], trials: int, tell=print) -> dict[str, dict[str, tuple[int, int]]]:
    """{command: {kind: (good, trials)}}."""
    import judged

    table: dict[str, dict[str, tuple[int, int]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        given = Path(temporary) / "given"
        given.mkdir()
        write_inputs(given)
        for name in names:
            judged.recipe(commands(given)[name][0])
            one = Storm(name, given, Path(temporary))
            kinds = {
                "kill -9, any moment": lambda one=one: one.killed(False),
                "kill -9, at a write": lambda one=one: one.killed(True),
                "two at once": one.two_at_once,
                "full disk": one.full_disk,
            }
            table[name] = {
                kind: (sum(trial() for _ in range(trials)), trials) for kind, trial in kinds.items()
            }
            cells = " | ".join(f"{good} of {n}" for good, n in table[name].values())
            tell(f"| {name} | {cells} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="one trial of each kind")
    parser.add_argument("--commands", nargs="+", default=None)
    given = parser.parse_args()
    import torch
    import transformers  # noqa: F401  (before the forks)

    torch.set_num_threads(1)
    names = given.commands or list(commands(Path()))
    print("| command | kill -9, any moment | kill -9, at a write | two at once | full disk |")
    print("|---|---|---|---|---|")
    table = storm(names, 1 if given.tiny else given.trials)
    if any(good < n for row in table.values() for good, n in row.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
