"""The user's door: flags in, a recipe run, and wrong input answered without a traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import re
import select
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ta.files import causes, full_disk, keep_inputs
from ta.flags import docs_of, kind_of, settings_of, short_help, start_of, translate_flags
from ta.parallel import EXIT_CODES, close
from ta.printable import one_line
from ta.screen import COLOUR

WRONG_INPUT, NO_ROOM = 2, 3
MAKE_ROOM = (
    "free some and give the same command again, with --resume where it has that flag; what it had "
    "written before is kept"
)
NO_MEMORY = (
    "out of memory: lower --max-tokens-per-micro or --slots, give --activation-checkpointing or "
    "--adapter lora, or use more devices (--dry-run shows what each part takes)"
)


# what a number may be at most where its field says no less
MOST = 2**31 - 1
hints_of = cache(get_type_hints)
# the signals of Ctrl-C so far
INTERRUPTS: list[int] = []


class Range(NamedTuple):
    """What a number may be, written beside its field: `steps: Annotated[int, Range(1)] = 10`."""

    low: float = -MOST
    high: float = MOST
    below: float | None = None  # in place of `high`: a bound that is itself left out
    above: bool = False  # `low` itself is left out

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range; nan and the infinities lie in none."""
        reaches = value > self.low if self.above else value >= self.low
        return reaches and (value <= self.high if self.below is None else value < self.below)

    def __str__(self) -> str:
        start = f"above {self.low}" if self.above else f"from {self.low}"
        return f"{start} to {self.high}" if self.below is None else f"{start} to below {self.below}"


SEED = Range(0, 2**63 - 1)


def check_config(config: Any) -> None:
    """ValueError for the first value that is none of its field, here or in a config inside: of
    another type, or a number outside the range.

    A number without a Range has the widest. A config that has a method `check` is then asked what
    else cannot be.
    """
    if not dataclasses.is_dataclass(config):
        raise ValueError(f"{config!r:.60} is no settings; give such as ta.ModelConfig()")
    plain = hints_of(type(config))
    for name, hint in hints_of(type(config), include_extras=True).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            check_config(value)
        said = f"--{name.replace('_', '-')} {value}: give a"
        if not _is_of(value, plain[name]):
            raise ValueError(f"{said} value of {kind_of(plain[name])}")
        limits = [x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Range)]
        for limit in limits or [Range()]:
            if isinstance(value, Real) and not limit.holds(value):
                raise ValueError(f"{said} number {limit}")
    if hasattr(config, "check"):
        config.check()


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of the type of a field; numbers of numpy are numbers."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_is_of(item, parts[0]) for item in value)
    if parts:
        return any(_is_of(value, part) for part in parts)
    return isinstance(value, {int: Integral, float: Real}.get(kind, kind))


def cli(main: Callable[[Any], Any], config_class: type, argv: list[str] | None = None) -> None:
    """Parse flags into `config_class` (nested configs flattened), call `main(config)`, and exit.

    Exit codes: 0 done, 2 wrong input, 3 no room, no memory or no permission, 130/143 stopped by a
    signal. `TA_TRACEBACK=1` shows tracebacks.
    """
    doc = (sys.modules[main.__module__].__doc__ or "").strip()
    given = list(sys.argv[1:] if argv is None else argv)

    def run() -> None:
        if {"-h", "--help"} & set(given):
            print(short_help(config_class, doc), flush=True)
            return
        _check_names(config_class)
        words = translate_flags(given, config_class)
        if "--help-all" in words:
            words = ["--help"]
            _join_help(config_class)
        # only where it parses: it takes a fifth of a second to load
        import tyro

        flat, said = (tyro.conf.OmitArgPrefixes,), io.StringIO()
        prog = shlex.join(start_of(config_class))
        try:
            with contextlib.redirect_stderr(said):
                config = tyro.cli(config_class, prog=prog, description=doc, args=words, config=flat)
        except SystemExit as end:
            if end.code:
                raise ValueError(what_is_wrong(said.getvalue())) from None
            raise
        check_config(config)
        check_inputs(config)
        main(config)
        close()

    try:
        EXIT_CODES.append(guard(run))
    except SystemExit as end:
        EXIT_CODES.append(end.code or 0)
    raise SystemExit(EXIT_CODES[-1])


def what_is_wrong(box: str) -> str:
    """What tyro says of flags in a box of many lines, in one."""
    # a box of colours where stdout is a terminal
    lines = [line.strip(" │|") for line in COLOUR.sub("", box).splitlines()]
    # the first line is a title
    text = " ".join(re.sub("[─╭╰╮╯]+|-{4,}", " ", " ".join(lines[1:])).split())
    message, _, more = text.partition("Perhaps you meant:")
    message = re.split("Argument helptext:|For full helptext", message)[0].strip()
    wrong = re.match(r"Error parsing (--\S+): .*instantiated from \[(.*?)\]", message)
    message = re.sub(r"\[/?bold\]|<class '(\w+)'>", r"\1", message)
    reasons = re.findall(r"- (\w[\w\[\], ]*): (.*?)(?= - |$)", message)
    if wrong and (own := [why for kind, why in reasons if kind != "NoneType"]):
        message = f"{wrong[1]} {wrong[2]}: {own[-1]}"
    meant = re.findall(r"(?<!\S)--(?!no-|help)[a-z][a-z0-9-]+", more)
    # a help text may name what was given
    shown = ", ".join([flag for flag in dict.fromkeys(meant) if f"{flag}," not in message][:3])
    perhaps = f"; perhaps you meant {shown}" if shown else ""
    return message.removeprefix("Error parsing ") + perhaps


def check_inputs(config: Any) -> None:
    """ValueError where --out is, or holds, a file or folder that another flag names, or would lie
    in a file.
    """
    texts = {}
    for setting in settings_of(type(config), config):
        value = setting.default
        values = value if isinstance(value, tuple) else (value,)
        texts[setting.name] = [text for text in values if isinstance(text, str)]
    if out := texts.pop("out", [])[-1:]:
        for place in Path(out[0]).parents:
            if place.exists() and not place.is_dir():
                raise ValueError(f"--out {out[0]}: {place} is a file, give a place in a folder")
        given = list(chain(*texts.values()))
        # FILE@500 is a part of FILE
        keep_inputs(out[0], [*given, *(text.rpartition("@")[0] for text in given)])


def _check_names(config_class: type) -> None:
    """ValueError where two groups of a config have a field of one name, so one flag for both."""
    owners = {}
    for setting in settings_of(config_class):
        if setting.name in owners:
            raise ValueError(
                f"{config_class.__name__} has two fields {setting.name}, of "
                f"{owners[setting.name]} and of {setting.owner.__name__}: rename one of them"
            )
        owners[setting.name] = setting.owner.__name__


def _join_help(config_class: type) -> None:
    """Give each field, here and in configs inside, its docstring as help in one paragraph.

    tyro itself would keep the line breaks of the source, because continued lines are indented, and
    show None as the default of what is off, or has a default that its docstring tells.
    """
    from tyro.conf import arg

    docs, hints = docs_of(config_class), get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(field.default):
            _join_help(type(field.default))
        elif text := docs.get(field.name):
            shown = arg(help=text, help_behavior_hint=_default_in_help)
            config_class.__annotations__[field.name] = Annotated[hints[field.name], shown]


def _default_in_help(default: str) -> str:
    return "" if default in ("None", "") else f"(default: {default})"


def _interrupt(number: int, frame: Any) -> None:
    """Ctrl-C as Python takes it, but noted: an import that it broke raises another error."""
    INTERRUPTS.append(number)
    raise KeyboardInterrupt


def guard(action: Callable[[], Any]) -> int:
    """Run `action` and turn what a user can cause into a message and an exit code.

    What we caused stays a traceback.
    """
    with contextlib.suppress(AttributeError):  # a stream of the caller's
        sys.stdout.reconfigure(errors="backslashreplace")
    if os.environ.get("TA_TRACEBACK"):
        action()
        return 0
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # another thread than the main one
            signal.signal(signal.SIGINT, _interrupt)
    try:
        action()
    except (KeyboardInterrupt, Exception) as error:
        # a library may raise another error from it
        for stop in causes(error):
            if isinstance(stop, KeyboardInterrupt):
                # a terminal has written ^C, perhaps behind a bar
                return _say(f"stopped{stop}", 130, "\n" if sys.stderr.isatty() else "")
        if INTERRUPTS and isinstance(error, ImportError):
            return _say("stopped", 130, "")
        if full_disk(error):
            return _say(f"no room on the disk ({error}): {MAKE_ROOM}", NO_ROOM)
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 141
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        if isinstance(error, PermissionError):
            return _say(text, NO_ROOM)
        if isinstance(error, ValueError | OSError):
            code = NO_ROOM if getattr(error, "errno", 0) == errno.EROFS else WRONG_INPUT
            return _say(text, code)
        if "does not have a deterministic implementation" in text:
            return _say(f"{text.partition(', but')[0]}: leave --deterministic out", WRONG_INPUT)
        # torch has a type and words of its own, and is not loaded for an answer without it
        full = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text
        if isinstance(error, MemoryError) or full:
            return _say(NO_MEMORY, NO_ROOM)
        raise
    return 0


def _reader_is_gone() -> bool:
    """Whether who reads stdout, such as head, has closed it; what is left to write goes nowhere."""
    stdout = sys.stdout.fileno()
    asked = select.poll()
    asked.register(stdout)
    if gone := any(event & select.POLLERR for _, event in asked.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return gone


@contextlib.contextmanager
def when_stopped(kept: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C the last line on the screen says what `kept` gives: what is there, how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f": {kept()}") from None


def _say(text: str, code: int, kind: str = "error: ") -> int:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"[rank {rank}] "
    print(f"{where}{kind}{one_line(text)}", file=sys.stderr, flush=True)
    return code
