"""ImageBind's trunks of pictures and sounds (arXiv 2305.05665), with the published weights.

The published model pools each trunk to one joint embedding. Language models read more from the
patches, so the output `tokens` is every patch after the head's layer norm, where the published head
takes the class token. The output `embedding` is the published joint embedding of unit length,
without the fixed logit scale of its training: one token, in a space that pictures and sounds share.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ta.files import json_text
from ta.folders import differing, loading, read_json, read_tensors, write_tensors


@dataclass(frozen=True)
class TrunkConfig:
    modality: Literal["image", "audio"] = "image"
    """what the trunk reads"""
    output: Literal["tokens", "embedding"] = "tokens"
    """every patch of the last layer, or the one joint embedding"""
    width: int = 1280
    """channels"""
    depth: int = 32
    """blocks"""
    heads: int = 16
    """attention heads"""
    joint_dim: int = 1024
    """width of the joint embedding"""
    size: tuple[int, int] = (224, 224)
    """input height and width: pixels, or mel bins and frames"""
    kernel: int = 14
    """patch edge"""
    stride: int = 14
    """distance of patches; sound patches overlap"""
    clips: int = 1
    """stretches of a sound; their patches follow one another, their embeddings are averaged"""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of one clip."""
        return tuple((edge - self.kernel) // self.stride + 1 for edge in self.size)


IMAGE_HUGE = TrunkConfig()
AUDIO_HUGE = TrunkConfig(
    "audio", width=768, depth=12, heads=12, size=(128, 204), kernel=16, stride=10, clips=3
)


class Attention(nn.Module):
    """Full self-attention; `extra` adds one learned key and value (torch: add_bias_kv)."""

    def __init__(self, width: int, heads: int, extra: bool):
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.extra = nn.Parameter(torch.zeros(2, width)) if extra else None

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inputs(x).chunk(3, dim=-1)  # (B, T, D) each
        if self.extra is not None:
            key, value = (
                torch.cat([seen, more.expand(len(x), 1, -1)], dim=1)
                for seen, more in zip((key, value), self.extra, strict=True)
            )
        split = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )  # (B, heads, T, D / heads)
        return self.output(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, extra: bool):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, extra)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Trunk(nn.Module):
    """Patches, class token, blocks, head.

    Pictures are (I, 3, H, W), read as two equal video frames; sounds (I, clips, 1, mels, frames).
    """

    def __init__(self, config: TrunkConfig):
        super().__init__()
        self.config = config
        width, kernel, image = config.width, config.kernel, config.modality == "image"
        patches = config.grid[0] * config.grid[1]
        whole = config.output == "tokens"
        # tokens of one picture or sound, and their width
        self.n_tokens = config.clips * patches if whole else 1
        self.out_dim = width if whole else config.joint_dim
        if image:
            self.stem = nn.Conv3d(
                3, width, (2, kernel, kernel), (2, config.stride, config.stride), bias=False
            )
        else:
            self.stem = nn.Conv2d(1, width, kernel, config.stride, bias=False)
        self.stem_norm = nn.Identity() if image else nn.LayerNorm(width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.positions = nn.Parameter(torch.randn(1, patches + 1, width) * width**-0.5)
        self.norm = nn.LayerNorm(width, eps=1e-6) if image else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, config.heads, extra=not image) for _ in range(config.depth)
        )
        self.head_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, config.joint_dim, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """(I, n_tokens, out_dim)."""
        whole = self.config.output == "tokens"
        return self.tokens(inputs) if whole else self.embedding(inputs)[:, None]

    def tokens(self, inputs: Tensor) -> Tensor:
        """(I, clips * patches, width): patches after the head's layer norm, row by row."""
        states = self._states(inputs)[:, 1:]
        return states.reshape(len(inputs), -1, self.config.width)

    def embedding(self, inputs: Tensor) -> Tensor:
        """(I, joint_dim): the joint embedding, unit length for each clip, averaged over clips."""
        joint = F.normalize(self.head(self._states(inputs)[:, 0]), dim=-1)
        return joint.reshape(len(inputs), -1, self.config.joint_dim).mean(dim=1)

    def _states(self, inputs: Tensor) -> Tensor:
        if self.config.modality == "image":
            x = inputs[:, :, None].expand(-1, -1, 2, -1, -1)  # two equal frames
        else:
            x = inputs.flatten(0, 1)  # (I * clips, 1, mels, frames)
        x = self.stem_norm(self.stem(x).flatten(2).transpose(1, 2))  # (B, patches, D)
        first = self.class_token.expand(len(x), -1, -1)
        x = self.norm(torch.cat([first, x], dim=1) + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head_norm(x)  # (I or I * clips, 1 + patches, D)


# published name, after "modality_" and with M for the section: ours
_RENAMES = {
    r"preprocessors\.M\.cls_token": "class_token",
    r"preprocessors\.M\.pos_embedding_helper\.pos_embed": "positions",
    r"preprocessors\.M\.rgbt_stem\.proj\.(?:1\.)?weight": "stem.weight",
    r"preprocessors\.M\.rgbt_stem\.norm_layer\.(weight|bias)": r"stem_norm.\1",
    r"trunks\.M\.pre_transformer_layer\.0\.(weight|bias)": r"norm.\1",
    r"trunks\.M\.blocks\.(\d+)\.norm_1\.(weight|bias)": r"blocks.\1.attention_norm.\2",
    r"trunks\.M\.blocks\.(\d+)\.attn\.in_proj_(weight|bias)": r"blocks.\1.attention.inputs.\2",
    r"trunks\.M\.blocks\.(\d+)\.attn\.out_proj\.(weight|bias)": r"blocks.\1.attention.output.\2",
    r"trunks\.M\.blocks\.(\d+)\.attn\.bias_([kv])": r"blocks.\1.attention.extra.\2",
    r"trunks\.M\.blocks\.(\d+)\.norm_2\.(weight|bias)": r"blocks.\1.mlp_norm.\2",
    r"trunks\.M\.blocks\.(\d+)\.mlp\.fc1\.(weight|bias)": r"blocks.\1.mlp.0.\2",
    r"trunks\.M\.blocks\.(\d+)\.mlp\.fc2\.(weight|bias)": r"blocks.\1.mlp.2.\2",
    r"heads\.M\.0\.(weight|bias)": r"head_norm.\1",
    r"heads\.M\.2\.weight": "head.weight",
}


def convert_weights(published: Mapping[str, Tensor], modality: str) -> dict[str, Tensor]:
    """The published weights of one modality under our names, without the logit scale.

    Published names are those of imagebind_huge.pth of github.com/facebookresearch/ImageBind. bias_k
    and bias_v become the two rows of `attention.extra`.
    """
    section, named = "vision" if modality == "image" else modality, {}
    for pattern, ours in _RENAMES.items():
        known = re.compile("modality_" + pattern.replace("M", section, 1))
        for name, tensor in published.items():
            if match := known.fullmatch(name):
                named[match.expand(ours)] = tensor.float()
    for name in [name for name in named if name.endswith("extra.k")]:
        rows = [named.pop(name).flatten(), named.pop(f"{name[:-1]}v").flatten()]
        named[name[:-2]] = torch.stack(rows)
    return named


def write_trunk(
    published: Mapping[str, Tensor], source: Path, folder: Path, config: TrunkConfig
) -> None:
    """Write the trunk of `config` from the published weights in `source` into a new `folder`.

    ValueError where they do not fit `config`.
    """
    weights = convert_weights(published, config.modality)
    with torch.device("meta"):
        _check(Trunk(config), weights, source)
    folder.mkdir()
    write_tensors(weights, folder / "model.safetensors")
    text = json_text({"model_type": "imagebind", **asdict(config)}, indent=2) + "\n"
    (folder / "config.json").write_text(text)


def load_trunk(folder: str | Path) -> Trunk:
    """The trunk in a converted folder; ValueError unless its weights are exactly the trunk's."""
    paths = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    given = read_json(paths[0]) if paths[0].is_file() else {}
    if given.pop("model_type", None) != "imagebind":
        raise ValueError(
            f"{folder}: no converted ImageBind trunk; make one with ta convert imagebind_huge.pth"
        )
    with loading(paths[0], "the config of a trunk"):
        config = TrunkConfig(**given | {"size": tuple(given["size"])})
    with torch.device("meta"):
        trunk = Trunk(config)
    weights = read_tensors(paths[1])
    _check(trunk, weights, folder)
    trunk.load_state_dict(weights, assign=True)
    return trunk


def _check(trunk: Trunk, weights: Mapping[str, Tensor], where: object) -> None:
    if different := differing(weights, trunk.state_dict()):
        name, have, want = different
        raise ValueError(
            f"{where}: weight {name} is {have}, a {trunk.config.modality} trunk of these sizes "
            f"wants {want}; give its own sizes"
        )
