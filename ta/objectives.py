"""Losses that are not about pairs of answers: KTO, reward model, classification, RAG-sequence; pure functions, one value a record.

N answers or records, P pairs, C classes, Q questions, K passages a question; s is the logistic function. Values are float32, float64 where
the input is. The caller sums and divides once by the global count.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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
    """KTO, arXiv 2402.01306 section 4: weight (1 - s(beta (r - kl))) for a desirable answer, weight (1 - s(beta (kl - r))) otherwise. (N,)

    r = logps - ref_logps, both (N,), sums over the answer's tokens; `desirable` (N,) bool; `kl` a scalar, `kl_estimate` on mismatched
    answers, into which no gradient flows. Weights are the paper's lambda_D and lambda_U: choose them so that weight times number of
    desirable answers is 1 to 4/3 of that of the others.
    """
    ratio = _float(logps) - _float(ref_logps) - kl.detach()  # (N,)
    good, bad = (
        desirable_weight * torch.sigmoid(-beta * ratio),
        undesirable_weight * torch.sigmoid(beta * ratio),
    )
    return torch.where(desirable, good, bad)


def kl_estimate(log_ratio_sum: Tensor, count: Tensor | int) -> Tensor:
    """KTO's reference point max(0, mean log-ratio), arXiv 2402.01306 section 4, from sums over the global batch; 0 for a count of 0."""
    count = torch.as_tensor(count, device=log_ratio_sum.device)
    return (log_ratio_sum.detach() / count.clamp(min=1)).clamp(min=0)


def reward_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | None = None
) -> Tensor:
    """Bradley-Terry, -log s(chosen - rejected - margin), eq. 1 and 2 of arXiv 2307.09288 (Llama 2). All (P,)."""
    h = _float(chosen_scores) - _float(rejected_scores)
    return -logsigmoid(h if margin is None else h - margin.to(h.dtype))


def class_loss(
    logits: Tensor, labels: Tensor, *, class_weights: Tensor | None = None, gamma: float = 0.0
) -> Tensor:
    """Cross-entropy, -weight_y (1 - p_y)^gamma log p_y: focal loss where gamma > 0, eq. 4 and 5 of arXiv 1708.02002. -> (N,)

    `logits` (N, C); `labels` (N,) int; `class_weights` (C,). p is the model's own probability, never a weighted one. The values are to be
    divided by N, not by the sum of their weights: with `balanced_weights` the mean weight is 1.
    """
    if gamma < 0:
        raise ValueError(
            f"gamma={gamma} would stress what is already right; give 0 (cross-entropy) or more (2 is the paper's)"
        )
    logp = _float(logits).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)  # (N,)
    loss = -logp
    if gamma > 0:  # held one rounding step from p = 1, where the power has no slope for gamma < 1
        loss = loss * (-torch.expm1(logp.clamp(max=-torch.finfo(logp.dtype).eps))).pow(gamma)
    return loss if class_weights is None else loss * class_weights.to(loss)[labels]


def balanced_weights(labels: Sequence[int] | Tensor, num_labels: int) -> Tensor:
    """Weights that make every class count alike: records / (classes present * records of the class), so that their mean over the records is 1.

    A class without records has weight 1. `labels` are those of the whole training set. -> (num_labels,) float32
    """
    labels = torch.as_tensor(labels, dtype=torch.long)
    if len(labels) == 0:
        raise ValueError("balanced class weights of no labels; give the labels of the training set")
    if labels.min() < 0 or labels.max() >= num_labels:
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} do not fit num_labels={num_labels}; give 0 to {num_labels - 1}"
        )
    counts = torch.bincount(labels, minlength=num_labels).double()
    weights = len(labels) / ((counts > 0).sum() * counts.clamp(min=1))
    return torch.where(counts > 0, weights, 1.0).float()


def rag_loss(seq_logps: Tensor, doc_scores: Tensor) -> Tensor:
    """RAG-sequence, arXiv 2005.11401 section 2.1: -log sum_k softmax_k(doc_scores) exp(seq_logps_k), a mixture over passages. -> (Q,)

    `seq_logps` (Q, K): log-probability of the answer (a sum over its tokens) after passage k; `doc_scores` (Q, K): question times passage,
    -inf where a question has fewer than K passages (at least one must be there).
    """
    return -(_float(seq_logps) + _float(doc_scores).log_softmax(-1)).logsumexp(-1)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
