"""Classes with names, and encoders such as BERT: trained, exported, read by plain transformers, scored."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from ta.chat.encode import encode_chat
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import chat_tokenizer

TEXTS = ["The film is good", "A bad bad film", "good good", "the plot is bad"] * 4
MARKS = {"bert": ("[CLS]", "[SEP]", "[PAD]"), "roberta": ("<s>", "</s>", "<pad>")}


def encoder_folder(folder, kind):
    """A seeded tiny encoder without a classification head, with its tokenizer."""
    cls, sep, pad = MARKS[kind]
    marks = [pad, "[UNK]", cls, sep] if kind == "bert" else [cls, pad, sep, "[UNK]"]
    words = [*marks, *["the", "film", "is", "good", "a", "bad", "plot", "##s"]]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(t, words.index(t)) for t in (cls, sep)]
    )
    named = {"cls_token": cls, "sep_token": sep, "pad_token": pad, "unk_token": "[UNK]"}
    named |= {"bos_token": cls, "eos_token": sep} if kind == "roberta" else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "intermediate_size": 32, "pad_token_id": words.index(pad)}
    if kind == "bert":
        BertForMaskedLM(BertConfig(**shape, max_position_embeddings=32)).save_pretrained(folder)
    else:
        config = RobertaConfig(**shape, max_position_embeddings=34)
        RobertaModel(config).save_pretrained(folder)
    return folder, fast


def data_file(tmp_path):
    rows = [{"text": text, "label": "pos" if "good" in text else "neg"} for text in TEXTS]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "d.jsonl"


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_is_trained_exported_and_scored(door, tmp_path, kind):
    folder, fast = encoder_folder(tmp_path / kind, kind)
    data = data_file(tmp_path)
    chat = ChatConfig(loss_on="all")
    ids = encode_chat([{"role": "user", "content": TEXTS[0]}], chat_tokenizer(fast, chat), chat).ids
    assert ids == fast(TEXTS[0])["input_ids"]
    run = tmp_path / "run"
    flags = (
        "--data",
        data,
        "--labels",
        "neg",
        "pos",
        "--steps",
        "60",
        "--lr",
        "1e-2",
        "--batch-size",
        "16",
    )
    code, text = door("classify", "--model-path", folder, *flags, "--val-data", data, "--out", run)
    assert code == 0, text
    assert "text and label, 16 texts" in text, text[-3000:]
    last = [json.loads(line) for line in open(run / "metrics.jsonl")][-1]
    assert last["val_accuracy"] == 1
    model = AutoModelForSequenceClassification.from_pretrained(run / "final").eval()
    assert model.config.id2label == {0: "neg", 1: "pos"} and model.config.label2id["pos"] == 1
    plain = AutoTokenizer.from_pretrained(run / "final")
    with torch.no_grad():
        logits = model(**plain(TEXTS[:4], padding=True, return_tensors="pt")).logits
    assert logits.argmax(1).tolist() == [1, 0, 1, 0]
    code, text = door(
        "score",
        "--model-path",
        run / "final",
        "--kind",
        "class",
        "--data",
        data,
        "--out",
        tmp_path / "s.jsonl",
    )
    assert code == 0, text
    scored = [json.loads(line) for line in open(tmp_path / "s.jsonl")]
    assert [row["class"] for row in scored[:4]] == ["pos", "neg", "pos", "neg"] and scored[0][
        "label"
    ] == "pos"
    for row, own in zip(scored, logits.softmax(1).tolist(), strict=False):
        assert row["probabilities"] == pytest.approx(own, abs=1e-5)


def test_labels_as_text_or_as_numbers(door, tmp_path):
    data = data_file(tmp_path)
    numbers = tmp_path / "numbers.jsonl"
    rows = map(json.loads, open(data))
    numbers.write_text(
        "".join(json.dumps(row | {"label": int(row["label"] == "pos")}) + "\n" for row in rows)
    )
    losses = []
    for path, more in ((data, ("--labels", "neg", "pos")), (numbers, ("--num-labels", "2"))):
        out = tmp_path / path.stem
        code, text = door("classify", "--data", path, *more, "--steps", "2", "--out", out)
        assert code == 0, text
        losses.append([json.loads(line).get("loss") for line in open(out / "metrics.jsonl")])
    assert losses[0] == losses[1]
    for more, message in (
        (
            (),
            'd.jsonl:1: label is "pos"; give a whole number from 0, or name the classes in --labels',
        ),
        (("--labels", "a", "b"), "give one of a, b, or its place"),
        (("--labels", "pos", "neg", "--num-labels", "3"), "as many as --num-labels"),
        (("--labels", "pos", "pos"), "two or more different names"),
        (
            ("--labels", "pos", "neg", "--model-path", tmp_path / "d" / "final"),
            "the model's own classes are neg pos",
        ),
    ):
        code, text = door("classify", "--data", data, *more, "--out", tmp_path / "wrong")
        assert code == 2 and message in text, text


def test_roberta_takes_two_positions_fewer(door, tmp_path):
    folder, _ = encoder_folder(tmp_path / "roberta", "roberta")
    for words, code in ((30, 0), (31, 2)):
        (tmp_path / "d.jsonl").write_text(json.dumps({"text": "good " * words, "label": 1}))
        got, text = door(
            "classify",
            "--model-path",
            folder,
            "--data",
            tmp_path / "d.jsonl",
            "--num-labels",
            "2",
            "--steps",
            "1",
            "--out",
            tmp_path / f"{words}",
        )
        assert got == code, text
    assert "32 tokens that the model takes" in text
