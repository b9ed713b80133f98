"""Retrieval: passages, text encoders, indexes, and training retriever and generator together.

What recipes need of it is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors; NAMES says the same
    from ta.builtin.data_files import passages_file as passages_file
    from ta.builtin.fine_tuned import builtin_index as builtin_index
    from ta.rag.embedding import open_encoder as open_encoder
    from ta.rag.embedding_settings import EncoderConfig as EncoderConfig
    from ta.rag.index import (
        begin_index as begin_index,
        build_index as build_index,
        open_index as open_index,
    )
    from ta.rag.joint import (
        RANKED as RANKED,
        RagModel as RagModel,
        question_collate as question_collate,
        rag_step as rag_step,
        reembedded as reembedded,
        retrieval_figures as retrieval_figures,
        with_passages as with_passages,
    )
    from ta.rag.passages import (
        RetrievalConfig as RetrievalConfig,
        passage_settings as passage_settings,
    )
    from ta.rag.retrieval import (
        prompts_with_passages as prompts_with_passages,
        retrieve_for_prompts as retrieve_for_prompts,
        retriever_of as retriever_of,
    )
    from ta.rag.search import need_faiss as need_faiss

NAMES = {  # module: what `ta.rag` gives of it
    "ta.builtin.data_files": "passages_file",
    "ta.builtin.fine_tuned": "builtin_index",
    "ta.rag.embedding_settings": "EncoderConfig",
    "ta.rag.embedding": "open_encoder",
    "ta.rag.index": "begin_index build_index open_index",
    "ta.rag.passages": "RetrievalConfig passage_settings",
    "ta.rag.retrieval": "prompts_with_passages retrieve_for_prompts retriever_of",
    "ta.rag.search": "need_faiss",
    "ta.rag.joint": "RANKED RagModel question_collate rag_step reembedded retrieval_figures "
    "with_passages",
}
_HOME = {name: module for module, names in NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ta.rag' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
