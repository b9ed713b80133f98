"""Retrieval: passages, text encoders, indexes, and training retriever and generator together.

What recipes need of it is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ta.builtin.fine_tuned import builtin_index as builtin_index
    from ta.rag.embedding import open_encoder as open_encoder
    from ta.rag.joint import RANKED as RANKED
    from ta.rag.joint import RagModel as RagModel
    from ta.rag.joint import question_collate as question_collate
    from ta.rag.joint import rag_step as rag_step
    from ta.rag.joint import reembedded as reembedded
    from ta.rag.joint import retrieval_figures as retrieval_figures
    from ta.rag.joint import with_passages as with_passages
    from ta.rag.passages import joining as joining
    from ta.rag.retrieval import answerable as answerable
    from ta.rag.retrieval import retriever_of as retriever_of
    from ta.rag.search import open_index as open_index

_HOME = {
    "builtin_index": "ta.builtin.fine_tuned",
    "open_encoder": "ta.rag.embedding",
    "joining": "ta.rag.passages",
    "answerable": "ta.rag.retrieval",
    "retriever_of": "ta.rag.retrieval",
    "open_index": "ta.rag.search",
    **dict.fromkeys(
        [
            "RANKED",
            "RagModel",
            "question_collate",
            "rag_step",
            "reembedded",
            "retrieval_figures",
            "with_passages",
        ],
        "ta.rag.joint",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ta.rag' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
