"""Functions of files in processes that can be killed, each with one call at a time."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from ta.rl.worker import READY

# seconds in which a process must have loaded its functions
START = 120
WORKER = "import sys; from ta.rl.worker import work; work(sys.argv[1:])"


class FunctionPool:
    """Processes that run functions; each has one call at a time and a limit on its time.

    A process that overruns is killed with all that it started, and another takes its place.
    """

    def __init__(self, names: Sequence[str], processes: int, seconds: float):
        """`names` are those of `worker.load_function`; a call may take so many seconds."""
        self.names, self.processes, self.seconds = names, processes, seconds
        self.idle: list[_Process] = []

    def run(self, calls: Sequence[tuple[int, list]]) -> Iterator[tuple[int, Any, str]]:
        """(place of the call, value, fault), in the order in which they come.

        A call is (number of the function, arguments). The fault is empty where the value counts.
        """
        waiting, busy = deque(enumerate(calls)), {}
        with selectors.DefaultSelector() as selector:
            try:
                while waiting or busy:
                    while waiting and len(busy) < self.processes:
                        place, call = waiting.popleft()
                        process = self.idle.pop() if self.idle else _Process(self.names)
                        selector.register(process.replies, selectors.EVENT_READ, process)
                        busy[process] = place
                        process.ask(call, self.seconds)
                    due = min(process.deadline for process in busy)
                    ready = selector.select(max(0.0, due - time.monotonic()))
                    done = {key.data for key, _ in ready}
                    late = {p for p in busy if p.deadline <= time.monotonic()} - done
                    for process in done | late:
                        place = busy.pop(process)
                        selector.unregister(process.replies)
                        if process in late:
                            process.kill()
                            fault = f"took longer than --reward-seconds {self.seconds:g}"
                            value = None
                        else:
                            value, fault = process.reply()
                        if process.alive:
                            self.idle.append(process)
                        yield place, value, fault
            finally:
                for process in busy:
                    process.kill()

    def close(self) -> None:
        """End the processes."""
        for process in self.idle:
            process.kill()
        self.idle.clear()


class _Process:
    """One process of the pool, at the head of a process group of its own."""

    def __init__(self, names: Sequence[str]):
        given, asked = os.pipe()
        told, replies = os.pipe()
        # a module that imports nothing heavy
        command = [sys.executable, "-c", WORKER, str(given), str(replies)]
        self.process = subprocess.Popen(
            [*command, *names],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
            pass_fds=(given, replies),
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        os.close(given), os.close(replies)
        self.calls, self.replies = os.fdopen(asked, "wb"), os.fdopen(told, "rb")
        self.deadline, self.alive = 0.0, True
        with selectors.DefaultSelector() as selector:
            selector.register(self.replies, selectors.EVENT_READ)
            if not selector.select(START) or self.replies.readline() != READY:
                self.kill()
                raise ValueError(
                    f"the functions of {' '.join(filter(None, names))} did not load within {START} "
                    "seconds, or ended their process"
                )

    def ask(self, call: tuple[int, list], seconds: float) -> None:
        """Send a call, which must be answered within so many seconds."""
        self.deadline = time.monotonic() + seconds
        with suppress(BrokenPipeError):  # a process that has ended answers nothing, which is said
            self.calls.write(json.dumps(call).encode() + b"\n")
            self.calls.flush()

    def reply(self) -> tuple[Any, str]:
        """(value, fault) of the call; the fault is empty where the value counts."""
        line = self.replies.readline()
        if not line.endswith(b"\n"):
            self.kill()
            return None, "its process ended without an answer"
        value, fault = json.loads(line)
        return value, fault

    def kill(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.calls.raw.close(), self.replies.close()
        self.alive = False


def _has_descriptor(stream: Any) -> bool:
    try:
        return stream.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False
