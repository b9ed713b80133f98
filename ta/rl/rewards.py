"""Rewards of answers: Python functions, built-in ones or the user's own, in processes that can be
killed.

A function takes (messages, answer, record) and returns a number, or None where it says nothing. A
text names it: NAME, NAME:ARGUMENT or FILE.py:NAME, with *WEIGHT behind it where that is not 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import product

from ta.generation.score import RewardModel
from ta.parallel import gather_objects, say
from ta.rl.function_pool import FunctionPool
from ta.rl.settings import RewardConfig, parse_reward


class RewardPool:
    """The functions of --rewards, in processes that can be killed, and reward models."""

    def __init__(self, config: RewardConfig, device: str = "cpu", max_tokens: int = 8192):
        """`device` and `max_tokens` (of one forward pass) are those of reward models."""
        self.config = config
        self.rewards = [parse_reward(text) for text in config.rewards]
        # of each function, how often it gave no usable number and that was counted
        self.bad: Counter[str] = Counter()
        self.models: dict[int, RewardModel] = {}
        names = [reward.text for reward in self.rewards]
        for f, name in enumerate(names):
            if name.startswith("model:"):
                self.models[f] = RewardModel(name.removeprefix("model:"), device, max_tokens)
                # no function of the processes
                names[f] = ""
        self.functions = FunctionPool(names, config.reward_processes, config.reward_seconds)

    def score(
        self, records: Sequence[dict], answers: Sequence[str]
    ) -> list[tuple[dict[str, float | None], float | None]]:
        """For each record with its answer ({function: its value}, the weighted sum of the values).

        The sum is without those that are None, and None where all are. ValueError names record,
        answer and function where a call fails and --on-bad-reward is error; otherwise the value is
        None and `bad` counts it.
        """
        values = [{reward.text: None for reward in self.rewards} for _ in answers]

        def keep(i: int, f: int, value: float | None, fault: str) -> None:
            name = self.rewards[f].text
            values[i][name] = value
            if fault and self.config.on_bad_reward == "error":
                where = f"record {records[i].get('id', i)!r}, answer {answers[i][:80]!r}"
                raise ValueError(f"reward {name} of {where}: {fault}")
            self.bad[name] += bool(fault)

        for f, model in self.models.items():
            for i, (value, fault) in enumerate(model.score(records, answers)):
                keep(i, f, value, fault)
        functions = [f for f in range(len(self.rewards)) if f not in self.models]
        places = list(product(range(len(answers)), functions))
        calls = []
        for i, f in places:
            calls.append((f, [records[i]["messages"], answers[i], records[i]]))
        with closing(self.functions.run(calls)) as results:
            for place, value, fault in results:
                keep(*places[place], value, fault)
        return [(parts, self._total(parts)) for parts in values]

    def _total(self, parts: dict[str, float | None]) -> float | None:
        known = [r.weight * parts[r.text] for r in self.rewards if parts[r.text] is not None]
        return sum(known) if known else None

    def close(self) -> None:
        """End the processes, and say what was counted on all of them."""
        self.functions.close()
        for name, count in sum(gather_objects(self.bad), Counter()).items():
            say(f"note: {count:,} answers have no value of reward {name}, whose calls failed")
