"""Sources: what is chosen depends on the seed and the lines alone, and whatever is not used is counted and said."""

import gc
import io
import json
import random
import weakref

import pytest

from ta.data.jsonl import read_lines
from ta.data.records import check_chat
from ta.data.sources import (
    Drops,
    Record,
    Source,
    chunks,
    isolate_errors,
    no_full_gc,
    parse_source,
    read_records,
    scan,
    select,
)


def write(path, ids):
    turns = [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]
    path.write_text("".join(json.dumps({"id": i, "messages": turns}) + "\n" for i in ids))
    return str(path)


def taken(*sources, seed=0):
    return [record.data["id"] for record in read_records(sources, check_chat, seed=seed)]


def test_the_forms_of_a_source():
    assert parse_source("a.jsonl") == Source("a.jsonl")
    assert (
        parse_source("a.jsonl@0.1")
        == parse_source("a.jsonl@share=1e-1")
        == Source("a.jsonl", share=0.1)
    )
    assert parse_source("a.jsonl@1") == Source("a.jsonl", count=1) and parse_source(
        "a.jsonl@1.0"
    ) == Source("a.jsonl", share=1.0)
    assert parse_source("a@500,offset=10,rows=100,system=Be kind, a@b=c.") == Source(
        "a", None, 500, 10, 100, "Be kind, a@b=c."
    )
    assert parse_source("a@system=S,rows=3") == Source("a", system_prompt="S,rows=3")
    assert parse_source("a@offset=0,rows=2") == Source("a", offset=0, rows=2)
    assert parse_source("me@home/a.jsonl@5") == Source("me@home/a.jsonl", count=5)


def test_a_path_with_an_at(tmp_path):
    path = write(tmp_path / "a@7.jsonl", [1])
    assert parse_source(path) == Source(path) and parse_source(f"{path}@0.5,system=x@y") == Source(
        path, share=0.5, system_prompt="x@y"
    )
    plain = write(tmp_path / "a", [1])
    assert parse_source(path + "@5") == Source(path, count=5), "the longest path there is"
    assert parse_source(plain + "@7") == Source(plain, count=7)
    with pytest.raises(ValueError, match=": 'some' is no number"):
        parse_source(path + "@some")


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("", "no file named"),
        ("@5", "no file named"),
        ("a@", "'' is no number"),
        ("a@0", "count 0 cannot be"),
        ("a@-3", "a share lies in"),
        ("a@1.5", "a share lies in"),
        ("a@nan", "a share lies in"),
        ("a@x", "'x' is no number"),
        ("a@0.5,7", "a share and a count"),
        ("a@5,6", "stands twice"),
        ("a@offset=-1", "offset -1 cannot be"),
        ("a@rows=0", "rows 0 cannot be"),
        ("a@row=3", "'row=3' is not a share"),
        ("a@5,system=", "system= without a text"),
    ],
)
def test_wrong_sources(text, pattern):
    with pytest.raises(ValueError, match=pattern):
        parse_source(text)


def test_choosing_by_hand(tmp_path):
    a = write(tmp_path / "a.jsonl", range(10))
    assert taken(a) == list(range(10)) == taken(a + "@10") == taken(a + "@1.0") == taken(a + "@99")
    assert taken(a + "@offset=3,rows=4") == [3, 4, 5, 6] and taken(a + "@offset=8,rows=9") == [8, 9]
    assert set(taken(a + "@2,offset=3,rows=4")) < {3, 4, 5, 6}
    assert len(taken(a + "@0.25")) == 2 and len(taken(a + "@0.001")) == 1, "rounded, at least one"
    assert select(parse_source(a + "@99"), 0)[1] == "99 records asked for, 10 there, all taken"
    assert (
        select(parse_source(a + "@offset=8,rows=9"), 0)[1]
        == "9 records asked for, 2 there, all taken"
    )
    assert not select(parse_source(a + "@4"), 0)[1]
    with pytest.raises(ValueError, match="offset=10 leaves nothing of its 10 records"):
        taken(a + "@offset=10")


def test_choosing_is_seeded_nested_and_of_the_lines_alone(tmp_path):
    ids = list(range(300))
    a, b = write(tmp_path / "a.jsonl", ids), write(tmp_path / "b.jsonl", range(1000, 1500))
    chosen = taken(a + "@100")
    assert len(set(chosen)) == 100 and chosen == sorted(chosen) == taken(a + "@100") != taken(
        a + "@100", seed=1
    )
    assert set(taken(a + "@0.1")) < set(chosen) < set(taken(a + "@0.5"))
    assert taken(b + "@50", a + "@100") == taken(b + "@50") + chosen, "in the order given"
    assert taken(a + "@100", b + "@50") == chosen + taken(b + "@50")
    random.Random(0).shuffle(ids)
    assert set(taken(write(tmp_path / "other name.jsonl", ids) + "@100")) == set(chosen)
    counts = [0] * 300
    for seed in range(300):
        for i in taken(a + "@0.1", seed=seed):
            counts[i] += 1
    assert min(counts) > 10 and max(counts) < 55, "every record has the same chance: 30 +- 5.2"


def test_duplicate_records_stay(tmp_path):
    a = write(tmp_path / "a.jsonl", [1] * 6 + [2] * 2)
    assert taken(a + "@8") == [1] * 6 + [2] * 2
    assert all(len(taken(f"{a}@{n}")) == n for n in range(1, 9))


def mixed(tmp_path, good, bad):
    path = tmp_path / "mixed.jsonl"
    write(path, range(good))
    path.write_bytes(path.read_bytes() + b'{"messages": []}\n' * bad + b"\xffoops\n" * bad)
    return str(path)


def run(path, **options):
    aside = io.StringIO()
    source = parse_source(path)
    drops = Drops(expected=sum(1 for _ in read_lines(path)), aside=aside, **options)
    records = list(scan(0, source, select(source, 0)[0], check_chat, drops))
    return records, drops, [json.loads(line) for line in aside.getvalue().splitlines()]


def test_a_bad_record_stops_or_is_skipped_and_written_aside(tmp_path):
    path = mixed(tmp_path, 200, 1)
    with pytest.raises(ValueError, match=r"mixed.jsonl:201: messages is a list of 0; give"):
        run(path)
    records, drops, aside = run(path, on_bad_record="skip")
    assert [record.line for record in records] == list(range(1, 201)) and drops.bad == 2
    assert drops.table() == "1 no messages (line 201), 1 not UTF-8 (line 202)"
    assert aside == [
        {
            "source": 0,
            "file": path,
            "line": 201,
            "reason": "no messages",
            "text": '{"messages": []}',
        },
        {"source": 0, "file": path, "line": 202, "reason": "not UTF-8", "text": "\\xffoops"},
    ]
    assert [
        record.data["id"] for record in read_records([path + "@200,rows=200"], check_chat)
    ] == list(range(200)), "not chosen, not read"


def test_too_many_bad_records_are_an_error_again(tmp_path):
    path = mixed(tmp_path, 196, 2)
    with pytest.raises(
        ValueError,
        match=r"mixed.jsonl:199: .*\n.*3 so far of 200, over --max-bad-share 0.01.*2 no messages .line 197., 1 not UTF-8",
    ):
        run(path, on_bad_record="skip")
    assert run(path, on_bad_record="skip", max_bad_share=0.02)[1].bad == 4
    assert run(mixed(tmp_path, 198, 1), on_bad_record="skip")[1].bad == 2, "just 1 %"


def test_drops_are_counted_and_are_not_bad():
    drops = Drops()
    for line in range(1, 8):
        drops.drop(Record(0, line, "a.jsonl", b"", {}), "too long")
        drops.notes.add("odd", Record(1, line, "b.jsonl", b"", {}))
    assert drops.bad == 0 and drops.counts.sorted() == {
        "too long": {"count": 7, "first": [(0, 1), (0, 2), (0, 3)]}
    }
    assert drops.notes.sorted() == {"odd": {"count": 7, "first": [(1, 1), (1, 2), (1, 3)]}}


@pytest.mark.parametrize(
    "data, noted",
    [
        (
            {
                "messages": [
                    {"role": "user"},
                    {"role": "assistant"},
                    {"role": "user"},
                    {"role": "assistant"},
                ]
            },
            0,
        ),
        ({"messages": [{"role": "user"}, {"role": "assistant"}, {"role": "assistant"}]}, 1),
        ({"context": [{"role": "user"}]}, 0),
        ({"context": [{"role": "assistant"}]}, 1),
    ],
)
def test_answers_in_a_row_are_said(tmp_path, data, noted):
    (tmp_path / "a.jsonl").write_text(json.dumps(data))
    drops = Drops()
    assert [
        record.data
        for record in read_records([str(tmp_path / "a.jsonl")], lambda data: data, drops)
    ] == [data]
    assert [entry["count"] for entry in drops.notes.sorted().values()] == [1] * noted


def test_errors_are_pinned_to_their_records():
    rng = random.Random(0)
    for _ in range(50):
        wrong = {i for i in range(40) if rng.random() < rng.choice((0, 0.05, 1))}

        def many(numbers, wrong=wrong):
            if hit := wrong & set(numbers):
                raise ValueError(min(hit))
            return [-number for number in numbers]

        results = isolate_errors(many, list(range(40)))
        assert [r.args[0] if isinstance(r, ValueError) else r for r in results] == [
            i if i in wrong else -i for i in range(40)
        ]


def test_chunks_are_bounded_by_number_and_bytes():
    large, small = (Record(0, 1, "a", b"x" * size, {}) for size in (3 << 20, 0))
    sizes = [[len(record.raw) for record in chunk] for chunk in chunks([large] * 7)]
    assert sizes == [[3 << 20] * 3, [3 << 20] * 3, [3 << 20]]
    assert [len(chunk) for chunk in chunks([small] * 2500)] == [1000, 1000, 500]


def test_dead_cycles_of_a_chunk_do_not_stay_while_long_collections_rest():
    class Node:
        pass

    def cycle(i):
        node = Node()
        node.self = node
        alive.add(weakref.ref(node, alive.discard))
        return Record(0, 1, "a", b"", {})

    alive, most = set(), 0
    with pytest.raises(ValueError), no_full_gc():
        assert not gc.isenabled()
        for _ in chunks(cycle(i) for i in range(5000)):
            most = max(most, len(alive))
        assert 1000 <= most <= 2000
        raise ValueError
    assert gc.isenabled()
