"""Run the Python of an answer, and tests of it, in a process with limits.

limits: time, memory, sizes of files and numbers of processes are limited, the environment is empty
and the folder is a new one; all processes are killed together. offline: in a network namespace of
its own too, so that nothing can be reached. files: by bubblewrap (bwrap) too, which shows Python
and nothing else of the machine's files.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

LEVELS = ("limits", "offline", "files")
# bytes of memory, bytes of a file, processes of the user in its namespace
MEMORY, FILE_SIZE, PROCESSES = 1 << 30, 1 << 20, 64
# Code comes first and is run before the tests and the sign of their success are read: code that
# ends the process itself does not pass.
RUNNER = """
import json, sys
exec(compile(json.loads(sys.stdin.readline()), "answer", "exec"), space := {"__name__": "answer"})
tests, sign = json.loads(sys.stdin.readline())
exec(compile(tests, "tests", "exec"), space)
sys.stdout.write("\\n" + sign)
"""


def run_python(code: str, tests: str, seconds: float, level: str) -> bool:
    """Whether `tests`, run after `code` in one namespace, come to their end without raising.

    Both together may take `seconds` on the clock. Code that means to deceive tests can, as it runs
    in their process.
    """
    sign = secrets.token_hex(16)
    given = f"{json.dumps(code)}\n{json.dumps([tests, sign])}\n"
    # files, not pipes: what the code has started and left behind would hold a pipe open
    with (
        tempfile.TemporaryDirectory(prefix="ta-code-") as folder,
        tempfile.TemporaryFile("w+") as source,
        tempfile.TemporaryFile("w+", errors="replace") as out,
    ):
        source.write(given)
        source.seek(0)
        process = subprocess.Popen(
            [*_around(level), sys.executable, "-I", "-S", "-c", RUNNER],
            cwd=folder,
            env={},
            stdin=source,
            stdout=out,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=functools.partial(_limit, seconds),
        )
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        out.seek(0)
        return process.returncode == 0 and out.read().endswith(sign)


@functools.cache
def check_level(level: str) -> None:
    """ValueError where this machine cannot run code at that level."""
    if level == "files" and shutil.which("bwrap") is None:
        raise ValueError("code:files needs bubblewrap (bwrap), which is not installed")
    if level == "offline" and shutil.which("unshare") is None:
        raise ValueError("code:offline needs unshare of util-linux, which is not installed")
    if not run_python("", "", 30.0, level):
        raise ValueError(
            f"code:{level} does not work on this machine (namespaces of users may be turned off)"
        )


def _around(level: str) -> list[str]:
    """The command in front of Python's."""
    if level == "offline":
        return ["unshare", "-rn", "--"]
    if level == "files":
        shown = {"/usr", "/lib", "/lib64", "/bin", sys.base_prefix, sys.prefix}
        binds = [
            part
            for path in sorted(shown)
            if Path(path).exists()
            for part in ("--ro-bind", path, path)
        ]
        scratch = ["--tmpfs", "/tmp", "--dev", "/dev", "--chdir", "/tmp"]
        return ["bwrap", "--unshare-all", "--die-with-parent", *binds, *scratch, "--"]
    return []


def _limit(seconds: float) -> None:
    """Set the limits of the process that is to run the code."""
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: FILE_SIZE,
        resource.RLIMIT_CORE: 0,
    }
    if os.getuid():
        # it does not bind root
        limits[resource.RLIMIT_NPROC] = PROCESSES
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))
