"""Rollouts: answers that the policy gives to the prompts of a step, with their rewards, in a file.

OUT/rollouts/STEP.jsonl holds candidate records, which score.py and sample.py read. It is written
before the update and has the token ids that are trained; a resumed run reads what is there.
Letters: P prompts, G answers to a prompt, N answers, M tokens of answers.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ta.chat.template import ChatConfig
from ta.chat.tokenizer import ChatTokenizer
from ta.data.batch import Batch, to_device
from ta.data.loader import BatchConfig, TrainBatches
from ta.data.prepare import DataConfig, Prepared
from ta.data.sources import Drops
from ta.files import append_line, hash_json, read_json_lines, write_atomic
from ta.generation.generate import generate
from ta.generation.prompts import read_prompts
from ta.generation.samples import asked_text
from ta.generation.settings import Answer, GenerateConfig
from ta.generation.vllm_engine import VllmEngine, put_weights
from ta.model.adapters import merge_adapter
from ta.model.language_model import LanguageModel
from ta.parallel import gather_objects, on_rank_zero, rank, say, sum_over_ranks, unsharded, world
from ta.rl.batches import is_flat, lay_out_groups, micro_groups
from ta.rl.policy import overlong_penalty
from ta.rl.rewards import RewardPool
from ta.rl.settings import RolloutConfig

if TYPE_CHECKING:
    # a record and the token ids of its prompt
    Prompt = tuple[dict, list[int]]


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
    drops = Drops(data.on_bad_record, data.max_bad_share)
    prompts = read_prompts(files, tokenizer, chat, drops, seed)
    if drops.counts:
        say(f"left out: {drops.table()}")
    n, sizes = len(prompts), [len(ids) for _, ids in prompts]
    ids = np.concatenate([np.array(ids, np.int32) for _, ids in prompts])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    origin = np.stack([np.zeros(n), np.arange(1, n + 1)], 1).astype(np.int32)
    source = {"path": "prompt", "source": " ".join(files), "records": n, "used": n}
    info = {"fingerprint": hash_json(prompts), "sources": [source]}
    info |= {"tokens": len(ids), "learned_tokens": 0}
    weights = np.zeros(len(ids), np.float32)
    return prompts, Prepared(ids, weights, offsets, origin, {}, info, 1)


def with_reference(record: dict) -> dict:
    """The record of a prompt as the chat that it was, with its right answer where it has one."""
    if "reference" not in record:
        return record
    answer = {"role": "assistant", "content": record["reference"]}
    return record | {"messages": [*record["messages"], answer]}


def rollout_steps(batches: TrainBatches, updates: int, config: BatchConfig) -> TrainBatches:
    """The batches of a run with `updates` steps a rollout: as many steps more a pass.

    ValueError where a rollout has fewer prompts than updates.
    """
    if updates > batches.batch_size:
        raise ValueError(
            f"--updates {updates} share the --batch-size {batches.batch_size} prompts of a "
            "rollout: give fewer, or more prompts"
        )
    more = updates if config.steps is None else 1
    return replace(batches, steps=batches.steps * more)


@dataclass
class Rollouts:
    """The rollouts of a run, by round: one round of answers serves one or more updates."""

    run_folder: Path
    prompts: Sequence[Prompt]
    batches: TrainBatches
    tokenizer: ChatTokenizer
    config: RolloutConfig
    # what rewards the answers; None where they are learned for what they are
    pool: RewardPool | None = None
    # times that prompts are drawn again, in place of those whose answers are rewarded alike
    resample: int = 0
    # share of max_new_tokens, at its end, in which longer answers lose up to 1
    overlong: float = 0.0
    # NAME: log p of the tokens of a batch (M,), which the file keeps of each answer as
    # NAME_logprobs
    logprobs: dict[str, Callable[[Batch], Tensor]] = field(default_factory=dict)
    # a started vLLM that answers with the weights that train; None: the model itself answers
    engine: VllmEngine | None = None
    # of the weights that the engine holds
    engine_weights: int = -1
    # seconds that this process took for the last round, 0 where it was read, for the log
    seconds: dict[str, float] = field(default_factory=dict)
    # the round at hand, and its records
    round: int = -1
    rows: list[dict] = field(default_factory=list)

    def __post_init__(self):
        # of the weights that made the round at hand; a checkpoint holds it
        self.made_by = torch.zeros(1, dtype=torch.int64)

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {"rollouts/made_by": self.made_by}

    def at(self, model: LanguageModel, step: int) -> list[dict]:
        """The records of the round of `step` (from 0): read where they are there, else made.

        ValueError where other weights made those that are there.
        """
        number, update = divmod(step, self.config.updates)
        self.seconds = {"rollout_seconds": 0.0, "reward_seconds": 0.0}
        if number == self.round:
            return self.rows
        if not update:
            self.made_by[0] = weights_hash(model)
        weights = int(self.made_by)
        path = self.run_folder / "rollouts" / f"{number:06}.jsonl"
        rows = gather_objects(read_json_lines(path) if rank() == 0 else None)[0]
        if any(row["weights"] != weights for row in rows):
            raise ValueError(
                f"{path} was made by other weights than those that now train: delete it and the "
                "files of later steps to make them anew"
            )
        if not rows:
            assert not update, "the first update of a round has written its file"
            rows = self._make(model, number, weights)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            on_rank_zero(lambda: write_atomic(path, "".join(lines)))
        if self.pool is not None:
            self._show_extremes(rows, step + 1)
        self.round, self.rows = number, rows
        return rows

    def _show_extremes(self, rows: Sequence[dict], step: int) -> None:
        """Add the best and the worst answer of a round to samples.jsonl."""
        if rank():
            return
        answers = [
            (row["rewards"][a["id"]], i, a) for i, row in enumerate(rows) for a in row["answers"]
        ]
        for name, choose in (("best", max), ("worst", min)):
            reward, i, answer = choose(answers, key=lambda entry: entry[0])
            about = {"step": step, "id": f"{name} rollout"}
            about["prompt"] = asked_text(rows[i]["messages"])
            about |= {"answer": answer["content"], "reference": rows[i].get("reference", "")}
            about |= {"reward": reward, "finish": answer["finish"]}
            append_line(self.run_folder / "samples.jsonl", about)

    def held_out_reward(
        self, model: LanguageModel, prompts: Sequence[Prompt], longest: int
    ) -> dict[str, float]:
        """{"reward": the mean reward of greedy answers of at most `longest` tokens}, or {}."""
        settings = GenerateConfig(
            max_new_tokens=longest,
            stop_strings=tuple(self.tokenizer.stop_strings),
            slots=self.config.slots,
        )
        mine = prompts[rank() :: world()]
        answers = self._generate(model, [ids for _, ids in mine], settings)
        judged = self._rewards([record for record, _ in mine], answers)
        shares = gather_objects([total for ((_, total),) in judged])
        known = [total for share in shares for total in share if total is not None]
        return {"reward": sum(known) / len(known)} if known else {}

    def _make(self, model: LanguageModel, number: int, weights: int) -> list[dict]:
        """The records of a round; prompts are drawn again until enough groups differ."""
        about = {"step": number, "weights": weights}
        wanted, rows, spare, drawn = self.batches.batch_size, [], [], 0
        for attempt in range(self.resample + 1):
            found = self._drawn(model, number + attempt * self.batches.steps, about)
            drawn, spare = drawn + len(found), spare or found
            rows += [row for row in found if not self.resample or not is_flat(row)]
            if len(rows) >= min(wanted, len(found)):
                break
        if not drawn:
            raise ValueError(f"no answer of step {number + 1} has a reward: look at --rewards")
        rows = [row | {"drawn": drawn} for row in (rows or spare)[:wanted]]
        for name, function in self.logprobs.items():
            self._add_logprobs(model, rows, f"{name}_logprobs", function)
        return rows

    def _drawn(self, model: LanguageModel, place: int, about: dict) -> list[dict]:
        """The records of one draw; each process answers its share of the prompts and judges it."""
        chosen = [int(i) for i in self.batches.records(place)]
        error, rows = None, []
        try:
            rows = self._rollouts_of(model, chosen[rank() :: world()], place, about)
        except ValueError as raised:
            error = raised
        shares = gather_objects((rows, error))
        for _, failed in shares:
            if failed is not None:
                raise failed
        by_record = {i: row for share, _ in shares for i, row in share}
        return [by_record[i] for i in chosen if i in by_record]

    def _add_logprobs(
        self, model: LanguageModel, rows: list[dict], name: str, function: Callable
    ) -> None:
        """Give every answer a list `name` of log p of its tokens, each process for its share."""
        everyone = [range(len(row["answers"])) for row in rows]
        device, found = next(model.parameters()).device, []
        for groups in micro_groups(rows, everyone, self.batches.max_tokens, model.packed):
            batch = to_device(lay_out_groups(rows, groups, model.packed), device)
            with torch.no_grad():
                values = function(batch).tolist()
            for row, answers in groups:
                for k in answers:
                    size = len(rows[row]["answers"][k]["tokens"])
                    found.append((row, k, values[:size]))
                    del values[:size]
        for row, k, values in (entry for share in gather_objects(found) for entry in share):
            rows[row]["answers"][k][name] = values

    def _generate(
        self,
        model: LanguageModel,
        ids: list[list[int]],
        settings: GenerateConfig,
        keys: list[int] | None = None,
    ) -> list[list[Answer]]:
        fast, stops = self.tokenizer.fast, self.tokenizer.stop_ids
        if self.engine is None:
            with unsharded(model):
                return generate(model, fast, ids, settings, stops, keys=keys)
        if (weights := weights_hash(model)) != self.engine_weights:
            put_weights(self.engine, merged_weights(model))
            self.engine_weights = weights
        # vLLM knows no temperature of the model
        temperature = model.temperature if settings.temperature else 0.0
        settings = replace(settings, temperature=temperature)
        return generate(self.engine, fast, ids, settings, stops, keys=keys)

    def _rewards(
        self, records: list[dict], answers: list[list[Answer]]
    ) -> list[list[tuple[dict[str, float | None], float | None]]]:
        """For each record and answer ({function: its value}, their weighted sum or None)."""
        texts = [[answer.text for answer in group] for group in answers]
        values = self.pool.score(records, texts)
        names = [reward.text for reward in self.pool.rewards]
        return [
            [(dict(zip(names, parts, strict=True)), self.pool.total(parts)) for parts in group]
            for group in values
        ]

    def _rollouts_of(
        self, model: LanguageModel, mine: list[int], place: int, about: dict
    ) -> list[tuple[int, dict]]:
        """(prompt, its record with answers and rewards) of those of `mine` with a reward."""
        config, ids = self.config, [self.prompts[i][1] for i in mine]
        settings = GenerateConfig(
            max_new_tokens=config.max_new_tokens,
            # the model has the temperature already
            temperature=1.0,
            num_answers=config.num_answers,
            stop_strings=tuple(self.tokenizer.stop_strings),
            seed=self.batches.seed,
            slots=config.slots,
        )
        # an answer depends on the seed, the draw, the record and the answer's number alone
        keys = [place * len(self.prompts) + i for i in mine]
        start = time.perf_counter()
        answers = self._generate(model, ids, settings, keys)
        middle = time.perf_counter()
        records = [self.prompts[i][0] for i in mine]
        judged = self._rewards(records, answers) if self.pool else None
        self.seconds["rollout_seconds"] += middle - start
        self.seconds["reward_seconds"] += time.perf_counter() - middle
        rows = []
        for place, (i, record, group) in enumerate(zip(mine, records, answers, strict=True)):
            row = record | about | {"prompt_tokens": list(self.prompts[i][1])}
            row["answers"] = [
                {"id": str(k), "content": answer.text, "finish": answer.finish}
                | {"tokens": answer.ids, "logprobs": answer.logprobs}
                for k, answer in enumerate(group)
            ]
            if judged is None or self._add_rewards(row, judged[place]):
                rows.append((i, row))
        return rows

    def _add_rewards(self, row: dict, judged: list[tuple[dict, float | None]]) -> bool:
        """Give a record its rewards; answers without one stand apart. Whether any has one."""
        longest, row["rewards"], unjudged = self.config.max_new_tokens, {}, []
        for answer, (parts, total) in zip(row["answers"], judged, strict=True):
            if self.overlong:
                size, margin = len(answer["tokens"]), self.overlong * longest
                parts["overlong"] = overlong_penalty(size, longest, margin)
                total = None if total is None else total + parts["overlong"]
            answer["parts"] = parts
            if total is None:
                unjudged.append(answer)
            else:
                row["rewards"][answer["id"]] = total
        if unjudged:
            row["unjudged"] = unjudged
            row["answers"] = [answer for answer in row["answers"] if answer not in unjudged]
        return bool(row["answers"])


class MismatchWatch:
    """How far the log-probabilities of sampler and trainer are apart, step after step.

    They are those of one policy where nothing has been updated between; what is left is arithmetic.
    """

    def __init__(self, most: float):
        self.most = most
        # steps in a row in which they were further apart
        self.large = 0
        self.parts: list[Tensor] = []

    def add(self, gaps: Tensor) -> None:
        """Note the differences (M,) of a micro-batch."""
        sums = (gaps.abs().sum(), gaps.new_tensor(len(gaps)))
        self.parts.append(torch.stack(sums).double())

    def check(self) -> None:
        """Close a step, on all processes. ValueError at the third large one in a row."""
        if not self.parts:
            return
        total, count = sum_over_ranks(torch.stack(self.parts).sum(0)).tolist()
        self.parts.clear()
        mean = total / max(1.0, count)
        self.large = self.large + 1 if mean > self.most else 0
        if self.large == 3:
            raise ValueError(
                f"log-probabilities of sampled tokens differ by {mean:.3g} nats on average between "
                f"sampler and trainer, in three steps more than --max-mismatch {self.most:g}: the "
                "sampler may hold other weights or an adapter less, or compute in another dtype, "
                "or the template of prompts may differ; lower --dtype differences or raise it"
            )


def merged_weights(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all weights of the base; a LoRA adapter is merged into a copy of it."""
    inner = model.inner
    if hasattr(inner, "get_base_model"):
        inner = merge_adapter(copy.deepcopy(inner))
    # tensors that are tied come once, as in a folder
    for name, parameter in inner.named_parameters():
        yield name, parameter.detach()


def weights_hash(model: LanguageModel) -> int:
    """A hash of the bits of all weights that train, the same on any number of processes."""
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
    return int(hash_json([names, totals.tolist()])[:15], 16)
