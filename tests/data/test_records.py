"""Checkers: each kind has one canonical form, and each fault its words."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ta.data import records
from ta.data.jsonl import BadRecord

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_roles_losses_and_unknown_keys():
    given = {
        "id": 7,
        "messages": [
            {**U, "type": "text", "x": [1]},
            {"role": "bot", "content": "", "disable_loss": True},
            {**A, "loss": 0.5},
        ],
        "y": None,
    }
    before = copy.deepcopy(given)
    messages = [
        {**U, "type": "text", "x": [1]},
        {"role": "assistant", "content": "", "loss": False},
        {**A, "loss": 0.5},
    ]
    assert records.check_chat(given) == {"id": 7, "messages": messages, "y": None}
    assert given == before, "the argument stays as it was"
    assert records.check_chat(
        {"messages": [U, {**A, "disable_loss": None, "loss": None, "type": None}]}
    )["messages"] == [U, A]
    assert records.check_prompt({"messages": [U]}) == {"messages": [U]}
    assert records.check_chat({"messages": [{**U, "loss": True}]}), (
        "a message with a loss of its own is learned"
    )
    assert (
        records.check_media({"messages": [{**U, "type": "image"}, A]})["messages"][0]["type"]
        == "image"
    )


def test_pairs_from_every_form():
    pair = {"context": [U], "answer_w": A, "answer_l": {**A, "content": "b"}}
    forms = [
        pair,
        {**pair, "answer_w": "a", "answer_l": [{"role": "bot", "content": "b"}]},
        {**pair, "precomputed_margin": None},
    ]
    for form in forms:
        assert records.check_pair(form) == pair, form
    assert records.check_pair({**pair, "precomputed_margin": 2, "id": "i"}) == {
        **pair,
        "precomputed_margin": 2.0,
        "id": "i",
    }
    with pytest.raises(BadRecord) as caught:
        records.check_pair({**pair, "answer_l": "a"})
    assert caught.value.unusable and caught.value.reason == "chosen equals rejected"


def test_other_names_of_the_loss():
    for name in records.LOSS_NAMES:
        for value in (0, 1, 0.5, True, False):
            checked = records.check_chat({"messages": [U, {**A, name: value}]})
            assert checked["messages"][1] == {**A, "loss": value}
            assert type(checked["messages"][1]["loss"]) is type(value)
    agreed = records.check_chat({"messages": [U, {**A, "weight": 0, "train": False}, A]})
    assert agreed["messages"][1] == {**A, "loss": 0}
    off = {**A, "disable_loss": True, "loss_mask": 0, "weight": None}
    assert records.check_chat({"messages": [U, off]})["messages"][1] == {**A, "loss": 0}


def test_an_answer_that_is_compared_has_no_weight():
    """Losses of pairs and labels take the log-probability of the whole answer."""
    for weight, fine in ((0.5, False), (2, False), (1, True), (None, True)):
        answer = {**A, "weight": weight}
        pair = {"context": [U], "answer_w": answer, "answer_l": "no"}
        for check, data in (
            (records.check_pair, pair),
            (records.check_labelled, {"context": [U], "answer": answer, "is_desirable": True}),
        ):
            if fine:
                check(data)
                continue
            with pytest.raises(BadRecord, match=f"has the weight {weight}"):
                check(data)


def test_parts_as_openai_writes_them():
    picture = {"type": "image", "content": "cat.png"}
    forms = [
        picture,
        {"type": "image", "image": "cat.png"},
        {"type": "image", "path": "cat.png"},
        {"type": "image_url", "image_url": {"url": "cat.png", "detail": "low"}},
    ]
    for form in forms:
        asked = {**U, "content": [form, {"type": "text", "text": "q"}]}
        parts = records.check_media({"messages": [asked, A]})["messages"][0]["content"]
        assert parts == [picture, {"type": "text", "content": "q"}]
    texts = [{"type": "text", "text": "q"}, {"type": "text", "content": "r"}]
    assert records.check_chat({"messages": [{**U, "content": texts}, A]})["messages"] == [
        {**U, "content": "qr"},
        A,
    ]


def test_the_other_kinds():
    assert records.check_labelled({"context": [U], "answer": "a", "is_desirable": False}) == {
        "context": [U],
        "answer": A,
        "is_desirable": False,
    }
    assert records.check_class({"messages": [U], "label": 0}) == {"messages": [U], "label": 0}
    given = {
        "messages": [U],
        "answers": [{"content": "x"}, {"id": 5, "content": "y"}, {"id": None, "content": "z"}],
        "rewards": {"0": 1, "5": -2.5, "2": 0},
    }
    got = records.check_candidates(given)
    assert [answer["id"] for answer in got["answers"]] == ["0", "5", "2"] and got["rewards"] == {
        "0": 1.0,
        "5": -2.5,
        "2": 0.0,
    }
    assert "rewards" not in records.check_candidates({**given, "rewards": None})
    assert records.check_passage({"id": None, "title": None, "text": "t", "k": 1}) == {
        "text": "t",
        "k": 1,
    }


def test_what_templates_read_beside_content():
    """Null counts as absent; older spellings are read; what is no call or no tool is refused."""
    one = {"name": "f", "arguments": {"a": 1}}
    called = {"role": "assistant", "content": None, "function_call": one, "reasoning": None}
    given = {"messages": [U, called, {"role": "function", "name": "f", "content": "r"}, A]}
    got = records.check_chat({**given, "functions": [{"name": "f"}], "documents": None})
    assert got["messages"][1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": one}],
    }
    assert got["messages"][2]["role"] == "tool" and "documents" not in got
    assert got["tools"] == [{"type": "function", "function": {"name": "f"}}]
    text = records.check_chat({"messages": [U, A], "tools": '[{"name": "f"}]'})
    assert text["tools"] == [{"name": "f"}]


def chat(**change):
    return {"messages": [{**U, **change}, A]}


pair = {"context": [U], "answer_w": "a", "answer_l": "b"}
WRONG = [
    ("check_chat", {}, "messages is missing"),
    ("check_chat", {"messages": []}, "a list of 0"),
    ("check_chat", {"messages": [U, A], "tools": "x"}, 'tools is "x"; give a list'),
    ("check_chat", {"messages": [U, A], "documents": ["x"]}, "documents is a list of 1"),
    ("check_chat", {"messages": [U, A], "chat_template_kwargs": {"tools": 1}}, "with tools"),
    ("check_chat", {"messages": [U, {**A, "tool_calls": [{"id": 1}]}]}, r"tool_calls\[0\] is no"),
    ("check_chat", {"messages": [{**U, "tool_calls": [{"name": "f"}]}, A]}, "only an answer"),
    ("check_chat", {"messages": [U, {**A, "reasoning": 1}]}, "reasoning of messages"),
    ("check_chat", {"messages": {"role": "user"}}, "an object of 1"),
    ("check_chat", {"messages": ["q"]}, r"messages\[0\] is text"),
    ("check_chat", {"messages": [U]}, "no message of role assistant .roles: user."),
    (
        "check_chat",
        {"messages": [U, {"role": "assistant"}]},
        r"content of messages\[1\] .assistant. is missing",
    ),
    ("check_chat", chat(content=None), "is null"),
    ("check_chat", chat(content=3), "is 3"),
    (
        "check_chat",
        chat(content=[{"type": "text"}]),
        r"content\[0\] is an object; give .type, content",
    ),
    ("check_chat", chat(content=[{"type": "image", "image": "a.png"}]), "recipes/multimodal.py"),
    ("check_chat", chat(content=[]), "a list of 0"),
    ("check_chat", chat(weight="no"), 'weight of .* is "no"'),
    ("check_chat", chat(weight=0, loss=1), "has loss and weight at once, and they disagree"),
    ("check_chat", chat(train=False, trainable=True), "has train and trainable at once"),
    ("check_chat", chat(role=None), "role of .* is null"),
    ("check_chat", chat(role=""), 'role of .* is ""'),
    ("check_chat", chat(type="image"), "not text; recipes.multimodal.py reads it"),
    ("check_media", chat(type="video"), "not text or image or audio; give one"),
    ("check_chat", chat(loss="yes"), 'loss of .* is "yes"'),
    ("check_chat", chat(loss=-1), "is -1"),
    ("check_chat", chat(loss=10**400), "loss of"),
    ("check_chat", chat(disable_loss=1), "disable_loss of .* is 1"),
    ("check_chat", chat(disable_loss=True, loss=1.0), "at once"),
    ("check_pair", {**pair, "context": []}, "context is a list of 0"),
    ("check_pair", {"context": [U], "answer_w": "a"}, "answer_l is missing"),
    ("check_pair", {**pair, "answer_w": U}, "role of answer_w is 'user'"),
    ("check_pair", {**pair, "answer_w": [A, A]}, "answer_w is a list"),
    ("check_pair", {**pair, "precomputed_margin": "1"}, 'precomputed_margin is "1"'),
    ("check_pair", {**pair, "precomputed_margin": True}, "precomputed_margin is true"),
    ("check_pair", {**pair, "precomputed_margin": 10**400}, "precomputed_margin is 1000"),
    ("check_labelled", {"context": [U], "answer": "a", "is_desirable": 1}, "is_desirable is 1"),
    ("check_labelled", {"context": [U], "is_desirable": True}, "answer is missing"),
    ("check_class", {"messages": [U], "label": True}, "label is true"),
    ("check_class", {"messages": [U], "label": 1.0}, "label is 1.0"),
    ("check_class", {"messages": [U], "label": -1}, "label is -1"),
    ("check_class", {"messages": [U], "label": 10**400}, "label is 1000"),
    ("check_candidates", {"messages": [U], "answers": []}, "a list of 0"),
    (
        "check_candidates",
        {"messages": [U], "answers": [{"content": "x", "turns": [U]}]},
        "answer 1 was given after calls of tools",
    ),
    (
        "check_candidates",
        {"messages": [U], "answers": [{"id": 1}]},
        "answer 1 is an object without text",
    ),
    (
        "check_candidates",
        {"messages": [U], "answers": [{"content": "x"}, {"id": "0", "content": "y"}]},
        "not all different",
    ),
    (
        "check_candidates",
        {"messages": [U], "answers": [{"content": "x"}], "rewards": {"1": 2}},
        "rewards is an object",
    ),
    (
        "check_candidates",
        {"messages": [U], "answers": [{"content": "x"}], "rewards": {"0": None}},
        "is null",
    ),
    ("check_passage", {"text": " "}, "text is"),
    ("check_passage", {"text": "t", "title": 3}, "title is 3"),
]


@pytest.mark.parametrize(
    "name, data, pattern", WRONG, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(WRONG)]
)
def test_wrong_records(name, data, pattern):
    with pytest.raises(BadRecord, match=pattern) as caught:
        getattr(records, name)(data)
    assert "; " in str(caught.value) and not caught.value.unusable and len(caught.value.reason) < 40


LOSS = st.none() | st.booleans() | st.floats(0, 3)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "bot", "assistant"]), "content": st.text(max_size=2)},
    optional={"loss": LOSS},
)
DIALOGUE = st.lists(MESSAGE, max_size=3)
ODD = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=3)
    | DIALOGUE
    | MESSAGE
    | st.lists(st.none() | st.text())
)
RECORD = st.fixed_dictionaries(
    {
        "messages": DIALOGUE | ODD,
        "context": DIALOGUE | ODD,
        "answer_w": MESSAGE | ODD,
        "answer_l": MESSAGE | ODD,
        "answer": MESSAGE | ODD,
    },
    optional={
        "label": ODD,
        "is_desirable": ODD,
        "answers": DIALOGUE | ODD,
        "rewards": ODD,
        "text": ODD,
        "title": ODD,
        "precomputed_margin": ODD,
    },
)


@settings(max_examples=60, deadline=None)
@given(RECORD, st.sampled_from([name for name in dir(records) if name.startswith("check_")]))
def test_whatever_comes_is_checked_or_refused(data, name):
    check = getattr(records, name)
    try:
        once = check(data)
    except BadRecord:
        return
    assert check(once) == once, "a canonical record stays as it is"
