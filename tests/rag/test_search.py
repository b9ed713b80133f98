"""Exact search equals a full sort, ties by place; an index that does not fit is refused."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ta.builtin import models, tasks
from ta.rag.embedding_settings import EncoderConfig
from ta.rag.index import begin_index, build_index, open_index
from ta.rag.search import top_k


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(0, 9),
    st.booleans(),
)
def test_top_k_is_the_head_of_a_stable_sort(queries, n, k, block, seed, whole):
    """Whole numbers tie all the time, and every product is exact."""
    rng = np.random.default_rng(seed)
    draw = (
        (lambda *shape: rng.integers(-2, 3, shape))
        if whole
        else lambda *shape: np.round(rng.standard_normal(shape) * 64) / 64
    )
    q, z = draw(queries, 4).astype(np.float32), draw(n, 4).astype(np.float32)
    scores, rows = top_k(torch.from_numpy(q), torch.from_numpy(z), k, block)
    products = q @ z.T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :k]
    assert rows.shape == (queries, min(k, n)) and np.array_equal(rows.numpy(), expected)
    assert np.array_equal(scores.numpy(), np.take_along_axis(products, expected, 1))


def test_top_k_on_real_vectors_over_many_blocks():
    generator = torch.Generator().manual_seed(0)
    q, z = torch.randn(7, 48, generator=generator), torch.randn(40_000, 48, generator=generator)
    scores, rows = top_k(q, z, 10)
    expected = (q @ z.T).topk(10)
    assert torch.equal(rows, expected.indices)
    torch.testing.assert_close(scores, expected.values)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an encoder, passages and their index."""
    folder = tmp_path_factory.mktemp("made")
    models.write_encoder(folder / "encoder")
    tasks.write_jsonl(folder / "passages.jsonl", tasks.passages()[:30])
    begin_index(
        folder / "index",
        [str(folder / "passages.jsonl")],
        EncoderConfig(encoder_path=str(folder / "encoder")),
    )
    assert build_index(folder / "index", "cpu")
    return folder


@pytest.fixture
def index(made, tmp_path):
    shutil.copytree(made / "index", tmp_path / "index")
    return tmp_path / "index"


def test_an_index_is_opened_as_it_was_built_and_after_a_copy(made, index):
    first, copy = open_index(made / "index"), open_index(index)
    assert (
        torch.equal(first.vectors, copy.vectors)
        and first.vectors.shape == (30, 128)
        and len(first.passages.offsets) == 31
    )
    assert (
        first.encoder == str(made / "encoder")
        and first.embedding_settings.pooling == "mean"
        and first.embedding_settings.normalize
    )
    torch.testing.assert_close(first.vectors.norm(dim=1), torch.ones(30))


def test_an_index_that_does_not_fit_is_refused(made, index, tmp_path, monkeypatch):
    def refused(words, **more):
        with pytest.raises(ValueError, match=words):
            open_index(index, **more)

    models.write_encoder(tmp_path / "other", seed=1)
    refused("built with another encoder than .*other", encoder_path=str(tmp_path / "other"))
    models.write_encoder(tmp_path / "wide", hidden_size=64)
    refused(
        "vectors of width 128, the encoder in .*wide gives 64", encoder_path=str(tmp_path / "wide")
    )
    refused("no model folder at nowhere", encoder_path="nowhere")
    manifest = index / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(text) | {"encoder_path": "/gone"}))
    refused("its encoder is not at /gone any more; give --encoder-path")
    manifest.write_text(json.dumps(json.loads(text) | {"format": 99}))
    refused("has format 99")
    manifest.write_text(text)
    passages = index / "passages.jsonl"
    lines = passages.read_text()
    passages.write_text(lines.replace("cat", "cow", 1))
    refused("has changed since the index was built .passages.jsonl does not have the hash")
    passages.write_text(lines[:-1])
    refused("has changed since the index was built .passages.jsonl has")
    passages.write_text(lines)
    vectors = index / "vectors.safetensors"
    content, before = vectors.read_bytes(), vectors.stat()
    vectors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("has changed since the index was built .vectors.safetensors does not have the hash")
    monkeypatch.setattr("ta.files.SMALL", 0)  # as if it were large: read on a word, or as a copy
    refused("vectors.safetensors does not have the hash")
    os.utime(vectors, ns=(before.st_atime_ns, before.st_mtime_ns))
    open_index(index)
    refused("vectors.safetensors does not have the hash", verify=True)
    vectors.write_bytes(content[:-4])
    refused("vectors.safetensors has")
    older = {k: x for k, x in json.loads(text).items() if not k.startswith("vectors")}
    manifest.write_text(json.dumps(older))
    refused("vectors.safetensors does not load as vectors of an index")
    manifest.unlink()
    refused("no index at")


def test_an_approximate_index_finds_nearly_the_same(made, index, monkeypatch):
    """All its lists searched, it gives what exact search does; without faiss or without such an index, a line says so."""
    pytest.importorskip("faiss")
    from ta.rag.search import approximate_top_k, write_approximate

    with pytest.raises(ValueError, match="has no approximate index: build it with --approximate"):
        approximate_top_k(index, torch.zeros(1, 128), 3)
    vectors = open_index(index).vectors
    write_approximate(index / "approximate.faiss", vectors)
    scores, rows = approximate_top_k(index, vectors[:5], 3, share=1.0)
    expected = top_k(vectors[:5], vectors, 3)
    assert torch.equal(rows, expected[1])
    torch.testing.assert_close(scores, expected[0])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="--approximate needs faiss"):
        write_approximate(index / "other", vectors)
