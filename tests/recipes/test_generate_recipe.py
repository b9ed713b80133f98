"""Tests of recipes/generate.py and recipes/chat.py, as a user runs them."""

import importlib.util
import json
import os
import random
import signal
import threading
import time
from dataclasses import replace

import pytest
from tqdm.auto import tqdm

import ta
from ta.builtin.tasks import chats
from ta.generation.settings import GenerateConfig, parse_settings
from ta.printable import printable

N = 24


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(tmp_path):
    records = chats("held_out", N)
    records[3]["label"] = 7
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "chats.jsonl"


@pytest.fixture(scope="module")
def recipe():
    import recipes.generate as module

    return module


def config_of(recipe, data, out, **more):
    return recipe.Config(
        data=(str(data),),
        out=str(out),
        generation=GenerateConfig(max_new_tokens=6, slots=5),
        **more,
    )


def test_records_come_in_order_with_what_they_held(recipe, data, tmp_path):
    out = tmp_path / "answers.jsonl"
    recipe.main(config_of(recipe, data, out, logprobs="tokens", with_prompt=True))
    for before, after in zip(lines(data), lines(out), strict=True):
        assert {k: after[k] for k in before if k != "messages"} == {
            k: before[k] for k in before if k != "messages"
        }
        assert [*after["messages"], {"role": "assistant", "content": after["reference"]}] == before[
            "messages"
        ]
        answer = after["answers"][0]
        assert (
            answer["id"] == "0"
            and answer["finish"] in ("stop", "length")
            and after["prompt"].endswith("assistant\n")
        )
        assert (
            len(answer["tokens"]) == len(answer["logprobs"]) <= 6
            and abs(sum(answer["logprobs"]) - answer["logprob"]) < 1e-9
        )
    with pytest.raises(ValueError, match="exists"):
        recipe.main(config_of(recipe, data, out))


def test_several_settings_write_a_file_each(recipe, data, tmp_path):
    settings = ("greedy", "warm:temperature=1.5,num_answers=3")
    recipe.main(config_of(recipe, data, tmp_path / "a.jsonl", settings=settings))
    greedy, warm = lines(tmp_path / "a.greedy.jsonl"), lines(tmp_path / "a.warm.jsonl")
    assert [r["id"] for r in greedy] == [r["id"] for r in warm] and not (
        tmp_path / "a.jsonl"
    ).exists()
    assert {len(r["answers"]) for r in greedy} == {1} and {len(r["answers"]) for r in warm} == {3}
    assert len({a["content"] for r in warm for a in r["answers"]}) > N


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [{}, {"generation": GenerateConfig(max_new_tokens=6, temperature=1.0, slots=3)}]
)
def test_killed_at_random_moments_gives_the_same_file(recipe, data, tmp_path, flags):
    """Ten times killed and resumed, by one or three processes: no record twice or missing, the very bytes of an undisturbed run."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    recipe.main(replace(config_of(recipe, data, whole), **flags))
    r, partial = random.Random(len(flags)), 0

    def written():
        try:
            return sum(
                path.read_bytes().count(b"\n") for path in tmp_path.glob(".killed.jsonl.part-*")
            )
        except FileNotFoundError:  # just published
            return N

    for attempt in range(40):
        world = r.choice([1, 1, 3])
        for rank in range(world):
            if not (child := os.fork()):
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
                for bar in tqdm.__mro__[:-2]:
                    bar._lock = (
                        threading.RLock()
                    )  # the default one is shared by forks, and a killed child may hold it
                try:
                    recipe.main(
                        replace(
                            config_of(recipe, data, out), resume=attempt > 0 or rank > 0, **flags
                        )
                    )
                finally:
                    os._exit(0)
            if attempt < 10:  # at a random number of records more, or before the first
                until, ended = written() + r.randrange(N // 4), False
                time.sleep(r.random() / 10)
                while not ended and written() < until:
                    time.sleep(0.001)
                    ended = os.waitpid(child, os.WNOHANG) != (0, 0)
                if ended:
                    continue
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        parts = [p for p in tmp_path.iterdir() if ".part-" in p.name and p.stat().st_size]
        partial += bool(parts) and not out.exists()
        if attempt >= 10 and out.exists():
            break
    assert (
        out.read_bytes() == whole.read_bytes() and partial
    )  # the guard: some kills did find work half done
    left = [
        path.name for path in tmp_path.iterdir() if path.suffix != ".tmp"
    ]  # one killed as it writes the whole leaves its copy
    assert sorted(left) == ["chats.jsonl", "killed.jsonl", "whole.jsonl"]


def test_a_resumed_run_does_only_what_is_new(recipe, data, tmp_path, capfd):
    out = tmp_path / "a.jsonl"
    recipe.main(config_of(recipe, data, out))
    first = lines(out)
    with open(data, "a") as file:
        file.write(
            json.dumps({"id": "new", "messages": [{"role": "user", "content": "More?"}]}) + "\n"
        )
    recipe.main(config_of(recipe, data, out, resume=True))
    assert (
        lines(out)[:-1] == first
        and lines(out)[-1]["id"] == "new"
        and f"{N} of them from before" in capfd.readouterr().err
    )
    whole = out.read_bytes()
    other = config_of(recipe, data, out, resume=True)
    with pytest.raises(ValueError, match="made of other data, another model or other settings"):
        recipe.main(replace(other, generation=GenerateConfig(max_new_tokens=3)))
    assert out.read_bytes() == whole


def test_what_decides_an_answer_is_in_its_key(recipe, data, tmp_path):
    def key(**changes):
        config = replace(config_of(recipe, data, tmp_path / "a.jsonl"), **changes)
        tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat)
        prompts = recipe.read_data(config, tokenizer, None, "cpu")
        return recipe.keys_of(config, config.generation, prompts, tokenizer, None)[0]

    first, secret = key(), ta.ModelConfig(model_args=("token=a",))
    assert key() == first and key(generation=GenerateConfig(max_new_tokens=6, slots=9)) == first
    assert key(model=secret) == key(model=replace(secret, model_args=("token=b",)))
    other = {
        "dtype": {"model": ta.ModelConfig(dtype="float64")},
        "arguments": {"model": ta.ModelConfig(model_args=("attn_implementation=eager",))},
        "tokens": {"tokenizer": ta.TokenizerConfig(init_tokens=("<new>=a",))},
        "seed": {"generation": GenerateConfig(max_new_tokens=6, seed=1)},
        "system prompt": {"chat": ta.ChatConfig(system_prompt="Be brief.")},
        "engine": {"engine": "vllm"},
        "prompt": {"with_prompt": True},
    }
    keys = {first, *(key(**changes) for changes in other.values())}
    assert len(keys) == 1 + len(other)


def test_random_cut_asks_before_some_answer(recipe, data, tmp_path):
    recipe.main(config_of(recipe, data, tmp_path / "a.jsonl", random_cut=True))
    kept = 0
    for before, after in zip(lines(data), lines(tmp_path / "a.jsonl"), strict=True):
        n = len(after["messages"])
        assert (
            before["messages"][:n] == after["messages"]
            and before["messages"][n]["content"] == after["reference"]
        )
        kept += n == len(before["messages"]) - 1
    assert 0 < kept < N


def test_what_cannot_be_answered_is_counted(recipe, data, tmp_path, capfd):
    with open(data, "a") as file:
        file.write(json.dumps({"messages": [{"role": "wizard", "content": "Hm"}]}) + "\n")
    with pytest.raises(ValueError, match=rf"chats.jsonl:{N + 1}: .*wizard"):
        recipe.main(config_of(recipe, data, tmp_path / "a.jsonl"))
    recipe.main(
        config_of(recipe, data, tmp_path / "a.jsonl", on_bad_record="skip", max_bad_share=0.1)
    )
    assert len(lines(tmp_path / "a.jsonl")) == N and "left out: 1" in capfd.readouterr().err


def test_settings_are_read_or_refused():
    base = GenerateConfig(max_new_tokens=9)
    assert parse_settings("a-1", base) == ("a-1", base)
    name, settings = parse_settings(
        "b:temperature=1,stop_strings=('x,', \"y\"),keep_stop=True", base
    )
    assert (name, settings) == (
        "b",
        replace(base, temperature=1, stop_strings=("x,", "y"), keep_stop=True),
    )
    for text, message in (
        (":temperature=1", "no name"),
        ("a/b", "no name"),
        ("a:temperature", "not of the form"),
        ("a:temperature=hot", "not of the form"),
        ("a:temprature=1", "known are beams"),
        ("a:num_answers=1.5", "is no int"),
        ("a:stop_strings='x'", "is no tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_settings(text, base)


def test_adapters_and_prompts_that_do_not_fit_are_refused(door, data, tmp_path, monkeypatch):
    """Each with exit code 2, a line that says what to give, and nothing written."""
    from ta.builtin import models
    from ta.folders import ModelConfig
    from ta.model.adapters import AdapterConfig, add_adapter, save_adapter
    from ta.model.load import load_base

    models.write_tiny(tmp_path / "base")
    models.write_tiny(tmp_path / "other", seed=1)
    for kind in ("lora", "prompt"):
        save_adapter(
            add_adapter(
                load_base(ModelConfig(str(tmp_path / "base"))), AdapterConfig(adapter=kind)
            ),
            tmp_path / kind,
        )
    long = tmp_path / "long.jsonl"
    long.write_text(
        data.read_text()
        + json.dumps({"messages": [{"role": "user", "content": "word " * 1000}]})
        + "\n"
    )
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, real=importlib.util.find_spec: name == "vllm" or real(name),
    )
    out, short = tmp_path / "x.jsonl", ("--max-new-tokens", 4)
    for flags, message in (
        (
            (
                "--data",
                data,
                "--model-path",
                tmp_path / "other",
                "--adapter-path",
                tmp_path / "lora",
            ),
            "the weights differ",
        ),
        (
            (
                "--data",
                data,
                "--model-path",
                tmp_path / "base",
                "--adapter-path",
                tmp_path / "prompt",
                "--engine",
                "vllm",
            ),
            "--engine hf",
        ),
        (
            (
                "--data",
                data,
                "--model-path",
                tmp_path / "base",
                "--engine",
                "vllm",
                "--tensor-parallel-size",
                2,
            ),
            "does not divide the model's 5 attention heads",
        ),
        (
            ("--data", data, "--engine", "vllm", "--model-args", "use_cache=False"),
            "--model-args use_cache=False",
        ),
        (
            ("--data", data, "--tensor-parallel-size", 2),
            "--tensor-parallel-size is a setting of vLLM",
        ),
        (
            ("--data", long),
            f"1 of {N + 1} prompts leave no room for an answer in the model's context of 1024",
        ),
    ):
        code, said = door("generate", *flags, *short, "--out", out)
        assert (
            code == 2 and message in said and not out.exists() and not list(tmp_path.glob(".x*"))
        ), said
    code, said = door(
        "generate", "--data", long, "--max-tokens", 100, *short, "--out", out, "--with-prompt"
    )
    assert code == 0, said  # cut as asked: whole messages, or a single one in its middle


@pytest.mark.slow
def test_as_a_user_runs_it(run, forked, door, data, tmp_path):
    """Two processes give the file of one; what is wrong is said in a line with exit code 2 and nothing is written."""
    flags = ("--data", data, "--max-new-tokens", 6, "--slots", 5)
    run("generate", *flags, "--out", tmp_path / "one.jsonl")
    forked("generate", *flags, "--out", tmp_path / "two.jsonl", processes=2)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    before = sorted(tmp_path.iterdir())
    for more, message in (
        (("--out", tmp_path / "one.jsonl"), "exists"),
        (("--out", tmp_path / "x.jsonl", "--model-path", tmp_path / "nothing"), "no model folder"),
        (("--out", tmp_path / "x.jsonl", "--engine", "vllm"), "pip install 'vllm"),
        (("--out", tmp_path / "x.jsonl", "--beams", 2, "--temperature", 1), "give one of them"),
        (
            ("--out", tmp_path / "one.jsonl", "--overwrite", "--model-path", tmp_path / "nothing"),
            "no model folder",
        ),
    ):
        code, said = door("generate", *flags, *more)
        assert code == 2 and message in said and "Traceback" not in said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_chat_streams_an_answer_and_forgets(run):
    import subprocess
    import sys

    command = [sys.executable, "recipes/chat.py", "--max-new-tokens", "4"]
    said = "hello\n/reset\nhello\n\nhello\n/quit\nnot read\n"
    done = subprocess.run(
        command,
        input=said,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": "."},
    )
    answers = done.stdout.split("\n")
    assert done.returncode == 0, done.stderr
    assert len(answers) == 4 and answers[0] == answers[1] != "" and answers[3] == ""


def test_chat_speaks_as_the_run_was_trained(tmp_path, monkeypatch, capsys):
    """With --run: its final model, its system prompt and limits; a flag wins; what is no finished run is refused."""
    import io

    import recipes.chat as module
    from ta.builtin import models
    from ta.chat.template import ChatConfig

    models.write_tiny(tmp_path / "final")
    trained = {
        "chat": {"system_prompt": "Be brief.", "max_tokens": 90, "role_tags": []},
        "model": {"dtype": "float64", "packing": True},
    }
    (tmp_path / "config.json").write_text(json.dumps({"config": trained}))
    found = module.of_run(module.Config(run=str(tmp_path), chat=ChatConfig(max_tokens=50)))
    assert (found.chat.system_prompt, found.chat.max_tokens, found.model.dtype) == (
        "Be brief.",
        50,
        "float64",
    )
    assert found.model.model_path == str(tmp_path / "final")
    asked, real = [], ta.generate

    def noting(model, tokenizer, prompts, *more, **named):
        asked.append(tokenizer.decode(prompts[0]))
        return real(model, tokenizer, prompts, *more, **named)

    monkeypatch.setattr(ta, "generate", noting)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n"))
    module.main(module.Config(run=str(tmp_path), generation=GenerateConfig(max_new_tokens=3)))
    answers = capsys.readouterr().out.split("\n")
    assert (
        asked[0].startswith("<|im_start|>system\nBe brief.<|im_end|>")
        and "hello<|im_end|>" in asked[0]
    )
    first, second = map(printable, asked)  # as answers are shown
    assert second.startswith(first + answers[0]) and "again<|im_end|>" in asked[1]
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        module.of_run(module.Config(run=str(tmp_path)))
