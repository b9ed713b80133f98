"""Rewards: the built-in functions by hand, and what a user's function can do wrong."""

import json
import time

import pytest

from ta.rl.reward_functions import last_number, load_reward
from ta.rl.rewards import RewardPool
from ta.rl.sandbox import run_python
from ta.rl.settings import RewardConfig, parse_reward
from ta.rl.worker import judged

CHAT = [{"role": "user", "content": "2 + 2?"}]

FUNCTIONS = """
import math, os, sys, time

def right(messages, answer, record):
    assert messages[-1]["role"] == "user"
    return answer == record["reference"]

def hang(messages, answer, record):
    time.sleep(1000) if answer == "bad" else None
    return 1.0

def hang_in_c(messages, answer, record):
    return 10 ** 10 ** 8 if answer == "bad" else 1.0

def fail(messages, answer, record):
    return 1 / (answer != "bad")

def leave(messages, answer, record):
    return sys.exit(0) if answer == "bad" else 1.0

def die(messages, answer, record):
    return os._exit(0) if answer == "bad" else 1.0

def nan(messages, answer, record):
    return math.nan if answer == "bad" else 1.0

def infinite(messages, answer, record):
    return math.inf if answer == "bad" else 1.0

def text(messages, answer, record):
    return "1.0" if answer == "bad" else 1.0

def several(messages, answer, record):
    return [1.0] if answer == "bad" else 1.0

def silent(messages, answer, record):
    return None if answer == "bad" else 1.0

def chatty(messages, answer, record):
    print("[7.0, \\"\\"]", flush=True)
    os.write(1, b"[7.0, \\"\\"]\\n")
    print("err", file=sys.stderr)
    return 1

def forks(messages, answer, record):
    if os.fork() == 0:
        return 5.0
    return 1.0

def leaves_a_child(messages, answer, record):
    if (pid := os.fork()) == 0:
        time.sleep(1000)
    with open(record["pids"], "a") as file:
        file.write(f"{pid}\\n")
    return hang(messages, answer, record)
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)


def scores(*rewards, answers=("4", "bad", "5"), record=None, **more):
    pool = RewardPool(RewardConfig(rewards, **{"reward_seconds": 5.0, **more}))
    try:
        record = {"id": "r7", "reference": "4", "messages": CHAT} | (record or {})
        return [total for _, total in pool.score([record] * len(answers), answers)], pool
    finally:
        pool.close()


def test_weighted_sums_in_the_order_of_the_answers(functions):
    """Also with more answers than processes."""
    answers = tuple("4" if i % 3 else "5" for i in range(40))
    got, _ = scores("exact*2", "mine.py:right", "length:1*0.5", answers=(*answers, "44"))
    assert got == [3.0 if a == "4" else 0.0 for a in answers] + [-0.5]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hang", "took longer than --reward-seconds 0.5"),
        ("hang_in_c", "took longer than --reward-seconds 0.5"),
        ("fail", "raised ZeroDivisionError: division by zero"),
        ("leave", "raised SystemExit: 0"),
        ("die", "its process ended without an answer"),
        ("nan", "returned nan, no finite number"),
        ("infinite", "returned inf, no finite number"),
        ("text", "returned '1.0' of type str, no number"),
        ("several", "returned [1.0] of type list, no number"),
    ],
)
def test_a_call_that_fails_names_function_record_and_answer_or_is_counted(
    functions, name, reason, capsys
):
    """It is never a 0; the other answers keep their rewards, also those that the same process gives later. A line says how many were counted."""
    seconds = {"reward_seconds": 0.5, "reward_processes": 1}
    with pytest.raises(ValueError, match="record 'r7', answer '") as error:
        scores(f"mine.py:{name}", answers=("4", "bad"), **seconds)
    assert reason in str(error.value) and f"mine.py:{name}" in str(error.value)
    got, pool = scores(f"mine.py:{name}", on_bad_reward="none", **seconds)
    assert got == [1.0, None, 1.0] and pool.bad == {f"mine.py:{name}": 1}
    line = f"note: 1 answers have no value of reward mine.py:{name}"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "name", "why"),
    [
        ("", "absent", "ValueError: mine.py has no function absent"),
        ("import nothing_such", "right", "ModuleNotFoundError: No module named 'nothing_such'"),
        ("def f(:", "right", "SyntaxError: invalid syntax (mine.py, line"),
        ("raise SystemExit(3)", "right", "SystemExit: 3"),
    ],
)
def test_what_does_not_load_is_refused_before_an_answer_is_made(functions, text, name, why):
    """Also where calls that fail are counted: all of them would."""
    with open("mine.py", "a") as file:
        file.write(text)
    with pytest.raises(ValueError) as error:
        RewardPool(RewardConfig(("exact", f"mine.py:{name}"), on_bad_reward="none"))
    said = f"exact mine.py:{name} does not load: raised {why}"
    assert str(error.value).startswith(said)


def test_none_is_no_fault_and_no_zero(functions):
    assert scores("mine.py:silent")[0] == [1.0, None, 1.0]
    assert scores("mine.py:silent", "exact*3")[0] == [4.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["chatty", "forks"])
def test_what_a_function_prints_and_forks_is_no_reply(functions, name):
    assert scores(f"mine.py:{name}", "exact")[0] == [2.0, 1.0, 1.0]


def test_what_a_killed_function_has_started_ends_with_it(functions, tmp_path):
    more = {"reward_seconds": 0.5, "on_bad_reward": "none", "record": {"pids": "pids"}}
    got, _ = scores("mine.py:leaves_a_child", **more)
    assert got == [1.0, None, 1.0]
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    for _ in range(100):
        if not any(map(running, pids)):
            return
        time.sleep(0.05)
    raise AssertionError("a child outlived the pool")


def running(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_file_may_import_its_neighbour_and_numpy_numbers_count(tmp_path):
    (tmp_path / "shared.py").write_text("VALUE = 0.25")
    (tmp_path / "r.py").write_text(
        "import numpy, shared\ndef f(m, a, r):\n    return numpy.float32(shared.VALUE)\n"
    )
    assert scores(f"{tmp_path}/r.py:f", reward_seconds=20.0)[0] == [0.25] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exakt", "there is no reward exakt"),
        ("none.py:f", "there is no file none.py"),
        ("exact:3", "exact takes no argument"),
        ("regex", "give regex:PATTERN"),
        ("regex:(", "no regular expression"),
        ("length:none", "give length:N"),
        ("schema:none.json", "there is no file"),
        ("code:root", "there is no sandbox 'root'"),
    ],
)
def test_a_reward_that_cannot_be_is_refused(text, message):
    with pytest.raises(ValueError, match=f"--rewards {text.partition('(')[0]}") as error:
        parse_reward(text)
    assert message in str(error.value)


def test_weights_and_stars():
    assert parse_reward("exact*0.5") == ("exact", 0.5)
    assert parse_reward("length:4*-2") == ("length:4", -2.0)
    assert parse_reward(r"regex:^a*b") == (r"regex:^a*b", 1.0)
    assert parse_reward(r"regex:^a**3") == (r"regex:^a*", 3.0)
    with pytest.raises(ValueError, match="give a finite weight"):
        parse_reward("exact*nan")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,234.5.", 1234.5),
        ("3 + 4 = 7", 7),
        ("-2e3", -2000),
        ("none", None),
        (".5", 0.5),
        ("x=12", 12),
        ("1,2", 2),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == number


def built_in(text, answer, **record):
    return load_reward(text)(CHAT, answer, record)


def test_built_in_functions_by_hand():
    assert (
        built_in("exact", " 4\n", reference="4") == 1
        and built_in("exact", "44", reference="4") == 0
    )
    assert built_in("contains", "it is 4!", reference="4") == 1
    assert built_in("number", "so 4.0", reference="#### 4") == 1
    assert built_in("number", "no idea", reference="4") == 0
    assert built_in("regex:^4$", "4") == 1 and built_in("regex:^4$", "44") == 0
    assert [built_in("length:4", "x" * n) for n in (4, 5, 8, 100)] == [0, -0.25, -1, -1]
    for name in ("exact", "number", "contains"):
        with pytest.raises(ValueError, match="no reference"):
            built_in(name, "4")
    with pytest.raises(ValueError, match="no tests"):
        built_in("code:limits", "x = 1")


def test_values_that_count():
    assert judged(True) == (1.0, "") and judged(3) == (3.0, "") and judged(None) == (None, "")
    assert judged(1j)[0] is None and "complex" in judged(1j)[1]


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "object", "required": ["a"]}, {"a": 1, "b": 2}, {"b": 2}),
        ({"properties": {"a": {"type": "integer"}}}, {"a": 2.0}, {"a": True}),
        ({"properties": {"a": {}}, "additionalProperties": False}, {"a": 1}, {"a": 1, "b": 1}),
        ({"type": "array", "items": {"enum": ["x", 1]}, "minItems": 1}, ["x", 1], [True]),
        ({"type": ["string", "null"], "pattern": "^a"}, "ab", "ba"),
        ({"anyOf": [{"const": 1}, {"type": "boolean"}]}, False, 0),
        ({"type": "number", "minimum": 0, "maximum": 1}, 0.5, 1.5),
    ],
)
def test_schemas(schema, right, wrong, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(schema))
    assert built_in(f"schema:{tmp_path}/s.json", json.dumps(right)) == 1
    assert built_in(f"schema:{tmp_path}/s.json", json.dumps(wrong)) == 0
    assert built_in(f"schema:{tmp_path}/s.json", "{") == 0


@pytest.mark.parametrize("schema", [{"type": "text"}, {"minItems": "two"}, [1]])
def test_what_is_no_schema_is_refused(schema, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(schema))
    with pytest.raises(ValueError, match=r"s.json is no JSON schema: "):
        parse_reward(f"schema:{tmp_path}/s.json")


def test_a_schema_reaches_no_network(tmp_path, monkeypatch):
    """A schema that another one names is not fetched: a call then fails, and is told."""
    (tmp_path / "s.json").write_text(json.dumps({"$ref": "http://127.0.0.1:1/other.json"}))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("fetched"))
    with pytest.raises(Exception, match=r"other\.json"):
        built_in(f"schema:{tmp_path}/s.json", "1")


def sandboxed(code, tests="", level="limits", seconds=5.0):
    return run_python(code, tests, seconds, level)


def test_code_passes_its_tests_or_not():
    answer = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    assert built_in("code:limits", answer, tests="assert add(2, 2) == 4") == 1
    assert built_in("code:limits", answer, tests="assert add(2, 2) == 5") == 0
    assert built_in("code:limits", "x = (", tests="") == 0


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "print('passed')\nimport os; os.abort()",
        "x = bytearray(10**10)",
        "open('f', 'wb').write(b'x' * 10**8)",
    ],
)
def test_code_that_ends_itself_or_takes_too_much_does_not_pass(code):
    assert not sandboxed(code)


def test_code_that_hangs_and_what_it_started_is_killed(tmp_path):
    start = time.monotonic()
    child = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
    )
    note = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\n"
    assert sandboxed(child + note), "a child that is left is no failure"
    assert not sandboxed(child + "while True: pass", seconds=1.0)
    assert time.monotonic() - start < 60
    assert not running(int((tmp_path / "pid").read_text()))


def test_offline_code_reaches_nothing():
    """On this very machine, where plain code reaches the listener."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        call = f"import socket; socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 3)"
        assert sandboxed(call)
        try:
            offline = sandboxed(call, level="offline")
        except ValueError:
            pytest.skip("no namespaces here")
        assert not offline and not sandboxed("import os; assert os.environ.get('HOME')")


def test_a_level_that_is_not_there_is_refused(monkeypatch):
    import shutil

    from ta.rl.sandbox import check_level

    check_level.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for level in ("offline", "files"):
        with pytest.raises(ValueError, match="is not installed"):
            check_level(level)
    check_level.cache_clear()


def test_a_reward_model_gives_what_score_gives(tmp_path):
    """Beside a function; an answer that is too long for it has no reward."""
    import torch
    from transformers import LlamaForSequenceClassification

    from ta.builtin.models import tiny_config, tiny_tokenizer

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(num_labels=1, pad_token_id=0)).eval()
    model.save_pretrained(tmp_path / "rm")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "rm")
    got, pool = scores(
        f"model:{tmp_path}/rm*2", "exact", answers=("4", "no", "x y " * 2000), on_bad_reward="none"
    )
    for value, answer in zip(got, ("4", "no"), strict=False):
        chat = [*CHAT, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            wanted = 2 * model(ids).logits.item() + (answer == "4")
        assert value == pytest.approx(wanted, abs=1e-4)
    assert got[2] == 0.0 and pool.bad[f"model:{tmp_path}/rm"] == 1
    with pytest.raises(ValueError, match="tokens are more than the reward model can read"):
        scores(f"model:{tmp_path}/rm", answers=("x y " * 2000,))
    with pytest.raises(ValueError, match="no reward model or classifier"):
        tiny_folder_without_head = tmp_path / "lm"
        from transformers import LlamaForCausalLM

        LlamaForCausalLM(tiny_config()).save_pretrained(tiny_folder_without_head)
        scores(f"model:{tiny_folder_without_head}")
