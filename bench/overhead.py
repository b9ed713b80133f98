"""What does the loop cost beside the arithmetic, and how fast does the door open? Milliseconds a step over a bare torch loop; --help and imports.

    python bench/overhead.py

A model so small that a step takes some milliseconds; the same steps with ta.loop.train and with a bare loop (forward, backward, clip, AdamW). Then
the CPU seconds of `--help` and of imports, each in a fresh interpreter, beside those of an empty one.
"""

import argparse
import sys
import time

try:
    from harness import ROOT, compare, parser, read
except ImportError:
    from bench.harness import ROOT, compare, parser, read


def parts(flags: argparse.Namespace):
    import torch

    torch.set_num_threads(flags.threads)
    sys.path.insert(0, str(ROOT / "tests"))
    from small import prepared, sft_step, tiny

    from ta.feed import training_feed

    feed = training_feed(prepared(256), batch_size=8, max_tokens_per_micro=4096, seed=0, steps=flags.steps, epochs=1)
    return tiny(), feed, sft_step


def a_step(start: float, wall: float, flags) -> dict[str, float]:
    now, wall_now = time.process_time(), time.perf_counter()
    return {"cpu_ms_a_step": 1000 * (now - start) / flags.steps, "ms_a_step": 1000 * (wall_now - wall) / flags.steps}


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
    return a_step(start, wall, flags)


def ours(flags) -> dict[str, float]:
    import tempfile

    from ta.loop import LoopConfig, train
    from ta.optim import OptimConfig

    model, feed, step = parts(flags)
    with tempfile.TemporaryDirectory() as out:
        start, wall = time.process_time(), time.perf_counter()
        train(model, feed, step, LoopConfig(out=out), OptimConfig(lr=1e-4))
        return a_step(start, wall, flags)


def door() -> dict[str, list[str]]:
    """Commands in fresh interpreters."""
    run = lambda code: [sys.executable, "-c", code]  # noqa: E731
    return {
        "empty": run("pass"),
        "sft.py --help": [sys.executable, str(ROOT / "recipes" / "sft.py"), "--help"],
        "dpo.py --help": [sys.executable, str(ROOT / "recipes" / "dpo.py"), "--help"],
        "import ta.run": run("import ta.run"),
        "import torch": run("import torch"),
        "from transformers import Trainer": run("from transformers import Trainer"),
    }


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--steps", type=int, default=2000)
    given = read(flags, steps=20)
    compare({"bare": bare, "ours": ours}, given, "bare")
    if not given.one:
        compare(door(), given, "empty")
