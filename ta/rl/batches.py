"""From the records of a round to micro-batches: rewards, figures, and answers behind their prompts.

Letters: P prompts, G answers to a prompt, N answers, M tokens of answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ta.data.batch import Batch, lay_out
from ta.data.loader import TrainBatches, split_micro
from ta.data.prepare import lengths
from ta.model.language_model import LanguageModel, base_model
from ta.parallel import rank, say, world
from ta.rl.policy import k1, token_weights
from ta.rl.settings import PolicyConfig, RolloutConfig
from ta.training.memory import memory_report
from ta.training.run_folder import LoopConfig

NAMES = ("logprobs", "trainer_logprobs", "reference_logprobs")


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
    # figures of the whole step, for the log; a tuple is a quotient
    figures: dict[str, float | tuple[float, float]]

    def logged(self) -> dict[str, Any]:
        """The figures as sums over the tokens of this micro-batch."""
        m = len(self.sampled)
        return {
            name: [(value[0] * m, value[1] * m)] if isinstance(value, tuple) else value * m
            for name, value in self.figures.items()
        }


def own(values: Sequence[float | None]) -> list[float]:
    """The values of tokens that the policy sampled; those of a tool have none."""
    return [value for value in values if value is not None]


def rewards_of(rows: Sequence[dict]) -> Tensor:
    """(P, G) rewards of the answers of each record; NaN where it has fewer answers than others."""
    return _table(rows, lambda row, answer: row["rewards"][answer["id"]])


def kl_of(rows: Sequence[dict]) -> Tensor:
    """(P, G) sums over the tokens of answers of k1, as they were sampled."""

    def kl(_: dict, answer: dict) -> float:
        logps, reference = (torch.tensor(own(answer[name])) for name in (NAMES[0], NAMES[2]))
        return k1(logps, reference).sum().item()

    return _table(rows, kl)


def _table(rows: Sequence[dict], value: Callable[[dict, dict], float]) -> Tensor:
    groups = [torch.tensor([value(row, answer) for answer in row["answers"]]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=math.nan)


def is_flat(row: dict) -> bool:
    """Whether all answers of a record are rewarded alike, so that it teaches nothing."""
    return min(row["rewards"].values()) == max(row["rewards"].values())


def figures_of(rows: Sequence[dict]) -> dict[str, float]:
    """Means over the answers of a round, for the log."""
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
    }
    if "turns" in answers[0]:
        results = [m for answer in answers for m in answer["turns"] if m["role"] == "tool"]
        figures["tool_calls"] = len(results) / len(answers)
        figures["failed_calls"] = sum(a["failed_calls"] for a in answers) / max(1, len(results))
    if len(names := answers[0]["parts"]) > 1:
        for name in names:
            known = own([answer["parts"][name] for answer in answers])
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
        len(rows[row]["prompt_tokens"]) + sum(len(rows[row]["answers"][k]["tokens"]) for k in some)
        for row, some in groups
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

    weight(row, answer) is that of each token that the answer sampled; it is not 0. What a tool
    wrote is not learned.
    """
    ids, weights, shared = [], [], []
    for row, answers in groups:
        prompt = rows[row]["prompt_tokens"]
        for place, k in enumerate(answers):
            answer = rows[row]["answers"][k]
            sampled = [logprob is not None for logprob in answer["logprobs"]]
            ids.append(np.array(prompt + answer["tokens"]))
            weights.append(np.array([0.0] * len(prompt) + sampled, np.float32) * weight(row, k))
            shared.append(len(prompt) if packed and place else 0)
    return lay_out(ids, weights, packed, shared)


def rollout_batches(
    rows: Sequence[dict],
    advantages: Tensor,
    policy: PolicyConfig,
    longest: int,
    max_tokens: int,
    packed: bool,
    figures: dict[str, float | tuple[float, float]],
) -> list[RolloutBatch]:
    """This process's micro-batches of a step: the answers of `rows` with their advantages (P, G).

    A group whose advantages are all 0 counts in the divisor and is not computed, unless all groups
    are so or a KL is learned from it too. With policy.drop_truncated answers that reached their
    `longest` length have no part in the loss.
    """
    everyone = [
        [
            k
            for k, answer in enumerate(row["answers"])
            if not policy.drop_truncated or answer["finish"] != "length"
        ]
        for row in rows
    ]
    taught = [
        answers if policy.kl_coef or values.any() else []
        for answers, values in zip(everyone, advantages, strict=True)
    ]
    # a step needs a token, also where it has nothing to learn
    rest = next((i for i, answers in enumerate(everyone) if answers), None)
    if not any(taught) and rest is not None:
        taught[rest] = everyone[rest][:1]
    sizes = [[len(own(answer["logprobs"])) for answer in row["answers"]] for row in rows]
    answers = sum(map(len, everyone))
    # tokens of the step, and those that are computed, by whose number the loop divides
    tokens, kept = (
        sum(sizes[row][k] for row, chosen in enumerate(some) for k in chosen)
        for some in (everyone, taught)
    )
    shares = [
        token_weights(torch.tensor(group), policy.divide, answers, tokens, longest) * kept
        for group in sizes
    ]
    batches = []
    for groups in micro_groups(rows, taught, max_tokens, packed):
        sequences = lay_out_groups(rows, groups, packed, lambda row, k: shares[row][k].item())
        of_answer = [advantages[row, k] for row, chosen in groups for k in chosen]
        values = torch.stack(of_answer)[sequences.owners] if of_answer else torch.zeros(0)
        logps = (token_values(rows, groups, name) for name in NAMES)
        batches.append(RolloutBatch(sequences, values, *logps, figures))
    return batches


def answer_batches(
    rows: Sequence[dict], max_tokens: int, packed: bool, with_values: bool = False
) -> list:
    """This process's micro-batches of all answers of `rows`, whose tokens weigh 1.

    Each is a Batch, or a RolloutBatch without advantages where the values of tokens are asked for.
    """
    everyone = [range(len(row["answers"])) for row in rows]
    batches = []
    for groups in micro_groups(rows, everyone, max_tokens, packed):
        batches.append(lay_out_groups(rows, groups, packed))
        if with_values:
            values = (token_values(rows, groups, name) for name in NAMES)
            batches[-1] = RolloutBatch(batches[-1], torch.zeros(0), *values, {})
    return batches


def token_values(rows: Sequence[dict], groups: Sequence[AnswerGroup], name: str) -> Tensor:
    """(M,) float32 values of the sampled tokens of the groups' answers, from their lists `name`.

    (0,) where answers have no such list.
    """
    lists = (rows[row]["answers"][k].get(name, ()) for row, answers in groups for k in answers)
    return torch.tensor([x for values in lists for x in own(values)], dtype=torch.float32)


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
