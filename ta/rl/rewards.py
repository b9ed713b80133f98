"""Rewards of answers: Python functions, built-in ones or the user's own, in processes that can be
killed.

A function takes (messages, answer, record) and returns a number, or None where it says nothing. A
text names it: NAME, NAME:ARGUMENT or FILE.py:NAME, with *WEIGHT behind it where that is not 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from ta.command_line import Range
from ta.generation.score import RewardModel
from ta.parallel import gather_objects, say
from ta.rl.function_pool import FunctionPool
from ta.rl.reward_functions import BUILTIN, built_in


@dataclass(frozen=True)
class RewardConfig:
    rewards: tuple[str, ...] = ("exact",)
    """What is rewarded, added up: FILE.py:NAME, model:FOLDER (a reward model), exact, contains,
    number, regex:PATTERN, length:N, schema:FILE.json or code, each with *WEIGHT where that is not
    1. A function takes (messages, answer, record) and returns a number or None."""
    reward_seconds: Annotated[float, Range(0, above=True)] = 10.0
    """Wall-clock limit of one call of a reward function or tool, whose process is then killed."""
    reward_processes: Annotated[int, Range(1)] = 2
    """Processes in which reward functions run, and as many for tools."""
    on_bad_reward: Literal["error", "none"] = "error"
    """Stop where a function raises, takes too long or returns no finite number, or count the answer
    as one without a reward."""

    def check(self) -> None:
        """ValueError for a reward that does not exist."""
        if not self.rewards:
            raise ValueError("--rewards names nothing: give exact or FILE.py:NAME")
        names = {parse_reward(text).text for text in self.rewards}
        if len(names) < len(self.rewards):
            raise ValueError(f"--rewards {' '.join(self.rewards)}: one is given twice")


class Reward(NamedTuple):
    """One of --rewards."""

    # without its weight
    text: str
    weight: float


def parse_reward(text: str) -> Reward:
    """The reward that a text names; ValueError for one that does not exist."""
    name, star, weight = text.rpartition("*")
    try:
        parsed = Reward(name, float(weight)) if star else Reward(text, 1.0)
    except ValueError:
        # a * of the argument, such as that of a regular expression
        parsed = Reward(text, 1.0)
    head, _, argument = parsed.text.partition(":")
    fault = ""
    if not isfinite(parsed.weight):
        fault = "give a finite weight"
    elif head.endswith(".py"):
        if not Path(head).is_file():
            fault = f"there is no file {head}"
        elif not argument.isidentifier():
            fault = "give FILE.py:NAME"
    elif head == "model":
        fault = "" if argument else "give model:FOLDER"
    elif head in BUILTIN:
        try:
            built_in(head, argument)
        except ValueError as error:
            fault = str(error)
    else:
        known = ", ".join(BUILTIN)
        fault = f"there is no reward {head}; give FILE.py:NAME, model:FOLDER or one of {known}"
    if fault:
        raise ValueError(f"--rewards {text}: {fault}")
    return parsed


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
