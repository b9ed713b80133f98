"""What does the loop cost beside the arithmetic, and how fast does the door open?

    python bench/overhead.py

A model so small that a step takes some milliseconds. Right after each step of `train` a bare loop
(forward, backward, clip, AdamW) takes the same step on a twin, in one process. The overhead is the
median over the steps of the difference, the first 20 left out; laying out a batch is shown apart.
Then the CPU seconds of `--help` and of imports, each in a fresh interpreter, beside those of an
empty one.
"""

import argparse
import sys
import tempfile
import time

try:
    from harness import ROOT, compare, parser, read
except ImportError:
    from bench.harness import ROOT, compare, parser, read

from bench.work import sft_step


def paired(flags: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a step of the bare loop, of laying out a batch, and of what `train` adds."""
    import torch

    torch.set_num_threads(flags.threads)
    sys.path.insert(0, str(ROOT / "tests"))
    from small import prepared, tiny

    from ta.data.loader import train_batches
    from ta.data.micro import BatchConfig
    from ta.training.loop import train
    from ta.training.optim import OptimConfig, make_optimizer
    from ta.training.run_folder import LoopConfig, Run

    sizes = BatchConfig(batch_size=8, max_tokens_per_micro=4096, steps=flags.steps + 1)
    batches = train_batches(prepared(256), sizes)
    model, twin = tiny(), tiny()
    optimizer = torch.optim.AdamW(
        twin.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0, fused=True
    )
    rows, last = [], None  # (ours, bare, laying): wall and CPU seconds of each step

    def spent(since: tuple) -> list[float]:
        return [now - then for now, then in zip(clock(), since, strict=True)]

    def bare_step(batch) -> None:
        loss, count, _ = sft_step(twin, batch)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def before_step(done: int, micro_batches: list) -> list:
        """The step that `train` has just ended, once more by the bare loop; then the clock runs."""
        nonlocal last
        if last is not None:
            since, batch = last
            ours, start = spent(since), clock()
            bare_step(batch)
            bare, start = spent(start), clock()
            batches.at(done)
            rows.append((ours, bare, spent(start)))
        if done == flags.steps:  # the twin has taken as many
            same = zip(model.parameters(), twin.parameters(), strict=True)
            assert all(torch.allclose(a, b, atol=1e-3) for a, b in same), "not the same work"
        last = clock(), micro_batches[0]
        return micro_batches

    optim = OptimConfig(lr=1e-4, schedule="constant", warmup=0)
    with tempfile.TemporaryDirectory() as out:
        run = Run(LoopConfig(out=out))
        train(
            run,
            model,
            batches,
            sft_step,
            make_optimizer(model, optim),
            optim,
            before_step=before_step,
        )
    times = torch.tensor(rows[20:] or rows, dtype=torch.float64) * 1000  # (steps, 3, 2)
    ours, bare, laying = times.unbind(1)
    return {
        "bare_ms": middle(bare),
        "laying_ms": middle(laying),
        "overhead_ms": middle(ours - bare - laying),
        "overhead_cpu_ms": middle(ours - bare - laying, 1),
        "with_laying_ms": middle(ours - bare),
    }


def clock() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def middle(rows, which: int = 0) -> float:
    """The median of wall (0) or CPU (1) times; rows (steps, 2)."""
    return rows[:, which].median().item()


def door() -> dict[str, list[str]]:
    """Commands in fresh interpreters."""
    run = lambda code: [sys.executable, "-c", code]
    return {
        "empty": run("pass"),
        "sft.py --help": [sys.executable, str(ROOT / "recipes" / "sft.py"), "--help"],
        "dpo.py --help": [sys.executable, str(ROOT / "recipes" / "dpo.py"), "--help"],
        "import ta": run("import ta"),
        "import ta.training.loop": run("import ta.training.loop"),
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
