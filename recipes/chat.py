"""Talk to a model in the terminal; /reset forgets the dialogue, /quit (or end of input) ends it.

    python recipes/chat.py --run runs/sft
    python recipes/chat.py --model-path MODEL --temperature 0.7 --system-prompt "Answer in few words."

With --run, the model, the system prompt and the limits are those of the run that trained it (RUN/config.json), unless a flag says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from ta.chat.encode import encode_prompt
from ta.chat.messages import ANSWER
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.command_line import cli
from ta.folders import ModelConfig
from ta.generation.generate import generate
from ta.generation.settings import Ending, GenerateConfig, check_settings
from ta.model.load import load_for_inference
from ta.parallel import pick_device


@dataclass(frozen=True)
class Chat:
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    chat: ChatConfig = ChatConfig()
    generation: GenerateConfig = GenerateConfig()
    run: str | None = None
    """Folder of a training run: its final model, with the system prompt and chat settings that it was trained with."""


def main(config: Chat) -> None:
    check_settings(config.generation)
    config = of_run(config) if config.run else config
    tokenizer = load_chat_tokenizer(config.model, config.tokenizer, config.chat)
    loaded = load_for_inference(config.model, pick_device())
    settings = dataclasses.replace(
        config.generation, stop_strings=(*config.generation.stop_strings, *tokenizer.stop_strings)
    )
    ending = Ending(tokenizer.fast, frozenset(tokenizer.stop_ids), settings)
    messages: list[dict] = []
    print("/reset forgets the dialogue, /quit ends it", file=sys.stderr)
    while (question := ask()) is not None:
        if question == "/reset":
            messages = []
        elif question:
            messages.append({"role": "user", "content": question})
            printer = Printer(ending)
            try:
                prompt = encode_prompt(messages, tokenizer, config.chat)
                answer = generate(
                    loaded,
                    tokenizer.fast,
                    [prompt],
                    settings,
                    tokenizer.stop_ids,
                    on_token=printer,
                    keys=[len(messages)],
                )[0][0]
            except (
                ValueError,
                KeyboardInterrupt,
            ) as error:  # the dialogue goes on without this question
                messages.pop()
                print(
                    f"error: {error}" if isinstance(error, ValueError) else " (stopped)",
                    file=sys.stderr,
                )
                continue
            printer.end(answer.text)
            messages.append({"role": ANSWER, "content": answer.text})


def of_run(config: Chat) -> Chat:
    """The settings of a run where the flags leave them at their defaults."""
    path = Path(config.run) / "config.json"
    if not path.exists() or not (Path(config.run) / "final").is_dir():
        raise ValueError(
            f"--run {config.run} holds no config.json and final model: give the folder of a finished run, or --model-path"
        )
    trained = json.loads(path.read_text(encoding="utf-8"))["config"]

    def merged(given, key):
        """Fields of a settings object, those left at their default taken from the run."""
        known = {f.name: f.default for f in dataclasses.fields(given)}
        own = {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in trained.get(key, {}).items()
            if k in known
        }
        return dataclasses.replace(
            given, **{k: v for k, v in own.items() if getattr(given, k) == known[k]}
        )

    final = (
        str(Path(config.run) / "final")
        if config.model.model_path == ModelConfig.model_path
        else config.model.model_path
    )
    options = {
        name: getattr(merged(config.model, "model"), name)
        for name in ("dtype", "trust_remote_code")
    }
    model = dataclasses.replace(config.model, model_path=final, **options)
    return dataclasses.replace(config, model=model, chat=merged(config.chat, "chat"))


def ask() -> str | None:
    """The next line of the user; None at the end."""
    try:
        line = input("you: " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if line == "/quit" else line


class Printer:
    """Prints an answer as it grows, holding back what may still change: half a character, the beginning of a stop string."""

    def __init__(self, ending: Ending):
        self.ending, self.shown = ending, ""

    def __call__(self, prompt: int, number: int, ids: list[int]) -> None:
        text = self.ending.text(ids).rstrip("\ufffd")
        stops = self.ending.config.stop_strings
        held = max(
            (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
        )
        self.end(text[: len(text) - held], "")

    def end(self, text: str, close: str = "\n") -> None:
        if text.startswith(self.shown):
            print(text[len(self.shown) :], end=close, flush=True)
            self.shown = text


if __name__ == "__main__":
    cli(main, Chat)
