"""Muon for the matrices of blocks and AdamW for all other weights, as one optimizer."""

from __future__ import annotations

from collections.abc import Collection

import torch


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon (Jordan et al. 2024) and AdamW, with one state and one list of groups.

    `groups` are those of AdamW; the (I, O) parameters among them whose ids are `matrices` go to
    Muon, with updates as large as AdamW's (Liu et al. 2025).
    """

    def __init__(
        self,
        groups: list[dict],
        matrices: Collection[int],
        lr: float,
        betas: tuple[float, float],
    ):
        turned, others = [], []
        for group in groups:
            for chosen, goes in ((turned, True), (others, False)):
                own = [p for p in group["params"] if (p.dim() == 2 and id(p) in matrices) == goes]
                if own:
                    chosen.append({**group, "params": own})
        self.parts: list[torch.optim.Optimizer] = []
        if turned:
            self.parts.append(torch.optim.Muon(turned, lr=lr, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.defaults = {"betas": betas, "momentum": 0.95}
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of both; `closure` is not taken."""
        for part in self.parts:
            part.step()
