"""Parts of several processes, torn lines, what is there already, who may write."""

import json
import random

import pytest

from ta.generation.answers_file import Part, begin, check, done, publish

KEYS = [f"k{i}" for i in range(20)]


def record(i):
    return {"id": i, "key": KEYS[i], "text": "é\u2028" * (i % 3)}


def test_parts_of_three_processes_become_one_ordered_file(tmp_path):
    out = tmp_path / "a" / "answers.jsonl"
    begin(out, overwrite=False)
    for rank in (2, 0, 1):
        order = list(range(rank, 20, 3))
        random.Random(rank).shuffle(order)
        with Part(out, rank) as part:
            for i in order:
                part.append(record(i))
                assert rank == 1 or not publish(out, KEYS)
    assert publish(out, KEYS)
    assert [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]] == [
        record(i) for i in range(20)
    ]
    assert [path.name for path in out.parent.iterdir()] == ["answers.jsonl"]
    assert publish(out, KEYS) and done(out, KEYS).keys() == set(
        KEYS
    )  # a second finisher finds the whole


@pytest.mark.parametrize("cut", range(1, 30, 7))
def test_a_torn_line_is_as_if_never_written(tmp_path, cut):
    out = tmp_path / "answers.jsonl"
    with Part(out) as part:
        for i in range(5):
            part.append(record(i))
    torn = part.path.read_bytes()[:-cut]
    part.path.write_bytes(torn)
    left = done(out, KEYS)
    assert left == {KEYS[i]: record(i) for i in range(5) if i < torn.count(b"\n")} and len(left) < 5
    with Part(out) as part:
        for i in range(20):
            if KEYS[i] not in left:
                part.append(record(i))
    assert publish(out, KEYS)
    assert [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]] == [
        record(i) for i in range(20)
    ]


def test_answers_to_other_questions_are_not_taken_over(tmp_path):
    out = tmp_path / "answers.jsonl"
    out.write_text('{"key": "other", "id": 0}\n[1]\nnot json\n{"id": 3}\n')
    assert done(out, KEYS) == {}
    with Part(out) as part:
        part.append(record(0))
    assert (
        publish(out, KEYS[:1])
        and out.read_text() == json.dumps(record(0), ensure_ascii=False) + "\n"
    )


def test_what_exists_is_neither_lost_nor_mixed_up(tmp_path):
    out = tmp_path / "answers.jsonl"
    check(out, False, False)
    out.write_text("{}\n")
    with pytest.raises(ValueError, match=r"answers.jsonl exists.*--resume.*--overwrite"):
        check(out, False, False)
    out.unlink()
    with Part(out, 4):
        pass
    assert not list(tmp_path.iterdir())  # what has nothing to say leaves nothing
    with Part(out, 4) as part:
        part.append({"key": "a"})
    with pytest.raises(ValueError, match="begun and not finished"):
        check(out, False, False, rank=0, world=2)
    check(
        out, False, False, rank=1, world=2
    )  # not its part: the process that answers for it says so
    for resume, overwrite in ((True, False), (False, True)):
        check(out, resume, overwrite)
    with pytest.raises(ValueError, match="one of the two"):
        check(out, True, True)
    with pytest.raises(ValueError, match="is a folder"):
        check(tmp_path, False, False)
    begin(out, overwrite=True, rank=1, world=2)
    assert len(list(tmp_path.iterdir())) == 1
    begin(out, overwrite=True, rank=0, world=2)
    assert not list(tmp_path.iterdir())


def test_a_second_process_is_refused_before_anything_is_deleted(tmp_path):
    out = tmp_path / "answers.jsonl"
    with Part(out, 1) as part:
        part.append(record(1))
        out.write_text("earlier")
        for how in ({"world": 1}, {"rank": 1, "world": 2}):
            with pytest.raises(
                ValueError, match=r"--out .*answers.jsonl is being written by another"
            ):
                begin(out, overwrite=True, **how)
        with pytest.raises(ValueError, match="is being written by another"), Part(out, 1):
            pass
        begin(out, overwrite=False, rank=0, world=2)  # a process of the same command
        assert done(out, KEYS) == {"k1": record(1)} and out.read_text() == "earlier"
    begin(out, overwrite=True)
    assert not list(tmp_path.iterdir())
