"""What a policy learns from rewarded answers: advantages, ratios, clipping, divisors and KL forms.

Pure functions with formula and source; the caller sums and divides. Letters: P prompts, G answers
to a prompt, N answers, M tokens of answers. pi is the policy that trains, old the policy before the
first update on these answers, mu what the engine sampled from, ref a reference that is frozen; r =
pi / old of a token, A the advantage of its answer. `owners` (M,) gives the answer of each token.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from ta.model.logprobs import sequence_sums
from ta.rl.settings import Advantage, Clip, Divide, Level, Mismatch

# added to a standard deviation by which rewards are divided
EPSILON = 1e-4


def advantages(rewards: Tensor, how: Advantage = "grpo") -> Tensor:
    """(P, G) advantages of (P, G) rewards; of a group with equal rewards they are exactly 0.

    grpo: (R - mean) / (std + 1e-4), mean and std (with G - 1) of the prompt's answers, GRPO, arXiv
    2402.03300 section 4.1.2. centred: R - mean, Dr. GRPO, arXiv 2503.20783. rloo: R - mean of the
    other answers, arXiv 2402.14740. batch: (R - mean) / (std + 1e-4) with the
    mean of the prompt's answers and the std of what is so centred in the whole step,
    REINFORCE++-baseline, arXiv 2501.03262.

    NaN stands for an answer without a reward: it has advantage 0 and no part in a mean.
    """
    known = ~rewards.isnan()
    counts = known.sum(1, keepdim=True)  # (P, 1)
    values = rewards.double().nan_to_num(0.0)
    means = values.sum(1, keepdim=True) / counts.clamp(min=1)
    highest = values.masked_fill(~known, -torch.inf).amax(1, keepdim=True)
    lowest = values.masked_fill(~known, torch.inf).amin(1, keepdim=True)
    # the mean of equal numbers may differ from them by rounding
    centred = torch.where(known & (highest > lowest), values - means, 0.0)
    match how:
        case "grpo":
            variance = centred.square().sum(1, keepdim=True) / (counts - 1).clamp(min=1)
            out = centred / (variance.sqrt() + EPSILON)
        case "centred":
            out = centred
        case "rloo":
            out = centred * counts / (counts - 1).clamp(min=1)
        case "batch":
            variance = centred.square().sum() / (known.sum() - 1).clamp(min=1)
            out = centred / (variance.sqrt() + EPSILON)
        case _:
            raise ValueError(f"advantage {how!r}: give {', '.join(get_args(Advantage))}")
    return out.to(rewards.dtype)


def log_ratios(logps: Tensor, old: Tensor, owners: Tensor, n: int, level: Level) -> Tensor:
    """(M,) log r of each token, or of each token the mean of log r over its answer.

    token: log pi - log old, PPO, arXiv 1707.06347. sequence: their mean over the tokens of the
    answer, so that r is the geometric mean, GSPO, arXiv 2507.18071 eq. 7.
    """
    gaps = logps - old
    if level == "token":
        return gaps
    sizes = sequence_sums(torch.ones_like(gaps), owners, n).clamp(min=1)
    return (sequence_sums(gaps, owners, n) / sizes)[owners]


def policy_loss(
    logps: Tensor, log_ratio: Tensor, advantage: Tensor, low: float, high: float, clip: Clip
) -> tuple[Tensor, Tensor]:
    """((M,) losses, (M,) bool whether clipping took away the gradient or changed the weight).

    objective: -min(r A, clip(r, 1 - low, 1 + high) A), PPO, arXiv 1707.06347 eq. 7; `high` above
    `low` is DAPO's clip-higher, arXiv 2503.14476 eq. 10. weight: -clip(r, 1 - low, 1 + high) A log
    pi, where no gradient flows into the clipped ratio, CISPO, arXiv 2506.13585. `advantage`
    (M,) is that of a token's answer.
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    if clip == "weight":
        return -bounded.detach() * advantage * logps, ratio != bounded
    plain, limited = ratio * advantage, bounded * advantage
    return -torch.minimum(plain, limited), plain > limited


def mismatch_weights(old: Tensor, sampled: Tensor, bound: float, how: Mismatch) -> Tensor:
    """(M,) weights old / mu of tokens that another engine, or older weights, sampled.

    truncate: min(old / mu, bound), truncated importance sampling (F. Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"). mask: old / mu where it
    lies within [1 / bound, bound], else 0, IcePop (Ling team, arXiv 2510.18855). none: 1. No
    gradient flows into them.
    """
    ratio = (old - sampled).detach().exp()
    match how:
        case "truncate":
            return ratio.clamp(max=bound)
        case "mask":
            return ratio * ((ratio <= bound) & (ratio >= 1 / bound))
        case "none":
            return torch.ones_like(ratio)


def token_weights(
    lengths: Tensor, divide: Divide, answers: int, tokens: int, longest: int
) -> Tensor:
    """(N,) the share of the loss of each token of an answer of `lengths` (N,) tokens.

    tokens: 1 / all tokens of the step, DAPO, arXiv 2503.14476 eq. 12. answers: 1 / (answers of the
    step * length), GRPO, arXiv 2402.03300 eq. 3. constant: 1 / (answers of the step * most tokens
    of an answer), Dr. GRPO, arXiv 2503.20783. `answers` and `tokens` are the numbers of
    the whole step, over all processes.
    """
    lengths = lengths.double()
    match divide:
        case "tokens":
            return torch.ones_like(lengths) / tokens
        case "answers":
            return 1 / (answers * lengths)
        case "constant":
            return torch.ones_like(lengths) / (answers * longest)


# Estimates of KL(pi || ref) from tokens of pi: J. Schulman, "Approximating KL Divergence" (2020).
# k1 and k3 have the mean of the KL; as a loss k2 alone has the gradient of the KL.


def k1(logps: Tensor, reference: Tensor) -> Tensor:
    """(M,) log pi - log ref: unbiased. In the reward its policy gradient is that of the KL."""
    return logps - reference


def k2(logps: Tensor, reference: Tensor) -> Tensor:
    """(M,) (log pi - log ref)^2 / 2: the mean of its gradient is the gradient of the KL."""
    return (logps - reference).square() / 2


def k3(logps: Tensor, reference: Tensor) -> Tensor:
    """(M,) ref / pi - 1 - log(ref / pi): unbiased and positive, for the log.

    As a loss the mean of its gradient is that of KL(ref || pi), not that of KL(pi || ref).
    """
    gap = reference - logps
    return gap.exp() - 1 - gap


def overlong_penalty(length: int, longest: int, margin: float) -> float:
    """What is added to the reward of an answer of `length` tokens, DAPO, arXiv 2503.14476 eq. 13.

    0 up to longest - margin tokens, then falling linearly to -1 at `longest`.
    """
    return -max(0.0, (length - (longest - margin)) / margin) if margin else 0.0
