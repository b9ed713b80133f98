"""Passages found for questions and put before them: what inference does, and training before every step.

Letters: N passages, E width of a vector, Q questions, K results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ta.chat.encode import encode_prompts
from ta.parallel import gather_objects
from ta.rag.passages import (
    Joining,
    Passages,
    RetrievalConfig,
    join,
    joining,
    question_of,
    take,
    text_of,
)
from ta.rag.search import Index, about_top_k, open_index, top_k

if TYPE_CHECKING:
    from torch import Tensor

    from ta.chat.template import ChatConfig
    from ta.chat.tokenizer import ChatTokenizer
    from ta.rag.embedding import Reading, Texts

RESIDENT = 8 << 30  # bytes of vectors that a device holds at most


class Retriever(NamedTuple):
    """What finds and joins passages, but for the encoder of the questions, which is given with each call."""

    table: Tensor  # (N, E) vectors of the passages
    passages: Passages
    encoder_tokenizer: Any
    reading: Reading
    tokenizer: ChatTokenizer
    chat: ChatConfig
    how: Joining
    device: Any  # of the encoder
    approximate: Path | None = (
        None  # the folder whose approximate index is searched instead of the table
    )


def retriever_of(
    index: Index,
    encoder_tokenizer: Any,
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    how: Joining,
    device: Any = "cpu",
) -> Retriever:
    """The retriever of an index. Vectors stay in the file when they are searched on the CPU, or are too many for a device: it gets block by block.

    ValueError where it holds fewer passages than are to be found.
    """
    if how.num_passages > len(index.vectors):
        raise ValueError(
            f"--num-passages {how.num_passages}: {index.folder} holds {len(index.vectors)} passages; give at most that"
        )
    table = index.vectors.to(device) if index.vectors.nbytes < RESIDENT else index.vectors
    return Retriever(
        table, index.passages, encoder_tokenizer, index.reading, tokenizer, chat, how, device
    )


def find(
    retriever: Retriever,
    forward: Callable[[Texts], Tensor],
    chats: Sequence[Sequence[dict]],
    k: int,
    together: bool = False,
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """The k best passages of each chat's question: scores (Q, K), rows (Q, K), and the token ids of the questions.

    `forward` calls the encoder; with `together` it is sharded, and all processes call this at once.
    """
    from ta.rag.embedding import embed, tokenize

    texts = [chat[question_of(chat)]["content"] for chat in chats]
    ids = tokenize(texts, retriever.encoder_tokenizer, retriever.reading, "query")
    agree = (lambda passes: max(gather_objects(passes))) if together else int
    vectors = embed(
        forward, ids, retriever.encoder_tokenizer.pad_token_id, retriever.device, agree=agree
    )  # (Q, E)
    if retriever.approximate:
        return *about_top_k(retriever.approximate, vectors, k), ids
    return *top_k(vectors.float(), retriever.table, k), ids


def answerable(
    retriever: Retriever,
    forward: Callable[[Texts], Tensor],
    records: Sequence[dict],
    encode: Callable,
) -> list[tuple[dict, Any]]:
    """(record, its prompt's tokens or Drop) with the best passages before each question; `encode` is `encode_prompts` with its settings.

    The record's messages are the joined ones, and its "passages" those that are in them, as [{"id", "score"}].
    """
    chats = [record["messages"] for record in records]
    scores, rows, _ = find(retriever, forward, chats, retriever.how.num_passages)
    lists = [[row for row in found if row >= 0] for found in rows.tolist()]
    known = passages_of(retriever, [row for found in lists for row in found])
    texts = [[text_of(known[row]) for row in found] for found in lists]
    joined = join(
        chats, texts, encode, retriever.tokenizer.fast, retriever.how, retriever.chat.max_tokens
    )
    results = []
    for record, (tokens, messages, used), found, values in zip(
        records, joined, lists, scores.tolist(), strict=True
    ):
        named = [
            {"id": known[row]["id"], "score": value}
            for row, value in zip(found[:used], values, strict=False)
        ]
        results.append((record | {"messages": messages, "passages": named}, tokens))
    return results


def online(
    config: RetrievalConfig,
    records: list[tuple],
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    device: str,
) -> list:
    """(record with its "passages", prompt ids) of each (record, prompt ids, media) that `read_prompts` gave: its passages put before its question."""
    from ta.rag.embedding import open_encoder

    if config.index is None:
        if config != RetrievalConfig():
            raise ValueError(
                "settings of retrieval without --index: give the index too, or leave them out"
            )
        return records
    index = open_index(config.index, config.encoder_path)
    encoder, encoder_tokenizer = open_encoder(index.encoder, index.reading, device)
    retriever = retriever_of(
        index, encoder_tokenizer, tokenizer, chat, joining(config, index.manifest), device
    )
    retriever = retriever._replace(approximate=index.folder if config.approximate else None)
    encode = partial(encode_prompts, tokenizer=tokenizer, config=chat)
    if any(media for _, _, media in records):
        raise ValueError(
            "--index with a model of pictures or sounds: passages are found for text alone; leave it out"
        )
    found = answerable(retriever, encoder, [data for data, *_ in records], encode)
    return [
        (data | {"passages": joined["passages"]}, ids, media)
        for (data, _, media), (joined, ids) in zip(records, found, strict=True)
    ]


def candidates(
    records: Sequence[int],
    found: Sequence[Sequence[int]],
    gold: Sequence[Sequence[int]],
    k: int,
    with_gold: bool,
    in_batch: int,
) -> list[list[int]]:
    """Rows of the candidates of each question, none twice; all processes take part, so that the batch's other questions are those of all of them."""
    chosen = [list(mine[:k]) for mine in found]
    if with_gold:
        for mine, right in zip(chosen, gold, strict=True):
            if right and not set(right) & set(mine):
                mine[-1] = right[0]
    if in_batch:
        best = [(right or mine)[0] for mine, right in zip(found, gold, strict=True)]
        share = dict(zip(records, best, strict=True))
        everyone = sorted(
            {record: row for part in gather_objects(share) for record, row in part.items()}.items()
        )
        place = {record: i for i, (record, _) in enumerate(everyone)}
        for record, mine in zip(records, chosen, strict=True):
            at = place[record] + 1
            others = [row for _, row in everyone[at:] + everyone[: at - 1]]
            mine += [row for row in dict.fromkeys(others) if row not in mine][:in_batch]
    return chosen


def passages_of(retriever: Retriever, rows: Sequence[int]) -> dict[int, dict]:
    """{row: passage}; each is read once."""
    unique = sorted(set(rows))
    return dict(zip(unique, take(retriever.passages, unique), strict=True))
