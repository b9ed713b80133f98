"""The words of a command line: other tools' flags, files of settings, the short help, the command `ta`."""

import dataclasses
import json
import os
import runpy
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import judged
import pytest

from ta import __main__ as command
from ta.command_line import cli
from ta.flags import (
    COMMON,
    EQUAL,
    OURS,
    SETTING,
    command_of,
    settings_of,
    short_help,
    translate_flags,
)
from ta.recipe_files import RECIPES, recipe_names

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Group:
    lr: float = 0.5
    data: tuple[str, ...] = ()
    dtype: Literal["auto", "bfloat16"] = "auto"
    overwrite: bool = False
    packing: bool = True


@dataclass(frozen=True)
class Config:
    group: Group = Group()
    loss: str = "sigmoid"
    """Which loss."""
    name: str | None = None


def parsed(*words: str) -> Config:
    got: list[Config] = []
    with pytest.raises(SystemExit) as end:
        cli(lambda config: got.append(config), Config, list(words))
    assert end.value.code == 0
    return got[0]


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("--learning-rate 2", "--lr 2"),
        ("--learning_rate=2", "--lr 2"),
        ("--bf16", "--dtype bfloat16"),
        ("--bf16 True --lr 1", "--dtype bfloat16 --lr 1"),
        ("--bf16 False", ""),
        ("--overwrite-output-dir True", "--overwrite"),
        ("--packing false", "--no-packing"),
        ("--overwrite --no-packing", "--overwrite --no-packing"),
        ("--dataset a b --loss dpo", "--data a b --loss sigmoid"),
        ("--loss-type=dpo", "--loss sigmoid"),
    ],
)
def test_flags_of_other_tools_mean_ours(words, same):
    assert parsed(*words.split()) == parsed(*same.split())


def test_an_empty_value_takes_back_what_a_file_gave(tmp_path):
    """Alone it would be a flag without effect, as of a variable that is not set."""
    file = tmp_path / "a.json"
    file.write_text('{"loss": "ipo", "data": ["a"]}')
    known = ("--config", str(file))
    assert parsed(*known, "--loss=", "--data") == Config(loss="")
    assert parsed("--name=") == Config(name=""), "text that may be empty"
    for words in (("--loss=",), ("--loss", ""), ("--data",), ("--data", "--lr", "1")):
        with pytest.raises(ValueError, match=f"{words[0].strip('=')} has no value"):
            translate_flags([*words], Config)


@pytest.mark.parametrize("words", [("--data", "a", "b\udce4"), ("--data=b\udce4",)])
def test_a_name_that_is_no_utf_8_is_refused_at_the_door(words):
    """Libraries in Rust open no such file, and would say so after the training."""
    with pytest.raises(ValueError, match=r"b\\udce4' is no UTF-8.*LC_ALL=C.UTF-8"):
        translate_flags([*words], Config)


@pytest.mark.parametrize("flag", OURS)
def test_a_flag_with_another_meaning_is_answered_by_what_is_ours(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli(lambda config: None, Config, [flag, "4"])
    said = capsys.readouterr().err
    assert said == f"error: {flag} is another tool's flag; here it is {OURS[flag]}\n"


def test_a_flag_of_the_recipe_itself_is_never_renamed():
    @dataclass(frozen=True)
    class Own:
        max_steps: int = 1
        steps: int = 2
        fp16: bool = False

    assert translate_flags(["--max-steps", "5", "--fp16"], Own) == ["--max-steps", "5", "--fp16"]


def test_every_name_leads_to_a_flag_of_a_recipe():
    flags = {s.flag for name in recipe_names() for s in settings_of(config_of(name))}
    ours = {*EQUAL.values(), *(flag for flag, _ in SETTING.values())}
    assert {flag.replace("--no-", "--") for flag in ours} <= flags
    assert {"--" + name.replace("_", "-") for name in COMMON.split()} <= flags


def config_of(name: str) -> type:
    return runpy.run_path(str(RECIPES / f"{name}.py"))["Config"]


def test_a_file_of_settings_and_flags_over_it(tmp_path):
    plain, toml, run = tmp_path / "a.json", tmp_path / "a.toml", tmp_path / "config.json"
    plain.write_text(json.dumps({"lr": 2, "data": ["a b", "c"], "group": {"packing": False}}))
    toml.write_text('loss = "ipo"\ndata = ["a b", "c"]\n[group]\nlr = 2.0\npacking = false\n')
    expected = Config(Group(lr=2, data=("a b", "c"), packing=False))
    assert parsed("--config", str(plain)) == expected
    assert parsed(f"--config={toml}") == dataclasses.replace(expected, loss="ipo")
    assert parsed(
        "--config", str(toml), "--loss", "dpo", "--lr", "3", "--data", "d"
    ).group == Group(lr=3, data=("d",), packing=False)
    run.write_text(json.dumps({"config": dataclasses.asdict(expected), "identity": {}, "argv": []}))
    assert parsed("--config", str(run)) == expected


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "{", "give a file of JSON or TOML"),
        ("a.toml", "a = ", "give a file of JSON or TOML"),
        ("a.yaml", "lr: 3", "give a file of JSON or TOML"),
        ("a.json", "[1]", "give an object of settings"),
        ("a.json", '{"lrr": 1}', "this recipe has no setting lrr"),
    ],
)
def test_a_file_that_cannot_be_is_answered_in_a_line(name, text, said, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match="2"):
        cli(lambda config: None, Config, ["--config", str(tmp_path / name)])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and str(tmp_path / name) in error


@pytest.mark.parametrize(
    "words",
    ["", "--lr 2 --data 'a b' c", "--no-packing --loss ipo --name=-x", "--dtype bfloat16"],
)
def test_the_command_of_a_config_gives_it_again(words):
    config = parsed(*shlex.split(words))
    assert parsed(*shlex.split(command_of(config))[2:]) == config


def test_a_page_is_called_what_was_typed(tmp_path):
    """A copy and a recipe by its file are their files, a recipe by its name is ta and its name."""
    copied = tmp_path / "my page.py"
    copied.write_text((RECIPES / "compare.py").read_text())
    known = str(RECIPES / "compare.py")
    for words, shown in (
        (["my page.py"], "python 'my page.py'"),
        ([known], f"python {known}"),
        (["-m", "ta", "compare"], "ta compare"),
    ):
        command = [sys.executable, *words, "--help-all"]
        environment = os.environ | {"COLUMNS": "500", "PYTHONPATH": str(RECIPES.parent)}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.stdout.startswith(f"usage: {shown} [-h] "), done.stderr


def test_the_short_help_shows_the_own_flags_and_how_to_see_all(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli(lambda config: None, Config, ["--help"])
    shown = capsys.readouterr().out
    assert "--loss STR\n      Which loss. (default: sigmoid)" in shown
    assert "--lr FLOAT" in shown and "--packing" not in shown and "--help-all" in shown


def test_a_flag_without_a_default_is_required():
    shown = short_help(judged.recipe("merge").Config, "")
    assert "--out STR\n      Folder to write. (required)" in shown and "MISSING" not in shown


def ta(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ta", *words])
    try:
        command.main()
    except SystemExit as end:
        return end.code
    return 0


def test_the_command_lists_and_copies_recipes(tmp_path, monkeypatch, capsys):
    assert ta(monkeypatch) == 0
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in recipe_names())
    mine = tmp_path / "mine.py"
    assert ta(monkeypatch, "copy", "dpo", str(mine)) == 0
    original = (RECIPES / "dpo.py").read_text()
    assert mine.read_text() == original.replace("recipes/dpo.py", str(mine))
    assert ta(monkeypatch, "copy", "dpo", str(mine)) == 2
    assert "exists: give a new file" in capsys.readouterr().err
    wrong = (["copy", "dpo"], ["copy", "nothing", "a.py"], ["nothing"], ["doctor", "x"])
    for words in (*wrong, ["help", "data", "x"], ["help", "sft"], ["from-turbo", "gone.json"]):
        assert ta(monkeypatch, *words) == 2
    assert ta(monkeypatch, "sft", "--help") == 0


def test_doctor_says_what_there_is(monkeypatch, capsys):
    assert ta(monkeypatch, "doctor") == 0
    shown = capsys.readouterr().out
    assert "torch 2" in shown and "GiB memory" in shown and "--engine vllm" in shown


def test_the_package_lists_its_folders():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "ta").rglob("*.py")}
    assert {*listed} == folders | {"ta.recipes"}


def test_a_default_is_that_of_the_recipe():
    """A recipe may give a group other defaults than the group's own; help and a settings file mean the recipe's."""
    config = config_of("kto")
    known = {setting.name: setting.default for setting in settings_of(config)}
    assert known["out"] == "runs/kto" and known["sample_metrics"] == ("accuracy", "contains")
    for setting in settings_of(config_of("sft")):
        assert setting.default != "runs/run", setting
