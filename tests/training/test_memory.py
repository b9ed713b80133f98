"""What a dry run says a run will hold in memory is what a run holds."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

MEASURE = """
import ctypes, gc, json, sys
import peft, torch
import ta
from ta.training.memory import estimate
from ta.training.optim import update

torch.set_num_threads(1)


def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))


tokenizer = ta.load_chat_tokenizer(ta.ModelConfig(), ta.TokenizerConfig(), ta.ChatConfig())
files, _ = ta.data_or_builtin((), (), "chats")
data = ta.prepare_chats(files, tokenizer, ta.ChatConfig(), ta.DataConfig())
config = ta.BatchConfig(batch_size=128, steps=2)
for adapter, recompute in (("none", False), ("lora", False), ("none", True)):
    compute = ta.ComputeConfig(activation_checkpointing=recompute)
    model = ta.load_model(ta.ModelConfig(), ta.AdapterConfig(adapter=adapter), compute, tokenizer)
    batches = ta.train_batches(data, config)
    optimizer = ta.make_optimizer(model, ta.OptimConfig(lr=1e-4))
    told = estimate(model, batches, optimizer)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS") - told["weights"] * 1e9
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    for number in range(2):
        for batch in batches.at(number):
            model.loss(batch).backward()
        update(optimizer, 1e-4, torch.zeros(()), torch.ones(()), 1.0)
        optimizer.zero_grad()
    print(json.dumps([told["in all"] * 1e9, status("VmHWM") - before]))
    del model, optimizer
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="peaks of memory are read from Linux' /proc",
)
def test_within_30_percent_of_the_peak_of_a_run():
    """The built-in model, all weights, LoRA, and recomputed activations."""
    quick_to_return = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        env={**os.environ, **quick_to_return},
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 3, done.stderr
    for told, held in rows:
        assert told == pytest.approx(held, rel=0.3)
