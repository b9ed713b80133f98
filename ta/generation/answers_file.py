"""A JSONL output that survives being killed: each object is appended as it is made, and the whole
is rewritten in order at the end.

Process r of w appends to `.NAME.part-r` beside the output and shares nothing with the others; the
last one to finish finds all objects there and publishes the file by one rename. Every object
carries a `key`, a hash of what it answers, by which a later run knows what it need not do again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path

from ta.chat.template import ChatConfig
from ta.chat.tokenizer import ChatTokenizer, tokenizer_settings
from ta.command_line import when_stopped
from ta.files import append_line, locked, read_json_lines, shares, write_jsonl
from ta.folders import ModelConfig, fingerprint, resolve
from ta.parallel import rank, tell, world
from ta.printable import masked
from ta.screen import progress


class AnswersFile:
    """An output file as this process sees it; opening it checks and changes nothing.

    ValueError where the file, or a part of it, exists and neither resume nor overwrite is asked.
    """

    def __init__(self, path: str | Path, resume: bool = False, overwrite: bool = False):
        self.path, self.resume, self.overwrite = Path(path), resume, overwrite
        self.rank, self.world = rank(), world()
        self.part = self.path.with_name(f".{self.path.name}.part-{self.rank}")
        if resume and overwrite:
            raise ValueError(
                "--resume goes on with an output and --overwrite deletes it: give one of the two"
            )
        if self.path.is_dir():
            raise ValueError(
                f"--out {path} is a folder: give a file, such as {self.path / 'answers.jsonl'}"
            )
        if resume or overwrite:
            if not _json_lines(self.path):
                raise ValueError(
                    f"--out {path} holds no JSON lines, so we did not write it: give another file"
                )
            return
        self._check_absent()
        if self._own_parts():
            raise ValueError(
                f"--out {path} was begun and not finished: give --resume to go on, "
                "or --overwrite to start anew"
            )

    def done(self, keys: Iterable[str]) -> dict[str, dict]:
        """{key: object} of those of `keys` that the file and its parts hold.

        Torn lines are left out; without `resume` nothing counts as done, for what is there is of
        another process of this command, or to be replaced. ValueError where they hold something
        else: answers to other records, or by other settings.
        """
        return self._read(keys, alone=True) if self.resume else {}

    def share(self, keys: Sequence[str], done: Iterable[str] = ()) -> list[int]:
        """The numbers of the objects that this process makes: every world-th that is not `done`."""
        done = set(done)
        return [i for i in range(self.rank, len(keys), self.world) if keys[i] not in done]

    @contextmanager
    def writing(self, total: int, name: str = "") -> Iterator[AnswersFile]:
        """Take the file for this process, which will `append` `total` objects; a bar shows them.

        What is to be replaced is deleted now. ValueError, and nothing is deleted, where another
        process is writing it, or has written it meanwhile.
        """
        with ExitStack() as stack:
            begun = {f"part-{_number(part)}" for part in self._parts()} | shares(self.path)
            mine = {name for name in begun if _number(name) % self.world == self.rank}
            for share in sorted(mine | {f"part-{self.rank}"}):
                stack.enter_context(locked(self.path, share=share))
            if self.rank == 0 and not (self.resume or self.overwrite):
                self._check_absent()
            if self.overwrite:
                for path in self._own_parts() + [self.path] * (self.rank == 0):
                    path.unlink(missing_ok=True)
            show = self.rank == 0 and total > 0
            self.bar = stack.enter_context(progress(total, name, "record", show=show))
            self.seconds, self.tokens, self.made = time.perf_counter(), 0, 0
            stack.enter_context(
                when_stopped(
                    lambda: (
                        f"{self.made:,} of {total:,} records are kept beside {self.path}; "
                        "the same command with --resume goes on"
                    )
                )
            )
            yield self

    def append(self, record: dict, tokens: int = 0) -> None:
        """Add an object, for which `tokens` were computed, within `writing`.

        A line torn by an earlier kill is cut off first.
        """
        append_line(self.part, record)
        self.made += 1
        self.tokens += tokens
        speed = self.tokens / (time.perf_counter() - self.seconds)
        self.bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def publish(self, keys: Sequence[str], done: Collection[str] = ()) -> bool:
        """Write the file in the order of `keys` and delete the parts, if all are there; else False.

        Then other processes are still at work. A line says how many records there are, and how many
        of them were `done` before. ValueError where what this one made is gone.
        """
        with locked(self.path, waiting=lambda: None):
            made = self._read(keys)
            if lost := [i for i in self.share(keys) if keys[i] not in made]:
                raise ValueError(
                    f"--out {self.path}: {len(lost)} of the records written here are gone, "
                    "another process has removed them: run again with --resume"
                )
            if len(made) < len(set(keys)):
                return False
            write_jsonl(self.path, (made[key] for key in keys))
            for part in self._parts():
                part.unlink(missing_ok=True)
        tell(f"{self.path}: {len(keys):,} records, {len(done):,} of them from before")
        return True

    def _check_absent(self) -> None:
        if self.path.exists():
            raise ValueError(
                f"--out {self.path} exists: give another file, --resume to add what is missing, "
                "or --overwrite to start anew"
            )

    def _read(self, keys: Iterable[str], alone: bool = False) -> dict[str, dict]:
        wanted, records = set(keys), {}
        for path in (self.path, *self._parts()):
            for record in read_json_lines(path):  # none where another process has just published it
                if record.get("key") in wanted:
                    records.setdefault(record["key"], record)
                elif alone:
                    raise ValueError(
                        f"--resume: {path} holds what was made of other data, another model or "
                        "other settings: give the same ones, another --out, or --overwrite to "
                        "start anew"
                    )
        return records

    def _own_parts(self) -> list[Path]:
        """The parts that this process answers for.

        Each part has one such process, whatever the number of processes that wrote them.
        """
        return [part for part in self._parts() if _number(part) % self.world == self.rank]

    def _parts(self) -> list[Path]:
        head = f".{self.path.name}.part-"
        found = self.path.parent.glob(f"{escape(head)}*")
        return sorted(path for path in found if path.name.removeprefix(head).isdigit())


def model_key(model: ModelConfig, tokenizer: ChatTokenizer, chat: ChatConfig) -> list:
    """What of a model decides its answers: weights, adapter, arguments, tokenizer, end tokens."""
    sources = resolve(model)
    settings = tokenizer_settings(tokenizer, chat)
    settings.pop("media", None)  # it names folders
    return [
        fingerprint(sources.base, model.hub),
        sources.adapter and fingerprint(sources.adapter),
        model.dtype,
        masked(model.model_args),
        settings,
        sorted(tokenizer.stop_ids),
    ]


def _number(part: Path | str) -> int:
    return int(str(part).rpartition("-")[2])


def _json_lines(path: Path) -> bool:
    """Whether a file is absent, empty, or begins with a JSON object on a line."""
    if not path.exists() or not path.stat().st_size:
        return True
    with open(path, "rb") as file:
        line = file.readline()
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
