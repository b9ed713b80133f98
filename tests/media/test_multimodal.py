"""Pictures and sounds in training: placeholders filled in order, only what should learn learns, cached equals uncached, packed equals alone."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from test_audio import tone, write_wav
from test_encoders import save_clip
from transformers import GPT2Config, GPT2LMHeadModel

from ta.builtin.pictures import write_jsonl, write_pictures
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.data.prepare import DataConfig, preview
from ta.folders import ModelConfig
from ta.media.dialogue import encode_media_prompts, prepare_media_chats
from ta.media.encoders import load_with_fingerprint
from ta.media.features import Layout, extract
from ta.media.llava import assembled
from ta.media.modalities import open_media
from ta.media.multimodal import (
    MediaBatch,
    collate_media,
    embed_media_prompts,
    embed_modalities,
    with_features,
    with_projectors,
)
from ta.media.projectors import Mlp
from ta.media.settings import MediaConfig, MediaFiles
from ta.model.adapters import AdapterConfig
from ta.model.load import ComputeConfig, load_model

D = 160  # width of the built-in model


def test_embed_modalities_by_hand():
    tokens = torch.tensor([[7, 9, 9, 5], [9, 9, 5, 5]])
    embeds = torch.zeros(2, 4, 1) + tokens[:, :, None]
    features = torch.tensor([[[0.1], [0.2]], [[0.3], [0.4]]])
    out = embed_modalities(embeds, tokens, features, 9)
    assert torch.allclose(out[:, :, 0], torch.tensor([[7, 0.1, 0.2, 5], [0.3, 0.4, 5, 5]]))
    assert torch.equal(embeds, torch.zeros(2, 4, 1) + tokens[:, :, None]), (
        "the argument stays as it was"
    )
    assert torch.equal(embed_modalities(embeds, tokens, torch.empty(0, 2, 1), 3), embeds)
    with pytest.raises(ValueError, match=r"4 placeholders of id 9 for 6 embeddings \(3 x 2\)"):
        embed_modalities(embeds, tokens, torch.zeros(3, 2, 1), 9)
    # as many in all, but one record has three and the next has one: no row takes another's
    for wrong in ([[9, 9, 9, 5], [9, 5, 5, 5]], [[9, 9, 5, 9], [9, 5, 5, 5]], [[9, 9, 9, 5, 9]]):
        tokens = torch.tensor(wrong)
        with pytest.raises(ValueError, match="placeholders of picture or sound 2, from row 1 on"):
            embed_modalities(torch.zeros(*tokens.shape, 1), tokens, features, 9)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures with records, a tiny CLIP, a sound."""
    folder = tmp_path_factory.mktemp("media")
    write_pictures(folder, 6, 4)
    save_clip(folder / "clip", whole=False)
    return folder


def opened(place, **config):
    files = {"image_root": str(place / "images")}
    for name in MediaFiles.__dataclass_fields__.keys() & config.keys():
        files[name] = config.pop(name)
    config = MediaConfig(files=MediaFiles(**files), **{"image_encoder": "builtin"} | config)
    return open_media(config, (str(place / "train.jsonl"),), "cpu")


def formed(media, **chat):
    chat = ChatConfig(**chat)
    return load_chat_tokenizer(
        ModelConfig(), TokenizerConfig(), chat, placeholders=media.placeholders
    ), chat


def made(media, path, model=None, freeze=False, adapter="none", **chat):
    """(model, tokenizer, prepared, collate) of records in a file."""
    tokenizer, chat = formed(media, **chat)
    prepared = prepare_media_chats([str(path)], tokenizer, chat, DataConfig())
    if model is None:
        model = load_model(
            ModelConfig(),
            AdapterConfig(adapter=adapter),
            ComputeConfig(),
            tokenizer,
            around=partial(with_projectors, media, tokenizer, freeze=freeze),
        )
    return model, tokenizer, prepared, partial(collate_media, media)


def batch_of_records(prepared, make, records, packed=True):
    return make(prepared, np.array(records), packed)


def test_what_learns(place):
    media = opened(place, image_encoder="clip", image_encoder_path=str(place / "clip"))
    encoder = media["image"].encode.__self__.module
    papers = {"projector_width": 1024, "projector_depth": 3}  # of HoneyBee
    assert media["image"].settings.items() >= papers.items()
    for freeze, adapter in ((False, "none"), (True, "none"), (False, "lora")):
        model, tokenizer, prepared, make = made(
            media, place / "train.jsonl", freeze=freeze, adapter=adapter
        )
        batch = with_features(media, batch_of_records(prepared, make, [0, 1]))
        model.train()
        model.loss(batch).backward()
        grads = {
            name
            for name, p in model.named_parameters()
            if p.grad is not None and p.grad.abs().sum() > 0
        }
        layers = {f"projectors.image.layers.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
        assert {name for name in grads if name.startswith("projectors.")} == layers
        language = {name for name in grads if name.startswith("inner.")}
        assert not language if freeze else language
        assert adapter == "none" or all("lora" in name or "token" in name for name in language)
        assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
        assert not any(name.startswith("encoder") for name, _ in model.named_parameters())
        placeholder = tokenizer.placeholders["image"]
        media_ids = {
            placeholder.id,
            tokenizer.vocabulary.special["<MS>"],
            tokenizer.vocabulary.special["</MS>"],
        }
        assert not media_ids & set(prepared.ids[np.flatnonzero(prepared.weights)].tolist())


def test_packed_equals_padded_equals_alone(place):
    media = opened(
        place, image_projector="c_abs", image_embeddings=4, projector_width=16, projector_depth=1
    )
    model, _, prepared, make = made(media, place / "train.jsonl")
    whole = model.logprobs(with_features(media, batch_of_records(prepared, make, [0, 1, 2])))
    alone = torch.cat(
        [
            model.logprobs(with_features(media, batch_of_records(prepared, make, [i])))
            for i in range(3)
        ]
    )
    model.set_mode("padded")
    padded = model.logprobs(
        with_features(media, batch_of_records(prepared, make, [0, 1, 2], packed=False))
    )
    assert torch.allclose(whole, alone, atol=1e-5) and torch.allclose(whole, padded, atol=1e-5)
    assert not torch.allclose(
        whole,
        model.logprobs(
            with_features(media, swapped(batch_of_records(prepared, make, [0, 1, 2], packed=False)))
        ),
        atol=1e-3,
    )
    model.set_mode("native")
    own = model.logprobs(
        with_features(media, batch_of_records(prepared, make, [0, 1, 2], packed=False))
    )
    assert torch.allclose(own, whole, atol=1e-4), (
        "models whose hidden states cannot be read see pictures, too"
    )


def swapped(batch: MediaBatch) -> MediaBatch:
    return batch._replace(image=batch.image.flip(0))


@pytest.mark.parametrize("name", ["builtin", "clip"])
def test_cached_equals_uncached_bit_for_bit(place, tmp_path, name):
    path = {
        "image_encoder": name,
        "image_encoder_path": str(place / "clip") if name == "clip" else None,
    }
    encoder, fingerprint = load_with_fingerprint(name, path["image_encoder_path"], "cpu")
    files = {f"train/{i:05d}.png": place / "images" / "train" / f"{i:05d}.png" for i in range(6)}
    extract(
        tmp_path / "c",
        files,
        encoder.read,
        encoder.encode,
        Layout(fingerprint, (encoder.n_modality_embs, encoder.emb_dim), "F32"),
        batch_size=4,
    )
    media, cached = opened(place, **path), opened(place, **path, image_features=str(tmp_path / "c"))
    assert cached["image"].encode is None
    model, _, prepared, make = made(media, place / "train.jsonl")
    _, _, again, read = made(cached, place / "train.jsonl", model)
    for records in ([0], [0, 1, 2, 3, 4], [5, 2]):
        one, other = (
            with_features(m, batch_of_records(p, d, records))
            for m, p, d in ((media, prepared, make), (cached, again, read))
        )
        assert torch.equal(one.image, other.image) and torch.equal(
            model.loss(one), model.loss(other)
        )
    lazy = with_features(
        cached, batch_of_records(again, partial(collate_media, cached, read=False), [0, 1, 2, 3, 4])
    )
    assert torch.equal(
        lazy.image, with_features(media, batch_of_records(prepared, make, [0, 1, 2, 3, 4])).image
    )


def test_text_alone_and_nothing_at_all_run_the_projector(place, tmp_path):
    (tmp_path / "t.jsonl").write_text(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Ho"},
                ]
            }
        )
        + "\n"
    )
    media = opened(place)
    model, _, prepared, make = made(media, tmp_path / "t.jsonl")
    for records in ([0], []):
        model.zero_grad()
        model.loss(
            with_features(media, batch_of_records(prepared, make, np.array(records, int)))
        ).backward()
        assert all(p.grad is not None for p in model.projectors.parameters()), (
            "or processes with and without pictures would not meet"
        )


def test_pictures_of_a_cut_prompt_are_those_in_its_ids(place):
    """Tools and documents take room in a prompt: which pictures stay is read off its token ids."""
    media = opened(place)
    tokenizer, _ = formed(media)
    turns = [
        [
            {"role": "user", "type": "image", "content": f"train/0000{i}.png"},
            {"role": "user", "content": "?"},
        ]
        for i in range(3)
    ]
    answer = {"role": "assistant", "content": "red"}
    chat = [*turns[0], answer, *turns[1], answer, *turns[2]]
    (whole,) = encode_media_prompts([chat], tokenizer, ChatConfig())
    room = ChatConfig(max_tokens=len(whole) - 1)
    (cut,) = encode_media_prompts([chat], tokenizer, room)
    model = made(media, place / "train.jsonl")[0]
    (embeds,) = embed_media_prompts(media, tokenizer, model, [chat], [cut])
    (alone,) = embed_media_prompts(media, tokenizer, model, [chat[3:]], [cut])
    assert len(cut) < len(whole) and torch.equal(embeds, alone)


def test_preview_names_pictures_in_lists_of_parts(place, tmp_path):
    media = opened(place)
    tokenizer, _ = formed(media)
    parts = [{"type": "text", "content": "See"}, {"type": "image", "content": "train/00000.png"}]
    record = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    }
    write_jsonl(tmp_path / "parts.jsonl", [record])
    prepared = prepare_media_chats(
        [str(tmp_path / "parts.jsonl")],
        tokenizer,
        ChatConfig(),
        DataConfig(),
    )
    assert "[image train/00000.png, 16 tokens]" in str(preview(prepared, tokenizer))


def test_prompts_are_embedded_as_batches_are(place):
    media = opened(place)
    model, tokenizer, prepared, make = made(media, place / "train.jsonl")
    whole = model.embed(with_features(media, batch_of_records(prepared, make, [0, 1])))[0]
    ids = [prepared.ids[prepared.offsets[i] : prepared.offsets[i + 1]].tolist() for i in (0, 1)]
    with open(place / "train.jsonl") as file:
        chats = [json.loads(next(file))["messages"] for _ in ids]
    found = list(embed_media_prompts(media, tokenizer, model, chats, ids))
    assert torch.equal(torch.cat(found), whole)


def test_sounds_beside_pictures(place, tmp_path):
    from test_encoders import save_whisper

    write_wav(place / "images" / "a.wav", tone(0.3))
    save_whisper(place / "whisper")
    parts = [
        {"type": t, "content": c}
        for t, c in (("audio", "a.wav"), ("image", "train/00001.png"), ("text", "?"))
    ]
    record = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes"}]
    }
    (tmp_path / "t.jsonl").write_text(json.dumps(record) + "\n")
    media = opened(place, audio_encoder="whisper", audio_encoder_path=str(place / "whisper"))
    model, tokenizer, prepared, make = made(media, tmp_path / "t.jsonl")
    batch = with_features(media, batch_of_records(prepared, make, [0]))
    assert batch.image.shape[0] == batch.audio.shape[0] == 1
    model.loss(batch).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.projectors.parameters())
    ids = prepared.ids.tolist()
    assert ids.count(tokenizer.placeholders["audio"].id) == media["audio"].settings["features"]
    assert ids.index(tokenizer.placeholders["audio"].id) < ids.index(
        tokenizer.placeholders["image"].id
    )


def test_an_encoder_is_one_function_and_one_entry(place, tmp_path, monkeypatch):
    """What the README shows."""
    from ta.media.encoders import ENCODERS, Encoder
    from ta.media.images import CLIP, read_pixels

    def mine(folder):
        torch.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 16, stride=16), torch.nn.Flatten(2), torch.nn.Linear(196, 196)
        )
        module.append(Transposed())
        return Encoder(
            "image",
            8,
            196,
            (14, 14),
            partial(read_pixels, how=CLIP),
            module,
            {"encoder": "mine", "version": 1},
        )

    monkeypatch.setitem(ENCODERS, "mine", mine)
    media = opened(
        place,
        image_encoder="mine",
        image_encoder_path=str(place),
        image_projector="c_abs",
        image_embeddings=9,
        projector_width=16,
    )
    model, _, prepared, make = made(media, place / "train.jsonl")
    model.loss(with_features(media, batch_of_records(prepared, make, [0, 1]))).backward()
    assert (
        model.projectors["image"].positions.shape == (1, 196, 8)
        and model.projectors["image"].positions.grad.abs().sum() > 0
    )


class Transposed(torch.nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_a_language_model_that_does_not_fit_the_llava_layout_is_refused(place):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20}
    base = GPT2LMHeadModel(GPT2Config(**sizes))
    settings = {"encoder": "clip", "path": str(place / "clip"), "features": 4}
    with pytest.raises(ValueError, match="GPT2LMHeadModel does not load as a part of the Llava"):
        assembled(settings, base, Mlp(16, 4, 16, 4), 5)
