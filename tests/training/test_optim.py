"""Optimizers that --optimizer names: each against what it is made of."""

import signal

import pytest
import torch
from conftest import together
from small import prepared, sft_step, tiny

from ta import parallel
from ta.data.loader import collate_chats
from ta.model.adapters import AdapterConfig, add_adapter
from ta.parallel import blocks
from ta.training.optim import Muon, OptimConfig, make_optimizer, update


def stepped(model, config, batch, steps=3):
    """The model after some steps on one batch, and the losses before each."""
    optimizer = make_optimizer(model, config)
    curve = []
    for _ in range(steps):
        loss, count, _ = sft_step(model, batch)
        loss.backward()
        curve.append(loss.item() / float(count))
        update(optimizer, config.lr, loss.detach(), count, config.clip)
        optimizer.zero_grad()
    return model, curve


BATCH = collate_chats(prepared(16, learn=1.0), range(16), True)


def test_muon_moves_matrices_of_blocks_and_adamw_the_rest():
    """Each half is torch's own optimizer, alone on its half."""
    config = OptimConfig(lr=1e-2, weight_decay=0.1, optimizer="muon")
    ours, _ = stepped(tiny(dtype=torch.float64), config, BATCH)
    theirs = tiny(dtype=torch.float64)
    own = {id(p) for block in blocks(theirs) for p in block.parameters() if p.dim() == 2}
    halves = [p for p in theirs.parameters() if id(p) in own]
    tables = [theirs.inner.transformer.wte.weight, theirs.inner.transformer.wpe.weight]
    head = [theirs.inner.lm_head.weight]
    taken = {id(p) for p in (*halves, *head)}
    rest = [p for p in theirs.parameters() if id(p) not in taken]
    assert len(halves) == 8 and all(any(p is q for q in rest) for p in tables)
    muon = torch.optim.Muon(halves, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    # decay is for matrices, not for embeddings and vectors
    adamw = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.0}, {"params": head, "weight_decay": 0.1}],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for _ in range(3):
        loss, count, _ = sft_step(theirs, BATCH)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        muon.step(), adamw.step()
        theirs.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(("optimizer", "rank"), [("adamw", 0), ("muon", 0), ("muon", 1)])
def test_two_processes_update_as_one(optimizer, rank, tmp_path):
    """Also of matrices of LoRA, of `rank` rows, which are fewer than processes."""
    config = OptimConfig(lr=1e-3, optimizer=optimizer)

    def made():
        model = tiny(dtype=torch.float64)
        if rank:
            model.inner = add_adapter(model.inner, AdapterConfig(adapter="lora", lora_rank=rank))
        return model

    whole, _ = stepped(made(), config, BATCH, steps=2)

    def main(process):
        signal.alarm(100)
        model = made()
        device = parallel.init()
        if process:
            model.to("meta")
        parallel.shard(model, device, half=False)
        stepped(model, config, BATCH, steps=2)
        full = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
        if not process:
            torch.save(full, tmp_path / "full.pt")
        parallel.close()

    codes = together(main, 2, tmp_path / "said")
    assert codes == [0, 0], (tmp_path / "said").read_text()[-3000:]
    full, start = torch.load(tmp_path / "full.pt"), dict(made().named_parameters())
    for name, wanted in whole.named_parameters():
        moved = (wanted - start[name]).norm()
        assert (full[name] - wanted).norm() <= 1e-6 * moved, name
        assert (moved > 0) == wanted.requires_grad


@pytest.mark.slow
def test_moments_in_8_bits_learn_as_those_in_32():
    pytest.importorskip("torchao")
    _, plain = stepped(tiny(), OptimConfig(lr=3e-3), BATCH, steps=40)
    _, small = stepped(tiny(), OptimConfig(lr=3e-3, optimizer="adamw8bit"), BATCH, steps=40)
    assert plain[-1] < 0.6 * plain[0]
    assert small[-1] == pytest.approx(plain[-1], rel=0.1)


@pytest.mark.slow
def test_weights_in_bfloat16_are_rounded_right_on_average():
    """Updates of a thirtieth of the distance to the next number would all be lost by rounding to the nearest."""
    pytest.importorskip("torchao")
    model = tiny()
    model.half_precision = True
    config = OptimConfig(lr=1e-4, clip=0, optimizer="adamw8bit", weights="bfloat16")
    head = model.inner.lm_head.weight
    with torch.no_grad():
        head.fill_(1.0)
    optimizer = make_optimizer(model, config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.manual_seed(0)
    for _ in range(20):
        optimizer.step()
    moved = 1 - model.inner.lm_head.weight.float().mean().item()
    # below 1 the numbers lie 2^-8 apart
    assert moved == pytest.approx(20 * config.lr, rel=0.2)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (OptimConfig(lr=1.0, weights="bfloat16"), "--optimizer adamw8bit"),
        (OptimConfig(lr=1.0, weights="bfloat16", optimizer="adamw8bit"), "--dtype bfloat16"),
    ],
)
def test_what_does_not_go_together_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        make_optimizer(tiny(dtype=torch.float64), config)


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
def test_no_optimizer_waits_for_the_device(kind):
    """Fake tensors have no values, so that asking for one is an error."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = torch.nn.Linear(4, 4)
        for weight in layer.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer = {
            "adamw": lambda: torch.optim.AdamW(layer.parameters(), fused=True),
            "muon": lambda: Muon([layer.weight]),
            "sgd": lambda: torch.optim.SGD(layer.parameters()),
        }[kind]()
        loss, count = torch.ones(()), torch.ones((), dtype=torch.float64)
        assert update(optimizer, 1e-3, loss, count, 1.0).shape == ()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_one_update_by_hand(fused, clip):
    """Gradients are divided and clipped; one that is not finite is told, and a fused optimizer then moves nothing."""
    gradient = torch.tensor([3.0, -4.0])
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    for loss, bad in ((1.0, None), (torch.inf, None), (1.0, torch.nan)):
        weight.grad = gradient.clone() if bad is None else torch.full_like(gradient, bad)
        before = weight.detach().clone()
        norm = update(optimizer, 0.5, torch.tensor(loss), torch.tensor(2.0), clip)
        moved = before - weight.detach()
        if loss == 1.0 and bad is None:
            assert norm.item() == 2.5
            divided = gradient / 2 / (2.5 if clip else 1)
            torch.testing.assert_close(moved, 0.5 * divided)
        else:
            assert norm.isnan() and not (fused and moved.any())
            assert weight.grad.isnan().all() == (bad is not None)


def test_a_loss_that_reaches_no_weight_is_refused():
    """As of an optimizer that holds other tensors than the model runs with."""
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="reaches no weight that the optimizer holds"):
        update(torch.optim.SGD([weight]), 0.5, torch.tensor(1.0), torch.tensor(2.0), 1.0)
