"""What rollouts are asked for, and what a policy learns from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from ta.command_line import Range
from ta.rl.reward_functions import BUILTIN, built_in

Advantage = Literal["grpo", "centred", "rloo", "batch"]
Level = Literal["token", "sequence"]
Divide = Literal["tokens", "answers", "constant"]
Clip = Literal["objective", "weight"]
Mismatch = Literal["none", "truncate", "mask"]


@dataclass(frozen=True)
class RolloutConfig:
    num_answers: Annotated[int, Range(1)] = 8
    """Answers to each prompt."""
    temperature: Annotated[float, Range(1e-6)] = 1.0
    """The policy is the model at this temperature, in rollouts and in training."""
    max_new_tokens: Annotated[int, Range(1)] = 128
    """Tokens of an answer at most, its end token counted."""
    slots: Annotated[int, Range(1)] = 64
    """Answers that are generated at the same time (a memory knob)."""
    updates: Annotated[int, Range(1)] = 1
    """Optimizer steps on the answers of one rollout, each on its share of --batch-size prompts."""
    ahead: Annotated[int, Range(0, 1)] = 0
    """1 makes the next rollout before the last update on this one, by weights that are one step
    old, which --mismatch corrects. It saves time where one process trains and another device
    answers (--engine URL)."""


@dataclass(frozen=True)
class RewardConfig:
    rewards: tuple[str, ...] = ("exact",)
    """What is rewarded, added up: FILE.py:NAME, model:FOLDER (a reward model), exact, contains,
    number, regex:PATTERN, length:N, schema:FILE.json or code, each with *WEIGHT where that is not
    1. A function takes (messages, answer, record) and returns a number or None."""
    reward_seconds: Annotated[float, Range(0, 1_000_000, above=True)] = 10.0
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


@dataclass(frozen=True)
class ToolConfig:
    tools: str | None = None
    """FILE.py, whose functions answers may call; an answer goes on behind what they return."""
    max_turns: Annotated[int, Range(2)] = 4
    """Turns of an answer at most, each but the last with calls."""

    def check(self) -> None:
        """ValueError for a file that is not there, and for settings of no tools."""
        if self.tools is not None and not (Path(self.tools).is_file() and self.tools[-3:] == ".py"):
            raise ValueError(f"--tools {self.tools}: there is no such file of Python, give FILE.py")
        if self.tools is None and self != ToolConfig():
            raise ValueError(f"--max-turns {self.max_turns} has no effect without --tools FILE.py")


@dataclass(frozen=True)
class PolicyConfig:
    preset: Literal["grpo", "dapo", "dr-grpo", "rloo", "gspo", "cispo"] = "grpo"
    """The published values of the eight settings below, of which each that is given wins."""
    advantage: Advantage | None = None
    """By how much an answer is better: reward minus the mean of its group, over the standard
    deviation of the group (grpo), as it is (centred), minus the mean of the others (rloo), or over
    the standard deviation of the step (batch)."""
    level: Level | None = None
    """Whether the ratio of new to old probability is that of a token or the geometric mean of its
    answer."""
    divide: Divide | None = None
    """The loss is a mean over the tokens of a step, over its answers of the means over their
    tokens, or a sum over tokens divided by answers and --max-new-tokens."""
    clip_ratio: Clip | None = None
    """A ratio out of bounds takes the gradient away (PPO), or is a weight that stays in bounds
    (CISPO)."""
    clip_low: Annotated[float | None, Range(0, 1)] = None
    """A ratio counts from 1 - this."""
    clip_high: Annotated[float | None, Range(0)] = None
    """A ratio counts up to 1 + this."""
    resample: Annotated[int | None, Range(0)] = None
    """How often other prompts are drawn, in place of those whose answers are rewarded alike."""
    overlong: Annotated[float | None, Range(0, 1)] = None
    """The share of --max-new-tokens, at its end, in which longer answers lose up to 1."""
    drop_truncated: bool = False
    """Do not train on answers that reached --max-new-tokens; in their groups they count."""
    kl_coef: Annotated[float, Range(0)] = 0.0
    """Weight of the KL from the reference; above 0 --reference is opened."""
    kl: Literal["reward", "loss"] = "reward"
    """Where it counts: log pi - log ref in the reward (k1), or half its square in the loss (k2)."""
    mismatch: Mismatch = "truncate"
    """Weights by which the tokens of a sampler that differs count: trainer's probability over
    sampler's, up to a bound, or 0 outside of it."""
    mismatch_bound: Annotated[float, Range(1, above=True)] = 2.0
    """That bound."""
    max_mismatch: Annotated[float, Range(0)] = 0.1
    """The run stops after three steps in which log-probabilities of sampler and trainer differ by
    more than this on average."""

    def filled(self) -> PolicyConfig:
        """With the values of the preset where none is given."""
        values = PRESETS["grpo"] | PRESETS[self.preset]
        return replace(self, **{k: v for k, v in values.items() if getattr(self, k) is None})


# what a preset does not say is as in grpo
PRESETS = {
    # arXiv 2402.03300, without its KL
    "grpo": {
        "advantage": "grpo",
        "level": "token",
        "divide": "answers",
        "clip_ratio": "objective",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "resample": 0,
        "overlong": 0.0,
    },
    # arXiv 2503.14476, which draws without end
    "dapo": {"divide": "tokens", "clip_high": 0.28, "resample": 3, "overlong": 0.2},
    # arXiv 2503.20783
    "dr-grpo": {"advantage": "centred", "divide": "constant"},
    # arXiv 2402.14740
    "rloo": {"advantage": "rloo", "level": "sequence"},
    # arXiv 2507.18071
    "gspo": {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    # arXiv 2506.13585, the bound of arXiv 2510.13786
    "cispo": {"divide": "tokens", "clip_ratio": "weight", "clip_low": 1.0, "clip_high": 4.0},
}
