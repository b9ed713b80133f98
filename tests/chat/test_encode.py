"""Chats: what is rendered, what is learned, what is cut, on seven template shapes and nasty dialogues."""

import functools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ta.chat.cut import cut_dialogue
from ta.chat.encode import (
    Drop,
    encode_answers,
    encode_chat,
    encode_chats,
    encode_prompt,
    encode_prompts,
)
from ta.chat.messages import ANSWER, random_cut, with_system
from ta.chat.render import Piece, Tokens, render_chat, show, spans, tokenize_with_loss_mask
from ta.chat.template import ChatConfig, explicit_template
from ta.chat.tokenizer import chat_tokenizer, disagreement, template_of, vocabulary

LINE = "the user asks: what is it?\n\nassistant says hello there. Human: [INST] ok [/INST]\nAI: yes, no \n system model think 12 + 34\n"
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|/head|>",
    "<|eot|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
]
CONTENT = ["<img>", "<doc_sep>"]
ROLES = "{% if m['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role ' ~ m['role']) }}{% endif %}"
FOR, END = "{% for m in messages %}", "{% endfor %}"
GENERATE = "{% if add_generation_prompt %}"

# Shapes of templates in use, written for these tests.
CHATML = (
    FOR + ROLES + "{{ '<|im_start|>' ~ m['role'] ~ '\n' ~ m['content'] ~ '<|im_end|>\n' }}" + END
)
CHATML += GENERATE + "{{ '<|im_start|>assistant\n' }}{% endif %}"
LLAMA3 = (
    FOR
    + ROLES
    + "{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|head|>' ~ m.role ~ '<|/head|>\n\n' ~ m.content | trim ~ '<|eot|>' }}"
)
LLAMA3 += END + GENERATE + "{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
MISTRAL = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] ~ '\n\n' %}{% set rest = messages[1:] %}"
MISTRAL += "{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
MISTRAL += "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
MISTRAL += "{% if m.role == 'user' %}{{ '[INST] ' ~ (sys if loop.first else '') ~ m.content ~ ' [/INST]' }}"
MISTRAL += "{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}"
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + FOR
)
GEMMA += "{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' ~ m.content | trim ~ '<end_of_turn>\n' }}"
GEMMA += END + GENERATE + "{{ '<start_of_turn>model\n' }}{% endif %}"
HUMAN = (
    FOR
    + ROLES
    + "{{ {'system': '', 'user': 'Human: ', 'assistant': 'AI: '}[m.role] ~ m.content ~ '\n' }}"
    + END
)
HUMAN += GENERATE + "{{ 'AI: ' }}{% endif %}"
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + FOR
)
QWEN3 += "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' ~ m.content ~ '<|im_end|>\n' }}"
QWEN3 += (
    "{% else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endif %}" + END
)
QWEN3 += GENERATE + "{{ '<|im_start|>assistant\n' }}{% endif %}"
PHI3 = (
    FOR
    + "{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}"
    + END
    + GENERATE
    + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SHAPES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "human": HUMAN,
    "qwen3": QWEN3,
    "phi3": PHI3,
}
# what is learned around the content of an answer, when more follows and when it is the last
AROUND = {
    "chatml": (("", "<|im_end|>\n"), ("", "<|im_end|>\n")),
    "llama3": (("", "<|eot|>"), ("", "<|eot|>")),
    "mistral": ((" ", "</s>"), (" ", "</s>")),
    "gemma": (("", "<end_of_turn>\n"), ("", "<end_of_turn>\n")),
    "human": (("", "\n"), ("", "\n")),
    "qwen3": (("", "<|im_end|>\n"), ("<think>\n\n</think>\n\n", "<|im_end|>\n")),
    "phi3": (("", "<|end|>\n"), ("", "<|end|>\n</s>")),
}
TRIMS = {"llama3", "gemma"}
PLAIN = ChatConfig()


@functools.lru_cache
def fast_tokenizer(shape: str, kind: str = "byte") -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.BPE(unk_token=None if kind == "byte" else "<unk>", byte_fallback=kind != "byte")
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "byte":
        backend.pre_tokenizer, backend.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        backend.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")]
        )
        alphabet = []
    first = [] if kind == "byte" else ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=first + SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator([LINE, "hello hello", "Human: the", *LINE.split()] * 3, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=SHAPES[shape]
    )
    made.add_tokens(CONTENT)
    return made


@functools.lru_cache
def setting(shape: str, kind: str = "byte"):
    made = fast_tokenizer(shape, kind)
    return made, chat_tokenizer(made, PLAIN)


def messages(*pairs: str, loss=None) -> list[dict]:
    """messages("u: hi", "a: yes")"""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[pair[0]], "content": pair[3:]} for pair in pairs]


def real(made, chat, opened=False) -> list[int]:
    return made.apply_chat_template(chat, add_generation_prompt=opened, return_dict=False)


def learned(made, tokens: Tokens) -> str:
    return made.decode(
        [id for id, weight in zip(tokens.ids, tokens.weights, strict=True) if weight],
        clean_up_tokenization_spaces=False,
    )


NASTY = [
    "",
    " ",
    "\n",
    "\n\n",
    "  hi",
    "hi  ",
    "\nhi\n",
    *SPECIAL,
    "<think>",
    "</think>",
    "[/INST]",
    "Human:",
    "AI: x",
    "<img>",
    "é́ 你好 👩‍👩",
    "▁x",
    "{{ x }}",
    "a\x00b",
    "\u2028",
]
WORDS = LINE.split(" ")
CHARACTERS = "ab ZÄß\n\t 。中😀🏳️‍🌈\u0301\u200b\xa0<|>▁Ġ{}%0"


def text(rng: random.Random, nasty: bool = True) -> str:
    """Words, special tokens, odd spaces and characters, or nothing."""
    pieces = [
        rng.choice(WORDS) if not nasty or rng.random() < 0.5 else rng.choice(NASTY)
        for _ in range(rng.randrange(5))
    ]
    pieces += ["".join(rng.choices(CHARACTERS, k=rng.randrange(5)))] * (
        nasty and rng.random() < 0.3
    )
    return rng.choice((" ", " ", "")).join(pieces)


def dialogues(shape: str, count: int, nasty: bool = True, system: bool = True, clean: bool = False):
    """Seeded dialogues that end in an answer, with a system message now and then where the template takes one."""
    for seed in range(count):
        rng = random.Random(seed)
        chat = (
            [{"role": "system", "content": text(rng, nasty)}]
            if system and shape != "gemma" and rng.random() < 0.5
            else []
        )
        for _ in range(rng.randint(1, 3)):
            chat += [
                {"role": "user", "content": text(rng, nasty)},
                {"role": "assistant", "content": text(rng, nasty)},
            ]
        for message in chat if clean else ():
            for token in SPECIAL + CONTENT:
                message["content"] = message["content"].replace(token, "")
        yield rng, chat


each_shape = pytest.mark.parametrize("shape", SHAPES)


def test_a_chat_by_hand():
    made, tokenizer = setting("chatml")
    chat = messages("s: be", "u: hi", "a: yes", "u: and", "a: no")
    tokens = encode_chat(chat, tokenizer, PLAIN)
    assert learned(made, tokens) == "yes<|im_end|>\nno<|im_end|>\n"
    assert made.decode(tokens.ids) == made.apply_chat_template(
        chat, tokenize=False
    ) and tokens.ids == real(made, chat)
    assert render_chat([], tokenizer.template) == []
    assert render_chat(chat, tokenizer.template)[2] == [
        Piece("<|im_start|>assistant\n", 0.0, "template", True),
        Piece("yes", 1.0, "answer", False),
        Piece("<|im_end|>\n", 1.0, "template", True),
    ]
    assert (
        show(spans(Tokens([1, 2, 3, 4], [0.0, 1.0, 1.0, 0.5]), str))
        == "\x1b[2m[1]\x1b[0m\x1b[32m[2, 3]\x1b[0m\x1b[33m[4]\x1b[0m"
    )


@each_shape
@pytest.mark.parametrize("kind", ["byte", "always", "first", "never"])
def test_ids_are_those_of_apply_chat_template(shape, kind):
    """Those of the tokenizer on the rendered text, cut before and after each answer; contents hold no special tokens here."""
    made, tokenizer = setting(shape, kind)
    equal = 0
    for _, chat in dialogues(shape, 25, clean=True):
        ids, theirs = encode_chat(chat, tokenizer, PLAIN).ids, real(made, chat)
        whole, parts, at, borders = made.apply_chat_template(chat, tokenize=False), [""], 0, set()
        for message, pieces in zip(chat, render_chat(chat, tokenizer.template), strict=True):
            answer, texts = message["role"] == ANSWER, [piece.text for piece in pieces]
            begin = [piece.joins for piece in pieces].index(False) if answer else 0
            prefix, rest = "".join(texts[:begin]), "".join(texts[begin:])
            parts[-1] += prefix
            parts += [""] * answer
            parts[-1] += rest
            size = len(prefix + rest)
            borders |= {at + len(prefix), at + size} if answer else set()
            at += size
            parts += [""] * answer
        assert "".join(parts) == whole
        if kind == "byte":
            assert ids == [
                id for part in parts for id in made(part, add_special_tokens=False)["input_ids"]
            ]
            assert made.decode(ids, clean_up_tokenization_spaces=False) == whole
        else:  # where no token of theirs runs over a border
            offsets = made.backend_tokenizer.encode(whole, add_special_tokens=False).offsets
            assert ids == theirs or any(a < k < b for a, b in offsets for k in borders)
        equal += ids == theirs
    assert equal >= (1 if shape == "human" else 8)


@each_shape
@pytest.mark.parametrize("loss_on", ["answers", "last"])
def test_learned_text_is_the_answers_and_their_ends(shape, loss_on):
    made, tokenizer = setting(shape)
    for _, chat in dialogues(shape, 25):
        answers = [
            m["content"].strip() if shape in TRIMS else m["content"]
            for m in chat
            if m["role"] == ANSWER
        ]
        parts = [
            a + text + b
            for (a, b), text in zip(
                [AROUND[shape][0]] * (len(answers) - 1) + [AROUND[shape][1]], answers, strict=True
            )
        ]
        tokens = encode_chat(chat, tokenizer, ChatConfig(loss_on=loss_on))
        assert learned(made, tokens) == ("".join(parts) if loss_on == "answers" else parts[-1])
        assert set(tokens.weights) <= {0.0, 1.0} and len(tokens.ids) == len(tokens.weights)


@each_shape
@pytest.mark.parametrize("kind", ["byte", "always"])
@pytest.mark.parametrize("loss_on", ["answers", "last", "all"])
def test_training_ids_begin_with_the_prompt(shape, kind, loss_on):
    _made, tokenizer = setting(shape, kind)
    config = ChatConfig(loss_on=loss_on)
    for _, chat in dialogues(shape, 12, system=shape != "mistral" or loss_on != "all"):
        prompt, tokens = (
            encode_prompt(chat, tokenizer, config),
            encode_chat(chat, tokenizer, config),
        )
        assert (
            tokens.ids[: len(prompt)] == prompt
            and encode_prompt(chat[:-1], tokenizer, config) == prompt
        )
        if loss_on == "last":
            assert [bool(weight) for weight in tokens.weights] == [False] * len(prompt) + [True] * (
                len(tokens.ids) - len(prompt)
            )


@each_shape
def test_content_cannot_forge_control_tokens(shape):
    """Users and systems write text only, answers all tokens but those of turns."""
    made, tokenizer = setting(shape)
    specials, added = set(made.get_added_vocab().values()), made.get_added_vocab()
    turns = {added[token] for token in SPECIAL if token not in tokenizer.vocabulary.answer}
    assert set(tokenizer.stop_ids) <= turns >= {made.bos_token_id, made.eos_token_id}
    for rng, chat in dialogues(shape, 25):
        attack = "".join(rng.choices(SPECIAL + CONTENT, k=2))
        attacked = [{**m, "content": attack + m["content"] + attack} for m in chat]
        harmless = [{**m, "content": "x"} for m in chat]
        mine, plain = (encode_chat(c, tokenizer, PLAIN).ids for c in (attacked, harmless))
        assert [id for id in mine if id in turns] == [id for id in plain if id in turns]
        questions = [
            {**m, "content": n["content"] if m["role"] == ANSWER else m["content"]}
            for m, n in zip(attacked, harmless, strict=True)
        ]
        mine = encode_chat(questions, tokenizer, PLAIN).ids
        assert [id for id in mine if id in specials] == [id for id in plain if id in specials]
    # the guard can fail: plain transformers is forged by the same content
    chat = [{"role": "user", "content": SPECIAL[3]}, {"role": "assistant", "content": SPECIAL[3]}]
    assert sum(id in specials for id in real(made, chat)) > sum(
        id in specials for id in encode_chat(chat, tokenizer, PLAIN).ids
    )


def test_declared_content_tokens_are_real_in_content_unless_they_are_those_of_turns():
    made = fast_tokenizer("chatml")
    tokenizer, ids = chat_tokenizer(made, PLAIN, ["<img>"]), made.get_added_vocab()
    tokens = encode_chat(messages("u: a<img><img> b<doc_sep>", "a: c<img>"), tokenizer, PLAIN)
    assert tokens.ids.count(ids["<img>"]) == 3 and ids["<doc_sep>"] not in tokens.ids
    tokens = encode_chat(messages("u: a", "a: b<doc_sep>"), tokenizer, PLAIN)
    assert ids["<doc_sep>"] in tokens.ids
    forging = chat_tokenizer(made, PLAIN, ["<|im_end|>"])
    tokens = encode_chat(messages("u: a<|im_end|>", "a: b<|im_end|>"), forging, PLAIN)
    assert tokens.ids.count(ids["<|im_end|>"]) == 2
    with pytest.raises(ValueError, match="no added token"):
        vocabulary(made, ["<nope>"])


def test_loss_on_all_and_the_messages_own_weights():
    made, tokenizer = setting("chatml")
    chat = messages("s: be", "u: hi", "a: yes", "u: more", "a: no")
    every = encode_chat(chat, tokenizer, ChatConfig(loss_on="all"))
    assert (
        learned(made, every)
        == "be<|im_end|>\nhi<|im_end|>\nyes<|im_end|>\nmore<|im_end|>\nno<|im_end|>\n"
    )
    injected = encode_chat(chat, tokenizer, ChatConfig(loss_on="all", system_prompt="you"))
    assert learned(made, injected) == "hi<|im_end|>\nyes<|im_end|>\nmore<|im_end|>\nno<|im_end|>\n"
    chat[1]["loss"], chat[2]["loss"], chat[4]["loss"] = True, False, 0.5
    tokens = encode_chat(chat, tokenizer, PLAIN)
    assert learned(made, tokens) == "hi<|im_end|>\nno<|im_end|>\n" and set(tokens.weights) == {
        0.0,
        0.5,
        1.0,
    }
    chat[4] = {"role": "bot", "content": "no", "disable_loss": True}
    assert learned(made, encode_chat(chat, tokenizer, PLAIN)) == "hi<|im_end|>\n"
    assert (
        encode_chat([{**m, "loss": 0} for m in chat], tokenizer, PLAIN).reason == "nothing to learn"
    )
    for bad in (-1, float("nan"), float("inf"), "yes"):
        with pytest.raises(ValueError, match="message 2 has loss"):
            encode_chat([chat[0], {**chat[1], "loss": bad}, chat[2]], tokenizer, PLAIN)


def brute_cut(roles, lengths, limit, keep_end, end_in_answer, fixed):
    """Every way to keep whole messages, the longest allowed one."""
    first = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    ways = []
    for begin in range(first, len(roles)):
        for stop in range(begin + 1, len(roles) + 1):
            kept = [*range(first), *range(begin, stop)]
            last = (
                max((i for i in range(first, len(roles)) if roles[i] == ANSWER), default=None)
                if end_in_answer
                else len(roles) - 1
            )
            whole_start = begin == first or (keep_end and roles[begin] != ANSWER)
            right_end = roles[stop - 1] == ANSWER if end_in_answer else True
            right_end = right_end and (not keep_end or stop - 1 == last)
            asked = any(role not in ("system", ANSWER) for role in roles[begin : stop - 1])
            right_end = right_end and (asked or not end_in_answer)
            if whole_start and right_end and fixed + sum(lengths[i] for i in kept) <= limit:
                ways.append(kept)
    return max(ways, key=len, default=[])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_cut_dialogue_equals_brute_force(data):
    roles = ["system"] * data.draw(st.integers(0, 2)) + data.draw(
        st.lists(st.sampled_from(["user", "assistant", "tool", "system"]), max_size=7)
    )
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=len(roles), max_size=len(roles)))
    limit, fixed = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 3))
    keep_end, end_in_answer = data.draw(st.booleans()), data.draw(st.booleans())
    assert cut_dialogue(roles, lengths, limit, keep_end, end_in_answer, fixed) == brute_cut(
        roles, lengths, limit, keep_end, end_in_answer, fixed
    )


@each_shape
@pytest.mark.parametrize("keep_end", [False, True])
def test_cut_chats_are_whole_messages_within_the_limit(shape, keep_end):
    _, tokenizer = setting(shape)
    for rng, chat in dialogues(shape, 25):
        limit = rng.randint(5, 120)
        whole = (
            [*chat, {"role": "user", "content": "trailing " * 9}] if rng.random() < 0.5 else chat
        )
        result = encode_chat(whole, tokenizer, ChatConfig(max_tokens=limit, keep_end=keep_end))
        head, body = (
            [m for m in chat if m["role"] == "system"],
            [m for m in chat if m["role"] != "system"],
        )
        turns = range(len(body), 0, -2)
        options = [
            encode_chat(head + (body[-n:] if keep_end else body[:n]), tokenizer, PLAIN)
            for n in turns
        ]
        fitting = [option for option in options if len(option.ids) <= limit]
        assert result == fitting[0] if fitting else result.reason == "no answer fits in max_tokens"


def test_limits_are_exact_and_say_when_nothing_fits():
    _made, tokenizer = setting("llama3")
    chat = messages("s: be", "u: hi", "a: yes", "u: more", "a: no", "u: trailing trailing")
    whole = encode_chat(chat[:5], tokenizer, PLAIN)
    assert encode_chat(chat, tokenizer, ChatConfig(max_tokens=len(whole.ids))) == whole
    for keep_end, kept in ((False, chat[:3]), (True, [chat[0], *chat[3:5]])):
        cut = encode_chat(
            chat, tokenizer, ChatConfig(max_tokens=len(whole.ids) - 1, keep_end=keep_end)
        )
        assert cut == encode_chat(kept, tokenizer, PLAIN)
        # the last kept answer is learned when only the last is: cutting never leaves a chat without a target
        last = encode_chat(
            chat,
            tokenizer,
            ChatConfig(max_tokens=len(whole.ids) - 1, keep_end=keep_end, loss_on="last"),
        )
        assert last == cut
    assert encode_chat(chat, tokenizer, ChatConfig(max_tokens=3)) == Drop(
        "no answer fits in max_tokens", f"{len(whole.ids)} tokens, and no whole answer within 3"
    )
    assert encode_chat(chat[:2], tokenizer, PLAIN).reason == "no answer"
    assert encode_chat([], tokenizer, PLAIN).reason == "no answer"
    with pytest.raises(ValueError, match="--max-tokens 0: give"):
        encode_chat(chat, tokenizer, ChatConfig(max_tokens=0))
    chats = [chat, chat[:2], chat[:3]] * 100  # more than a group
    assert (
        encode_chats(chats, tokenizer, ChatConfig(max_tokens=30))
        == [encode_chat(c, tokenizer, ChatConfig(max_tokens=30)) for c in chats[:3]] * 100
    )


def test_a_record_that_is_too_long_as_the_guide_says_of_each_kind():
    """The table in ta/guide/data.md, a case a row; what stays is encoded alone as the judge."""
    _, tokenizer = setting("llama3")
    first, last = messages("u: one", "a: two"), messages("u: three", "a: four")
    chat, long = [*first, *last], {"role": "user", "content": "trailing " * 9}
    size = len(encode_chat(chat, tokenizer, PLAIN).ids)
    over = functools.partial(ChatConfig, max_tokens=size)

    def alone(kept, **more):
        return encode_chat(kept, tokenizer, ChatConfig(**more))

    assert encode_chat([*chat, long, *last], tokenizer, over()) == alone(chat)
    assert encode_chat([*first, long, *chat], tokenizer, over(keep_end=True)) == alone(chat)
    every = {"loss_on": "all"}
    assert encode_chat([*chat[:3], long], tokenizer, over(**every)) == alone(chat[:3], **every)
    answers = [[last[1], {"role": "assistant", "content": "four hello"}]]
    (both,) = encode_answers([[long, *chat[:3]]], answers, tokenizer, over())
    assert both == encode_answers([last[:1]], answers, tokenizer, PLAIN)[0]
    assert encode_prompt([long, *chat[:3]], tokenizer, over()) == encode_prompt(
        chat[:3], tokenizer, PLAIN
    )
    plain = [{"role": "assistant", "content": long["content"] * 9, "plain": True}]
    assert encode_chat(plain, tokenizer, over()).reason == "no text fits in max_tokens"
    cut = encode_chat(plain, tokenizer, over(cut_answer=True))
    assert cut.ids == alone(plain).ids[:size] and len(cut.ids) == size


@each_shape
def test_prompts_are_cut_from_the_front(shape):
    made, tokenizer = setting(shape)
    chat = messages(
        "u: the first question", "a: an answer", "u: the second", "a: another", "u: third"
    )
    whole, one, two = (encode_prompt(chat[-n:], tokenizer, PLAIN) for n in (5, 1, 3))
    assert whole == real(made, chat, opened=True)
    for keep_end in (False, True):
        assert (
            encode_prompt(chat, tokenizer, ChatConfig(max_tokens=len(whole) - 1, keep_end=keep_end))
            == two
        )
        assert (
            encode_prompt(chat, tokenizer, ChatConfig(max_tokens=len(two) - 1, keep_end=keep_end))
            == one
        )
    assert (
        encode_prompts([chat], tokenizer, ChatConfig(max_tokens=len(one) - 1))[0].reason
        == "no prompt fits in max_tokens"
    )
    with pytest.raises(ValueError, match="no prompt fits"):
        encode_prompt(chat, tokenizer, ChatConfig(max_tokens=1))


@each_shape
def test_pairs_share_one_cut_and_learn_only_the_answer(shape):
    made, tokenizer = setting(shape)
    used = 0
    for rng, chat in dialogues(shape, 25):
        chosen, rejected, limit = text(rng), text(rng), rng.randint(10, 120)
        context, answers = (
            chat[:-1],
            [{"role": "bot", "content": answer} for answer in (chosen, rejected)],
        )
        result = encode_answers([context], [answers], tokenizer, ChatConfig(max_tokens=limit))[0]
        if isinstance(result, Drop):
            short = [
                context[i]
                for i in range(len(context))
                if i == len(context) - 1 or context[i]["role"] == "system"
            ]
            longest = max(
                len(encode_chat([*short, answer], tokenizer, PLAIN).ids) for answer in answers
            )
            assert longest > limit
            continue
        used += 1
        starts = [tokens.weights.index(1.0) for tokens in result]
        assert starts[0] == starts[1] and result[0].ids[: starts[0]] == result[1].ids[: starts[0]]
        around = AROUND[shape][1]
        for tokens, answer in zip(result, (chosen, rejected), strict=True):
            assert len(tokens.ids) <= limit
            assert (
                learned(made, tokens)
                == around[0] + (answer.strip() if shape in TRIMS else answer) + around[1]
            )
    assert used > 5


def test_answers_of_candidates():
    _, tokenizer = setting("chatml")
    context = messages("u: q", "a: old", "u: r")
    one, two, three = ({"content": text} for text in ("x", "y", "z z z"))
    group = encode_answers([context], [[one, two, three]], tokenizer, PLAIN)[0]
    assert [tokens.ids for tokens in group] == [
        encode_chat([*context, {"role": "bot", **a}], tokenizer, PLAIN).ids
        for a in (one, two, three)
    ]
    loud = encode_answers(
        [[context[0], {**context[1], "loss": True}, context[2]]],
        [[one, two, three]],
        tokenizer,
        PLAIN,
    )[0]
    assert loud == group and all(
        weights.index(1.0) == len(encode_prompt(context, tokenizer, PLAIN)) for _, weights in loud
    )
    assert encode_answers([context], [[]], tokenizer, PLAIN)[0].reason == "no answer"


def test_system_prompts():
    chat = messages("s: own", "u: hi")
    assert with_system(chat, None) == chat and with_system(chat, None, ignore=True) == chat[1:]
    assert (
        with_system(chat, "new")
        == [{"role": "system", "content": "new", "loss": False}, chat[1]]
        == with_system(chat[1:], "new")
    )
    with pytest.raises(ValueError, match="one of the two"):
        with_system(chat, "new", ignore=True)
    _, tokenizer = setting("chatml")
    with pytest.raises(ValueError, match="one of the two"):
        encode_chat(chat, tokenizer, ChatConfig(system_prompt="x", ignore_system_prompt=True))


def test_random_cut_is_seeded_and_ends_before_an_answer():
    chat = messages("u: 1", "a: 2", "u: 3", "a: 4", "a: 5")
    cuts = {len(random_cut(chat, random.Random(seed))) for seed in range(40)}
    assert cuts == {1, 3, 4} and random_cut(chat, random.Random(3)) == random_cut(
        chat, random.Random(3)
    )
    with pytest.raises(ValueError, match="no answer"):
        random_cut(chat[:1], random.Random(0))


PARTS = {
    "chatml": ("<|im_start|>{role}\n", "<|im_end|>\n", None),
    "tags": (
        "<|head|>{role}<|/head|>\n\n",
        "<|eot|>",
        {"user": "USER", "bot": "BOT", "system": "SYS", "critic": "CRITIC"},
    ),
    "plain": ("{role}: ", "\n", {"user": "Human", "assistant": "AI", "system": "System"}),
    "own bos": ("<s>{role} ", "</s>", None),
    "no prefix": (None, "</s>", None),
    "no suffix": ("<|im_start|>{role}", "", None),
}


@pytest.mark.parametrize("name", PARTS)
def test_explicit_templates(name):
    """Pieces one by one with plain transformers, one BOS in front, and the laws."""
    made, tokenizer = setting("chatml")
    prefix, suffix, tags = PARTS[name]
    template = explicit_template(prefix, suffix, tags, made.bos_token)
    tokenizer = tokenizer._replace(template=template)
    tag = {"system": "system", "user": "user", "assistant": "assistant", **(tags or {})}
    tag["assistant"] = tag.get("bot", tag["assistant"])
    for rng, chat in dialogues("chatml", 25, nasty=False):
        limit = rng.randint(3, 60)
        ids, weights = ([] if name == "own bos" else [made.bos_token_id]), []
        weights = [0.0] * len(ids)
        for m in chat:
            for part, weight in (
                ((prefix or "").format(role=tag[m["role"]]), 0.0),
                (m["content"], 1.0),
                (suffix or "", 1.0),
            ):
                new = made(part, add_special_tokens=False)["input_ids"]
                ids, weights = ids + new, weights + [weight * (m["role"] == ANSWER)] * len(new)
        result = encode_chat(chat, tokenizer, PLAIN)
        assert (
            result == Tokens(ids, weights) if any(weights) else result.reason == "nothing to learn"
        )
        prompt = encode_prompt(chat, tokenizer, PLAIN)
        assert ids[: len(prompt)] == prompt
        for keep_end in (False, True):
            cut = encode_chat(chat, tokenizer, ChatConfig(max_tokens=limit, keep_end=keep_end))
            assert isinstance(cut, Drop) or len(cut.ids) <= limit
        if name not in ("plain", "no prefix", "no suffix", "own bos") and not any(
            m["content"].startswith("\n") for m in chat
        ):
            assert disagreement(made, template, [chat], [ids]) == ""


@pytest.mark.parametrize("kind", ["always", "first", "never"])
def test_explicit_pieces_get_no_spaces_that_the_text_lacks(kind):
    made, tokenizer = setting("chatml", kind)
    template = explicit_template("{role}: ", "\n", {"user": "Human", "bot": "AI"}, None)
    tokenizer = tokenizer._replace(template=template)
    tokens = encode_chat(messages("u: hello", "a: the"), tokenizer, PLAIN)
    assert made.decode(tokens.ids).removeprefix(" ") == "Human: hello\nAI: the\n"


def test_unknown_roles_and_templates_that_cannot_be_split():
    made, tokenizer = setting("chatml")
    with pytest.raises(
        ValueError,
        match=r"message 1 has role 'wizard'; the roles known are system, developer, user, assistant, tool",
    ):
        encode_chat([{"role": "wizard", "content": "x"}, *messages("a: y")], tokenizer, PLAIN)
    with pytest.raises(ValueError, match="message 1 has content None"):
        encode_chat([{"role": "user", "content": None}], tokenizer, PLAIN)
    for chat, shape, words in (
        (messages("u: a", "u: b", "a: c"), "mistral", "roles must alternate"),
        (messages("s: a", "u: b", "a: c"), "gemma", "System role not supported"),
    ):
        _, refusing = setting(shape)
        with pytest.raises(ValueError, match=words):
            encode_chat(chat, refusing, PLAIN)
    line = lambda text: FOR + "{{ m.role ~ ':' ~ " + text + " ~ '\n' }}" + END
    cases = {
        line("(m.content if m.role == 'user' else '')"): r"message 2 \(assistant\) not at all",
        line("m.content ~ m.content"): r"message 1 \(user\) twice",
        line(
            "(m.content if m.role == 'user' else m.content | reverse)"
        ): r"message 2 \(assistant\) "
        "cannot be split",
        line("m.content") + GENERATE + "{{ 'AI:' }}{% endif %}": "generation prompt ends in",
    }
    other = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    for source, words in cases.items():
        other.chat_template = source
        with pytest.raises(ValueError, match=words):
            encode_chat(
                messages("u: aa", "a: b</think>"),
                tokenizer._replace(template=template_of(other, PLAIN)),
                PLAIN,
            )


def test_consecutive_answers_and_a_greeting():
    made, tokenizer = setting("chatml")
    chat = messages("a: hello", "u: hi", "a: yes", "a: and no")
    tokens = encode_chat(chat, tokenizer, PLAIN)
    assert tokens.ids == real(made, chat)
    assert learned(made, tokens) == "hello<|im_end|>\nyes<|im_end|>\nand no<|im_end|>\n"
    assert encode_prompt(chat, tokenizer, PLAIN) == real(made, chat[:2], opened=True)
    cut = encode_chat(chat, tokenizer, ChatConfig(max_tokens=len(tokens.ids) - 1, keep_end=True))
    assert cut == encode_chat(chat[1:], tokenizer, PLAIN)


def test_pieces_alone():
    _made, tokenizer = setting("chatml")
    pieces = [
        Piece("<|im_start|>", 0.0, "template"),
        Piece("hello<|im_end|>", 2.0, "other"),
        Piece("<|im_end|>", 1.0, "template"),
    ]
    vocab = tokenizer.vocabulary
    tokens = tokenize_with_loss_mask([pieces], vocab)
    assert (
        tokens.ids[0] == vocab.special["<|im_start|>"]
        and tokens.ids[-1] == vocab.special["<|im_end|>"]
    )
    assert (
        tokens.weights == [0.0] + [2.0] * (len(tokens.ids) - 2) + [1.0]
        and tokens.ids.count(vocab.special["<|im_end|>"]) == 1
    )


def test_what_is_shown_names_pictures_and_counts_what_is_left_out():
    ids = [1, *[7] * 225, 2, *[7] * 9, 3]
    weights = [0.0] * 236 + [1.0]
    files = {7: iter(["image cat.png", "image dog.png"])}
    assert spans(Tokens(ids, weights), str, files=files) == [
        ("[1][image cat.png, 225 tokens][2][image dog.png, 9 tokens]", 0.0),
        ("[3]", 1.0),
    ]
    assert spans(Tokens([7] * 8, [0.0] * 8), str) == [("[[7], 8 tokens]", 0.0)]
    long = spans(Tokens(list(range(3000)), [0.0] * 2000 + [1.0] * 1000), str, most=4)
    assert long == [
        ("[0, 1]", 0.0),
        (" … 2,996 tokens, 998 of them learned … ", 0.0),
        ("[2998, 2999]", 1.0),
    ]
    assert "\x1b[2J" not in show([("\x1b[2J", 1.0)])
