"""What does a checkpoint cost, and what does the sharding code cost on one process?

    python bench/save.py

35 million weights with AdamW's moments (424 MB): seconds on the clock and of the CPU to save
(hashed, synced, published by one rename) and to load (every hash checked), beside torch.save and
torch.distributed.checkpoint, which hash nothing. Then one training step of a Llama of 26.7 million
weights on one process: as it is, after `ta.parallel.shard` (which leaves a lone process alone), and
after torch's fully_shard.
"""

import os
import tempfile
import time
from pathlib import Path

try:
    from harness import Figures, compare, parser, read
except ImportError:
    from bench.harness import Figures, compare, parser, read

from bench.work import packed_batches, packed_model, shape


def state(flags):
    """(model, its AdamW after one step)."""
    import torch

    torch.set_num_threads(flags.threads)
    side = 64 if flags.tiny else 1088
    model = torch.nn.Sequential(*(torch.nn.Linear(side, side) for _ in range(30)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def timed(save, load, folder: Path) -> Figures:
    start, cpu = time.perf_counter(), time.process_time()
    save()
    middle, cpu_middle = time.perf_counter(), time.process_time()
    load()
    times = {"save_s": middle - start, "load_s": time.perf_counter() - middle}
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    return times | {
        "save_cpu_s": cpu_middle - cpu,
        "load_cpu_s": time.process_time() - cpu_middle,
        "mb": size,
    }


def ours(flags) -> Figures:
    from ta.training import checkpoint

    model, optimizer = state(flags)
    with tempfile.TemporaryDirectory(dir=flags.where) as out:
        folder = Path(out)
        load = lambda: checkpoint.load(checkpoint.newest(folder), model, optimizer)
        return timed(lambda: checkpoint.save(folder, 1, model, optimizer, {}), load, folder)


def torch_save(flags) -> Figures:
    import torch

    model, optimizer = state(flags)
    with tempfile.TemporaryDirectory(dir=flags.where) as out:
        path = Path(out) / "all.pt"

        def save():
            with open(path, "wb") as file:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
                file.flush()
                os.fsync(file.fileno())

        def load():
            found = torch.load(path)
            model.load_state_dict(found["model"])
            optimizer.load_state_dict(found["optimizer"])

        return timed(save, load, Path(out))


def distributed(flags) -> Figures:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = state(flags)
    with tempfile.TemporaryDirectory(dir=flags.where) as out:

        def load():
            model_state, optimizer_state = get_state_dict(model, optimizer)
            dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=out)
            set_state_dict(
                model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
            )

        def save():
            dcp.save(
                dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)),
                checkpoint_id=out,
            )

        return timed(save, load, Path(out))


def step(flags, how: str) -> Figures:
    """CPU milliseconds of forward, backward and AdamW, best of six."""
    import numpy as np
    import torch

    from ta import parallel

    model = packed_model(flags)
    if how == "shard":
        parallel.shard(model, "cpu", half=False)
        assert not any(hasattr(p, "to_local") for p in model.parameters())
    if how == "fully_shard":
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        with tempfile.TemporaryDirectory() as store:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}/store", rank=0, world_size=1
            )
        for module in (*parallel.blocks(model), model):
            fully_shard(module)
        for name in model.METHODS:
            register_fsdp_forward_method(model, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = [np.random.default_rng(i).integers(5, shape(flags)["vocab_size"], 128) for i in range(4)]
    (batch,) = packed_batches([(x, np.ones(128, np.float32)) for x in ids], 512)

    def once() -> float:
        start = time.process_time()
        model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return 1000 * (time.process_time() - start)

    return {"cpu_ms_a_step": min(once() for _ in range(6))}


SAVING = {"ours": ours, "torch.save": torch_save, "distributed.checkpoint": distributed}
STEPS = {
    name: lambda flags, name=name: step(flags, name) for name in ("plain", "shard", "fully_shard")
}

if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument(
        "--where", help="folder on the disk to be measured; the temporary one by default"
    )
    given = read(flags)
    if given.one:
        compare(SAVING | STEPS, given, "")
    else:
        compare(SAVING, given, "ours")
        compare(STEPS, given, "plain")
