"""Vectors are those of the sentence-transformers package, where it is installed: its layouts read, ours read by it."""

import json

import pytest
import torch

from ta.builtin import models
from ta.rag.embedding import embed, open_encoder, tokenize
from ta.rag.embedding_settings import (
    EmbeddingSettings,
    EncoderConfig,
    embedding_settings,
    save_embedding_settings,
)

package = pytest.importorskip("sentence_transformers")

TEXTS = ["key", "  red lamp ", "Anna's KEY Σ É 東京", "cup red box tea " * 40, "a\nb"]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 70,
    "pad_token_id": 1,
}
KINDS = {
    "Bert": {},
    "XLMRoberta": {},
    "MPNet": {},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "ModernBert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "Qwen3": {"num_key_value_heads": 1, "head_dim": 8},
}
# (normalised, files: of prompts and similarity, of the input)
LAYOUTS = [
    (True, {"prompts": {"query": "Query: ", "document": "Passage: "}}, {"max_seq_length": 20}),
    (False, {"similarity_fn_name": "dot", "default_prompt_name": "query"}, {}),
    (False, {"prompts": {"query": "Q "}}, {"max_seq_length": 30, "do_lower_case": True}),
    (
        False,
        {"prompts": {"document": "", "passage": "p "}},
        {"model_args": {}, "max_seq_length": 9},
    ),
]


def theirs(folder, kind):
    """Their vectors of TEXTS, each alone, as their similarity compares them."""
    model = package.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    encode = model.encode_query if kind == "query" else model.encode_document
    cosine = model.similarity_fn_name == "cosine"
    rows = [encode([x], normalize_embeddings=cosine, convert_to_tensor=True) for x in TEXTS]
    return torch.cat(rows)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("pooling", "written"),
    [("mean", "mean"), ("cls", "cls"), ("last", "lasttoken"), ("max", "max")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_their_layouts_are_read_and_ours_by_them(kind, pooling, written, layout, tmp_path):
    import transformers
    from transformers import AutoTokenizer

    normalized, of_texts, of_input = layout
    models.write_encoder(tmp_path)
    rows = len(AutoTokenizer.from_pretrained(tmp_path))
    config = getattr(transformers, f"{kind}Config")(vocab_size=rows, **SIZES | KINDS[kind])
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    # layers and pooling of ours, then their files
    save_embedding_settings(tmp_path, EmbeddingSettings(pooling, normalized, "", "", 20))
    if kind == "Bert":
        pool = {"embedding_dimension": 16, "pooling_mode": written}
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pool))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(of_texts))
    limits = {"max_seq_length": 60} | of_input
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(limits))

    settings = embedding_settings(str(tmp_path), EncoderConfig())
    assert settings.pooling == pooling
    encoder, tokenizer = open_encoder(str(tmp_path), settings)
    saved = tmp_path / "saved"
    encoder.model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    save_embedding_settings(saved, settings)
    for side in ("query", "passage"):
        ours = embed(encoder, tokenize(TEXTS, tokenizer, settings, side), "cpu")
        for folder in (tmp_path, saved):
            torch.testing.assert_close(ours, theirs(folder, side), rtol=1e-4, atol=1e-5)
