"""From the records of a round to micro-batches: rewards, figures, and answers behind their prompts.

Letters: P prompts, G answers to a prompt, N answers, M tokens of answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ta.data.batch import Batch, lay_out
from ta.data.loader import TrainBatches, split_micro
from ta.data.prepare import lengths
from ta.model.language_model import LanguageModel, base_model
from ta.parallel import rank, say, world
from ta.rl.policy import Divide, token_weights
from ta.rl.settings import RolloutConfig
from ta.training.memory import memory_report
from ta.training.run_folder import LoopConfig


class RolloutBatch(NamedTuple):
    """Answers behind their prompts, of which each token has the advantage of its answer.

    `sequences.weights` are the shares of tokens in the loss, times the tokens of the step.
    """

    # N answers; a prompt stands once for its answers where batches are packed
    sequences: Batch
    # (M,) log p of each token when it was sampled
    sampled: Tensor
    # (M,) of the answer of each token
    advantage: Tensor
    # (M,) log p by the policy before the first of several updates; empty where there is one
    old: Tensor
    # (M,) log p by the reference; empty where there is none
    reference: Tensor
    # figures of the whole step, for the log
    figures: dict[str, float]


def rewards_of(rows: Sequence[dict]) -> Tensor:
    """(P, G) rewards of the answers of each record; NaN where it has fewer answers than others."""

    most = max(len(row["answers"]) for row in rows)
    table = torch.full((len(rows), most), math.nan)
    for place, row in enumerate(rows):
        values = [row["rewards"][answer["id"]] for answer in row["answers"]]
        table[place, : len(values)] = torch.tensor(values)
    return table


def is_flat(row: dict) -> bool:
    """Whether all answers of a record are rewarded alike, so that it teaches nothing."""
    return min(row["rewards"].values()) == max(row["rewards"].values())


def kl_of(rows: Sequence[dict]) -> Tensor:
    """(P, G) sums over the tokens of answers of k1 = log pi - log ref, as they were sampled."""

    most = max(len(row["answers"]) for row in rows)
    table = torch.zeros(len(rows), most)
    for place, row in enumerate(rows):
        for k, answer in enumerate(row["answers"]):
            table[place, k] = sum(answer["logprobs"]) - sum(answer["reference_logprobs"])
    return table


def figures_of(rows: Sequence[dict]) -> dict[str, float]:
    """Means over the answers of a round, for the log."""
    answers = [answer for row in rows for answer in row["answers"]]
    rewards = [list(row["rewards"].values()) for row in rows]
    flat = [value for group in rewards for value in group]
    mean = sum(flat) / len(flat)
    tokens = sum(len(answer["tokens"]) for answer in answers)
    figures = {
        "reward": mean,
        "reward_std": math.sqrt(sum((value - mean) ** 2 for value in flat) / len(flat)),
        # of all that were drawn
        "flat_groups": 1 - sum(not is_flat(row) for row in rows) / rows[0]["drawn"],
        "length": tokens / len(answers),
        "truncated": sum(answer["finish"] == "length" for answer in answers) / len(answers),
        "entropy": -sum(sum(answer["logprobs"]) for answer in answers) / tokens,
    }
    if len(names := answers[0]["parts"]) > 1:
        for name in names:
            known = [a["parts"][name] for a in answers if a["parts"][name] is not None]
            figures[f"reward {name}"] = sum(known) / max(1, len(known))
    return figures


class AnswerGroup(NamedTuple):
    """Answers to one prompt that stand together in a micro-batch."""

    row: int
    answers: tuple[int, ...]


def groups_of(
    rows: Sequence[dict], chosen: Sequence[Sequence[int]], max_tokens: int, packed: bool
) -> list[AnswerGroup]:
    """The `chosen` answers of each record, cut so that a prompt with its answers fits a row.

    Where batches are padded every answer is a group of its own.
    """
    groups = []
    for place, answers in enumerate(chosen):
        prompt, held, tokens = len(rows[place]["prompt_tokens"]), [], 0
        for k in answers:
            size = len(rows[place]["answers"][k]["tokens"])
            if held and (not packed or prompt + tokens + size > max_tokens):
                groups.append(AnswerGroup(place, tuple(held)))
                held, tokens = [], 0
            held.append(k)
            tokens += size
        if held:
            groups.append(AnswerGroup(place, tuple(held)))
    return groups


def micro_groups(
    rows: Sequence[dict], chosen: Sequence[Sequence[int]], max_tokens: int, packed: bool
) -> list[list[AnswerGroup]]:
    """This process's micro-batches of the chosen answers; every process gets as many."""
    groups = groups_of(rows, chosen, max_tokens, packed)
    sizes = [
        len(rows[group.row]["prompt_tokens"])
        + sum(len(rows[group.row]["answers"][k]["tokens"]) for k in group.answers)
        for group in groups
    ]
    by_rank = split_micro(sizes, max_tokens, world(), packed)
    return [[groups[i] for i in places] for places in by_rank[rank()]]


def lay_out_groups(
    rows: Sequence[dict],
    groups: Sequence[AnswerGroup],
    packed: bool,
    weight: Callable[[int, int], float] = lambda row, answer: 1.0,
) -> Batch:
    """One Batch of the answers of some groups behind their prompts; a prompt stands once a group.

    weight(row, answer) is that of each token of an answer; it is not 0.
    """
    ids, weights, shared = [], [], []
    for row, answers in groups:
        prompt = rows[row]["prompt_tokens"]
        for place, k in enumerate(answers):
            tokens = rows[row]["answers"][k]["tokens"]
            ids.append(np.array(prompt + tokens))
            learned = np.zeros(len(ids[-1]), np.float32)
            learned[len(prompt) :] = weight(row, k)
            weights.append(learned)
            shared.append(len(prompt) if packed and place else 0)
    return lay_out(ids, weights, packed, shared)


def rollout_batches(
    rows: Sequence[dict],
    advantages: Tensor,
    divide: Divide,
    config: RolloutConfig,
    max_tokens: int,
    packed: bool,
    figures: dict[str, float],
    *,
    keep_flat: bool = False,
    drop_truncated: bool = False,
) -> list[RolloutBatch]:
    """This process's micro-batches of a step: the answers of `rows` with their advantages (P, G).

    A group whose advantages are all 0 counts in the divisor and is not computed, unless all groups
    are so or `keep_flat` says that a KL is learned from it too. With `drop_truncated` answers that
    reached their greatest length have no part in the loss.
    """

    everyone = [
        [
            k
            for k, answer in enumerate(row["answers"])
            if not drop_truncated or answer["finish"] != "length"
        ]
        for row in rows
    ]
    taught = [
        answers if keep_flat or values.any() else []
        for answers, values in zip(everyone, advantages, strict=True)
    ]
    # a step needs a token, also where it has nothing to learn
    rest = next((i for i, answers in enumerate(everyone) if answers), None)
    if not any(taught) and rest is not None:
        taught[rest] = everyone[rest][:1]
    sizes_of = [[len(answer["tokens"]) for answer in row["answers"]] for row in rows]
    answers = sum(map(len, everyone))
    tokens = sum(sizes_of[row][k] for row, chosen in enumerate(everyone) for k in chosen)
    # tokens that are computed, by whose number the loop divides
    kept = sum(sizes_of[row][k] for row, chosen in enumerate(taught) for k in chosen)
    longest = config.max_new_tokens
    shares = [
        token_weights(torch.tensor(sizes), divide, answers, tokens, longest) * kept
        for sizes in sizes_of
    ]
    batches = []
    for groups in micro_groups(rows, taught, max_tokens, packed):
        sequences = lay_out_groups(rows, groups, packed, lambda row, k: shares[row][k].item())
        of_answer = [advantages[row, k] for row, chosen in groups for k in chosen]
        values = torch.stack(of_answer)[sequences.owners] if of_answer else torch.zeros(0)
        names = ("logprobs", "trainer_logprobs", "reference_logprobs")
        sampled, old, reference = (token_values(rows, groups, name) for name in names)
        batches.append(RolloutBatch(sequences, sampled, values, old, reference, figures))
    return batches


def answer_batches(rows: Sequence[dict], max_tokens: int, packed: bool) -> list[Batch]:
    """This process's micro-batches of all answers of `rows`, whose tokens weigh 1."""
    everyone = [range(len(row["answers"])) for row in rows]
    cut = micro_groups(rows, everyone, max_tokens, packed)
    return [lay_out_groups(rows, groups, packed) for groups in cut]


def token_values(rows: Sequence[dict], groups: Sequence[AnswerGroup], name: str) -> Tensor:
    """(M,) float32 values of the tokens of the groups' answers, from each answer's list `name`.

    (0,) where answers have no such list.
    """

    values = [
        x for row, answers in groups for k in answers for x in rows[row]["answers"][k].get(name, ())
    ]
    return torch.tensor(values, dtype=torch.float32)


def report_memory(
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
    # keys and values of each layer; a row's columns may be half as many more than it needs
    cache = rows * 1.5 * (prompt + answer) * sizes.num_hidden_layers * 2 * heads * width * number
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # of a step of all rows, once as numbers of the model and once as probabilities
    logits = 2 * rows * sizes.vocab_size * 4
    parts = {"weights": weights, "keys and values": cache, "logits": logits}
    parts["in all"] = sum(parts.values())
    lines = [f"  {name:<16} {size / 1e9:9.3f}" for name, size in parts.items()]
    say("\n".join(["rollouts, estimated:", *lines]))
    raise SystemExit(0)
