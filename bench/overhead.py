"""What does the loop cost beside the arithmetic, and how fast does the door open? Milliseconds a step over a bare torch loop; --help and imports.

    python bench/overhead.py

A model so small that a step takes some milliseconds: each step of ta.loop.train and right after it the same step of a bare loop (forward, backward,
clip, AdamW) on a twin, in one process. The overhead is the median over the steps of the difference, the first 20 left out; laying out the batch is
shown apart. Then the CPU seconds of `--help` and of imports, each in a fresh interpreter, beside those of an empty one.
"""

import argparse
import sys
import time

try:
    from harness import ROOT, compare, parser, read
except ImportError:
    from bench.harness import ROOT, compare, parser, read


def paired(flags: argparse.Namespace) -> dict[str, float]:
    """Every step of ta.loop.train, and right after it the same step of a bare loop on a twin of the model, laying out the same batches."""
    import tempfile

    import torch

    torch.set_num_threads(flags.threads)
    sys.path.insert(0, str(ROOT / "tests"))
    from small import prepared, sft_step, tiny

    from ta.data.loader import training_feed
    from ta.training.loop import LoopConfig, train
    from ta.training.optim import OptimConfig

    feed = training_feed(
        prepared(256), batch_size=8, max_tokens_per_micro=4096, seed=0, steps=flags.steps, epochs=1
    )
    model, twin = tiny(), tiny()
    optimizer = torch.optim.AdamW(
        twin.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0, fused=True
    )
    clock = lambda: (time.perf_counter(), time.process_time())
    since, times = clock(), {"ours": [], "bare": [], "laying": []}

    def bare_step(batch) -> None:
        loss, count, _ = sft_step(twin, batch)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def after_step(done: int) -> None:
        nonlocal since
        times["ours"].append([b - a for a, b in zip(since, clock(), strict=True)])
        start = clock()
        (batch,) = feed.batches(done - 1)
        middle = clock()
        bare_step(batch)
        times["laying"].append([b - a for a, b in zip(start, middle, strict=True)])
        times["bare"].append([b - a for a, b in zip(middle, clock(), strict=True)])
        since = clock()

    with tempfile.TemporaryDirectory() as out:
        train(
            model,
            feed,
            sft_step,
            LoopConfig(out=out),
            OptimConfig(lr=1e-4, schedule="constant", warmup=0),
            after_step=after_step,
        )
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    ), "not the same work"
    ours, bare, laying = (
        torch.tensor(rows[20:] or rows, dtype=torch.float64) * 1000 for rows in times.values()
    )  # (steps, 2): wall, CPU
    middle = lambda rows, which=0: rows[:, which].median().item()
    return {
        "bare_ms": middle(bare),
        "laying_ms": middle(laying),
        "overhead_ms": middle(ours - bare - laying),
        "overhead_cpu_ms": middle(ours - bare - laying, 1),
        "with_laying_ms": middle(ours - bare),
    }


def door() -> dict[str, list[str]]:
    """Commands in fresh interpreters."""
    run = lambda code: [sys.executable, "-c", code]
    return {
        "empty": run("pass"),
        "sft.py --help": [sys.executable, str(ROOT / "recipes" / "sft.py"), "--help"],
        "dpo.py --help": [sys.executable, str(ROOT / "recipes" / "dpo.py"), "--help"],
        "import ta.training.run": run("import ta.training.run"),
        "import torch": run("import torch"),
        "from transformers import Trainer": run("from transformers import Trainer"),
    }


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--steps", type=int, default=2000)
    given = read(flags, steps=20)
    compare({"loop": paired}, given, "loop")
    if not given.one:
        compare(door(), given, "empty")
