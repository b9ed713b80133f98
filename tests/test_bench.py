"""Each bench script runs: one contender of each, at its smallest sizes, as its own process would run it."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
CONTENDERS = {
    "logprobs": ["ours", "full logits"],
    "mfu": ["1B full", "head"],
    "overhead": ["loop"],
    "preference": ["ours", "whole", "ours, cached"],
    "retrieval": ["ours", "product", "encoder", "building", "opening"],
    "save": ["ours", "shard"],
    "scale": ["length 256", "vocabulary 8192", "records 500"],
    "sft": ["ours", "bare", "HF padded"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for script, names in CONTENDERS.items() for name in names]
)
def test_a_contender_tells_finite_figures(script, name, monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [f"bench/{script}.py", "--tiny", "--one", name])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(BENCH / f"{script}.py"), run_name="__main__")
    torch.set_num_threads(threads)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures and all(math.isfinite(value) for value in figures.values())
