"""KTO, reward, classification and RAG losses against formulas written anew in float64, by hand, at extremes, and over split batches."""

import math

import pytest
import torch
from ta.objectives import balanced_weights, class_loss, kl_estimate, kto, rag_loss, reward_loss


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def agree(ours, theirs, *leaves):
    """Same values and, with a weight of its own for every value, same gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    weights = torch.linspace(0.5, 2, len(ours), dtype=torch.float64)
    for mine, other in zip(
        *(
            torch.autograd.grad((x * weights).sum(), leaves, retain_graph=True)
            for x in (ours, theirs)
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_kto_equals_the_formula():
    logps, ref, desirable = normal(30).requires_grad_(), normal(30, seed=1), normal(30, seed=2) > 0
    kl = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    r, z = logps - ref, kl.detach()
    s = lambda x: 1 / (1 + torch.exp(-x))
    expected = torch.stack(
        [
            1.5 * (1 - s(0.3 * (r[i] - z))) if desirable[i] else 0.7 * (1 - s(0.3 * (z - r[i])))
            for i in range(30)
        ]
    )
    ours = kto(logps, ref, desirable, kl, beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    agree(ours, expected, logps)
    ours.sum().backward()
    assert kl.grad is None  # the reference point is no lever


def test_kto_by_hand_and_of_one_kind_only():
    yes, no = torch.tensor([True, True]), torch.tensor([False, False])
    zero = torch.tensor(0.0)
    for kind in (yes, no, yes[:1], no[:0]):
        got = kto(torch.full((len(kind),), -4.0), torch.full((len(kind),), -4.0), kind, zero)
        assert got.tolist() == [0.5] * len(kind)  # step 0
    default = kto(torch.tensor([-3.0]), torch.tensor([-4.0]), yes[:1], zero)
    assert default.item() == pytest.approx(1 / (1 + math.exp(0.1)))
    better = kto(
        torch.tensor([-3.0, -3.0]),
        torch.tensor([-4.0, -4.0]),
        torch.tensor([True, False]),
        zero,
        beta=1.0,
    )
    assert better.tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])


def test_kl_estimate_is_a_clamped_global_mean():
    ratios = normal(10).float() + 1
    split = sum(x.sum() for x in ratios.split(3))
    torch.testing.assert_close(kl_estimate(split, 10), ratios.mean().clamp(min=0))
    assert (
        kl_estimate(torch.tensor(-5.0), 10) == 0
        and kl_estimate(torch.tensor(0.0), torch.tensor(0)) == 0
    )
    assert kl_estimate(ratios.requires_grad_().sum(), 10).requires_grad is False


def test_reward_loss():
    w, l, margin = (
        normal(9).requires_grad_(),
        normal(9, seed=1).requires_grad_(),
        normal(9, seed=2).abs(),
    )
    agree(reward_loss(w, l), torch.log(1 + torch.exp(l - w)), w, l)
    agree(reward_loss(w, l, margin), -torch.log(1 / (1 + torch.exp(-(w - l - margin)))), w, l)
    assert reward_loss(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(math.log(2))


def test_class_loss_equals_the_formula():
    logits, labels = (2 * normal(40, 5)).requires_grad_(), (normal(40, seed=1) * 10).long() % 5
    weights = torch.tensor([0.2, 1.0, 3.0, 0.0, 2.0], dtype=torch.float64)
    p = (torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True))[torch.arange(40), labels]
    agree(class_loss(logits, labels), -torch.log(p), logits)
    for gamma in (0.5, 1.0, 2.0):
        agree(class_loss(logits, labels, gamma=gamma), -((1 - p) ** gamma) * torch.log(p), logits)
        # p of the focal factor is the model's: a weight scales the value and does nothing else
        agree(
            class_loss(logits, labels, class_weights=weights, gamma=gamma),
            -weights[labels] * (1 - p) ** gamma * torch.log(p),
            logits,
        )
    torch.testing.assert_close(
        class_loss(logits, labels),
        torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
    )
    with pytest.raises(ValueError, match="gamma=-1"):
        class_loss(logits, labels, gamma=-1)


def test_balanced_weights():
    labels = [0] * 6 + [1] * 3 + [3]
    weights = balanced_weights(labels, 5)
    torch.testing.assert_close(
        weights, torch.tensor([10 / 18, 10 / 9, 1.0, 10 / 3, 1.0])
    )  # classes 2 and 4 have no record
    assert weights[torch.tensor(labels)].mean().item() == pytest.approx(1)
    sums = torch.zeros(5).index_add_(0, torch.tensor(labels), weights[torch.tensor(labels)])
    torch.testing.assert_close(sums[[0, 1, 3]], torch.full((3,), 10 / 3))  # each class counts alike
    assert balanced_weights(torch.tensor([2, 2]), 3).tolist() == [1, 1, 1]
    for bad in ([0, 5], [-1, 0], []):
        with pytest.raises(ValueError, match=r"num_labels=5|no labels"):
            balanced_weights(bad, 5)


def test_rag_loss_equals_the_mixture():
    seq, doc = (normal(6, 4) - 3).requires_grad_(), normal(6, 4, seed=1).requires_grad_()
    prior = torch.exp(doc) / torch.exp(doc).sum(1, keepdim=True)
    agree(rag_loss(seq, doc), -torch.log((prior * torch.exp(seq)).sum(1)), seq, doc)
    # one passage: plain sequence loss, and the encoder has nothing to choose
    one = rag_loss(seq[:, :1], doc[:, :1])
    torch.testing.assert_close(one, -seq[:, 0])
    assert torch.autograd.grad(one.sum(), doc)[0].abs().max() == 0
    # k > 1: the encoder's gradient is prior minus posterior
    (grad,) = torch.autograd.grad(rag_loss(seq, doc).sum(), doc)
    torch.testing.assert_close(grad, prior.detach() - (doc + seq).softmax(1).detach())


def test_rag_loss_ignores_missing_passages():
    seq, doc = normal(2, 3).requires_grad_(), normal(2, 3, seed=1)
    gap = doc.clone()
    gap[0, 1], gap[1, 2] = -torch.inf, -torch.inf
    gap.requires_grad_()
    got = rag_loss(seq, gap)
    torch.testing.assert_close(got[0], rag_loss(seq[:1, [0, 2]], doc[:1, [0, 2]])[0])
    torch.testing.assert_close(got[1], rag_loss(seq[1:, :2], doc[1:, :2])[0])
    grads = torch.autograd.grad(got.sum(), (seq, gap))
    assert all(g.isfinite().all() and g[0, 1] == 0 == g[1, 2] for g in grads)


def test_extreme_float32_stays_finite():
    x = torch.tensor([0.0, 1e-8, -1e-8, 30.0, -30.0, 1e4, -1e4])
    a, b = torch.cartesian_prod(x, x).T.contiguous().requires_grad_().unbind()
    labels = torch.arange(49) % 2
    for values in (
        *(
            kto(a, b, labels == side, torch.tensor(kl), beta=beta)
            for side in (0, 1)
            for kl in (0.0, 1e4)
            for beta in (0.1, 5.0)
        ),
        *(reward_loss(a, b, margin) for margin in (None, torch.full((49,), 1e4))),
        *(
            class_loss(torch.stack([a, b], 1), labels, gamma=gamma)
            for gamma in (0.0, 0.1, 1.0, 2.0, 5.0)
        ),
        rag_loss(torch.stack([a, b], 1), torch.stack([b, a], 1)),
    ):
        grads = torch.autograd.grad(values.sum(), (a, b), retain_graph=True)
        assert (
            values.dtype == torch.float32
            and values.isfinite().all()
            and all(g.isfinite().all() for g in grads)
        )
    assert all(
        f.dtype == torch.float32
        for f in (reward_loss(a.bfloat16(), b.half()), rag_loss(a[None].half(), b[None].half()))
    )


def test_sum_over_splits_is_the_whole():
    """Class weights and KTO's global reference point are made before the split, so that nothing depends on it."""
    logits, labels, other = normal(12, 3).requires_grad_(), torch.arange(12) % 3, normal(12, seed=4)
    weights, kl = (
        balanced_weights(labels[:9], 3).double(),
        kl_estimate((logits[:, 0] - other).sum(), 12),
    )
    losses = {
        "class": lambda i: class_loss(logits[i], labels[i], class_weights=weights, gamma=2.0),
        "kto": lambda i: kto(logits[i, 0], other[i], labels[i] == 0, kl),
        "reward": lambda i: reward_loss(logits[i, 0], logits[i, 1]),
        "rag": lambda i: rag_loss(logits[i], logits[i].flip(1)),
    }
    for name, loss in losses.items():
        whole = loss(torch.arange(12)).sum() / 12
        for sizes in ([5, 7], [1, 3, 0, 8], [1] * 12):
            cut = sum(loss(i).sum() for i in torch.arange(12).split(sizes)) / 12
            torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12, msg=name)
            both = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (cut, whole)]
            torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
