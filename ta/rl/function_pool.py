"""Functions of files in processes that can be killed, each with one call at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from typing import Any

# seconds in which a process must have loaded its functions
START = 120
WORKER = "import sys; from ta.rl.worker import work; work(sys.argv[1:])"


class FunctionPool:
    """Processes that run functions; each has one call at a time and a limit on its time.

    A process that overruns is killed with all that it started, and another takes its place.
    """

    def __init__(self, names: Sequence[str], processes: int, seconds: float):
        """`names` are those of `worker.load_function`; a call may take so many seconds.

        ValueError where a function does not load.
        """
        self.names, self.processes, self.seconds = names, processes, seconds
        self.idle = [_Process(names)] if any(names) else []

    def run(self, calls: Sequence[tuple[int, list]]) -> Iterator[tuple[int, Any, str]]:
        """(place of the call, value, fault), in the order in which they come.

        A call is (number of the function, arguments). The fault is empty where the value counts.
        """
        waiting, busy = deque(enumerate(calls)), {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self.processes:
                    place, call = waiting.popleft()
                    process = self.idle.pop() if self.idle else _Process(self.names)
                    busy[process] = place
                    process.ask(call, self.seconds)
                due = min(process.deadline for process in busy)
                wait([process.pipe for process in busy], max(0.0, due - time.monotonic()))
                for process in [process for process in busy if process.has_ended()]:
                    place = busy.pop(process)
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
        self.pipe, theirs = Pipe()
        self.process = subprocess.Popen(
            # a module that imports nothing heavy
            [sys.executable, "-c", WORKER, str(theirs.fileno()), *names],
            stdin=subprocess.DEVNULL,
            # what functions print goes to the screen
            stdout=2,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        self.alive, self.seconds = True, START
        # it says when its functions are there
        loaded = self.pipe.poll(START)
        if fault := self.reply()[1]:
            why = fault if loaded else f"it takes more than {START} seconds"
            raise ValueError(f"{' '.join(filter(None, names))} does not load: {why}")

    def ask(self, call: tuple[int, list], seconds: float) -> None:
        """Send a call, which must be answered within so many seconds."""
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        with suppress(OSError):  # a process that has ended answers nothing, which is said
            self.pipe.send_bytes(json.dumps(call).encode())

    def has_ended(self) -> bool:
        """Whether the call is answered, or its time is over."""
        return self.pipe.poll() or self.deadline <= time.monotonic()

    def reply(self) -> tuple[Any, str]:
        """(value, fault) of a call that has ended; the fault is empty where the value counts."""
        fault = f"took longer than --reward-seconds {self.seconds:g}"
        if self.pipe.poll():
            try:
                return tuple(json.loads(self.pipe.recv_bytes()))
            except (EOFError, OSError):
                fault = "its process ended without an answer"
        self.kill()
        return None, fault

    def kill(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.pipe.close()
        self.alive = False
