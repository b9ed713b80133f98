"""Steps of recipes, in which the host must not wait for a GPU: no value of a tensor is looked at."""

from functools import partial

import numpy as np
import pytest
import torch
from judged import labelled_set, pair_set, recipe
from small import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from ta import rl
from ta.data.loader import collate_pairs, labelled_collate, micro_batches
from ta.reference import Reference
from ta.rl.batches import RolloutBatch
from ta.training.loop import add_sums

# lift_fresh brings numbers from the host, bincount looks for the greatest one
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "lift_fresh")


class NoWaits(TorchDispatchMode):
    """RuntimeError for an operation that makes the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        places = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(x is not None and x.dtype == torch.bool for x in places)
        if name in WAITS or by_mask:
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sigmoid", "kto_pair", "ipo", "simpo", "kto", "grpo"])
def test_no_step_waits(method):
    model, before = tiny().eval(), Reference("frozen", tiny(seed=1).eval()).add_to
    dpo, kto = recipe("dpo"), recipe("kto")
    data = labelled_set() if method == "kto" else pair_set()
    collate = labelled_collate(data, 0) if method == "kto" else collate_pairs
    batches = micro_batches(data, np.arange(13), 200, True, collate)
    assert len(batches) > 1
    if method == "kto":
        step, with_kl = partial(kto.step, kto.Config()), kto.with_kl
    elif method == "grpo":
        step = partial(recipe("grpo").step, rl.PolicyConfig().filled(), rl.MismatchWatch(1.0))
        values = [torch.linspace(-1, 1, len(batch.sequences.targets)) for batch in batches]
        none, pairs = torch.zeros(0), zip(batches, values, strict=True)
        batches = [RolloutBatch(b.sequences, x, x - 2, none, none, {}) for b, x in pairs]
        before = list
    else:
        step, with_kl = partial(dpo.step, method, dpo.FLAGS[method]), dpo.with_kl
    sums = {}
    with NoWaits():
        made = before(batches)
        made = with_kl(model, made) if "kto" in method else made
        for batch in made:
            loss, count, metrics = step(model, batch)
            loss.backward()
            add_sums(sums, loss, count, batch, metrics)
    assert sums["loss"].isfinite() and sums["learned"]


def test_a_wait_is_seen():
    x = torch.linspace(-1, 1, 5)
    for wait in (torch.Tensor.item, torch.bincount, lambda x: x[x > 0], lambda x: x.new_tensor(2)):
        with pytest.raises(RuntimeError, match="waits for the device"), NoWaits():
            wait(x.sum() if wait is torch.Tensor.item else x)
