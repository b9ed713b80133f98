"""The user's door: what happened decides the exit code and the one line that is said."""

import errno
import io
import os
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from math import inf, nan
from typing import get_args, get_type_hints

import judged
import pytest
import torch

from ta.command_line import check_config, cli, guard, what_is_wrong
from ta.recipe_files import RECIPES, recipe_names


@dataclass(frozen=True)
class Inner:
    depth: int = 1
    """How deep
    it goes."""


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    width: int = 2
    """A sentence that the source breaks
    into two lines, (one of them begins with a sign)
    or three."""


def raises(error):
    def action():
        raise error

    return action


def undetermined():
    """What torch says of an operation under --deterministic."""
    torch.use_deterministic_algorithms(True)
    try:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    except RuntimeError as error:
        return error
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("--steps 0: give more"), 2, "--steps 0: give more"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.jsonl"), 2, "a.jsonl"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 3, "out"),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 3, "no room on the disk"),
        (Exception("I/O error: File too large (os error 27)"), 3, "give the same command again"),
        (OSError(errno.EROFS, "Read-only file system", "out"), 3, "Read-only"),
        (torch.OutOfMemoryError("CUDA out of memory"), 3, "--max-tokens-per-micro"),
        (MemoryError(), 3, "--max-tokens-per-micro"),
        (undetermined(), 2, "put_ does not have a deterministic implementation: leave --det"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "--max-tokens-per-micro"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 2, "a/b: Not a directory"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), 2, "a: Is a directory"),
        (KeyboardInterrupt(), 130, "stopped"),
        (KeyboardInterrupt(": 3 are kept"), 130, "stopped: 3 are kept"),
    ],
)
def test_one_line_and_an_exit_code(error, code, said, capsys):
    assert guard(raises(error)) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and lines[0].startswith("error: ") == (code != 130)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("x"), AssertionError()])
def test_what_a_user_cannot_cause_stays_a_traceback(error):
    with pytest.raises(type(error)):
        guard(raises(error))


def test_a_full_disk_behind_another_error_is_told(capsys):
    def action():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise ValueError("the tokenizer cannot be written") from None

    assert guard(action) == 3 and "no room on the disk" in capsys.readouterr().err


def test_an_interrupt_behind_another_error_is_told(capsys):
    """As where a library says of it that an import has failed."""

    def action():
        try:
            raise KeyboardInterrupt(": 3 are kept")
        except KeyboardInterrupt as stop:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from stop

    assert guard(action) == 130 and capsys.readouterr().err == "stopped: 3 are kept\n"


def test_nothing_raised_is_success(capsys):
    assert guard(lambda: None) == 0 and capsys.readouterr().err == ""


def test_help_of_a_field_is_one_paragraph(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as end:
        cli(raises(AssertionError), Outer, ["--help-all"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "How deep it goes. (default: 1)" in shown
    assert "breaks into two lines, (one of them begins with a sign) or three. (default: 2)" in shown


@dataclass(frozen=True)
class Group:
    seed: int = 1


@dataclass(frozen=True)
class Other:
    seed: int = 2


@dataclass(frozen=True)
class Clashing:
    first: Group = Group()
    second: Other = Other()


def test_two_groups_with_one_flag_are_refused_in_a_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli(lambda config: None, Clashing, ["--seed", "3"])
    said = capsys.readouterr().err
    assert said == (
        "error: Clashing has two fields seed, of Group and of Other: rename one of them\n"
    )


def test_a_screen_without_a_letter_shows_its_escape(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    assert guard(lambda: print("«cup»", flush=True)) == 0
    assert shown.getvalue() == b"\\xabcup\\xbb\n"


BROKEN = """
import contextlib, os, signal
from ta.command_line import guard
# a job in the background is started without it
signal.signal(signal.SIGINT, signal.default_int_handler)
def action():
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    raise ImportError("what numpy says of an import that was cut")
raise SystemExit(guard(action))
"""


def test_an_import_that_ctrl_c_broke_is_a_stop():
    environment = os.environ | {"PYTHONPATH": str(RECIPES.parent)}
    command = [sys.executable, "-c", BROKEN]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stderr) == (130, "stopped\n")


ENDS = """
import atexit
from dataclasses import dataclass
import torch
import ta
@dataclass(frozen=True)
class Config:
    n: int = 1
class Whole:
    def __del__(self):
        print("taken apart")
whole = Whole()
# alone this one would wait for the other
torch.distributed.init_process_group = lambda *_, **more: None
def main(config):
    ta.parallel.init()
    atexit.register(print, "a handler")
    raise SystemExit(143)
ta.cli(main, Config, [])
"""


def test_one_of_several_processes_ends_before_python_takes_itself_apart():
    environment = os.environ | {"PYTHONPATH": str(RECIPES.parent), "WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, "-c", ENDS]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout) == (143, "a handler\n"), ended


LONG = "from ta.command_line import guard\nraise SystemExit(guard(lambda: print('x' * 10**6)))"


@pytest.mark.parametrize("words", [["-c", LONG], [str(RECIPES / "compare.py"), "--help"]])
def test_a_reader_that_has_enough_is_no_error(words):
    """As behind `| head -1`: a status of its own and no word."""
    command, pipe = [sys.executable, *words], subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": str(RECIPES.parent)}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment) as process:
        if "-c" in words:
            process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--lr", "x"), "error: --lr 'x': could not convert string to float: 'x'\n"),
        (
            ("--steps", "1.5"),
            "error: --steps '1.5': invalid literal for int() with base 10: '1.5'\n",
        ),
        (
            ("--steps", "2", "--epochs", "5"),
            "error: --epochs 5 has no effect beside --steps 2: leave",
        ),
        (("--clip", "y"), "error: --clip: could not convert string to float: 'y'\n"),
        (("--max-token", "3"), "error: Unrecognized options: --max-token, 3; perhaps you meant "),
        (
            ("--max-new-tokens", "3"),
            "error: Unrecognized options: --max-new-tokens, 3; perhaps you meant "
            "--sample-max-new-tokens, --max-tokens\n",
        ),
        (
            ("--learnign-rate", "1"),
            "error: --learnign-rate: no such flag; perhaps you meant --lr\n",
        ),
        (("--schedule", "foo"), "error: invalid choice 'foo' for argument '--schedule'."),
        (("--lr",), "error: Missing value for argument '--lr'."),
        (("stray",), "error: Unrecognized options: stray\n"),
        (("--data",), "error: --data has no value: give one, or leave it out\n"),
        (("--out", ""), "error: --out has no value: give one, or leave it out\n"),
        (("--log", "--lr", "1"), "error: --log has no value: give one, or leave it out\n"),
        (("--seed", "9" * 30), f"error: --seed {'9' * 30}: give a number from 0 to {2**63 - 1}\n"),
        (
            ("--steps", "9" * 18),
            f"error: --steps {'9' * 18}: give a number from 1 to {2**31 - 1}\n",
        ),
        (("--lora-rank", "70000"), "error: --lora-rank 70000: give a number from 1 to 65536\n"),
        (("--lr", "1e300"), f"error: --lr 1e+300: give a number from 0 to {2**31 - 1}\n"),
        (("--lora-alpha", "nan"), "error: --lora-alpha nan: give a number above 0 to 2147483647\n"),
        (("--out", f"{__file__}/a/b"), f"error: --out {__file__}/a/b: {__file__} is a file, give "),
    ],
)
def test_wrong_flags_are_one_line(door, flags, said):
    code, text = door("sft", *flags)
    assert code == 2 and text.startswith(said) and text.count("\n") == 1, text


def numbers(config):
    """(group, field, its types) of each number of a config and of the configs inside it."""
    for field in fields(config):
        value, hint = getattr(config, field.name), get_type_hints(type(config))[field.name]
        if is_dataclass(value):
            yield from numbers(value)
        elif types := {int, float} & {hint, *get_args(hint)}:
            yield config, field.name, types


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_number_of_a_recipe_has_two_bounds(recipe):
    page = judged.recipe(recipe)
    needed = {f.name: "x" for f in fields(page.Config) if f.default is MISSING}
    for group, name, types in numbers(page.Config(**needed)):
        for value in (10**30, -(10**30), *((inf, nan) if float in types else ())):
            said = f"^--{name.replace('_', '-')} {value}: give a number (from|above) .* to "
            with pytest.raises(ValueError, match=said):
                check_config(replace(group, **{name: value}))


def test_colours_and_borders_of_a_box_are_left_out():
    """As on a terminal, where the text is also wrapped."""
    box = (
        "\x1b[31m╭─\x1b[0m \x1b[31mValue\x1b[0m error \x1b[31m──────╮\x1b[0m\n"
        "\x1b[31m│\x1b[0m \x1b[91;1mError\x1b[0m parsing --lr: no type matching    \x1b[31m│\x1b[0m\n"
        "\x1b[31m│\x1b[0m {None}|FLOAT could be instantiated from ['x']. \x1b[31m│\x1b[0m\n"
        "│                         │\n│ Got errors: │\n"
        "│ - <class 'NoneType'>: ['x'] does not match choices ('None',) │\n"
        "│ - <class 'float'>: could not convert string to float: 'x' │\n"
        "│ ───────── │\n│ Argument helptext: │\n│ --lr │\n╰─────────╯\n"
    )
    assert what_is_wrong(box) == "--lr 'x': could not convert string to float: 'x'"


def test_a_flag_of_two_words_says_so(door):
    code, text = door("multimodal", "--media-tokens", "a")
    assert code == 2 and text == (
        "error: --media-tokens 'a': input length 1 did not match expected argument count 2 of "
        "`STR STR`\n"
    )
