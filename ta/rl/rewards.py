"""Rewards of answers: Python functions, built-in ones or the user's own, in processes that can be
killed.

A function takes (messages, answer, record) and returns a number, or None where it says nothing. A
text names it: NAME, NAME:ARGUMENT or FILE.py:NAME, with *WEIGHT behind it where that is not 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from ta.command_line import Range
from ta.rl.function_pool import FunctionPool
from ta.rl.reward_functions import BUILTIN

if TYPE_CHECKING:
    from ta.rl.model_reward import ModelReward


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
        parsed = [parse_reward(text) for text in self.rewards]
        names = [reward.text for reward in parsed]
        if len(set(names)) < len(names):
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
    if head.endswith(".py"):
        if not Path(head).is_file() or not argument.isidentifier():
            raise ValueError(
                f"--rewards {text}: "
                + (f"there is no file {head}" if not Path(head).is_file() else "give FILE.py:NAME")
            )
    elif head == "model":
        if not argument:
            raise ValueError(f"--rewards {text}: give model:FOLDER")
    elif head not in BUILTIN:
        raise ValueError(
            f"--rewards {text}: there is no reward {head}; give FILE.py:NAME, model:FOLDER or one "
            f"of {', '.join(BUILTIN)}"
        )
    else:
        try:
            BUILTIN[head](argument)
        except ValueError as error:
            raise ValueError(f"--rewards {text}: {error}") from None
    return parsed


class RewardPool:
    """The functions of --rewards, in processes that can be killed, and reward models."""

    def __init__(self, config: RewardConfig, device: str = "cpu", max_tokens: int = 8192):
        """`device` and `max_tokens` (of one forward pass) are those of reward models."""
        self.config = config
        self.rewards = [parse_reward(text) for text in config.rewards]
        # of each function, how often it gave no usable number and that was counted
        self.bad = dict.fromkeys((reward.text for reward in self.rewards), 0)
        names = ["" if r.text.startswith("model:") else r.text for r in self.rewards]
        self.functions = FunctionPool(names, config.reward_processes, config.reward_seconds)
        self.models: dict[int, ModelReward] = {}
        for f, reward in enumerate(self.rewards):
            if reward.text.startswith("model:"):
                # torch comes with it
                from ta.rl.model_reward import ModelReward

                folder = reward.text.removeprefix("model:")
                self.models[f] = ModelReward(folder, device, max_tokens)

    def score(
        self, records: Sequence[dict], answers: Sequence[Sequence[str]]
    ) -> list[list[list[float | None]]]:
        """For each record and answer a list of each function's value, unweighted.

        ValueError names record, answer and function where a call fails and --on-bad-reward is
        error; otherwise the value is None and `bad` counts it.
        """
        values: list[list[list[float | None]]] = [
            [[None] * len(self.rewards) for _ in group] for group in answers
        ]
        for f, model in self.models.items():
            for i, group in enumerate(model.score(records, answers)):
                for k, (value, fault) in enumerate(group):
                    values[i][k][f] = value
                    if fault:
                        self._fault(f, records[i], i, answers[i][k], fault)
        places = [
            (i, k, f)
            for i, group in enumerate(answers)
            for k in range(len(group))
            for f in range(len(self.rewards))
            if f not in self.models
        ]
        calls = [(f, [records[i]["messages"], answers[i][k], records[i]]) for i, k, f in places]
        with closing(self.functions.run(calls)) as results:
            for place, value, fault in results:
                i, k, f = places[place]
                values[i][k][f] = value
                if fault:
                    self._fault(f, records[i], i, answers[i][k], fault)
        return values

    def _fault(self, f: int, record: dict, i: int, answer: str, fault: str) -> None:
        name = self.rewards[f].text
        if self.config.on_bad_reward == "error":
            where = f"record {record.get('id', i)!r}, answer {answer[:80]!r}"
            raise ValueError(f"reward {name} of {where}: {fault}")
        self.bad[name] += 1

    def total(self, values: Sequence[float | None]) -> float | None:
        """The weighted sum of the values of one answer, without those that are None.

        None where all are.
        """
        known = [
            reward.weight * value
            for reward, value in zip(self.rewards, values, strict=True)
            if value is not None
        ]
        return sum(known) if known else None
