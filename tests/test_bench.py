"""Each bench script runs at its smallest sizes: contenders as their own processes run them."""

import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, together

from bench import harness

CONTENDERS = {
    "first_token": ["ours"],
    "grpo": ["ours", "ours, alone"],
    "logprobs": ["ours", "full logits"],
    "mfu": ["1B full", "head"],
    "overhead": ["loop"],
    "preference": ["ours", "whole", "ours, cached", "ours, LoRA"],
    "retrieval": ["ours", "product", "encoder", "building", "opening"],
    "roof": ["1B full", "head", "1B full, compiled", "8B LoRA 4k", "DPO 1B LoRA"],
    "save": ["ours", "shard", "fully_shard"],
    "scale": ["length 256", "vocabulary 8192", "records 500"],
    "sft": ["ours", "bare", "ours, LoRA", "HF padded"],
}
# those whose contenders share a folder, in forks and in processes of their own
IN_FORKS = [("generate", "ours", []), ("multimodal", "cached", [])]
WHOLE = [
    ("start", "our command", []),
    ("tokenize", "ours, encode only", []),
    ("tokenize", "ours", ["--agents"]),
]


def figures_of(script: str, name: str, monkeypatch, capsys) -> dict[str, float]:
    """The JSON of one contender, in this process."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [f"bench/{script}.py", "--tiny", "--one", name])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(ROOT / "bench" / f"{script}.py"), run_name="__main__")
    torch.set_num_threads(threads)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for script, names in CONTENDERS.items() for name in names]
)
def test_a_contender_tells_finite_figures(script, name, monkeypatch, capsys):
    figures = figures_of(script, name, monkeypatch, capsys)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert figures and all(math.isfinite(value) for value in figures.values())


def in_a_fork(arguments: list[str], threads: int, name: str) -> dict[str, float]:
    """harness.command without what the system counted; recipes that the contender starts are forks, too."""

    def run(command, **more):
        return warm.run(list(map(str, command[1:])), ROOT, dict(os.environ), 300)

    def main(rank):
        subprocess.run, sys.argv = run, arguments[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")

    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        codes = together(main, 1, said)
        text = said.read_text()
    assert codes == [0], text[-2000:]
    return json.loads(text.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("script, contender, flags", [*IN_FORKS, *WHOLE])
def test_a_script_runs_to_its_table(script, contender, flags, monkeypatch, capsys):
    if (script, contender, flags) in IN_FORKS:
        warm.preload()
        monkeypatch.setattr(harness, "command", in_a_fork)
    argv = [str(ROOT / "bench" / f"{script}.py"), "--tiny", "--only", contender, *flags]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(argv[0], run_name="__main__")
    assert f"\n{contender}" in capsys.readouterr().out


def test_every_bench_script_is_run_here():
    shared = {"harness", "work", "gpu", "storms", "versions"}
    scripts = {path.stem for path in (ROOT / "bench").glob("*.py")} - shared
    assert scripts == CONTENDERS.keys() | {script for script, *_ in IN_FORKS + WHOLE}


def test_what_a_fused_kernel_reads_and_writes():
    from bench.roof import Operation, fused

    kernels = fused(
        [
            Operation(
                "rest", 0, {1: 10}, {2: 20}
            ),  # 2 is read by the next one alone: never written
            Operation("rest", 0, {2: 20, 1: 10}, {3: 30}),
            Operation("products", 5.0, {3: 30, 4: 40}, {5: 50}),
            Operation("rest", 0, {5: 50}, {6: 60}),
        ]
    )
    assert [kernel.kind for kernel in kernels] == ["rest", "products", "rest"]
    assert kernels[0].reads == {1: 10} and kernels[0].writes == {3: 30}
    assert kernels[1].flops == 5.0
    assert kernels[2].writes == {6: 60}  # nothing reads it here: a gradient


def test_a_trace_counts_flops_bytes_and_the_peak():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.roof import Trace

    with FakeTensorMode():
        x, weight = torch.empty(8, 16), torch.empty(32, 16)
        with Trace(attention=0.0) as trace:
            y = x @ weight.t()  # (8, 32): 1,024 bytes
            y = y.relu()
    product, relu = trace.operations
    assert product.kind == "products" and product.flops == 2 * 8 * 16 * 32
    assert sorted(product.reads.values()) == [8 * 16 * 4, 32 * 16 * 4]
    assert list(relu.writes.values()) == [8 * 32 * 4]
    assert trace.peak == 2 * 8 * 32 * 4
    assert trace.live == 8 * 32 * 4  # of the two only relu's is still held


HEAD = """
import runpy, sys
sys.path[0], sys.argv = sys.argv[1].rpartition("/")[0], sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    print(getattr(sys.modules.get("tokenize"), "__file__", "none"))
"""


SCRIPTS = {path.stem: path for path in (ROOT / "bench").glob("*.py")}


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - {"harness", "work"}))
def test_no_script_takes_our_tokenize_for_that_of_python(name):
    """A script's folder comes first in its path: what it imports before that is changed must not need the module."""
    command = [sys.executable, "-c", HEAD, SCRIPTS[name], "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    assert not done.stdout.splitlines()[-1].startswith(str(ROOT / "bench"))
