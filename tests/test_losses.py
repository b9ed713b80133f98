"""Every preference loss against a formula written anew in float64, its value at step 0, its limits, extreme inputs, and split batches."""

import math

import pytest
import torch

from ta.losses import (
    PER_TOKEN,
    PREFERENCE_LOSSES,
    Pair,
    choose,
    ipo,
    log1mexp,
    preference_metrics,
    rewards,
)

LN2 = math.log(2)


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


def value(loss, policy, ref, lengths, margin, kls):
    every = {
        "policy": Pair(*policy, *lengths),
        "ref": Pair(*ref),
        "margin": margin,
        "kl_chosen": kls[0],
        "kl_rejected": kls[1],
    }
    return loss.value(**{name: every[name] for name in loss.inputs})


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_equals_the_published_formula_and_its_gradient(name):
    for seed in range(20):
        policy, ref, lengths, margin, kls = sample(7, seed)
        ours = value(choose(name), policy, ref, lengths, margin, kls)
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
            value(choose(name), ref, ref, lengths, margin, (zero, zero)),
            torch.full((5,), float(number)),
            msg=name,
        )
    assert set(expected) == {name for name in PREFERENCE_LOSSES if "ref" in choose(name).inputs}


def test_by_hand():
    policy, ref = (
        Pair(torch.tensor([-2.0]), torch.tensor([-6.0]), torch.tensor([2]), torch.tensor([3])),
        Pair(*torch.tensor([[-3.0], [-4.0]])),
    )
    at = lambda name, *more, **settings: choose(name, **settings).value(policy, *more).item()
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
            choose(name, **k), p, r, n, m, kls
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


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_extreme_float32_stays_finite(name):
    """Sums of -1e4, certainty (log-probability 0 or a rounding step from it) and huge ratios; values and gradients."""
    extremes = torch.tensor([0.0, -1e-30, -1e-8, -1e-3, -20.0, -200.0, -1e4])
    policy = torch.cartesian_prod(extremes, extremes).T.contiguous().requires_grad_()
    for ref in (torch.zeros(2, 49), torch.full((2, 49), -1e4), policy.detach().flip(0)):
        for lengths in (torch.ones(2, 49), torch.full((2, 49), 1e4)):
            for kl in (0.0, 1e4):
                values = value(
                    choose(name),
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


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_low_precision_is_computed_in_float32_and_float64_stays(name):
    policy, ref, lengths, margin, kls = sample(6, 1, torch.float32)
    halves = [x.detach().bfloat16() for x in (policy, ref, margin)]
    widened = [x.float() for x in halves]
    low = value(choose(name), halves[0], halves[1], lengths, halves[2], kls)
    torch.testing.assert_close(
        low, value(choose(name), widened[0], widened[1], lengths, widened[2], kls), rtol=0, atol=0
    )
    assert low.dtype == torch.float32
    assert (
        value(choose(name), policy.double(), ref.double(), lengths, margin, kls).dtype
        == torch.float64
    )


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_sum_over_splits_is_the_whole(name):
    """Micro-batches, ranks: the sum over any cut, divided once, is the whole batch's mean, gradient included."""
    policy, ref, lengths, margin, kls = sample(12, 9)
    loss = choose(name)
    whole = value(loss, policy, ref, lengths, margin, kls).sum() / 12
    for sizes in ([12], [5, 7], [1, 3, 0, 8], [1] * 12):
        parts = zip(*(x.split(sizes, -1) for x in (policy, ref, lengths, margin)), strict=True)
        cut = sum(value(loss, p, r, n, m, kls).sum() for p, r, n, m in parts) / 12
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)
        both = [torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (cut, whole)]
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)


def test_choose_fills_in_refuses_and_tells_what_a_loss_wants():
    loss = choose("simpo", beta=4.0, gamma=None)
    assert (
        loss.settings == {"beta": 4.0, "gamma": 1.0}
        and loss.inputs == {"policy"}
        and loss.per_token
    )
    assert choose("sigmoid_with_margin").inputs == {"policy", "ref", "margin"}
    assert choose("kto_pair").inputs == {"policy", "ref", "kl_chosen", "kl_rejected"}
    assert len(PREFERENCE_LOSSES) == 15 and set(PREFERENCE_LOSSES) >= PER_TOKEN
    assert all(
        PREFERENCE_LOSSES[name].__name__ == name and "arXiv" in PREFERENCE_LOSSES[name].__doc__
        for name in PREFERENCE_LOSSES
    )
    refused = [
        ("dpo", {}, "one of: sigmoid"),
        ("simpo", {"label_smoothing": 0.1}, "no effect"),
        ("sigmoid", {"beta": 0.0}, "above 0"),
    ]
    refused += [
        ("sigmoid", {"label_smoothing": 0.5}, "less than 0.5"),
        ("cpo", {"alpha": -1.0}, "0 or more"),
        ("ipo", {"beta": math.nan}, "above 0"),
    ]
    for name, settings, words in refused:
        with pytest.raises(ValueError, match=words):
            choose(name, **settings)
    with pytest.raises(ValueError, match="no lengths"):
        choose("simpo").value(Pair(torch.zeros(2), torch.zeros(2)))


def test_no_gradient_into_the_reference_point_or_out_of_what_is_logged():
    policy, ref, lengths, margin, kls = sample(4, 2)
    kls = [x.requires_grad_() for x in kls]
    value(choose("kto_pair"), policy, ref, lengths, margin, kls).sum().backward()
    assert policy.grad.abs().sum() > 0 and all(x.grad is None for x in kls)
    pair, every = Pair(*policy), (rewards(Pair(*policy)), rewards(Pair(*policy), Pair(*ref)))
    assert not any(
        x.requires_grad
        for logged in every
        for x in (*logged[:2], *preference_metrics(pair, logged).values())
    )
