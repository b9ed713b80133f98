"""Talk to a model in the terminal; /help lists the commands, /quit (or end of input) ends it.

    python recipes/chat.py --run runs/sft
    python recipes/chat.py --model-path MODEL --temperature 0.7 --system-prompt "Be brief."

With --run, the model, the system prompt and the limits are those of the run that trained it
(RUN/config.json), unless a flag says otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ta
from ta.chat.encode import PROMPT, refuse_idle
from ta.printable import printable


@dataclass(frozen=True)
class Config:
    model: ta.ModelConfig = ta.ModelConfig()
    tokenizer: ta.TokenizerConfig = ta.TokenizerConfig()
    chat: ta.ChatConfig = ta.ChatConfig()
    generation: ta.GenerateConfig = ta.GenerateConfig()
    run: str | None = None
    """Folder of a training run: its final model, with the system prompt and chat settings that it
    was trained with."""


def of_run(config: Config) -> Config:
    """The settings of the run in --run where the flags leave them at their defaults."""
    if config.run is None:
        return config
    path, final = Path(config.run) / "config.json", Path(config.run) / "final"
    if not path.exists() or not final.is_dir():
        raise ValueError(
            f"--run {config.run} holds no config.json and final model: give the folder of a "
            "finished run, or --model-path"
        )
    try:
        trained = json.loads(path.read_text(encoding="utf-8"))["config"]
        chat = with_trained(config.chat, trained.get("chat", {}))
        like = with_trained(config.model, trained.get("model", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold the settings of a run: {error!r}") from error
    if like.trust_remote_code and not config.model.trust_remote_code:
        raise ValueError(
            f"--run {config.run} was trained with code that came with its model: add "
            "--trust-remote-code if you trust it"
        )
    model = dataclasses.replace(config.model, dtype=like.dtype)
    if model.model_path == ta.ModelConfig.model_path:
        model = dataclasses.replace(model, model_path=str(final))
    return dataclasses.replace(config, model=model, chat=chat)


def with_trained(config: Any, trained: dict[str, Any]) -> Any:
    """The config whose fields that are at their default have the values of a run."""
    changes = {}
    for field in dataclasses.fields(config):
        if field.name in trained and getattr(config, field.name) == field.default:
            value = trained[field.name]
            changes[field.name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(config, **changes)


HELP = """/system TEXT  another system prompt, in a new dialogue
/retry        answer the last question again, with another seed
/reset        forget the dialogue
/save FILE    write the dialogue as one line of JSON, a chat that sft.py reads
/quit         end"""


def ask() -> str | None:
    """The next line of the user; None at the end."""
    if sys.stdin is None:  # closed
        return None
    try:
        line = input("you: " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    # bytes that are no UTF-8 become U+FFFD
    line = line.encode(errors="surrogateescape").decode(errors="replace")
    return None if line == "/quit" else line


def obey(command: str, messages: list[dict]) -> list[dict]:
    """The dialogue after a command that starts with a slash.

    ValueError for one that does not exist or cannot be done.
    """
    word, _, text = command.partition(" ")
    if word == "/reset":
        return []
    if word == "/system" and text:
        return [{"role": "system", "content": text}]
    if word == "/retry":
        asked = [place for place, m in enumerate(messages) if m["role"] == "user"]
        if not asked:
            raise ValueError("/retry: nothing has been asked yet")
        return messages[: asked[-1] + 1]
    if word == "/save" and text:
        held = Path(text).read_bytes() if Path(text).exists() else b""
        if held and not held.endswith(b"\n"):
            raise ValueError(
                f"{text}: its last line has no end, so none can follow; give a new file"
            )
        ta.append_line(text, {"messages": messages}, durable=True)
        ta.parallel.tell(f"written to {text}")
        return messages
    if word != "/help":
        raise ValueError(f"{word}: no such command\n{HELP}")
    print(HELP, file=sys.stderr)
    return messages


class Printer:
    """Prints an answer as it grows.

    What may still change is held back: half a character, the beginning of a stop string.
    """

    def __init__(self, ending: ta.Ending):
        self.ending, self.shown = ending, ""

    def __call__(self, prompt: int, number: int, ids: list[int]) -> None:
        """Show what is sure of the answer whose ids so far are `ids`."""
        text = self.ending.text(ids).rstrip("\ufffd")
        stops = self.ending.config.stop_strings
        held = max(
            (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
        )
        self.end(text[: len(text) - held], "")

    def end(self, text: str, close: str = "\n") -> None:
        """Show the rest of `text`, and `close` after it."""
        if text.startswith(self.shown):
            print(printable(text[len(self.shown) :]), end=close, flush=True)
            self.shown = text


def main(config: Config) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history; some systems lack it)

    refuse_idle(config.chat, PROMPT.idle, "answers are generated and none is learned")
    config = ta.prefer_trained_builtin(of_run(config))
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat)
    model = ta.load_for_inference(config.model, ta.parallel.pick_device())
    settings = ta.with_stop_strings(config.generation, tokenizer.stop_strings)
    ending = ta.Ending(tokenizer.fast, frozenset(tokenizer.stop_ids), settings)
    chat, messages = config.chat, []
    tries = 0
    print("/help lists the commands, /quit ends the dialogue", file=sys.stderr)
    while (question := ask()) is not None:
        if not question:
            continue
        printer, asked = Printer(ending), [*messages, {"role": "user", "content": question}]
        try:
            if question.startswith("/"):
                messages = asked = obey(question, messages)
                if question.startswith("/system"):  # in place of the one of the flags
                    chat = dataclasses.replace(chat, system_prompt=None)
                if question != "/retry":
                    continue
                tries += 1
            prompt = ta.encode_prompt(asked, tokenizer, chat)
            answers = ta.generate(
                model,
                tokenizer.fast,
                [prompt],
                settings,
                tokenizer.stop_ids,
                on_token=printer,
                keys=[len(asked) + (tries << 20)],  # another seed for each question and retry
            )
        except (ValueError, OSError) as error:  # the dialogue goes on without this line
            ta.parallel.tell(f"error: {error}")
            continue
        except KeyboardInterrupt:
            print(" (stopped)", file=sys.stderr)
            continue
        text = answers[0][0].text
        printer.end(text)
        messages = [*asked, {"role": "assistant", "content": text}]


if __name__ == "__main__":
    ta.cli(main, Config)
