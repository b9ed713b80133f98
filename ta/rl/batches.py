"""From the records of a round to micro-batches: rewards, figures, and answers behind their prompts.

Letters: P prompts, G answers to a prompt, N answers, M tokens of answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ta.data.batch import Batch, lay_out
from ta.data.loader import TrainBatches
from ta.data.micro import split_micro
from ta.data.prepare import lengths
from ta.model.language_model import LanguageModel, base_model
from ta.parallel import rank, say, world
from ta.rl.policy import k1, token_weights
from ta.rl.settings import PolicyConfig, RolloutConfig
from ta.training.memory import memory_report
from ta.training.run_folder import LoopConfig

NAMES = ("logprobs", "trainer_logprobs", "reference_logprobs")
# metrics of a step as quotients
Figures = dict[str, list[tuple[float, float]]]


class RolloutBatch(NamedTuple):
    """Answers behind their prompts, of which each token has the advantage of its answer.

    `sequences.weights` are the shares of tokens in the loss, times the tokens of the step.
    """

    # N answers; a prompt stands once for its answers where batches are packed
    sequences: Batch
    # (M,) of the answer of each token
    advantage: Tensor
    # (M,) log p of each token when it was sampled
    sampled: Tensor
    # (M,) log p by the policy before the first of several updates; empty where there is one
    old: Tensor
    # (M,) log p by the reference; empty where there is none
    reference: Tensor
    # of the whole step, for the log, in the first micro-batch of a process
    figures: Figures


def own(values: Sequence[float | None]) -> list[float]:
    """The values of tokens that the policy sampled; those of a tool have none."""
    return [value for value in values if value is not None]


def rewards_of(rows: Sequence[dict]) -> Tensor:
    """(P, G) rewards of the answers of each record; NaN where it has fewer answers than others."""
    return _table(rows, lambda row, answer: row["rewards"][answer["id"]])


def kl_of(rows: Sequence[dict]) -> Tensor:
    """(P, G) sums over the tokens of answers of k1, as they were sampled."""

    def kl(_: dict, answer: dict) -> float:
        logps = (torch.tensor(own(answer[name])) for name in ("logprobs", "reference_logprobs"))
        return k1(*logps).sum().item()

    return _table(rows, kl)


def _table(rows: Sequence[dict], value: Callable[[dict, dict], float]) -> Tensor:
    groups = [torch.tensor([value(row, answer) for answer in row["answers"]]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=math.nan)


def is_flat(row: dict) -> bool:
    """Whether all answers of a record are rewarded alike, so that it teaches nothing."""
    return min(row["rewards"].values()) == max(row["rewards"].values())


def figures_of(rows: Sequence[dict], spent: Mapping[str, float]) -> Figures:
    """Means over the answers of a round, for the log, and the time that they took."""
    answers = [answer for row in rows for answer in row["answers"]]
    rewards = np.array([value for row in rows for value in row["rewards"].values()])
    logprobs = [x for answer in answers for x in own(answer["logprobs"])]
    figures = {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        # of all that were drawn
        "flat_groups": 1 - sum(not is_flat(row) for row in rows) / rows[0]["drawn"],
        "length": len(logprobs) / len(answers),
        "truncated": sum(answer["finish"] == "length" for answer in answers) / len(answers),
        "entropy": -sum(logprobs) / len(logprobs),
        "rollout_seconds": spent["rollout_seconds"],
        "reward_seconds": spent["reward_seconds"],
    }
    if "turns" in answers[0]:
        results = [m for answer in answers for m in answer["turns"] if m["role"] == "tool"]
        figures["tool_calls"] = len(results) / len(answers)
        figures["failed_calls"] = sum(a["failed_calls"] for a in answers) / max(1, len(results))
    if len(names := answers[0]["parts"]) > 1:
        for name in names:
            known = own([answer["parts"][name] for answer in answers])
            figures[f"reward {name}"] = sum(known) / max(1, len(known))
    speed = {"rollout_tokens_per_second": [(spent["tokens"], spent["rollout_seconds"])]}
    return speed | {name: [(value, 1.0)] for name, value in figures.items()}


class Sampled(NamedTuple):
    """An answer behind its prompt, with what each token that the policy sampled of it gets."""

    # the same list for all answers to a prompt
    prompt: list[int]
    answer: dict
    advantage: float = 0.0
    # not 0
    weight: float = 1.0

    @property
    def size(self) -> int:
        """Tokens that the policy sampled."""
        return len(own(self.answer["logprobs"]))


def sampled(rows: Sequence[dict]) -> list[Sampled]:
    """All answers of some records."""
    return [Sampled(row["prompt_tokens"], answer) for row in rows for answer in row["answers"]]


def groups_of(
    answers: Sequence[Sampled], max_tokens: int, packed: bool
) -> tuple[list[list[int]], list[int]]:
    """The places of answers that stand together behind their prompt, and their tokens with it.

    A group fits a row; where batches are padded every answer is a group of its own.
    """
    groups, sizes, prompt = [], [], None
    for place, sample in enumerate(answers):
        size = len(sample.answer["tokens"])
        if not packed or sample.prompt is not prompt or sizes[-1] + size > max_tokens:
            prompt = sample.prompt
            groups.append([])
            sizes.append(len(prompt))
        groups[-1].append(place)
        sizes[-1] += size
    return groups, sizes


def micro_places(answers: Sequence[Sampled], max_tokens: int, packed: bool) -> list[list[int]]:
    """The places of the answers of this process's micro-batches; every process gets as many."""
    groups, sizes = groups_of(answers, max_tokens, packed)
    by_rank = split_micro(sizes, max_tokens, world(), packed)
    return [[i for group in some for i in groups[group]] for some in by_rank[rank()]]


def lay_out_answers(answers: Sequence[Sampled], packed: bool) -> Batch:
    """One Batch of answers behind their prompts; in a packed row answers share a prompt.

    What a tool wrote is not learned.
    """
    ids, weights, shared = [], [], []
    before = None
    for prompt, answer, _, weight in answers:
        ids.append(np.array(prompt + answer["tokens"]))
        learned = [0.0] * len(prompt) + [x is not None for x in answer["logprobs"]]
        weights.append(np.array(learned, np.float32) * weight)
        shared.append(len(prompt) if packed and prompt is before else 0)
        before = prompt
    return lay_out(ids, weights, packed, shared)


def token_values(answers: Sequence[Sampled], name: str) -> Tensor:
    """(M,) float32 values of the sampled tokens of answers, from their lists `name`.

    (0,) where answers have no such list.
    """
    lists = (own(sample.answer.get(name, ())) for sample in answers)
    return torch.tensor(list(chain.from_iterable(lists)), dtype=torch.float32)


def answer_batches(
    answers: Sequence[Sampled], max_tokens: int, packed: bool, figures: Figures | None = None
) -> list[RolloutBatch]:
    """This process's micro-batches of answers; `figures` are those of the whole step."""
    batches = []
    for places in micro_places(answers, max_tokens, packed):
        some = [answers[i] for i in places]
        sequences = lay_out_answers(some, packed)
        advantages = torch.tensor([sample.advantage for sample in some])[sequences.owners]
        logps = (token_values(some, name) for name in NAMES)
        shown = {} if batches else figures or {}
        batches.append(RolloutBatch(sequences, advantages, *logps, shown))
    return batches


def rollout_batches(
    rows: Sequence[dict],
    advantages: Tensor,
    policy: PolicyConfig,
    longest: int,
    max_tokens: int,
    packed: bool,
    figures: Figures,
) -> list[RolloutBatch]:
    """This process's micro-batches of a step: the answers of `rows` with their advantages (P, G).

    A group whose advantages are all 0 counts in the divisor and is not computed, unless all groups
    are so or a KL is learned from it too. With policy.drop_truncated answers that reached their
    `longest` length have no part in the loss; where all did, there is a batch without answers.
    """
    everyone, taught = [], []
    for row, values in zip(rows, advantages, strict=True):
        for sample, advantage in zip(sampled([row]), values.tolist(), strict=False):
            if policy.drop_truncated and sample.answer["finish"] == "length":
                continue
            everyone.append(sample._replace(advantage=advantage))
            if policy.kl_coef or values.any():
                taught.append(everyone[-1])
    # a step needs a token, also where it has nothing to learn
    taught = taught or everyone[:1]
    tokens = sum(sample.size for sample in everyone)
    sizes = torch.tensor([sample.size for sample in taught])
    # the loop divides by the number of tokens that are computed
    weights = token_weights(sizes, policy.divide, len(everyone), tokens, longest) * sizes.sum()
    weighted = zip(taught, weights.tolist(), strict=True)
    taught = [sample._replace(weight=weight) for sample, weight in weighted]
    return answer_batches(taught, max_tokens, packed, figures)


def end_if_dry_run(
    loop: LoopConfig,
    model: LanguageModel,
    batches: TrainBatches,
    optimizer: torch.optim.Optimizer,
    config: RolloutConfig,
) -> None:
    """With --dry-run print what updates and rollouts take on one device, by part, and end."""
    if not loop.dry_run:
        return
    prompt, answer = int(lengths(batches.prepared).max()), config.max_new_tokens
    step = batches.batch_size * (prompt + config.num_answers * answer)
    say("updates:")
    say(memory_report(model, batches, optimizer, min(batches.max_tokens, step)))
    sizes = base_model(model.inner).config.get_text_config()
    heads = getattr(sizes, "num_key_value_heads", None) or sizes.num_attention_heads
    width = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    rows = min(config.slots, batches.batch_size * config.num_answers)
    number = 2 if model.half_precision else 4
    # of each layer; a row's columns may be half as many more than it needs
    cache = rows * 1.5 * (prompt + answer) * sizes.num_hidden_layers * 2 * heads * width * number
    parts = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "keys and values": cache,
        # of a step of all rows, once as numbers of the model and once as probabilities
        "logits": 2 * rows * sizes.vocab_size * 4,
    }
    say("rollouts, estimated:")
    for name, size in (*parts.items(), ("in all", sum(parts.values()))):
        say(f"  {name:<16} {size / 1e9:9.3f}")
    raise SystemExit(0)
