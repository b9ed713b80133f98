"""The prepared set: what is opened again equals what was encoded, is made once for the same inputs, and made anew for any other."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ta import files
from ta.chat.encode import Drop
from ta.chat.render import Tokens
from ta.chat.template import ChatConfig
from ta.data import prepare as prepare_module
from ta.data.prepare import (
    DataConfig,
    Encoded,
    lengths,
    prepare,
    read_drops,
    report,
    sequence,
    write_drops,
)
from ta.data.records import check_chat, check_prompt

SKIP = DataConfig(on_bad_record="skip", max_bad_share=0.5)


def write(path, contents, tail=b""):
    turns = [
        {"messages": [{"role": "user", "content": content}, {"role": "bot", "content": "a"}]}
        for content in contents
    ]
    path.write_bytes(b"".join(json.dumps(turn).encode() + b"\n" for turn in turns) + tail)
    return str(path)


class Encoder:
    """Letters as ids; counts its calls; content with "d" is dropped, with "!" is wrong."""

    def __init__(self):
        self.seen = []

    def __call__(self, records):
        texts = [
            " ".join(message["content"] for message in record["messages"]) for record in records
        ]
        if any("!" in text for text in texts):
            raise ValueError("message 1: no ! please; give none")
        self.seen += texts
        return [
            Drop("has a d", "")
            if "d" in text
            else Encoded(
                (Tokens([ord(letter) for letter in text], [0.0] * (len(text) - 1) + [0.5]),),
                {"size": len(text)},
            )
            for text in texts
        ]


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
    encode = Encoder()
    made, again = (prepare([b, a], check_chat, encode, {}, DataConfig()) for _ in range(2))
    assert len(encode.seen) == 19 and not made.info["cached"] and again.info["cached"]
    for prepared in (made, again):
        assert texts(prepared) == [" a", *(f"{letter} a" for letter in "xyz" * 5), "bb a", "b a"], (
            "sources in the order of their text"
        )
        assert prepared.origin.tolist() == [[0, i] for i in range(1, 17)] + [[1, 1], [1, 3]]
        assert (
            lengths(prepared).tolist() == prepared.extras["size"].tolist() == [2, *[3] * 15, 4, 3]
        )
        assert sequence(prepared, 16)[1].tolist() == [0, 0, 0, 0.5] and prepared.k == 1
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
    assert not made.ids.flags.writeable and isinstance(made.ids.base, np.memmap)
    assert [made.ids.dtype, made.weights.dtype, made.offsets.dtype, made.origin.dtype] == [
        "int32",
        "float32",
        "int64",
        "int32",
    ]
    lines = report(made.info)
    assert (
        lines[0] == "18 records, 54 tokens, 33 % learned"
        and f"  2 of 3 from {b}" in lines
        and f"  dropped 1: has a d ({b}:2)" in lines
    )


def test_pairs_have_two_sequences_each(tmp_path):
    path = write(tmp_path / "a.jsonl", "xyz")

    def encode(records):
        return [
            Encoded((Tokens([1] * (i + 1), [0.0] * (i + 1)), Tokens([2], [1.0])))
            for i, _ in enumerate(records)
        ]

    prepared = prepare([path], check_chat, encode, {}, DataConfig())
    assert prepared.k == 2 and lengths(prepared).tolist() == [2, 3, 4] and prepared.extras == {}
    assert [sequence(prepared, i)[0].tolist() for i in range(6)] == [
        [1],
        [2],
        [1, 1],
        [2],
        [1, 1, 1],
        [2],
    ]


def test_the_key_holds_all_that_matters_and_no_more(tmp_path):
    path, other = write(tmp_path / "a.jsonl", "abcefghijk"), write(tmp_path / "b.jsonl", "xyz")
    encode = Encoder()

    def made(*sources, check=check_chat, settings=None, **more):
        prepared = prepare(sources, check, encode, settings or {"n": 1}, DataConfig(), **more)
        return not prepared.info["cached"], prepared.info["fingerprint"]

    base = made(path, other)
    assert base[0] and made(other, path, seed=5) == (False, base[1]), (
        "order and an unused seed do not matter"
    )
    prints = [
        made(path)[1],
        made(path, other, settings={"n": 2})[1],
        made(f"{path}@3", other)[1],
        made(f"{path}@3", other, seed=1)[1],
    ]
    prints += [made(f"{path}@offset=1", other)[1], made(f"{path}@system=S", other)[1]]
    assert len({base[1], *prints}) == 7
    assert made(path, other, check=check_prompt) == (True, base[1])
    os.rename(path, tmp_path / "a2.jsonl")
    assert made(str(tmp_path / "a2.jsonl"), other) == (False, base[1]), "a name does not matter"
    write(tmp_path / "a2.jsonl", "abcefghijl")
    assert made(str(tmp_path / "a2.jsonl"), other)[1] not in {base[1], *prints}


def test_places_follow_a_renamed_file(tmp_path):
    prepare([write(tmp_path / "a.jsonl", "dx")], check_chat, Encoder(), {}, DataConfig())
    os.rename(tmp_path / "a.jsonl", tmp_path / "z.jsonl")
    prepared = prepare([str(tmp_path / "z.jsonl")], check_chat, Encoder(), {}, DataConfig())
    assert prepared.info["cached"] and prepared.info["drops"]["has a d"]["first"] == [
        f"{tmp_path}/z.jsonl:1"
    ]
    assert [entry["file"] for entry in read_drops(prepared)] == [f"{tmp_path}/z.jsonl"]


def test_bad_records_stop_or_are_skipped_and_drops_are_neither(tmp_path):
    path = write(tmp_path / "a.jsonl", ["x", "d", "y!", "d"], b'{"messages": 1}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:5: messages is 1"):
        prepare([path], check_chat, Encoder(), {}, DataConfig())
    with pytest.raises(ValueError, match=r"a.jsonl:3: message 1: no ! please"):
        prepare([path + "@rows=4"], check_chat, Encoder(), {}, DataConfig())
    with pytest.raises(ValueError, match=r"over --max-bad-share 0.01"):
        prepare([path], check_chat, Encoder(), {}, replace(SKIP, max_bad_share=0.01))
    assert not [
        entry for entry in (tmp_path / "cache" / "prepared").iterdir() if entry.suffix != ".lock"
    ], "nothing is left behind"
    for _ in range(2):
        prepared = prepare([path], check_chat, Encoder(), {}, SKIP)
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
            prepare([path], check_chat, Encoder(), {}, stricter)


def test_nothing_left_is_an_error_with_its_reasons(tmp_path):
    with pytest.raises(ValueError, match=r"a.jsonl: all 3 records are dropped.*3 has a d .line 1"):
        prepare([write(tmp_path / "a.jsonl", "ddd")], check_chat, Encoder(), {}, DataConfig())
    with pytest.raises(ValueError, match="no source was given"):
        prepare([], check_chat, Encoder(), {}, DataConfig())
    with pytest.raises(ValueError, match="no such file"):
        prepare([str(tmp_path / "none")], check_chat, Encoder(), {}, DataConfig())
    with pytest.raises(ValueError, match="lies in 0 to 1"):
        prepare([str(tmp_path / "none")], check_chat, Encoder(), {}, DataConfig(max_bad_share=5))


def test_a_source_brings_its_system_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", "x")
    assert texts(prepare([f"{path}@system=S", path], check_chat, Encoder(), {}, DataConfig())) == [
        "x a",
        "S x a",
    ]
    for chat in (ChatConfig(system_prompt="T"), ChatConfig(ignore_system_prompt=True)):
        with pytest.raises(ValueError, match="system='S' of its own beside --"):
            prepare([f"{path}@system=S"], check_chat, Encoder(), {}, DataConfig(), chat=chat)
        prepare([path], check_chat, Encoder(), {}, DataConfig(), chat=chat)


def test_damaged_data_is_made_again_and_said(tmp_path):
    path, said = write(tmp_path / "a.jsonl", "xyz"), []
    folder = prepare([path], check_chat, Encoder(), {}, DataConfig(), say=said.append).info[
        "folder"
    ]
    with open(f"{folder}/ids.npy", "r+b") as file:
        file.truncate(100)
    prepared = prepare([path], check_chat, Encoder(), {}, DataConfig(), say=said.append)
    assert (
        texts(prepared) == ["x a", "y a", "z a"]
        and len(said) == 1
        and "damaged (ids.npy has 100 bytes" in said[0]
    )


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", "xyz")

    def encode(records):
        write(tmp_path / "a.jsonl", "xyzz")
        return Encoder()(records)

    with pytest.raises(ValueError, match="changed while being read"):
        prepare([path], check_chat, encode, {}, DataConfig())


def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr("ta.data.sources.CHUNK_RECORDS", 50)
    tokens = Tokens(list(range(500)), [1.0] * 500)
    peaks = []
    for n in (500, 3000):
        path = write(tmp_path / f"{n}.jsonl", [f"{i}" * 50 for i in range(n)])
        tracemalloc.start()
        prepare(
            [path],
            check_chat,
            lambda records: [Encoded((tokens,)) for _ in records],
            {},
            DataConfig(),
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 400_000, peaks


def test_two_processes_at_once_end_well(tmp_path):
    path = write(tmp_path / "a.jsonl", [str(i) for i in range(200)])
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from tests.data.test_prepare import *\n"
        "def encode(records): time.sleep(0.5); return Encoder()(records)\n"
        "p = prepare([sys.argv[1]], check_chat, encode, {}, DataConfig()); print(len(texts(p)), p.info['cached'])"
    )
    root = str(Path(__file__).parent.parent.parent)
    command = [sys.executable, "-c", code, path, root]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)
    ]
    results = sorted(process.communicate(timeout=120)[0].strip() for process in both)
    assert results in (["200 False", "200 True"], ["200 False", "200 False"])


def test_opening_again_reads_no_data(tmp_path):
    """A million records open in milliseconds: nothing that grows with the data is read."""
    path = write(tmp_path / "a.jsonl", [str(i) for i in range(20_000)])
    encode = Encoder()
    for _ in range(2):
        prepare([path], check_chat, encode, {}, DataConfig())
    best = 1.0
    for _ in range(5):
        start = time.process_time()
        prepared = prepare([path], check_chat, encode, {}, DataConfig())
        best = min(best, time.process_time() - start)
    assert prepared.info["cached"] and best < 0.02 and len(encode.seen) == 20_000


def test_a_later_version_of_the_code_prepares_anew(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", "x")
    first = prepare([path], check_chat, Encoder(), {}, DataConfig()).info
    monkeypatch.setattr(prepare_module, "PREPARE_VERSION", 0)
    second = prepare([path], check_chat, Encoder(), {}, DataConfig()).info
    assert not second["cached"] and second["fingerprint"] == first["fingerprint"]
