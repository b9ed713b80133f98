"""Encoders: equal to transformers' own states, frozen, colour channels in order, wrong folders refused, and a demo encoder that can be read."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_audio import tone, write_wav
from test_imagebind import AUDIO, IMAGE, Published

from ta.builtin.pictures import (
    draw_scene,
    make_scene,
    picture_questions,
    write_pictures,
)
from ta.media.encoders import ENCODERS, Encoder, encoder_fingerprint, load_encoder
from ta.media.features import Layout, check_features, extract, read_features
from ta.media.imagebind import write_trunk
from ta.media.images import find_media

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def save_clip(folder, whole):
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    model = (
        CLIPModel(CLIPConfig(vision_config=TOWER, text_config=text))
        if whole
        else CLIPVisionModel(CLIPVisionConfig(**TOWER))
    )
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor.save_pretrained(folder)
    return (model.vision_model if whole else model).eval(), processor


def save_siglip(folder, whole):
    from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(0)
    text = {
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    model = (
        SiglipModel(SiglipConfig(vision_config=TOWER, text_config=text))
        if whole
        else SiglipVisionModel(SiglipVisionConfig(**TOWER))
    )
    model.save_pretrained(folder)
    processor = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
    return (model.vision_model if whole else model).eval(), processor


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("name", "save", "skipped"), [("clip", save_clip, 1), ("siglip", save_siglip, 0)]
)
def test_features_are_the_state_before_the_last_layer(tmp_path, capfd, name, save, skipped, whole):
    model, processor = save(tmp_path / "m", whole)
    capfd.readouterr()
    encoder = load_encoder(name, tmp_path / "m")
    assert "UNEXPECTED" not in "".join(capfd.readouterr())  # no table of passed-over weights
    assert (encoder.modality, encoder.emb_dim, encoder.n_modality_embs, encoder.grid) == (
        "image",
        16,
        4,
        (2, 2),
    )
    random = np.random.default_rng(0)
    pictures = [
        random.integers(0, 256, (*random.integers(20, 60, 2), 3), dtype=np.uint8) for _ in range(3)
    ]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    inputs = torch.stack([torch.from_numpy(encoder.read(tmp_path / f"{i}.png")) for i in range(3)])
    with torch.no_grad():
        theirs = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")[
            "pixel_values"
        ]
        states = model(pixel_values=theirs, output_hidden_states=True).hidden_states
    features = encoder.encode(inputs)
    assert torch.equal(features, states[-2][:, skipped:]) and features.shape == (3, 4, 16)
    assert not torch.allclose(features, states[-1][:, skipped:])
    assert not features.requires_grad and not any(
        weight.requires_grad for weight in encoder.module.parameters()
    )


@pytest.mark.parametrize("name", ["clip", "builtin"])
def test_red_is_the_first_channel(tmp_path, name):
    save_clip(tmp_path / "m", whole=False)
    encoder = load_encoder(name, tmp_path / "m")
    pixels = {}
    for channel, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), colour if colour != "green" else (0, 255, 0)).save(
            tmp_path / f"{colour}.png"
        )
        pixels[colour] = encoder.read(tmp_path / f"{colour}.png")
        assert pixels[colour].mean((1, 2)).argmax() == channel
    inputs = torch.stack(
        [torch.from_numpy(x) for x in (pixels["red"], pixels["blue"], pixels["red"][::-1].copy())]
    )
    red, blue, swapped = encoder.encode(inputs)
    assert not torch.allclose(red, blue) and torch.equal(swapped, blue) == (
        name == "builtin"
    )  # CLIP's channels differ in scale, too


def save_whisper(folder):
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    torch.manual_seed(0)
    layers = {
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    sizes = {
        "d_model": 16,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "num_mel_bins": 8,
        "max_source_positions": 50,
        "vocab_size": 20,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = WhisperForConditionalGeneration(
        WhisperConfig(**layers, **sizes, **tokens, dropout=0.5)
    ).eval()
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return model


def test_whisper_equals_transformers(tmp_path):
    from transformers import WhisperFeatureExtractor

    model = save_whisper(tmp_path / "m")
    encoder = load_encoder("whisper", tmp_path / "m")
    assert (encoder.modality, encoder.emb_dim, encoder.n_modality_embs, encoder.grid) == (
        "audio",
        16,
        50,
        (5, 10),
    )
    write_wav(tmp_path / "a.wav", tone(440, 0.7))
    mels = torch.from_numpy(encoder.read(tmp_path / "a.wav"))[None]
    with torch.no_grad():
        expected = model.get_encoder()(mels).last_hidden_state
    encoder.module.train()  # what a parent module's train() would do: features stay the same
    assert torch.equal(encoder.encode(mels), expected)
    WhisperFeatureExtractor(feature_size=8, chunk_length=2).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="8 x 200 mels, the encoder reads 8 x 100"):
        load_encoder("whisper", tmp_path / "m")
    for noise in ({"dither": 1e-4}, {"padding_value": 0.5}, {"padding_side": "left"}):
        extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1, **noise)
        extractor.save_pretrained(tmp_path / "m")
        with pytest.raises(ValueError, match="adds noise"):
            load_encoder("whisper", tmp_path / "m")


@pytest.mark.parametrize("output", ["tokens", "embedding"])
@pytest.mark.parametrize(
    "config",
    [replace(IMAGE, size=(28, 28)), replace(AUDIO, size=(16, 204))],
    ids=["image", "audio"],
)
def test_imagebind(tmp_path, config, output):
    config = replace(config, output=output)
    write_trunk(Published(config).state_dict(), tmp_path / "huge.pth", tmp_path / "m", config)
    encoder = load_encoder("imagebind", tmp_path / "m")
    write_wav(tmp_path / "audio", tone(440, 3))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image", format="PNG")
    features = encoder.encode(torch.from_numpy(encoder.read(tmp_path / config.modality))[None])
    assert (
        features.shape == (1, encoder.n_modality_embs, encoder.emb_dim)
        and encoder.modality == config.modality
    )
    assert (
        encoder.grid[0] * encoder.grid[1] == encoder.n_modality_embs and features.isfinite().all()
    )


def test_a_fingerprint_knows_weights_settings_and_dtype(tmp_path):
    save_clip(tmp_path / "m", whole=True)
    first = encoder_fingerprint(load_encoder("clip", tmp_path / "m"))
    assert encoder_fingerprint(load_encoder("clip", tmp_path / "m")) == first and len(first) == 64
    half = load_encoder("clip", tmp_path / "m")
    half.module.bfloat16()
    assert encoder_fingerprint(half) != first
    seen = {first, encoder_fingerprint(load_encoder("builtin"))}
    settings = tmp_path / "m" / "preprocessor_config.json"
    given = json.loads(settings.read_text())
    settings.write_text(json.dumps(given | {"resample": 2}))
    seen.add(encoder_fingerprint(load_encoder("clip", tmp_path / "m")))
    settings.write_text(json.dumps(given))
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["vision_model.encoder.layers.0.mlp.fc1.bias"][0] += 1e-3
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    seen.add(encoder_fingerprint(load_encoder("clip", tmp_path / "m")))
    assert len(seen) == 4


def test_wrong_folders_are_refused(tmp_path):
    save_clip(tmp_path / "m", whole=False)
    for name, folder, reason in (
        ("clip", tmp_path / "none", "is not a folder"),
        ("clip", None, "no folder is given"),
        ("siglip", tmp_path / "m", "of model type 'clip_vision_model'; this encoder reads siglip"),
        ("imagebind", tmp_path / "m", "no converted ImageBind"),
        ("whisper", tmp_path, "model type None"),
        ("resnet", tmp_path, "give one of builtin, clip, siglip, imagebind, whisper"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_encoder(name, folder)
    path = tmp_path / "m" / "preprocessor_config.json"
    given = path.read_text()
    path.write_text(given.replace("28", "42"))
    with pytest.raises(ValueError, match=r"\(42, 42\), the encoder reads 28 x 28"):
        load_encoder("clip", tmp_path / "m")
    path.write_text(given)
    weights = load_file(tmp_path / "m" / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.1.mlp.fc1.bias"))
    save_file(
        {k: v for k, v in weights.items() if k != lost},
        tmp_path / "m" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"lacks 1 tensors \(.*layers\.1\.mlp\.fc1\.bias\)"):
        load_encoder("clip", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"does not load as an encoder .*header"):
        load_encoder("clip", tmp_path / "m")


def test_readers_go_to_other_processes():
    encoder = load_encoder("builtin")
    assert pickle.loads(pickle.dumps(encoder.read)).keywords == encoder.read.keywords
    assert set(ENCODERS) == {"builtin", "clip", "siglip", "imagebind", "whisper"}
    bare = Encoder("image", 3, 4, None, None, torch.nn.Flatten(2), {})
    assert bare.encode(torch.ones(1, 3, 2, 2)).shape == (1, 3, 4), "without a weight"


def linear_accuracy(train, held_out):
    """Ridge regression onto one-hot answers: (features (N, D), answers) of both splits to held-out accuracy."""
    names = sorted(set(train[1]))
    x, y = (
        [features.double(), torch.tensor([names.index(answer) for answer in answers])]
        for features, answers in (train, held_out)
    )
    mean, spread = x[0].mean(0), x[0].std(0) + 1e-6
    a, b = (
        (torch.cat([(part[0] - mean) / spread, torch.ones(len(part[0]), 1)], 1)) for part in (x, y)
    )
    weights = torch.linalg.solve(
        a.T @ a + torch.eye(a.shape[1]), a.T @ torch.nn.functional.one_hot(x[1]).double()
    )
    return ((b @ weights).argmax(1) == y[1]).double().mean().item()


def test_the_demo_encoder_can_be_read_linearly():
    before = torch.get_rng_state()
    encoder = load_encoder("builtin")
    assert torch.equal(
        encoder.module.form.weight, load_encoder("builtin").module.form.weight
    )  # seeded
    assert torch.equal(torch.get_rng_state(), before)  # and nobody else's randomness is touched
    assert (encoder.emb_dim, encoder.n_modality_embs, encoder.grid) == (136, 16, (4, 4))
    splits = {}
    for held_out, count in ((False, 700), (True, 300)):
        scenes = [make_scene(0, index, held_out) for index in range(count)]
        pixels = (
            torch.from_numpy(np.stack([draw_scene(scene) for scene in scenes])).permute(0, 3, 1, 2)
            / 127.5
            - 1
        )
        splits[held_out] = scenes, encoder.encode(pixels)
    tiles = {
        "colour": lambda f: f.mean(1),
        "shape": lambda f: f.mean(1),
        "place": lambda f: f[..., :128].mean(2),
    }
    for kind, pick in tiles.items():
        data = []
        for scenes, features in splits.values():
            kept = [i for i, scene in enumerate(scenes) if kind in picture_questions(scene)]
            data.append(
                (pick(features[kept]), [picture_questions(scenes[i])[kind][1] for i in kept])
            )
        assert linear_accuracy(*data) > 0.97, kind


@pytest.mark.slow
def test_cached_features_are_the_encoders_own(tmp_path):
    write_pictures(tmp_path, train=7, held_out=1)
    paths, _ = find_media(tmp_path / "images", "image")
    encoder = load_encoder("builtin")
    layout = Layout(encoder_fingerprint(encoder), (encoder.n_modality_embs, encoder.emb_dim), "F32")
    assert (
        extract(
            tmp_path / "c.safetensors",
            paths,
            encoder.read,
            encoder.encode,
            layout,
            batch_size=3,
            workers=1,
        )[0]
        == 8
    )
    cache = read_features(tmp_path / "c.safetensors", encoder_fingerprint(load_encoder("builtin")))
    for key, path in paths.items():
        check_features(cache, key, path)
    inputs = torch.stack([torch.from_numpy(encoder.read(path)) for path in paths.values()])
    for size in (1, 2, 8):  # in batches of other sizes, too
        assert torch.equal(
            torch.stack([cache.handle.get_tensor(key) for key in paths]),
            torch.cat([encoder.encode(part) for part in inputs.split(size)]),
        )
