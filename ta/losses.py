"""Losses of preferences, scores, classes and retrieval: pure functions with formula and source.

The caller sums and divides. Cross-entropy of tokens and distances to a teacher stand in
ta/model/logprobs.py, the losses of online reinforcement learning in ta/rl/policy.py.

A preference loss gives one value a pair, (P,). Letters of their formulas: w chosen, l rejected;
pi_x and rho_x the policy's and the reference's log-probability of answer x, a sum over its tokens;
r_x = pi_x - rho_x; m_x = pi_x / |x|, the mean over its tokens; s the logistic function; P pairs.
Every default is the one published with the method. `beta`, `gamma` and the like mean what they mean
in the paper, also where other code scales them otherwise. A loss that takes no `ref` is
reference-free.

The other losses give one value a record: N answers or records, C classes, Q questions, K passages a
question. Values are float32, float64 where the inputs are.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Pair(NamedTuple):
    """Log-probabilities of chosen and rejected answers, each a sum over the tokens of the answer.

    The numbers of tokens, at least 1, are needed by methods that take means.
    """

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    chosen_len: Tensor | None = None  # (P,)
    rejected_len: Tensor | None = None  # (P,)

    @property
    def gap(self) -> Tensor:
        """The chosen answer's value minus that of the rejected one, (P,)."""
        return self.chosen - self.rejected


def sigmoid(policy: Pair, ref: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO, eq. 7 of arXiv 2305.18290: -log s(beta (r_w - r_l)).

    With `label_smoothing` e this is conservative DPO (E. Mitchell, 2023): (1 - e) times that value
    plus e times the value with the labels swapped.
    """
    h = beta * _log_ratios(policy, ref).gap
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def sigmoid_with_margin(policy: Pair, ref: Pair, *, margin: Tensor, beta: float = 0.1) -> Tensor:
    """DPO with an offset, arXiv 2402.10571 section 3: -log s(beta (r_w - r_l) - margin).

    `margin` (P,) is used unscaled, in units of reward. The paper's margin is alpha times the
    logarithm of the difference of two scores.
    """
    h = beta * _log_ratios(policy, ref).gap
    return -logsigmoid(h - margin.to(h.dtype))


def hinge(policy: Pair, ref: Pair, *, beta: float = 0.05) -> Tensor:
    """hinge-norm of RSO, arXiv 2309.06657 section 3: max(0, 1 - beta (r_w - r_l)).

    beta is the paper's gamma, 0.05 there.
    """
    return torch.relu(1 - beta * _log_ratios(policy, ref).gap)


def ipo(policy: Pair, ref: Pair, *, beta: float = 0.1, average: bool = False) -> Tensor:
    """IPO, eq. 17 of arXiv 2310.12036: (r_w - r_l - 1 / (2 beta))^2; beta is the paper's tau.

    The r are sums over tokens, as printed; with `average` they are means over tokens, as in TRL.
    The paper names no single tau; 0.1 is TRL's.
    """
    ratio = _log_ratios(policy, ref)
    if average:
        ratio = _per_token(ratio)
    return (ratio.gap - 1 / (2 * beta)).square()


def kto_pair(
    policy: Pair, ref: Pair, *, kl_chosen: Tensor, kl_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """KTO on pairs, after arXiv 2402.01306 section 4.

    It is the mean of 1 - s(beta (r_w - kl_rejected)) and 1 - s(beta (kl_chosen - r_l)). `kl_chosen`
    and `kl_rejected` are scalars: `kl_estimate` of all r_w and of all r_l of the global batch. Each
    side is compared with the estimate of the other side, as in TRL's paired form; as in the paper,
    no gradient flows into the estimates.
    """
    ratio = _log_ratios(policy, ref)
    h_w = beta * (ratio.chosen - kl_rejected.detach())
    h_l = beta * (ratio.rejected - kl_chosen.detach())
    return (torch.sigmoid(-h_w) + torch.sigmoid(h_l)) / 2


def slic_hf(policy: Pair, *, delta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """SLiC-HF, arXiv 2305.10425 section 2: max(0, delta - pi_w + pi_l) - alpha pi_w.

    alpha is the paper's lambda. The target of the regularizer is the chosen answer. The paper
    prints no values for delta and alpha; 1 and 1 are the usual ones.
    """
    pi = _floats(policy)
    return torch.relu(delta - pi.gap) - alpha * pi.chosen


def cpo(policy: Pair, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """CPO, arXiv 2401.08417 section 3: -log s(beta (pi_w - pi_l)) - alpha m_w.

    The regularizer is a mean over tokens, as in the authors' code: there over the tokens of a
    batch, here over those of the answer, so that a pair has the same weight in any batch.
    """
    return -logsigmoid(beta * _floats(policy).gap) - alpha * _per_token(policy).chosen


def orpo(policy: Pair, *, beta: float = 0.1) -> Tensor:
    """ORPO, eq. 3, 6, 7 of arXiv 2403.07691: -m_w - beta log s(o_w - o_l); beta is its lambda.

    o_x = log(p / (1 - p)) with p = exp(m_x).
    """
    mean = _per_token(policy)
    odds = mean.gap - log1mexp(mean.chosen) + log1mexp(mean.rejected)
    return -mean.chosen - beta * logsigmoid(odds)


def simpo(policy: Pair, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO, eq. 6 of arXiv 2405.14734: -log s(beta m_w - beta m_l - gamma).

    The authors advise a beta of 2 to 10 and start from gamma / beta = 0.5; gamma is not multiplied
    by beta.
    """
    return -logsigmoid(beta * _per_token(policy).gap - gamma)


def apo_zero(policy: Pair, ref: Pair, *, beta: float = 0.1) -> Tensor:
    """APO-zero, eq. 7 of arXiv 2408.06266 plus TRL's constant 1: 1 - s(beta r_w) + s(beta r_l).

    It is for chosen answers that are better than the model's own.
    """
    ratio = _log_ratios(policy, ref)
    return torch.sigmoid(-beta * ratio.chosen) + torch.sigmoid(beta * ratio.rejected)


def apo_down(policy: Pair, ref: Pair, *, beta: float = 0.1) -> Tensor:
    """APO-down, eq. 8 of arXiv 2408.06266 plus 1: s(beta r_w) + 1 - s(beta (r_w - r_l)).

    The constant 1 is TRL's. It is for chosen answers that are worse than the model's own.
    """
    ratio = _log_ratios(policy, ref)
    return torch.sigmoid(beta * ratio.chosen) + torch.sigmoid(-beta * ratio.gap)


def asft(policy: Pair, *, beta: float = 0.1) -> Tensor:
    """ASFT, arXiv 2409.10571: -m_w - beta (log s(o_w) + log s(-o_l)) with ORPO's log odds o.

    Since s(o) = p this equals -m_w - beta (m_w + log(1 - exp(m_l))), which is the form computed
    here. The weight 0.1 is ORPO's.
    """
    mean = _per_token(policy)
    return -mean.chosen - beta * (mean.chosen + log1mexp(mean.rejected))


def dpop(policy: Pair, ref: Pair, *, beta: float = 0.3, penalty: float = 50.0) -> Tensor:
    """DPO-Positive, arXiv 2402.13228 section 3; penalty is the paper's lambda.

    -log s(beta (r_w - r_l - penalty max(0, -r_w)))
    """
    ratio = _log_ratios(policy, ref)
    return -logsigmoid(beta * (ratio.gap - penalty * torch.relu(-ratio.chosen)))


def nca_pair(policy: Pair, ref: Pair, *, beta: float = 0.01) -> Tensor:
    """NCA on pairs, table 1 of arXiv 2402.05369.

    -log s(h_w) - log s(-h_w) / 2 - log s(-h_l) / 2 with h = beta r.
    """
    ratio = _log_ratios(policy, ref)
    h_w, h_l = beta * ratio.chosen, beta * ratio.rejected
    return -logsigmoid(h_w) - (logsigmoid(-h_w) + logsigmoid(-h_l)) / 2


def cal_dpo(policy: Pair, ref: Pair, *, beta: float = 0.002) -> Tensor:
    """Cal-DPO, arXiv 2412.14516.

    -log s(r_w - r_l) + (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2. beta enters by the targets
    only; 0.002 is that of the authors' configuration.
    """
    ratio = _log_ratios(policy, ref)
    target = 1 / (2 * beta)
    return (
        -logsigmoid(ratio.gap)
        + (ratio.chosen - target).square()
        + (ratio.rejected + target).square()
    )


def rewards(
    policy: Pair, ref: Pair | None = None, beta: float = 1.0, per_token: bool = False
) -> Pair:
    """The rewards of a method, for logging: beta r, or beta pi without a reference. (P,) each

    With `per_token` they are those of means over tokens. They carry no gradient.
    """
    pair = _floats(policy) if ref is None else _log_ratios(policy, ref)
    pair = _per_token(pair) if per_token else pair
    return Pair(beta * pair.chosen.detach(), beta * pair.rejected.detach())


def preference_metrics(policy: Pair, reward: Pair) -> dict[str, Tensor]:
    """Sums over pairs for the log: rewards, their margin, accuracy and log-probabilities.

    The accuracy counts the pairs whose chosen reward is higher; a tie counts half. The loop divides
    the sums by the number of pairs.
    """
    return {
        "reward_chosen": reward.chosen.sum(),
        "reward_rejected": reward.rejected.sum(),
        "reward_margin": reward.gap.sum(),
        "reward_accuracy": ((reward.gap.sign() + 1) / 2).sum(),
        "logp_chosen": policy.chosen.detach().sum(),
        "logp_rejected": policy.rejected.detach().sum(),
    }


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, precise on both sides of -ln 2 (Maechler, 2012).

    x is held one rounding step below 0, so the result is finite.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near_zero, far = torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x))
    return torch.where(x > -math.log(2), near_zero, far)


def at_least_float(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def _check_alike(one: Tensor, other: Tensor) -> None:
    """ValueError for values of two shapes, which torch would repeat until they fit."""
    if one.shape != other.shape:
        raise ValueError(
            f"values of shapes {(*one.shape,)} and {(*other.shape,)}: give one of each to a pair"
        )


def _floats(pair: Pair) -> Pair:
    _check_alike(pair.chosen, pair.rejected)
    return pair._replace(chosen=at_least_float(pair.chosen), rejected=at_least_float(pair.rejected))


def _log_ratios(policy: Pair, ref: Pair) -> Pair:
    """The r of both answers, with the policy's lengths."""
    policy, ref = _floats(policy), _floats(ref)
    _check_alike(policy.chosen, ref.chosen)
    chosen, rejected = policy.chosen - ref.chosen, policy.rejected - ref.rejected
    return policy._replace(chosen=chosen, rejected=rejected)


def _per_token(pair: Pair) -> Pair:
    if pair.chosen_len is None or pair.rejected_len is None:
        raise ValueError(
            "the pair has no lengths, of which this method makes means; give Pair(chosen, "
            "rejected, chosen_len, rejected_len)"
        )
    pair = _floats(pair)
    return Pair(pair.chosen / pair.chosen_len, pair.rejected / pair.rejected_len)


def kto(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, arXiv 2402.01306 section 4. -> (N,)

    weight (1 - s(beta (r - kl))) for a desirable answer, weight (1 - s(beta (kl - r))) for another.
    r = logps - ref_logps, both (N,), sums over the answer's tokens; `desirable` (N,) bool; `kl` is
    a scalar, `kl_estimate` on mismatched answers, into which no gradient flows.

    The weights are the paper's lambda_D and lambda_U. Choose them so that weight times number of
    desirable answers is 1 to 4/3 of that of the others.
    """
    ratio = at_least_float(logps) - at_least_float(ref_logps) - kl.detach()  # (N,)
    good = desirable_weight * torch.sigmoid(-beta * ratio)
    bad = undesirable_weight * torch.sigmoid(beta * ratio)
    return torch.where(desirable, good, bad)


def kl_estimate(log_ratio_sum: Tensor, count: Tensor | int) -> Tensor:
    """KTO's reference point max(0, mean log-ratio), arXiv 2402.01306 section 4, a scalar.

    It takes the sum of the log-ratios over the global batch and their number; 0 for a count of 0.
    """
    count = torch.as_tensor(count, device=log_ratio_sum.device)
    return (log_ratio_sum.detach() / count.clamp(min=1)).clamp(min=0)


def reward_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | None = None
) -> Tensor:
    """Bradley-Terry, -log s(chosen - rejected - margin), eq. 1 and 2 of arXiv 2307.09288 (Llama 2).

    All tensors are (P,).
    """
    h = _floats(Pair(chosen_scores, rejected_scores)).gap
    return -logsigmoid(h if margin is None else h - margin.to(h.dtype))


def class_loss(
    logits: Tensor, labels: Tensor, *, class_weights: Tensor | None = None, gamma: float = 0.0
) -> Tensor:
    """Cross-entropy, or focal loss where gamma > 0: -weight_y (1 - p_y)^gamma log p_y. -> (N,)

    Eq. 4 and 5 of arXiv 1708.02002. `logits` (N, C); `labels` (N,) int; `class_weights` (C,). p is
    the model's own probability, never a weighted one. Divide the sum of the values by N, not by the
    sum of their weights: with `balanced_weights` the mean weight is 1. A gamma below 0 would stress
    what is already right; the paper's is 2.
    """
    logp = at_least_float(logits).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)  # (N,)
    loss = -logp
    if gamma > 0:
        # p is held one rounding step below 1, where the power has no finite slope for gamma < 1
        held = logp.clamp(max=-torch.finfo(logp.dtype).eps)
        loss = loss * (-torch.expm1(held)).pow(gamma)
    return loss if class_weights is None else loss * class_weights.to(loss)[labels]


def balanced_weights(labels: Sequence[int] | Tensor, num_labels: int) -> Tensor:
    """Weights that make every class count alike, with a mean of 1 over the records. -> (C,) float32

    The weight of a class is records / (classes present * records of the class), or 1 for a class
    without records. `labels` are those of the whole training set. ValueError for no labels and for
    labels outside 0 .. num_labels - 1.
    """
    labels = torch.as_tensor(labels, dtype=torch.long)
    if len(labels) == 0:
        raise ValueError("balanced class weights of no labels; give the labels of the training set")
    if labels.min() < 0 or labels.max() >= num_labels:
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} do not fit num_labels={num_labels}; "
            f"give 0 to {num_labels - 1}"
        )
    counts = torch.bincount(labels, minlength=num_labels).double()
    weights = len(labels) / ((counts > 0).sum() * counts.clamp(min=1))
    return torch.where(counts > 0, weights, 1.0).float()


def rag_loss(seq_logps: Tensor, doc_scores: Tensor) -> Tensor:
    """RAG-sequence, arXiv 2005.11401 section 2.1, a mixture over passages. -> (Q,)

    -log sum_k softmax_k(doc_scores) exp(seq_logps_k). `seq_logps` (Q, K) is the log-probability of
    the answer (a sum over its tokens) after passage k. `doc_scores` (Q, K) is question times
    passage, -inf where a question has fewer than K passages; at least one must be there.
    """
    return -(at_least_float(seq_logps) + at_least_float(doc_scores).log_softmax(-1)).logsumexp(-1)
