"""The terminal dialogue: what is asked reaches the model as a dialogue, and commands change it."""

import io
import json

import judged
import pytest

from ta.builtin import fine_tuned
from ta.builtin.model_folders import tiny_folder
from ta.command_line import cli
from ta.printable import printable

FLAGS = ["--model-path", str(tiny_folder()), "--max-new-tokens", "3"]


@pytest.fixture
def talk(monkeypatch, capsys):
    """talk("line", ...) -> (the prompts as messages, what was printed, what was said)."""

    def start(*lines, flags=FLAGS):
        chat, asked = judged.recipe("chat"), []
        encode_prompt = chat.ta.encode_prompt

        def noted(messages, tokenizer, config):
            asked.append(([m | {} for m in messages], config.system_prompt))
            return encode_prompt(messages, tokenizer, config)

        monkeypatch.setattr(chat.ta, "encode_prompt", noted)
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr("sys.stdin", io.StringIO(text) if lines else None)
        with pytest.raises(SystemExit, match="0"):
            cli(chat.main, chat.Config, list(flags))
        out, err = capsys.readouterr()
        return asked, out, err

    return start


def roles(messages):
    return [m["role"][0] for m in messages]


def test_a_dialogue_grows_and_is_forgotten(talk):
    asked, out, _ = talk("cup red", "", "cup?", "/reset", "hat?", "/quit", "never asked")
    assert [roles(messages) for messages, _ in asked] == [["u"], ["u", "a", "u"], ["u"]]
    assert [messages[-1]["content"] for messages, _ in asked] == ["cup red", "cup?", "hat?"]
    assert printable(asked[1][0][1]["content"]) == out.splitlines()[0]


def test_a_closed_input_ends_the_dialogue(talk):
    assert talk()[0] == []


def test_bytes_that_are_no_utf_8_are_asked_as_a_sign_for_them(talk):
    """As Python reads them where the locale is C."""
    asked, _, _ = talk("cup \udce4")
    assert asked[0][0][-1]["content"] == "cup \ufffd"


def test_a_system_prompt_a_second_try_and_a_saved_chat(talk, tmp_path):
    file = tmp_path / "chats.jsonl"
    flags = [*FLAGS, "--system-prompt", "old", "--temperature", "5"]
    asked, out, err = talk(
        "/system be brief", "cup?", "/retry", f"/save {file}", "/save", "/help", flags=flags
    )
    (first, prompt), (again, _) = asked
    assert first == again and prompt is None
    assert roles(first) == ["s", "u"] and first[0]["content"] == "be brief"
    answers = out.splitlines()
    assert len(answers) == 2 and answers[0] != answers[1]
    saved = json.loads(file.read_text())
    *asked_again, answer = saved["messages"]
    assert asked_again == first and answer["role"] == "assistant"
    assert printable(answer["content"]) == answers[1]
    assert "error: /save: no such command" in err and err.count("/retry ") == 2


@pytest.mark.parametrize(
    ("line", "said"), [("/retry", "nothing has been asked"), ("/x", "no such")]
)
def test_what_cannot_be_is_said_and_the_dialogue_goes_on(talk, line, said):
    asked, _, err = talk(line, "cup?")
    assert said in err and len(asked) == 1


def test_a_file_that_ends_within_a_line_is_not_written_to(talk, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("one\ntwo")
    assert "its last line has no end" in talk("cup?", f"/save {notes}")[2]
    assert notes.read_text() == "one\ntwo"


def test_an_untrained_model_is_named_and_a_trained_one_used(monkeypatch, tmp_path, capsys):
    config = judged.recipe("chat").Config()
    monkeypatch.setattr(fine_tuned, "tuned_folder", lambda name: tmp_path / "none")
    assert fine_tuned.prefer_trained_builtin(config) == config
    assert "has learned nothing" in capsys.readouterr().err
    monkeypatch.setattr(fine_tuned, "tuned_folder", lambda name: tmp_path)
    assert fine_tuned.prefer_trained_builtin(config).model.model_path == "builtin-sft"
    assert str(tmp_path) in capsys.readouterr().err
