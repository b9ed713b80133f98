"""Do the fast tests pass with the oldest and the newest packages that pyproject.toml allows?

    python bench/versions.py --folder /tmp/versions            # both, one after the other
    python bench/versions.py --folder /tmp/versions newest     # one of them

Makes an environment for each end of the ranges of torch, transformers and peft, installs this
checkout with its test extra, and runs the fast tests in it. The oldest is the first release of each
range (torch 2.11 is 2.11.0), the newest is what pip finds. An environment that is there is used
again. Exit code 1 where a test fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "peft")
ENDS = ("oldest", "newest")


def requirements(end: str) -> list[str]:
    """What pip is asked to install for one end of the ranges."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = []
    for line in project["dependencies"]:
        name = re.match(r"[A-Za-z0-9_-]+", line)[0]
        if name in PACKAGES:
            lowest = re.search(r">=([0-9.]+)", line)[1]
            whole = lowest + ".0" * (2 - lowest.count("."))
            found.append(f"{name}=={whole}" if end == "oldest" else line)
    return found


def environment(folder: Path, end: str) -> Path:
    """The Python of an environment with one end of the ranges; it is made where it is not there."""
    python = folder / end / "bin" / "python"
    if not (folder / end / "done").exists():
        # at the head of the file it would take bench/tokenize.py for Python's own
        import venv

        venv.create(folder / end, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--upgrade"]
        subprocess.run([*install, *requirements(end)], check=True)
        # without --upgrade these packages stay as they are
        subprocess.run([*install[:-1], "--editable", f"{ROOT}[test]"], check=True)
        (folder / end / "done").touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, type=Path, help="where environments are made")
    parser.add_argument("end", nargs="?", choices=ENDS, help="both where none is given")
    arguments = parser.parse_args()
    failed = []
    ends = [arguments.end] if arguments.end else ENDS
    for end in ends:
        python = environment(arguments.folder.resolve(), end)
        listed = subprocess.run(
            [python, "-m", "pip", "list"], capture_output=True, text=True, check=True
        )
        versions = [line.split() for line in listed.stdout.splitlines()]
        print(end, *(" ".join(v[:2]) for v in versions if v[0] in PACKAGES), sep="\n  ", flush=True)
        tests = [python, "-m", "pytest", "-m", "not slow", "tests"]
        if subprocess.run(tests, cwd=ROOT).returncode:
            failed.append(end)
    print("failed: " + ", ".join(failed) if failed else "passed: " + ", ".join(ends))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
