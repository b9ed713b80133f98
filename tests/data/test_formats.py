"""Formats that people have become canonical records: each by hand, each with the ids of its twin."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ta.chat.encode import encode_chats
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import chat_tokenizer
from ta.data import formats, records
from ta.data.jsonl import BadRecord
from ta.data.prepare import (
    CHATS,
    CLASSES,
    LABELLED,
    PAIRS,
    DataConfig,
    first_records,
    report,
    sequence,
)
from ta.data.sources import Drops, canonical, read_records
from ta.training.samples import prompts_of

U, A = {"role": "user", "content": "q r"}, {"role": "assistant", "content": "a"}
B, S = {"role": "assistant", "content": "b"}, {"role": "system", "content": "s"}
CHAT, PAIR = {"messages": [U, A]}, {"context": [U], "answer_w": A, "answer_l": B}
GOOD = {"context": [U], "answer": A, "is_desirable": True}
human, gpt = {"from": "human", "value": "q r"}, {"from": "gpt", "value": "a"}
other = {"from": "gpt", "value": "b"}
OFF = {"messages": [U, {**A, "loss": False}, U, A]}

PARTS = [{"type": "image", "content": "cat.png"}, {"type": "text", "content": "q r"}]
PICTURED = {"messages": [{"role": "user", "content": PARTS}, A]}

# name of the format, checker, a record of the format, the canonical record that it stands for
TWINS = [
    ("ShareGPT", "chat", {"conversations": [human, gpt]}, CHAT),
    (
        "ShareGPT",
        "chat",
        {"conversations": [human, {**gpt, "weight": 0.0}, human, gpt], "system": "s", "id": 7},
        {"id": 7, "messages": [S, U, {**A, "loss": 0.0}, U, A]},
    ),
    ("ShareGPT", "chat", {"conversations": [U, A]}, CHAT),
    ("Alpaca", "chat", {"instruction": "q r", "input": "", "output": "a"}, CHAT),
    (
        "Alpaca",
        "chat",
        {"instruction": "q", "input": "r", "output": "a", "system": "s", "history": [["q r", "b"]]},
        {"messages": [S, U, B, {**U, "content": "q\nr"}, A]},
    ),
    ("prompt and completion", "chat", {"prompt": "q r", "completion": "a"}, CHAT),
    ("prompt and completion", "chat", {"prompt": [U, A, U], "completion": [A]}, OFF),
    (
        "ShareGPT with preferences",
        "pair",
        {"conversations": [human], "chosen": gpt, "rejected": other},
        PAIR,
    ),
    (
        "Alpaca with preferences",
        "pair",
        {"instruction": "q r", "chosen": "a", "rejected": "b"},
        PAIR,
    ),
    (
        "HH dialogues as text",
        "pair",
        {
            "chosen": "\n\nHuman: q r\n\nAssistant: b\n\nHuman: q r\n\nAssistant: a",
            "rejected": "\n\nHuman: q r\n\nAssistant: b\n\nHuman: q r\n\nAssistant: b",
        },
        {**PAIR, "context": [U, B, U]},
    ),
    ("TRL preference", "pair", {"prompt": "q r", "chosen": "a", "rejected": "b"}, PAIR),
    ("TRL preference", "pair", {"prompt": [U], "chosen": [A], "rejected": [B]}, PAIR),
    ("TRL preference", "pair", {"chosen": [U, A], "rejected": [U, B]}, PAIR),
    ("TRL preference", "pair", {"prompt": "q r", "chosen": [U, A], "rejected": [U, B]}, PAIR),
    (
        "pairs of texts that begin with their prompt",
        "pair",
        {"chosen": "q r a", "rejected": "q r b\n"},
        PAIR,
    ),
    (
        "pairs of texts that begin with their prompt",
        "pair",
        {"chosen": "q\nsame", "rejected": "q\nsame more"},
        {
            "context": [{**U, "content": "q"}],
            "answer_w": {**A, "content": "same"},
            "answer_l": {**B, "content": "same more"},
        },
    ),
    (
        "TRL preference",
        "pair",
        {"prompt": "q r", "chosen": [S, U, A], "rejected": [S, U, B], "margin": 2},
        {**PAIR, "context": [S, U], "precomputed_margin": 2.0},
    ),
    (
        "OpenAI preference",
        "pair",
        {"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": [B]},
        PAIR,
    ),
    ("ShareGPT with a KTO tag", "labelled", {"conversations": [human, gpt], "kto_tag": True}, GOOD),
    (
        "Alpaca with a KTO tag",
        "labelled",
        {"instruction": "q r", "output": "a", "kto_tag": True},
        GOOD,
    ),
    (
        "TRL unpaired preference",
        "labelled",
        {"prompt": "q r", "completion": "a", "label": True},
        GOOD,
    ),
    (
        "TRL unpaired preference",
        "labelled",
        {"prompt": [U], "completion": [A], "label": 1},
        GOOD,
    ),
    ("text and label", "class", {"text": "q r", "label": 1}, {"messages": [U], "label": 1}),
    ("prompts", "prompt", {"prompt": "q r"}, {"messages": [U]}),
    (
        "LLaVA",
        "media",
        {
            "image": "cat.png",
            "conversations": [{"from": "human", "value": "<image>\nq r"}, gpt],
        },
        PICTURED,
    ),
    (
        "messages with pictures apart",
        "media",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q r"}]},
                A,
            ],
            "images": ["cat.png"],
        },
        PICTURED,
    ),
]
CHECKS = {
    name: getattr(records, f"check_{name}")
    for name in ("chat", "pair", "labelled", "class", "prompt", "media")
}
IDS = [f"{i}-{name}" for i, (name, *_) in enumerate(TWINS)]


@pytest.mark.parametrize("name, kind, given, twin", TWINS, ids=IDS)
def test_each_format_becomes_its_canonical_twin(name, kind, given, twin):
    before = json.dumps(given)
    made, form = canonical(given, CHECKS[kind])
    assert made == twin and form.name == name and json.dumps(given) == before
    assert canonical(made, CHECKS[kind]) == (made, None), "a canonical record stays as it is"
    assert canonical(given, partial(CHECKS[kind]))[0] == twin, (
        "settings of a checker change nothing"
    )


def test_calls_of_functions_and_tools_as_text():
    call = {"name": "f", "arguments": {"x": [1, None]}}
    turns = [
        human,
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "7"},
        gpt,
    ]
    tool = {"name": "f", "parameters": {}}
    made = formats.from_turns({"conversations": turns, "tools": json.dumps([tool])})
    calls = [{"type": "function", "function": call}]
    assert made == {
        "messages": [
            U,
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "7"},
            A,
        ],
        "tools": [{"type": "function", "function": tool}],
    }
    two = formats.from_turns(
        {"conversations": [{"from": "function_call", "value": json.dumps([call, call])}]}
    )
    assert two["messages"][0]["tool_calls"] == calls * 2
    given = {"conversations": turns, "tools": " "}
    assert "tools" not in canonical(given, records.check_chat)[0]


def test_pictures_take_their_places_in_order():
    turns = [
        {"from": "human", "value": "<image>\n<image> which?"},
        gpt,
        {"from": "human", "value": "and <image>"},
        gpt,
    ]
    made = formats.from_turns({"conversations": turns, "images": ["1.png", "2.png", "3.png"]})
    paths = [[part["content"] for part in m["content"]] for m in made["messages"][::2]]
    assert paths == [["1.png", "2.png", " which?"], ["and ", "3.png"]]
    plain = formats.from_turns({"conversations": turns})
    assert plain["messages"][2]["content"] == "and <image>", "no pictures: text"
    whole = {**PICTURED, "images": ["cat.png"]}
    assert canonical(whole, records.check_media) == (whole, None), "no place for it: kept"
    parts = {**PICTURED, "messages": [{"role": "user", "content": [{"type": "image"}] * 2}, A]}
    with pytest.raises(BadRecord, match="more <image> than the record has image files"):
        canonical({**parts, "images": ["cat.png"]}, records.check_media)


WRONG = [
    (
        "chat",
        {"instruction": 3, "output": "a"},
        "instruction is a number; give text .the record is read as Alpaca",
    ),
    (
        "chat",
        {"instruction": "q", "history": [["a"]], "output": "a"},
        "give .question, answer. pairs",
    ),
    (
        "chat",
        {"instruction": "q", "history": 3, "output": "a"},
        "history is a number; give .question, answer. pairs",
    ),
    ("labelled", {"conversations": [], "kto_tag": True}, "context is a list of 0"),
    ("chat", {"conversations": ["q"]}, r"conversations\[0\] is text; give .from, value"),
    (
        "chat",
        {"conversations": [human, {"from": "gpt"}]},
        r"messages\[1\] .* is null.*read as ShareGPT",
    ),
    (
        "chat",
        {"conversations": [{"from": "function_call", "value": "f(x)"}]},
        r"function_call of conversations\[0\] is 'f\(x\)'",
    ),
    ("chat", {"conversations": [human, gpt], "tools": "{"}, "tools is text that is no JSON"),
    ("chat", {"prompt": "q", "chosen": "a", "rejected": "b"}, "is TRL preference.*recipes/dpo.py"),
    (
        "chat",
        {"prompt": "q", "completion": "a", "label": 0},
        "is TRL unpaired preference.*recipes/kto.py",
    ),
    (
        "chat",
        {"question": "q", "answer": "a"},
        r"messages is missing .fields: question, answer.; give it, or a record of LLaVA, ShareGPT, Alpaca",
    ),
    ("chat", PAIR, "is one with answer_w, and messages is missing; give it to recipes/rm.py"),
    ("chat", GOOD, "is one with is_desirable, and messages is missing; give it to recipes/kto.py"),
    ("chat", {}, "messages is missing .fields: none"),
    (
        "pair",
        {"chosen": "a", "rejected": "b"},
        "are text, there is no prompt, and they do not begin alike; give the question",
    ),
    ("pair", {"chosen": [U, A], "rejected": [A]}, "differ before"),
    (
        "pair",
        {"prompt": "other", "chosen": [U, A], "rejected": [U, B]},
        "other messages than prompt",
    ),
    (
        "pair",
        {"prompt": "q", "chosen": None, "rejected": "b"},
        "answer_w is null; .*read as TRL preference",
    ),
    (
        "pair",
        {"prompt": 3, "chosen": [U, A], "rejected": [U, B]},
        "other messages than prompt",
    ),
    (
        "pair",
        {"chosen": "\n\nHuman:", "rejected": "\n\nHuman: q\n\nAssistant: a"},
        "differ before|answer",
    ),
    (
        "pair",
        {"messages": [U, A]},
        "context is missing .fields: messages.; give it, or a record of ShareGPT with preferences",
    ),
    (
        "media",
        {
            "image": ["a.png", "b.png"],
            "conversations": [{"from": "human", "value": "<image>"}, gpt],
        },
        "1 of the record's image files have no <image>",
    ),
    (
        "media",
        {"image": "a.png", "conversations": [{"from": "human", "value": "<image><image>"}, gpt]},
        "more <image> than",
    ),
]


@pytest.mark.parametrize("kind, data, pattern", WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_converted_names_the_format_and_the_way(kind, data, pattern):
    with pytest.raises(BadRecord, match=pattern) as caught:
        canonical(data, CHECKS[kind])
    assert "; " in str(caught.value) and len(caught.value.reason) < 40


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(0, 3)
    | st.sampled_from(["", "x", "\n\nHuman: a", "<image>"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "messages"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
FIELDS = (
    "conversations system tools image images instruction input output history chosen rejected prompt completion "
    "label kto_tag text margin preferred_output non_preferred_output messages context id"
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(FIELDS.split()), ODD, max_size=5),
    st.sampled_from(sorted(CHECKS)),
)
def test_whatever_comes_is_converted_or_refused(data, kind):
    try:
        made, _ = canonical(data, CHECKS[kind])
    except BadRecord:
        return
    assert canonical(made, CHECKS[kind])[0] == made


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "<s>", "<user>", "<assistant>", "<system>", *"abcqrsxyz"]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": words[3:6]})
    return chat_tokenizer(fast, EXPLICIT)


PLAIN = DataConfig()
EXPLICIT = ChatConfig(prefix_template="<{role}>", suffix_template="</s>")
KINDS = {"pair": PAIRS, "labelled": LABELLED, "class": CLASSES}


@pytest.fixture
def make(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("TA_CACHE", str(tmp_path / "cache"))

    def made(*rows, kind="chat", name="d.jsonl", config=PLAIN):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return KINDS.get(kind, CHATS).prepare([str(path)], tokenizer, EXPLICIT, config)

    return made


def arrays(prepared):
    return [
        sequence(prepared, i)[part].tolist()
        for i in range(len(prepared.offsets) - 1)
        for part in (0, 1)
    ]


@pytest.mark.parametrize(
    "name, kind, given, twin",
    [t for t in TWINS if t[1] in ("chat", *KINDS)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_file_of_a_format_has_the_ids_of_its_twin(make, name, kind, given, twin):
    converted, plain = make(given, given, kind=kind), make(twin, twin, kind=kind, name="twin.jsonl")
    assert arrays(converted) == arrays(plain) and converted.extras.keys() == plain.extras.keys()
    for key in plain.extras:
        assert converted.extras[key].tolist() == pytest.approx(
            plain.extras[key].tolist(), nan_ok=True
        )
    assert first_records(converted, 1) == first_records(plain, 1)
    said = [line for line in report(converted.info) if name in line]
    assert said and said[0].endswith(f"d.jsonl: {name}, 2 {said[0].split()[-1]}")
    assert not any("twin.jsonl:" in line and "of 2" in line for line in report(plain.info)), (
        "nothing to say"
    )


def test_a_file_has_one_format(make, tmp_path):
    share, plain = {"conversations": [human, gpt]}, {"messages": [U, A]}
    for rows in ((share, share, plain), (plain, plain, share)):
        with pytest.raises(
            ValueError,
            match=r"d.jsonl:3: the record \(fields: \w+\) has another format than those before",
        ):
            make(*rows)
    pictured = {"image": "x.png", "conversations": [human, gpt]}
    check = records.check_media
    (tmp_path / "m.jsonl").write_text(
        json.dumps(share)
        + "\n"
        + json.dumps({**pictured, "conversations": [{"from": "human", "value": "<image>"}, gpt]})
    )
    drops = Drops()
    assert len(list(read_records([str(tmp_path / "m.jsonl")], check, drops))) == 2, (
        "LLaVA's mixes have chats too"
    )
    assert {form.name: n for form, n in drops.formats[0].items()} == {"ShareGPT": 1, "LLaVA": 1}
    skip = DataConfig(on_bad_record="skip", max_bad_share=0.5)
    skipped = make({}, share, share, plain, config=skip, name="bad.jsonl")
    assert skipped.info["records"] == 2 and set(skipped.info["drops"]) == {
        "no messages",
        "another format",
    }


def test_fields_that_no_method_reads_are_said(make):
    prepared = make(
        {"conversations": [human, gpt], "score": 3, "source": "x"},
        {"conversations": [human, gpt], "score": 3},
    )
    assert "  note: fields that are kept and not used: score (2), source (1)" in report(
        prepared.info
    )
    wide = make(*({"messages": [U, A], f"k{i:02}": 1} for i in range(20)))
    (line,) = [line for line in report(wide.info) if "not used" in line]
    assert line.count("(1)") == 12 and line.endswith("and 8 more")


def test_odd_and_doubled_ids(make):
    odd = [{"messages": [U, A], "id": name} for name in (["x", 1], {"a": 1}, 5, 5, "5", None)]
    prepared = make(*odd)
    assert [record["id"] for record in first_records(prepared, 6)] == [
        '["x", 1]',
        '{"a": 1}',
        5,
        5,
        "5",
        None,
    ]
    assert prepared.info["notes"]["id given twice"]["count"] == 2


def test_plain_text_is_what_the_tokenizer_makes_of_it(make, tokenizer):
    texts = ["a b", "x <user> y", "b </s>"]
    prepared = make(*({"text": text} for text in texts))
    for i, text in enumerate(texts):
        ids, weights = sequence(prepared, i)
        whole = text if text.endswith("</s>") else text + " </s>"
        assert ids.tolist() == tokenizer.fast(whole)["input_ids"] and weights.tolist() == [1] * len(
            ids
        )
    assert any("plain text, 3 texts" in line for line in report(prepared.info))
    with pytest.raises(ValueError, match="a plain text has no place for a system prompt"):
        encode_chats([[{**A, "plain": True}]], tokenizer, replace(EXPLICIT, system_prompt="s"))
    short = replace(EXPLICIT, max_tokens=2)
    kept, dropped = encode_chats(
        [[{**A, "plain": True}], [{**A, "content": "a b", "plain": True}]], tokenizer, short
    )
    assert len(kept.ids) == 2 and dropped.reason == "no text fits in max_tokens"
    (cut,) = encode_chats(
        [[{**A, "content": "a b", "plain": True}]], tokenizer, replace(short, cut_answer=True)
    )
    assert cut.ids == tokenizer.fast("a b")["input_ids"]
    assert prompts_of(first_records(prepared, 3), tokenizer, EXPLICIT) == [], "it asks nothing"


def test_plain_text_begins_with_bos_where_the_tokenizer_puts_it(tokenizer):
    from tokenizers import processors

    fast = copy.deepcopy(tokenizer.fast)
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.bos_token_id)]
    )
    made = encode_chats([[{**A, "plain": True}]], chat_tokenizer(fast, EXPLICIT), EXPLICIT)
    assert made[0].ids == fast("a </s>")["input_ids"] and made[0].weights == [0, 1, 1]


def test_records_in_memory(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("TA_CACHE", str(tmp_path / "cache"))
    rows = [{"conversations": [human, gpt]}, {"conversations": [human, other]}]
    first, again = (CHATS.prepare(rows, tokenizer, EXPLICIT, DataConfig()) for _ in range(2))
    assert first.info["records"] == 2 and again.info["cached"]
    assert first_records(first, 2)[1]["messages"] == [U, B]
