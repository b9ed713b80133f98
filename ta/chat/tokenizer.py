"""A tokenizer with its chat template, new tokens, stop tokens and literal encoding."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import date, datetime
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ta.chat.jinja import DEFAULT_TAGS, Arguments, jinja_template, special_pattern
from ta.chat.messages import ANSWER, SYSTEM, Chat, Message, canonical_role
from ta.chat.render import SPACE, Vocabulary
from ta.chat.template import (
    ChatConfig,
    ExplicitTemplate,
    Template,
    check_chat_config,
    explicit_template,
    export_template,
    split_chat,
)
from ta.chat.tokenizer_files import CONTENT_TOKENS, Json, read_tokenizer
from ta.command_line import check_config
from ta.files import hash_json
from ta.folders import ModelConfig, local_folder, resolve, value_of
from ta.printable import one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# what chat templates read the date with
CLOCK = "strftime_now"


@dataclass(frozen=True)
class TokenizerConfig:
    tokenizer_path: str | None = None
    """Folder of the tokenizer. Default: that of the model."""
    bos_token: str | None = None
    """BOS token for a tokenizer that names none; must be in its vocabulary."""
    eos_token: str | None = None
    """EOS token for a tokenizer that names none; must be in its vocabulary."""
    pad_token: str | None = None
    """Padding token for a tokenizer that names none; must be in its vocabulary."""
    init_tokens: tuple[str, ...] = ()
    """token=text pairs: new tokens, each starting from the mean of the embeddings of the pieces of
    a text, e.g. "<RS>=<s>"."""


class NewToken(NamedTuple):
    """A declared token."""

    text: str
    id: int
    # ids of the text it starts from: its embedding row starts as the mean of theirs
    pieces: tuple[int, ...]
    # whether the tokenizer did not have it before
    added: bool


class Placeholder(NamedTuple):
    """How one picture or sound of a modality stands in the text."""

    # token before its placeholders
    start: str
    # the placeholder, which stands `count` times
    token: str
    # token behind them
    end: str
    count: int
    # ValueError unless the file of this path can be used
    check: Callable[[str], None]
    # changes where other files may be usable
    check_key: str = ""
    # of the placeholder, once the tokenizer knows it
    id: int = -1

    @property
    def text(self) -> str:
        """What stands in the text for one picture or sound."""
        return self.start + self.token * self.count + self.end


class ChatTokenizer(NamedTuple):
    """How chats are written for one model."""

    fast: PreTrainedTokenizerFast
    template: Template
    vocabulary: Vocabulary
    new_tokens: Sequence[NewToken] = ()
    # token ids that end an answer: by the template, and by the model's generation config
    stop_ids: Sequence[int] = ()
    # texts that end an answer where no token does
    stop_strings: Sequence[str] = ()
    # of each modality that the model reads
    placeholders: Mapping[str, Placeholder] = {}
    # the day that the template writes, as YYYY-MM-DD; "" where it writes none
    day: str = ""


def load_chat_tokenizer(
    model: ModelConfig,
    tokenizer: TokenizerConfig,
    chat: ChatConfig,
    placeholders: Mapping[str, Placeholder] = {},
    day: str = "",
) -> ChatTokenizer:
    """The tokenizer of a model with its chat template and new tokens; loads no weights.

    It comes from --tokenizer-path, else from the adapter of `model` (a ModelConfig), else from the
    model's folder. Answers end where the template ends them, and at the end tokens that the model's
    generation config names. The tokens of `placeholders` are added too; unlike other new tokens
    they are plain text in what users write. `day` (YYYY-MM-DD, default: today) is what a template
    that writes the date writes. ValueError for settings that cannot work, a folder without a fast
    tokenizer, a token that cannot be added.
    """
    check_config(model)
    check_config(tokenizer)
    check_chat_config(chat)
    own = tokenizer.tokenizer_path
    fast = load_tokenizer(local_folder(own, model.hub) if own else resolve(model).tokenizer)
    meanings = _meanings(placeholders)
    media_tokens = [f"{token}={text}" for token, text in meanings.items()]
    new = add_tokens(fast, (*tokenizer.init_tokens, *media_tokens))
    name_special_tokens(fast, tokenizer)
    declared = {*fast.init_kwargs.get(CONTENT_TOKENS, ()), *(token.text for token in new)}
    content = sorted((declared & fast.get_added_vocab().keys()) - meanings.keys())
    if content:
        fast.init_kwargs[CONTENT_TOKENS] = content
    made = chat_tokenizer(fast, chat, content, new, placeholders, day)
    _keep_when_decoded(fast, made.vocabulary.content)
    ends, texts = known_ends(model, len(fast))
    if isinstance(made.template, ExplicitTemplate):
        # the texts belong to the folder's own template
        texts = []
    return made._replace(
        stop_ids=sorted({*made.stop_ids, *ends}),
        stop_strings=[*dict.fromkeys([*made.stop_strings, *texts])],
    )


def _keep_when_decoded(fast: PreTrainedTokenizerFast, tokens: Collection[str]) -> None:
    """Make added tokens no special ones, which decoded answers would lack, in place."""
    backend = fast.backend_tokenizer
    source = json.loads(backend.to_str())
    kept = [t for t in source["added_tokens"] if t["special"] and t["content"] in tokens]
    for token in kept:
        token["special"] = False
    if kept:
        backend.__setstate__(json.dumps(source).encode())


def chat_tokenizer(
    fast: PreTrainedTokenizerFast,
    chat: ChatConfig,
    content_tokens: Sequence[str] = (),
    new_tokens: Sequence[NewToken] = (),
    placeholders: Mapping[str, Placeholder] = {},
    day: str = "",
) -> ChatTokenizer:
    """The ChatTokenizer of a tokenizer whose tokens are all added.

    `content_tokens` are as in `vocabulary`, `day` as in `load_chat_tokenizer`. ValueError for a
    template that cannot work.
    """
    day = day or date.today().isoformat()
    template = template_of(fast, chat, day)
    literal = vocabulary(fast, content_tokens)
    forging = _turn_tokens(fast, template, literal) | _meanings(placeholders).keys()
    literal = literal._replace(
        content=literal.content - forging, answer=frozenset(literal.special) - forging
    )
    _, ids, strings = answer_end(template, literal)
    return ChatTokenizer(
        fast,
        template,
        literal,
        new_tokens,
        ids,
        strings,
        {name: p._replace(id=literal.special[p.token]) for name, p in placeholders.items()},
        day if CLOCK in export_template(template) else "",
    )


def tokenizer_settings(tokenizer: ChatTokenizer, chat: ChatConfig) -> Json:
    """All that decides how a dialogue becomes ids and weights, as JSON values."""
    placeholders = {name: [p.text, p.check_key] for name, p in tokenizer.placeholders.items()}
    template = tokenizer.template
    told = {"media": placeholders, "day": tokenizer.day}
    return {
        **{name: value for name, value in told.items() if value},
        "template": repr(tuple(template))
        if isinstance(template, ExplicitTemplate)
        else [template.source, tokenizer.fast.chat_template],
        "tokenizer": hash_json(
            [
                tokenizer.vocabulary.key,
                tokenizer.fast.special_tokens_map,
                sorted(tokenizer.vocabulary.content),
            ]
        ),
        "chat": asdict(chat),
    }


def _meanings(placeholders: Mapping[str, Placeholder]) -> dict[str, str]:
    """{token: text that its embedding row starts from} of all placeholders."""
    meanings = {placeholder.token: name for name, placeholder in placeholders.items()}
    for placeholder in placeholders.values():
        meanings |= {placeholder.start: "begin", placeholder.end: "end"}
    return meanings


def parse_init_token(text: str) -> tuple[str, str]:
    """`"<RS>=<s>"` -> `("<RS>", "<s>")`: split at the first `=`.

    ValueError when there is none or a side is empty.
    """
    token, equals, meaning = text.partition("=")
    if not equals or not token.strip() or not meaning:
        raise ValueError(
            f"new token {text!r}: needs a token, '=' and the text it starts from; give for example "
            "'<RS>=<s>'"
        )
    return token, meaning


def add_tokens(fast: PreTrainedTokenizerFast, init_tokens: Sequence[str]) -> list[NewToken]:
    """Add each `token=text` to the tokenizer, in place; `new_rows.set_rows` then sets their rows.

    A token that the tokenizer has already keeps its id, so adding twice is adding once. Everything
    is checked before anything is changed. Returns one NewToken per entry, in order. ValueError for
    a token or text that cannot work.
    """
    from tokenizers import AddedToken

    pairs = [parse_init_token(text) for text in init_tokens]
    tokens = [token for token, _ in pairs]
    known, words = fast.get_added_vocab(), fast.get_vocab()
    for token, text in pairs:
        if tokens.count(token) > 1:
            raise ValueError(
                f"new token {token!r}: is given more than once; give each token one text"
            )
        if token != token.strip():
            raise ValueError(
                f"new token {token!r}: begins or ends with white space, which tokenizers strip; "
                "give it without"
            )
        if inside := [other for other in tokens if other in text]:
            raise ValueError(
                f"new token {token!r}: its text {text!r} contains the new token {inside[0]!r}; "
                "give a text of known words"
            )
        if token in words and token not in known:
            raise ValueError(
                f"new token {token!r}: is an ordinary piece of the vocabulary already; give "
                f"another, such as '<{token}>'"
            )
    pieces = [_pieces(fast, token, text) for token, text in pairs]
    absent = [token for token in tokens if token not in known]
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in absent])
    added = fast.get_added_vocab()
    for token in absent:
        ids = fast(token, add_special_tokens=False)["input_ids"]
        if ids != [added[token]]:
            raise ValueError(
                f"new token {token!r}: another token takes a part of it (ids {ids}); give a text "
                "that no other token begins"
            )
    return [
        NewToken(token, added[token], own, token in absent)
        for token, own in zip(tokens, pieces, strict=True)
    ]


def _pieces(fast: PreTrainedTokenizerFast, token: str, text: str) -> tuple[int, ...]:
    """The ids of `text` by the tokenizer as it is.

    One id when the text is a token that was added to it, such as "<s>".
    """
    added = fast.get_added_vocab()
    ids = [added[text]] if text in added else fast(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"new token {token!r}: its text {text!r} encodes to no token; give a text with words "
            "in it"
        )
    if text not in added and set(ids) == {fast.unk_token_id}:
        raise ValueError(
            f"new token {token!r}: its text {text!r} is unknown to the tokenizer; give a text of "
            "known words"
        )
    return tuple(ids)


def load_tokenizer(path: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder.

    Nothing is looked up on a hub. ValueError: no such folder, no fast tokenizer in it.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(path or "")
    if not path or not folder.is_dir():
        raise ValueError(
            f"tokenizer folder {str(folder)!r} does not exist; give the folder of a tokenizer in "
            "--tokenizer-path"
        )
    try:
        tokenizer = read_tokenizer(folder)
    except Exception as error:
        # transformers and tokenizers raise errors of many types for a file that is not whole
        why = str(error).strip().splitlines()[:1] or [repr(error)]
        raise ValueError(
            f"folder {str(folder)!r} holds no tokenizer that can be loaded ({why[0]}); give one "
            "with a tokenizer.json"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"the tokenizer in {str(folder)!r} is not backed by a tokenizer.json, which chats are "
            "encoded with; convert it to a fast one"
        )
    return tokenizer


def name_special_tokens(tokenizer: PreTrainedTokenizerFast, config: TokenizerConfig) -> None:
    """Make the tokens that `config` names bos, eos and pad, in place.

    ValueError for a token that the vocabulary lacks or that is named otherwise already.
    """
    for kind in ("bos_token", "eos_token", "pad_token"):
        token, has = getattr(config, kind), getattr(tokenizer, kind)
        if token in (None, has):
            continue
        flag = "--" + kind.replace("_", "-")
        if has is not None:
            raise ValueError(
                f"{flag} {token!r} is given, but the tokenizer's own is {has!r} and the model was "
                "trained with it; leave the flag out"
            )
        if token not in tokenizer.get_vocab():
            raise ValueError(
                f"{flag} {token!r} is not in the vocabulary; give a token that is, or declare it "
                "with --init-tokens"
            )
        setattr(tokenizer, kind, token)


def vocabulary(
    tokenizer: PreTrainedTokenizerFast, content_tokens: Sequence[str] = ()
) -> Vocabulary:
    """What chats are encoded with; make it again after adding tokens.

    `content_tokens` are added tokens that count in content too, e.g. <doc_sep>; any other is plain
    text there. ValueError: a content token that is no added token.
    """
    backend = tokenizer.backend_tokenizer
    added = {token.content: (id, token) for id, token in backend.get_added_tokens_decoder().items()}
    # runs of white space are text to every user, whatever table a tokenizer keeps them in
    special = {text: id for text, (id, _) in added.items() if text.strip(SPACE + "\u2581")}
    for text in content_tokens:
        if text not in special:
            raise ValueError(
                f"content token {text!r} is no added token of the tokenizer; add it with "
                "--init-tokens, or leave it out"
            )
    written = backend.to_str()
    source = json.loads(written)
    literal = _literal(source, special)
    begins = _begins(source)
    return Vocabulary(
        encode=_encoder(_without_prefix(literal)),
        special=special,
        content=frozenset(content_tokens),
        encode_start=_encoder(literal) if begins else None,
        start_after_special=begins == "always",
        strips={
            id: (token.lstrip, token.rstrip)
            for id, token in added.values()
            if token.lstrip or token.rstrip
        },
        key=hashlib.sha256(written.encode()).hexdigest(),
    )


def _encoder(source: Json):
    from tokenizers import Tokenizer

    backend: Tokenizer = Tokenizer.from_str(json.dumps(source))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [
            encoding.ids
            for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    return encode


def _literal(source: Json, special: dict[str, int]) -> Json:
    """The tokenizer without special tokens.

    They are neither its added tokens nor words of its model, which could match them in plain text.
    """
    model = dict(source["model"])
    words = model["vocab"]
    listed = isinstance(words, list)
    hidden = special.keys() & {*([word for word, _ in words] if listed else words)}
    hidden -= {f"<0x{byte:02X}>" for byte in range(256) if model.get("byte_fallback")}
    # a name nobody can write: ids must stay, so the entries must too
    secret = secrets.token_hex(16)
    name = lambda text: secret + text if text in hidden else text
    if listed:
        model["vocab"] = [[name(word), score] for word, score in words]
    else:
        model["vocab"] = {name(word): id for word, id in words.items()}
    if model.get("unk_token"):
        model["unk_token"] = name(model["unk_token"])
    if hidden and model.get("merges"):
        pairs = [
            merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]
        ]
        model["merges"] = [pair for pair in pairs if hidden.isdisjoint((*pair, "".join(pair)))]
    added = source["added_tokens"]
    contents = [token["content"] for token in added]
    kept = [
        {**token, "content": secret + text if text in special else text}
        for token, text in zip(added, contents, strict=True)
    ]
    return {
        **source,
        "model": model,
        "added_tokens": [] if special.keys() >= {*contents} else kept,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _steps(*steps: Json | None) -> Iterator[Json]:
    for step in filter(None, steps):
        yield step
        yield from _steps(*step.get("pretokenizers", ()), *step.get("normalizers", ()))


def _begins(source: Json) -> str | None:
    """Where the tokenizer puts a space in front of a text; None: nowhere.

    "first": at its very beginning only; "always": after each special token too.
    """
    found = None
    for step in _steps(source["normalizer"], source["pre_tokenizer"]):
        if (
            step["type"] == "Prepend"
            or step.get("add_prefix_space")
            or step.get("prepend_scheme") == "always"
        ):
            return "always"
        if step.get("prepend_scheme") == "first":
            found = "first"
    return found


def _without_prefix(source: Json) -> Json:
    source = source | deepcopy({key: source[key] for key in ("normalizer", "pre_tokenizer")})
    for step in _steps(source["normalizer"], source["pre_tokenizer"]):
        if step["type"] == "Prepend":
            # as much as nothing
            step |= {"type": "Replace", "pattern": {"String": "\u2581"}, "content": "\u2581"}
            del step["prepend"]
        if "add_prefix_space" in step:
            step["add_prefix_space"] = False
        if "prepend_scheme" in step:
            step["prepend_scheme"] = "never"
    return source


def parse_role_tags(pairs: Sequence[str]) -> dict[str, str]:
    """("user=Human", "bot=AI") -> {"user": "Human", "assistant": "AI"}.

    ValueError for what is not role=tag or comes twice.
    """
    tags: dict[str, str] = {}
    for pair in pairs:
        role, equals, tag = pair.partition("=")
        if not equals or not role:
            raise ValueError(f"role tag {pair!r} is not role=tag; give e.g. user=Human")
        if canonical_role(role) in tags:
            raise ValueError(
                f"role {role!r} has two tags (bot and assistant are the same role); give one"
            )
        tags[canonical_role(role)] = tag
    return tags


def template_of(tokenizer: PreTrainedTokenizerFast, config: ChatConfig, day: str = "") -> Template:
    """The explicit template where config gives a prefix or suffix, else the tokenizer's own.

    The tokenizer of an encoder of text has none: its classification and separator tokens stand in.

    Role tags name the roles of the explicit one, or rename roles for the tokenizer's own. A
    template that writes the date writes `day` (YYYY-MM-DD, default: today) at midnight, also in a
    run over midnight.
    ValueError: no template at all, or parts that cannot work.
    """
    tags = parse_role_tags(config.role_tags)
    if config.prefix_template is not None or config.suffix_template is not None:
        prefix, suffix = (
            text and text.replace("\\n", "\n").replace("\\t", "\t")
            for text in (config.prefix_template, config.suffix_template)
        )
        return explicit_template(prefix, suffix, tags, tokenizer.bos_token or tokenizer.cls_token)
    if not tokenizer.chat_template:
        if tokenizer.cls_token and tokenizer.sep_token:
            # an encoder, such as BERT: its own marks before the text and behind each message
            return explicit_template("", tokenizer.sep_token, tags, tokenizer.cls_token)
        raise ValueError(
            "the tokenizer has no chat template; give --prefix-template and --suffix-template (and "
            "--role-tags)"
        )
    from transformers.utils.chat_template_utils import _compile_jinja_template

    with_tools = tokenizer.get_chat_template(tools=[{}])  # a tokenizer may have one of its own
    source = tokenizer.get_chat_template()
    named = {"tools": None, "documents": None, **tokenizer.special_tokens_map, CLOCK: _clock(day)}

    def render(messages: Chat, opened: bool, arguments: Arguments) -> str:
        """The template's text; ValueError where it refuses the messages."""
        given = {"messages": messages, "add_generation_prompt": opened, **named, **arguments}
        try:
            compiled = _compile_jinja_template(with_tools if arguments.get("tools") else source)
            return compiled.render(given)
        except Exception as error:  # a template is a program: it may raise anything
            why = one_line(str(error), 500) or type(error).__name__
            raise ValueError(f"the tokenizer's chat template refuses this chat: {why}") from None

    special = tokenizer.get_added_vocab()
    return jinja_template(render, special, source, tags or DEFAULT_TAGS)


def _turn_tokens(
    tokenizer: PreTrainedTokenizerFast, template: Template, vocab: Vocabulary
) -> set[str]:
    """The tokens that begin or end a turn: they are text in whatever a record holds.

    They are those around questions and answers, and those with a name, such as EOS.
    """
    pattern = special_pattern(frozenset(vocab.special))
    found = set(tokenizer.special_tokens_map.values()) & vocab.special.keys()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    once = [*_question(template), {"role": ANSWER, "content": "x"}]
    try:
        spans = split_chat(once * 2, template)
    except ValueError:
        return found
    for i, span in enumerate(spans):
        prefix = [name for part in span.prefix for name in pattern.findall(part.text)]
        # before the first question may stand a system prompt that names tokens, and behind an
        # answer's first token what it is asked to begin with, such as <think>
        question = once[i % len(once)]["role"] != ANSWER
        near = prefix if question and i else prefix[-1:] if question else prefix[:1]
        found.update(near, special.intersection(prefix), pattern.findall(span.suffix))
    return found


def _question(template: Template) -> list[Message]:
    asks = [role for role in template.role_tags if role not in (SYSTEM, ANSWER)]
    return [{"role": "user" if "user" in asks else asks[0], "content": "x"}] if asks else []


def _clock(day: str) -> Callable[[str], str]:
    return datetime.fromisoformat(day or date.today().isoformat()).strftime


def answer_end(template: Template, vocab: Vocabulary) -> tuple[str, list[int], list[str]]:
    """What the template writes after an answer, and the token or the text at which one ends.

    Where nothing is written after an answer, it ends with what the next message begins with. The
    token is a special one, for generation_config.eos_token_id; where there is none, it is plain
    text. Both lists are empty where an answer does not end at all.
    """
    question = _question(template)
    chat = [*question, {"role": ANSWER, "content": "x"}]
    suffix = split_chat(chat, template)[-1].suffix
    try:
        parts = split_chat([*chat, *question], template)[-1].prefix if question else ()
    except ValueError:
        # the template takes no second question
        parts = ()
    following = "".join(part.text for part in parts)
    if found := special_pattern(frozenset(vocab.special)).search(suffix or following):
        return suffix, [vocab.special[found.group()]], []
    text = suffix or following.rstrip() or following
    return suffix, [], [text] * bool(text)


def unlearned_end(tokenizer: ChatTokenizer) -> str:
    """A line for the user where answers do not end in a token that is learned; "" where they do."""
    suffix, ids, strings = answer_end(tokenizer.template, tokenizer.vocabulary)
    if suffix and ids:
        return ""
    if suffix:
        return (
            f"note: the chat template ends answers with the text {suffix!r} and no token; "
            "generation stops at that text (stop_strings in the export's generation config, for "
            "which transformers' generate needs tokenizer=...)"
        )
    ends = [*tokenizer.fast.convert_ids_to_tokens(ids), *strings]
    how = f"stops where the next message begins, at {ends[0]!r}" if ends else "runs to its limit"
    return (
        "note: the chat template writes nothing after an answer, so the model never learns to "
        f"stop: generation {how}; give --suffix-template to teach an end"
    )


def known_ends(model: ModelConfig, size: int) -> tuple[list[int], list[str]]:
    """The end tokens (below `size`) and stop strings of the folder's generation config."""
    sources = resolve(model)
    for folder in (sources.adapter, sources.base):
        file = Path(folder or "") / "generation_config.json"
        if file.is_file():
            ends = value_of(file, "eos_token_id", int, many=True)
            texts = value_of(file, "stop_strings", str, many=True) or []
            ends = ends if isinstance(ends, list) else [ends]
            texts = [texts] if isinstance(texts, str) else texts
            return [id for id in ends if id is not None and id < size], texts
    return [], []


def disagreement(
    tokenizer: PreTrainedTokenizerFast,
    template: Template,
    chats: Sequence[Chat],
    encoded: Sequence[Sequence[int]],
    day: str = "",
) -> str:
    """How the exported template first differs from training, in words; "" where it does not.

    It is tokenized as one text by plain transformers and compared with the ids that were trained.
    Templates whose borders are plain text can differ: a tokenizer merges across borders that
    training keeps. A template that writes the date writes `day`, as in training.
    """
    source, written = export_template(template), {CLOCK: _clock(day)}
    for i, (chat, ids) in enumerate(zip(chats, encoded, strict=True)):
        own = ("loss", "disable_loss")
        plain = [{key: m[key] for key in m if key not in own} for m in chat]
        theirs = tokenizer.apply_chat_template(
            plain, chat_template=source, tokenize=True, return_dict=False, **written
        )
        if list(ids) != theirs:
            pairs = enumerate(zip_longest(ids, theirs))
            at = next(k for k, (a, b) in pairs if a != b)
            mine, other = (
                tokenizer.convert_ids_to_tokens(list(side[at : at + 3])) for side in (ids, theirs)
            )
            return f"chat {i + 1}, token {at}: trained {mine}, exported template gives {other}"
    return ""
