"""kill -9 at any moment, also inside a save: the resumed run ends with the same bits and tells the same story as one that was never stopped."""

import json
import os
import random
import signal
import time

import pytest
import torch
from small import prepared, sft_step, tiny

from ta.data.loader import BatchConfig, train_batches
from ta.training import checkpoint
from ta.training.loop import train
from ta.training.optim import OptimConfig, adamw
from ta.training.run_folder import LoopConfig, Run

STEPS = 12


def model_of(lora):
    model = tiny()
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model.inner = get_peft_model(
            model.inner,
            LoraConfig(target_modules="all-linear", lora_dropout=0.3, fan_in_fan_out=True),
        )
    return model


def work(folder, lora):
    """Train to the end, going on from what is there."""
    config = BatchConfig(steps=STEPS, batch_size=8, max_tokens_per_micro=100)
    run = Run(LoopConfig(out=str(folder), save_every=1, log_every=1, resume=True))
    model, optim = model_of(lora), OptimConfig(lr=1e-2)
    train(run, model, train_batches(prepared(), config), sft_step, adamw(model, optim), optim)


def in_child(folder, lora, before=lambda: None) -> int:
    """The pid of a new process that works in `folder`, quietly."""
    if pid := os.fork():
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        before()
        work(folder, lora)
        os._exit(0)
    finally:
        os._exit(1)


def outcome(folder):
    """Every bit of the last checkpoint, and every logged loss."""
    found = checkpoint.newest(folder / "checkpoints")
    assert found.manifest["step"] == STEPS and not found.damaged
    losses = {
        r["step"]: r["loss"] for r in map(json.loads, open(folder / "metrics.jsonl")) if "loss" in r
    }
    return (found.path / "shard-0.safetensors").read_bytes(), losses


@pytest.fixture(params=[False, True], ids=["full", "lora"])
def undisturbed(request, tmp_path):
    torch.set_num_threads(1)
    folder = tmp_path / "whole"
    folder.mkdir()
    start = time.perf_counter()
    assert os.waitpid(in_child(folder, request.param), 0)[1] == 0
    return request.param, time.perf_counter() - start, outcome(folder)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(undisturbed, tmp_path):
    lora, seconds, expected = undisturbed
    folder, generator, kills = tmp_path / "killed", random.Random(0), 0
    folder.mkdir()
    while kills < 20:
        pid = in_child(folder, lora)
        time.sleep(generator.uniform(0.1, 0.9) * seconds * 0.7)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        if (
            folder / "checkpoints" / f"step-{STEPS:08d}"
        ).exists():  # it came to its end: start over
            assert outcome(folder) == expected
            os.rename(folder, tmp_path / f"done-{kills}")
            folder.mkdir()
    assert os.waitpid(in_child(folder, lora), 0)[1] == 0
    assert outcome(folder) == expected


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
def test_killed_inside_a_save(undisturbed, tmp_path, call):
    """Die at the first, second, ... of the calls that make a save durable."""
    lora, _, expected = undisturbed
    folder = tmp_path / "killed"
    folder.mkdir()
    for count in (1, 3, 4, 7):

        def die(count=count):
            real, seen = getattr(os, call), 0

            def counted(*args, **more):
                nonlocal seen
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **more)

            setattr(os, call, counted)

        os.waitpid(in_child(folder, lora, die), 0)
        found = checkpoint.newest(folder / "checkpoints")
        assert found is None or not found.damaged
    assert os.waitpid(in_child(folder, lora), 0)[1] == 0
    assert outcome(folder) == expected
