"""What does laying a shared prompt down once bring? DPO steps with chosen and rejected answers packed whole, padded, or behind one prompt.

    python bench/preference.py --prompt 400 --answer 90

A Llama of 26.7 million weights, pairs of random tokens, the sigmoid loss against a given reference, forward and backward; `loss` shows that all
compute the same. The first step is left out.
"""

import argparse
import time

from harness import compare, parser, peak


def pairs(flags: argparse.Namespace, layout: str) -> dict[str, float]:
    import numpy as np
    import torch

    from bench.sft import model_of
    from ta.attention import register
    from ta.batch import lay_out
    from ta.logprobs import sequence_sums
    from ta.losses import Pair, sigmoid
    from ta.wrapper import wrap

    model, _ = wrap(model_of(register(), flags))
    generator, start, loss = np.random.default_rng(0), 0.0, None
    for step in range(flags.steps + 1):
        if step == 1:
            start = time.process_time()
        ids, weights, shared = [], [], []
        for _ in range(flags.pairs):
            prompt = generator.integers(5, 16_000, flags.prompt)
            for other in (0, flags.prompt):
                ids.append(np.concatenate([prompt, generator.integers(5, 16_000, flags.answer)]))
                weights.append((np.arange(len(ids[-1])) >= flags.prompt).astype(np.float32))
                shared.append(other)
        batch = lay_out(ids, weights, layout != "padded", shared if layout == "shared" else ())
        logps = sequence_sums(model(batch, "tokens"), batch.owners, len(ids)).view(-1, 2)
        reference = torch.full_like(logps, -9.7 * flags.answer)
        loss = sigmoid(Pair(*logps.unbind(1)), Pair(*reference.unbind(1))).mean()
        loss.backward()
        model.zero_grad()
    return {"pairs_a_cpu_s": flags.steps * flags.pairs / (time.process_time() - start), "peak_mb": peak(), "loss": loss.item()}


CONTENDERS = {name: lambda flags, name=name: pairs(flags, name) for name in ("packed", "padded", "shared")}

if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--prompt", type=int, default=400, help="tokens of a prompt")
    flags.add_argument("--answer", type=int, default=90, help="tokens of an answer")
    flags.add_argument("--pairs", type=int, default=2, help="pairs a step")
    flags.add_argument("--steps", type=int, default=3)
    compare(CONTENDERS, flags.parse_args(), "packed")
