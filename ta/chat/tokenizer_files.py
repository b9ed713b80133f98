"""The files of a tokenizer: how they are read, and how an export has them for other programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ta.files import json_text
from ta.folders import read_json, value_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# an object of a JSON file
Json = dict[str, Any]
# the class that reads tokenizer.json as it stands, in transformers 4 and 5
PLAIN = "PreTrainedTokenizerFast"
# key in tokenizer_config.json: declared tokens that are real in content too
CONTENT_TOKENS = "content_tokens"
KINDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# files that other programs read instead of tokenizer.json, such as converters to GGUF
VOCABULARIES = (
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# further files that are true as long as no token was added or named
UNCHANGED = ("tekken.json", "added_tokens.json", "special_tokens_map.json")
# keys that transformers 5 leaves in tokenizer_config.json, or that speak of code that is not run
LEFT_OUT = ("is_local", "local_files_only", "backend", "name_or_path", "auto_map", "chat_template")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that tokenizer.json describes, whatever class the settings beside it name.

    transformers builds some classes by name over another tokenizer.json; here only the special
    tokens that no file names come from such a class. Without tokenizer.json the class decides.
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        return _by_class(folder)
    # read by our own code, and by none of transformers
    value_of(folder / "tokenizer_config.json", "tokenizer_class", str)
    value_of(folder / "tokenizer_config.json", CONTENT_TOKENS, str, many=True)
    fast = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    if "eos_token" not in _settings(folder) and fast.eos_token is None:
        known, words = _by_class(folder), fast.get_vocab()
        for kind in KINDS:
            if getattr(fast, kind) is None and getattr(known, kind, None) in words:
                setattr(fast, kind, getattr(known, kind))
    return fast


def _by_class(folder: Path) -> Any:
    """The tokenizer that AutoTokenizer makes of a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )


def _settings(folder: Path) -> Json:
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.exists() else {}


def save_tokenizer(
    fast: PreTrainedTokenizerFast, folder: Path, chat_template: str | None = None
) -> None:
    """Write a tokenizer for other programs; `folder` holds the model's config.json where there is
    one.

    Files are those that it was read from, byte by byte, as far as nothing was added; vocabularies
    of other programs and further named chat templates come along. `chat_template` takes the place
    of the default one. The class is the one that came where AutoTokenizer gives the ids of
    tokenizer.json with it, else the class that reads them as they stand. ValueError where
    AutoTokenizer of this transformers gives other ids for the model's type whatever the class.
    """
    # a tokenizer made in code came from no folder
    source = Path(fast.name_or_path) if fast.name_or_path else folder
    if not fast.name_or_path:
        fast.save_pretrained(folder)
    settings = {k: v for k, v in _settings(source).items() if k not in LEFT_OUT}
    named = _named_tokens(fast, settings)
    settings |= named
    if isinstance(settings.get("extra_special_tokens"), list):
        # the name of transformers 4 for such a list, which 5 reads too
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if CONTENT_TOKENS in fast.init_kwargs:
        settings[CONTENT_TOKENS] = fast.init_kwargs[CONTENT_TOKENS]
    carried = VOCABULARIES
    if added := _has_more(fast, source / "tokenizer.json"):
        tokens = fast.added_tokens_decoder.items()
        settings["added_tokens_decoder"] = {id: token.__getstate__() for id, token in tokens}
        fast.backend_tokenizer.save(str(folder / "tokenizer.json"))
    else:
        carried += ("tokenizer.json",)
    if not added and not named:
        carried += UNCHANGED
    for name in carried:
        if source != folder and (source / name).is_file():
            # not its mode: caches hold files that only their owner reads
            shutil.copyfile(source / name, folder / name)
    _write_templates(fast, folder, chat_template)
    _choose_class(fast, folder, settings)


def _named_tokens(fast: PreTrainedTokenizerFast, settings: Json) -> Json:
    """The special tokens that `settings` do not name, or name otherwise."""
    named = {}
    for kind in KINDS:
        value, old = getattr(fast, kind), settings.get(kind)
        if value is not None and value != (old["content"] if isinstance(old, dict) else old):
            named[kind] = value
    return named


def _write_templates(
    fast: PreTrainedTokenizerFast, folder: Path, chat_template: str | None
) -> None:
    """Write the chat templates of a tokenizer, `chat_template` in the place of the default one."""
    templates = fast.chat_template or {}
    templates = dict(templates) if isinstance(templates, dict) else {"default": templates}
    if chat_template is not None:
        templates["default"] = chat_template
    for name, text in templates.items():
        another = f"additional_chat_templates/{name}.jinja"
        file = folder / ("chat_template.jinja" if name == "default" else another)
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _has_more(fast: PreTrainedTokenizerFast, file: Path) -> bool:
    """Whether a tokenizer has added tokens that its tokenizer.json lacks or flags otherwise."""
    if not file.is_file():
        return True
    known = json.loads(file.read_bytes())["added_tokens"]
    now = {(id, t.content, t.special) for id, t in fast.added_tokens_decoder.items()}
    return not now <= {(t["id"], t["content"], t["special"]) for t in known}


def _choose_class(fast: PreTrainedTokenizerFast, folder: Path, settings: Json) -> None:
    """Write tokenizer_config.json with a class by which AutoTokenizer gives the ids of `fast`."""
    import transformers

    came = settings.get("tokenizer_class") or PLAIN
    exists = hasattr(transformers, came.removesuffix("Fast"))
    # the name by which transformers 5 calls the plain class is unknown to 4
    classes = [came] if exists and came not in ("TokenizersBackend", "PythonBackend") else []
    why = ""
    for name in dict.fromkeys([*classes, PLAIN]):
        text = json_text(settings | {"tokenizer_class": name}, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        try:
            read = _by_class(folder)
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if _same_tokenizer(read, fast):
            return
        why = f"it builds {type(read).__name__}, which gives other ids"
    raise ValueError(
        f"AutoTokenizer of transformers {transformers.__version__} misreads the tokenizer.json of "
        f"{fast.name_or_path} beside this model's config.json, whatever tokenizer_class is named "
        f"({why}), so an export would be misread too: give the tokenizer of the model in "
        "--tokenizer-path, or train an adapter (--adapter lora), whose folder has no config.json"
    )


def _same_tokenizer(read: Any, fast: PreTrainedTokenizerFast) -> bool:
    """Whether two tokenizers name the same special tokens and give the same ids.

    Backends that are described alike do. Others are tried on words of the vocabulary, on all added
    tokens, and on texts that pre-tokenizers cut in different ways.
    """
    if any(getattr(read, kind, None) != getattr(fast, kind) for kind in ("bos_token", "eos_token")):
        return False
    from transformers import PreTrainedTokenizerFast

    one, two = read.backend_tokenizer, fast.backend_tokenizer
    if type(read) is PreTrainedTokenizerFast or _described(one) == _described(two):
        # the plain class reads the file as it stands
        return True
    ids = sorted(two.get_vocab().values())
    ids = {*ids[:: len(ids) // WORDS + 1], *fast.get_added_vocab().values()}
    words = [two.decode([id], skip_special_tokens=False) for id in sorted(ids)]
    texts = [*PROBES, *(f"{word} a{word} b" for word in words)]
    return one.get_vocab() == two.get_vocab() and all(
        _ids(one, texts, special) == _ids(two, texts, special) for special in (False, True)
    )


# so many of the vocabulary are tried
WORDS = 2000
PROBES = (
    "Hello  world,\n\n\tit's 2024: 12345.6789 + 0x1F = ?!  \r\n  don't DON'T we'll",
    " leading, trailing   ",
    "Zażółć gęślą jaźń. Größe straße İstanbul naïve cafe\u0301 ﬁ Å ①②③ ½",
    "Привет, как дела? 你好，世界！ こんにちは 안녕하세요 مرحبا שלום नमस्ते ไทย",
    "🙂👩‍👩‍👧‍👦 \u200b\ufeff\u00a0\u3000…—“quotes” ▁_under_score camelCaseWords",
    "def f(x):\n    return {'a': [1, 22, 333], \"b\": x**2}  # <tag></tag> https://a.b/c?d=e&f#g",
)


def _described(backend: Tokenizer) -> Json:
    """A backend as JSON values, without padding and truncation, which its last caller has set."""
    return json.loads(backend.to_str()) | {"padding": None, "truncation": None}


def _ids(backend: Tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=special)]
