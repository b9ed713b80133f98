"""Ids are those of tokenizer.json whatever class is named beside it, and an export's files are read by others as by us."""

import json
import stat

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

from ta.chat.tokenizer import add_tokens, load_tokenizer
from ta.chat.tokenizer_files import save_tokenizer

TEXT = "What is 12 plus 3?\n It's  1,024 – Größe 你好 🙂 <|end|>"
CONFIGS = {"llama": LlamaConfig, "gpt2": GPT2Config, "qwen2": Qwen2Config, None: None}


def backend(normalizer=None):
    """One token a byte, but 12 and words that begin with a space; digits alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|start|>", "<|end|>", *alphabet, "12", "Ġi", "Ġis"]
    merges = [("1", "2"), ("Ġ", "i"), ("Ġi", "s")]
    made = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in words[:2]])
    return made


def folder(path, settings, kind=None):
    """A folder with tokenizer.json, its settings and a model's config.json; the ids of TEXT by tokenizers alone."""
    path.mkdir()
    backend().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if CONFIGS[kind] is not None:
        CONFIGS[kind]().save_pretrained(path)
    return Tokenizer.from_file(str(path / "tokenizer.json")).encode(TEXT).ids


def exported(fast, path, kind, **options):
    path.mkdir()
    if CONFIGS[kind] is not None:
        CONFIGS[kind]().save_pretrained(path)
    save_tokenizer(fast, path, **options)
    return json.loads((path / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "gpt2", None])
@pytest.mark.parametrize(
    "named",
    [
        None,
        "LlamaTokenizerFast",
        "LlamaTokenizer",
        "GPT2Tokenizer",
        "TokenizersBackend",
        "NoSuchTokenizer",
    ],
)
def test_ids_are_those_of_tokenizer_json(tmp_path, kind, named):
    settings = {"eos_token": "<|end|>", "is_local": True, "extra_special_tokens": ["<|start|>"]}
    ids = folder(tmp_path / "base", settings | ({"tokenizer_class": named} if named else {}), kind)
    fast = load_tokenizer(str(tmp_path / "base"))
    assert fast(TEXT, add_special_tokens=False).input_ids == ids
    written = exported(fast, tmp_path / "out", kind)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT).input_ids == ids
    # a class that gives the ids stays, any other becomes the one that transformers 4 knows too
    assert written["tokenizer_class"] in (named, "PreTrainedTokenizerFast")
    assert written.keys() == {"eos_token", "tokenizer_class", "additional_special_tokens"}
    for name in ("out", "base"):
        assert Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")).encode(TEXT).ids == ids
    same = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("base", "out")]
    assert same[0] == same[1]


def test_a_class_that_gives_the_ids_stays(tmp_path):
    """The GPT-2 class rebuilds a byte-level tokenizer as it stands, so its name is kept."""
    path = tmp_path / "base"
    folder(path, {"tokenizer_class": "GPT2Tokenizer"}, "gpt2")
    made = backend()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True)])  # this class names it
    made.save(str(path / "tokenizer.json"))
    fast = load_tokenizer(str(path))
    assert exported(fast, tmp_path / "out", "gpt2")["tokenizer_class"] == "GPT2Tokenizer"
    ids = made.encode(TEXT).ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT).input_ids == ids


def test_a_model_type_whose_class_cannot_be_named_is_refused(tmp_path):
    """transformers 5 reads a qwen2 folder by its own class, whatever the settings say."""
    folder(tmp_path / "base", {"eos_token": "<|end|>"}, "qwen2")
    made = backend()
    # that class cuts between digits, this tokenizer does not
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(tmp_path / "base" / "tokenizer.json"))
    ids = made.encode(TEXT).ids
    fast = load_tokenizer(str(tmp_path / "base"))
    assert fast(TEXT).input_ids == ids
    assert AutoTokenizer.from_pretrained(tmp_path / "base")(TEXT).input_ids != ids
    with pytest.raises(ValueError, match=r"misreads the tokenizer\.json.*--tokenizer-path"):
        exported(fast, tmp_path / "out", "qwen2")
    exported(fast, tmp_path / "adapter", None)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter")(TEXT).input_ids == ids


def test_special_tokens_that_only_the_class_knows(tmp_path):
    """A GPT-2 folder often names none: the class says <|endoftext|>."""
    folder(tmp_path / "base", {"tokenizer_class": "GPT2Tokenizer"}, "gpt2")
    assert load_tokenizer(str(tmp_path / "base")).eos_token is None  # not in the vocabulary
    made = backend()
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    made.save(str(tmp_path / "base" / "tokenizer.json"))
    fast = load_tokenizer(str(tmp_path / "base"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert fast.eos_token == theirs.eos_token == "<|endoftext|>"
    written = exported(fast, tmp_path / "out", "gpt2")
    assert written["eos_token"] == "<|endoftext|>"


def test_other_files_and_named_templates_come_along(tmp_path):
    base = tmp_path / "base"
    templates = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    folder(base, {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|end|>"}, "llama")
    (base / "chat_template.jinja").write_text(templates["default"])
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(templates["tool_use"])
    for name in ("tokenizer.model", "tekken.json", "special_tokens_map.json", "notes.txt"):
        (base / name).write_bytes(b"{}")
        (base / name).chmod(0o600)
    fast = load_tokenizer(str(base))
    written = exported(fast, tmp_path / "out", "llama")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.model", "tekken.json", "special_tokens_map.json"} <= names
    assert "notes.txt" not in names and "chat_template" not in written
    assert stat.S_IMODE((tmp_path / "out" / "tokenizer.model").stat().st_mode) & 0o044
    # what speaks of the vocabulary as it was stays behind where a token is added
    add_tokens(fast, ["<note>=is"])
    fast.pad_token = "<|start|>"
    new = {"chat_template": "{{ 'new' }}"}
    written = exported(fast, tmp_path / "more", "llama", **new)
    read = AutoTokenizer.from_pretrained(tmp_path / "more")
    assert read.chat_template == templates | {"default": new["chat_template"]}
    assert (read.pad_token, read.eos_token) == ("<|start|>", "<|end|>")
    id = fast.get_vocab()["<note>"]
    assert (
        read("12<note>").input_ids == fast("12<note>").input_ids and id in read("<note>").input_ids
    )
    assert written["added_tokens_decoder"][str(id)]["content"] == "<note>"
    names = {path.name for path in (tmp_path / "more").iterdir()}
    assert "tokenizer.model" in names and not {"tekken.json", "special_tokens_map.json"} & names
    # and once more from there
    again = load_tokenizer(str(tmp_path / "more"))
    assert exported(again, tmp_path / "again", "llama") == written
    same = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("more", "again")]
    assert same[0] == same[1]
