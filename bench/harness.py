"""Contenders in turn (A B A B ...), each run in a process of its own.

A table of medians and of ratios taken round by round; one JSON line a run.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# bench/tokenize.py must not hide Python's own
elsewhere = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "bench"]
sys.path[:] = [str(ROOT), *elsewhere]

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection

Figures = dict[str, float]
Contenders = dict[str, Callable[[argparse.Namespace], Figures] | list[str]]


def parser(doc: str, rounds: int = 3) -> argparse.ArgumentParser:
    """The flags every bench has."""
    flags = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--rounds", type=int, default=rounds, help="how often each contender runs")
    flags.add_argument("--threads", type=int, default=1, help="threads of every contender")
    flags.add_argument("--only", nargs="*", help="contenders to run; all by default")
    flags.add_argument(
        "--peer-python",
        help="a Python that has the peers' packages (TRL and datasets, the extra `bench`, or vLLM)"
        "; without it they are left out",
    )
    flags.add_argument(
        "--tiny",
        action="store_true",
        help="sizes at which the script only shows that it runs; nothing is logged",
    )
    flags.add_argument("--one", help=argparse.SUPPRESS)
    flags.add_argument(
        "--log",
        default=str(ROOT / "bench" / "results.jsonl"),
        help="file that gets one JSON line a run",
    )
    return flags


def read(flags: argparse.ArgumentParser, **tiny) -> argparse.Namespace:
    """The flags as given; with --tiny, one round and the sizes named here."""
    given = flags.parse_args()
    if given.tiny:
        vars(given).update(rounds=1, log=os.devnull, **tiny)
    return given


def compare(
    contenders: Contenders, flags: argparse.Namespace, against: str, peers: Collection[str] = ()
) -> dict[str, list[Figures]]:
    """Run all contenders in turn and print the table, or one of them (--one) and print its JSON.

    A contender is a function, called in a process of its own, or a command. Ratios are to
    `against`. `peers` run under --peer-python. What the system counted for each process is added:
    all its CPU seconds and its peak memory.
    """
    if flags.one:
        print(json.dumps(contenders[flags.one](flags)))
        return {}
    names = [name for name in contenders if not flags.only or name in flags.only or name == against]
    if left_out := [name for name in names if name in peers and not flags.peer_python]:
        print(f"left out without --peer-python: {', '.join(left_out)}")
        names = [name for name in names if name not in left_out]
    runs: dict[str, list[Figures]] = {name: [] for name in names}
    for _ in range(flags.rounds):
        for name in names:
            python = flags.peer_python if name in peers else sys.executable
            work = contenders[name]
            runs[name].append(
                command(
                    work if isinstance(work, list) else [python, *sys.argv, "--one", name],
                    flags.threads,
                    name,
                )
            )
    show(runs, against)
    machine = {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "threads": flags.threads,
        "load": os.getloadavg()[0],
        **versions(),
    }
    with open(flags.log, "a", encoding="utf-8") as file:
        file.write(
            json.dumps(
                {"argv": sys.argv, "time": time.strftime("%Y-%m-%d"), **machine, "runs": runs}
            )
            + "\n"
        )
    return runs


def command(arguments: list[str], threads: int, name: str, **more: str) -> Figures:
    """Run a command to its end: the JSON object of its last line, if it is one.

    Added are the CPU seconds and peak MB of all its processes.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    environment |= {"PYTHONPATH": str(ROOT), "TRL_EXPERIMENTAL_SILENCE": "1", **more}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(arguments, stdout=out, stderr=errors, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, errors):
            file.seek(0)
        if process.returncode:
            sys.exit(f"{name} failed:\n{errors.read()[-3000:]}")
        lines = out.read().splitlines()
    told = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return told | {"whole_cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1024}


def show(runs: dict[str, list[Figures]], against: str) -> None:
    """Medians of every figure, and min/median/max of the ratio to `against` in the same round."""
    keys = list(dict.fromkeys(key for rows in runs.values() for key in rows[0]))
    rounds = f"min / median / max over {len(runs[against])} rounds"
    print(f"load {os.getloadavg()[0]:.1f}; ratios to {against}: {rounds}")
    print("".join(["contender".ljust(28), *(f"{key:>18} {'ratio':>20}" for key in keys)]))
    for name, rows in runs.items():
        cells = []
        for key in keys:
            ratios = [
                row[key] / base[key]
                for row, base in zip(rows, runs[against], strict=True)
                if base.get(key) and key in row
            ]
            spread = (
                f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}"
                if ratios
                else ""
            )
            middle = f"{statistics.median(row[key] for row in rows):,.4g}" if key in rows[0] else ""
            cells.append(f"{middle:>18} {spread:>20}")
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
    from ta.training.run_folder import versions

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    return versions() | {"commit": commit}
