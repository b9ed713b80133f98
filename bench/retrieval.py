"""What do search, building and opening an index cost beside the arithmetic they need?

    python bench/retrieval.py [--peer-python PEERS]

Search: the ten best of a million vectors of 384 numbers for 64 questions, beside the bare products
of the same blocks, torch.topk over all products at once, and faiss's flat index. Building: an
encoder of six layers of 384 over passages of 20 to 120 words, from JSONL to the published folder,
beside its forward passes on the same batches, made beforehand. Opening: an index of ten million
passages (15 GB on the disk).
"""

import argparse
import tempfile
import time
from pathlib import Path

try:
    from harness import Figures, compare, parser, read
except ImportError:
    from bench.harness import Figures, compare, parser, read


def vectors(flags: argparse.Namespace):
    """(questions (64, 384), passages (N, 384)), seeded."""
    import torch

    torch.set_num_threads(flags.threads)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 384, generator=generator), torch.randn(
        flags.vectors, 384, generator=generator
    )


def timed(work, flags) -> Figures:
    """CPU and wall milliseconds a call of `work`; the first call is left out."""
    work()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(flags.repeats):
        work()
    return {
        "cpu_ms": 1000 * (time.process_time() - cpu) / flags.repeats,
        "ms": 1000 * (time.perf_counter() - start) / flags.repeats,
    }


def product(flags) -> Figures:
    q, z = vectors(flags)
    block = 1 << 14
    return timed(lambda: [q @ z[i : i + block].T for i in range(0, len(z), block)], flags)


def ours(flags) -> Figures:
    from ta.rag.search import top_k

    q, z = vectors(flags)
    return timed(lambda: top_k(q, z, 10), flags)


def at_once(flags) -> Figures:
    q, z = vectors(flags)
    return timed(lambda: (q @ z.T).topk(10), flags)


def faiss_flat(flags) -> Figures:
    import faiss

    q, z = (x.numpy() for x in vectors(flags))
    faiss.omp_set_num_threads(flags.threads)
    index = faiss.IndexFlatIP(384)
    index.add(z)
    return timed(lambda: index.search(q, 10), flags)


def passages(flags, folder: Path) -> tuple[list[dict], str]:
    """Passages and the folder of an encoder."""
    import random

    import torch

    from ta.builtin import models

    torch.set_num_threads(flags.threads)
    rng = random.Random(0)
    shape = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 1 if flags.tiny else 6,
        "num_attention_heads": 12,
    }
    models.write_encoder(folder / "encoder", **shape, max_position_embeddings=512)
    words = [*models.tasks.PEOPLE, *models.tasks.OBJECTS]
    texts = [" ".join(rng.choices(words, k=rng.randint(20, 120))) for _ in range(flags.passages)]
    return [{"id": str(i), "text": text} for i, text in enumerate(texts)], str(folder / "encoder")


def encoder(flags) -> Figures:
    """The forward passes alone."""
    import torch

    from ta.rag.embedding import open_encoder, pad, tokenize
    from ta.rag.embedding_settings import EmbeddingSettings

    with tempfile.TemporaryDirectory() as folder:
        records, path = passages(flags, Path(folder))
        reading = EmbeddingSettings("mean", True, "", "", 512)
        model, tokenizer = open_encoder(path, reading)
    ids = sorted(
        tokenize([record["text"] for record in records], tokenizer, reading, "passage"), key=len
    )
    batches, group = [], []
    for row in ids:
        if group and (len(group) + 1) * len(row) > 8192:
            batches, group = [*batches, pad(group)], []
        group.append(row)
    batches.append(pad(group))
    with torch.no_grad():
        model(batches[0])
        cpu = time.process_time()
        for batch in batches:
            model(batch)
    return {"build_cpu_s": time.process_time() - cpu}


def building(flags) -> Figures:
    from ta.builtin import tasks
    from ta.rag.embedding import Texts, open_encoder
    from ta.rag.embedding_settings import EncoderConfig
    from ta.rag.index import begin_index, build_index

    with tempfile.TemporaryDirectory() as folder:
        records, path = passages(flags, Path(folder))
        tasks.write_jsonl(Path(folder) / "passages.jsonl", records)
        import torch

        from ta.rag.embedding_settings import embedding_settings

        config = EncoderConfig(encoder_path=path)
        warm, _ = open_encoder(path, embedding_settings(path, config))
        with torch.no_grad():
            warm(
                Texts(
                    torch.ones(16, 100, dtype=torch.int64), torch.ones(16, 100, dtype=torch.int64)
                )
            )
        cpu = time.process_time()
        begin_index(Path(folder) / "index", [str(Path(folder) / "passages.jsonl")], config)
        assert build_index(Path(folder) / "index", "cpu")
        return {"build_cpu_s": time.process_time() - cpu}


def opening(flags) -> Figures:
    import json

    import numpy as np
    import torch

    from ta.folders import fingerprint
    from ta.rag.embedding_settings import EncoderConfig, embedding_settings
    from ta.rag.index import open_index, save_index
    from ta.rag.passages import Passages, read_passages

    with tempfile.TemporaryDirectory() as place:
        _, path = passages(flags, Path(place))
        folder, n = Path(place) / "index", 10 * flags.vectors
        line = json.dumps({"id": "0", "text": "a passage"}).encode() + b"\n"
        (Path(place) / "many.jsonl").write_bytes(line * n)
        many = Passages(Path(place) / "many.jsonl", np.arange(n + 1, dtype=np.int64) * len(line))
        zeros = np.memmap(Path(place) / "zeros", np.float32, "w+", shape=(n, 384))
        reading = embedding_settings(path, EncoderConfig())._asdict()
        about = {"format": 1, "encoder": fingerprint(path), "encoder_path": path}
        save_index(folder, many, torch.from_numpy(zeros), about | {"reading": reading})
        start = time.perf_counter()
        index = open_index(folder)
        assert (
            index.vectors.shape == (n, 384)
            and read_passages(index.passages, [n - 1])[0]["id"] == "0"
            and not index.vectors[n // 2].any()
        )
        return {"open_s": time.perf_counter() - start}


SEARCH = {"product": product, "ours": ours, "torch.topk of all": at_once, "faiss flat": faiss_flat}
INDEX = {"encoder": encoder, "building": building, "opening": opening}


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--vectors", type=int, default=1_000_000)
    flags.add_argument("--passages", type=int, default=512)
    flags.add_argument("--repeats", type=int, default=3)
    flags = read(flags, vectors=2_000, passages=8, repeats=1)
    if flags.one:
        compare(SEARCH | INDEX, flags, "product")
    else:
        compare(SEARCH, flags, "product", peers=("faiss flat",))
        compare(INDEX, flags, "encoder")
