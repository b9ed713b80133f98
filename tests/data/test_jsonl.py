"""Reading: what is wrong with a file or a line is said with its place, and nothing is read whole."""

import gzip
import json
import os
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ta.data import jsonl
from ta.data.jsonl import BadRecord, parse_record, read_lines

GOOD = b'{"a": 1}\n'
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=10,
)


def read_jsonl(path):
    """(line, object) of a file; what is wrong with a line is said with its place."""
    for line, raw in read_lines(path):
        try:
            yield line, parse_record(raw)
        except BadRecord as error:
            raise ValueError(f"{path}:{line}: {error}") from None


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), values), st.booleans())
def test_any_object_comes_back(data, ascii_only):
    assert parse_record(json.dumps(data, ensure_ascii=ascii_only).encode()) == data


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_lines_are_numbered_and_blank_ones_skipped(tmp_path, name):
    path = tmp_path / name
    content = b'\n{"a": 1}\r\n   \n{"a": "\\u00e9 \xc3\xa9"}'
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read_jsonl(str(path))) == [(2, {"a": 1}), (4, {"a": "é é"})]


WRONG = {
    b'{"a": tru}': r"not JSON: .* at column 7, near .*tru",
    b'{"a": 1': r"not JSON: .* at column 8",
    b'{"a": "x\ty"}': "not JSON: Invalid control character at column 9",
    b'{"a": ' + b"[" * 100_000: "nested too deep",
    b'{"a":' * 100_000: "nested too deep",
    b'{"a": "x\\ud83d"}': "surrogate",
    b'{"a": ["\\uDE00"]}': "surrogate",
    b'{"a": NaN}': "NaN is not a JSON number",
    b'{"a": [-Infinity]}': "-Infinity is not",
    b'{"a": 1e999}': "1e999 is not",
    b'{"a": ' + b"9" * 5000 + b"}": "thousands of digits",
    b"[1, 2]": "holds a list, not an object",
    b'"text"': "holds text",
    b"12": "holds a number",
    b"null": "holds null",
    b"true": "holds true or false",
    b'{"a": "\xff"}': "byte 8 of the line is not UTF-8 .0xff",
    b"\xef\xbb\xbf" + GOOD.strip(): "byte order mark",
    b"\xff\xfe{\x00": "byte 1 of the line is not UTF-8",
    b'{"a": {"b": 1, "b": 2}}': "'b' stands twice",
}


@pytest.mark.parametrize("line", WRONG, ids=lambda line: WRONG[line][:20])
def test_wrong_lines_name_file_line_and_fault(tmp_path, line):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    reader = read_jsonl(str(path))
    assert next(reader) == (1, {"a": 1})
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: ") + ".*" + WRONG[line]) as caught:
        next(reader)
    assert ";" in str(caught.value) and len(str(caught.value)) < 400, (
        "what to give stands after a semicolon"
    )


def test_escaped_pairs_and_backslashes_are_no_lone_surrogates():
    assert parse_record(b'{"a": "\\ud83d\\ude00 \\\\ud800"}') == {"a": "😀 \\ud800"}


def test_unreadable_files(tmp_path):
    def says(path, pattern):
        with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + pattern):
            list(jsonl.read_lines(str(path)))

    says(tmp_path / "none.jsonl", "no such file")
    says(tmp_path, "is a directory")
    os.mkfifo(tmp_path / "pipe")
    says(tmp_path / "pipe", "not a regular file")
    for content in (b"", b"\n \n"):
        (tmp_path / "d.jsonl").write_bytes(content)
        says(tmp_path / "d.jsonl", "empty")
        (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(content) if content else b"")
        says(tmp_path / "d.jsonl.gz", "empty")
    (tmp_path / "f.jsonl").write_bytes(GOOD)
    says(tmp_path / "f.jsonl" / "x.jsonl", "no such file")
    whole = gzip.compress(b"".join(b'{"a": "%d"}\n' % i for i in range(5000)))
    for content, pattern in (
        (whole[:-500], r":\d{3,}: the gzip file ends before"),
        (whole[:4000] + b"\0" * 90 + whole[4090:], "not sound gzip"),
    ):
        (tmp_path / "cut.jsonl.gz").write_bytes(content)
        says(tmp_path / "cut.jsonl.gz", pattern)
    (tmp_path / "plain.jsonl.gz").write_bytes(GOOD)
    says(tmp_path / "plain.jsonl.gz", "not sound gzip")
    # what the system refuses to read names the file too
    with pytest.raises(OSError, match=r"/proc/self/mem"):
        list(jsonl.read_lines("/proc/self/mem"))


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_a_long_line_is_never_held_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr(jsonl, "MAX_LINE", 1000)
    opened = gzip.open if name.endswith("gz") else open
    with opened(tmp_path / name, "wb") as file:
        file.write(GOOD + b'{"a": "' + b"x" * 20_000_000 + b'"}\n' + GOOD)
    tracemalloc.start()
    assert [(line, len(raw)) for line, raw in jsonl.read_lines(str(tmp_path / name))] == [
        (1, 8),
        (2, 1001),
        (3, 8),
    ]
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    with pytest.raises(ValueError, match=":2: the line is over"):
        list(read_jsonl(str(tmp_path / name)))


@pytest.mark.parametrize("length, fits", [(1000, True), (1001, False)])
def test_the_limit_counts_the_line_without_its_end(tmp_path, monkeypatch, length, fits):
    monkeypatch.setattr(jsonl, "MAX_LINE", 1000)
    line = b'{"a": "' + b"x" * (length - 9) + b'"}'
    for end in (b"\n", b""):
        (tmp_path / "d.jsonl").write_bytes(line + end)
        assert [len(raw) <= 1000 for _, raw in jsonl.read_lines(str(tmp_path / "d.jsonl"))] == [
            fits
        ]
