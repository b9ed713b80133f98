"""The prepared set: what is opened again equals what was encoded, is made once for the same inputs, and made anew for any other."""

import importlib.util
import json
import mmap
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ta import files
from ta.chat.encode import with_answers
from ta.chat.render import Tokens, Vocabulary
from ta.chat.template import ChatConfig, explicit_template
from ta.chat.tokenizer import ChatTokenizer
from ta.data import prepare as prepare_module
from ta.data.jsonl import BadRecord
from ta.data.prepare import (
    CHATS,
    DataConfig,
    first_records,
    lengths,
    preview,
    read_drops,
    report,
    sequence,
    write_drops,
)
from ta.data.records import check_chat, check_prompt
from ta.data.sources import read_records

SKIP = DataConfig(on_bad_record="skip", max_bad_share=0.5)


def write(path, contents, tail=b""):
    turns = [
        {"messages": [{"role": "user", "content": content}, {"role": "bot", "content": "a"}]}
        for content in contents
    ]
    path.write_bytes(b"".join(json.dumps(turn).encode() + b"\n" for turn in turns) + tail)
    return str(path)


class Backend:
    """What the key of prepared data asks of a tokenizer."""

    def __init__(self):
        self.special_tokens_map = {}


class Letters:
    """A tokenizer whose ids are letters; counts what it encodes."""

    def __init__(self):
        self.seen = []
        tags = {"user": "", "assistant": " ", "system": "", "tool": ""}
        template = explicit_template("{role}", "", tags)
        self.tokenizer = ChatTokenizer(Backend(), template, Vocabulary(self.encode))

    def encode(self, texts):
        """The code points of each text."""
        self.seen += [text for text in texts if text not in (" ", "a")]
        return [[ord(letter) for letter in text] for text in texts]


def check(data):
    """Contents with "d" are of no use."""
    data = check_chat(data)
    if any("d" in message["content"] for message in data["messages"]):
        raise BadRecord("has a d", "it has a d", unusable=True)
    return data


def dialogues(record, tokenizer):
    """Contents with "!" are wrong."""
    if any("!" in message["content"] for message in record["messages"]):
        raise ValueError("message 1: no ! please; give none")
    return [record["messages"]]


def size(record):
    return {"size": sum(len(message["content"]) for message in record["messages"]) + 1}


KIND = CHATS._replace(check=check, dialogues=dialogues, extras=size, answer_optional=False)


def made(files, data=DataConfig(), letters=None, chat=ChatConfig(), kind=KIND, **more):  # noqa: B008
    return kind.prepare(files, (letters or Letters()).tokenizer, chat, data, **more)


def texts(prepared):
    return ["".join(map(chr, sequence(prepared, i)[0])) for i in range(len(prepared.offsets) - 1)]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "SETTLED", 0)


def test_what_went_in_comes_out(tmp_path, monkeypatch):
    monkeypatch.setattr("ta.data.sources.CHUNK_RECORDS", 3)
    b, a = (
        write(tmp_path / "b.jsonl", ["bb", "ddd", "b"]),
        write(tmp_path / "a.jsonl", ["", *"xyz" * 5]),
    )
    letters = Letters()
    first, again = (made([a, b], letters=letters) for _ in range(2))
    # each chunk of three records is encoded once, each of its texts once
    assert len(letters.seen) == 17
    assert not first.info["cached"] and again.info["cached"]
    for prepared in (first, again):
        assert texts(prepared) == [" a", *(f"{letter} a" for letter in "xyz" * 5), "bb a", "b a"], (
            "sources in the order given"
        )
        assert prepared.origin.tolist() == [[0, i] for i in range(1, 17)] + [[1, 1], [1, 3]]
        assert (
            lengths(prepared).tolist() == prepared.extras["size"].tolist() == [2, *[3] * 15, 4, 3]
        )
        assert sequence(prepared, 16)[1].tolist() == [0, 0, 0, 1] and prepared.k == 1
        info = prepared.info
        assert [info[key] for key in ("records", "tokens", "learned_tokens", "max_id", "bad")] == [
            18,
            54,
            18,
            ord("z"),
            0,
        ]
        assert [
            (source["records"], source["used"], source["path"]) for source in info["sources"]
        ] == [(16, 16, a), (3, 2, b)]
        assert info["drops"] == {"has a d": {"count": 1, "first": [f"{b}:2"]}}
        assert list(read_drops(prepared)) == [
            {"source": 1, "file": b, "line": 2, "reason": "has a d"}
        ]
    assert not first.ids.flags.writeable and isinstance(first.ids.base, np.memmap)
    assert [first.ids.dtype, first.weights.dtype, first.offsets.dtype, first.origin.dtype] == [
        "int32",
        "float32",
        "int64",
        "int32",
    ]
    lines = report(first.info)
    assert (
        lines[0] == "18 records, 54 tokens, 33 % learned"
        and f"  2 of 3 from {b}" in lines
        and f"  dropped 1: has a d ({b}:2)" in lines
    )


def test_pairs_have_two_sequences_each(tmp_path):
    path = write(tmp_path / "a.jsonl", "xyz")

    def dialogues(record, tokenizer):
        content = record["messages"][0]["content"]
        asked = [{"role": "user", "content": "q"}]
        return with_answers(asked, [{"content": "a" * ord(content)}, {"content": "b"}])

    kind = KIND._replace(check=check_chat, dialogues=dialogues, extras=None)
    path = write(tmp_path / "a.jsonl", ["\x01", "\x02", "\x03"])
    prepared = made([path], kind=kind)
    assert prepared.k == 2 and lengths(prepared).tolist() == [6, 7, 8] and prepared.extras == {}
    assert texts(prepared) == ["q a", "q b", "q aa", "q b", "q aaa", "q b"]


def test_the_key_holds_all_that_matters_and_no_more(tmp_path):
    path, other = write(tmp_path / "a.jsonl", "abcefghijk"), write(tmp_path / "b.jsonl", "xyz")

    def key(*files, **more):
        prepared = made(files, **more)
        return not prepared.info["cached"], prepared.info["fingerprint"]

    base = key(path, other)
    assert base[0] and key(path, other, seed=5) == (False, base[1]), (
        "an unused seed does not matter"
    )
    assert key(other, path)[1] != base[1], "records stand in the order of their sources"
    prints = [
        key(path)[1],
        key(path, other, chat=ChatConfig(keep_end=True))[1],
        key(f"{path}@3", other)[1],
        key(f"{path}@3", other, seed=1)[1],
    ]
    prints += [key(f"{path}@offset=1", other)[1], key(f"{path}@system=S", other)[1]]
    assert len({base[1], *prints}) == 7
    assert key(path, other, kind=KIND._replace(check=check_prompt)) == (True, base[1])
    os.rename(path, tmp_path / "a2.jsonl")
    assert key(str(tmp_path / "a2.jsonl"), other) == (False, base[1]), "a name does not matter"
    write(tmp_path / "a2.jsonl", "abcefghijl")
    assert key(str(tmp_path / "a2.jsonl"), other)[1] not in {base[1], *prints}


def test_places_follow_a_renamed_file(tmp_path):
    made([write(tmp_path / "a.jsonl", "dx")])
    os.rename(tmp_path / "a.jsonl", tmp_path / "z.jsonl")
    prepared = made([str(tmp_path / "z.jsonl")])
    assert prepared.info["cached"] and prepared.info["drops"]["has a d"]["first"] == [
        f"{tmp_path}/z.jsonl:1"
    ]
    assert [entry["file"] for entry in read_drops(prepared)] == [f"{tmp_path}/z.jsonl"]


def test_bad_records_stop_or_are_skipped_and_drops_are_neither(tmp_path):
    path = write(tmp_path / "a.jsonl", ["x", "d", "y!", "d"], b'{"messages": 1}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:5: messages is 1"):
        made([path])
    with pytest.raises(ValueError, match=r"a.jsonl:3: message 1: no ! please"):
        made([path + "@rows=4"])
    with pytest.raises(ValueError, match=r"over --max-bad-share 0.01"):
        made([path], replace(SKIP, max_bad_share=0.01))
    assert not [
        entry for entry in (tmp_path / "cache" / "prepared").iterdir() if entry.suffix != ".lock"
    ], "nothing is left behind"
    for _ in range(2):
        prepared = made([path], SKIP)
        assert texts(prepared) == ["x a"] and prepared.info["bad"] == 2
        assert prepared.info["drops"]["has a d"] == {
            "count": 2,
            "first": [f"{path}:2", f"{path}:4"],
        }
        assert set(prepared.info["drops"]) == {"has a d", "no messages", "message 1"}
    write_drops(prepared, str(tmp_path / "drops.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "drops.jsonl").read_text().splitlines()]
    assert {
        "file": path,
        "line": 5,
        "reason": "no messages",
        "text": '{"messages": 1}',
    } in lines and len(lines) == 4
    for stricter in (DataConfig(), replace(SKIP, max_bad_share=0.3)):
        with pytest.raises(ValueError, match=r"a.jsonl:\d"):
            made([path], stricter)


def test_nothing_left_is_an_error_with_its_reasons(tmp_path):
    with pytest.raises(ValueError, match=r"a.jsonl: all 3 records are dropped.*3 has a d .line 1"):
        made([write(tmp_path / "a.jsonl", "ddd")])
    assert made([]) is None
    with pytest.raises(ValueError, match="no such file"):
        made([str(tmp_path / "none")])
    with pytest.raises(ValueError, match="from 0 to 1"):
        made([str(tmp_path / "none")], DataConfig(max_bad_share=5))


def test_a_source_brings_its_system_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", "x")
    assert texts(made([f"{path}@system=S", path])) == [
        "Sx a",
        "x a",
    ]
    told = {"role": "system", "content": "S", "loss": False}
    prepared = made([path, f"{path}@system=S"])
    assert [m["messages"][0] == told for m in first_records(prepared, 2)] == [False, True]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"context": [{"role": "user", "content": "x"}]}\n')
    read = read_records([f"{path}@system=S", f"{pairs}@system=S"], lambda data: data)
    assert [r.data.get("messages", r.data.get("context"))[0] for r in read] == [told, told]
    for chat in (ChatConfig(system_prompt="T"), ChatConfig(ignore_system_prompt=True)):
        with pytest.raises(ValueError, match="system='S' of its own beside --"):
            made([f"{path}@system=S"], chat=chat)
        made([path], chat=chat)


def test_damaged_data_is_made_again_and_said(tmp_path, monkeypatch):
    path, said = write(tmp_path / "a.jsonl", "xyz"), []
    monkeypatch.setattr(prepare_module, "say", said.append)
    folder = made([path]).info["folder"]
    with open(f"{folder}/ids.npy", "r+b") as file:
        file.truncate(100)
    prepared = made([path])
    assert (
        texts(prepared) == ["x a", "y a", "z a"]
        and len(said) == 1
        and "damaged (ids.npy has 100 bytes" in said[0]
    )


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", "xyz")

    def dialogues(record, tokenizer):
        write(tmp_path / "a.jsonl", "xyzz")
        return [record["messages"]]

    with pytest.raises(ValueError, match="changed while being read"):
        made([path], kind=KIND._replace(dialogues=dialogues))


def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr("ta.data.sources.CHUNK_RECORDS", 50)
    letters = Letters()
    many = Vocabulary(lambda texts: [[1] * 250 for _ in texts])
    letters.tokenizer = letters.tokenizer._replace(vocabulary=many)
    peaks = []
    for n in (500, 1500):
        path = write(tmp_path / f"{n}.jsonl", [f"{i}" * 50 for i in range(n)])
        tracemalloc.start()
        made([path], letters=letters)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 400_000, peaks


def test_two_processes_at_once_end_well(tmp_path):
    path = write(tmp_path / "a.jsonl", [str(i) for i in range(200)])
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from tests.data.test_prepare import *\n"
        "def slow(record, tokenizer): time.sleep(0.003); return dialogues(record, tokenizer)\n"
        "p = made([sys.argv[1]], kind=KIND._replace(dialogues=slow))\n"
        "print(len(texts(p)), p.info['cached'])"
    )
    root = str(Path(__file__).parent.parent.parent)
    command = [sys.executable, "-c", code, path, root]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)
    ]
    results = sorted(process.communicate(timeout=120)[0].strip() for process in both)
    assert results in (["200 False", "200 True"], ["200 False", "200 False"])


def test_opening_again_reads_no_data(tmp_path):
    """Whatever their number: arrays are mapped, and no record is encoded again."""
    path = write(tmp_path / "a.jsonl", [str(i) for i in range(200)])
    letters = Letters()
    for _ in range(2):
        prepared = made([path], letters=letters)
    assert prepared.info["cached"] and len(letters.seen) == 200
    arrays = prepared.ids, prepared.weights, prepared.offsets, prepared.origin
    assert all(isinstance(array.base, np.memmap | mmap.mmap) for array in arrays)


def test_a_later_version_of_the_code_prepares_anew(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", "x")
    first = made([path]).info
    monkeypatch.setattr(prepare_module, "PREPARE_VERSION", 0)
    second = made([path]).info
    assert not second["cached"] and second["fingerprint"] == first["fingerprint"]


def test_a_users_own_function_and_its_constants_are_in_the_key(tmp_path, monkeypatch):
    path, module = write(tmp_path / "a.jsonl", "xy"), tmp_path / "users_kind.py"
    monkeypatch.syspath_prepend(tmp_path)
    source = (
        "FACTOR = 1\n"
        "def dialogues(record, tokenizer):\n"
        "    first, *rest = record['messages']\n"
        "    return [[{**first, 'content': first['content'] * FACTOR}, *rest]]\n"
    )
    found = []
    for factor in (1, 2, 2):
        module.write_text(source.replace("FACTOR = 1", f"FACTOR = {factor}"))
        sys.modules.pop("users_kind", None)
        importlib.invalidate_caches()
        spec = importlib.util.spec_from_file_location("users_kind", module)
        sys.modules["users_kind"] = users = importlib.util.module_from_spec(spec)
        exec(module.read_text(), users.__dict__)
        prepared = made([path], kind=CHATS._replace(dialogues=users.dialogues))
        found.append((texts(prepared), prepared.info["cached"]))
    assert found == [
        (["x a", "y a"], False),
        (["xx a", "yy a"], False),
        (["xx a", "yy a"], True),
    ]


def test_first_records_are_those_that_were_prepared(tmp_path):
    a, b = write(tmp_path / "a.jsonl", ["x", "d", "y"]), write(tmp_path / "b.jsonl", "zw")
    prepared = made([a, b])
    asked = [record["messages"][0]["content"] for record in first_records(prepared, 3)]
    assert asked == ["x", "y", "z"] and first_records(prepared, 0) == []
    assert len(first_records(prepared, 99)) == 4
    # the choice of the file is that of the prepared set
    chosen = made([f"{a}@1,offset=2"])
    assert [r["messages"][1]["role"] for r in first_records(chosen, 9)] == ["assistant"]
    assert first_records(chosen, 9)[0]["messages"][0]["content"] == "y"


def test_preview_shows_the_counts_and_the_first_record(tmp_path, capsys, monkeypatch):
    letters = Letters()
    letters.tokenizer.fast.decode = lambda ids: "".join(map(chr, ids))
    monkeypatch.setattr("ta.screen.has_colours", lambda stream: True)
    preview(made([write(tmp_path / "a.jsonl", "xy")], letters=letters), letters.tokenizer)
    shown = capsys.readouterr().err
    assert "2 records, 6 tokens, 33 % learned" in shown
    page = preview(Tokens([120, 60], [0.0, 0.5]), letters.tokenizer)._repr_html_()
    assert '<span style="color:gray">x</span><span style="color:darkorange">&lt;</span>' in page
    assert "\x1b[2mx \x1b[0m\x1b[32ma\x1b[0m" in shown
