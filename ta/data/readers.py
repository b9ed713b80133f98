"""Data files of every kind, read as numbered lines that each hold one JSON object.

JSON lines are streamed as they stand. Elements of a JSON list and rows of CSV, parquet and Arrow
files are written as JSON, so that choosing, hashing and checking know lines alone.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from ta.data.jsonl import MAX_LINE, Rows, read_lines, readable_text, regular_file
from ta.files import HUB, dataset_snapshot, json_text

# characters of a JSON list that are read at once, and rows of a parquet file
CHUNK, ROWS = 1 << 20, 1000
# folders below a dataset folder in which data files are looked for
DEPTH = 3
# parts of a folder that an error names
PARTS = 8
ENDINGS = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
# JSON files that describe a dataset
ABOUT = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# by the first bytes of a file, what pyarrow reads it as
ARROW_KINDS = {b"PAR1": "parquet", b"ARRO": "file", b"\xff\xff\xff\xff": "stream"}
# a list of messages as Python writes it, which `to_csv` of datasets and pandas puts into a cell
PYTHON_MESSAGES = re.compile(r"\[?\{'(role|content|from|value)': ")
# columns of a CSV file whose cells are JSON; all others are text
JSON_COLUMNS = (
    *("messages", "conversations", "context", "answer_w", "answer_l", "answers", "rewards"),
    *("tools", "documents", "chat_template_kwargs", "history", "gold"),
    *("label", "is_desirable", "kto_tag", "precomputed_margin", "margin"),
)


def files_of(path: str) -> list[str]:
    """The files behind the path of a source, in the order in which their records are numbered.

    A path names a file, a folder of data files of one split (also as `save_to_disk` of datasets
    writes it), `FOLDER/SPLIT`, or one of these on the hub, `hf:OWNER/NAME` or
    `hf:OWNER/NAME/SPLIT`. ValueError where nothing is there, and for a folder of several splits.
    """
    root, split = path, ""
    if path.startswith(HUB):
        *name, split = (*path.removeprefix(HUB).split("/", 2), "", "")[:3]
        root = dataset_snapshot("/".join(filter(None, name)))
        if (Path(root) / split).exists():
            root, split = str(Path(root) / split), ""
    elif not os.path.exists(path):
        root, _, split = path.rstrip("/").rpartition("/")
    if not os.path.isdir(root):
        file = root if path.startswith(HUB) else path
        regular_file(file)
        return [file]
    groups = _groups(Path(root))
    named = {name for name in groups if split in ("", name) or name.endswith("/" + split)}
    if len(named) == 1:
        files = groups[named.pop()]
        endings = {_ending(file) for file in files}
        if len(endings) > 1:
            raise ValueError(
                f"{path}: holds {', '.join(sorted(endings))} files, perhaps the same records "
                "twice; give one of the files, or a folder of one kind"
            )
        return files
    if groups and (not split or path.startswith(HUB)):
        some = list(groups)[:PARTS]
        choices = " or ".join(f"{path.removesuffix('/' + split)}/{name}" for name in some)
        raise ValueError(f"{path}: holds {len(groups)} parts; give one of them, {choices}")
    if split:
        regular_file(path)
    raise ValueError(f"{path}: is a directory without data files; give {' or '.join(ENDINGS[:5])}")


def _raise(error: OSError) -> None:
    raise error


def _groups(root: Path) -> dict[str, list[str]]:
    """The data files of a folder by split: {"train": [...]}, {"en/train": [...], ...}.

    A split is what stands before the number of a shard, or a word such as `train` in a file's name,
    below the file's folder (the naming that the hub's own reader, `datasets`, understands).
    """
    groups: dict[str, list[str]] = {}
    for folder, below, names in os.walk(root, onerror=_raise):
        here = Path(folder)
        parts = here.relative_to(root).parts
        hidden = [name for name in below if name.startswith(".")]
        below[:] = sorted({*below} - {*hidden}) if len(parts) < DEPTH else []
        if "state.json" in names:
            groups["/".join(parts) or "."] = _listed(here / "state.json")
            continue
        for name in sorted(names):
            if name.endswith(ENDINGS) and not name.startswith(".") and name not in ABOUT:
                key = "/".join(filter(None, (*parts, _split(name)))) or "."
                groups.setdefault(key, []).append(str(here / name))
    return groups


def _listed(state: Path) -> list[str]:
    """The files that the state.json of a saved data set names, all of them beside it."""
    try:
        names = [entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
        return [str(state.parent / Path(name).name) for name in names]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{state}: not what datasets' save_to_disk writes ({error!r}); save the data set again"
        ) from None


def _split(name: str) -> str:
    stem = name.partition(".")[0]
    if shard := SHARD.match(stem):
        return shard[1]
    words = re.split(r"[^a-z0-9]+", stem.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def _ending(file: str) -> str:
    return max((ending for ending in ENDINGS if file.endswith(ending)), key=len, default="")


# the path that takes the place of bytes in a table, and of the name that stands beside them
Keep = Callable[[bytes], str]


def read_rows(path: str, keep: Keep | None = None) -> Rows:
    """Stream (1-based number, JSON bytes) of the records of a source's path.

    The number is that of the line where a record begins in JSON and CSV files, and of the row in
    parquet and Arrow files; in a folder it goes on from file to file. What a file is, its first
    bytes tell, or for CSV its name. `keep` takes the bytes of pictures and sounds in parquet and
    Arrow files and gives the path that stands in their place. ValueError for a file that cannot be
    read, and for one without records.
    """
    number = 0
    for file in files_of(path):
        before = number
        for place, raw in _reader(file, keep, path)(file):
            number = before + place
            yield number, raw
    if not number:
        raise ValueError(f"{path}: empty, no record in it; give one with records")


def _reader(file: str, keep: Keep | None, source: str) -> Callable[[str], Rows]:
    regular_file(file)
    if file.endswith((".csv", ".csv.gz")):
        return _csv_rows
    with open(file, "rb") as start:
        kind = ARROW_KINDS.get(start.read(4))
    if kind:
        return partial(_arrow_rows, kind=kind, keep=keep, source=source)
    return _list_rows if _is_list(file) else read_lines


def _is_list(file: str) -> bool:
    """Whether the first sign in a JSON file opens a list."""
    opened = gzip.open if file.endswith(".gz") else open
    # read_lines says what is wrong
    with suppress(EOFError, gzip.BadGzipFile, zlib.error), opened(file, "rb") as start:
        while block := start.read(4096).removeprefix(b"\xef\xbb\xbf"):
            if block := block.lstrip():
                return block.startswith(b"[")
    return False


def _opened(path: str, newline: str | None = None) -> IO[str]:
    """The text of a file, with its line ends as they are where `newline` is ""."""
    opened = gzip.open if path.endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig", newline=newline)


def _list_rows(path: str) -> Rows:
    """(line where it begins, JSON bytes) of each element of a JSON list; it is never held whole."""
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"\s*,?\s*")
    line, fault = 1, ""
    with readable_text(path, lambda: line), _opened(path) as file:
        text = file.read(CHUNK)
        start = text.index("[") + 1
        line += text.count("\n", 0, start)
        while True:
            at = gap.match(text, start).end()
            line, start = line + text.count("\n", start, at), at
            if text.startswith("]", start):
                break
            end = start
            try:
                end = decode(text, start)[1]
            except (ValueError, RecursionError) as error:
                fault = getattr(error, "msg", str(error)).removesuffix(" at")
            if start < end < len(text):
                yield line, text[start:end].encode()
                line, start = line + text.count("\n", start, end), end
            elif len(text) - start > MAX_LINE:
                raise ValueError(
                    f"{path}:{line}: no element of the list ends within 32 MiB from here "
                    f"({fault}); give a list of objects"
                )
            elif more := file.read(max(CHUNK, len(text) - start)):
                text, start = text[start:] + more, 0
            else:
                raise ValueError(
                    f"{path}:{line}: the JSON list ends here before its ] ({fault or 'cut'}); "
                    "give the whole file"
                )
        if (text[start + 1 :] + file.read(CHUNK)).strip():
            raise ValueError(
                f"{path}:{line}: more text stands behind the ] of the list; give one list, or "
                "one object a line"
            )


def _csv_rows(path: str) -> Rows:
    """(line where it begins, JSON bytes) of each row of a CSV file whose first row has the names.

    Cells are text; those of JSON_COLUMNS are JSON where they are (numbers, true, lists), and null
    where they are empty.
    """
    csv.field_size_limit(MAX_LINE)
    line = 1
    try:
        with readable_text(path, lambda: line), _opened(path, newline="") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            if len({*names}) < len(names):
                raise ValueError(f"{path}:1: two columns have one name; give each its own")
            line = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(names):
                    raise ValueError(
                        f"{path}:{line}: {len(row)} cells under {len(names)} names; put quotes "
                        "around cells with commas or line ends"
                    )
                if any(map(PYTHON_MESSAGES.match, row)):
                    raise ValueError(
                        f"{path}:{line}: a cell holds messages as Python writes them, which is no "
                        "JSON; save the records as .jsonl or .parquet"
                    )
                if row:
                    cells = zip(names, row, strict=True)
                    yield line, as_line({name: _cell(name, cell) for name, cell in cells})
                line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: not sound CSV ({error}); save it again") from None


def _cell(name: str, cell: str) -> Any:
    if name not in JSON_COLUMNS:
        return cell
    if not cell:
        return None
    try:
        return json.loads(cell.lower() if cell in ("True", "False") else cell)
    except (ValueError, RecursionError):
        return cell


def _arrow_rows(path: str, kind: str, keep: Keep | None, source: str) -> Rows:
    """(row from 1, JSON bytes) of the rows of a parquet or Arrow file of a source.

    Rows of such files have every key that some row has. A key that is null is therefore left out,
    at any depth (`content` excepted), as is a number that is not there (NaN). Values of the type
    arrow.json, which datasets gives to columns of mixed types, are what their text holds.
    """
    try:
        import pyarrow as pa
        from pyarrow import ipc, parquet
    except ImportError:
        raise ValueError(
            f"{path}: parquet and Arrow files are read with pyarrow, which is not installed; "
            "give pip install pyarrow, or save the records as .jsonl"
        ) from None
    number, some = 0, 16 if keep else ROWS
    try:
        if kind == "parquet":
            batches = parquet.ParquetFile(path).iter_batches(batch_size=ROWS)
        elif kind == "stream":
            batches = iter(ipc.open_stream(pa.memory_map(path)))
        else:
            file = ipc.open_file(pa.memory_map(path))
            batches = map(file.get_batch, range(file.num_record_batches))
        for batch in batches:
            coded = {field.name: _coded(field.type) for field in batch.schema}
            for start in range(0, len(batch), some):
                for row in batch.slice(start, some).to_pylist():
                    number += 1
                    yield number, as_line(_decoded(_present(row, keep), coded))
    except TypeError as error:
        raise ValueError(
            f"{path}:{number}: {error}; ta convert {source} OUT saves pictures and sounds as files"
        ) from None
    except (pa.ArrowException, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a sound {kind} file ({why}); write it again") from None


def _present(value: Any, keep: Keep | None) -> Any:
    """The value without null keys, and with paths for bytes if `keep`, at any depth."""
    if isinstance(value, list):
        return [_present(item, keep) for item in value]
    if keep and isinstance(value, bytes):
        return keep(value)
    if not isinstance(value, dict):
        return value
    if keep and value.keys() == {"bytes", "path"} and value["bytes"] is not None:
        return keep(value["bytes"])
    return {
        key: _present(item, keep)
        for key, item in value.items()
        if (item is not None or key == "content")
        and not (isinstance(item, float) and math.isnan(item))
    }


def _coded(kind: Any) -> Any:
    """Where JSON text stands in values of an Arrow type: True (the value), {key: where} of a
    struct, [where] of a list; None where there is none."""
    if getattr(kind, "extension_name", "") == "arrow.json":
        return True
    if hasattr(kind, "value_type"):
        return [inside] if (inside := _coded(kind.value_type)) else None
    fields = {field.name: _coded(field.type) for field in getattr(kind, "fields", ())}
    return fields if any(fields.values()) else None


def _decoded(value: Any, coded: Any) -> Any:
    """The value with what its JSON text holds, in the places `coded`."""
    if value is None or not coded:
        return value
    if coded is True:
        return json.loads(value)
    if isinstance(coded, list):
        return [_decoded(item, *coded) for item in value]
    return {key: _decoded(item, coded.get(key)) for key, item in value.items()}


def as_line(row: dict) -> bytes:
    """A record as JSON; values of numpy are numbers and lists, times are text, NaN is null.

    TypeError for bytes.
    """
    text = json_text(row, ensure_ascii=False, default=_plain)
    return text.encode(errors="backslashreplace")


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        raise TypeError("a cell holds bytes, which are no text")
    return value.tolist() if hasattr(value, "tolist") else str(value)
