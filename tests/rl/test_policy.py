"""Advantages, ratios, clipping, divisors and KL forms: by hand, and against exact gradients by enumeration."""

import math

import numpy as np
import pytest
import torch

from ta.rl.policy import (
    advantages,
    k1,
    k2,
    k3,
    log_ratios,
    mismatch_weights,
    overlong_penalty,
    policy_loss,
    token_weights,
)

NAN = math.nan


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tolerance, atol=tolerance)


def rewards(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_advantages_by_hand():
    table = rewards([1, 0, 0, 1], [2, 2, 2, 2], [0, 0, 0, 3])
    std = math.sqrt(1 / 3)
    far = [-0.75, -0.75, -0.75, 2.25]
    close(advantages(table, "centred"), [[0.5, -0.5, -0.5, 0.5], [0] * 4, far])
    close(advantages(table, "rloo")[2], [-1, -1, -1, 3])
    close(advantages(table, "grpo")[0], [x / (std + 1e-4) for x in (0.5, -0.5, -0.5, 0.5)])
    close(advantages(table, "grpo")[2], [x / (1.5 + 1e-4) for x in far])
    whole = math.sqrt((1 + 9 * 0.75) / 11)
    close(advantages(table, "batch")[2], [x / (whole + 1e-4) for x in far])


@pytest.mark.parametrize("how", ["grpo", "centred", "rloo", "batch"])
def test_equal_rewards_have_no_advantage_and_missing_ones_no_part(how):
    # 0.1 * 3 is not 0.3: a mean of equal numbers differs from them
    flat = torch.full((1, 7), 0.1, dtype=torch.float32)
    assert (advantages(flat, how) == 0).all()
    whole = advantages(rewards([1, 0, 4]), how)
    holed = advantages(rewards([1, NAN, 0, 4, NAN]), how)
    close(holed[:, [0, 2, 3]], whole)
    assert (holed[:, [1, 4]] == 0).all()
    assert (advantages(rewards([5, NAN], [NAN, NAN]), how) == 0).all(), "nothing to compare with"


@pytest.mark.parametrize("how", ["grpo", "centred", "rloo", "batch"])
def test_advantages_of_a_group_sum_to_zero_and_do_not_move_with_the_rewards(how):
    table = torch.tensor(np.random.default_rng(0).normal(size=(5, 6)))
    got = advantages(table, how)
    close(got.sum(1), [0.0] * 5, 1e-10)
    close(advantages(table + 3, how), got, 1e-9)
    if how in ("grpo", "batch"):
        close(advantages(table * 8, how), got, 1e-3)


def test_ratios_of_tokens_and_of_sequences():
    logps = torch.tensor([-1.0, -2.0, -3.0]).double()
    old, owners = torch.tensor([-1.0, -1.0, -3.5]).double(), torch.tensor([0, 0, 1])
    close(log_ratios(logps, old, owners, 2, "token"), [0, -1, 0.5])
    close(log_ratios(logps, old, owners, 2, "sequence"), [-0.5, -0.5, 0.5])


def test_clipping_by_hand():
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5]).double()
    advantage = torch.tensor([1, 1, 1, -2, -2, -2]).double()
    logps = ratio.log().requires_grad_()
    bounds = {"low": 0.2, "high": 0.28}
    loss, clipped = policy_loss(logps, logps, advantage, clip="objective", **bounds)
    close(loss, [-0.5, -1, -1.28, 1.6, 2, 3])
    assert clipped.tolist() == [False, False, True, True, False, False]
    (grad,) = torch.autograd.grad(loss.sum(), logps)
    close(grad, [-0.5, -1, 0, 0, 2, 3])
    loss, clipped = policy_loss(logps, logps, advantage, clip="weight", **bounds)
    (grad,) = torch.autograd.grad(loss.sum(), logps)
    close(grad, [-0.8, -1, -1.28, 1.6, 2, 2.56])  # every token teaches
    assert clipped.tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("clip", ["objective", "weight"])
def test_on_policy_the_gradient_is_the_policy_gradient(level, clip):
    """Where old is the policy itself, every form has the gradient of -sum of A log pi (sequence: of its mean)."""
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    owners = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    advantage = torch.tensor([1.5, -0.5]).double()[owners]
    ratio = log_ratios(logps, logps.detach(), owners, 2, level)
    loss, _ = policy_loss(logps, ratio, advantage, low=0.2, high=0.2, clip=clip)
    (grad,) = torch.autograd.grad(loss.sum(), logps)
    close(grad, -advantage)


def test_divisors_by_hand():
    lengths = torch.tensor([2, 3])
    close(token_weights(lengths, "tokens", 2, 5, 10), [0.2, 0.2])
    close(token_weights(lengths, "answers", 2, 5, 10), [1 / 4, 1 / 6])
    close(token_weights(lengths, "constant", 2, 5, 10), [1 / 20, 1 / 20])


def test_weights_of_a_mismatch():
    old = torch.tensor([1.0, 3.0, 0.2, 1.5], dtype=torch.float64).log().requires_grad_()
    sampled = torch.zeros(4).double()
    close(mismatch_weights(old, sampled, 2.0, "truncate"), [1, 2, 0.2, 1.5])
    close(mismatch_weights(old, sampled, 2.0, "mask"), [1, 0, 0, 1.5])
    assert not mismatch_weights(old, sampled, 2.0, "mask").requires_grad


def test_truncated_weights_put_the_gradient_right():
    """Tokens drawn from mu, weighted by pi / mu, have the expected gradient of tokens drawn from pi; unweighted they have not."""
    logits, other, reward = five(0), five(1).softmax(0), five(2)
    exact = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)[0]
    logps, mu = logits.log_softmax(0), other.detach()
    weights = mismatch_weights(logps.detach(), mu.log(), 1e9, "truncate")
    got = torch.autograd.grad((mu * weights * reward * logps).sum(), logits)[0]
    close(got, exact)
    logps = logits.log_softmax(0)
    wrong = torch.autograd.grad((mu * reward * logps).sum(), logits)[0]
    assert (wrong - exact).norm() > 0.1 * exact.norm()


def test_overlong_penalty_by_hand():
    assert [overlong_penalty(n, 10, 4) for n in (3, 6, 7, 8, 10)] == [0, 0, -0.25, -0.5, -1]
    assert overlong_penalty(10, 10, 0) == 0


def five(seed):
    """Five numbers, with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()


def expected_gradient(logits, of):
    """The mean over all five tokens, with their probabilities, of the gradient of a token's value."""
    logps = logits.log_softmax(0)
    return torch.autograd.grad((logps.detach().exp() * of(logps)).sum(), logits)[0]


def test_gradients_of_the_kl_forms_against_the_exact_one():
    """k1 as a reward and k2 as a loss have the gradient of KL(pi || ref) in the mean; k1 and k3 as losses have not."""
    logits, reference = five(3), five(4).log_softmax(0).detach()
    logps = logits.log_softmax(0)
    kl = (logps.exp() * (logps - reference)).sum()
    (exact,) = torch.autograd.grad(kl, logits)
    means = [(logps.exp() * k(logps, reference)).sum() for k in (k1, k3)]
    close(torch.stack(means).detach(), [kl.item()] * 2)
    as_reward = expected_gradient(logits, lambda x: k1(x, reference).detach() * x)
    close(as_reward, exact)
    close(expected_gradient(logits, lambda x: k2(x, reference)), exact)
    assert expected_gradient(logits, lambda x: k1(x, reference)).norm() < 1e-12, "it cancels out"
    of_k3 = expected_gradient(logits, lambda x: k3(x, reference))
    assert (of_k3 - exact).norm() > 0.1 * exact.norm()
    logps = logits.log_softmax(0)
    forward = (reference.exp() * (reference - logps)).sum()
    close(of_k3, torch.autograd.grad(forward, logits)[0])


@pytest.mark.parametrize("how", ["centred", "rloo"])
def test_the_expected_gradient_over_all_groups_is_that_of_the_reward(how):
    """Groups of two answers of one token each, all 25 with their probabilities: rloo has the exact gradient of the mean reward, centred half of it."""
    logits, reward = five(5), five(6).detach()
    (exact,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    total = torch.zeros(5, dtype=torch.float64)
    for a in range(5):
        for b in range(5):
            logps = logits.log_softmax(0)[[a, b]]
            values = advantages(reward[[a, b]][None], how)[0]
            loss, _ = policy_loss(
                logps, logps - logps.detach(), values, low=0.2, high=0.2, clip="objective"
            )
            (grad,) = torch.autograd.grad(-loss.mean(), logits)
            total += logps.sum().exp().detach() * grad
    close(total, exact if how == "rloo" else exact / 2)
