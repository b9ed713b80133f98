"""How does cost grow? CPU seconds against length, batch, vocabulary, records and processes.

    python bench/scale.py

A Llama of 26.7 million weights (length, batch: forward and backward of one packed row), the head
alone (vocabulary), the data preparation and its second start (records), and one step of the same
global batch under torchrun (processes: CPU seconds of all of them). The exponents are those of
cost ~ value ** exponent.
"""

import itertools
import json
import sys
import tempfile
import time
from functools import partial
from types import SimpleNamespace

try:
    from harness import Figures, command, compare, parser, read
except ImportError:
    from bench.harness import Figures, command, compare, parser, read

from bench.work import packed_batches, packed_model, sft_step, shape, train_timed


def axes(flags) -> dict[str, tuple]:
    """name -> (function of (flags, value), values)."""
    if flags.tiny:
        return {name: (work, values[:2]) for name, (work, values) in AXES.items()}
    return AXES


def row(flags, lengths: list[int]) -> Figures:
    """Best of three forward and backward passes over documents of these lengths in one row.

    Half of the tokens are learned.
    """
    import numpy as np

    generator, vocabulary = np.random.default_rng(0), shape(flags)["vocab_size"]
    model = packed_model(flags)
    documents = [
        (generator.integers(5, vocabulary, n), (np.arange(n) % 2).astype(np.float32))
        for n in lengths
    ]
    (batch,) = packed_batches(documents, sum(lengths))

    def once() -> float:
        start = time.process_time()
        model.loss(batch).backward()
        model.zero_grad()
        return time.process_time() - start

    return {"cost_cpu_s": min(once() for _ in range(3))}


def length(flags, value: int) -> Figures:
    return row(flags, [value])


def batch(flags, value: int) -> Figures:
    return row(flags, [128] * value)


def vocabulary(flags, value: int) -> Figures:
    import torch

    from ta.model.logprobs import Head, cross_entropy_sum

    torch.set_num_threads(flags.threads)
    hidden, weight = (
        torch.randn(256, 384).requires_grad_(),
        torch.randn(value, 384).requires_grad_(),
    )
    targets = torch.randint(0, value, (256,))

    def once() -> float:
        start = time.process_time()
        cross_entropy_sum(hidden, Head(weight), targets, torch.ones(256)).backward()
        weight.grad = None
        return time.process_time() - start

    return {"cost_cpu_s": min(once() for _ in range(3))}


def records(flags, value: int) -> Figures:
    from bench.tokenize import chats, opened

    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/chats.jsonl", "w") as file:
            file.writelines(
                json.dumps({"messages": chat}) + "\n"
                for chat in chats(SimpleNamespace(records=value, agents=False))
            )
        prepare = opened(SimpleNamespace(folder=folder, agents=False))
        start = time.process_time()
        prepare()
        middle = time.process_time()
        prepare()
        return {"cost_cpu_s": middle - start, "again_cpu_s": time.process_time() - middle}


def processes(flags, value: int) -> Figures:
    inner = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(value),
        __file__,
        "--steps-inside",
    ]
    told = command(
        [*inner, *(["--tiny"] if flags.tiny else [])], flags.threads, f"{value} processes"
    )
    return {"cost_cpu_s": told["cost_cpu_s"]}


def steps_inside(flags) -> None:
    """One of several processes: the median of four steps of the sharded model, summed over all."""
    import statistics

    import numpy as np
    import torch

    from ta import parallel

    device = parallel.init()
    model = packed_model(flags)
    parallel.shard(model, device, half=False)
    documents = [
        (
            np.random.default_rng(i).integers(5, shape(flags)["vocab_size"], 128),
            np.ones(128, np.float32),
        )
        for i in range(16)
    ]
    marks = train_timed(
        model, 5, lambda number: packed_batches(documents, 2048), sft_step, clock=time.process_time
    )
    mine = statistics.median(b - a for a, b in itertools.pairwise(marks[1:]))
    total = parallel.sum_over_ranks(torch.tensor([mine])).item()
    if parallel.rank() == 0:
        print(json.dumps({"cost_cpu_s": total}))
    parallel.close()


AXES = {
    "length": (length, (256, 512, 1024, 2048)),
    "batch": (batch, (2, 4, 8, 16)),
    "vocabulary": (vocabulary, (8192, 16384, 32768, 65536)),
    "records": (records, (500, 1000, 2000, 4000)),
    "processes": (processes, (1, 2)),
}

if __name__ == "__main__":
    flags = parser(__doc__, rounds=1)
    flags.add_argument("--axes", nargs="*", default=list(AXES), choices=list(AXES))
    flags.add_argument("--steps-inside", action="store_true", help="used by the script itself")
    given = read(flags)
    if given.steps_inside:
        sys.exit(steps_inside(given))
    chosen = {name: axes(given)[name] for name in given.axes}
    contenders = {
        f"{name} {value}": partial(work, value=value)
        for name, (work, values) in chosen.items()
        for value in values
    }
    runs = compare(contenders, given, next(iter(contenders)))
    if not given.one:
        import numpy as np

        for name, (_, values) in chosen.items():
            for key in ("cost_cpu_s", "again_cpu_s"):
                costs = [
                    np.median([row[key] for row in runs[f"{name} {value}"]])
                    for value in values
                    if key in runs[f"{name} {value}"][0]
                ]
                if costs:
                    slope = np.polyfit(np.log(values), np.log(costs), 1)[0]
                    told = f"{name:12} {key:12} exponent {slope:.2f}"
                    print(f"{told} over {values[0]} to {values[-1]}")
