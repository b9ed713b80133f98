"""ImageBind's trunks against the same model built of torch's own modules under the published checkpoint's names."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from ta.convert import convert
from ta.media.imagebind import (
    AUDIO_HUGE,
    IMAGE_HUGE,
    Trunk,
    TrunkConfig,
    convert_weights,
    load_trunk,
    write_trunk,
)

IMAGE = TrunkConfig("image", width=24, depth=2, heads=3, joint_dim=10, size=(28, 42))
AUDIO = TrunkConfig(
    "audio", width=24, depth=2, heads=3, joint_dim=10, size=(36, 56), kernel=16, stride=10, clips=3
)


class Published(nn.Module):
    """Builds one modality of the published model: torch's own attention, module names as in its state dict."""

    def __init__(self, config):
        super().__init__()
        self.image, m = (
            config.modality == "image",
            {"image": "vision", "audio": "audio"}[config.modality],
        )
        d, patches = config.width, config.grid[0] * config.grid[1]
        if self.image:
            stem = nn.ModuleDict(
                {
                    "proj": nn.Sequential(
                        nn.Identity(), nn.Conv3d(3, d, (2, 14, 14), (2, 14, 14), bias=False)
                    )
                }
            )
        else:
            stem = nn.ModuleDict(
                {"proj": nn.Conv2d(1, d, 16, 10, bias=False), "norm_layer": nn.LayerNorm(d)}
            )
        helper = nn.ParameterDict({"pos_embed": torch.randn(1, patches + 1, d)})
        before = nn.ModuleDict({"rgbt_stem": stem, "pos_embedding_helper": helper})
        before.cls_token = nn.Parameter(torch.randn(1, 1, d))
        blocks = nn.Sequential(*(self.block(d, config.heads) for _ in range(config.depth)))
        first = nn.LayerNorm(d, eps=1e-6) if self.image else nn.Identity()
        trunk = nn.ModuleDict(
            {"pre_transformer_layer": nn.Sequential(first, nn.Identity()), "blocks": blocks}
        )
        head = nn.Sequential(
            nn.LayerNorm(d, eps=1e-6), nn.Identity(), nn.Linear(d, config.joint_dim, bias=False)
        )
        self.modality_preprocessors, self.modality_trunks = (
            nn.ModuleDict({m: before}),
            nn.ModuleDict({m: trunk}),
        )
        self.modality_heads = nn.ModuleDict({m: head})
        self.modality_postprocessors = nn.ParameterDict({f"{m}_1_log_logit_scale": torch.ones(1)})
        self.parts = (before, trunk, head)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.3)

    def block(self, d, heads):
        attn = nn.MultiheadAttention(d, heads, add_bias_kv=not self.image, batch_first=True)
        mlp = nn.ModuleDict(
            {"fc1": nn.Linear(d, 4 * d), "act": nn.GELU(), "fc2": nn.Linear(4 * d, d)}
        )
        return nn.ModuleDict(
            {
                "attn": attn,
                "norm_1": nn.LayerNorm(d, eps=1e-6),
                "mlp": mlp,
                "norm_2": nn.LayerNorm(d, eps=1e-6),
            }
        )

    def forward(self, x):
        before, trunk, head = self.parts
        stem = before["rgbt_stem"]
        x = (
            stem["proj"](x.unsqueeze(2).repeat(1, 1, 2, 1, 1) if self.image else x)
            .flatten(2)
            .transpose(1, 2)
        )
        x = x if self.image else stem["norm_layer"](x)
        x = (
            torch.cat([before.cls_token.expand(len(x), -1, -1), x], 1)
            + before["pos_embedding_helper"]["pos_embed"]
        )
        x = trunk["pre_transformer_layer"](x)
        for block in trunk["blocks"]:
            h = block["norm_1"](x)
            x = x + block["attn"](h, h, h, need_weights=False)[0]
            h = block["mlp"]["fc1"](block["norm_2"](x))
            x = x + block["mlp"]["fc2"](block["mlp"]["act"](h))
        x = head[0](x)
        return x[:, 1:], nn.functional.normalize(head[2](x[:, 0]), dim=-1)


def published(config):
    torch.manual_seed(0)
    model, ours = Published(config), Trunk(config)
    ours.load_state_dict(convert_weights(model.state_dict(), config.modality))
    return model.double(), ours.double()


def test_image_trunk_equals_the_published_structure():
    model, ours = published(IMAGE)
    pictures = torch.randn(2, 3, 28, 42).double()
    tokens, joint = model(pictures)
    torch.testing.assert_close(ours(pictures), tokens)
    assert ours(pictures).shape == (2, ours.n_tokens, ours.out_dim) == (2, 6, 24)
    torch.testing.assert_close(ours.embedding(pictures), joint)


def test_audio_trunk_equals_the_published_structure():
    model, ours = published(AUDIO)
    sounds = torch.randn(2, 3, 1, 36, 56).double()
    tokens, joint = model(sounds.flatten(0, 1))
    joint = joint.reshape(2, 3, 10).mean(1)
    torch.testing.assert_close(ours(sounds), tokens.reshape(2, 3 * 15, 24))
    assert ours(sounds).shape == (2, ours.n_tokens, ours.out_dim)
    torch.testing.assert_close(ours.embedding(sounds), joint)
    with torch.no_grad():
        ours.blocks[0].attention.extra.zero_()
    assert not torch.allclose(
        ours.embedding(sounds), joint, atol=1e-3
    )  # the learned key and value count


def test_published_sizes_and_names():
    with torch.device("meta"):
        image, audio = Trunk(IMAGE_HUGE), Trunk(AUDIO_HUGE)
    assert (image.n_tokens, image.out_dim, image.positions.shape[1]) == (256, 1280, 257)
    assert (audio.n_tokens, audio.out_dim, audio.positions.shape[1]) == (3 * 12 * 19, 768, 229)
    assert (
        630e6 < sum(weight.numel() for weight in image.parameters()) < 635e6
    )  # ViT-H/14 with a two-frame stem
    one, block = torch.ones(1), "modality_trunks.audio.blocks.11"
    audio = {f"{block}.attn.bias_k": one, f"{block}.attn.bias_v": one, f"{block}.text": one}
    assert convert_weights(audio, "audio").keys() == {"blocks.11.attention.extra"}
    stem = {"modality_preprocessors.vision.rgbt_stem.proj.1.weight": one}
    assert convert_weights(stem, "image").keys() == {"stem.weight"}


def test_a_checkpoint_becomes_a_folder(tmp_path):
    for config in (IMAGE, replace(AUDIO, output="embedding")):
        model, ours = published(config)
        both = {
            **Published(AUDIO if config.modality == "image" else IMAGE).state_dict(),
            **model.state_dict(),
        }
        write_trunk(both, tmp_path / "huge.pth", tmp_path / config.modality, config)
        trunk = load_trunk(tmp_path / config.modality)
        assert asdict(trunk.config) == asdict(config)
        inputs = (
            torch.randn(2, 3, 28, 42)
            if config.modality == "image"
            else torch.randn(2, 3, 1, 36, 56)
        )
        torch.testing.assert_close(trunk(inputs), ours.float()(inputs))
        assert trunk(inputs).shape == (2, trunk.n_tokens, trunk.out_dim)


def test_wrong_checkpoints_are_refused(tmp_path):
    whole, source, out = published(IMAGE)[0].state_dict(), tmp_path / "huge.pth", tmp_path / "out"
    half = {name: tensor for name, tensor in whole.items() if "norm_2" not in name}
    with pytest.raises(ValueError, match=r"huge\.pth: weight .*mlp_norm\.bias is absent"):
        write_trunk(half, source, out, IMAGE)
    with pytest.raises(ValueError, match="image trunk of these sizes wants"):
        write_trunk(whole, source, out, replace(IMAGE, depth=3))
    assert not out.exists()
    with pytest.raises(ValueError, match="no converted ImageBind trunk"):
        load_trunk(tmp_path)


def test_the_command_converts_both_trunks(tmp_path, monkeypatch):
    """ImageBind's own sizes are too large for a test: these stand in their place."""
    monkeypatch.setattr("ta.convert.IMAGE_HUGE", IMAGE)
    monkeypatch.setattr("ta.convert.AUDIO_HUGE", AUDIO)
    torch.save(
        {**Published(IMAGE).state_dict(), **Published(AUDIO).state_dict()}, tmp_path / "huge.pth"
    )
    convert(str(tmp_path / "huge.pth"), str(tmp_path / "new"))
    for name, config in (("image", IMAGE), ("audio", AUDIO)):
        assert asdict(load_trunk(tmp_path / "new" / name).config) == asdict(config)
