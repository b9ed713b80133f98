"""One process and several: the same batches, losses and bits, whatever happens between."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from conftest import together
from safetensors.torch import load_file
from small import prepared, sft_step, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from ta import parallel
from ta.command_line import cli
from ta.data.loader import train_batches
from ta.data.micro import BatchConfig
from ta.training import checkpoint
from ta.training.loop import train
from ta.training.optim import OptimConfig, make_optimizer
from ta.training.run_folder import LoopConfig, Run

STEPS = 8


def model_of(lora):
    model = tiny()
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model.inner = get_peft_model(
            model.inner, LoraConfig(target_modules="all-linear", fan_in_fan_out=True)
        )
    device = parallel.init()
    if parallel.rank():
        model.to("meta")
    parallel.shard(model, device, half=False)
    return model


def work(folder, lora, stop=None):
    """Train from what is there to the end, or until a signal after step `stop`; micro-batches of 50 tokens, so that gradients accumulate."""
    model = model_of(lora)
    config = BatchConfig(steps=STEPS, batch_size=8, max_tokens_per_micro=50)
    run, optim = Run(LoopConfig(out=str(folder), log_every=1, resume=True)), OptimConfig(lr=1e-2)

    def before_step(done, micro_batches):
        if done == stop and parallel.rank() == 0:  # heard by all within this step
            os.kill(os.getpid(), signal.SIGTERM)
        return micro_batches

    train(
        run,
        model,
        train_batches(prepared(), config),
        sft_step,
        make_optimizer(model, optim),
        optim,
        before_step=before_step,
    )


def state(folder):
    """Every tensor and moment of the newest checkpoint, put together from its shards."""
    found = checkpoint.newest(folder)
    parts = {}
    for shard in found.manifest["shards"]:
        tensors = load_file(found.path / shard["file"])
        for name, rows in shard["rows"].items():
            parts.setdefault(name, []).append((rows["start"], tensors[name]))
    assert {"exp_avg", "exp_avg_sq"} == {key.partition("/")[0] for key in parts if "/" in key}
    return {
        key: torch.cat([rows for _, rows in sorted(found, key=lambda p: p[0])])
        for key, found in parts.items()
    }


def save_again(folder, target, lora, rank):
    """Load the newest checkpoint on this number of processes and save it elsewhere."""
    model = model_of(lora)
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2))
    step = checkpoint.load(checkpoint.newest(folder), model, optimizer)
    checkpoint.save(target, step, model, optimizer, {})


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_1_then_2_then_4_then_1_processes_are_one_run(lora, tmp_path):
    """The losses of one process to 1e-6; each new number of processes holds the very bits that the one before saved."""
    for name in ("whole", "chain"):
        (tmp_path / name).mkdir()
    assert together(lambda rank: work(tmp_path / "whole", lora), 1, tmp_path / "said") == [0]
    for processes, stop, following in ((1, 1, 2), (2, 3, 4), (4, 5, 1), (1, None, 2)):
        codes = together(
            lambda rank, stop=stop: work(tmp_path / "chain", lora, stop),
            processes,
            tmp_path / "said",
        )
        assert codes == [143 if stop else 0] * processes, (tmp_path / "said").read_text()
        folder, again = tmp_path / "chain" / "checkpoints", tmp_path / f"again-{processes}-{stop}"
        resave = partial(save_again, folder, again, lora)
        assert together(resave, following, tmp_path / "said") == [0] * following
        before, after = state(folder), state(again)
        assert before.keys() == after.keys() and len(before) > 10
        assert all(torch.equal(before[key], after[key]) for key in before)
    whole, chain = (
        [r["loss"] for r in map(json.loads, open(tmp_path / name / "metrics.jsonl")) if "loss" in r]
        for name in ("whole", "chain")
    )
    assert len(whole) == STEPS and chain == pytest.approx(whole, rel=1e-6)
    one, many = (state(tmp_path / name / "checkpoints") for name in ("whole", "chain"))
    assert all(torch.allclose(one[key], many[key], atol=1e-4) for key in one)


@pytest.mark.slow
def test_a_dead_process_ends_the_others(tmp_path):
    """One of two dies in its first save: the other does not wait for it for ever, and no part of a checkpoint is left to be used."""

    def main(rank):
        if rank:
            os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
        work(tmp_path / "run", False, 1)

    start = time.monotonic()
    codes = together(main, 2, tmp_path / "said")
    assert (
        codes[0] not in (0, 143) and codes[1] == -signal.SIGKILL and time.monotonic() - start < 60
    )
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None


FAULTS = """
import resource, sys
from ta.parallel import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for turn in range(9):
    if turn == 1:  # the first takes memory whichever way
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b"x") * (16 << 20) for _ in range(4)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_used_again_without_page_faults():
    plain, kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("", "kept")
    )
    assert kept < 0.1 * plain


def test_each_process_works_on_the_gpu_of_its_number(monkeypatch):
    """Events and graphs belong to the current device, which is the first one until it is set."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert parallel.pick_device() == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.pick_device() == "cuda:1" and current == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"process 3 .* there are 2: .* --nproc-per-node 2"):
        parallel.pick_device()


def test_any_seed_seeds_every_step():
    """Of 63 bits, as of a clock in nanoseconds, too; other steps have other numbers."""
    drawn = []
    for seed, step in ((0, 0), (0, 1), (2**63 - 1, 0), (2**63 - 1, 10**6)):
        parallel.seed_dropout(seed, step)
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 4
    parallel.seed_dropout(0, 1)
    assert torch.initial_seed() == 1_009


def test_blocks_of_two_types_are_found():
    """Jamba's list of layers mixes attention and state spaces; a list of experts is as long."""
    config = AutoConfig.for_model(
        "jamba",
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=8,
        num_experts=16,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = parallel.blocks(torch.nn.ModuleDict({"inner": model}))
    assert found == list(model.model.layers) and len({type(block) for block in found}) == 2


@dataclass(frozen=True)
class Nothing:
    steps: int = 1
    """A flag."""


def test_a_command_that_is_done_leaves_its_group(tmp_path):
    """Else threads of the group may break the end of a process whose work is done."""

    def main(rank):
        with pytest.raises(SystemExit) as end:
            cli(work_together, Nothing, [])
        assert end.value.code == 0 and not torch.distributed.is_initialized()

    def work_together(config):
        parallel.init()
        assert parallel.gather_objects(config.steps) == [1, 1]

    assert together(main, 2, tmp_path / "said") == [0, 0], (tmp_path / "said").read_text()
