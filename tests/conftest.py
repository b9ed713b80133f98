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


@pytest.fixture
def door(capsys):
    """Run a recipe in this process: door("sft", "--steps", 2) -> (exit code, what it printed on stderr); quick, for wrong input."""
    import importlib.util

    def start(recipe: str, *flags) -> tuple[int, str]:
        spec = importlib.util.spec_from_file_location(f"recipe_{recipe}", ROOT / "recipes" / f"{recipe}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        from ta.cli import cli

        settings = next(
            v for v in vars(module).values() if isinstance(v, type) and v.__module__ == spec.name and hasattr(v, "__dataclass_fields__")
        )
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli(module.main, settings, [str(flag) for flag in flags])
        return end.value.code, capsys.readouterr().err

    return start
