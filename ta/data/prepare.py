"""The prepared set: records encoded once, kept as memory-mapped arrays under the hash of what they were made from."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ta.chat.encode import Drop
from ta.chat.messages import with_system
from ta.chat.render import Tokens
from ta.chat.template import ChatConfig
from ta.data.jsonl import regular_file
from ta.data.sources import (
    Check,
    Drops,
    Record,
    Source,
    chunks,
    no_long_collections,
    parse_source,
    pin_errors,
    scan,
    select,
)
from ta.files import Column, cache_folder, content_hash, hash_json, open_arrays, open_or_make, stamp

if TYPE_CHECKING:
    from numpy import ndarray

FORMAT = 1  # of the files below; raise it when they change
PREPARE_VERSION = 1  # of what records become; raise it when the ids or weights of any record change


@dataclass(frozen=True)
class DataConfig:
    data: tuple[str, ...] = ()
    """Training sources: FILE.jsonl, FILE@0.1 (share), FILE@500 (count), FILE@500,offset=10,rows=100,system=TEXT. Default: built-in data."""
    val_data: tuple[str, ...] = ()
    """Evaluation sources, written alike."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A record that is wrong stops the run at its file and line, or is skipped, counted and written aside."""
    max_bad_share: float = 0.01
    """More skipped records than this share of all, or more pairs of equal answers, are an error again (0 to 1)."""
    cache_dir: str = ""
    """Where prepared data is kept. Default: $TA_CACHE, or ta in the user's cache folder."""


class Encoded(NamedTuple):
    """One record as k sequences (1 chat, 2 chosen and rejected) and numbers such as a label or a margin."""

    seqs: tuple[Tokens, ...]
    extras: dict[str, float] = {}  # noqa: RUF012 - a default nobody writes to
    media: Sequence[tuple[str, str]] | None = (
        None  # (modality, path) of its pictures and sounds in order; None where its kind has none
    )


class Prepared(NamedTuple):
    """n records of k sequences each, memory-mapped and read-only; sequence i is ids[offsets[i]:offsets[i + 1]]."""

    ids: ndarray  # (total,) int32
    weights: ndarray  # (total,) float32; not 0: a target, unshifted
    offsets: ndarray  # (n * k + 1,) int64
    origin: ndarray  # (n, 2) int32: index in info["sources"], 1-based line
    extras: dict[str, ndarray]  # (n,) float64 each
    info: dict[
        str, Any
    ]  # fingerprint, folder, cached, records, bad, tokens, learned_tokens, max_id, sources, drops, notes
    k: int
    media: tuple[ndarray, ndarray] | None = (
        None  # JSON bytes of all records' media, (n,) where those of each record end
    )


def sequence(prepared: Prepared, i: int) -> tuple[ndarray, ndarray]:
    """Views of the ids and weights of sequence i of n * k, each (T,)."""
    start, end = prepared.offsets[i], prepared.offsets[i + 1]
    return prepared.ids[start:end], prepared.weights[start:end]


def lengths(prepared: Prepared) -> ndarray:
    """(n,) tokens of each record, its k sequences together."""
    bounds = prepared.offsets[:: prepared.k]
    return bounds[1:] - bounds[:-1]


def prepare(
    sources: Sequence[str],
    check: Check,
    encode_many: Callable[[list[dict]], Sequence[Encoded | Drop]],
    settings: dict[str, Any],
    config: DataConfig,
    *,
    seed: int = 0,
    chat: ChatConfig | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Prepared:
    """Read, check and encode the sources, or open what an earlier run made of the same contents, choice and settings.

    `settings` (JSON values) names all that `encode_many` depends on: template, tokenizer, limits, method. `seed` chooses records where a
    source asks for a share or a count. Sources are ordered by their text, whatever order they are given in. ValueError for bad data,
    for a system prompt of a source beside one in `chat`, and when no record is left.
    """
    texts = sorted(sources)
    parsed = _parse(texts, config, chat)
    cache = cache_folder(config.cache_dir)
    stamps = [stamp(source.path) for source in parsed]
    hashes = [content_hash(source.path, cache / "hashes") for source in parsed]
    chosen = any(source.share is not None or source.count is not None for source in parsed)
    choices = [[content, *source[1:]] for content, source in zip(hashes, parsed, strict=True)]
    fingerprint = hash_json([FORMAT, choices, seed if chosen else None, settings])
    checked = [
        getattr(getattr(check, "func", check), "__name__", ""),
        repr(getattr(check, "keywords", "")),
    ]
    key = hash_json([fingerprint, checked, PREPARE_VERSION, _foreign_code(check, encode_many)])

    def make(beside: Path) -> dict:
        info = _build(beside, parsed, check, encode_many, config, seed) | {
            "fingerprint": fingerprint
        }
        if stamps != [stamp(source.path) for source in parsed]:
            raise ValueError(
                f"{', '.join(source.path for source in parsed)}: changed while being read; run again when it rests"
            )
        return info

    prepared, made = open_or_make(
        cache / "prepared" / key, lambda folder: _open(folder, parsed, texts, config), make, say
    )
    prepared.info["cached"] = not made
    return prepared


def read_drops(prepared: Prepared) -> Iterator[dict]:
    """What was not used: {"source" (index), "file", "line", "reason"}, and "text" for a bad line that was skipped."""
    with open(
        Path(prepared.info["folder"]) / "drops.jsonl", encoding="utf-8", errors="surrogateescape"
    ) as lines:
        for entry in map(json.loads, lines):
            yield entry | {"file": prepared.info["sources"][entry["source"]]["path"]}


def write_drops(prepared: Prepared, path: str) -> None:
    """Write {"file", "line", "reason", "text"?} of what was not used as JSONL, for the run folder."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        for entry in read_drops(prepared):
            file.write(
                json.dumps(
                    {key: entry[key] for key in entry if key != "source"}, ensure_ascii=False
                )
                + "\n"
            )


def report(info: dict[str, Any]) -> list[str]:
    """Lines for a person: what was taken from where, how much of it is learned, what was dropped and why."""
    share = 100 * info["learned_tokens"] / max(info["tokens"], 1)
    before = " (prepared before)" if info["cached"] else ""
    lines = [
        f"{info['records']:,} records, {info['tokens']:,} tokens, {share:.0f} % learned{before}"
    ]
    lines += [
        f"  {source['used']:,} of {source['records']:,} from {source['source']}"
        for source in info["sources"]
    ]
    for title, table in (("dropped", info["drops"]), ("note:", info["notes"])):
        lines += [
            f"  {title} {entry['count']:,}: {reason} ({', '.join(entry['first'])})"
            for reason, entry in table.items()
        ]
    return lines + [
        f"  note: {source['source']}: {source['remark']}"
        for source in info["sources"]
        if source["remark"]
    ]


def _parse(texts: Sequence[str], config: DataConfig, chat: ChatConfig | None) -> list[Source]:
    if not texts:
        raise ValueError("no data: no source was given; give --data FILE.jsonl")
    if not 0 <= config.max_bad_share <= 1:
        raise ValueError(f"--max-bad-share {config.max_bad_share}: a share lies in 0 to 1")
    parsed = [parse_source(text) for text in texts]
    for source in parsed:
        regular_file(source.path)
        if source.system_prompt and chat and (chat.system_prompt or chat.ignore_system_prompt):
            other = "--ignore-system-prompt" if chat.ignore_system_prompt else "--system-prompt"
            raise ValueError(
                f"{source.path}: has system={source.system_prompt!r} of its own beside {other}; give one of them"
            )
    return parsed


def _build(
    folder: Path,
    sources: list[Source],
    check: Check,
    encode_many: Callable,
    config: DataConfig,
    seed: int,
) -> dict:
    """Write the arrays and drops.jsonl of `folder` and give the info that goes with them."""
    from tqdm import tqdm

    kept = [select(source, seed) for source in sources]
    expected = sum(sum(keep) for keep, _ in kept)
    pause = 0.2 if sys.stderr.isatty() else 30  # seconds
    counts = {
        "tokens": 0,
        "learned_tokens": 0,
        "max_id": -1,
        "records": 0,
        "k": 0,
        "media_bytes": 0,
    }
    used = [0] * len(sources)
    with (
        no_long_collections(),
        open(folder / "drops.jsonl", "w", encoding="utf-8", errors="surrogateescape") as aside,
        tqdm(
            total=expected,
            desc="preparing",
            unit=" records",
            delay=1,
            mininterval=pause,
            leave=False,
            file=sys.stderr,
        ) as bar,
    ):
        drops = Drops(config.on_bad_record, config.max_bad_share, expected, aside)
        writers: dict[str, Column] = {}
        for index, (source, (keep, _)) in enumerate(zip(sources, kept, strict=True)):
            for chunk in chunks(scan(index, source, keep, check, drops)):
                done = []
                results = pin_errors(
                    encode_many,
                    [_with_system(record.data, source.system_prompt) for record, _ in chunk],
                )
                for (record, raw), result in zip(chunk, results, strict=True):
                    if isinstance(result, ValueError):
                        drops.bad_record(index, source.path, record.line, result, raw)
                    elif isinstance(result, Drop):
                        drops.drop(index, source.path, record.line, result.reason)
                    else:
                        done.append((record, result))
                if done:
                    _append(folder, writers, counts, done)
                used[index] += len(done)
                bar.update(len(chunk))
        for writer in writers.values():
            writer.close()
    if not counts["records"]:
        raise ValueError(
            f"{', '.join(source.path for source in sources)}: all {expected} records are dropped, nothing is left to use. By reason: {drops.table()}"
        )
    taken = [
        {"records": len(keep), "chosen": sum(keep), "used": used[i], "remark": remark}
        for i, (keep, remark) in enumerate(kept)
    ]
    return counts | {
        "expected": expected,
        "bad": drops.bad,
        "drops": drops.reasons(),
        "notes": drops.remarks(),
        "sources": taken,
    }


def _append(
    folder: Path,
    writers: dict[str, Column],
    counts: dict[str, int],
    done: list[tuple[Record, Encoded]],
) -> None:
    """Add the encoded records of one chunk to the columns, which the first chunk opens, and to the counts."""
    import numpy as np

    first = done[0][1]
    counts["k"] = counts["k"] or len(first.seqs)
    assert all(
        len(encoded.seqs) == counts["k"] and encoded.extras.keys() == first.extras.keys()
        for _, encoded in done
    )
    seqs = [tokens for _, encoded in done for tokens in encoded.seqs]
    sizes = np.array([len(tokens.ids) for tokens in seqs])
    assert sizes.min() > 0 and all(len(tokens.weights) == len(tokens.ids) for tokens in seqs)
    ids = np.fromiter(
        chain.from_iterable(tokens.ids for tokens in seqs), np.int32, sizes.sum()
    )  # (tokens of the chunk,)
    weights = np.fromiter(
        chain.from_iterable(tokens.weights for tokens in seqs), np.float32, sizes.sum()
    )
    columns = {
        "ids": ids,
        "weights": weights,
        "offsets": counts["tokens"] + np.cumsum(sizes, dtype=np.int64),
    }
    columns["origin"] = np.array([record[:2] for record, _ in done], np.int32)
    columns |= {
        f"extra-{name}": np.array([encoded.extras[name] for _, encoded in done], np.float64)
        for name in first.extras
    }
    if first.media is not None:
        texts = [json.dumps(encoded.media).encode() for _, encoded in done]
        columns["media"] = np.frombuffer(b"".join(texts), np.uint8)
        columns["media_ends"] = counts["media_bytes"] + np.cumsum(
            [len(text) for text in texts], dtype=np.int64
        )
        counts["media_bytes"] += len(columns["media"])
    if not writers:
        writers |= {
            name: Column(folder / f"{name}.npy", column.dtype, column.shape[1:])
            for name, column in columns.items()
        }
        writers["offsets"].append(np.zeros(1))
    assert writers.keys() == columns.keys()
    for name, column in columns.items():
        writers[name].append(column)
    counts["tokens"] += len(ids)
    counts["learned_tokens"] += int(np.count_nonzero(weights))
    counts["max_id"] = max(counts["max_id"], int(ids.max()))
    counts["records"] += len(done)


def _open(
    folder: Path, sources: list[Source], texts: list[str], config: DataConfig
) -> Prepared | str:
    """The prepared set in `folder` with places named by the sources of today, or why it is not one ("" if absent or too bad for `config`)."""
    found = open_arrays(folder)
    if isinstance(found, str):
        return found
    arrays, info = found
    if info["bad"] and (
        config.on_bad_record == "error" or info["bad"] > config.max_bad_share * info["expected"]
    ):
        return ""
    extras = {
        name.removeprefix("extra-"): array
        for name, array in arrays.items()
        if name.startswith("extra-")
    }
    for table in (info["drops"], info["notes"]):
        for entry in table.values():
            entry["first"] = [f"{sources[index].path}:{line}" for index, line in entry["first"]]
    for entry, source, text in zip(info["sources"], sources, texts, strict=True):
        entry |= {"source": text, "path": source.path}
    info["folder"] = str(folder)
    media = (arrays["media"], arrays["media_ends"]) if "media" in arrays else None
    return Prepared(
        *(arrays[name] for name in ("ids", "weights", "offsets", "origin")),
        extras,
        info,
        info["k"],
        media,
    )


def _with_system(data: dict, prompt: str | None) -> dict:
    keys = [key for key in ("messages", "context") if key in data] if prompt else []
    return data | {key: with_system(data[key], prompt) for key in keys}


def _foreign_code(*functions: Callable) -> list[str]:
    """Hashes of the files that checkers and encoders of the user's own stand in."""
    hashes = set()
    for function in functions:
        while isinstance(function, partial):
            function = function.func
        function = function if inspect.isroutine(function) else type(function)
        module = sys.modules.get(function.__module__)
        file = getattr(module, "__file__", None)
        if file and not function.__module__.startswith("ta."):
            hashes.add(hashlib.sha256(Path(file).read_bytes()).hexdigest())
    return sorted(hashes)
