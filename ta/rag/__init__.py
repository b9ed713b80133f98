"""Retrieval: passages, text encoders, indexes, and training retriever and generator together.

What recipes need of it is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ta.faces import face

if TYPE_CHECKING:  # what the package gives, listed here for editors and for face()
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

__getattr__, __all__ = face(__name__, __file__)
