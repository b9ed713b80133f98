"""Projectors: small networks from an encoder's features (I, F, E) to embeddings (I, N, D)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ta.folders import differing, read_tensors


class Mlp(nn.Module):
    """Two linear layers with a GELU at each position, N = F (LLaVA 1.5, arXiv 2310.03744, 3.2)."""

    def __init__(self, emb_dim: int, n_in: int, dim: int, n_out: int):
        super().__init__()
        if n_out != n_in:
            raise ValueError(
                f"projector mlp gives as many tokens as the encoder, {n_in}, not {n_out}: leave "
                "--image-embeddings (of sounds --audio-embeddings) out"
            )
        self.layers = nn.Sequential(nn.Linear(emb_dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)  # (I, F, D)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (I, C, H, W), with HoneyBee's eps of 1e-5."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate made of the channels' means (arXiv 1709.01507)."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(channels, squeezed), nn.SiLU(), nn.Linear(squeezed, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean(dim=(2, 3)))[:, :, None, None]


class Bottleneck(nn.Module):
    """The C-Abstractor's RegNet-Y block (arXiv 2003.13678): depthwise, with layer norm and SiLU."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 1, bias=False),
            LayerNorm2d(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            LayerNorm2d(channels),
            nn.SiLU(),
            SqueezeExcite(channels, max(1, round(channels_in / 4))),
            nn.Conv2d(channels, channels, 1, bias=False),
            LayerNorm2d(channels),
        )
        same = channels_in == channels
        shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels, 1, bias=False), LayerNorm2d(channels)
        )
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.body(x) + self.shortcut(x))


class CAbstractor(nn.Module):
    """C-Abstractor (HoneyBee, arXiv 2312.06742, section 3.2): stage, pooling, stage, MLP.

    The pooling is adaptive and averages to a square of N tokens. `grid` is the encoder's (rows,
    columns); without it F must be a square number. Each of the F patches has a position embedding.
    """

    def __init__(
        self,
        emb_dim: int,
        n_in: int,
        dim: int,
        n_out: int,
        grid: tuple[int, int] | None,
        width: int,
        depth: int,
    ):
        super().__init__()
        if grid is None:
            grid = (_side(n_in, "the encoder gives"),) * 2
        elif grid[0] * grid[1] != n_in:
            raise ValueError(
                f"projector c_abstractor: a grid of {grid[0]} x {grid[1]} patches is not the "
                f"encoder's {n_in}"
            )
        side = _side(n_out, "--image-embeddings (of sounds --audio-embeddings) is")
        if n_out > n_in:
            raise ValueError(
                f"projector c_abstractor cannot make {n_out} tokens of the encoder's {n_in}; "
                f"give {math.isqrt(n_in) ** 2} or fewer"
            )
        self.grid = grid
        positions = nn.init.trunc_normal_(torch.empty(1, n_in, emb_dim), std=0.02)
        self.positions = nn.Parameter(positions)
        sizes = [emb_dim, *[width] * depth]
        self.before = nn.Sequential(*(Bottleneck(size, width) for size in sizes[:depth]))
        self.pool = nn.AdaptiveAvgPool2d((side, side))
        self.after = nn.Sequential(*(Bottleneck(width, width) for _ in range(depth)))
        self.mlp = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, features: Tensor) -> Tensor:
        x = (features + self.positions).movedim(1, 2)  # (I, E, F)
        x = x.unflatten(2, self.grid)  # (I, E, rows, columns)
        x = self.after(self.pool(self.before(x)))  # (I, width, side, side)
        return self.mlp(x.flatten(2).movedim(1, 2))  # (I, N, D)


def _side(count: int, what: str) -> int:
    side = math.isqrt(count) if count > 0 else 0
    if side * side == count > 0:
        return side
    near = ", ".join(str(s * s) for s in (max(side, 1), side + 1) if s * s != count)
    raise ValueError(
        f"projector c_abstractor works on squares of tokens; {what} {count}; the nearest that fit: "
        f"{near}"
    )


def projector_of(settings: Mapping[str, Any], dim: int) -> nn.Module:
    """A projector with the sizes in a modality's settings, drawn from torch's global seed.

    It makes embeddings of width `dim`. ValueError for an unknown kind, and for sizes that it cannot
    have.
    """
    kind = settings["projector"]
    if kind not in PROJECTORS:
        raise ValueError(f"projector {kind!r} is not known; give one of {', '.join(PROJECTORS)}")
    sizes = (settings["emb_dim"], settings["features"], dim, settings["embeddings"])
    if PROJECTORS[kind] is Mlp:
        return Mlp(*sizes)
    grid = settings["grid"] and tuple(settings["grid"])
    return CAbstractor(*sizes, grid, settings["projector_width"], settings["projector_depth"])


def load_projector(projector: nn.Module, path: str | Path) -> None:
    """Fill `projector` from a safetensors file, also one with the names of LLaVA or HoneyBee.

    ValueError, and nothing is changed, where a name or a shape is another one.
    """
    wanted = projector.state_dict()
    given = renamed(read_tensors(Path(path)), wanted)
    if different := differing(given, wanted):
        name, have, want = different
        raise ValueError(
            f"{path}: weight {name} is {have} in the file and {want} in the projector; "
            "give the same kind and sizes as saved"
        )
    projector.load_state_dict(given)


# Published names and ours. LLaVA's checkpoints number the layers, transformers' Llava names them;
# HoneyBee's C-Abstractor is two stages of timm's RegNet around a pooling, with blocks from 1 on.
PUBLISHED = {
    r"^((.*\.)?(mm_projector\.0|linear_1)|0)\.": "layers.0.",
    r"^((.*\.)?(mm_projector\.2|linear_2)|2)\.": "layers.2.",
    r"^(.*\.)?pos_emb$": "positions",
    r"^(.*\.)?readout\.": "mlp.",
    r"^(.*\.)?net\.0\.b(?=\d)": "before.",
    r"^(.*\.)?net\.2\.b(?=\d)": "after.",
    r"\.conv1\.conv\.": ".body.0.",
    r"\.conv1\.bn\.": ".body.1.",
    r"\.conv2\.conv\.": ".body.3.",
    r"\.conv2\.bn\.": ".body.4.",
    r"\.se\.fc1\.": ".body.6.gate.0.",
    r"\.se\.fc2\.": ".body.6.gate.2.",
    r"\.conv3\.conv\.": ".body.7.",
    r"\.conv3\.bn\.": ".body.8.",
    r"\.downsample\.conv\.": ".shortcut.0.",
    r"\.downsample\.bn\.": ".shortcut.1.",
}


def renamed(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, published names replaced by those of `wanted`; others stay."""
    tensors = {}
    for name, tensor in given.items():
        ours = name
        for pattern, part in PUBLISHED.items():
            ours = re.sub(pattern, part, ours)
        ours = re.sub(r"^(before|after)\.(\d+)", lambda at: f"{at[1]}.{int(at[2]) - 1}", ours)
        if name in wanted or ours not in wanted:
            tensors[name] = tensor
        else:
            # gates of squeeze-excite are convolutions of one pixel there
            tensors[ours] = tensor.flatten(1) if wanted[ours].dim() == 2 else tensor
    return tensors


PROJECTORS: dict[str, type[nn.Module]] = {
    "mlp": Mlp,
    "llava": Mlp,
    "c_abstractor": CAbstractor,
    "c_abs": CAbstractor,
}
