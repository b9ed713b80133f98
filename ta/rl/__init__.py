"""Online reinforcement learning: rollouts, rewards, and what a policy learns from them.

What recipes need of it is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors; NAMES says the same
    from ta.rl.policy import advantages as advantages
    from ta.rl.policy import log_ratios as log_ratios
    from ta.rl.policy import policy_loss as policy_loss
    from ta.rl.rewards import RewardConfig as RewardConfig
    from ta.rl.rewards import RewardPool as RewardPool
    from ta.rl.rollouts import RolloutConfig as RolloutConfig
    from ta.rl.rollouts import Rollouts as Rollouts
    from ta.rl.rollouts import figures_of as figures_of
    from ta.rl.rollouts import prepare_prompts as prepare_prompts
    from ta.rl.rollouts import rewards_of as rewards_of
    from ta.rl.rollouts import rollout_batches as rollout_batches

NAMES = {  # module: what `ta.rl` gives of it
    "ta.rl.policy": "advantages log_ratios policy_loss",
    "ta.rl.rewards": "RewardConfig RewardPool",
    "ta.rl.rollouts": "RolloutConfig Rollouts figures_of prepare_prompts rewards_of "
    "rollout_batches",
}
_HOME = {name: module for module, names in NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ta.rl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
