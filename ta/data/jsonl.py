"""JSONL files, read line by line: a line is an object, and each error names file and line."""

from __future__ import annotations

import errno
import gzip
import json
import math
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# (number from 1, JSON bytes) of the records of a file
Rows = Iterator[tuple[int, bytes]]
# bytes
MAX_LINE = 32 << 20


class BadRecord(ValueError):
    """An error of one record.

    `reason` is short, so that equal reasons can be counted. `unusable` marks a well-formed record
    from which nothing can be learned.
    """

    def __init__(self, reason: str, message: str, unusable: bool = False):
        super().__init__(message)
        self.reason, self.unusable = reason, unusable


def regular_file(path: str | Path, give: str = "give a .jsonl or .jsonl.gz file") -> os.stat_result:
    """The stat of a file that can be read as data. It is not opened: a pipe would block.

    ValueError for a missing file, a directory, a pipe or device, and text that is no path; it ends
    in `give`, what the user should do.
    """
    name = str(path)
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            return status
        why = "is not a regular file (a pipe, socket or device), which cannot be read twice"
        if stat.S_ISDIR(status.st_mode):
            why = "is a directory"
    except (FileNotFoundError, NotADirectoryError):
        why = f"no such file (seen from {os.getcwd()})"
    except ValueError:
        name, why = repr(name[:200]), "not a path"
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        name, why = name[:200], f"cannot be opened ({error.strerror})"
    raise ValueError(f"{name}: {why}; {give}")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """A ValueError says in front what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


@contextmanager
def readable_text(path: str, line: Callable[[], int]) -> Iterator[None]:
    """ValueError, with the line that is read, for a file that is no UTF-8 or no sound gzip.

    OSError, with the file's name, where it cannot be read.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{line()}: not UTF-8 near here (0x{error.object[error.start]:02x}); save the "
            "file as UTF-8"
        ) from None
    except EOFError:
        raise ValueError(
            f"{path}:{line()}: the gzip file ends before its end mark (a cut download?); give the "
            "whole file"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}:{line()}: not sound gzip ({error}); give a whole file, or a plain one without "
            ".gz"
        ) from None
    except OSError as error:
        # what fails while a file is read names none
        raise type(error)(error.errno, error.strerror, error.filename or path) from None


def read_lines(path: str) -> Rows:
    """Stream (1-based line, bytes) of the lines that are not blank.

    A line over MAX_LINE is cut to its first MAX_LINE + 1 bytes. ValueError for a file that cannot
    be read at all: missing, a directory or pipe, empty, or a damaged or cut gzip stream.
    """
    number = filled = 0
    regular_file(path)
    opened = gzip.open if str(path).endswith(".gz") else open
    with readable_text(path, lambda: number + 1), opened(path, "rb") as file:
        while raw := file.readline(MAX_LINE + 1):
            part = raw
            while len(part) > MAX_LINE and not part.endswith(b"\n"):
                part = file.readline(MAX_LINE + 1)
            number += 1
            if raw.strip():
                filled += 1
                yield number, raw.rstrip(b"\r\n")
    if not filled:
        raise ValueError(f"{path}: empty, no record in it; give a file with one JSON object a line")


def _refuse_constant(name: str) -> None:
    raise BadRecord(
        "not a finite number",
        f"{name} is not a JSON number; give a finite number or leave the key out",
    )


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _refuse_constant(text)


def _single_keys(pairs: list[tuple[str, Any]]) -> dict:
    data = dict(pairs)
    if len(data) < len(pairs):
        (twice, _) = Counter(key for key, _ in pairs).most_common(1)[0]
        raise BadRecord(
            "key given twice",
            f"key {twice!r} stands twice in one object, so one of its values would be lost; keep "
            "one",
        )
    return data


_decode = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_single_keys
).decode


def parse_record(raw: bytes) -> dict:
    """The JSON object of one line.

    BadRecord for a line that is no object. A key that is given twice is refused, because JSON would
    silently keep the last value.
    """
    if len(raw) > MAX_LINE:
        raise BadRecord(
            "line over 32 MiB",
            "the line is over 32 MiB, surely no single record; give one JSON object a line",
        )
    if raw.startswith(b"\xef\xbb\xbf"):
        raise BadRecord(
            "byte order mark",
            "the line starts with a byte order mark; save the file as UTF-8 without BOM",
        )
    try:
        text = raw.decode()
        data = _decode(text)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(data, ensure_ascii=False).encode()
    except BadRecord:
        raise
    except json.JSONDecodeError as error:
        near = text[max(error.pos - 20, 0) : error.pos + 20]
        message = (
            f"not JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}, near {near!r}; "
            "give one JSON object a line"
        )
        raise BadRecord("not JSON", message) from None
    except UnicodeDecodeError as error:
        raise BadRecord(
            "not UTF-8",
            f"byte {error.start + 1} of the line is not UTF-8 (0x{raw[error.start]:02x}); save the "
            "file as UTF-8",
        ) from None
    except UnicodeEncodeError:
        raise BadRecord(
            "lone surrogate",
            "a lone surrogate (\\uD800-\\uDFFF without its other half) is no character; give valid "
            "text",
        ) from None
    except RecursionError:
        raise BadRecord(
            "nested too deep", "the JSON is nested too deep to be a record; give flat records"
        ) from None
    except ValueError:
        raise BadRecord(
            "not a usable number",
            "a whole number has thousands of digits; give a smaller one, or text",
        ) from None
    if not isinstance(data, dict):
        raise BadRecord(
            "not an object",
            f"the line holds {named(data)}, not an object; give one {{...}} a line, no list around "
            "them",
        )
    return data


def named(value: object) -> str:
    """The type of a JSON value in words, for an error."""
    return {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }.get(type(value), "a number")
