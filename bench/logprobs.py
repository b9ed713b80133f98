"""What does the head cost? Cross-entropy and its gradients, in CPU time and memory.

    python bench/logprobs.py --vocabulary 131072 --tokens 2048 --learned 0.15

Our chunked function, full logits, logits at learned positions, torch's own. CPU seconds and growth
of peak memory of forward and backward, each contender in its own process; `loss` shows that all
compute the same.
"""

import argparse
from importlib.metadata import version

try:
    from harness import compare, measured, parser, read
except ImportError:
    from bench.harness import compare, measured, parser, read


def data(flags: argparse.Namespace):
    import torch

    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    hidden = torch.randn(flags.tokens, flags.width).requires_grad_()
    weight = (torch.randn(flags.vocabulary, flags.width) * 0.02).requires_grad_()
    targets = torch.randint(0, flags.vocabulary, (flags.tokens,))
    return hidden, weight, targets, (torch.rand(flags.tokens) < flags.learned).nonzero()[:, 0]


def timed(loss_of, flags: argparse.Namespace) -> dict[str, float]:
    hidden, weight, targets, learned = data(flags)
    # the buffer that every contender adds into stands before the measurement
    weight.grad = weight.detach() * 0

    def work():
        loss = loss_of(hidden, weight, targets, learned)
        loss.backward()
        return loss.item() / len(learned)

    seconds, megabytes, loss = measured(work)
    return {"cpu_s": seconds, "extra_mb": megabytes, "loss": loss}


def ours(flags):
    import torch

    from ta.model.logprobs import Head, cross_entropy_sum

    return timed(
        lambda h, w, t, i: cross_entropy_sum(h[i], Head(w), t[i], torch.ones(len(i))), flags
    )


def ours_per_token(flags):
    from ta.model.logprobs import Head, token_logprobs

    return timed(lambda h, w, t, i: -token_logprobs(h[i], Head(w), t[i]).sum(), flags)


def full_logits(flags):
    import torch.nn.functional as F

    def loss(hidden, weight, targets, learned):
        labels = targets.new_full(targets.shape, -100)
        labels[learned] = targets[learned]
        return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")

    return timed(loss, flags)


def learned_logits(flags):
    import torch.nn.functional as F

    return timed(
        lambda h, w, t, i: F.cross_entropy((h[i] @ w.t()).float(), t[i], reduction="sum"), flags
    )


def torch_chunked(flags):
    import torch
    import torch.nn.functional as F

    how = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
    once = (
        torch.zeros(2, 4).requires_grad_(),
        torch.zeros(8, 4),
        torch.zeros(2, dtype=torch.int64),
    )
    F.linear_cross_entropy(*once, options=how).backward()  # its first call imports for a second
    return timed(
        lambda h, w, t, i: F.linear_cross_entropy(h[i], w, t[i], reduction="sum", options=how),
        flags,
    )


CONTENDERS = {
    "ours": ours,
    "ours, per token": ours_per_token,
    "full logits": full_logits,
    "learned logits": learned_logits,
}
if tuple(map(int, version("torch").split(".")[:2])) >= (2, 13):
    CONTENDERS["F.linear_cross_entropy"] = torch_chunked

if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--vocabulary", type=int, default=131_072)
    flags.add_argument("--tokens", type=int, default=2048)
    flags.add_argument("--width", type=int, default=384)
    flags.add_argument("--learned", type=float, default=0.15)
    compare(CONTENDERS, read(flags, vocabulary=512, tokens=64, width=32), "ours")
