"""Online reinforcement learning: rollouts, rewards, and what a policy learns from them.

What recipes need of it is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ta.faces import face

if TYPE_CHECKING:  # what the package gives, listed here for editors and for face()
    from ta.rl.batches import (
        answer_batches as answer_batches,
        end_if_dry_run as end_if_dry_run,
        figures_of as figures_of,
        kl_of as kl_of,
        rewards_of as rewards_of,
        rollout_batches as rollout_batches,
        sampled as sampled,
    )
    from ta.rl.engines import start_engine as start_engine
    from ta.rl.policy import (
        advantages as advantages,
        k2 as k2,
        k3 as k3,
        log_ratios as log_ratios,
        mismatch_weights as mismatch_weights,
        policy_loss as policy_loss,
    )
    from ta.rl.rewards import RewardPool as RewardPool
    from ta.rl.rollouts import (
        MismatchWatch as MismatchWatch,
        Rollouts as Rollouts,
        prepare_prompts as prepare_prompts,
        rollout_steps as rollout_steps,
    )
    from ta.rl.settings import (
        PolicyConfig as PolicyConfig,
        RewardConfig as RewardConfig,
        RolloutConfig as RolloutConfig,
        ToolConfig as ToolConfig,
    )
    from ta.rl.tools import open_tools as open_tools

__getattr__, __all__ = face(__name__, __file__)
