"""Rollouts: answers that the policy gives to the prompts of a step, with their rewards, in a file.

OUT/rollouts/ROUND.jsonl (from 000000) holds candidate records, which score.py and sample.py read.
It is written before the update and has the token ids that are trained; a resumed run reads what is
there.
Letters: P prompts, G answers to a prompt, N answers, M tokens of answers.
"""

from __future__ import annotations

import time
from collections import ChainMap, Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ta.chat.template import ChatConfig
from ta.chat.tokenizer import ChatTokenizer
from ta.data.batch import Batch, to_device
from ta.data.loader import TrainBatches
from ta.data.micro import BatchConfig
from ta.data.prepare import DataConfig, Prepared
from ta.data.sources import Drops
from ta.files import append_line, hash_json, read_json_lines, write_jsonl
from ta.generation.generate import generate
from ta.generation.prompts import read_prompts
from ta.generation.settings import Answer, GenerateConfig
from ta.generation.vllm_server import VllmServer
from ta.model.language_model import LanguageModel
from ta.parallel import gather_objects, on_rank_zero, rank, say, sum_over_ranks, unsharded, world
from ta.rl.batches import is_flat, lay_out_answers, micro_places, own, sampled
from ta.rl.engines import Engine, merged_weights, weights_hash
from ta.rl.policy import overlong_penalty
from ta.rl.rewards import RewardPool
from ta.rl.settings import PolicyConfig, RolloutConfig
from ta.rl.tools import Talk, Tools
from ta.training.run_folder import read_metrics
from ta.training.samples import Prompt, asked_text

# a record and the token ids of its prompt
Question = tuple[dict, list[int]]


def prepare_prompts(
    files: Sequence[str],
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    data: DataConfig,
    seed: int = 0,
    tools: Tools | None = None,
) -> tuple[list[Question], Prepared | None]:
    """([(record, prompt ids)], the prompts as data from which `train_batches` chooses).

    The answer at the end of a chat is taken off and becomes the record's "reference". A record
    without an "id" gets its number. `tools` are those of records that have none. ([], None) of no
    files.
    """
    if not files:
        return [], None
    drops = Drops(data.on_bad_record, data.max_bad_share)
    known = tools.schemas if tools else ()
    prompts = read_prompts(files, tokenizer, chat, drops, seed, tools=known)
    if drops.counts:
        say(f"left out: {drops.table()}")
    for number, (record, _) in enumerate(prompts):
        record.setdefault("id", number)
    n, ids = len(prompts), [ids for _, ids in prompts]
    flat = np.concatenate(ids).astype(np.int32)
    lines = np.arange(1, n + 1)
    origin = np.stack([np.zeros(n), lines], 1).astype(np.int32)
    source = {"path": "prompt", "source": " ".join(files), "records": n, "used": n}
    info = {"fingerprint": hash_json(prompts), "sources": [source]}
    info |= {"tokens": len(flat), "learned_tokens": 0}
    offsets = np.cumsum([0, *map(len, ids)])
    weights = np.zeros(len(flat), np.float32)
    return prompts, Prepared(flat, weights, offsets, origin, {}, info, 1)


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
    # the policy
    model: LanguageModel
    prompts: Sequence[Question]
    batches: TrainBatches
    tokenizer: ChatTokenizer
    config: RolloutConfig
    # with all its values filled in
    policy: PolicyConfig = PolicyConfig().filled()
    # what rewards the answers; None where they are learned for what they are
    pool: RewardPool | None = None
    # NAME: log p of the tokens of a batch (M,), which the file keeps of each answer as
    # NAME_logprobs
    logprobs: dict[str, Callable[[Batch], Tensor]] = field(default_factory=dict)
    # a started vLLM that answers with the weights that train; None: the model itself answers
    engine: Engine | None = None
    # what answers may call
    tools: Tools | None = None
    # of the weights that the engine holds
    engine_weights: int = -1

    def __post_init__(self):
        # seconds that the round at hand took and its tokens, and those of the next one
        self.spent, self.counted = Counter(), Counter()
        # the records of the rounds at hand
        self.held: dict[int, list[dict]] = {}
        # of the weights that made an even and an odd round; a checkpoint holds it
        self.made_by = torch.zeros(2, dtype=torch.int64)
        # a round that a server makes while a step trains
        self.thread, self.coming = ThreadPoolExecutor(1), None

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {"rollouts/made_by": self.made_by}

    def at(self, step: int) -> list[dict]:
        """The records of the round of `step` (from 0): read where they are there, else made.

        With config.ahead the last update of a round makes the next one too, by the weights that it
        changes afterwards. ValueError where its file is gone and the weights have changed since.
        """
        number, update = divmod(step, self.config.updates)
        self.join()
        # a round that was made ahead, or is read between its updates, is of the weights noted
        self._hold(number, fresh=not update and not (self.config.ahead and number))
        self.held = {number: self.held[number]}
        self.spent, self.counted = self.counted, Counter()
        last = update == self.config.updates - 1
        if self.config.ahead and last and step + 1 < self.batches.steps:
            self._hold(number + 1, fresh=True, later=True)
        if self.pool is not None and not update:
            self._show_extremes(self.held[number], step + 1)
        return self.held[number]

    def _hold(self, number: int, fresh: bool, later: bool = False) -> None:
        """Have the records of a round, from its file, which is written first where none is there
        that the weights at hand have made.

        With `later` a server makes them while this step trains, up to `join`.
        """
        if number in self.held:
            return
        now = weights_hash(self.model)
        if fresh:
            self.made_by[number % 2] = now
        weights = int(self.made_by[number % 2])
        path = self.run_folder / "rollouts" / f"{number:06}.jsonl"
        rows = gather_objects(read_json_lines(path) if rank() == 0 else None)[0]
        if any(row["weights"] != weights for row in rows):
            # a kill has lost steps, which end in other bits on another number of processes
            say(f"{path} was made by other weights than those that now train: it is made anew")
            rows = []
        if not rows and now != weights:
            raise ValueError(
                f"{path} is gone, and the weights that made it too: delete the newest checkpoint "
                "to go on from one before it, or start anew with --overwrite"
            )
        if rows:
            self.held[number] = rows
            return
        self._hand_over(now)
        # log-probabilities are of the weights that the update changes; processes that share out
        # their rounds cannot train meanwhile
        beside = later and isinstance(self.engine, VllmServer) and not self.logprobs
        if beside and world() == 1:
            self.coming = self.thread.submit(self._make, number, now, path)
        else:
            self._make(number, now, path)

    def join(self) -> None:
        """Wait for the round that is being made: no update may come before its file is there."""
        if self.coming is not None:
            self.coming.result()
            self.coming = None

    def _hand_over(self, weights: int) -> None:
        """Give the engine the weights of the model, unless it has them."""
        if self.engine is not None and weights != self.engine_weights:
            self.engine.put_weights(merged_weights(self.model))
            self.engine_weights = weights

    def close(self) -> None:
        """End the processes of rewards and tools."""
        if self.pool is not None:
            self.pool.close()
        if self.tools is not None:
            self.tools.functions.close()

    def _show_extremes(self, rows: Sequence[dict], step: int) -> None:
        """Add the best and the worst answer of a round to samples.jsonl."""
        if rank():
            return
        answers = [(row["rewards"][a["id"]], row, a) for row in rows for a in row["answers"]]
        for name, choose in (("best", max), ("worst", min)):
            reward, row, answer = choose(answers, key=lambda entry: entry[0])
            shown = {
                "step": step,
                "round": row["step"],
                "id": f"{name} rollout",
                "prompt": asked_text(row["messages"]),
                "answer": answer["content"],
                "reference": row.get("reference", ""),
                "reward": reward,
                "finish": answer["finish"],
            }
            append_line(self.run_folder / "samples.jsonl", shown)

    def respond(
        self, model: LanguageModel, prompts: Sequence[Prompt], settings: GenerateConfig
    ) -> tuple[list[list[Answer]], list[list[float | None]]]:
        """Answers to held-out prompts and their rewards; each process answers its share."""

        def answer(places: Sequence[int]) -> list[list[Talk]]:
            mine = [prompts[i] for i in places]
            questions = [(p.record | {"messages": p.chat}, p.ids) for p in mine]
            talks = self._talks(questions, settings, places)
            self._judge(talks)
            return talks

        self._hand_over(weights_hash(model))
        made = _shared_out(range(len(prompts)), answer)
        answers = [[talk.last for talk in talks] for talks in made]
        return answers, [[talk.reward for talk in talks] for talks in made]

    def _make(self, number: int, weights: int, path: Path) -> None:
        """Make the records of a round and their file.

        Prompts are drawn again until enough groups differ.
        """
        about = {"step": number, "weights": weights}
        wanted, rows, spare, drawn = self.batches.batch_size, [], [], 0
        resample = self.policy.resample
        for attempt in range(resample + 1):
            draw = number + attempt * self.batches.steps
            make = partial(self._rollouts_of, draw, about)
            found = _shared_out(self.batches.records(draw).tolist(), make)
            found = [row for row in found if row["answers"]]
            drawn, spare = drawn + len(found), spare or found
            rows += [row for row in found if not resample or not is_flat(row)]
            if len(rows) >= min(wanted, len(found)):
                break
        if not drawn:
            raise ValueError(f"no answer of step {number + 1} has a reward: look at --rewards")
        rows = [row | {"drawn": drawn} for row in (rows or spare)[:wanted]]
        for name, function in self.logprobs.items():
            self._add_logprobs(rows, f"{name}_logprobs", function)
        on_rank_zero(lambda: write_jsonl(path, rows))
        self.held[number] = rows

    def _add_logprobs(self, rows: list[dict], name: str, function: Callable) -> None:
        """Give every answer a list `name` of log p of its tokens, each process for its share."""
        answers, found, model = sampled(rows), {}, self.model
        device = model.device
        made = []
        for places in micro_places(answers, self.batches.max_tokens, model.packed):
            batch = lay_out_answers([answers[i] for i in places], model.packed)
            with torch.no_grad():
                made.append((places, function(to_device(batch, device))))
        # a GPU is waited for once
        for places, values in made:
            each = iter(values.tolist())
            for i in places:
                own_values = answers[i].answer["logprobs"]
                found[i] = [x if x is None else next(each) for x in own_values]
        for i, logprobs in ChainMap(*gather_objects(found)).items():
            answers[i].answer[name] = logprobs

    def _talks(
        self, questions: Sequence[Question], settings: GenerateConfig, keys: Sequence[int]
    ) -> list[list[Talk]]:
        """Answers to each of the questions, with the calls that they make."""
        answer = partial(generate, self.engine or self.model)
        if isinstance(self.engine, VllmServer):
            answer = self.engine.generate
        if self.engine is not None:
            # vLLM knows no temperature of the model
            if settings.beams > 1 and self.model.temperature != 1:
                raise ValueError(
                    f"--temperature {self.model.temperature}: vLLM searches beams of the model at "
                    "1; leave it out, or give --sample-settings without beams"
                )
            temperature = settings.temperature * self.model.temperature
            settings = replace(settings, temperature=temperature)
        ask = partial(answer, self.tokenizer.fast, stop_ids=self.tokenizer.stop_ids)
        # processes may take unequal numbers of turns
        with nullcontext() if self.engine else unsharded(self.model):
            answers = ask([ids for _, ids in questions], config=settings, keys=keys)
            talks = [
                [Talk(*asked, (key, k), answer) for k, answer in enumerate(group)]
                for asked, key, group in zip(questions, keys, answers, strict=True)
            ]
            if self.tools is not None:
                self.tools.converse([*chain(*talks)], ask, settings)
        return talks

    def _judge(self, groups: Sequence[Sequence[Talk]]) -> None:
        """Give each talk its values of the functions and their weighted sum."""
        talks, records = [*chain(*groups)], []
        for talk in talks:
            records.append(talk.record | {"messages": [*talk.record["messages"], *talk.turns]})
        scored = self.pool.score(records, [talk.last.text for talk in talks])
        for talk, (parts, reward) in zip(talks, scored, strict=True):
            talk.parts, talk.reward = parts, reward

    def _rollouts_of(self, draw: int, about: dict, mine: list[int]) -> list[dict]:
        """The records of the prompts `mine` with their answers and rewards."""
        config, longest = self.config, self.config.max_new_tokens
        settings = GenerateConfig(
            longest,
            # the model has the temperature already
            temperature=1.0,
            num_answers=config.num_answers,
            stop_strings=tuple(self.tokenizer.stop_strings),
            seed=self.batches.seed,
            slots=config.slots,
        )
        # an answer depends on the seed, the draw, the record and the answer's number alone
        keys = [draw * len(self.prompts) + i for i in mine]
        start = time.perf_counter()
        groups = self._talks([self.prompts[i] for i in mine], settings, keys)
        seconds, talks = time.perf_counter() - start, [*chain(*groups)]
        if self.pool is not None:
            self._judge(groups)
        if overlong := self.policy.overlong:
            for talk in talks:
                penalty = overlong_penalty(len(talk.ids), longest, overlong * longest)
                talk.parts["overlong"] = penalty
                talk.reward = None if talk.reward is None else talk.reward + penalty
        self.counted["tokens"] += sum(len(own(talk.logprobs)) for talk in talks)
        self.counted["rollout_seconds"] += seconds
        self.counted["reward_seconds"] += time.perf_counter() - start - seconds
        return [self._row(group, about) for group in groups]

    def _row(self, talks: Sequence[Talk], about: dict) -> dict:
        """A record with its answers and their rewards; answers without one stand apart."""
        first = talks[0]
        row = first.record | about | {"prompt_tokens": list(first.prompt), "answers": []}
        judged = {"rewards": {}} if self.pool else {}
        for k, talk in enumerate(talks):
            answer = {"id": str(k), "content": talk.last.text, "finish": talk.last.finish}
            answer |= {"tokens": talk.ids, "logprobs": talk.logprobs}
            if self.tools:
                answer |= {"turns": talk.turns, "failed_calls": talk.failed}
            if self.pool:
                answer["parts"] = talk.parts
            if self.pool and talk.reward is None:
                judged.setdefault("unjudged", []).append(answer)
                continue
            row["answers"].append(answer)
            if self.pool:
                judged["rewards"][answer["id"]] = talk.reward
        return row | judged


def _shared_out(items: Sequence, make: Callable[[Sequence], list]) -> list:
    """What the processes make, each of its share of the items, in the order of the items.

    A ValueError of one process is raised on all.
    """
    made, error = [], None
    try:
        made = make(items[rank() :: world()])
    except ValueError as raised:
        error = raised
    shares = gather_objects((made, error))
    for _, failed in shares:
        if failed is not None:
            raise failed
    turns = zip_longest(*(share for share, _ in shares))
    return [x for turn in turns for x in turn if x is not None]


class MismatchWatch:
    """How far the log-probabilities of sampler and trainer are apart, step after step, and whether
    there are any.

    They are those of one policy where nothing has been updated between; what is left is arithmetic.
    """

    def __init__(self, most: float, folder: Path | None = None):
        """`folder` is that of a run, whose logged steps count where it is resumed."""
        self.most, self.folder = most, folder
        # steps in a row in which they were further apart
        self.large = 0
        # steps in a row without an answer
        self.empty = 0
        # (2,) sum and number of a step's differences
        self.sums: Tensor | None = None

    def add(self, gaps: Tensor) -> Tensor:
        """Note the differences (M,) of a micro-batch; gives the sum of their sizes."""
        total = gaps.abs().sum()
        sums = torch.stack([total, gaps.new_full((), len(gaps))]).double()
        self.sums = sums if self.sums is None else self.sums + sums
        return total

    def check(self) -> None:
        """Close a step, on all processes. ValueError at the third large or empty one in a row."""
        if self.sums is not None:
            self._close(*sum_over_ranks(self.sums).tolist())
        elif self.folder is not None:
            logged = gather_objects(read_metrics(self.folder) if rank() == 0 else None)[0]
            for record in [record for record in logged if "learned_tokens" in record][-2:]:
                count = record["learned_tokens"]
                self._close(record.get("mismatch", 0.0) * count, count)
        self.sums = None

    def _close(self, total: float, count: float) -> None:
        self.empty = 0 if count else self.empty + 1
        if self.empty == 3:
            raise ValueError(
                "all answers of three steps in a row reached --max-new-tokens, and "
                "--drop-truncated leaves them out: the model may never end an answer, or answers "
                "need more room; give more --max-new-tokens, a model that ends its answers, or "
                "leave --drop-truncated out"
            )
        mean = total / max(1.0, count)
        self.large = self.large + 1 if mean > self.most else 0
        if self.large == 3:
            raise ValueError(
                f"log-probabilities of sampled tokens differ by {mean:.3g} nats on average between "
                f"sampler and trainer, in three steps more than --max-mismatch {self.most:g}: the "
                "sampler may hold other weights or an adapter less or compute in another dtype, or "
                "with --ahead 1 the learning rate may be large; mend it, lower --lr, or raise it"
            )
