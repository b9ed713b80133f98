"""What rollouts are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ta.command_line import Range


@dataclass(frozen=True)
class RolloutConfig:
    num_answers: Annotated[int, Range(1)] = 8
    """Answers to each prompt."""
    temperature: Annotated[float, Range(0, above=True)] = 1.0
    """The policy is the model at this temperature, in rollouts and in training."""
    max_new_tokens: Annotated[int, Range(1)] = 128
    """Tokens of an answer at most, its end token counted."""
    slots: Annotated[int, Range(1)] = 64
    """Answers that are generated at the same time (a memory knob)."""
    updates: Annotated[int, Range(1)] = 1
    """Optimizer steps on the answers of one rollout, each on its share of --batch-size prompts."""
