"""kill -9 at any moment, also inside a save: the resumed run ends with the same bits and tells the same story as one that was never stopped."""

import json
import os
import random
import signal
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import prepared, sft_step, tiny

from ta.data.loader import train_batches
from ta.data.micro import BatchConfig
from ta.training import checkpoint
from ta.training.loop import train
from ta.training.optim import OptimConfig, make_optimizer
from ta.training.run_folder import LoopConfig, Run

STEPS = 12
pytestmark = pytest.mark.slow


def work(folder):
    """Train an adapter with dropout to the end, going on from what is there."""
    config = BatchConfig(steps=STEPS, batch_size=8, max_tokens_per_micro=100)
    run = Run(LoopConfig(out=str(folder), save_every=1, log_every=1, resume=True))
    model, optim = tiny(), OptimConfig(lr=1e-2)
    torch.manual_seed(1)
    lora = LoraConfig(target_modules="all-linear", lora_dropout=0.3, fan_in_fan_out=True)
    model.inner = get_peft_model(model.inner, lora)
    train(
        run, model, train_batches(prepared(), config), sft_step, make_optimizer(model, optim), optim
    )


def in_child(folder, before=lambda: None) -> int:
    """The pid of a new process that works in `folder`, quietly."""
    if pid := os.fork():
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        before()
        work(folder)
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    start = time.perf_counter()
    assert os.waitpid(in_child(folder), 0)[1] == 0
    return time.perf_counter() - start, outcome(folder)


def test_killed_at_random_moments(undisturbed, tmp_path):
    seconds, expected = undisturbed
    generator = random.Random(0)
    for _ in range(8):
        pid = in_child(tmp_path)
        time.sleep(generator.uniform(0.05, 0.5) * seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert os.waitpid(in_child(tmp_path), 0)[1] == 0
    assert outcome(tmp_path) == expected


def test_killed_inside_a_save(undisturbed, tmp_path):
    """Die at the first, second, ... of the calls that make a save durable."""
    for call, count in (("fsync", 1), ("rename", 1), ("open", 7), ("fsync", 4), ("rename", 3)):

        def die(call=call, count=count):
            real, left = getattr(os, call), iter(range(count - 1))

            def counted(*args, **more):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **more)

            setattr(os, call, counted)

        assert os.WIFSIGNALED(os.waitpid(in_child(tmp_path, die), 0)[1])
        found = checkpoint.newest(tmp_path / "checkpoints")
        assert found is None or not found.damaged
    assert os.waitpid(in_child(tmp_path), 0)[1] == 0
    assert outcome(tmp_path) == undisturbed[1]
