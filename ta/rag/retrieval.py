"""Passages found for questions and put before them: at inference, and in training before each step.

Letters: N passages, E width of a vector, Q questions, K results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from ta.chat.encode import Drop, encode_prompts
from ta.chat.jinja import Arguments
from ta.chat.messages import template_arguments
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import ChatTokenizer
from ta.parallel import gather_objects, say
from ta.rag.embedding import Texts, embed, open_encoder, tokenize
from ta.rag.index import Index, open_index
from ta.rag.passages import (
    Chat,
    PassageSettings,
    RetrievalConfig,
    passage_settings,
    put_before,
    question_place,
    read_passages,
    text_of,
)
from ta.rag.search import approximate_top_k, top_k

# tokens kept free below the limit: two texts joined may take a few more tokens than each alone
MARGIN = 8
RESIDENT = 8 << 30  # bytes of vectors that a device holds at most


class Retriever(NamedTuple):
    """All that finds and joins passages, except the encoder, which each call is given."""

    table: Tensor  # (N, E) vectors of the passages
    index: Index
    encoder_tokenizer: Any
    tokenizer: ChatTokenizer  # of the generator
    chat: ChatConfig
    passage_settings: PassageSettings
    device: Any  # of the encoder
    approximate: bool = False  # whether the index's approximate one is searched, not the table


def retriever_of(
    index: Index,
    encoder_tokenizer: Any,
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    settings: PassageSettings,
    device: Any = "cpu",
) -> Retriever:
    """The retriever of an index.

    Vectors of more than RESIDENT bytes stay in the file, and a device gets them block by block; so
    do all vectors that are searched on the CPU. ValueError where the index holds fewer passages
    than are to be found.
    """
    if settings.num_passages > len(index.vectors):
        raise ValueError(
            f"--num-passages {settings.num_passages}: {index.folder} holds {len(index.vectors)} "
            "passages; give at most that"
        )
    table = index.vectors.to(device) if index.vectors.nbytes < RESIDENT else index.vectors
    return Retriever(table, index, encoder_tokenizer, tokenizer, chat, settings, device)


def find_passages(
    retriever: Retriever,
    forward: Callable[[Texts], Tensor],
    chats: Sequence[Sequence[dict]],
    k: int,
    agree: Callable[[int], int] = int,
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """The k best passages of each chat's question: scores (Q, K), rows (Q, K), token ids.

    `forward` calls the encoder, and `agree` is as in `embed`.
    """
    texts = [chat[question_place(chat)]["content"] for chat in chats]
    ids = tokenize(texts, retriever.encoder_tokenizer, retriever.index.embedding_settings, "query")
    vectors = embed(forward, ids, retriever.device, agree=agree)  # (Q, E)
    if retriever.approximate:
        scores, rows = approximate_top_k(retriever.index.folder, vectors, k)
        if short := int((rows < 0).any(1).sum()):
            say(
                f"note: approximate search found fewer than {k} passages for {short} of "
                f"{len(rows)} questions; without --approximate all are found"
            )
        return scores, rows, ids
    return *top_k(vectors.float(), retriever.table, k), ids


def join_passages(
    retriever: Retriever,
    chats: Sequence[Chat],
    texts: Sequence[Sequence[str]],
    encode: Callable[..., list],
    arguments: Sequence[Arguments] | None = None,
) -> list[tuple[Any, list[dict], int]]:
    """Put the texts of passages, best first, before the question of each chat.

    Gives for each chat its tokens or a Drop, its messages, and how many passages are in them.
    `encode` is `encode_chats` or `encode_prompts`, so that training and inference see the same
    text; `arguments` are what the template is given beside the messages. The passages share the
    tokens that --max-tokens leaves beside the chat: the last one that fits is cut, those after it
    are left out. The question is never cut: where it does not fit by itself, the result is encode's
    Drop.
    """
    fast, settings = retriever.tokenizer.fast, retriever.passage_settings
    limit = retriever.chat.max_tokens
    about = {"tokenizer": retriever.tokenizer, "config": retriever.chat, "arguments": arguments}
    alone = encode(chats, **about) if limit is not None else [None] * len(chats)
    kept = []
    for passages, base in zip(texts, alone, strict=True):
        room = math.inf
        if base is not None:
            room = 0 if isinstance(base, Drop) else limit - _length(base) - MARGIN
        kept.append(_cut(passages, room, fast, settings))
    pairs = zip(chats, kept, strict=True)
    joined = [put_before(chat, passages, settings.separator) for chat, passages in pairs]
    encoded = encode(joined, **about)
    results = []
    for chat, base, messages, passages, tokens in zip(
        chats, alone, joined, kept, encoded, strict=True
    ):
        # the joined text was cut after all: the chat goes without passages
        lost = base is not None and (isinstance(tokens, Drop) or _length(tokens) < _length(base))
        results.append((base, list(chat), 0) if lost else (tokens, messages, len(passages)))
    return results


def _length(tokens: Any) -> int:
    return 0 if isinstance(tokens, Drop) else len(getattr(tokens, "ids", tokens))


def _cut(texts: Sequence[str], room: float, tokenizer: Any, settings: PassageSettings) -> list[str]:
    """As many texts as fit into `room` tokens, separators included.

    Each has passage_tokens at most.
    """
    kept = []
    separator = len(tokenizer(settings.separator, add_special_tokens=False).input_ids)
    for text in texts:
        limit = min(settings.passage_tokens, room - separator)
        if limit < 1:
            break
        cut = text
        if room < math.inf or len(text.encode()) > limit:  # a token has a byte at least
            encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            spans = encoding.offset_mapping
            cut = text if len(spans) <= limit else text[: spans[limit - 1][1]]
            room -= min(len(spans), limit) + separator
        kept.append(cut)
        if len(cut) < len(text) and limit < settings.passage_tokens:
            break
    return kept


def prompts_with_passages(
    retriever: Retriever,
    forward: Callable[[Texts], Tensor],
    records: Sequence[dict],
) -> list[tuple[dict, Any]]:
    """(record, its prompt's tokens or a Drop), the best passages before each question.

    A record's messages are the joined ones, and its "passages" those that are in them, as
    [{"id", "score"}].
    """
    chats = [record["messages"] for record in records]
    k = retriever.passage_settings.num_passages
    scores, rows, _ = find_passages(retriever, forward, chats, k)
    found = [[row for row in one if row >= 0] for one in rows.tolist()]
    passages = passages_of(retriever, chain.from_iterable(found))
    texts = [[text_of(passages[row]) for row in one] for one in found]
    given = [template_arguments(record) for record in records]
    joined = join_passages(retriever, chats, texts, encode_prompts, given)
    results = []
    for i, (tokens, messages, used) in enumerate(joined):
        pairs = zip(found[i][:used], scores[i].tolist(), strict=False)
        named = [{"id": passages[row]["id"], "score": score} for row, score in pairs]
        results.append((records[i] | {"messages": messages, "passages": named}, tokens))
    return results


def retrieve_for_prompts(
    config: RetrievalConfig,
    records: list[tuple],
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    device: str,
    hub: bool = False,
) -> list:
    """Put the passages found before the question of each (record, prompt ids).

    The records are those of `read_prompts`; each gets its "passages" and its prompt's new ids.
    Without an index they stay as they are. ValueError for other settings of retrieval without one.
    """
    if config.index is None:
        if config != RetrievalConfig():
            raise ValueError(
                "settings of retrieval without --index: give the index too, or leave them out"
            )
        return records
    index = open_index(config.index, config.encoder_path, hub, config.verify_index)
    encoder, encoder_tokenizer = open_encoder(index.encoder, index.embedding_settings, device)
    settings = passage_settings(config, index.manifest)
    retriever = retriever_of(index, encoder_tokenizer, tokenizer, chat, settings, device)
    retriever = retriever._replace(approximate=config.approximate)
    prompts = prompts_with_passages(retriever, encoder, [data for data, *_ in records])
    return [
        (data | {"passages": joined["passages"]}, ids)
        for (data, _), (joined, ids) in zip(records, prompts, strict=True)
    ]


def candidate_rows(
    records: Sequence[int],
    found: Sequence[Sequence[int]],
    gold: Sequence[Sequence[int]],
    k: int,
    with_gold: bool,
    in_batch: int,
) -> list[list[int]]:
    """Rows of the candidates of each question, none twice.

    They are the first k found; `with_gold` puts a gold passage in the last one's place where none
    was found; `in_batch` adds passages of so many other questions (their gold, else their best),
    those of the records that follow in the global batch. All processes take part.
    """
    candidates = [list(rows[:k]) for rows in found]
    if with_gold:
        for rows, right in zip(candidates, gold, strict=True):
            if right and not set(right) & set(rows):
                rows[-1] = right[0]
    if in_batch:
        best = [(right or rows)[0] for rows, right in zip(found, gold, strict=True)]
        shares = gather_objects(list(zip(records, best, strict=True)))
        by_record = dict(chain.from_iterable(shares))
        circle = sorted(by_record)
        for record, rows in zip(records, candidates, strict=True):
            place = circle.index(record)
            others = [by_record[other] for other in circle[place + 1 :] + circle[:place]]
            rows += [row for row in dict.fromkeys(others) if row not in rows][:in_batch]
    return candidates


def passages_of(retriever: Retriever, rows: Iterable[int]) -> dict[int, dict]:
    """{row: passage}; each is read once."""
    unique = sorted(set(rows))
    return dict(zip(unique, read_passages(retriever.index.passages, unique), strict=True))
