"""Files of every kind give the same numbered records, and what is wrong with one is said with its place."""

import csv
import gzip
import json
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ta import files
from ta.data import readers
from ta.data.jsonl import parse_record
from ta.data.readers import files_of, read_rows
from ta.data.records import check_labelled
from ta.data.sources import read_records, source_names

ROWS = [{"id": i, "messages": [{"role": "user", "content": f'é,\n"{i}'}]} for i in range(7)]


def rows(path):
    return [(number, parse_record(raw)) for number, raw in read_rows(str(path))]


def test_json_lists_by_hand(tmp_path):
    path = tmp_path / "d.json"
    for indent in (None, 2):
        path.write_text("\n " + json.dumps(ROWS, indent=indent, ensure_ascii=False) + "\n")
        assert [row for _, row in rows(path)] == ROWS
    text = path.read_text().split("\n")
    begins = [number for number, _ in rows(path)]
    assert [text[number - 1] for number in begins] == ["  {"] * 7, "where a record begins"
    assert [f'"id": {i}' in text[number] for i, number in enumerate(begins)] == [True] * 7
    packed = tmp_path / "d.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert rows(packed) == rows(path)
    named = tmp_path / "d.jsonl"
    named.write_text("[1, {}]")
    assert [raw for _, raw in read_rows(str(named))] == [b"1", b"{}"], "content tells, not the name"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert rows(path) == list(enumerate(ROWS, 1)), "lines in a .json file"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=3),
            st.text(max_size=40) | st.integers() | st.lists(st.floats(allow_nan=False)),
            max_size=3,
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 9),
    st.booleans(),
)
def test_a_list_comes_back_whatever_the_size_of_a_chunk(tmp_path_factory, data, chunk, ascii_only):
    path = tmp_path_factory.mktemp("list") / "d.json"
    data = json.loads(json.dumps(data).encode("utf-8", "replace"))
    path.write_text(json.dumps(data, ensure_ascii=True, indent=1 if ascii_only else None))
    whole, readers.CHUNK = readers.CHUNK, chunk
    try:
        assert [json.loads(raw) for _, raw in read_rows(str(path))] == data
    finally:
        readers.CHUNK = whole


WRONG_LISTS = {
    "[]": "empty, no record",
    '[{"a": 1}, {"b": tru}]': ":1: the JSON list ends here before its ] .Expecting value",
    '[\n{"a": 1},\n{"b": 1}\n': ":4: the JSON list ends here",
    '[{"a": 1}]\n[{"b": 1}]': ":1: more text stands behind the ]",
    '[{"a": "\\ud8': "ends here before",
}


@pytest.mark.parametrize("text", WRONG_LISTS)
def test_wrong_lists(tmp_path, text):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(
        ValueError, match=re.escape(str(tmp_path)) + ".*" + WRONG_LISTS[text]
    ) as caught:
        rows(tmp_path / "d.json")
    assert "; " in str(caught.value)


def test_a_list_is_never_held_whole(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"text": "x" * 10_000}] * 3000))
    tracemalloc.start()
    assert sum(1 for _ in read_rows(str(path))) == 3000
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(ValueError, match=r"d.json:1: not UTF-8 near here .0xff"):
        rows(path)


def test_csv_by_hand(tmp_path):
    path = tmp_path / "d.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "completion", "label", "id"])
        table.writerow(['q,\n"1"', "a", "True", "01"])
        table.writerow(["[q]", "", "false", ""])
    assert rows(path) == [
        (2, {"prompt": 'q,\n"1"', "completion": "a", "label": True, "id": "01"}),
        (4, {"prompt": "[q]", "completion": "", "label": False, "id": ""}),
    ]
    made = [record.data for record in read_records([str(path)], check_labelled)]
    assert [record["is_desirable"] for record in made] == [True, False]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["messages", "score"], [json.dumps(ROWS[0]["messages"]), "3"]])
    assert rows(path) == [(2, {"messages": ROWS[0]["messages"], "score": "3"})]
    for text, pattern in (
        ("a,b\n1,2\n1,2,3\n", "d.csv:3: 3 cells under 2 names"),
        ("a,a\n1,2\n", "d.csv:1: two columns have one name"),
        ("a,b\n", "empty"),
        ("", "empty"),
        ('a\n"x', "d.csv:2: not sound CSV"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=pattern):
            rows(path)
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"not UTF-8 near here .0xff"):
        rows(path)


def table_of(records):
    import pyarrow as pa

    return pa.Table.from_pylist(records)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
ARROW = [
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "q", "weight": 0.5},
            {"role": "assistant", "content": "a"},
        ]
    },
]


def test_parquet_and_arrow_give_the_records_that_were_written(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = table_of(ARROW)
    parquet.write_table(table, tmp_path / "d.parquet")
    with pa.ipc.new_file(str(tmp_path / "f.arrow"), table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(str(tmp_path / "s.arrow"), table.schema) as stream:
        stream.write_table(table)
    # a parquet file whatever its name
    (tmp_path / "d.jsonl").write_bytes((tmp_path / "d.parquet").read_bytes())
    for name in ("d.parquet", "f.arrow", "s.arrow", "d.jsonl"):
        assert rows(tmp_path / name) == list(enumerate(ARROW, 1)), "keys of other rows are left out"
    parquet.write_table(
        table_of([{"text": "a", "n": float("nan")}, {"text": "b", "n": 1.5}]),
        tmp_path / "n.parquet",
    )
    assert rows(tmp_path / "n.parquet") == [(1, {"text": "a"}), (2, {"text": "b", "n": 1.5})]
    parquet.write_table(table_of([{"image": {"bytes": b"x"}}]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet:1: a cell holds bytes.*; ta convert"):
        rows(tmp_path / "b.parquet")
    (tmp_path / "two").mkdir()
    (tmp_path / "b.parquet").rename(tmp_path / "two" / "train-00000-of-00002.parquet")
    with pytest.raises(ValueError, match=r"of-00002.parquet:1: .*ta convert \S*two OUT saves"):
        rows(tmp_path / "two")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"cut.parquet: not a sound parquet file"):
        rows(tmp_path / "cut.parquet")


def test_without_pyarrow_the_way_is_said(tmp_path, monkeypatch):
    (tmp_path / "d.parquet").write_bytes(b"PAR1....PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"d.parquet: .*pip install pyarrow"):
        rows(tmp_path / "d.parquet")


def lines(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in numbers))


def test_folders_have_splits(tmp_path):
    lines(tmp_path / "one" / "b.jsonl", [3])
    lines(tmp_path / "one" / "a.jsonl", [1, 2])
    lines(tmp_path / "one" / ".hidden.jsonl", [9])
    (tmp_path / "one" / "README.md").write_text("about")
    assert rows(tmp_path / "one") == [(i, {"n": i}) for i in (1, 2, 3)], "numbers go on"
    for name, n in (
        ("train-00000-of-00002", 1),
        ("train-00001-of-00002", 2),
        ("test_sft-00000-of-00001", 3),
    ):
        lines(tmp_path / "hub" / "data" / f"{name}.jsonl", [n])
    lines(tmp_path / "hub" / "dev.jsonl", [4])
    for n in range(20):
        lines(tmp_path / "many" / f"train{n}" / "a.jsonl", [n])
    with pytest.raises(ValueError, match="holds 20 parts; give one of them") as error:
        rows(tmp_path / "many")
    assert str(error.value).count(" or ") == 7, "a page of names helps nobody"
    with pytest.raises(
        ValueError,
        match=r"holds 3 parts; give one of them, .*hub/validation or .*hub/data/test_sft or .*hub/data/train",
    ):
        rows(tmp_path / "hub")
    for split, numbers in (
        ("train", [1, 2]),
        ("data/train", [1, 2]),
        ("test_sft", [3]),
        ("validation", [4]),
    ):
        assert [row["n"] for _, row in rows(tmp_path / "hub" / split)] == numbers
    with pytest.raises(ValueError, match="no such file"):
        rows(tmp_path / "hub" / "tarin")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"is a directory without data files; give .parquet"):
        rows(tmp_path / "none")
    lines(tmp_path / "two" / "a.jsonl", [1])
    (tmp_path / "two" / "a.csv").write_text("n\n1\n")
    with pytest.raises(
        ValueError, match=r"holds .csv, .jsonl files, perhaps the same records twice"
    ):
        rows(tmp_path / "two")


def test_json_text_in_columns_is_what_it_holds(tmp_path):
    """Columns of mixed types, to which datasets 5 gives the type arrow.json, at any depth."""
    pa = pytest.importorskip("pyarrow", minversion="19")
    from pyarrow import parquet

    def code(*values):
        texts = [None if value is None else json.dumps(value) for value in values]
        return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))

    parts, tools = [{"type": "text", "text": "é"}], [{"a": None}]
    turn = pa.StructArray.from_arrays(
        [pa.array(["user", "tool"]), code("q", parts)], ["role", "content"]
    )
    columns = {
        "messages": pa.ListArray.from_arrays([0, 1, 2], turn),
        "tools": code(tools, None),
        "n": pa.LargeListArray.from_arrays([0, 2, 3], code(1, "1", [])),
    }
    table = pa.table(columns)
    records = [
        {"messages": [{"role": "user", "content": "q"}], "tools": tools, "n": [1, "1"]},
        {"messages": [{"role": "tool", "content": parts}], "n": [[]]},
    ]
    parquet.write_table(table, tmp_path / "d.parquet")
    with pa.ipc.new_stream(str(tmp_path / "d.arrow"), table.schema) as stream:
        stream.write_table(table)
    for name in ("d.parquet", "d.arrow"):
        assert rows(tmp_path / name) == list(enumerate(records, 1))


def test_messages_that_csv_holds_as_python_writes_them_are_refused(tmp_path):
    path = tmp_path / "d.csv"
    answer = {"role": "assistant", "content": "a"}
    for messages in ([answer], [{"from": "gpt", "value": 'it\'s "a"'}], answer):
        with path.open("w") as file:
            csv.writer(file).writerows([["prompt", "chosen"], ["q", "a"], ["q", messages]])
        with pytest.raises(ValueError, match=r"d.csv:3: a cell holds messages as Python"):
            rows(path)
    path.write_text("text\n{'a': 1}\n")
    assert rows(path) == [(2, {"text": "{'a': 1}"})], "other text of Python is text"


def test_folders_as_datasets_writes_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"n": i} for i in range(5)])
    made.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert [row["n"] for _, row in rows(tmp_path / "one")] == list(range(5))
    splits = datasets.DatasetDict({"train": made, "test": made.select([1])})
    splits.save_to_disk(str(tmp_path / "both"))
    assert [row["n"] for _, row in rows(tmp_path / "both" / "test")] == [1]
    with pytest.raises(ValueError, match=r"both/test or .*both/train"):
        rows(tmp_path / "both")


def test_data_on_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    """A data set in the cache, as the hub's own client lays it out; nothing is fetched."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "datasets--me--chats"
    lines(repository / "snapshots" / ("c" * 40) / "train.jsonl", [1, 2])
    lines(repository / "snapshots" / ("c" * 40) / "test.jsonl", [3])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    files.dataset_snapshot.cache_clear()
    for name, numbers in (("train", [1, 2]), ("test", [3]), ("test.jsonl", [3])):
        assert [row["n"] for _, row in rows(f"hf:me/chats/{name}")] == numbers
    with pytest.raises(
        ValueError,
        match="hf:me/chats: holds 2 parts; give one of them, hf:me/chats/test or hf:me/chats/train",
    ):
        rows("hf:me/chats")
    with pytest.raises(
        ValueError,
        match="hf:me/none: not in the hub's cache, and only a recipe with --hub fetches it",
    ):
        rows("hf:me/none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Path(files.dataset_snapshot("me/chats", fetch=True)).name == "c" * 40, (
        "without a network"
    )
    with pytest.raises(
        ValueError, match="hf:me/none: not in the hub's cache, and the hub does not give it"
    ):
        files.dataset_snapshot("me/none", fetch=True)


def test_lists_and_tables_of_damaged_gzip_are_named(tmp_path):
    records = [{"a": i} for i in range(20_000)]
    texts = {
        "d.json.gz": json.dumps(records),
        "d.csv.gz": "a\n" + "\n".join(map(str, range(20_000))),
    }
    for name, text in texts.items():
        whole = gzip.compress(text.encode())
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"d\.\w+\.gz:\d+: the gzip file ends before its end"):
            rows(tmp_path / name)
        (tmp_path / name).write_bytes(whole[:9000] + b"\0" * 90 + whole[9090:])
        with pytest.raises(ValueError, match=r"d\.\w+\.gz:\d+: (not sound gzip|the gzip file)"):
            rows(tmp_path / name)


def test_odd_paths_are_wrong_files(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in ("x" * 5000, str(tmp_path / "loop"), str(tmp_path / "loop" / "a.jsonl")):
        with pytest.raises(ValueError, match=r"cannot be opened|no such file") as caught:
            rows(path)
        assert len(str(caught.value)) < 700


def test_names_of_sources_are_short_and_differ():
    assert source_names(["a/dev.jsonl"]) == ["dev"]
    given = [
        "x/a/dev.jsonl",
        "x/b/dev.jsonl",
        "test.json.gz",
        "x/a/dev.jsonl",
        "hf:me/chats/train",
        "/dev.jsonl",
    ]
    names = source_names(given)
    assert names == ["a/dev", "b/dev", "test", "a/dev#2", "train", "dev"]


@pytest.mark.parametrize(
    "text", ["", "3", "{}", '{"_data_files": 3}', '{"_data_files": [{"filename": 3}]}']
)
def test_a_saved_data_set_with_a_broken_list_of_files_is_refused(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match="save the data set again"):
        files_of(str(tmp_path))


def test_a_saved_data_set_names_files_beside_it_alone(tmp_path):
    entry = {"filename": "../../secret.arrow"}
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [entry]}))
    assert files_of(str(tmp_path)) == [str(tmp_path / "secret.arrow")]
