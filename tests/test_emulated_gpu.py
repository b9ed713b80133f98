"""What only a GPU would show, on an emulated one: recipes whose steps wait for nothing, and the emulation itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import free_port

from ta.builtin.model_folders import tiny_folder

ROOT = Path(__file__).parent.parent
EMULATION = ROOT / "tests/emulated_gpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("EMULATED_GPU") != "1", reason="runs with EMULATED_GPU=1"),
]


def on_the_gpu(*command, log="", **environment):
    """`python *command` in a process that has an emulated GPU."""
    paths = os.pathsep.join([str(EMULATION), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "EMULATED_GPU": "1", "EMULATED_GPU_LOG": str(log), "PYTHONPATH": paths}
    env |= {"CUDA_VISIBLE_DEVICES": "0", **environment}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def done(*processes):
    """What the first of these printed, when all are."""
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), texts
    return texts[0]


ITSELF = """
import torch
from torch.nn.attention.varlen import varlen_attn

def refused(work, why):
    try:
        work()
    except (RuntimeError, TypeError) as error:
        assert why in str(error), error
    else:
        raise AssertionError(f"not refused: {why}")

torch.manual_seed(0)
layer = torch.nn.Linear(4, 4).to("cuda")
x = torch.randn(2, 4)
refused(lambda: layer(x), "same device")
refused(lambda: layer(x.cuda()).numpy(), "")
refused(lambda: torch.randn(2, device="cuda", generator=torch.Generator()), "generator")
with torch.autocast("cuda", torch.bfloat16):
    out = layer(x.cuda())
assert out.dtype == torch.bfloat16 and out.is_cuda
out.float().sum().backward()
assert torch.equal(layer.bias.grad.cpu(), torch.full((4,), 2.0))

# a copy that does not wait arrives when something does
here, there = torch.zeros(3).pin_memory(), torch.arange(3.0, device="cuda")
here.copy_(there, non_blocking=True)
assert here.tolist() == [0, 0, 0]
torch.cuda.Event().synchronize()
assert here.tolist() == [0, 1, 2]

# a graph replays what was launched on the memory that it knew
given, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    twice = given * 2 + 1
    refused(lambda: twice.sum().item(), "capturing")
given.fill_(5)
graph.replay()
assert twice.tolist() == [11, 11, 11]
torch.cuda.set_sync_debug_mode("error")
refused(lambda: given.nonzero(), "synchronizing")
torch.cuda.set_sync_debug_mode("default")

# attention of documents, against plain attention of each
ends = [0, 3, 10], [0, 5, 12]
q, k, v = (torch.randn(n, h, 16).bfloat16() for n, h in ((10, 4), (12, 2), (12, 2)))
wide = [tensor.double().requires_grad_() for tensor in (q, k, v)]
outs = []
for (a, b), (c, d) in zip(*(zip(e, e[1:]) for e in ends)):
    query, (key, value) = wide[0][a:b], (x[c:d].repeat_interleave(2, 1) for x in wide[1:])
    seen = torch.arange(d - c) <= torch.arange(b - a)[:, None] + (d - c) - (b - a)
    plain = torch.nn.functional.scaled_dot_product_attention
    outs.append(plain(*(x.transpose(0, 1) for x in (query, key, value)), seen).transpose(0, 1))
weight = torch.randn(10, 4, 16)
(torch.cat(outs) * weight).sum().backward()
ours = [tensor.cuda().requires_grad_() for tensor in (q, k, v)]
bounds = [torch.tensor(e, dtype=torch.int32).cuda() for e in ends]
out = varlen_attn(*ours, *bounds, 7, 7, window_size=(-1, 0), enable_gqa=True)
(out * weight.cuda()).sum().backward()
for one, other in zip((out, *(x.grad for x in ours)), (torch.cat(outs), *(x.grad for x in wide))):
    assert (one.cpu() - other).norm() < 0.01 * other.norm()
print("whole")
"""


def test_the_emulated_gpu_refuses_what_a_gpu_refuses():
    assert done(on_the_gpu("-c", ITSELF)).endswith("whole\n")


SHORT = ("--batch-size", 4, "--sample-records", 0, "--max-tokens-per-micro", 256)
RECIPES = {
    "sft": (),
    "dpo": ("--reference", "cached"),
    "multimodal": (),
}
TWICE = """
import collections, json, runpy, sys
import emulated_gpu
from ta.builtin import data_files, model_folders

data_files.SIZES = dict.fromkeys(data_files.SIZES, (64, 16))
model_folders.PICTURES = (16, 4)
page, *flags = sys.argv[1:]
before = collections.Counter()
for steps in ("2", "4"):
    sys.argv = [page, *flags, "--steps", steps, "--log-every", steps, "--eval-every", steps]
    sys.argv += ["--out", f"{flags[flags.index('--out') + 1]}-{steps}"]
    emulated_gpu.counts.clear()
    try:
        runpy.run_path(page, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end
    found = collections.Counter({x: n for x, n in emulated_gpu.counts.items() if x[0] != "pageable"})
    assert not [x for x in found if x[0] == "race"], found
    more, before = found - before, found
print(json.dumps([[*x, n] for x, n in more.items()]))
"""


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_waits_for_its_figures_alone(tmp_path, recipe):
    """In bfloat16, two steps more wait twice more for the device: for loss and gradient norm.

    Pictures are counted against their placeholders besides.
    """
    flags = [*SHORT, *RECIPES[recipe], "--out", tmp_path / "run"]
    if recipe != "multimodal":
        flags += ["--model-path", tiny_folder()]
    text = done(on_the_gpu("-c", TWICE, f"recipes/{recipe}.py", *flags))
    more = json.loads(text.splitlines()[-1])
    if recipe == "multimodal":
        more = [x for x in more if x[2] != "ta/media/multimodal.py:embed_modalities"]
    assert more == [["wait", "copy to the host", "ta/training/loop.py:train", 2]]


def test_two_gpus_give_the_figures_of_a_cpu(tmp_path):
    """In float32: losses, gradient norms, answers and held-out figures, each process on a GPU of its own."""
    flags = ("recipes/sft.py", *SHORT, "--steps", 3, "--log-every", 1, "--dtype", "float32")
    flags += ("--sample-records", 2, "--eval-every", 2)
    port = free_port()
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    runs = [
        on_the_gpu(
            *(*flags, "--out", tmp_path / "two"),
            log=tmp_path / "counts.jsonl",
            **group,
            MASTER_PORT=str(port),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]
    done(*runs)
    done(on_the_gpu(*flags, "--out", tmp_path / "one", CUDA_VISIBLE_DEVICES=""))
    two, one = (
        list(map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()))
        for name in ("two", "one")
    )
    assert len(two) == len(one)
    for a, b in zip(two, one, strict=True):
        for name in {"loss", "grad_norm", "val_loss", "val_accuracy"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=2e-3)
    told = list(map(json.loads, (tmp_path / "counts.jsonl").read_text().splitlines()))
    assert told and not [x for x in told if x["kind"] == "race"]
