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
from ta.model.adapter_settings import AdapterConfig
from ta.data.loader import training_feed
from ta.train.memory import estimate
from ta.folders import ModelConfig
from ta.model.load import ComputeConfig, load_model
from ta.chat.tokenizer import load_chat_tokenizer
from ta.train.optim import OptimConfig, make_optimizer, update
from ta.train.run import RunConfig, open_data

torch.set_num_threads(1)


def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))


def step(model, batch):
    return model.loss(batch), batch.weights.sum(), {}


config = RunConfig()
tokenizer = load_chat_tokenizer(config.model, config.tokenizer, config.chat)
data = open_data(config, tokenizer, "chat").train
for adapter, recompute in (("none", False), ("lora", False), ("none", True)):
    model = load_model(ModelConfig(), AdapterConfig(adapter=adapter), ComputeConfig(activation_checkpointing=recompute), tokenizer)
    feed = training_feed(data, batch_size=256, max_tokens_per_micro=8192, seed=0, steps=2, epochs=1)
    told = estimate(model, feed, step)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS") - told["weights"] * 1e9
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    optimizer = make_optimizer(model, OptimConfig(lr=1e-4))
    for number in range(2):
        for batch in feed.batches(number):
            step(model, batch)[0].backward()
        update(optimizer, [p for p in model.parameters() if p.requires_grad], 1e-4, 1.0, 1.0, 0.0)
    print(json.dumps([told["in all"] * 1e9, status("VmHWM") - before]))
    del model, optimizer
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="peaks of memory are read from Linux' /proc",
)
def test_within_15_percent_of_the_peak_of_a_run():
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
        assert told == pytest.approx(held, rel=0.15)
