"""Preference losses on the log-probabilities of answers: pure functions, one value a pair, for the caller to sum and divide.

Letters of the formulas: w chosen, l rejected; pi_x and rho_x the policy's and the reference's log-probability of answer x, a sum over
its tokens; r_x = pi_x - rho_x; m_x = pi_x / |x|, the mean over its tokens; s the logistic function; P pairs. Every default is the one
published with the method, and `beta`, `gamma` and the like mean what they mean in the paper, also where other code scales them otherwise.
A loss that takes no `ref` is reference-free. Values are float32, float64 where the log-probabilities are.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Pair(NamedTuple):
    """Log-probabilities of chosen and rejected answers, summed over their tokens; the numbers of tokens where a method wants means."""

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    chosen_len: Tensor | None = None  # (P,)
    rejected_len: Tensor | None = None  # (P,)


class Loss(NamedTuple):
    """A loss with its settings filled in; `value(**{name: ... for name in inputs})` gives (P,) values."""

    value: Callable[..., Tensor]
    inputs: frozenset[str]  # of policy, ref, margin, kl_chosen, kl_rejected
    settings: dict[str, float]
    per_token: bool  # its reward is a mean over tokens


def sigmoid(policy: Pair, ref: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO, eq. 7 of arXiv 2305.18290: -log s(beta (r_w - r_l)).

    With `label_smoothing` e, conservative DPO (E. Mitchell, 2023): (1 - e) of it plus e of the same with the labels swapped.
    """
    h = beta * _difference(policy, ref)
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def sigmoid_with_margin(policy: Pair, ref: Pair, *, margin: Tensor, beta: float = 0.1) -> Tensor:
    """DPO with an offset, arXiv 2402.10571 section 3: -log s(beta (r_w - r_l) - margin).

    `margin` (P,) is taken as it stands, in units of reward; the paper's is alpha times the logarithm of the difference of two scores.
    """
    h = beta * _difference(policy, ref)
    return -logsigmoid(h - margin.to(h.dtype))


def hinge(policy: Pair, ref: Pair, *, beta: float = 0.05) -> Tensor:
    """hinge-norm of RSO, arXiv 2309.06657 section 3: max(0, 1 - beta (r_w - r_l)); beta is the paper's gamma, 0.05 there."""
    return torch.relu(1 - beta * _difference(policy, ref))


def ipo(policy: Pair, ref: Pair, *, beta: float = 0.1, average: bool = False) -> Tensor:
    """IPO, eq. 17 of arXiv 2310.12036: (r_w - r_l - 1 / (2 beta))^2; beta is the paper's tau.

    Sums over tokens as printed; `average` puts means over tokens in place of the r, as TRL does. The paper has no one tau; 0.1 is TRL's.
    """
    ratio = _log_ratios(policy, ref)
    if average:
        ratio = _per_token(ratio)
    return (ratio.chosen - ratio.rejected - 1 / (2 * beta)).square()


def kto_pair(
    policy: Pair, ref: Pair, *, kl_chosen: Tensor, kl_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """KTO on pairs, after arXiv 2402.01306 section 4: the mean of 1 - s(beta (r_w - kl_rejected)) and 1 - s(beta (kl_chosen - r_l)).

    `kl_chosen` and `kl_rejected` are scalars: `objectives.kl_estimate` of all r_w and of all r_l of the global batch. Each side is judged
    against the other's, as in TRL's paired form; as in the paper, no gradient flows into them.
    """
    ratio = _log_ratios(policy, ref)
    h_w, h_l = (
        beta * (ratio.chosen - kl_rejected.detach()),
        beta * (ratio.rejected - kl_chosen.detach()),
    )
    return (torch.sigmoid(-h_w) + torch.sigmoid(h_l)) / 2


def slic_hf(policy: Pair, *, delta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """SLiC-HF, arXiv 2305.10425 section 2: max(0, delta - pi_w + pi_l) - alpha pi_w, sums over tokens; alpha is the paper's lambda.

    The target of the regulariser is the chosen answer. The paper prints no weights; 1 and 1 are the usual ones.
    """
    pi = _floats(policy)
    return torch.relu(delta - pi.chosen + pi.rejected) - alpha * pi.chosen


def cpo(policy: Pair, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """CPO, arXiv 2401.08417 section 3: -log s(beta (pi_w - pi_l)) - alpha m_w.

    The regulariser is a mean over tokens, as in the authors' code: there over the tokens of a batch, here over those of the answer, so
    that a pair weighs the same in any batch.
    """
    pi = _floats(policy)
    return -logsigmoid(beta * (pi.chosen - pi.rejected)) - alpha * _per_token(policy).chosen


def orpo(policy: Pair, *, beta: float = 0.1) -> Tensor:
    """ORPO, eq. 3, 6, 7 of arXiv 2403.07691: -m_w - beta log s(o_w - o_l), o_x = log(p / (1 - p)), p = exp(m_x); beta is its lambda."""
    mean = _per_token(policy)
    odds = mean.chosen - mean.rejected - log1mexp(mean.chosen) + log1mexp(mean.rejected)
    return -mean.chosen - beta * logsigmoid(odds)


def simpo(policy: Pair, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO, eq. 6 of arXiv 2405.14734: -log s(beta m_w - beta m_l - gamma).

    The authors advise a beta of 2 to 10 and start from gamma / beta = 0.5; gamma stands outside of beta.
    """
    mean = _per_token(policy)
    return -logsigmoid(beta * (mean.chosen - mean.rejected) - gamma)


def apo_zero(policy: Pair, ref: Pair, *, beta: float = 0.1) -> Tensor:
    """APO-zero, eq. 7 of arXiv 2408.06266 plus TRL's constant 1: 1 - s(beta r_w) + s(beta r_l), for chosen better than the model's own."""
    ratio = _log_ratios(policy, ref)
    return torch.sigmoid(-beta * ratio.chosen) + torch.sigmoid(beta * ratio.rejected)


def apo_down(policy: Pair, ref: Pair, *, beta: float = 0.1) -> Tensor:
    """APO-down, eq. 8 of arXiv 2408.06266 plus the same 1: s(beta r_w) + 1 - s(beta (r_w - r_l)), for chosen worse than the model's own."""
    ratio = _log_ratios(policy, ref)
    return torch.sigmoid(beta * ratio.chosen) + torch.sigmoid(
        -beta * (ratio.chosen - ratio.rejected)
    )


def asft(policy: Pair, *, beta: float = 0.1) -> Tensor:
    """ASFT, arXiv 2409.10571: -m_w - beta (log s(o_w) + log s(-o_l)) with ORPO's log odds o.

    As s(o) = p, that is -m_w - beta (m_w + log(1 - exp(m_l))), which is what is computed. The weight 0.1 is ORPO's.
    """
    mean = _per_token(policy)
    return -mean.chosen - beta * (mean.chosen + log1mexp(mean.rejected))


def dpop(policy: Pair, ref: Pair, *, beta: float = 0.3, penalty: float = 50.0) -> Tensor:
    """DPO-Positive, arXiv 2402.13228 section 3: -log s(beta (r_w - r_l - penalty max(0, -r_w))); penalty is the paper's lambda."""
    ratio = _log_ratios(policy, ref)
    return -logsigmoid(beta * (ratio.chosen - ratio.rejected - penalty * torch.relu(-ratio.chosen)))


def nca_pair(policy: Pair, ref: Pair, *, beta: float = 0.01) -> Tensor:
    """NCA on pairs, table 1 of arXiv 2402.05369: -log s(h_w) - log s(-h_w) / 2 - log s(-h_l) / 2 with h = beta r."""
    ratio = _log_ratios(policy, ref)
    h_w, h_l = beta * ratio.chosen, beta * ratio.rejected
    return -logsigmoid(h_w) - (logsigmoid(-h_w) + logsigmoid(-h_l)) / 2


def cal_dpo(policy: Pair, ref: Pair, *, beta: float = 0.002) -> Tensor:
    """Cal-DPO, arXiv 2412.14516: -log s(r_w - r_l) + (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2.

    beta enters by the targets only; 0.002 is the one of the authors' configuration.
    """
    ratio = _log_ratios(policy, ref)
    target = 1 / (2 * beta)
    return (
        -logsigmoid(ratio.chosen - ratio.rejected)
        + (ratio.chosen - target).square()
        + (ratio.rejected + target).square()
    )


def rewards(
    policy: Pair, ref: Pair | None = None, beta: float = 1.0, per_token: bool = False
) -> Pair:
    """What a method calls its rewards, for logging: beta r, or beta pi without a reference; of means where `per_token`. No gradient."""
    pair = _floats(policy) if ref is None else _log_ratios(policy, ref)
    pair = _per_token(pair) if per_token else pair
    return Pair(beta * pair.chosen.detach(), beta * pair.rejected.detach())


def preference_metrics(policy: Pair, reward: Pair) -> dict[str, Tensor]:
    """Sums over pairs, which the loop divides: rewards, their margin, pairs whose chosen reward is higher (a tie is half), log-probabilities."""
    margin = reward.chosen - reward.rejected
    return {
        "reward_chosen": reward.chosen.sum(),
        "reward_rejected": reward.rejected.sum(),
        "reward_margin": margin.sum(),
        "reward_accuracy": ((margin.sign() + 1) / 2).sum(),
        "logp_chosen": policy.chosen.detach().sum(),
        "logp_rejected": policy.rejected.detach().sum(),
    }


def choose(name: str, **settings: float | None) -> Loss:
    """The loss `name` with `settings`, None being the published default. ValueError for a setting that it lacks or a value it cannot take."""
    if name not in PREFERENCE_LOSSES:
        raise ValueError(f"unknown loss {name!r}; give one of: {', '.join(PREFERENCE_LOSSES)}")
    parameters = inspect.signature(PREFERENCE_LOSSES[name]).parameters.values()
    own = {p.name: p.default for p in parameters if p.default is not p.empty}
    given = {key: value for key, value in settings.items() if value is not None}
    for key, value in given.items():
        if key not in own:
            raise ValueError(
                f"{key}={value} would have no effect: loss {name} takes {', '.join(own)}; leave {key} out"
            )
        if key in ("beta", "delta") and not value > 0:
            raise ValueError(
                f"{key}={value} leaves loss {name} nothing to learn or reverses it; give a number above 0"
            )
        if key in ("gamma", "alpha", "penalty") and not value >= 0:
            raise ValueError(f"{key}={value} reverses a term of loss {name}; give 0 or more")
        if key == "label_smoothing" and not 0 <= value < 0.5:
            raise ValueError(
                f"label_smoothing={value} is the share of swapped labels; give at least 0 and less than 0.5"
            )
    inputs = frozenset(p.name for p in parameters if p.default is p.empty)
    return Loss(partial(PREFERENCE_LOSSES[name], **given), inputs, own | given, name in PER_TOKEN)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, precise on both sides of -ln 2 (Maechler, 2012); x is held one rounding step below 0, so it is finite."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _floats(pair: Pair) -> Pair:
    return pair._replace(chosen=_float(pair.chosen), rejected=_float(pair.rejected))


def _log_ratios(policy: Pair, ref: Pair) -> Pair:
    """The r of both answers, with the policy's lengths."""
    return policy._replace(
        chosen=_float(policy.chosen) - _float(ref.chosen),
        rejected=_float(policy.rejected) - _float(ref.rejected),
    )


def _difference(policy: Pair, ref: Pair) -> Tensor:
    ratio = _log_ratios(policy, ref)
    return ratio.chosen - ratio.rejected


def _per_token(pair: Pair) -> Pair:
    if pair.chosen_len is None or pair.rejected_len is None:
        raise ValueError(
            "the pair has no lengths, of which this method makes means; give Pair(chosen, rejected, chosen_len, rejected_len)"
        )
    return Pair(_float(pair.chosen) / pair.chosen_len, _float(pair.rejected) / pair.rejected_len)


PER_TOKEN = frozenset({"simpo", "orpo", "asft"})
PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_with_margin": sigmoid_with_margin,
    "hinge": hinge,
    "ipo": ipo,
    "kto_pair": kto_pair,
    "slic_hf": slic_hf,
    "cpo": cpo,
    "orpo": orpo,
    "simpo": simpo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "asft": asft,
    "dpop": dpop,
    "nca_pair": nca_pair,
    "cal_dpo": cal_dpo,
}
