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
        assert not file.done(KEYS)  # what others have just made is not from before
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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_says_what_is_kept_and_how_to_go_on(opened, tmp_path, rank):
    file = opened(tmp_path / "answers.jsonl", rank, 2)
    words = ": 1 of 10 records are kept beside .*answers.jsonl; the same command with --resume goes"
    with pytest.raises(KeyboardInterrupt, match=words), file.writing(10):
        file.append(record(rank))
        raise KeyboardInterrupt
    assert opened(tmp_path / "answers.jsonl", rank, 2, resume=True).done(KEYS) == {
        KEYS[rank]: record(rank)
    }


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


@pytest.mark.parametrize("place", ["answers.jsonl", ".answers.jsonl.part-0"])
@pytest.mark.parametrize("text", ['{"key": "other", "id": 0}\n', '{"id": 3}\n'])
def test_what_answers_other_questions_is_neither_taken_over_nor_replaced(
    opened, tmp_path, place, text
):
    (tmp_path / place).write_text(json.dumps(record(0)) + "\n" + text)
    file = opened(tmp_path / "answers.jsonl", resume=True)
    with pytest.raises(ValueError, match="other data, another model or other settings"):
        file.done(KEYS)
    assert file.done([*KEYS, "other"])[KEYS[0]] == record(0) if "key" in text else True
    again = opened(tmp_path / "answers.jsonl", overwrite=True)
    write(again, [0])
    assert again.done(KEYS) == {} and again.publish(KEYS[:1])
    assert lines(tmp_path / "answers.jsonl") == [record(0)]


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}])
def test_a_file_that_is_none_of_ours_stays(opened, tmp_path, flags):
    out = tmp_path / "notes"
    for text in ("my notes\n", '{\n "a": 1\n}\n', "[1]\n", "\n"):
        out.write_text(text)
        with pytest.raises(ValueError, match="holds no JSON lines"):
            opened(out, **flags)
    out.write_text("")
    assert opened(out, **flags).done(KEYS) == {}


def test_records_that_another_process_has_removed_are_missed(opened, tmp_path):
    file = opened(tmp_path / "answers.jsonl", 0, 2)
    write(file, [0, 2])
    assert not file.publish(KEYS[:4])  # the other process is still at work
    file.part.unlink()
    with pytest.raises(ValueError, match="2 of the records written here are gone"):
        file.publish(KEYS[:4])
    assert not list(tmp_path.iterdir())


def test_a_share_that_has_written_nothing_yet_is_held_too(opened, tmp_path):
    out = tmp_path / "answers.jsonl"
    with (
        opened(out, 1, 2).writing(1),
        pytest.raises(ValueError, match="being written by another process"),
        opened(out, 0, 1, overwrite=True).writing(1),
    ):
        pass


def test_a_file_that_another_process_has_finished_meanwhile_stays(opened, tmp_path):
    late = opened(tmp_path / "answers.jsonl")
    first = opened(tmp_path / "answers.jsonl")
    write(first, [0])
    assert first.publish(KEYS[:1])
    with pytest.raises(ValueError, match=r"answers.jsonl exists"), late.writing(1):
        pass
    assert lines(tmp_path / "answers.jsonl") == [record(0)]


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
        out.write_text(earlier := json.dumps(record(7)) + "\n")
        for rank, world in ((0, 1), (1, 2)):
            second = opened(out, rank, world, overwrite=True)
            with (
                pytest.raises(ValueError, match=r"--out .*answers.jsonl is being written by ano"),
                second.writing(1),
            ):
                pass
        beside = opened(out, 0, 2, resume=True)  # a process of the same command
        write(beside, [])
        assert beside.done(KEYS) == {"k1": record(1), "k7": record(7)}
        assert out.read_text() == earlier
    write(opened(out, overwrite=True), [])
    assert not list(tmp_path.iterdir())
