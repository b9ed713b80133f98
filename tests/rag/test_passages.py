"""Passages keep their bytes and their ids; joined ones are cut or left out, the question never."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ta.builtin import models, tasks
from ta.chat.encode import Drop, encode_chats, encode_prompts
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.command_line import check_config
from ta.folders import ModelConfig
from ta.rag.passages import (
    Passages,
    PassageSettings,
    RetrievalConfig,
    passage_settings,
    put_before,
    question_place,
    read_passages,
    rows_of,
    text_of,
    write_passages,
)
from ta.rag.retrieval import Retriever, join_passages


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models.write_tiny(folder)
    return load_chat_tokenizer(ModelConfig(model_path=str(folder)), TokenizerConfig(), ChatConfig())


def written(folder, records):
    tasks.write_jsonl(folder / "given.jsonl", records)
    return Passages(
        folder / "kept.jsonl", write_passages([str(folder / "given.jsonl")], folder / "kept.jsonl")
    )


def joined(tokenizer, config, how, encode, chat, texts):
    retriever = Retriever(None, None, None, tokenizer, config, how, "cpu")
    return join_passages(retriever, [chat], [texts], encode)[0]


def test_passages_are_found_by_place_and_by_id(tmp_path):
    kept = written(
        tmp_path,
        [
            {"text": "söme\ntext"},
            {"id": 7, "title": "T", "text": "b", "url": "x"},
            {"id": "z", "title": None, "text": "c"},
        ],
    )
    seven, first = (
        {"id": "7", "title": "T", "text": "b", "url": "x"},
        {"id": "0", "text": "söme\ntext"},
    )
    assert read_passages(kept, [1, 0, 1]) == [seven, first, seven]
    assert rows_of(kept, ["z", "7", "no"]) == {"7": 1, "z": 2} and rows_of(kept, []) == {}
    assert [text_of(p) for p in read_passages(kept, range(3))] == ["söme\ntext", "T\nb", "c"]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"text": "a"}, {"text": " "}], r"given\.jsonl:2: text is \" \"; give the passage's text"),
        (
            [{"id": "a", "text": "a"}, {"id": "b", "text": "b"}, {"id": "a", "text": "c"}],
            r"given\.jsonl:3: id 'a' is that of .*given\.jsonl:1",
        ),
        (
            [{"text": "a"}, {"id": 0, "text": "b"}],
            r"given\.jsonl:2: id '0' is that of .*given\.jsonl:1",
        ),
    ],
)
def test_bad_passages_are_named_by_line(tmp_path, records, words):
    with pytest.raises(ValueError, match=words):
        written(tmp_path, records)


def test_the_question_is_the_last_message_before_the_answer():
    user, answer, system = (
        {"role": role, "content": role} for role in ("user", "assistant", "system")
    )
    assert (
        question_place([system, user, answer, user, answer, answer]) == 3
        and question_place([user]) == 0
    )
    tool = {"role": "tool", "content": "tool"}
    assert question_place([user, answer, tool, answer]) == question_place([user, answer, tool]) == 0
    for chat in ([], [answer], [system, answer], [system], [system, answer, tool, answer]):
        with pytest.raises(ValueError, match="no question"):
            question_place(chat)
    assert put_before([user, answer, user, answer], ["A", "B"], "|")[2]["content"] == "A|B|user"


WORDS = st.lists(
    st.sampled_from(["key", "red", "ünder", "lamp", "x" * 9, "\n"]), min_size=1, max_size=30
).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=4), WORDS, st.integers(12, 120), st.integers(1, 40), st.booleans())
def test_joined_chats_fit_and_keep_their_question(
    tokenizer, texts, question, limit, passage_tokens, prompt
):
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "red"}]
    config, how = (
        ChatConfig(max_tokens=limit, keep_end=True),
        PassageSettings(4, passage_tokens, "##"),
    )
    way = encode_prompts if prompt else encode_chats
    encode = lambda chats: way(chats, tokenizer, config)
    tokens, messages, used = joined(tokenizer, config, how, way, chat, texts)
    alone = encode([chat])[0]
    if isinstance(alone, Drop):
        assert isinstance(tokens, Drop) and used == 0
        return
    ids = getattr(tokens, "ids", tokens)
    assert (
        len(ids) <= limit
        and messages[0]["content"].endswith(question)
        and tokens == encode([messages])[0]
    )
    block = messages[0]["content"].removesuffix(question)
    whole = put_before(chat, texts, "##")
    roomy = replace(config, max_tokens=limit - 8)
    room = not isinstance(
        (encode_prompts if prompt else encode_chats)([whole], tokenizer, roomy)[0],
        Drop,
    )
    longest = max([len(tokenizer.fast(text).input_ids) for text in texts], default=0)
    if longest <= passage_tokens and room:
        assert used == len(texts) and messages == whole
    assert used or not block
    if used:
        kept = [len(tokenizer.fast(text).input_ids) for text in block.split("##")[:-1]]
        assert max(kept) <= passage_tokens + 1  # a cut inside a merge can take one more


def test_passages_are_cut_then_left_out(tokenizer):
    """A limit in between: the first passage whole, the second cut, the third out; training ids begin with those of the prompt."""
    chat = [{"role": "user", "content": "key?"}, {"role": "assistant", "content": "red"}]
    texts = ["cat dog cow", " ".join(["fox"] * 30), "owl"]
    both = []
    for encode in (encode_chats, encode_prompts):
        config = ChatConfig(max_tokens=40)
        how = PassageSettings(3, 256, "\n")
        tokens, messages, used = joined(tokenizer, config, how, encode, chat, texts)
        both.append(getattr(tokens, "ids", tokens))
        assert (
            used == 2
            and messages[0]["content"].startswith("cat dog cow\nfox fox")
            and messages[0]["content"].endswith("fox\nkey?")
        )
    train, asked = (
        joined(tokenizer, ChatConfig(), PassageSettings(), encode, chat, texts)[0]
        for encode in (encode_chats, encode_prompts)
    )
    assert train.ids[: len(asked)] == asked


def test_settings_of_the_user_over_those_of_the_index():
    index = {"joining": {"num_passages": 1, "passage_tokens": 9, "separator": "|"}}
    assert passage_settings(RetrievalConfig(), {}) == PassageSettings() and passage_settings(
        RetrievalConfig(), index
    ) == PassageSettings(1, 9, "|")
    assert passage_settings(
        RetrievalConfig(num_passages=3, separator=""), index
    ) == PassageSettings(3, 9, "")
    with pytest.raises(ValueError, match="--passage-tokens 0: give a number from 1 to 2147483647"):
        check_config(RetrievalConfig(passage_tokens=0))
    assert json.dumps(PassageSettings()._asdict())
