"""Tokenizers: loading, literal vocabularies, templates chosen, exported and ended."""

import copy
import json
from datetime import date

import pytest
from test_encode import GENERATE, PLAIN, SHAPES, dialogues, fast_tokenizer, messages, real, setting
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from ta.builtin.model_folders import tiny_folder
from ta.chat.encode import encode_chat, encode_chats
from ta.chat.template import ChatConfig, ExplicitTemplate, explicit_template, export_template
from ta.chat.tokenizer import (
    ChatTokenizer,
    TokenizerConfig,
    answer_end,
    chat_tokenizer,
    disagreement,
    load_chat_tokenizer,
    load_tokenizer,
    name_special_tokens,
    parse_role_tags,
    template_of,
    tokenizer_settings,
    vocabulary,
)
from ta.folders import ModelConfig


def test_a_tokenizer_saved_and_loaded_encodes_the_same(tmp_path):
    made, tokenizer = setting("llama3")
    made.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    chats = [chat for _, chat in dialogues("llama3", 5)]
    assert encode_chats(chats, chat_tokenizer(again, PLAIN), PLAIN) == encode_chats(
        chats, tokenizer, PLAIN
    )
    own = TokenizerConfig(tokenizer_path=str(tmp_path))
    assert load_chat_tokenizer(ModelConfig(str(tiny_folder())), own, PLAIN).fast.bos_token == "<s>"


def test_loading_says_what_is_wrong(tmp_path):
    for path in (None, "", "/not/there", "org/name"):
        with pytest.raises(ValueError, match="does not exist"):
            load_tokenizer(path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer("human").backend_tokenizer, bos_token="<s>"
    ).save_pretrained(tmp_path / "t")
    made = load_tokenizer(str(tmp_path / "t"))
    with pytest.raises(ValueError, match=r"--eos-token '<nope>' is not in the vocabulary"):
        name_special_tokens(made, TokenizerConfig(eos_token="<nope>"))
    with pytest.raises(
        ValueError, match=r"--bos-token '</s>' is given, but the tokenizer's own is '<s>'"
    ):
        name_special_tokens(made, TokenizerConfig(bos_token="</s>"))
    names = TokenizerConfig(eos_token="</s>", pad_token="</s>", bos_token="<s>")
    name_special_tokens(made, names)
    assert (made.bos_token, made.eos_token, made.pad_token) == ("<s>", "</s>", "</s>")


def test_a_new_token_can_be_the_one_that_pads(tmp_path):
    made = load_tokenizer(tiny_folder())
    made.pad_token = None
    made.save_pretrained(tmp_path)
    settings = {"tokenizer_path": str(tmp_path), "pad_token": "<blank>"}
    config = TokenizerConfig(**settings, init_tokens=("<blank>=blank",))
    tokenizer = load_chat_tokenizer(ModelConfig(), config, ChatConfig())
    assert tokenizer.fast.pad_token_id == tokenizer.new_tokens[0].id == len(made)
    with pytest.raises(ValueError, match=r"is not in the vocabulary.*--init-tokens"):
        load_chat_tokenizer(ModelConfig(), TokenizerConfig(**settings), ChatConfig())


def test_the_template_is_the_one_asked_for():
    made = fast_tokenizer("chatml")
    explicit = template_of(
        made,
        ChatConfig(
            prefix_template="<|im_start|>{role}\\n",
            suffix_template="<|im_end|>\n",
            role_tags=("bot=AI", "user=U"),
        ),
    )
    assert explicit == ExplicitTemplate(
        "<|im_start|>{role}\n", "<|im_end|>\n", {"assistant": "AI", "user": "U"}, "<s>"
    )
    assert template_of(made, ChatConfig(suffix_template="</s>")).prefix == ""
    assert template_of(made, PLAIN).source == SHAPES["chatml"]
    chat = [{"role": "critic", "content": "no"}, {"role": "bot", "content": "yes"}]
    renamed = template_of(made, ChatConfig(role_tags=("critic=user", "bot=assistant")))
    renamed = ChatTokenizer(made, renamed, vocabulary(made))
    assert encode_chat(chat, renamed, PLAIN).ids == real(made, messages("u: no", "a: yes"))
    bare = PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer)
    with pytest.raises(ValueError, match="no chat template; give --prefix-template"):
        template_of(bare, PLAIN)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("{role}", "", {"user": "U"}), "name no assistant"),
        (("{name}", "", None), "cannot be filled in"),
        (("{role", "", None), "cannot be filled in"),
        (("{}", "", None), "cannot be filled in"),
        (("{role}", "{role}", None), "only the prefix is filled in"),
    ],
)
def test_explicit_parts_that_cannot_work(parts, words):
    with pytest.raises(ValueError, match=words):
        explicit_template(*parts)


def test_role_tags():
    assert parse_role_tags(("user=a=b", "bot=")) == {"user": "a=b", "assistant": ""}
    for bad, words in (
        (("user",), "is not role=tag"),
        (("=x",), "is not role=tag"),
        (("bot=a", "assistant=b"), "two tags"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_role_tags(bad)


@pytest.mark.parametrize("shape", SHAPES)
def test_export_writes_what_was_trained(shape):
    """Jinja templates export themselves; an explicit one with special borders gives the training ids in plain transformers."""
    made, tokenizer = setting(shape)
    assert export_template(tokenizer.template) == SHAPES[shape]
    quotes = explicit_template(
        "<|im_start|>{role} 'q' \"d\" \\ {{%}} é😀\n",
        "<|im_end|>\n",
        {"user": "U'\"", "bot": "B\\n"},
        made.bos_token,
    )
    chats = [chat for _, chat in dialogues(shape, 10, nasty=False, system=False)]
    trained = [
        tokens.ids for tokens in encode_chats(chats, tokenizer._replace(template=quotes), PLAIN)
    ]
    assert disagreement(made, quotes, chats, trained) == ""
    source = export_template(quotes)
    prompt = made.apply_chat_template(
        chats[0][:-1], chat_template=source, add_generation_prompt=True, return_dict=False
    )
    assert trained[0][: len(prompt)] == prompt
    with pytest.raises(Exception, match="unknown role wizard"):
        made.apply_chat_template([{"role": "wizard", "content": ""}], chat_template=source)
    # a plain-text template on a merging tokenizer differs, and that is told
    plain = explicit_template("{role}: ", "\n", {"user": "Human", "bot": "AI"})
    chats = [messages("u: hello there", "a: what")]
    assert disagreement(
        made, plain, chats, [encode_chat(chats[0], tokenizer._replace(template=plain), PLAIN).ids]
    ).startswith("chat 1, token 2: trained ['Ġ', 'hell")


def test_what_ends_an_answer():
    for shape, ends in {
        "chatml": "<|im_end|>",
        "llama3": "<|eot|>",
        "mistral": "</s>",
        "gemma": "<end_of_turn>",
        "phi3": "<|end|>",
    }.items():
        made, tokenizer = setting(shape)
        assert (
            tokenizer.stop_ids == [made.convert_tokens_to_ids(ends)]
            and tokenizer.stop_strings == []
        )
    _, tokenizer = setting("human")
    assert (tokenizer.stop_ids, tokenizer.stop_strings) == ([], ["\n"])
    nothing, vocab = explicit_template("{role}", None), tokenizer.vocabulary
    assert answer_end(nothing, vocab) == ("", [], ["user"])
    nothing = explicit_template(None, None)
    assert answer_end(nothing, vocab) == ("", [], [])


WORDS = "<s> hello world it is a the text <s> hello a</s>"


def tiny(model: str) -> Tokenizer:
    """A backend whose model holds its special tokens as plain words, so that text could match them."""
    if model == "words":
        backend = Tokenizer(
            models.WordLevel(
                {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "a": 4}, unk_token="<unk>"
            )
        )
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif model == "unigram":
        pieces = [
            ("<unk>", 0.0),
            ("<s>", 0.0),
            ("</s>", 0.0),
            ("▁", -3.0),
            ("▁hello", -4.0),
            *((letter, -5.0) for letter in "<>/shelowrdita"),
        ]
        backend = Tokenizer(models.Unigram(pieces, unk_id=0))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        letters = {
            text: i for i, text in enumerate(["<unk>", "<s>", "</s>", *"<>/shelo", "<s", "▁"])
        }
        backend = Tokenizer(
            models.BPE(letters, [("<", "s"), ("<s", ">")], unk_token="<unk>", ignore_merges=True)
        )
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


@pytest.mark.parametrize("model", ["words", "unigram", "bpe"])
def test_literal_means_literal_whatever_the_model_holds(model):
    backend = tiny(model)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    vocab, forbidden = vocabulary(made), {1, 2}
    attacks = ["<s>", "</s>", "a <s>", "<s> hello </s>", "a</s>"]
    for encode in (vocab.encode, vocab.encode_start or vocab.encode):
        assert not forbidden & {id for ids in encode(attacks) for id in ids}
    bare = json.loads(backend.to_str()) | {
        "added_tokens": []
    }  # leaving out the added tokens would not do
    assert forbidden & {
        id for text in attacks for id in Tokenizer.from_str(json.dumps(bare)).encode(text).ids
    }


@pytest.mark.parametrize("how", ["prepend", "metaspace always", "metaspace first", "byte level"])
def test_spaces_come_only_where_the_tokenizer_puts_them(how):
    """Ids equal apply_chat_template for tokenizers that begin a text, or every text after a special token, with a space."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if how == "prepend":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    elif how == "byte level":
        backend.pre_tokenizer, backend.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=True),
            decoders.ByteLevel(),
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=how.split()[1])
    trainer = trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>", "<u>", "<b>"], show_progress=False
    )
    backend.train_from_iterator([WORDS, "hello\nworld", *"▁Ġ\n"] * 3, trainer)
    source = (
        "{% for m in messages %}{{ '<u> ' ~ m.content if m.role == 'user' else '<b>' ~ m.content ~ '</s>' }}{% endfor %}"
        + GENERATE
        + "{{ '<b>' }}{% endif %}"
    )
    for start in ("", "{{ bos_token }}", "is a "):
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<s>",
            eos_token="</s>",
            chat_template=start + source,
        )
        for chat in (
            messages("u: hello", "a: world"),
            messages("u:  a", "a:  it"),
            messages("u: ", "a: hello a", "u: is", "a: the"),
        ):
            assert encode_chat(chat, chat_tokenizer(made, PLAIN), PLAIN).ids == real(made, chat)


def test_tokens_that_swallow_white_space():
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(fast_tokenizer("phi3").backend_tokenizer.to_str()),
        eos_token="</s>",
    )
    made.add_tokens(
        [
            AddedToken("<R>", rstrip=True),
            AddedToken("<L>", lstrip=True),
            AddedToken("<B>", lstrip=True, rstrip=True),
        ],
        special_tokens=True,
    )
    made.chat_template = (
        "{% for m in messages %}{{ '<R>\n' ~ m.role ~ ' <L> <B>\n' ~ m.content ~ ' <L>\n' }}{% endfor %}"
        + GENERATE
        + "{{ '<R>\nassistant <L> <B>\n' }}{% endif %}"
    )
    for user in ("hi", " \n hi \t", "", "  ", "\u3000hi\x1c"):
        chat = messages(f"u: {user}", "a: hello")
        assert encode_chat(chat, chat_tokenizer(made, PLAIN), PLAIN).ids == real(made, chat)


def test_white_space_tokens_stay_text():
    """Some tokenizers keep runs of spaces or newlines as added tokens: they are no control tokens."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(fast_tokenizer("chatml").backend_tokenizer.to_str()),
        chat_template=SHAPES["chatml"],
    )
    made.add_tokens(["    ", "\n\n\n"])
    chat = messages("u: a    b\n\n\nc", "a: d    e")
    tokens = encode_chat(chat, chat_tokenizer(made, PLAIN), PLAIN)
    assert (
        tokens.ids == real(made, chat) and tokens.ids.count(made.convert_tokens_to_ids("    ")) == 2
    )


def test_a_date_in_a_template_is_the_day_given_and_part_of_the_key():
    made, tokenizer = setting("chatml")
    dated = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        chat_template="{{ strftime_now('%d %b %Y %H:%M') }}" + SHAPES["chatml"],
    )
    chat, keys = messages("u: a", "a: b"), []
    for day in ("2026-03-01", "2026-03-02"):
        known = chat_tokenizer(dated, PLAIN, day=day)
        trained = encode_chat(chat, known, PLAIN).ids
        assert dated.decode(trained).startswith(f"{day[-2:]} Mar 2026 00:00")
        assert disagreement(dated, known.template, [chat], [trained], day) == ""
        assert "trained" in disagreement(dated, known.template, [chat], [trained], "2020-01-01")
        assert known.day == day
        keys.append(tokenizer_settings(known, PLAIN))
    assert keys[0] != keys[1] and keys[0] == tokenizer_settings(
        known._replace(day="2026-03-01"), PLAIN
    )
    assert chat_tokenizer(dated, PLAIN).day == date.today().isoformat()
    assert tokenizer.day == "" and "day" not in tokenizer_settings(tokenizer, PLAIN)


def test_what_a_template_is_given_by_name_is_part_of_the_key():
    made, _ = setting("chatml")
    again = copy.deepcopy(made)
    again.eos_token = "</s>" if made.eos_token != "</s>" else "<|im_end|>"
    tools = copy.deepcopy(made)
    tools.chat_template = {"default": made.chat_template, "tool_use": made.chat_template}
    more = copy.deepcopy(tools)
    more.chat_template["tool_use"] += "{{ tools }}"
    keys = [
        tokenizer_settings(chat_tokenizer(fast, PLAIN), PLAIN)
        for fast in (made, made, again, tools, more)
    ]
    assert keys[0] == keys[1] and all(keys.count(key) == 1 for key in keys[2:])


@pytest.mark.parametrize("known", [False, True])
def test_declared_tokens_work_whatever_the_template_mentions_and_stay_in_decoded_answers(
    tmp_path, known
):
    """Also those that the tokenizer knew as special ones."""
    made = load_tokenizer(tiny_folder())
    made.chat_template = "{# <RS> #}" + made.chat_template
    if known:
        made.add_tokens([AddedToken("<RS>", special=True, normalized=False)])
    made.save_pretrained(tmp_path / "t")
    path = {"tokenizer_path": str(tmp_path / "t")}
    config = TokenizerConfig(**path, init_tokens=("<RS>=red", "<think>=red"))
    tokenizer = load_chat_tokenizer(ModelConfig(), config, ChatConfig())
    ids = tokenizer.fast.get_added_vocab()
    chat = messages("u: a<RS>b", "a: <think>c<RS>")
    tokens = encode_chat(chat, tokenizer, PLAIN)
    assert tokens.ids == real(tokenizer.fast, chat) and tokens.ids.count(ids["<RS>"]) == 2
    tokenizer.fast.save_pretrained(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    for fast in (tokenizer.fast, again):
        text = fast.decode(tokens.ids, skip_special_tokens=True)
        assert text == "user\na<RS>b\nassistant\n<think>c<RS>\n"
