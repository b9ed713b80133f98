"""Every loss against a formula written anew in float64, its value at step 0, its limits, extreme inputs, and split batches.

Preference losses are called through recipes/dpo.py, which says which setting feeds which of them.
"""

import inspect
import math
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from judged import recipe

from ta import losses
from ta.losses import (
    Pair,
    balanced_weights,
    class_loss,
    ipo,
    kl_estimate,
    kto,
    log1mexp,
    preference_metrics,
    rag_loss,
    reward_loss,
    rewards,
)

LN2 = math.log(2)
DPO = recipe("dpo")
NAMES = tuple(DPO.FLAGS)


def s(x):
    return 1 / (1 + torch.exp(-x))


def log_odds(mean):
    return torch.log(torch.exp(mean) / (1 - torch.exp(mean)))


def textbook(name, w, l, rw, rl, nw, nl, margin, kw, kl):
    """The published formula with the published default, in naive arithmetic, of sums w, l, reference sums rw, rl and lengths nw, nl."""
    a, b, mw, ml = w - rw, l - rl, w / nw, l / nl
    return {
        "sigmoid": lambda: -torch.log(s(0.1 * (a - b))),
        "sigmoid_with_margin": lambda: -torch.log(s(0.1 * (a - b) - margin)),
        "hinge": lambda: torch.clamp(1 - 0.05 * (a - b), min=0),
        "ipo": lambda: ((w - l) - (rw - rl) - 5.0) ** 2,
        "kto_pair": lambda: 0.5 * (2 - s(0.1 * (a - kl)) - s(0.1 * (kw - b))),
        "slic_hf": lambda: torch.clamp(1.0 - w + l, min=0) - w,
        "cpo": lambda: -torch.log(s(0.1 * (w - l))) - mw,
        "orpo": lambda: -mw - 0.1 * torch.log(s(log_odds(mw) - log_odds(ml))),
        "simpo": lambda: -torch.log(s(2.0 * mw - 2.0 * ml - 1.0)),
        "apo_zero": lambda: 1 - s(0.1 * a) + s(0.1 * b),
        "apo_down": lambda: s(0.1 * a) + 1 - s(0.1 * (a - b)),
        "asft": lambda: -mw - 0.1 * torch.log(s(log_odds(mw))) - 0.1 * torch.log(s(-log_odds(ml))),
        "dpop": lambda: -torch.log(s(0.3 * (a - b - 50 * torch.clamp(rw - w, min=0)))),
        "nca_pair": lambda: (
            -torch.log(s(0.01 * a)) - 0.5 * torch.log(s(-0.01 * a)) - 0.5 * torch.log(s(-0.01 * b))
        ),
        "cal_dpo": lambda: -torch.log(s(a - b)) + (a - 250) ** 2 + (b + 250) ** 2,
    }[name]()


def sample(pairs, seed, dtype=torch.float64):
    """Log-probabilities near the reference's, so that the naive formulas stay within range; -> (w, l, rw, rl), (nw, nl), margin, kl's."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (2, pairs), generator=g)
    ref = -lengths * (0.2 + torch.rand(2, pairs, generator=g, dtype=dtype))
    policy = (
        (ref + 0.15 * torch.randn(2, pairs, generator=g, dtype=dtype))
        .clamp(max=-0.05)
        .requires_grad_()
    )
    kls = (0.3 * torch.rand(2, generator=g, dtype=dtype)).unbind()
    return policy, ref, lengths, torch.rand(pairs, generator=g, dtype=dtype), kls


def value(name, policy, ref, lengths, margin, kls, **settings):
    """(P,) values of the loss as recipes/dpo.py computes them, with the published settings or others."""
    ref = None if name in DPO.WITHOUT_REFERENCE else Pair(*ref)
    batch = SimpleNamespace(margin=margin, kl=kls)
    settings = DPO.FLAGS[name] | settings
    return DPO.preference_loss(name, settings, Pair(*policy, *lengths), ref, batch)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_published_formula_and_its_gradient(name):
    for seed in range(20):
        policy, ref, lengths, margin, kls = sample(7, seed)
        ours = value(name, policy, ref, lengths, margin, kls)
        theirs = textbook(name, *policy, *ref, *lengths, margin, *kls)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        weights = torch.linspace(0.5, 2, 7, dtype=torch.float64)  # every pair's own gradient counts
        grads = [
            torch.autograd.grad((x * weights).sum(), policy, retain_graph=True)[0]
            for x in (ours, theirs)
        ]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-11)
        assert ours.shape == (7,) and grads[0].abs().max() > 0


def test_step_0_has_the_analytic_value():
    """Policy equal to reference: every r is 0, whatever the sums are."""
    _, ref, lengths, _, _ = sample(5, 0, torch.float32)
    zero, margin = torch.tensor(0.0), torch.full((5,), 0.7)
    expected = {
        "sigmoid": LN2,
        "hinge": 1,
        "ipo": 25,
        "kto_pair": 0.5,
        "apo_zero": 1,
        "apo_down": 1,
        "dpop": LN2,
        "nca_pair": 2 * LN2,
    }
    expected |= {"cal_dpo": LN2 + 2 * 250**2, "sigmoid_with_margin": math.log(1 + math.exp(0.7))}
    for name, number in expected.items():
        torch.testing.assert_close(
            value(name, ref, ref, lengths, margin, (zero, zero)),
            torch.full((5,), float(number)),
            msg=name,
        )
    assert set(expected) == set(NAMES) - set(DPO.WITHOUT_REFERENCE)


def test_by_hand():
    policy, ref = (
        Pair(torch.tensor([-2.0]), torch.tensor([-6.0]), torch.tensor([2]), torch.tensor([3])),
        Pair(*torch.tensor([[-3.0], [-4.0]])),
    )
    at = lambda name, *more, **settings: getattr(losses, name)(policy, *more, **settings).item()
    assert at("sigmoid", ref) == pytest.approx(math.log(1 + math.exp(-0.3)))  # r_w = 1, r_l = -2
    assert at("sigmoid", ref, label_smoothing=0.25) == pytest.approx(
        math.log(1 + math.exp(-0.3)) + 0.25 * 0.3
    )  # -log s(-x) = -log s(x) + x
    assert (
        at("hinge", ref, beta=0.1) == pytest.approx(0.7) and at("hinge", ref, beta=0.5) == 0
    )  # 3 apart is enough for 1 / 0.5
    assert at("ipo", ref, beta=0.25) == pytest.approx(1.0)
    assert ipo(policy, ref, beta=0.25, average=True).item() == pytest.approx((0.5 + 2 / 3 - 2) ** 2)
    assert at("slic_hf") == 2.0  # 4 apart: only the regulariser is left
    assert at("simpo") == pytest.approx(math.log(1 + math.exp(-(2 * -1 - 2 * -2 - 1))))
    got = rewards(policy, ref, 0.1)
    assert got.chosen.item() == pytest.approx(0.1) and got.rejected.item() == pytest.approx(-0.2)
    assert [x.item() for x in rewards(policy, beta=2.0, per_token=True)[:2]] == [-2.0, -4.0]
    sums = preference_metrics(policy, got)
    assert (
        sums["reward_margin"].item() == pytest.approx(0.3)
        and sums["reward_accuracy"] == 1
        and sums["logp_rejected"] == -6
    )
    assert (
        preference_metrics(policy, Pair(got.chosen, got.chosen))["reward_accuracy"] == 0.5
    )  # a tie is chance


def test_limits_and_symmetry():
    policy, ref, lengths, margin, kls = sample(50, 3)
    with torch.no_grad():
        swap = lambda x: x.flip(0)
        loss = lambda name, p=policy, r=ref, n=lengths, m=margin, **k: value(
            name, p, r, n, m, kls, **k
        )
        d = 0.1 * (policy[0] - ref[0] - policy[1] + ref[1])
        torch.testing.assert_close(
            loss("sigmoid") - loss("sigmoid", swap(policy), swap(ref)), -d
        )  # -log s(d) + log s(-d) = -d
        half = (loss("sigmoid") + loss("sigmoid", swap(policy), swap(ref))) / 2
        torch.testing.assert_close(loss("sigmoid", label_smoothing=0.5 - 1e-12), half)
        torch.testing.assert_close(loss("sigmoid_with_margin", m=torch.zeros(50)), loss("sigmoid"))
        torch.testing.assert_close(loss("dpop", penalty=0.0), loss("sigmoid", beta=0.3))
        torch.testing.assert_close(
            loss("slic_hf", alpha=0.0, delta=1.0), torch.relu(1 - policy[0] + policy[1])
        )
        torch.testing.assert_close(
            loss("simpo", gamma=0.0) - loss("simpo", swap(policy), n=swap(lengths), gamma=0.0),
            -2 * (policy / lengths).T @ torch.tensor([1.0, -1.0]).double(),
        )
        assert (loss("orpo") >= -policy[0] / lengths[0]).all() and (
            loss("cpo") >= -policy[0] / lengths[0]
        ).all()


@pytest.mark.parametrize("name", NAMES)
def test_extreme_float32_stays_finite(name):
    """Sums of -1e4, certainty (log-probability 0 or a rounding step from it) and huge ratios; values and gradients."""
    extremes = torch.tensor([0.0, -1e-30, -1e-8, -1e-3, -20.0, -200.0, -1e4])
    policy = torch.cartesian_prod(extremes, extremes).T.contiguous().requires_grad_()
    for ref in (torch.zeros(2, 49), torch.full((2, 49), -1e4), policy.detach().flip(0)):
        for lengths in (torch.ones(2, 49), torch.full((2, 49), 1e4)):
            for kl in (0.0, 1e4):
                values = value(
                    name,
                    policy,
                    ref,
                    lengths,
                    torch.full((49,), 1e4),
                    (torch.tensor(kl), torch.tensor(kl)),
                )
                (grad,) = torch.autograd.grad(values.sum(), policy)
                assert (
                    values.dtype == torch.float32
                    and values.isfinite().all()
                    and grad.isfinite().all()
                )


def test_log1mexp_is_precise_everywhere():
    """Plain log(1 - exp(x)) in float32 is a thousand times coarser near 0 and has no slope left at -20."""
    x = -torch.logspace(-6.5, 1.9, 400)
    exact = torch.where(
        x > -1, torch.log(-torch.expm1(x.double())), torch.log1p(-torch.exp(x.double()))
    )
    torch.testing.assert_close(log1mexp(x).double(), exact, rtol=2e-6, atol=0)
    assert (torch.log(1 - torch.exp(x[:20])).double() / exact[:20] - 1).abs().max() > 2e-3
    x = torch.tensor([-20.0, -1e-3], requires_grad=True)
    (grad,) = torch.autograd.grad(log1mexp(x).sum(), x)
    torch.testing.assert_close(grad, -1 / torch.expm1(-x.detach()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_is_computed_in_float32_and_float64_stays(name):
    policy, ref, lengths, margin, kls = sample(6, 1, torch.float32)
    halves = [x.detach().bfloat16() for x in (policy, ref, margin)]
    widened = [x.float() for x in halves]
    low = value(name, halves[0], halves[1], lengths, halves[2], kls)
    torch.testing.assert_close(
        low, value(name, widened[0], widened[1], lengths, widened[2], kls), rtol=0, atol=0
    )
    assert low.dtype == torch.float32
    assert value(name, policy.double(), ref.double(), lengths, margin, kls).dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_sum_over_splits_is_the_whole(name):
    """Micro-batches, ranks: the sum over any cut, divided once, is the whole batch's mean, gradient included."""
    policy, ref, lengths, margin, kls = sample(12, 9)
    whole = value(name, policy, ref, lengths, margin, kls).sum() / 12
    for sizes in ([12], [5, 7], [1, 3, 0, 8], [1] * 12):
        parts = zip(*(x.split(sizes, -1) for x in (policy, ref, lengths, margin)), strict=True)
        cut = sum(value(name, p, r, n, m, kls).sum() for p, r, n, m in parts) / 12
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)
        both = [torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (cut, whole)]
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_knows_every_loss_and_its_published_settings(name):
    """A flag of a loss is one of its settings, all of them have flags, and the defaults are one."""
    given = inspect.signature(getattr(losses, name)).parameters
    defaults = {k: p.default for k, p in given.items() if p.default is not inspect.Parameter.empty}
    assert DPO.FLAGS[name] == defaults
    assert ("ref" in given) == (name not in DPO.WITHOUT_REFERENCE)
    assert "arXiv" in getattr(losses, name).__doc__


def test_every_preference_loss_is_offered():
    of_pairs = {
        name
        for name, function in vars(losses).items()
        if inspect.isfunction(function) and not name.startswith("_")
        if next(iter(inspect.signature(function).parameters)) == "policy"
    }
    assert of_pairs - {"rewards", "preference_metrics"} == set(NAMES) and len(NAMES) == 15
    assert set(DPO.PER_TOKEN) <= set(NAMES) and set(DPO.WITHOUT_REFERENCE) <= set(NAMES)
    assert get_args(get_type_hints(DPO.Config)["loss"]) == NAMES
    with pytest.raises(ValueError, match="no lengths"):
        losses.simpo(Pair(torch.zeros(2), torch.zeros(2)))


def test_settings_are_those_given_or_the_published_ones(door):
    assert DPO.loss_settings(DPO.Config(loss="simpo", beta=4.0)) == {"beta": 4.0, "gamma": 1.0}
    for name in NAMES:
        assert DPO.loss_settings(DPO.Config(loss=name)) == DPO.FLAGS[name]
        for flag in {flag for flags in DPO.FLAGS.values() for flag in flags}:
            config = DPO.Config(loss=name, **{flag: 0.25})
            if flag in DPO.FLAGS[name]:
                assert DPO.loss_settings(config) == DPO.FLAGS[name] | {flag: 0.25}
                continue
            words = f"{flag.replace('_', '-')} 0.25 would have no effect: --loss {name} takes --"
            with pytest.raises(ValueError, match=words):
                DPO.loss_settings(config)
    for flags, words in (
        (("--loss", "dppo"), "sigmoid"),
        (("--beta", 0), "above 0"),
        (("--beta", "nan"), "above 0"),
        (("--label-smoothing", 0.5), "0.5"),
        (("--loss", "cpo", "--alpha", -1), "0"),
        (("--loss", "simpo", "--label-smoothing", 0.1), "no effect"),
    ):
        code, text = door("dpo", *flags)
        assert code == 2 and words in text and flags[-2] in text.replace("label_s", "--label-s")


def test_no_gradient_into_the_reference_point_or_out_of_what_is_logged():
    policy, ref, lengths, margin, kls = sample(4, 2)
    kls = [x.requires_grad_() for x in kls]
    value("kto_pair", policy, ref, lengths, margin, kls).sum().backward()
    assert policy.grad.abs().sum() > 0 and all(x.grad is None for x in kls)
    pair, every = Pair(*policy), (rewards(Pair(*policy)), rewards(Pair(*policy), Pair(*ref)))
    assert not any(
        x.requires_grad
        for logged in every
        for x in (*logged[:2], *preference_metrics(pair, logged).values())
    )


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


def test_extreme_float32_of_the_others_stays_finite():
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


def test_sum_over_splits_of_the_others_is_the_whole():
    """Class weights and KTO's global reference point are made before the split, so that nothing depends on it."""
    logits, labels, other = normal(12, 3).requires_grad_(), torch.arange(12) % 3, normal(12, seed=4)
    weights, kl = (
        balanced_weights(labels[:9], 3).double(),
        kl_estimate((logits[:, 0] - other).sum(), 12),
    )
    every = {
        "class": lambda i: class_loss(logits[i], labels[i], class_weights=weights, gamma=2.0),
        "kto": lambda i: kto(logits[i, 0], other[i], labels[i] == 0, kl),
        "reward": lambda i: reward_loss(logits[i, 0], logits[i, 1]),
        "rag": lambda i: rag_loss(logits[i], logits[i].flip(1)),
    }
    for name, loss in every.items():
        whole = loss(torch.arange(12)).sum() / 12
        for sizes in ([5, 7], [1, 3, 0, 8], [1] * 12):
            cut = sum(loss(i).sum() for i in torch.arange(12).split(sizes)) / 12
            torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12, msg=name)
            both = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (cut, whole)]
            torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
