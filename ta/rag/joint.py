"""Training retriever and generator together: a step's candidates and the RAG-sequence loss.

Letters: Q questions, K candidate passages a question, N joined sequences, M learned tokens, E width
of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ta.chat.encode import encode_chats
from ta.chat.jinja import Arguments
from ta.chat.messages import template_arguments
from ta.chat.render import Tokens
from ta.data.batch import Batch, lay_out, to_device
from ta.data.loader import Collate, collate_chats
from ta.data.micro import split_micro
from ta.data.prepare import QUESTIONS, Prepared, first_records, name_of
from ta.folders import fingerprint, quiet
from ta.generation.metrics import measure, recall_at_k
from ta.generation.score import by_sequence
from ta.losses import rag_loss
from ta.model.export import gathered, whole
from ta.model.language_model import LanguageModel, evaluating
from ta.model.logprobs import sequence_sums
from ta.parallel import gather_objects, rank, world
from ta.rag.embedding import Texts, embed, pad, tokenize
from ta.rag.embedding_settings import save_embedding_settings
from ta.rag.index import save_index
from ta.rag.passages import Passages, read_passages, rows_of, text_of
from ta.rag.retrieval import (
    Retriever,
    candidate_rows,
    find_passages,
    join_passages,
    passages_of,
)

RANKED = 10  # passages that an evaluation ranks
encode_learned = partial(encode_chats, rule=QUESTIONS.rule)


class Questions(NamedTuple):
    """Questions whose passages are yet to be found."""

    sequences: Batch  # without passages
    places: list[int]  # in the prepared set
    records: list[dict]  # "gold": rows of the passages that hold the answer, where it names them


class RagBatch(NamedTuple):
    """Questions with their candidate passages, each joined into a sequence of its own."""

    sequences: Batch  # N
    questions: Texts  # Q (one padding token where Q is 0)
    vectors: Tensor  # (Q, K, E) of the candidates, constant
    cells: Tensor  # (N,) int64, the place of a sequence in the (Q, K) table; others are empty
    found: list[list[int]]  # rows of the passages found for each question, best first
    gold: list[list[int]]
    alone: Batch  # Q sequences without passages, or none


class RagModel(LanguageModel):
    """The root module around a generator and the encoder of its questions."""

    METHODS = (*LanguageModel.METHODS, "embed")

    def __init__(self, generator: LanguageModel, encoder: nn.Module):
        super().__init__(generator.inner, generator.mode, generator.autocast)
        self.encoder = encoder
        self.media_folder, self.reads_ids = generator.media_folder, generator.reads_ids
        self.retriever: Retriever | None = None  # what an export takes along

    def embed(self, texts: Texts) -> Tensor:
        """The encoder's vectors of texts, (N, E)."""
        with self._arithmetic():
            return self.encoder(texts)

    def save_parts(self, folder: Path | None) -> None:
        """Write the encoder, its tokenizer and the index with `retriever`'s vectors."""
        super().save_parts(folder)
        state = gathered(self.encoder.model)
        if rank() or self.retriever is None:
            return
        retriever, encoder = self.retriever, folder / "encoder"
        index = retriever.index
        with quiet():
            whole(self.encoder.model, state).save_pretrained(encoder)
        retriever.encoder_tokenizer.save_pretrained(encoder)
        save_embedding_settings(encoder, index.embedding_settings)
        changed = {
            "encoder": fingerprint(str(encoder)),
            "encoder_path": "../encoder",
            "joining": retriever.passage_settings._asdict(),
        }
        manifest = {**index.manifest, **changed}
        save_index(folder / "index", index.passages, retriever.table, manifest)


def question_collate(prepared: Prepared, passages: Passages) -> Collate:
    """A collate function for questions, whose records are read again as text.

    ValueError where a record's gold names a passage that is not in the collection.
    """
    records = first_records(prepared, len(prepared.origin))
    rows = rows_of(passages, (name for record in records for name in record["gold"]))
    for place, record in enumerate(records):
        if absent := [name for name in record["gold"] if name not in rows]:
            raise ValueError(
                f"{name_of(prepared, place)}: gold names passage {absent[0]!r}, which "
                f"{passages.path} has not: mend it, or build the index anew"
            )
        record["gold"] = [rows[name] for name in record["gold"]]

    def collate(prepared: Prepared, chosen: np.ndarray, packed: bool) -> Questions:
        batch = collate_chats(prepared, chosen, packed)
        return Questions(batch, chosen.tolist(), [records[i] for i in chosen])

    return collate


def with_passages(
    retriever: Retriever,
    model: RagModel,
    batches: Sequence[Questions],
    *,
    gold: bool = False,
    in_batch: int = 0,
    max_tokens_per_micro: int = 8192,
    ranked: int = 0,
) -> list[RagBatch]:
    """A step's questions with their candidates, in new micro-batches, as many on every process.

    Candidates are the k best passages by the encoder as it is now; `gold` and `in_batch` as in
    `candidate_rows`. `ranked` finds so many passages in all and lays out the questions without
    passages too, for figures. All processes take part. ValueError where the candidates of a
    question do not fit into a micro-batch.
    """
    asked = [record for batch in batches for record in batch.records]
    places = [place for batch in batches for place in batch.places]
    chats, golds = ([record[name] for record in asked] for name in ("messages", "gold"))
    given = [template_arguments(record) for record in asked]
    k = retriever.passage_settings.num_passages
    with evaluating(model):
        _, rows, ids = find_passages(retriever, model.embed, chats, max(k, ranked), _most)
    found = rows.tolist()
    candidates = candidate_rows(places, found, golds, k, gold, in_batch)
    joined = _joined(retriever, chats, candidates, given)
    packed = model.mode == "packed"
    micros = _split(joined, max_tokens_per_micro, packed)
    alone = []
    if ranked:
        alone = encode_learned(chats, retriever.tokenizer, retriever.chat, arguments=given)
    out, table = [], retriever.table
    for questions in micros + [[]] * (_most(len(micros)) - len(micros)):
        width = max([len(candidates[q]) for q in questions], default=1)  # K
        vectors = torch.zeros(len(questions), width, table.shape[1], dtype=table.dtype)
        cells = []
        for i, q in enumerate(questions):
            vectors[i, : len(candidates[q])] = table[candidates[q]].cpu()
            cells += range(i * width, i * width + len(candidates[q]))
        batch = RagBatch(
            _laid_out([tokens for q in questions for tokens in joined[q]], packed),
            pad([ids[q] for q in questions]),
            vectors,
            torch.tensor(cells, dtype=torch.int64),
            [found[q] for q in questions],
            [golds[q] for q in questions],
            _laid_out([alone[q] for q in questions if ranked], packed),
        )
        out.append(to_device(batch, retriever.device))
    return out


def _most(passes: int) -> int:
    """The greatest number that a process has."""
    return max(gather_objects(passes))


def _joined(
    retriever: Retriever,
    chats: Sequence[list[dict]],
    candidates: Sequence[Sequence[int]],
    given: Sequence[Arguments],
) -> list[list[Tokens]]:
    """The tokens of each question with each of its candidates."""
    pairs = [(q, row) for q, rows in enumerate(candidates) for row in rows]
    passages = passages_of(retriever, [row for _, row in pairs])
    joined = join_passages(
        retriever,
        [chats[q] for q, _ in pairs],
        [[text_of(passages[row])] for _, row in pairs],
        encode_learned,
        [given[q] for q, _ in pairs],
    )
    tokens = iter([tokens for tokens, _, _ in joined])
    return [[next(tokens) for _ in rows] for rows in candidates]


def _laid_out(sequences: Sequence[Tokens], packed: bool) -> Batch:
    ids, weights = ([tokens[side] for tokens in sequences] for side in (0, 1))
    return lay_out(ids, weights, packed)


def _split(joined: list[list[Tokens]], max_tokens: int, packed: bool) -> list[list[int]]:
    """Questions to micro-batches of at most `max_tokens`; all candidates of one stay together."""
    sizes = [[len(tokens.ids) for tokens in candidates] for candidates in joined]
    totals = [sum(lengths) if packed else len(lengths) * max(lengths) for lengths in sizes]
    if max(totals, default=0) > max_tokens:
        raise ValueError(
            f"a question with its {max(map(len, joined))} passages takes {max(totals)} tokens, "
            f"more than --max-tokens-per-micro {max_tokens}: "
            "raise that, or lower --num-passages, --passage-tokens or --max-tokens"
        )
    return [places for places in split_micro(totals, max_tokens, packed=packed)[0] if places]


def rag_step(
    scale: float, model: RagModel, batch: RagBatch
) -> tuple[Tensor, int, dict[str, Tensor]]:
    """The sum of RAG-sequence losses (`losses.rag_loss`) over questions, and their number.

    The log-probability of an answer is the sum of its weighted tokens; the score of a candidate is
    `scale` times the product of the vectors of question and passage. With one candidate a question
    it is the loss of fine-tuning on the joined text.
    """
    q, k = batch.vectors.shape[:2]
    vectors = model.embed(batch.questions)[:q]  # (Q, E)
    logps = model.logprobs(batch.sequences)  # (M,)
    weighted = logps * batch.sequences.weights.to(logps)
    sums = sequence_sums(weighted, batch.sequences.owners, len(batch.cells))  # (N,)
    answers = sums.new_zeros(q * k).index_copy(0, batch.cells, sums).view(q, k)
    empty = torch.ones(q * k, dtype=torch.bool, device=sums.device)
    empty = empty.index_fill(0, batch.cells, False).view(q, k)
    scores = scale * (vectors[:, None] * batch.vectors.to(vectors)).sum(-1)
    scores = scores.masked_fill(empty, float("-inf"))  # (Q, K)
    # a column of zeros, so that the greatest of no candidates is 0
    weights = torch.cat([scores.softmax(-1), scores.new_zeros(q, 1)], 1).detach()
    return rag_loss(answers, scores).sum(), q, {"best_weight": weights.amax(1).sum()}


def reembedded(retriever: Retriever, model: RagModel) -> Tensor:
    """(N, E) vectors of all passages by the encoder as it is now, a share on each process.

    All processes take part.
    """
    n = len(retriever.table)
    share = range(n * rank() // world(), n * (rank() + 1) // world())
    index = retriever.index
    texts = [text_of(passage) for passage in read_passages(index.passages, share)]
    ids = tokenize(texts, retriever.encoder_tokenizer, index.embedding_settings, "passage")
    with evaluating(model):
        vectors = embed(model.embed, ids, retriever.device, agree=_most)
    return torch.cat([part.to(vectors.device) for part in gather_objects(vectors.cpu())])


def retrieval_figures(model: RagModel, batches: Sequence[RagBatch], k: int) -> dict[str, float]:
    """Recall at 1, 5 and k and MRR of the questions that name gold, and the retrieval utility.

    MRR ranks RANKED passages. The utility is the gain of the answers' log-probability by passages.
    The batches of all processes are counted.
    """
    share: list[tuple] = []  # (found, gold, log-probabilities alone, and after each passage)
    with torch.no_grad():
        for batch in batches:
            after = by_sequence(model, batch.sequences)
            alone = by_sequence(model, batch.alone)
            width = batch.vectors.shape[1]
            questions = [cell // width for cell in batch.cells.tolist()]
            for q, (found, gold) in enumerate(zip(batch.found, batch.gold, strict=True)):
                passages = [x for x, of in zip(after, questions, strict=True) if of == q]
                share.append((found, gold, alone[q], passages))
    rows = [row for part in gather_objects(share) for row in part]
    found, gold, alone, after = zip(*rows, strict=True)
    named = ("recall_at_1", "recall_at_5", "mrr") if any(gold) else ()
    figures = measure(
        (*named, "retrieval_utility"),
        retrieved=found,
        gold=gold,
        logprobs=alone,
        passage_logprobs=after,
    )
    return figures | ({f"recall_at_{k}": recall_at_k(found, gold, k)} if named else {})
