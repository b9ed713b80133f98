"""Training retriever and generator together: candidates of each step's questions, joined and laid out, and the RAG-sequence loss on them.

Letters: Q questions, K candidate passages a question, N joined sequences, E width of a vector, M learned tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ta.chat.encode import encode_chats
from ta.chat.messages import with_system
from ta.chat.render import Tokens
from ta.data.batch import Batch, lay_out, to_device
from ta.data.loader import collate_chats, name_of, split_micro
from ta.data.records import check_question
from ta.data.sources import Drops, parse_source, read_records
from ta.folders import fingerprint
from ta.generation.metrics import measure, recall_at_k
from ta.losses import rag_loss
from ta.model.export import gathered, whole
from ta.model.language_model import LanguageModel
from ta.model.logprobs import sequence_sums
from ta.parallel import gather_objects, rank, world
from ta.rag.embedding import Texts, embed, pad, save_reading, tokenize
from ta.rag.index import save_index
from ta.rag.passages import Passages, join, rows_of, take, text_of
from ta.rag.retrieval import Retriever, candidates, find, passages_of

if TYPE_CHECKING:
    from ta.data.loader import Collate
    from ta.data.prepare import Prepared
    from ta.rag.search import Index

RANKED = 10  # passages that an evaluation ranks


class Asked(NamedTuple):
    """Questions whose passages are yet to be found."""

    sequences: Batch  # without passages
    records: list[int]  # their places in the prepared set
    chats: list[list[dict]]
    gold: list[list[int]]  # rows of the passages that hold the answer, where the record names them


class RagBatch(NamedTuple):
    """Questions with their candidate passages, each joined into a sequence of its own."""

    sequences: Batch  # N
    questions: Texts  # Q (one lone token where Q is 0)
    vectors: Tensor  # (Q, K, E) of the candidates, constant
    cells: Tensor  # (N,) int64: the place of a sequence in the (Q, K) table; other places hold no candidate
    found: list[list[int]]  # rows of the passages found for each question, best first
    gold: list[list[int]]
    alone: Batch  # Q sequences without passages


class RagModel(LanguageModel):
    """The root module around a generator and the encoder of its questions."""

    METHODS = (*LanguageModel.METHODS, "embed")

    def __init__(self, generator: LanguageModel, encoder: nn.Module):
        super().__init__(generator.inner, generator.mode, generator.autocast)
        self.encoder = encoder
        self.retriever: Retriever | None = None  # what an export takes along
        self.index: Index | None = None

    def embed(self, texts: Texts) -> Tensor:
        """The encoder's vectors of texts, (N, E)."""
        with self._arithmetic():
            return self.encoder(texts)

    def save_parts(self, folder: Path | None) -> None:
        """Write the encoder, its tokenizer and the index that fits it, which `retriever` searches."""
        state = gathered(self.encoder.model)
        if rank() or self.retriever is None:
            return
        retriever, index, to = self.retriever, self.index, folder / "encoder"
        whole(self.encoder.model, state).save_pretrained(to)
        retriever.encoder_tokenizer.save_pretrained(to)
        save_reading(to, retriever.reading)
        known = {
            "encoder": fingerprint(str(to)),
            "encoder_path": "../encoder",
            "joining": retriever.how._asdict(),
        }
        manifest = {**index.manifest, **known}
        save_index(folder / "index", retriever.passages, retriever.table, manifest)


def question_collate(prepared: Prepared, passages: Passages, seed: int = 0) -> Collate:
    """A collate function for questions, which are read again as text; ValueError where gold names a passage that is not in the collection."""
    texts = [source["source"] for source in prepared.info["sources"]]
    systems = [parse_source(text).system_prompt for text in texts]
    places = {(int(source), int(line)): i for i, (source, line) in enumerate(prepared.origin)}
    records: list[dict] = [{}] * len(places)
    for record in read_records(texts, check_question, Drops("skip", 1.0), seed):
        if (place := places.get((record.source, record.line))) is not None:
            records[place] = record.data | {
                "messages": with_system(record.data["messages"], systems[record.source])
            }
    rows = rows_of(passages, (name for record in records for name in record["gold"]))
    for place, record in enumerate(records):
        if absent := [name for name in record["gold"] if name not in rows]:
            raise ValueError(
                f"{name_of(prepared, place)}: gold names passage {absent[0]!r}, which {passages.path} has not: mend it, or build the index anew"
            )

    def collate(prepared: Prepared, chosen: np.ndarray, packed: bool) -> Asked:
        batch = collate_chats(prepared, chosen, packed)
        mine = [records[i] for i in chosen]
        gold = [[rows[name] for name in record["gold"]] for record in mine]
        return Asked(batch, chosen.tolist(), [record["messages"] for record in mine], gold)

    return collate


def with_passages(
    retriever: Retriever,
    model: RagModel,
    batches: Sequence[Asked],
    *,
    gold: bool = False,
    in_batch: int = 0,
    max_tokens_per_micro: int = 8192,
    ranked: int = 0,
) -> list[RagBatch]:
    """The step's questions with their candidates, cut anew into micro-batches, as many on every process; all processes take part.

    Candidates are the k best passages by the encoder as it is now; with `gold` the gold one takes the last place where it was not found; and those
    of `in_batch` other questions of the global batch (their gold, else their best). ValueError where the candidates of a question do not fit.
    """
    was_training = model.training
    model.eval()
    chats, wanted, records = (
        [x for batch in batches for x in getattr(batch, name)]
        for name in ("chats", "gold", "records")
    )
    k = retriever.how.num_passages
    _, rows, ids = find(retriever, model.embed, chats, max(k, ranked), together=True)
    model.train(was_training)
    found = rows.tolist()
    rows_in = candidates(records, found, wanted, k, gold, in_batch)
    known = passages_of(retriever, [row for mine in rows_in for row in mine])
    tokenizer, chat = retriever.tokenizer, replace(retriever.chat, keep_end=True)
    encode = partial(encode_chats, tokenizer=tokenizer, config=chat)
    flat = [(chats[q], [text_of(known[row])]) for q, mine in enumerate(rows_in) for row in mine]
    whole = join(
        [c for c, _ in flat],
        [t for _, t in flat],
        encode,
        tokenizer.fast,
        retriever.how,
        chat.max_tokens,
    )
    joined, at = [], 0
    for mine in rows_in:
        joined.append([tokens for tokens, _, _ in whole[at : at + len(mine)]])
        at += len(mine)
    packed = model.mode == "packed"
    micros = _split(joined, max_tokens_per_micro, packed)
    alone = encode(chats) if ranked else None
    device = retriever.device
    out = []
    for places in micros + [[]] * (max(gather_objects(len(micros))) - len(micros)):
        width = max([len(rows_in[q]) for q in places], default=1)
        vectors = torch.zeros(
            len(places), width, retriever.table.shape[1], dtype=retriever.table.dtype
        )
        for i, q in enumerate(places):
            vectors[i, : len(rows_in[q])] = retriever.table[rows_in[q]].cpu()
        batch = RagBatch(
            _lay([tokens for q in places for tokens in joined[q]], packed),
            pad([ids[q] for q in places], retriever.encoder_tokenizer.pad_token_id),
            vectors,
            torch.tensor(
                [i * width + j for i, q in enumerate(places) for j in range(len(rows_in[q]))],
                dtype=torch.int64,
            ),
            [found[q] for q in places],
            [wanted[q] for q in places],
            _lay([alone[q] for q in places] if alone else [], packed),
        )
        out.append(to_device(batch, device))
    return out


def _lay(seqs: Sequence[Tokens], packed: bool) -> Batch:
    return lay_out(
        [np.array(tokens.ids) for tokens in seqs],
        [np.array(tokens.weights, np.float32) for tokens in seqs],
        packed,
    )


def _split(joined: list[list[Tokens]], max_tokens: int, packed: bool) -> list[list[int]]:
    """Questions to micro-batches of `max_tokens` at most; all candidates of a question stand in one."""
    sizes = [[len(tokens.ids) for tokens in mine] for mine in joined]
    totals = [sum(mine) if packed else len(mine) * max(mine) for mine in sizes]
    if max(totals, default=0) > max_tokens:
        raise ValueError(
            f"a question with its {max(map(len, joined))} passages takes {max(totals)} tokens, more than --max-tokens-per-micro {max_tokens}: "
            "raise that, or lower --k, --passage-tokens or --max-tokens"
        )
    return [places for places in split_micro(totals, max_tokens, packed=packed)[0] if places]


def parts_of(model: RagModel, batch: RagBatch, scale: float) -> tuple[Tensor, Tensor]:
    """Of every candidate the log-probability of the answer (its weighted tokens summed) and the scaled score, -inf where none is: (Q, K) each."""
    q, k = batch.vectors.shape[:2]
    vectors = model.embed(batch.questions)[:q]  # (Q, E)
    logps = model.logprobs(batch.sequences)  # (M,)
    sums = sequence_sums(
        logps * batch.sequences.weights.to(logps), batch.sequences.owners, len(batch.cells)
    )  # (N,)
    table = sums.new_zeros(q * k).index_copy(0, batch.cells, sums).view(q, k)
    there = (
        torch.zeros(q * k, dtype=torch.bool, device=sums.device)
        .index_fill(0, batch.cells, True)
        .view(q, k)
    )
    scores = scale * (vectors[:, None] * batch.vectors.to(vectors)).sum(-1)
    return table, scores.masked_fill(~there, float("-inf"))


def rag_step(
    scale: float, model: RagModel, batch: RagBatch
) -> tuple[Tensor, int, dict[str, Tensor]]:
    """RAG-sequence (`losses.rag_loss`) over questions: with one candidate its sum is that of fine-tuning on the joined text."""
    logps, scores = parts_of(model, batch, scale)
    weights = torch.cat([scores.softmax(-1), scores.new_zeros(len(scores), 1)], 1).detach()
    return rag_loss(logps, scores).sum(), len(scores), {"best_weight": weights.amax(1).sum()}


def reembedded(retriever: Retriever, model: RagModel) -> Tensor:
    """(N, E) vectors of all passages by the encoder as it is now, each process embedding its share; all processes take part."""
    n = len(retriever.table)
    mine = range(n * rank() // world(), n * (rank() + 1) // world())
    was_training = model.training
    model.eval()
    ids = tokenize(
        [text_of(passage) for passage in take(retriever.passages, mine)],
        retriever.encoder_tokenizer,
        retriever.reading,
        "passage",
    )
    agree = lambda passes: max(gather_objects(passes))
    vectors = embed(
        model.embed,
        ids,
        retriever.encoder_tokenizer.pad_token_id,
        retriever.device,
        agree=agree,
    )
    model.train(was_training)
    return torch.cat([part.to(vectors.device) for part in gather_objects(vectors.cpu())])


def retrieval_figures(model: RagModel, batches: Sequence[RagBatch], k: int) -> dict[str, float]:
    """Recall at 1, 5 and k and MRR (over RANKED passages) of the questions that name gold, and the retrieval utility, over all processes' batches."""
    mine: list[tuple] = []
    with torch.no_grad():
        for batch in batches:
            after, alone = (_tokens_of(model, seqs) for seqs in (batch.sequences, batch.alone))
            width = batch.vectors.shape[1]
            for q, (found, gold) in enumerate(zip(batch.found, batch.gold, strict=True)):
                texts = [
                    tokens
                    for cell, tokens in zip(batch.cells.tolist(), after, strict=True)
                    if cell // width == q
                ]
                mine.append((found, gold, alone[q], texts))
    found, gold, alone, after = zip(
        *(row for part in gather_objects(mine) for row in part), strict=True
    )
    named = ("recall_at_1", "recall_at_5", "mrr") if any(gold) else ()
    values = measure(
        (*named, "retrieval_utility"),
        retrieved=found,
        gold=gold,
        logprobs=alone,
        passage_logprobs=after,
    )
    return values | ({f"recall_at_{k}": recall_at_k(found, gold, k)} if named else {})


def _tokens_of(model: RagModel, batch: Batch) -> list[list[float]]:
    """Log-probabilities of the learned tokens of each sequence."""
    counts = batch.owners.bincount(minlength=len(batch.ends)).tolist()
    # run for an empty batch too: the other processes take part in the same calls
    logps = model.logprobs(batch)  # (M,)
    return [part.tolist() for part in logps.split(counts)] if counts else []
