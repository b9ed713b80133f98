"""Prepared data: records encoded once and kept as memory-mapped arrays.

They lie in the cache under a hash of all that they were made from.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ta.chat.encode import (
    AS_CONFIGURED,
    EQUAL,
    ONE_ANSWER,
    Drop,
    Rule,
    drop_equal,
    encode_dialogues,
    with_answers,
)
from ta.chat.messages import Chat, with_system
from ta.chat.render import Tokens, show
from ta.chat.tokenizer import tokenizer_settings
from ta.data.jsonl import parse_record, read_lines, regular_file
from ta.data.records import check_chat, check_class, check_labelled, check_pair, check_question
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
from ta.files import (
    Column,
    cache_folder,
    content_hash,
    hash_json,
    made_once,
    open_arrays,
    stamp,
    write_manifest,
)
from ta.parallel import say as say_once

if TYPE_CHECKING:
    from numpy import ndarray

    from ta.chat.template import ChatConfig
    from ta.chat.tokenizer import ChatTokenizer

FORMAT = 1  # of the files below; raise it when they change
PREPARE_VERSION = 1  # of what records become; raise it when the ids or weights of any record change


@dataclass(frozen=True)
class DataConfig:
    data: tuple[str, ...] = ()
    """Training sources: FILE.jsonl, FILE@0.1 (share), FILE@500 (count),
    FILE@500,offset=10,rows=100,system=TEXT. Default: built-in data."""
    val_data: tuple[str, ...] = ()
    """Evaluation sources, written alike."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A record that is wrong stops the run at its file and line, or is skipped, counted and written
    aside."""
    max_bad_share: float = 0.01
    """More skipped records than this share of all, or more pairs of equal answers, are an error
    again (0 to 1)."""
    cache_dir: str = ""
    """Where prepared data is kept. Default: $TA_CACHE, or ta in the user's cache folder."""


class Kind(NamedTuple):
    """What records of a kind are and which sequences a method learns from one."""

    # in the name of what is prepared
    name: str
    # the record in its canonical form; BadRecord says what is wrong with it
    check: Check
    # the record's dialogues, which differ in their last message only; each becomes a sequence
    dialogues: Callable[[dict, ChatTokenizer], list[Chat]]
    rule: Rule = AS_CONFIGURED
    # numbers of the record that the method needs, such as a label
    extras: Callable[[dict], dict[str, float]] | None = None
    # whether a dialogue without an answer is of use where every message is learned; `check` then
    # takes `need_answer`
    answer_optional: bool = False
    # False: no token is learned, an extra is
    learned: bool = True
    # whether two dialogues with the same tokens teach nothing
    distinct: bool = False
    # (modality, path) of those of the record's pictures and sounds that stand in the token ids;
    # (record, ids, tokenizer, whether the latest messages stayed)
    media: Callable[[dict, list[int], ChatTokenizer, bool], Sequence[tuple[str, str]]] | None = None


def chat_of(record: dict, tokenizer: ChatTokenizer) -> list[Chat]:
    """The record's messages as one dialogue."""
    return [record["messages"]]


def pair_of(record: dict, tokenizer: ChatTokenizer) -> list[Chat]:
    """The context with the chosen and with the rejected answer."""
    return with_answers(record["context"], (record["answer_w"], record["answer_l"]))


def labelled_of(record: dict, tokenizer: ChatTokenizer) -> list[Chat]:
    """The context with its one answer."""
    return with_answers(record["context"], (record["answer"],))


def unweighted_of(record: dict, tokenizer: ChatTokenizer) -> list[Chat]:
    """The record's messages without weights of their own."""
    return [[{k: m[k] for k in m if k != "loss"} for m in record["messages"]]]


def margin_of(record: dict) -> dict[str, float]:
    """The margin of a pair; NaN where none is given."""
    return {"margin": record.get("precomputed_margin", math.nan)}


def desirable_of(record: dict) -> dict[str, float]:
    """1 for a desirable answer, 0 for another."""
    return {"desirable": float(record["is_desirable"])}


def label_of(record: dict) -> dict[str, float]:
    """The number of the record's class."""
    return {"label": float(record["label"])}


CHATS = Kind("chat", check_chat, chat_of, answer_optional=True)
PAIRS = Kind("pair", check_pair, pair_of, ONE_ANSWER, margin_of, distinct=True)
LABELLED = Kind("labelled", check_labelled, labelled_of, ONE_ANSWER, desirable_of)
# whole dialogues: cutting keeps what fits, answer or not, and the label is what is learned
CLASSES = Kind("class", check_class, unweighted_of, Rule("all"), label_of, learned=False)
# without passages; the last question stays: it is what is searched for
QUESTIONS = Kind("question", check_question, chat_of, Rule(keep_end=True))
KINDS = {kind.name: kind for kind in (CHATS, PAIRS, LABELLED, CLASSES, QUESTIONS)}


class Encoded(NamedTuple):
    """One record as k sequences (1 chat, 2 chosen and rejected) with its extras and media."""

    seqs: Sequence[Tokens]
    extras: dict[str, float]
    # (modality, path) of its pictures and sounds in order; None where its kind has none
    media: Sequence[tuple[str, str]] | None = None


class Prepared(NamedTuple):
    """n records of k sequences each, memory-mapped and read-only.

    Sequence i is ids[offsets[i]:offsets[i + 1]].
    """

    ids: ndarray  # (total,) int32
    weights: ndarray  # (total,) float32; not 0: a target, unshifted
    offsets: ndarray  # (n * k + 1,) int64
    origin: ndarray  # (n, 2) int32: index in info["sources"], 1-based line
    extras: dict[str, ndarray]  # (n,) float64 each
    # fingerprint, folder, cached, records, bad, tokens, learned_tokens, max_id, sources, drops,
    # notes
    info: dict[str, Any]
    k: int
    # JSON bytes of all records' media, and (n,) where those of each record end
    media: tuple[ndarray, ndarray] | None = None
    # what a record of the files is checked with
    check: Check | None = None
    # (n, 2) reference log-probabilities, where they were computed beforehand
    reference: Any = None


def sequence(prepared: Prepared, i: int) -> tuple[ndarray, ndarray]:
    """Views of the ids and weights of sequence i of n * k, each (T,)."""
    start, end = prepared.offsets[i], prepared.offsets[i + 1]
    return prepared.ids[start:end], prepared.weights[start:end]


def lengths(prepared: Prepared) -> ndarray:
    """(n,) tokens of each record, its k sequences together."""
    bounds = prepared.offsets[:: prepared.k]
    return bounds[1:] - bounds[:-1]


def prepare(
    files: Sequence[str],
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    data: DataConfig,
    seed: int = 0,
    *,
    kind: Kind = CHATS,
    say: Callable[[str], None] = say_once,
) -> Prepared | None:
    """Read, check and encode files of records, or open what an earlier run made of the same.

    `files` may name a choice of their records (`parse_source`); they are read in the order of
    their text, whatever order they are given in. `seed` chooses records where a share or a count
    is asked for. Returns None where `files` is empty. ValueError for bad data, for a system prompt
    of a file beside one in `chat`, and when no record is left.
    """
    if not files:
        return None
    texts = sorted(files)
    sources = _parse(texts, data, chat)
    cache = cache_folder(data.cache_dir)
    stamps = [stamp(source.path) for source in sources]
    hashes = [content_hash(source.path, cache / "hashes") for source in sources]
    chosen = any(source.share is not None or source.count is not None for source in sources)
    choices = [[content, *source[1:]] for content, source in zip(hashes, sources, strict=True)]
    settings = {"method": kind.name} | tokenizer_settings(tokenizer, chat)
    fingerprint = hash_json([FORMAT, choices, seed if chosen else None, settings])
    key = hash_json([fingerprint, PREPARE_VERSION, _kind_settings(kind)])
    check = kind.check
    if kind.answer_optional and chat.loss_on == "all":
        check = partial(check, need_answer=False)
    folder, made = cache / "prepared" / key, False
    opened = partial(_open, folder, sources, texts, data)
    if isinstance(prepared := opened(), str):
        with made_once(folder, opened, say) as aside:
            if made := aside is not None:
                info = _build(aside, sources, tokenizer, chat, data, seed, kind, check)
                if stamps != [stamp(source.path) for source in sources]:
                    raise ValueError(
                        f"{', '.join(source.path for source in sources)}: changed while being "
                        "read; run again when it rests"
                    )
                write_manifest(aside, info | {"fingerprint": fingerprint})
        if isinstance(prepared := opened(), str):
            raise OSError(f"{folder}: what was just written cannot be read ({prepared})")
    prepared.info["cached"] = not made
    _check_equal(prepared.info, data)
    return prepared._replace(check=check)


prepare_chats = partial(prepare, kind=CHATS)
prepare_pairs = partial(prepare, kind=PAIRS)
prepare_labelled = partial(prepare, kind=LABELLED)
prepare_classes = partial(prepare, kind=CLASSES)
prepare_questions = partial(prepare, kind=QUESTIONS)


def first_records(prepared: Prepared | None, n: int) -> list[dict]:
    """The first n of the records that were prepared, read again from their files and checked.

    [] for no data.
    """
    if prepared is None:
        return []
    records = []
    places = prepared.origin[:n].tolist()
    for index, group in groupby(places, key=lambda place: place[0]):
        lines = {line for _, line in group}
        for line, raw in read_lines(prepared.info["sources"][index]["path"]):
            if line in lines:
                records.append(prepared.check(parse_record(raw)))
            if line >= max(lines):
                break
    return records


def preview(prepared: Prepared, tokenizer: ChatTokenizer) -> None:
    """Print what was prepared, and the first record with its learned tokens in colour (stderr)."""
    say_once("\n".join(report(prepared.info)))
    for i in range(prepared.k):
        ids, weights = sequence(prepared, i)
        say_once(show(Tokens(ids.tolist(), weights.tolist()), tokenizer.fast.decode))


def read_drops(prepared: Prepared) -> Iterator[dict]:
    """What was not used, in order.

    Each is {"source" (index), "file", "line", "reason"}, with "text" for a bad line that was
    skipped.
    """
    with open(
        Path(prepared.info["folder"]) / "drops.jsonl", encoding="utf-8", errors="surrogateescape"
    ) as lines:
        for entry in map(json.loads, lines):
            yield entry | {"file": prepared.info["sources"][entry["source"]]["path"]}


def write_drops(prepared: Prepared, path: str) -> None:
    """Write what was not used to a file of JSON lines: {"file", "line", "reason", "text"?}."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        for entry in read_drops(prepared):
            file.write(
                json.dumps(
                    {key: entry[key] for key in entry if key != "source"}, ensure_ascii=False
                )
                + "\n"
            )


def report(info: dict[str, Any]) -> list[str]:
    """Lines for a person.

    They say what was taken from where, how much of it is learned, what was dropped and why.
    """
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


def _parse(texts: Sequence[str], config: DataConfig, chat: ChatConfig) -> list[Source]:
    if not 0 <= config.max_bad_share <= 1:
        raise ValueError(f"--max-bad-share {config.max_bad_share}: a share lies in 0 to 1")
    parsed = [parse_source(text) for text in texts]
    for source in parsed:
        regular_file(source.path)
        if source.system_prompt and (chat.system_prompt or chat.ignore_system_prompt):
            other = "--ignore-system-prompt" if chat.ignore_system_prompt else "--system-prompt"
            raise ValueError(
                f"{source.path}: has system={source.system_prompt!r} of its own beside {other}; "
                "give one of them"
            )
    return parsed


def _check_equal(info: dict[str, Any], config: DataConfig) -> None:
    """ValueError where more pairs have two equal answers than the share that may be bad."""
    equal = info["drops"].get(EQUAL, {"count": 0, "first": [""]})
    if equal["count"] > config.max_bad_share * info["expected"]:
        raise ValueError(
            f"{equal['first'][0]}: {EQUAL}, as in {equal['count']:,} of {info['expected']:,} "
            f"pairs, over --max-bad-share {config.max_bad_share}: mend them or raise it"
        )


def _build(
    folder: Path,
    sources: list[Source],
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    config: DataConfig,
    seed: int,
    kind: Kind,
    check: Check,
) -> dict:
    """Write the arrays and drops.jsonl of `folder` and give the info that goes with them."""
    kept = [select(source, seed) for source in sources]
    expected = sum(sum(keep) for keep, _ in kept)
    counts = {"tokens": 0, "learned_tokens": 0, "max_id": -1, "records": 0, "k": 0}
    counts["media_bytes"] = 0
    used = [0] * len(sources)
    writers: dict[str, Column] = {}
    drops_file = folder / "drops.jsonl"
    with (
        no_long_collections(),
        open(drops_file, "w", encoding="utf-8", errors="surrogateescape") as dropped,
        _progress_bar(expected) as bar,
    ):
        drops = Drops(config.on_bad_record, config.max_bad_share, expected, dropped)
        for index, (source, (keep, _)) in enumerate(zip(sources, kept, strict=True)):
            for chunk in chunks(scan(index, source, keep, check, drops)):
                jobs = []
                for record, raw in chunk:
                    data = _with_system(record.data, source.system_prompt)
                    try:
                        jobs.append((record, raw, kind.dialogues(data, tokenizer)))
                    except ValueError as error:
                        drops.bad_record(index, source.path, record.line, error, raw)
                groups = [dialogues for *_, dialogues in jobs]
                try:
                    results = encode_dialogues(groups, tokenizer, chat, kind.rule)
                except ValueError:  # one of them is wrong: find which
                    encode = partial(
                        encode_dialogues, tokenizer=tokenizer, config=chat, rule=kind.rule
                    )
                    results = pin_errors(encode, groups)
                done = []
                for (record, raw, _), result in zip(jobs, results, strict=True):
                    if kind.distinct and isinstance(result, list):
                        result = drop_equal(result)
                    if isinstance(result, ValueError):
                        drops.bad_record(index, source.path, record.line, result, raw)
                    elif isinstance(result, Drop):
                        drops.drop(index, source.path, record.line, result.reason)
                    else:
                        done.append((record, _encoded(result, record.data, kind, tokenizer, chat)))
                if done:
                    _append(folder, writers, counts, done)
                used[index] += len(done)
                bar.update(len(chunk))
        for writer in writers.values():
            writer.close()
    if not counts["records"]:
        raise ValueError(
            f"{', '.join(source.path for source in sources)}: all {expected} records are dropped, "
            f"nothing is left to use. By reason: {drops.table()}"
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


def _progress_bar(expected: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=expected,
        desc="preparing",
        unit=" records",
        delay=1,
        mininterval=0.2 if sys.stderr.isatty() else 30,  # seconds
        leave=False,
        file=sys.stderr,
    )


def _encoded(
    seqs: list[Tokens], record: dict, kind: Kind, tokenizer: ChatTokenizer, chat: ChatConfig
) -> Encoded:
    if not kind.learned:
        seqs = [Tokens(ids, [0.0] * len(ids)) for ids, _ in seqs]
    media = None
    if kind.media:
        keep_end = chat.keep_end if kind.rule.keep_end is None else kind.rule.keep_end
        media = kind.media(record, seqs[0].ids, tokenizer, keep_end)
    return Encoded(seqs, kind.extras(record) if kind.extras else {}, media)


def _append(
    folder: Path,
    writers: dict[str, Column],
    counts: dict[str, int],
    done: list[tuple[Record, Encoded]],
) -> None:
    """Add the encoded records of one chunk to the columns and to the counts.

    The first chunk opens the columns.
    """
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
    """The prepared set in `folder`, or why it is not one.

    Places are named by the files of today. The reason is "" where nothing is there, or where it has
    too many bad records for `config`.
    """
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


def _kind_settings(kind: Kind) -> list:
    """What a kind does to records, in JSON values; of functions that are not ours, their files."""
    functions = [kind.check, kind.dialogues, kind.extras, kind.media]
    names = [getattr(function, "__name__", repr(function)) for function in functions]
    return [names, kind.rule, kind.learned, kind.distinct, _foreign_code(functions)]


def _foreign_code(functions: Sequence[Callable | None]) -> list[str]:
    """Hashes of the files that functions of the user's own stand in."""
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
