"""Each kind of record becomes the sequences its method learns from, and whatever changes them changes the key."""

import hashlib
import json
import math
from dataclasses import replace
from itertools import product

import pytest

from ta.chat.template import ChatConfig
from ta.chat.tokenizer import chat_tokenizer
from ta.data.prepare import (
    CHATS,
    CLASSES,
    LABELLED,
    PAIRS,
    QUESTIONS,
    DataConfig,
    sequence,
)

U, A = {"role": "user", "content": "u v"}, {"role": "assistant", "content": "x y"}
KINDS = {kind.name: kind for kind in (CHATS, PAIRS, LABELLED, CLASSES, QUESTIONS)}
# of what the records of all kinds in this file become, with PREPARE_VERSION 3
KNOWN = "3d2bb63be4431586f93a9788dd732b2b70088727383515b524d3bc3cd181df01"
LONG = {"role": "user", "content": "u " * 50}
EXPLICIT = ChatConfig(
    prefix_template="<{role}>", suffix_template="</s>", role_tags=("user=U", "assistant=A")
)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<U>", "<A>", "<", ">", "U", "A", "u", "v", "x", "y", "z"]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<U>", "<A>"],
        chat_template="{% for m in messages %}{{ '<U> ' if m.role == 'user' else '<A> ' }}"
        "{{ m.content ~ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<A> ' }}{% endif %}",
    )


@pytest.fixture
def make(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("TA_CACHE", str(tmp_path / "cache"))

    def made(kind, *records, config=EXPLICIT, name="d.jsonl", bad_share=0.01):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return KINDS[kind].prepare(
            [str(tmp_path / name)],
            chat_tokenizer(tokenizer, config),
            config,
            DataConfig(max_bad_share=bad_share),
        )

    return made


def shown(prepared, tokenizer, i=0):
    ids, weights = sequence(prepared, i)
    pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
    return " ".join(
        f"[{piece}]" if weight else piece for piece, weight in zip(pieces, weights, strict=True)
    )


def test_each_kind_by_hand(make, tokenizer):
    chat = make("chat", {"messages": [U, A, U, A]})
    assert (
        shown(chat, tokenizer)
        == "<s> <U> u v </s> <A> [x] [y] [</s>] <U> u v </s> <A> [x] [y] [</s>]"
        and chat.k == 1
    )
    pair = {"context": [U, A, U], "answer_w": A, "answer_l": {**A, "content": "z"}}
    pairs = make("pair", {**pair, "precomputed_margin": 2}, pair)
    before = "<s> <U> u v </s> <A> x y </s> <U> u v </s> <A> "
    assert [shown(pairs, tokenizer, i) for i in (0, 1)] == [
        before + "[x] [y] [</s>]",
        before + "[z] [</s>]",
    ] and pairs.k == 2
    assert pairs.extras["margin"][0] == 2 and math.isnan(pairs.extras["margin"][1])
    labelled = make(
        "labelled",
        *({"context": [U, A, U], "answer": A, "is_desirable": good} for good in (True, False)),
    )
    assert shown(labelled, tokenizer) == before + "[x] [y] [</s>]" and labelled.extras[
        "desirable"
    ].tolist() == [1, 0]
    classes = make(
        "class", {"messages": [{**U, "loss": False}], "label": 2}, {"messages": [U, A], "label": 0}
    )
    assert [shown(classes, tokenizer, i) for i in (0, 1)] == [
        "<s> <U> u v </s>",
        "<s> <U> u v </s> <A> x y </s>",
    ]
    assert classes.extras["label"].tolist() == [2, 0] and classes.info["learned_tokens"] == 0


def test_what_cannot_be_used_is_counted(make):
    cut = ChatConfig(**{**vars(EXPLICIT), "max_tokens": 12})
    prepared = make("chat", {"messages": [LONG, A]}, {"messages": [U, A]}, config=cut)
    assert (
        prepared.info["records"] == 1
        and sum(entry["count"] for entry in prepared.info["drops"].values()) == 1
    )
    records = [
        {"context": [U], "answer_w": A, "answer_l": {**A, "content": worse}}
        for worse in ("x y", "x  y", "z")
    ]
    with pytest.raises(
        ValueError,
        match=r"d.jsonl:1: chosen equals rejected, as in 2 of 3 pairs, over --max-bad-share 0.5",
    ):
        make("pair", *records, bad_share=0.5)
    pairs = make("pair", *records, bad_share=0.7)
    assert pairs.info["drops"]["chosen equals rejected"]["count"] == 2, (
        "the same text, or the same tokens"
    )
    with pytest.raises(ValueError, match=r"d.jsonl:2: .*narrator"):
        make("chat", {"messages": [U, A]}, {"messages": [{"role": "narrator", "content": ""}, A]})


def test_without_answers_only_where_all_is_learned(make, tokenizer):
    everything = ChatConfig(**{**vars(EXPLICIT), "loss_on": "all"})
    assert (
        shown(make("chat", {"messages": [U]}, config=everything), tokenizer)
        == "<s> <U> [u] [v] [</s>]"
    )
    with pytest.raises(ValueError, match=r"d.jsonl:1: no message of role assistant"):
        make("chat", {"messages": [U]})


def test_every_setting_is_in_the_key(make, tokenizer, tmp_path):
    record = {"messages": [U, A], "label": 1}
    changes = [
        {},
        {"loss_on": "last"},
        {"max_tokens": 99},
        {"keep_end": True},
        {"system_prompt": "z"},
        {"ignore_system_prompt": True},
    ]
    changes += [
        {"suffix_template": "</s></s>"},
        {"role_tags": ("user=A", "assistant=A", "system=A")},
    ]
    tags = ("user=U", "assistant=A", "system=U")
    made = [
        make(kind, record, config=ChatConfig(**{**vars(EXPLICIT), "role_tags": tags, **change}))
        for kind in ("chat", "class")
        for change in changes
        if kind == "chat" or "loss_on" not in change
    ]
    assert len({prepared.info["fingerprint"] for prepared in made}) == len(made) and not any(
        p.info["cached"] for p in made
    )
    tokenizer.add_tokens(["<new>"])
    again = make("chat", record, config=ChatConfig(**{**vars(EXPLICIT), "role_tags": tags}))
    assert not again.info["cached"], "another tokenizer"


def test_what_records_become_is_known(make):
    """A known hash of ids and weights of each kind: raise PREPARE_VERSION where it changes."""
    more = {"role": "user", "content": "z z"}
    context, other = [U, A, more], {**A, "content": "y z x"}
    records = {
        "chat": [
            {"messages": [U, A, more, other]},
            {"messages": [{**U, "loss": 0.5}, A, more, {**A, "disable_loss": True}]},
            {"messages": [LONG, A, more, other, more]},
        ],
        "pair": [
            {"context": context, "answer_w": A, "answer_l": other, "precomputed_margin": 0.5},
            {"context": [LONG, A, more], "answer_w": other, "answer_l": A},
        ],
        "labelled": [{"context": context, "answer": A, "is_desirable": False}],
        "class": [{"messages": [U, A, more], "label": 2}, {"messages": [LONG, U], "label": 0}],
        "question": [{"messages": [LONG, A, *context, A], "gold": "p"}],
    }
    digest = hashlib.sha256()
    cuts = ({}, {"max_tokens": 40}, {"max_tokens": 40, "keep_end": True})
    losses = ("answers", "last", "all")
    for template, cut, loss_on in product((EXPLICIT, ChatConfig()), cuts, losses):
        for kind, rows in records.items():
            own = {"loss_on": loss_on} if kind == "chat" else {}
            prepared = make(kind, *rows, config=replace(template, **own, **cut))
            for array in (prepared.offsets, prepared.ids, prepared.weights):
                digest.update(array.tobytes())
    assert digest.hexdigest() == KNOWN
