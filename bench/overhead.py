"""What does the loop cost beside the arithmetic? Milliseconds a step over a bare torch loop of the same model and batches, and of --help.

    python bench/overhead.py

A model so small that a step takes about a millisecond; the same steps with ta.loop.train and with a bare loop (forward, backward, clip, AdamW).
"""

import argparse
import sys
import time

from harness import ROOT, compare, parser


def parts(flags: argparse.Namespace):
    import torch

    torch.set_num_threads(flags.threads)
    sys.path.insert(0, str(ROOT / "tests"))
    from small import prepared, sft_step, tiny

    from ta.feed import training_feed

    feed = training_feed(prepared(256), batch_size=8, max_tokens_per_micro=4096, seed=0, steps=flags.steps, epochs=1)
    return tiny(), feed, sft_step


def bare(flags) -> dict[str, float]:
    import torch

    model, feed, step = parts(flags)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0, fused=True)
    start, wall = time.process_time(), time.perf_counter()
    for number in range(flags.steps):
        (batch,) = feed.batches(number)
        loss, count, _ = step(model, batch)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "cpu_ms_a_step": 1000 * (time.process_time() - start) / flags.steps,
        "ms_a_step": 1000 * (time.perf_counter() - wall) / flags.steps,
    }


def ours(flags) -> dict[str, float]:
    import tempfile

    from ta.loop import LoopConfig, train
    from ta.optim import OptimConfig

    model, feed, step = parts(flags)
    with tempfile.TemporaryDirectory() as out:
        start, wall = time.process_time(), time.perf_counter()
        train(model, feed, step, LoopConfig(out=out), OptimConfig(lr=1e-4))
        return {
            "cpu_ms_a_step": 1000 * (time.process_time() - start) / flags.steps,
            "ms_a_step": 1000 * (time.perf_counter() - wall) / flags.steps,
        }


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--steps", type=int, default=2000)
    compare({"bare": bare, "ours": ours}, flags.parse_args(), "bare")
