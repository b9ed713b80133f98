"""Contenders in turn (A B A B ...), each run in a process of its own; a table of medians and of ratios taken round by round; one JSON line a run."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:] = [
    str(ROOT),
    *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "bench"),
]  # bench/tokenize.py must not hide Python's own

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable

Contenders = dict[str, Callable[[argparse.Namespace], dict[str, float]]]


def parser(doc: str, rounds: int = 3) -> argparse.ArgumentParser:
    """The flags every bench has."""
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=rounds, help="how often each contender runs")
    flags.add_argument("--threads", type=int, default=1, help="threads of every contender")
    flags.add_argument("--only", nargs="*", help="contenders to run; all by default")
    flags.add_argument("--one", help=argparse.SUPPRESS)
    flags.add_argument("--log", default=str(ROOT / "bench" / "results.jsonl"), help="file that gets one JSON line a run")
    return flags


def compare(contenders: Contenders, flags: argparse.Namespace, against: str) -> None:
    """Run one contender and print its figures as JSON (--one), or all of them in turn and print the table; ratios are to `against`."""
    if flags.one:
        print(json.dumps(contenders[flags.one](flags)))
        return
    names = [name for name in contenders if not flags.only or name in flags.only or name == against]
    environment = {**os.environ, "OMP_NUM_THREADS": str(flags.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(flags.rounds):
        for name in names:
            done = subprocess.run([sys.executable, *sys.argv, "--one", name], capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    show(runs, against)
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": flags.threads, "load": os.getloadavg()[0], **versions()}
    with open(flags.log, "a", encoding="utf-8") as file:
        file.write(json.dumps({"argv": sys.argv, "time": time.strftime("%Y-%m-%d"), **machine, "runs": runs}) + "\n")


def show(runs: dict[str, list[dict]], against: str) -> None:
    """Medians of every figure, and min/median/max of the ratio to `against` in the same round."""
    keys = [key for key, value in runs[against][0].items() if isinstance(value, (int, float))]
    print(f"load {os.getloadavg()[0]:.1f}; ratios to {against}: min / median / max over {len(runs[against])} rounds")
    print("".join(["contender".ljust(28), *(f"{key:>16}{'ratio':>24}" for key in keys)]))
    for name, rows in runs.items():
        cells = []
        for key in keys:
            ratios = [row[key] / base[key] for row, base in zip(rows, runs[against], strict=True) if base[key]]
            spread = f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}" if ratios else ""
            cells.append(f"{statistics.median(row[key] for row in rows):>16,.4g}{spread:>24}")
        print("".join([name.ljust(28), *cells]))


def measured(work: Callable[[], object]) -> tuple[float, float, object]:
    """(CPU seconds, MB by which peak memory grew, result) of a call."""
    before, start = peak(), time.process_time()
    result = work()
    return time.process_time() - start, peak() - before, result


def peak() -> float:
    """Peak memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def versions() -> dict[str, str]:
    """Packages that decide speed, and the commit."""
    from ta.log import versions

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return versions() | {"commit": commit}
