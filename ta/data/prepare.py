"""Prepared data: records that are encoded once and kept as memory-mapped arrays.

They stand in the cache under a hash of everything that they depend on.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import chain, groupby
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from ta.chat.encode import (
    AS_CONFIGURED,
    ONE_ANSWER,
    Drop,
    EncodeRule,
    encode_dialogues,
    refuse_idle,
    turns_of,
    with_answers,
)
from ta.chat.jinja import Arguments
from ta.chat.messages import Chat, parts_of, template_arguments
from ta.chat.render import Tokens, show, spans
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import ChatTokenizer, tokenizer_settings
from ta.command_line import Range, check_config
from ta.data.dependencies import dependencies
from ta.data.jsonl import parse_record
from ta.data.readers import as_line, files_of, read_rows
from ta.data.records import (
    EQUAL,
    Check,
    check_chat,
    check_class,
    check_labelled,
    check_pair,
    check_question,
)
from ta.data.sources import (
    Drops,
    Record,
    Source,
    canonical,
    chunks,
    isolate_errors,
    no_full_gc,
    parse_source,
    scan,
    select,
    source_names,
    with_own_system,
)
from ta.files import (
    Column,
    cache_folder,
    content_hash,
    hash_json,
    made_once,
    open_arrays,
    stamp,
    write_atomic,
    write_jsonl,
    write_manifest,
)
from ta.parallel import rank, say
from ta.printable import one_line, printable
from ta.screen import progress, shown

if TYPE_CHECKING:
    from numpy import ndarray

# version of the files in a folder of prepared data
FORMAT = 1
# tokens of a sequence that a preview shows at most
PREVIEW_TOKENS = 600
# version of the encoding: raise it when the ids or weights of any record change
PREPARE_VERSION = 3
# fields named in the report as not used
FIELDS = 12


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
    max_bad_share: Annotated[float, Range(0, 1)] = 0.01
    """More skipped records than this share of all, or more pairs of equal answers, are an error
    again (0 to 1)."""
    cache_dir: str = ""
    """Where prepared data is kept. Default: $TA_CACHE, or ta in the user's cache folder."""
    verify: bool = False
    """Read all of what was prepared before and compare it with its hashes, not small files
    alone."""


class RecordKind(NamedTuple):
    """A kind of records, and the sequences that a method learns from one record."""

    # part of the key of prepared data
    name: str
    # the record in its canonical form; BadRecord says what is wrong with it
    check: Check
    # the record's dialogues, which differ in their last message only; each becomes a sequence
    dialogues: Callable[[dict, ChatTokenizer], list[Chat]]
    rule: EncodeRule = AS_CONFIGURED
    # numbers of the record that the method needs, such as a label
    extras: Callable[[dict], dict[str, float]] | None = None
    # whether a dialogue without an answer can be used where every message is learned; `check`
    # then takes `need_answer`
    answer_optional: bool = False
    # False where an extra, such as a label, is learned and no token
    learned: bool = True
    # whether a record whose two dialogues have the same tokens is dropped
    distinct: bool = False
    # (dialogue, ids, tokenizer, whether the latest messages were kept) -> (modality, path) of the
    # pictures and sounds of the dialogue that stand in the token ids
    media: Callable[[Chat, list[int], ChatTokenizer, bool], Sequence[tuple[str, str]]] | None = None

    def prepare(
        self,
        files: Iterable[str | PathLike[str]] | Iterable[dict],
        tokenizer: ChatTokenizer,
        chat: ChatConfig,
        data: DataConfig,
        seed: int = 0,
        *,
        labels: Sequence[str] = (),
    ) -> Prepared | None:
        """Read, check and encode files of records, or open the data that an earlier run prepared.

        `files` may name a choice of their records (`parse_source`); they are read in the order
        given. Records themselves, a list of dicts, are written to a file in the cache and read from
        there. `seed` chooses records where a share or a count is asked for. `labels` are names of
        classes, in order, that labels may be; the checker then takes them. Returns None where
        `files` is empty. ValueError for bad data, for a system prompt of a file beside one in
        `chat`, and when no record is left.
        """
        if not files:
            return None
        files = _listed(files)
        check_config(data)
        refuse_idle(chat, self.rule.idle, f"what is learned of {self.name} records is fixed")
        if self.media:
            refuse_idle(chat, ["split_turns"], f"{self.name} records are one sequence each")
        cache = cache_folder(data.cache_dir)
        texts = [_in_cache(files, cache)] if isinstance(files[0], dict) else files
        sources = _parse(texts, data, chat)
        stamps = _stamps(sources)
        hashes = [source_hash(source.path, cache / "hashes") for source in sources]
        chosen = any(source.share is not None or source.count is not None for source in sources)
        choices = [[content, *source[1:]] for content, source in zip(hashes, sources, strict=True)]
        settings = {"method": self.name} | ({"labels": labels} if labels else {})
        settings |= tokenizer_settings(tokenizer, chat)
        fingerprint = hash_json([FORMAT, choices, seed if chosen else None, settings])
        functions = map(dependencies, (self.check, self.dialogues, self.extras, self.media))
        about_kind = [*functions, self.rule, self.learned, self.distinct]
        key = hash_json([fingerprint, PREPARE_VERSION, about_kind])
        encoder = RecordEncoder(tokenizer, chat, self, tuple(labels))
        folder, made = cache / "prepared" / key, False
        opened = partial(_open, folder, sources, texts, data)
        if isinstance(prepared := opened(), str):
            with made_once(folder, opened, say) as temporary:
                if made := temporary is not None:
                    info = _build(temporary, sources, encoder, data, seed)
                    if stamps != _stamps(sources):
                        raise ValueError(
                            f"{', '.join(source.path for source in sources)}: changed while being "
                            "read; run again when it rests"
                        )
                    write_manifest(temporary, info | {"fingerprint": fingerprint})
            if isinstance(prepared := opened(), str):
                raise OSError(f"{folder}: what was just written cannot be read ({prepared})")
        prepared.info["cached"] = not made
        equal, pairs = prepared.info["drops"].get(EQUAL), prepared.info["expected"]
        if equal and equal["count"] > data.max_bad_share * pairs:
            raise ValueError(
                f"{equal['first'][0]}: {EQUAL}, as in {equal['count']:,} of {pairs:,} pairs, over "
                f"--max-bad-share {data.max_bad_share}: mend them or raise it"
            )
        return prepared._replace(check=encoder.check)


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


CHATS = RecordKind("chat", check_chat, chat_of, answer_optional=True)
PAIRS = RecordKind("pair", check_pair, pair_of, ONE_ANSWER, margin_of, distinct=True)
LABELLED = RecordKind("labelled", check_labelled, labelled_of, ONE_ANSWER, desirable_of)
# whole dialogues: the label is learned, so cutting keeps any message that fits
CLASSES = RecordKind(
    "class", check_class, unweighted_of, EncodeRule("all"), label_of, learned=False
)
# without passages; the last question is kept, because it is the query of the search, and only its
# answer is learned, because only it reads passages
QUESTIONS = RecordKind("question", check_question, chat_of, ONE_ANSWER)


class Encoded(NamedTuple):
    """One record as k sequences (1 of a chat, 2 of a pair) with its extras and media."""

    record: Record
    seqs: Sequence[Tokens]
    extras: dict[str, float]
    # (modality, path) of its pictures and sounds in order; None for kinds without media
    media: Sequence[tuple[str, str]] | None = None


class Prepared(NamedTuple):
    """n records of k sequences each, memory-mapped and read-only.

    Sequence i is ids[offsets[i]:offsets[i + 1]].
    """

    ids: ndarray  # (total,) int32
    weights: ndarray  # (total,) float32, unshifted; a token with weight 0 is no target
    offsets: ndarray  # (n * k + 1,) int64
    origin: ndarray  # (n, 2) int32: index in info["sources"], 1-based line
    extras: dict[str, ndarray]  # (n,) float64 each
    # fingerprint, folder, cached, records, bad, tokens, learned_tokens, max_id, sources, drops,
    # notes
    info: dict[str, Any]
    k: int
    # JSON bytes of all records' media, and (n,) where those of each record end
    media: tuple[ndarray, ndarray] | None = None
    # the checker of records of the files
    check: Check | None = None
    # (n, 2) reference log-probabilities, where they are precomputed
    reference: Any = None


def sequence(prepared: Prepared, i: int) -> tuple[ndarray, ndarray]:
    """Views of the ids and weights of sequence i of n * k, each (T,)."""
    start, end = prepared.offsets[i], prepared.offsets[i + 1]
    return prepared.ids[start:end], prepared.weights[start:end]


def tokens_of(prepared: Prepared, record: int) -> list[Tokens]:
    """The k sequences of a record."""
    places = range(record * prepared.k, (record + 1) * prepared.k)
    return [Tokens(*(part.tolist() for part in sequence(prepared, i))) for i in places]


def lengths(prepared: Prepared) -> ndarray:
    """(n,) tokens of each record, its k sequences together."""
    bounds = prepared.offsets[:: prepared.k]
    return bounds[1:] - bounds[:-1]


def name_of(prepared: Prepared, record: int) -> str:
    """file:line of a record."""
    source, line = prepared.origin[record]
    return f"{prepared.info['sources'][source]['path']}:{line}"


prepare_chats = CHATS.prepare
prepare_pairs = PAIRS.prepare
prepare_labelled = LABELLED.prepare
prepare_classes = CLASSES.prepare
prepare_questions = QUESTIONS.prepare


def first_records(prepared: Prepared | None, n: int) -> list[dict]:
    """The first n prepared records, read again from their files and checked; [] for no data."""
    if prepared is None:
        return []
    records = []
    places = prepared.origin[:n].tolist()
    for index, group in groupby(places, key=lambda place: place[0]):
        lines = {line for _, line in group}
        source = parse_source(prepared.info["sources"][index]["source"])
        for line, raw in read_rows(source.path):
            if line in lines:
                data, _ = canonical(parse_record(raw), prepared.check)
                records.append(with_own_system(data, source))
            if line >= max(lines):
                break
    return records


class Preview(NamedTuple):
    """Sequences as a person sees them: text in a terminal, HTML in a notebook."""

    report: list[str]
    sequences: list[list[tuple[str, float]]]  # of each, its spans of text and weight

    def __str__(self) -> str:
        return "\n".join([printable("\n".join(self.report)), *map(show, self.sequences)])

    def _repr_html_(self) -> str:
        """Learned spans are green (amber where the weight is not 1)."""
        lines = [escape("\n".join(self.report))] if self.report else []
        colour = lambda weight: "gray" if not weight else "green" if weight == 1 else "darkorange"
        lines += [
            "".join(
                f'<span style="color:{colour(weight)}">{escape(text)}</span>'
                for text, weight in sequence
            )
            for sequence in self.sequences
        ]
        return "".join(f'<pre style="white-space:pre-wrap">{line}</pre>' for line in lines)


def preview(
    data: Prepared | Tokens | None, tokenizer: ChatTokenizer, held_out: Prepared | None = None
) -> Preview:
    """What training sees: of prepared data a report and the first record, or of one sequence.

    The prepared data is shown on the screen (stderr) too, with a report of `held_out` data.
    """
    decode = tokenizer.fast.decode
    if data is None or isinstance(data, Drop):
        raise ValueError(f"{data} has no tokens to show: give prepared records or a sequence")
    if not isinstance(data, Prepared):
        return Preview([], [spans(Tokens(*data), decode)])
    records = first_records(data, 1) if tokenizer.placeholders else []
    messages = [m for record in records for m in record.get("messages", ())]
    parts = [part for message in messages for part in parts_of(message)]
    names = {
        placeholder.id: iter([f"{kind} {x['content']}" for x in parts if x["type"] == kind])
        for kind, placeholder in tokenizer.placeholders.items()
    }
    shown_tokens = [spans(x, decode, PREVIEW_TOKENS, names) for x in tokens_of(data, 0)]
    about = report(held_out.info) if held_out else []
    about[:1] = [f"held out: {line}" for line in about[:1]]
    found = Preview(report(data.info) + about, shown_tokens)
    if rank() == 0:
        print(shown(str(found), sys.stderr), file=sys.stderr, flush=True)
    return found


def read_drops(prepared: Prepared) -> Iterator[dict]:
    """The records that were not used, in order.

    Each is {"source" (index), "file", "line", "reason"}, with "text" for a bad line that was
    skipped.
    """
    path = Path(prepared.info["folder"]) / "drops.jsonl"
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for entry in map(json.loads, lines):
            yield entry | {"file": prepared.info["sources"][entry["source"]]["path"]}


def write_drops(prepared: Prepared, path: str) -> None:
    """Write the records that were not used as JSON lines: {"file", "line", "reason", "text"?}."""
    known = ("file", "line", "reason", "text")
    drops = read_drops(prepared)
    write_jsonl(path, ({name: drop[name] for name in known if name in drop} for drop in drops))


def summary(prepared: Prepared) -> dict[str, Any]:
    """Records, tokens, sources and drops as `report` says them, and percentiles of lengths."""
    import numpy as np

    names = ("records", "tokens", "learned_tokens", "sources", "drops")
    inner = {f"{share} %": share for share in (5, 25, 50, 75, 95, 99)}
    shares = {"least": 0, **inner, "most": 100}
    sizes = np.percentile(lengths(prepared), [*shares.values()], method="lower").tolist()
    known = ("source", "used", "records")
    return {
        **{name: prepared.info[name] for name in names},
        "sources": [{name: source[name] for name in known} for source in prepared.info["sources"]],
        "lengths": dict(zip(shares, map(int, sizes), strict=True)),
    }


def report(info: dict[str, Any]) -> list[str]:
    """Lines for a person: records of each source, share of learned tokens, drops with reasons."""
    tokens, learned = info["tokens"], info["learned_tokens"]
    share = f", {100 * learned / tokens:.0f} % learned" if learned else ""
    before = " (prepared before)" if info["cached"] else ""
    lines = [f"{info['records']:,} records, {tokens:,} tokens{share}{before}"]
    for source in info["sources"]:
        form = "".join(f": {text}" for text in source.get("formats", ()))
        lines.append(f"  {source['used']:,} of {source['records']:,} from {source['source']}{form}")
    for title, table in (("dropped", info["drops"]), ("note:", info["notes"])):
        for reason, entry in table.items():
            places = ", ".join(entry["first"])
            lines.append(f"  {title} {entry['count']:,}: {reason} ({places})")
    for source in info["sources"]:
        if source["remark"]:
            lines.append(f"  note: {source['source']}: {source['remark']}")
    if unused := info.get("unused"):
        fields = ", ".join(f"{name} ({count:,})" for name, count in unused[:FIELDS])
        more = f" and {len(unused) - FIELDS} more" if len(unused) > FIELDS else ""
        lines.append(f"  note: fields that are kept and not used: {fields}{more}")
    return [one_line(line) for line in lines]


def source_hash(path: str, notes: Path) -> str:
    """Hash of the bytes of the files behind a source's path."""
    hashes = [content_hash(file, notes) for file in files_of(path)]
    return hashes[0] if len(hashes) == 1 else hash_json(hashes)


def _stamps(sources: Sequence[Source]) -> list[list[int]]:
    return [stamp(file) for source in sources for file in files_of(source.path)]


def _listed(files: Any) -> list[Any]:
    """The files, or the records, as a list. ValueError for anything else."""
    alone = isinstance(files, str | PathLike | Mapping)
    listed = [fspath(x) if isinstance(x, PathLike) else x for x in ([files] if alone else files)]
    if alone or not any(all(isinstance(x, kind) for x in listed) for kind in (str, dict)):
        raise ValueError(
            f"{str(listed)[:80]!r}: give a list of names of files, or a list of records such as "
            '[{"messages": [...]}]'
        )
    return listed


def _in_cache(records: Sequence[dict], cache: Path) -> str:
    """The file in the cache that holds these records as JSON lines."""
    try:
        lines = b"\n".join(map(as_line, records))
    except TypeError as error:
        raise ValueError(f"the records cannot be written as JSON ({error})") from None
    path = cache / "records" / f"{hash_json(lines.decode())[:16]}.jsonl"
    if not path.exists():
        write_atomic(path, lines)
    return str(path)


def _parse(texts: Sequence[str], config: DataConfig, chat: ChatConfig) -> list[Source]:
    check_config(config)
    parsed = [parse_source(text) for text in texts]
    for source in parsed:
        files_of(source.path)
        if source.system_prompt and (chat.system_prompt or chat.ignore_system_prompt):
            other = "--ignore-system-prompt" if chat.ignore_system_prompt else "--system-prompt"
            raise ValueError(
                f"{source.path}: has system={source.system_prompt!r} of its own beside {other}; "
                "give one of them"
            )
    return parsed


def _build(
    folder: Path, sources: list[Source], encoder: RecordEncoder, config: DataConfig, seed: int
) -> dict:
    """Write the arrays and drops.jsonl of `folder` and return their info."""
    kept = [select(source, seed) for source in sources]
    expected = sum(sum(keep) for keep, _ in kept)
    used = [0] * len(sources)
    arrays = Arrays(folder)
    drops_file = folder / "drops.jsonl"
    with (
        no_full_gc(),
        open(drops_file, "w", encoding="utf-8", errors="surrogateescape") as dropped,
        progress(expected, "preparing", "record", delay=1, leave=False) as bar,
    ):
        drops = Drops(config.on_bad_record, config.max_bad_share, expected, dropped)
        for index, (source, (keep, _)) in enumerate(zip(sources, kept, strict=True)):
            for chunk in chunks(scan(index, source, keep, encoder.check, drops)):
                jobs = [*encoder.jobs(chunk, drops)]
                try:
                    results = encode_dialogues(*encoder.inputs(jobs))
                except ValueError:
                    # some record is wrong: encode smaller groups to find it
                    encode = lambda some: encode_dialogues(*encoder.inputs(some))
                    results = isolate_errors(encode, jobs)
                done = encoder.usable(jobs, results, drops)
                if done:
                    arrays.append(done)
                used[index] += len({one.record.line for one in done})
                bar.update(len(chunk))
                # gone before the next chunk, so that no collection walks through them
                del chunk, jobs, results, done
        arrays.close()
    if not arrays.counts["records"]:
        raise ValueError(
            f"{', '.join(source.path for source in sources)}: all {expected} records are dropped, "
            f"nothing is left to use. By reason: {drops.table()}"
        )
    by_source = [
        {"records": len(keep), "chosen": sum(keep), "used": used[i], "remark": remark}
        | {"formats": [f"{form.name}, {n:,} {form.unit}" for form, n in drops.formats[i].items()]}
        for i, (keep, remark) in enumerate(kept)
    ]
    return {
        **arrays.counts,
        "expected": expected,
        "bad": drops.bad,
        "drops": drops.counts.sorted(),
        "notes": drops.notes.sorted(),
        "unused": drops.unused.most_common(1000),
        "sources": by_source,
    }


class ToEncode(NamedTuple):
    """A record's dialogues to encode, with what the template is given beside them."""

    record: Record
    group: list[Chat]
    arguments: Arguments
    # what the template leaves out of them
    notes: list[str]


class RecordEncoder(NamedTuple):
    """How records become sequences."""

    tokenizer: ChatTokenizer
    chat: ChatConfig
    kind: RecordKind
    labels: tuple[str, ...] = ()

    @property
    def check(self) -> Check:
        """The kind's checker, with what it is to know."""
        kind, more = self.kind, {}
        if kind.answer_optional and self.chat.loss_on == "all":
            more["need_answer"] = False
        if self.labels:
            more["labels"] = self.labels
        return partial(kind.check, **more)

    def jobs(self, chunk: list[Record], drops: Drops) -> Iterator[ToEncode]:
        """The dialogues of some records."""
        for record in chunk:
            try:
                groups = [self.kind.dialogues(record.data, self.tokenizer)]
            except ValueError as error:
                drops.bad_record(record, error)
                continue
            if self.chat.split_turns:
                groups = [[turn] for turn in turns_of(groups[0][0])] or groups
            for group in groups:
                yield ToEncode(record, group, template_arguments(record.data), [])

    def inputs(self, jobs: Sequence[ToEncode]) -> tuple:
        """What `encode_dialogues` takes."""
        groups, given, notes = ([job[field] for job in jobs] for field in (1, 2, 3))
        return groups, self.tokenizer, self.chat, self.kind.rule, given, notes

    def usable(
        self,
        jobs: Sequence[ToEncode],
        results: Sequence[list[Tokens] | Drop | ValueError],
        drops: Drops,
    ) -> list[Encoded]:
        """The records that can be used, encoded; the others are counted in `drops`."""
        done, wrong = [], set()
        for job, result in zip(jobs, results, strict=True):
            record = job.record
            if self.kind.distinct and isinstance(result, list) and result[0].ids == result[1].ids:
                result = Drop(EQUAL, "the two answers have the same tokens")
            if record.line in wrong:
                continue
            if isinstance(result, ValueError):
                wrong.add(record.line)
                drops.bad_record(record, result)
            elif isinstance(result, Drop):
                drops.drop(record, result.reason)
            else:
                for note in job.notes:
                    drops.notes.add(note, record)
                done.append(self.encoded(result, job))
        return done

    def encoded(self, seqs: list[Tokens], job: ToEncode) -> Encoded:
        """The sequences with what else the method needs of the record."""
        kind, record, media = self.kind, job.record, None
        if not kind.learned:
            seqs = [Tokens(ids, [0.0] * len(ids)) for ids, _ in seqs]
        if kind.media:
            keep_end = kind.rule.within(self.chat).keep_end
            media = kind.media(job.group[0], seqs[0].ids, self.tokenizer, keep_end)
        extras = kind.extras(record.data) if kind.extras else {}
        return Encoded(record, seqs, extras, media)


class Arrays:
    """The arrays of a folder of prepared data while they are written, and their counts."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.columns: dict[str, Column] = {}
        self.counts: Counter[str] = Counter()

    def append(self, encoded: list[Encoded]) -> None:
        """Add the encoded records of one chunk; the first chunk opens the columns."""
        import numpy as np

        counts = self.counts
        counts["k"] = counts["k"] or len(encoded[0].seqs)
        assert all(len(one.seqs) == counts["k"] for one in encoded)
        ids, weights = zip(*chain.from_iterable(one.seqs for one in encoded), strict=True)
        sizes = [*map(len, ids)]
        assert min(sizes) > 0 and sizes == [*map(len, weights)]
        # (tokens of the chunk,) each
        columns = {
            "ids": np.fromiter(chain.from_iterable(ids), np.int32, sum(sizes)),
            "weights": np.fromiter(chain.from_iterable(weights), np.float32, sum(sizes)),
            "offsets": counts["tokens"] + np.cumsum(sizes, dtype=np.int64),
            "origin": np.array([one.record[:2] for one in encoded], np.int32),
        }
        for name in encoded[0].extras:
            values = [one.extras[name] for one in encoded]
            columns[f"extra-{name}"] = np.array(values, np.float64)
        if encoded[0].media is not None:
            texts = [json.dumps(one.media).encode() for one in encoded]
            columns["media"] = np.frombuffer(b"".join(texts), np.uint8)
            ends = np.cumsum([*map(len, texts)], dtype=np.int64)
            columns["media_ends"] = counts["media_bytes"] + ends
            counts["media_bytes"] += len(columns["media"])
        if not self.columns:
            for name, column in columns.items():
                path = self.folder / f"{name}.npy"
                self.columns[name] = Column(path, column.dtype, column.shape[1:])
            self.columns["offsets"].append(np.zeros(1))
        assert self.columns.keys() == columns.keys()
        for name, column in columns.items():
            self.columns[name].append(column)
        counts["tokens"] += sum(sizes)
        counts["learned_tokens"] += int(np.count_nonzero(columns["weights"]))
        counts["max_id"] = max(counts["max_id"], int(columns["ids"].max()))
        counts["records"] += len(encoded)

    def close(self) -> None:
        """Finish the files."""
        for column in self.columns.values():
            column.close()


def _open(
    folder: Path, sources: list[Source], texts: list[str], config: DataConfig
) -> Prepared | str:
    """The prepared set in `folder`, or the reason why there is none.

    Places of records are named by the present files. The reason is "" where the folder does not
    exist, or where it has too many bad records for `config`.
    """
    opened = open_arrays(folder, config.verify)
    if isinstance(opened, str):
        return opened
    arrays, info = opened
    too_many = info["bad"] > config.max_bad_share * info["expected"]
    if info["bad"] and (config.on_bad_record == "error" or too_many):
        return ""
    extras = {
        name.removeprefix("extra-"): array
        for name, array in arrays.items()
        if name.startswith("extra-")
    }
    paths = [source.path for source in sources]
    names = source_names(texts)
    for entry, text, path, name in zip(info["sources"], texts, paths, names, strict=True):
        entry |= {"source": text, "path": path, "name": name}
    for table in (info["drops"], info["notes"]):
        for entry in table.values():
            entry["first"] = [f"{paths[index]}:{line}" for index, line in entry["first"]]
    info["folder"] = str(folder)
    media = (arrays["media"], arrays["media_ends"]) if "media" in arrays else None
    columns = [arrays[name] for name in ("ids", "weights", "offsets", "origin")]
    return Prepared(*columns, extras, info, info["k"], media)
