"""Rollouts: answers that the policy gives to the prompts of a step, with their rewards, in a file.

OUT/rollouts/STEP.jsonl holds candidate records, which score.py and sample.py read. It is written
before the update and has the token ids that are trained; a resumed run reads what is there.
Letters: P prompts, G answers to a prompt, N answers, M tokens of answers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from ta.command_line import Range
from ta.data.loader import TrainBatches, split_micro
from ta.data.prepare import DataConfig, Prepared
from ta.data.sources import Drops
from ta.files import hash_json, read_json_lines, write_atomic
from ta.generation.generate import generate
from ta.generation.prompts import read_prompts
from ta.generation.settings import GenerateConfig
from ta.parallel import gather_objects, on_rank_zero, rank, say, sum_over_ranks, unsharded, world
from ta.rl.rewards import RewardPool

if TYPE_CHECKING:
    from torch import Tensor

    from ta.chat.template import ChatConfig
    from ta.chat.tokenizer import ChatTokenizer
    from ta.data.batch import Batch
    from ta.generation.settings import Answer
    from ta.model.language_model import LanguageModel
    from ta.rl.policy import Divide

    # a record and the token ids of its prompt
    Prompt = tuple[dict, list[int]]


@dataclass(frozen=True)
class RolloutConfig:
    num_answers: Annotated[int, Range(2)] = 8
    """Answers to each prompt: a group, whose rewards are compared."""
    temperature: Annotated[float, Range(0, above=True)] = 1.0
    """The policy is the model at this temperature, in rollouts and in training."""
    max_new_tokens: Annotated[int, Range(1)] = 128
    """Tokens of an answer at most, its end token counted."""
    slots: Annotated[int, Range(1)] = 64
    """Answers that are generated at the same time (a memory knob)."""


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
    # figures of the whole step, for the log
    figures: dict[str, float]


def prepare_prompts(
    files: Sequence[str],
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    data: DataConfig,
    seed: int = 0,
) -> tuple[list[Prompt], Prepared]:
    """([(record, prompt ids)], the prompts as data from which `train_batches` chooses).

    The answer at the end of a chat is taken off and becomes the record's "reference".
    """
    import numpy as np

    drops = Drops(data.on_bad_record, data.max_bad_share)
    prompts = read_prompts(files, tokenizer, chat, drops, seed)
    if drops.counts:
        say(f"left out: {drops.table()}")
    n, sizes = len(prompts), [len(ids) for _, ids in prompts]
    ids = np.concatenate([np.array(ids, np.int32) for _, ids in prompts])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    origin = np.stack([np.zeros(n), np.arange(1, n + 1)], 1).astype(np.int32)
    info = {"fingerprint": hash_json(prompts), "sources": [{"path": "prompt"}]}
    weights = np.zeros(len(ids), np.float32)
    return prompts, Prepared(ids, weights, offsets, origin, {}, info, 1)


@dataclass
class Rollouts:
    """The rollouts of a run, by round: one round of answers serves one or more updates."""

    folder: Path
    prompts: Sequence[Prompt]
    batches: TrainBatches
    tokenizer: ChatTokenizer
    config: RolloutConfig
    pool: RewardPool
    # seconds that this process took for the last round, 0 where it was read, for the log
    seconds: dict[str, float] = field(default_factory=dict)

    def at(self, model: LanguageModel, number: int) -> list[dict]:
        """The records of round `number` (from 0), read where they are there, else made and written.

        ValueError where other weights made those that are there.
        """
        path = self.folder / f"{number:06}.jsonl"
        weights = weights_hash(model)
        self.seconds = {"rollout_seconds": 0.0, "reward_seconds": 0.0}
        found = gather_objects(read_json_lines(path) if rank() == 0 else None)[0]
        if not found:
            found = self._make(model, number, weights)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
            on_rank_zero(lambda: write_atomic(path, "".join(lines)))
        elif any(row["weights"] != weights for row in found):
            raise ValueError(
                f"{path} was made by other weights than those that now train: delete it and the "
                "files of later steps to make them anew"
            )
        return found

    def _make(self, model: LanguageModel, number: int, weights: str) -> list[dict]:
        """The records of a round: each process answers its share of the prompts and judges it."""
        chosen = [int(i) for i in self.batches.records(number)]
        mine, error, rows = chosen[rank() :: world()], None, []
        start = time.perf_counter()
        try:
            answers = self._answer(model, mine, number)
            middle = time.perf_counter()
            rows = self._judged(mine, answers, {"step": number, "weights": weights})
            self.seconds["rollout_seconds"] = middle - start
            self.seconds["reward_seconds"] = time.perf_counter() - middle
        except ValueError as raised:
            error = raised
        shares = gather_objects((rows, error))
        for _, failed in shares:
            if failed is not None:
                raise failed
        by_record = {i: row for share, _ in shares for i, row in share}
        if not by_record:
            raise ValueError(f"no answer of step {number + 1} has a reward: look at --rewards")
        return [by_record[i] for i in chosen if i in by_record]

    def _answer(self, model: LanguageModel, mine: list[int], number: int) -> list[list[Answer]]:
        settings = GenerateConfig(
            max_new_tokens=self.config.max_new_tokens,
            # the model has the temperature already
            temperature=1.0,
            num_answers=self.config.num_answers,
            stop_strings=tuple(self.tokenizer.stop_strings),
            seed=self.batches.seed,
            slots=self.config.slots,
        )
        # a draw depends on the seed, the round, the record and the answer's number alone
        keys = [number * len(self.prompts) + i for i in mine]
        ids = [self.prompts[i][1] for i in mine]
        fast, stops = self.tokenizer.fast, self.tokenizer.stop_ids
        with unsharded(model):
            return generate(model, fast, ids, settings, stops, keys=keys)

    def _judged(
        self, mine: list[int], answers: list[list[Answer]], about: dict
    ) -> list[tuple[int, dict]]:
        """(prompt, its record with answers and rewards) of those with a reward."""
        records = [self.prompts[i][0] for i in mine]
        texts = [[answer.text for answer in group] for group in answers]
        values = self.pool.score([record["messages"] for record in records], texts, records)
        rows = []
        for i, record, group, judged in zip(mine, records, answers, values, strict=True):
            shown, rewards, unjudged = [], {}, []
            for k, (answer, parts) in enumerate(zip(group, judged, strict=True)):
                total = self.pool.total(parts)
                entry = {"id": str(k), "content": answer.text, "finish": answer.finish}
                entry |= {"tokens": answer.ids, "logprobs": answer.logprobs}
                names = [reward.text for reward in self.pool.rewards]
                entry["parts"] = dict(zip(names, parts, strict=True))
                if total is None:
                    unjudged.append(entry)
                    continue
                shown.append(entry)
                rewards[str(k)] = total
            if shown:
                row = record | about | {"prompt_tokens": list(self.prompts[i][1])}
                row |= {"answers": shown, "rewards": rewards}
                rows.append((i, row | ({"unjudged": unjudged} if unjudged else {})))
        return rows


def weights_hash(model: LanguageModel) -> str:
    """A hash of the bits of all weights that train, the same on any number of processes."""
    import torch

    names, sums = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sharded = hasattr(parameter, "to_local")
            local = parameter.detach().to_local() if sharded else parameter.detach()
            kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
            counted = local.contiguous().view(kind).sum(dtype=torch.int64)
            sums.append(counted if sharded or rank() == 0 else torch.zeros_like(counted))
            names.append(name)
    totals = sum_over_ranks(torch.stack(sums))
    return hash_json([names, totals.tolist()])[:16]


def rewards_of(rows: Sequence[dict]) -> Tensor:
    """(P, G) rewards of the answers of each record; NaN where it has fewer answers than others."""
    import torch

    most = max(len(row["answers"]) for row in rows)
    table = torch.full((len(rows), most), math.nan)
    for place, row in enumerate(rows):
        values = [row["rewards"][answer["id"]] for answer in row["answers"]]
        table[place, : len(values)] = torch.tensor(values)
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
        "flat_groups": sum(min(group) == max(group) for group in rewards) / len(rows),
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
    import numpy as np

    from ta.data.batch import lay_out

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
    longest: int,
    max_tokens: int,
    packed: bool,
    figures: dict[str, float],
) -> list[RolloutBatch]:
    """This process's micro-batches of a step: all answers of `rows` with their advantages (P, G).

    `longest` is --max-new-tokens. A group whose advantages are all 0 teaches nothing: it counts in
    the divisor and is not computed, unless all groups are so.
    """
    import torch

    from ta.rl.policy import token_weights

    everyone = [range(len(row["answers"])) for row in rows]
    taught = [row if values.any() else () for row, values in zip(everyone, advantages, strict=True)]
    chosen = taught if any(taught) else [everyone[0], *[()] * (len(rows) - 1)]
    lengths = [[len(answer["tokens"]) for answer in row["answers"]] for row in rows]
    tokens = sum(map(sum, lengths))
    # tokens that are computed, by whose number the loop divides
    kept = sum(lengths[place][k] for place, answers in enumerate(chosen) for k in answers)
    shares = [
        token_weights(torch.tensor(sizes), divide, sum(map(len, lengths)), tokens, longest) * kept
        for sizes in lengths
    ]
    batches = []
    for groups in micro_groups(rows, chosen, max_tokens, packed):
        sequences = lay_out_groups(rows, groups, packed, lambda row, k: shares[row][k].item())
        of_answer = [advantages[row, k] for row, answers in groups for k in answers]
        values = torch.stack(of_answer)[sequences.owners] if of_answer else torch.zeros(0)
        sampled = token_values(rows, groups, "logprobs")
        batches.append(RolloutBatch(sequences, sampled, values, figures))
    return batches


def token_values(rows: Sequence[dict], groups: Sequence[AnswerGroup], name: str) -> Tensor:
    """(M,) float32 values of the tokens of the groups' answers, from each answer's list `name`."""
    import torch

    values = [x for row, answers in groups for k in answers for x in rows[row]["answers"][k][name]]
    return torch.tensor(values, dtype=torch.float32)
