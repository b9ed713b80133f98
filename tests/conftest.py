"""What every test gets: no network, its own cache folder, one thread, small models built in code."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="session")
def _closed_sockets():
    """Only this machine may be reached (process groups meet over loopback)."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(("127.", "::1", "localhost")):
            raise OSError(f"tests reach no network: {address}")
        return connect(self, address)

    socket.socket.connect = guarded
    yield
    socket.socket.connect = connect


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    os.environ["TA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run():
    """Run a recipe as a user does: run("sft", "--steps", 2, code=0) -> CompletedProcess; `processes` starts it under torchrun."""

    def start(recipe: str, *flags, code: int | None = 0, processes: int = 1, timeout: float = 300, **environment):
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(ROOT / "recipes" / f"{recipe}.py"), *map(str, flags)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}
        )
        if code is not None:
            assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        return done

    return start
