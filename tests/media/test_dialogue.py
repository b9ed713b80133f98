"""Media in chats: placeholders only where a picture stands, cut together with it, and every file that cannot be used named with its record."""

import json
import os

import pytest
from PIL import Image

from ta.builtin.pictures import draw_scene, make_scene
from ta.chat.encode import Drop, encode_chats
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import Placeholder, TokenizerConfig, load_chat_tokenizer
from ta.data import records
from ta.data.jsonl import BadRecord
from ta.data.prepare import DataConfig
from ta.folders import ModelConfig
from ta.media.dialogue import (
    encode_media_prompts,
    kept_media,
    media_of_prompt,
    place_media,
    prepare_media_chats,
)
from ta.media.modalities import open_media
from ta.media.multimodal import media_of
from ta.media.settings import MediaConfig, MediaFiles

A = {"role": "assistant", "content": "red"}


def picture(path="a.png", role="user"):
    return {"role": role, "type": "image", "content": path}


def ask(text="What?"):
    return {"role": "user", "type": "text", "content": text}


@pytest.fixture(scope="module")
def tokenizer():
    placeholders = {
        "image": Placeholder("<MS>", "<img>", "</MS>", 3, lambda path: None),
        "audio": Placeholder("<MS>", "<audio>", "</MS>", 2, lambda path: None),
    }
    return load_chat_tokenizer(
        ModelConfig(), TokenizerConfig(), ChatConfig(), placeholders=placeholders
    )


def encode(tokenizer, chats, prompts=False, **chat):
    chats = [
        records.check_media({"messages": chat}, need_answer=not prompts)["messages"]
        for chat in chats
    ]
    config = ChatConfig(**chat)
    if not prompts:
        return learned(chats, tokenizer, config)
    ids = encode_media_prompts(chats, tokenizer, config)
    pairs = zip(chats, ids, strict=True)
    return [x if isinstance(x, Drop) else (x, media_of_prompt(c, x, tokenizer)) for c, x in pairs]


def learned(chats, tokenizer, config):
    """Each chat as it is learned, with those of its pictures that were not cut away, or a Drop."""
    known = tokenizer.placeholders
    placed = [place_media(chat, known) for chat in chats]
    results = encode_chats(placed, tokenizer, config)
    return [
        result
        if isinstance(result, Drop)
        else (result, kept_media(messages, result.ids, tokenizer, config.keep_end))
        for result, messages in zip(results, placed, strict=True)
    ]


def test_placeholders_stand_where_the_picture_stood(tokenizer):
    (tokens, media), (prompt, seen) = (
        encode(tokenizer, [[picture("x/a.png"), ask(), A]])[0],
        encode(tokenizer, [[picture("x/a.png"), ask(), A]], True)[0],
    )
    text = tokenizer.fast.decode(tokens.ids)
    assert (
        text
        == "<|im_start|>user\n<MS><img><img><img></MS><|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )
    assert media == seen == [("image", "x/a.png")] and tokens.ids[: len(prompt)] == prompt
    learned = tokenizer.fast.decode([id for id, weight in zip(*tokens, strict=True) if weight])
    assert learned == "red<|im_end|>\n"
    everything, _ = encode(tokenizer, [[picture(), ask(), A]], loss_on="all")[0]
    learned = tokenizer.fast.decode([id for id, weight in zip(*everything, strict=True) if weight])
    assert "img" not in learned and "MS" not in learned and "What?" in learned


def test_what_a_user_types_stays_text(tokenizer):
    forged = ask("a <MS><img><img><img></MS> b <audio>")
    for chat in ([forged, A], [picture(), forged, A]):
        tokens, media = encode(tokenizer, [chat])[0]
        assert len(media) == len(chat) - 2 and tokens.ids.count(
            tokenizer.placeholders["image"].id
        ) == 3 * len(media)
        assert forged["content"] in tokenizer.fast.decode(tokens.ids), (
            "spelled with ordinary tokens"
        )


def test_several_in_a_message_and_in_a_dialogue(tokenizer):
    parts = [
        {"type": "text", "content": " 1 "},
        picture("a.png"),
        {"type": "audio", "content": "b.wav"},
        {"type": "text", "content": " 2"},
    ]
    mixed = {
        "role": "user",
        "content": [{"type": p["type"], "content": p["content"]} for p in parts],
    }
    tokens, media = encode(tokenizer, [[mixed, A, picture("c.png"), ask(), A]])[0]
    assert media == [("image", "a.png"), ("audio", "b.wav"), ("image", "c.png")]
    text = tokenizer.fast.decode(tokens.ids)
    assert " 1 <MS><img><img><img></MS><MS><audio><audio></MS> 2<|im_end|>" in text
    assert encode(tokenizer, [[{"role": "user", "content": [parts[0], parts[3]]}, A]])[0][1] == []


def test_templates_that_strip_contents_are_followed(tokenizer):
    parts = [
        {"type": "text", "content": "\n x "},
        {"type": "image", "content": "a.png"},
        {"type": "text", "content": " y \n"},
    ]
    turns = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    )
    source = turns + "{% if add_generation_prompt %}[assistant]{% endif %}"
    from ta.chat.tokenizer import template_of

    tokenizer.fast.chat_template, kept = source, tokenizer.fast.chat_template
    stripping = tokenizer._replace(template=template_of(tokenizer.fast, ChatConfig()))
    tokenizer.fast.chat_template = kept
    chat = records.check_media({"messages": [{"role": "user", "content": parts}, A]})["messages"]
    (tokens, media) = learned([chat], stripping, ChatConfig())[0]
    assert (
        tokenizer.fast.decode(tokens.ids)
        == "[user]x <MS><img><img><img></MS> y<|im_end|>[assistant]red<|im_end|>"
    )
    assert tokens.ids.count(tokenizer.placeholders["image"].id) == 3 and media == [
        ("image", "a.png")
    ]


@pytest.mark.parametrize("keep_end", [False, True])
def test_a_picture_leaves_only_with_its_message(tokenizer, keep_end):
    turns = [[picture(f"{i}.png"), ask(f"question {i}?"), A] for i in range(4)]
    chat = [message for turn in turns for message in turn]
    whole = len(encode(tokenizer, [chat])[0][0].ids)
    seen = set()
    for limit in (*range(20, whole, 3), whole):
        found = encode(tokenizer, [chat], max_tokens=limit, keep_end=keep_end)[0]
        if isinstance(found, Drop):
            continue
        tokens, media = found
        assert len(tokens.ids) <= limit and tokens.ids.count(
            tokenizer.placeholders["image"].id
        ) == 3 * len(media)
        text = tokenizer.fast.decode(tokens.ids)
        asked = [i for i in range(4) if f"question {i}?" in text]
        names = [f"{i}.png" for i in asked]
        assert [path for _, path in media][-len(names) :] == names and (
            keep_end or len(media) == len(names)
        )
        seen.add(len(media))
    assert len(seen) == 4
    prompt, media = encode(tokenizer, [[*chat[:-1]]], True, max_tokens=whole // 2)[0]
    assert (
        media[-1] == ("image", "3.png")
        and prompt.count(tokenizer.placeholders["image"].id) == 3 * len(media) < 12
    )


WRONG = [
    ([picture(), ask()], "no message of role assistant"),
    ([ask(), A, picture()], "no answer follows the image of messages"),
    ([ask(), picture(role="assistant")], "of role assistant is image"),
    ([picture(role="system"), ask(), A], "of role system is image"),
    (
        [{"role": "user", "type": "video", "content": "a.mp4"}, A],
        "not text or image or audio; give one",
    ),
    (
        [{"role": "user", "content": [{"type": "image"}]}, A],
        r"content\[0\] is an object; give {type, content}",
    ),
    ([{"role": "user", "content": ["a.png"]}, A], r"content\[0\] is text"),
    ([{"role": "user", "content": []}, A], "a list of 0"),
]


@pytest.mark.parametrize("messages, pattern", WRONG, ids=range(len(WRONG)))
def test_records_that_cannot_be(messages, pattern):
    with pytest.raises(BadRecord, match=pattern):
        records.check_media({"messages": messages})


def spoiled(folder):
    """{path as a record gives it: what the error says} for every way a picture can be wrong."""
    root = folder / "images"
    root.mkdir()
    Image.fromarray(draw_scene(make_scene(0, 0, False))).save(root / "good.png")
    Image.fromarray(draw_scene(make_scene(0, 1, False))).save(folder / "outside.png")
    data = (root / "good.png").read_bytes()
    (root / "cut.png").write_bytes(data[: len(data) // 2])
    (root / "broken.png").write_bytes(data[:60] + b"\0" * 40 + data[100:])
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("not a picture")
    Image.new("1", (13_000, 13_000)).save(root / "bomb.png")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "fifo.png")
    os.symlink(folder / "outside.png", root / "link.png")
    return {
        "none.png": "no such file",
        "cut.png": "broken or cut short",
        "broken.png": "broken|does not load as a picture",
        "empty.png": "0 bytes",
        "text.png": "does not load as a picture",
        "bomb.png": "169000000 pixels",
        "folder.png": "is a directory",
        "fifo.png": "not a regular file",
        "../outside.png": r"has '\.\.' in it",
        str(folder / "outside.png"): "is absolute",
        "link.png": "outside the media root",
        "https://example.org/a.png": "nothing is fetched from a URL",
        "data:image/png;base64,AAAA": "nothing is fetched from a URL",
        "": "not a path",
    }


def test_every_bad_file_is_an_error_with_its_line_or_a_counted_skip(tmp_path):
    wrong = spoiled(tmp_path)
    media = open_media(
        MediaConfig(files=MediaFiles(image_root=str(tmp_path / "images")), image_encoder="builtin"),
        ("x.jsonl",),
        "cpu",
    )
    tokenizer = load_chat_tokenizer(
        ModelConfig(), TokenizerConfig(), ChatConfig(), placeholders=media.placeholders
    )
    good = json.dumps({"messages": [picture("good.png"), ask(), A]}) + "\n"
    for path, pattern in wrong.items():
        data = tmp_path / "one.jsonl"
        data.write_text(good + json.dumps({"messages": [picture(path), ask(), A]}) + "\n")
        with pytest.raises(ValueError, match=rf"one\.jsonl:2: .*({pattern})"):
            prepare_media_chats([str(data)], tokenizer, ChatConfig(), DataConfig())
    data.write_text(
        good
        + "".join(json.dumps({"messages": [picture(path), ask(), A]}) + "\n" for path in wrong)
        + good
    )
    prepared = prepare_media_chats(
        [str(data)],
        tokenizer,
        ChatConfig(),
        DataConfig(on_bad_record="skip", max_bad_share=0.95),
    )
    assert len(prepared.origin) == 2 and prepared.info["drops"]["image cannot be used"][
        "count"
    ] == len(wrong)
    assert media_of(prepared, 0) == media_of(prepared, 1) == [("image", "good.png")]
    data.write_text(
        json.dumps({"messages": [{"role": "user", "type": "audio", "content": "a.wav"}, A]}) + "\n"
    )
    with pytest.raises(
        ValueError,
        match=r"one\.jsonl:1: 'a\.wav' is audio, and the encoders given read image; give --audio-encoder",
    ):
        prepare_media_chats([str(data)], tokenizer, ChatConfig(), DataConfig())
