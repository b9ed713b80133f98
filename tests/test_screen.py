"""What a person sees: a bar and colours in a terminal, plain lines in a file, none where they are unwanted."""

import io
import sys

import pytest

from ta import screen
from ta.parallel import say
from ta.screen import columns, table, wrapped_page


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "variables", "kept"),
    [
        (Terminal, {}, True),
        (Terminal, {"NO_COLOR": ""}, True),
        (Terminal, {"NO_COLOR": "1"}, False),
        (Terminal, {"TERM": "dumb"}, False),
        (io.StringIO, {}, False),
    ],
)
def test_colours_go_to_terminals_that_have_and_want_them(stream, variables, kept, monkeypatch):
    for name, value in {"NO_COLOR": "", "TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    coloured = "\x1b[32mlear\nned\x1b[0m\x1b[2m, read\x1b[0m\x1b[33m{x}\n\x1b[0m"
    text = screen.shown(coloured, stream())
    assert text == (coloured if kept else "«lear\nned», read‹{x}⏎›\n")


def test_what_is_said_moves_no_cursor(capsys):
    say("\x1b[2Jname")
    assert capsys.readouterr().err == "\\x1b[2Jname\n"


def test_a_file_gets_lines_and_a_terminal_a_bar(monkeypatch):
    monkeypatch.setattr(screen, "LINE_EVERY", 0)
    for stream, ends in ((Terminal(), "\r"), (io.StringIO(), "\n")):
        monkeypatch.setattr(sys, "stderr", stream)
        with screen.progress(3, "train", "step", done=1) as bar:
            bar.set_postfix_str("loss 2", refresh=False)
            bar.update()
            bar.update()
        text = stream.getvalue()
        assert ends in text and "3/3" in text
        if ends == "\n":
            assert "\r" not in text and "train: 2/3 steps" in text and "loss 2" in text
            assert "━" not in text and "█" not in text


def test_nothing_is_shown_for_other_processes(monkeypatch):
    monkeypatch.setattr(screen, "LINE_EVERY", 0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with screen.progress(2, "train", "step", show=False) as bar:
        bar.update(2)
    assert sys.stderr.getvalue() == ""


def test_a_short_task_writes_no_line_of_progress_into_a_file(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with screen.progress(None, "reading", "record") as bar:
        bar.update(5)
    assert sys.stderr.getvalue() == ""


def test_a_table_fits_the_terminal_and_shows_both_ends_of_a_cell():
    text = "one two three four five six seven eight nine ten " * 9
    for width in (40, 100):
        shown = table([(text, "a\x1b[2J"), ("北京" * 30, "b")], ("question", "answer"), width)
        lines = shown.split("\n")
        assert (
            all(columns(line) <= width for line in lines) and max(map(columns, lines)) > 0.8 * width
        )
        assert lines[0].split() == ["question", "answer"] and set(lines[1]) == {"-", " "}
        assert (
            "\x1b" not in shown
            and ("…" in shown) == (width == 40)
            and lines[2].startswith("one two")
        )
    assert table([("a", "b")], ("x", "longer"), 40) == "x  longer\n-  ------\na  b"
    assert columns("北e\u0301") == 3


def test_rows_of_several_lines_stand_apart():
    assert table([("a\nb", "c"), ("d", "e")], ("x", "y"), 40) == "x  y\n-  -\na  c\nb\n\nd  e"


def test_a_page_is_wrapped_between_words_and_code_stays():
    code = "```sh\nta sft --data a-very-long-name.jsonl\n\nta chat\n```\n"
    text = f"# Title\n\nOne two three\nfour five `six-seven`.\n\n* first item here\n* second\n\n{code}\n"
    text += "| name | what it is |\n|---|---|\n| a | one two three four |\n\n    indented code that is long\n"
    assert wrapped_page(text, 20) == (
        "# Title\n\nOne two three four\nfive `six-seven`.\n\n* first item here\n* second\n\n"
        f"{code}\nname  what it is\n----  --------------\na     one two three\n      four\n\n"
        "    indented code that is long\n"
    )
    assert wrapped_page("* one two three four", 12) == "* one two\n  three four"


def test_a_line_is_wrapped_on_a_terminal_alone(monkeypatch):
    line = "step 10: " + ", ".join(f"figure_{n} 0.5" for n in range(6))
    assert screen.fitted(line) == line
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    lines = screen.fitted(line).split("\n")
    assert len(lines) > 1 and max(map(len, lines)) < 40
    assert " ".join(" ".join(lines).split()) == line
