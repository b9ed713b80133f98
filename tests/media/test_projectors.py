"""Projectors: formulas by hand, token reduction, refusals that name the right number, weights through a file."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from ta.folders import write_tensors
from ta.media.projectors import (
    PROJECTORS,
    Bottleneck,
    load_projector,
    projector_of,
)


def small(kind, n_in=16, n_out=4, dim=10, grid=None):
    torch.manual_seed(0)
    sizes = {"emb_dim": 6, "features": n_in, "embeddings": n_out, "grid": grid}
    shape = {"projector_width": 8, "projector_depth": 2}
    return projector_of({"projector": kind, **sizes, **shape}, dim)


def test_mlp_is_linear_gelu_linear():
    projector = small("mlp", 5, 5)
    first, _, second = projector.layers
    features = torch.randn(3, 5, 6)
    expected = F.gelu(features @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(projector(features), expected)
    assert (
        PROJECTORS["llava"] is PROJECTORS["mlp"]
        and PROJECTORS["c_abs"] is PROJECTORS["c_abstractor"]
    )


def norm(x, layer):
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * layer.weight[:, None, None] + layer.bias[
        :, None, None
    ]


@pytest.mark.parametrize("channels_in", [6, 8])
def test_bottleneck_by_its_formula(channels_in):
    torch.manual_seed(0)
    block = Bottleneck(channels_in, 8).double()
    for weight in block.parameters():
        torch.nn.init.normal_(weight)
    narrow, norm1, _, depthwise, norm2, _, excite, wide, norm3 = block.body
    x = torch.randn(2, channels_in, 4, 4).double()
    h = F.silu(norm(torch.einsum("oi,bihw->bohw", narrow.weight[:, :, 0, 0], x), norm1))
    h = F.silu(
        norm(
            torch.stack(
                [
                    F.conv2d(h[:, c : c + 1], depthwise.weight[c : c + 1], padding=1)[:, 0]
                    for c in range(8)
                ],
                1,
            ),
            norm2,
        )
    )
    gate = torch.sigmoid(excite.gate[2](F.silu(excite.gate[0](h.mean((2, 3))))))
    h = norm(
        torch.einsum("oi,bihw->bohw", wide.weight[:, :, 0, 0], h * gate[:, :, None, None]), norm3
    )
    side = (
        x
        if channels_in == 8
        else norm(
            torch.einsum("oi,bihw->bohw", block.shortcut[0].weight[:, :, 0, 0], x),
            block.shortcut[1],
        )
    )
    torch.testing.assert_close(block(x), F.silu(h + side))
    assert excite.gate[0].out_features == 2 == round(channels_in / 4)


def test_c_abstractor_reduces_tokens_keeps_layout_and_learns():
    projector = small("c_abs", 16, 4)
    assert projector.positions.shape == (1, 16, 6)  # the encoder's number of patches
    features = torch.randn(3, 16, 6)
    out = projector(features)
    assert out.shape == (3, 4, 10)
    torch.testing.assert_close(projector(features[1:2]), out[1:2])  # pictures do not see each other
    out.sum().backward()
    assert all(
        weight.grad is not None and weight.grad.isfinite().all()
        for weight in projector.parameters()
    )
    # Rows stay rows: with the stages taken out, token 1 is the mean over the top right quarter of the patches.
    bare = small("c_abs", 16, 4)
    bare.before, bare.after, bare.mlp = (
        torch.nn.Identity(),
        torch.nn.Identity(),
        torch.nn.Identity(),
    )
    torch.testing.assert_close(
        bare(features)[:, 1], (features + bare.positions)[:, [2, 3, 6, 7]].mean(1)
    )


def test_c_abstractor_takes_the_encoders_grid():
    assert small("c_abs", 12, 4, grid=(3, 4))(torch.randn(2, 12, 6)).shape == (2, 4, 10)
    with pytest.raises(ValueError, match="3 x 5 patches is not the encoder's 12"):
        small("c_abs", 12, 4, grid=(3, 5))


@pytest.mark.parametrize(
    ("kind", "n_in", "n_out", "reason"),
    [
        ("mlp", 576, 144, "576, not 144: leave --image-embeddings"),
        ("c_abs", 576, 140, "is 140; the nearest that fit: 121, 144"),
        ("c_abs", 577, 144, "the encoder gives 577; the nearest that fit: 576, 625"),
        ("c_abs", 16, 25, "cannot make 25 tokens of the encoder's 16; give 16 or fewer"),
        ("c_abs", 16, 0, "is 0; the nearest that fit: 1"),
        ("resampler", 16, 16, "give one of mlp, llava, c_abstractor, c_abs"),
    ],
)
def test_wrong_numbers_are_refused_with_the_right_one(kind, n_in, n_out, reason):
    with pytest.raises(ValueError, match=reason):
        small(kind, n_in, n_out)


@pytest.mark.parametrize("kind", ["mlp", "c_abs"])
def test_weights_go_through_a_file(kind, tmp_path):
    sizes = (16, 16) if kind == "mlp" else (16, 4)
    saved, other = small(kind, *sizes), small(kind, *sizes)
    for weight in other.parameters():
        torch.nn.init.constant_(weight, 0.5)
    write_tensors(saved.state_dict(), tmp_path / "p.safetensors")
    load_projector(other, tmp_path / "p.safetensors")
    features = torch.randn(2, 16, 6)
    assert torch.equal(saved(features), other(features))

    wider = small(kind, 16, sizes[1], dim=12)
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    with pytest.raises(ValueError, match=r"is \(10.* in the file and \(12"):
        load_projector(wider, tmp_path / "p.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in wider.state_dict().items())
    foreign = small("c_abs" if kind == "mlp" else "mlp", 16, 4 if kind == "mlp" else 16)
    with pytest.raises(ValueError, match="absent"):
        load_projector(foreign, tmp_path / "p.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"{}")
    for name, reason in (
        ("no.safetensors", "as a complete safetensors file"),
        ("none.safetensors", "No such file"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_projector(other, tmp_path / name)


def published(projector, prefix):
    """The same weights under the names that LLaVA's or HoneyBee's checkpoints give them."""
    timm = {
        "body.0": "conv1.conv", "body.1": "conv1.bn", "body.3": "conv2.conv", "body.4": "conv2.bn",
        "body.6.gate.0": "se.fc1", "body.6.gate.2": "se.fc2", "body.7": "conv3.conv",
        "body.8": "conv3.bn", "shortcut.0": "downsample.conv", "shortcut.1": "downsample.bn",
    }  # fmt: skip
    out = {}
    for name, weight in projector.state_dict().items():
        part, _, rest = name.partition(".")
        block, _, inner = rest.partition(".")
        if part in ("before", "after"):
            layer, _, kind = inner.rpartition(".")
            stage = 0 if part == "before" else 2
            name = f"net.{stage}.b{int(block) + 1}.{timm[layer]}.{kind}"
            weight = weight[..., None, None] if "gate" in layer and kind == "weight" else weight
        else:
            name = {"positions": "pos_emb", "mlp": f"readout.{rest}"}.get(part, name)
        out[prefix + name] = weight.clone()
    return out


@pytest.mark.parametrize("prefix", ["", "abstractor."])
def test_a_published_c_abstractor_is_read(prefix, tmp_path):
    saved, other = small("c_abs", 16, 4), small("c_abs", 16, 4)
    for weight in other.parameters():
        torch.nn.init.constant_(weight, 0.5)
    save_file(published(saved, prefix), tmp_path / "p.safetensors")
    load_projector(other, tmp_path / "p.safetensors")
    features = torch.randn(2, 16, 6)
    assert torch.equal(saved(features), other(features))


@pytest.mark.parametrize(
    "names",
    [
        ("model.mm_projector.0", "model.mm_projector.2"),
        ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
        ("linear_1", "linear_2"),
    ],
)
def test_a_published_mlp_is_read(names, tmp_path):
    """The judge is transformers' own projector of Llava."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=6, num_attention_heads=2),
        text_config=LlamaConfig(hidden_size=10, num_attention_heads=1),
    )
    theirs, ours = LlavaMultiModalProjector(config), small("mlp", 5, 5)
    tensors = {
        f"{name}.{kind}": getattr(layer, kind).detach().clone()
        for name, layer in zip(names, (theirs.linear_1, theirs.linear_2), strict=True)
        for kind in ("weight", "bias")
    }
    save_file(tensors, tmp_path / "p.safetensors")
    load_projector(ours, tmp_path / "p.safetensors")
    features = torch.randn(2, 5, 6)
    torch.testing.assert_close(ours(features), theirs(features))
    save_file(tensors | {"eos_tokens": torch.zeros(1)}, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=r"weight eos_tokens is \(1,\) in the file and absent"):
        load_projector(ours, tmp_path / "p.safetensors")
