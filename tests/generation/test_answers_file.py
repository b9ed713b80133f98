"""Parts of several processes, torn lines, what is there already, who may write."""

import json
import random

import pytest

from ta.generation.answers_file import AnswersFile

KEYS = [f"k{i}" for i in range(20)]


def record(i):
    return {"id": i, "key": KEYS[i], "text": "é\u2028" * (i % 3)}


@pytest.fixture
def opened(monkeypatch):
    """AnswersFile as process `rank` of `world` opens it."""

    def open_as(path, rank=0, world=1, **flags):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        return AnswersFile(path, **flags)

    return open_as


def write(file, places):
    with file.writing(len(places)):
        for i in places:
            file.append(record(i))


def lines(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_parts_of_three_processes_become_one_ordered_file(opened, tmp_path):
    out = tmp_path / "a" / "answers.jsonl"
    for rank in (2, 0, 1):
        file = opened(out, rank, 3)
        order = file.share(KEYS)
        assert order == list(range(rank, 20, 3))
        random.Random(rank).shuffle(order)
        write(file, order)
        assert file.publish(KEYS) == (rank == 1)  # the last one
    assert lines(out) == [record(i) for i in range(20)]
    assert [path.name for path in out.parent.iterdir()] == ["answers.jsonl"]
    again = opened(out, resume=True)
    assert again.publish(KEYS)  # a second finisher finds the whole
    done = again.done(KEYS)
    assert done.keys() == set(KEYS) and again.share(KEYS, done) == []
    assert opened(out, overwrite=True).done(KEYS) == {}  # nothing of what is to be replaced counts


@pytest.mark.parametrize("cut", range(1, 30, 7))
def test_a_torn_line_is_as_if_never_written(opened, tmp_path, cut):
    out = tmp_path / "answers.jsonl"
    first = opened(out)
    write(first, range(5))
    torn = first.part.read_bytes()[:-cut]
    first.part.write_bytes(torn)
    second = opened(out, resume=True)
    done = second.done(KEYS)
    assert done == {KEYS[i]: record(i) for i in range(5) if i < torn.count(b"\n")}
    assert len(done) < 5
    write(second, second.share(KEYS, done))
    assert second.publish(KEYS)
    assert lines(out) == [record(i) for i in range(20)]


def test_answers_to_other_questions_are_not_taken_over(opened, tmp_path):
    out = tmp_path / "answers.jsonl"
    out.write_text('{"key": "other", "id": 0}\n[1]\nnot json\n{"id": 3}\n')
    file = opened(out, resume=True)
    assert file.done(KEYS) == {}
    write(file, [0])
    assert file.publish(KEYS[:1])
    assert out.read_text() == json.dumps(record(0), ensure_ascii=False) + "\n"


def test_what_exists_is_neither_lost_nor_mixed_up(opened, tmp_path):
    out = tmp_path / "answers.jsonl"
    opened(out)
    out.write_text("{}\n")
    with pytest.raises(ValueError, match=r"answers.jsonl exists.*--resume.*--overwrite"):
        opened(out)
    out.unlink()
    write(opened(out, 4, 5), [])
    assert not list(tmp_path.iterdir())  # what has nothing to say leaves nothing
    write(opened(out, 4, 5), [4])
    with pytest.raises(ValueError, match="begun and not finished"):
        opened(out, 0, 2)
    opened(out, 1, 2)  # not its part: the process that answers for it says so
    for flags in ({"resume": True}, {"overwrite": True}):
        opened(out, 0, 2, **flags)
    with pytest.raises(ValueError, match="one of the two"):
        opened(out, resume=True, overwrite=True)
    with pytest.raises(ValueError, match="is a folder"):
        opened(tmp_path)
    write(opened(out, 1, 2, overwrite=True), [])
    assert len(list(tmp_path.iterdir())) == 1
    write(opened(out, 0, 2, overwrite=True), [])
    assert not list(tmp_path.iterdir())


def test_a_second_process_is_refused_before_anything_is_deleted(opened, tmp_path):
    out = tmp_path / "answers.jsonl"
    first = opened(out, 1, 2)
    with first.writing(1):
        first.append(record(1))
        out.write_text("earlier")
        for rank, world in ((0, 1), (1, 2)):
            second = opened(out, rank, world, overwrite=True)
            with (
                pytest.raises(ValueError, match=r"--out .*answers.jsonl is being written by ano"),
                second.writing(1),
            ):
                pass
        beside = opened(out, 0, 2, resume=True)  # a process of the same command
        write(beside, [])
        assert beside.done(KEYS) == {"k1": record(1)} and out.read_text() == "earlier"
    write(opened(out, overwrite=True), [])
    assert not list(tmp_path.iterdir())
