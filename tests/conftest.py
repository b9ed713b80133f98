"""What every test gets: no network, its own cache folder, one thread, small models built in code."""

import contextlib
import dataclasses
import gc
import os
import random
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import get_args

import pytest
import tqdm.auto
import warm
from tyro._parsers import ParserSpecification

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parent.parent
# on tests/emulated_gpu there is no Triton
COMPILES_ON_GPU = os.environ.get("EMULATED_GPU") != "1"
# the lock of progress bars is by default one of all forks: killed with it, one would stop the others
for bars in (tqdm.tqdm, tqdm.auto.tqdm):
    bars.set_lock(threading.RLock())
make_parser, parsers = ParserSpecification.from_callable_or_type, {}


def _parser_once(f, **about):
    """tyro makes the parser of a class of settings anew at each call, which takes longer than most of what tests call; here it is made once."""
    if about["parent_classes"]:
        return make_parser(f, **about)
    key = f, about["description"], repr(_hints(get_args(f)[0]))
    if key not in parsers:
        parsers[key] = make_parser(f, **about)
    return parsers[key]


def _hints(settings: type) -> list:
    """The annotations of a class of settings and of its groups; --help changes them."""
    defaults = [field.default for field in dataclasses.fields(settings)]
    groups = [_hints(type(default)) for default in defaults if dataclasses.is_dataclass(default)]
    return [settings.__annotations__, *groups]


ParserSpecification.from_callable_or_type = staticmethod(_parser_once)


def pytest_configure(config):
    """Bounds are those of a CPU; a GPU is seen by the tests marked gpu, where they run alone."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_sessionfinish():
    """What is left dies with the process: at the end pytest would collect it several times."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """What takes minutes comes first, so that two workers end together."""
    items.sort(key=lambda item: "test_learning" not in item.nodeid)


@pytest.fixture(autouse=True, scope="session")
def _closed_sockets():
    """Only this machine may be reached (process groups meet over loopback)."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(
            ("127.", "::1", "localhost")
        ):
            raise OSError(f"tests reach no network: {address}")
        return connect(self, address)

    socket.socket.connect = guarded
    yield
    socket.socket.connect = connect


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    os.environ["TA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def few_records(monkeypatch):
    """Built-in data of few records, for what runs in this process and its forks without --data."""
    from ta.builtin import data_files, model_folders

    monkeypatch.setattr(data_files, "SIZES", dict.fromkeys(data_files.SIZES, (64, 16)))
    monkeypatch.setattr(model_folders, "PICTURES", (16, 4))


@pytest.fixture
def run():
    """Run a recipe as a user does: run("sft", "--steps", 2, code=0) -> CompletedProcess."""

    def start(recipe: str, *flags, code: int | None = 0, timeout: float = 300, **environment):
        page = [str(ROOT / "recipes" / f"{recipe}.py"), *map(str, flags)]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": paths, **environment}
        on_cpu = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        if not environment and on_cpu:
            done = warm.run(page, ROOT, env, timeout)
        else:
            command = [sys.executable, *page]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=env
            )
        if code is not None:
            assert done.returncode == code, (
                f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
            )
        return done

    return start


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """Run a recipe in new processes that have all imports already: forked("sft", "--steps", 2, processes=2, code=0) -> what they printed.

    `before(rank)` runs in each process first; `code` may be a list, of one a process. What one
    process makes of the built-in parts first is made in such a process, too.
    """
    import judged

    from ta.builtin import fine_tuned
    from ta.command_line import cli

    folder = tmp_path_factory.mktemp("forked")
    warm.preload()

    def start(
        recipe: str,
        *flags,
        processes: int = 1,
        code: int | list[int] = 0,
        before=lambda rank: None,
    ) -> str:
        said = folder / f"said-{len(list(folder.iterdir()))}"

        def work(recipe, *flags):
            module = judged.recipe(recipe)
            cli(module.main, settings_of(module), [str(flag) for flag in flags])

        def first(recipe, *flags):
            assert together(lambda rank: work(recipe, *flags), 1, said) == [0]

        def main(rank):
            if processes == 1:
                fine_tuned._run = first
            before(rank)
            work(recipe, *flags)

        judged.recipe(recipe)
        codes = together(main, processes, said)
        text = said.read_text(errors="replace")
        wanted = code if isinstance(code, list) else [code] * processes
        assert codes == wanted, f"exit codes {codes}\n{text[-5000:]}"
        return text

    return start


def free_port() -> int:
    """A port that is free on this machine, below those that connections of other tests are given."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port from 20000 to 30000")


def together(main, processes: int, said: Path) -> list[int]:
    """Exit codes of main(rank) in `processes` forked processes, which can form one process group; they print into the file `said`."""
    port = free_port()
    children = []
    for rank in range(processes):
        if pid := os.fork():
            children.append(pid)
            continue
        code = 1
        try:
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout, sys.stderr = (
                open(1, "w", buffering=1, closefd=False),
                open(2, "w", buffering=1, closefd=False),
            )
            if processes > 1:
                os.environ |= {
                    "WORLD_SIZE": str(processes),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                }
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            main(rank)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def settings_of(module) -> type:
    """The settings that a recipe's main takes."""
    return next(
        v
        for v in vars(module).values()
        if isinstance(v, type)
        and v.__module__ == module.__name__
        and hasattr(v, "__dataclass_fields__")
    )


@pytest.fixture
def door(capsys):
    """Run a recipe in this process: door("sft", "--steps", 2) -> (exit code, what it printed on stderr); quick, for wrong input."""
    import judged

    def start(recipe: str, *flags) -> tuple[int, str]:
        from ta.command_line import cli

        module = judged.recipe(recipe)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli(module.main, settings_of(module), [str(flag) for flag in flags])
        return end.value.code, capsys.readouterr().err

    return start
