"""Recipes in new processes that have torch, transformers and peft already.

A server imports these once and forks for each command: all else is as in `python recipes/sft.py ...`.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

PRELOADED = (
    "torch",
    "transformers",
    "peft",
    "tyro",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert",
    "transformers.models.clip.modeling_clip",
)


def run(command: list[str], cwd: Path, env: dict[str, str], timeout: float):
    """`python *command` as subprocess.run would: a CompletedProcess with text; TimeoutExpired."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        task = {"command": command, "cwd": str(cwd), "env": env, "out": str(out), "err": str(err)}
        server = _server()
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        pid = int(server.stdout.readline())
        with selectors.DefaultSelector() as waiting:
            waiting.register(server.stdout, selectors.EVENT_READ)
            ended = bool(waiting.select(timeout))
        if not ended:
            os.kill(pid, signal.SIGKILL)
        code = int(server.stdout.readline())
        if not ended:
            raise subprocess.TimeoutExpired(command, timeout, out.read_bytes(), err.read_bytes())
        texts = [path.read_text(errors="replace") for path in (out, err)]
        return subprocess.CompletedProcess(command, code, *texts)


def _renew_threads() -> None:
    """In a fork torch makes its pool of threads anew at first use, where two threads at once would find none."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(torch.get_num_threads())


os.register_at_fork(after_in_child=_renew_threads)


@functools.cache
def _server() -> subprocess.Popen:
    started = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(started.stdin.close)
    return started


def preload() -> None:
    """Import what forks would each import."""
    for name in PRELOADED:
        importlib.import_module(name)
    for name in (ta := importlib.import_module("ta")).__all__:
        getattr(ta, name)


def _serve() -> None:
    preload()
    for text in sys.stdin:
        pid = os.fork()
        if not pid:
            _become(**json.loads(text))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(command: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """Be `python *command`, and end."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdin = open(0, closefd=False)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = command
        paths = env.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:1] = [str(Path(command[0]).parent), *filter(None, paths)]
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
