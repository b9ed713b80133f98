"""New tokens: both tables, every architecture, once; all other rows keep their bits; each bad input says what to give."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from ta.chat.tokenizer import add_tokens, parse_init_token
from ta.model.new_rows import check_vocabulary, set_rows

WORDS = ["<unk>", "<s>", "</s>", "the", "best", "bot", "ever", "a", "b", "c", "d", "e"]
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": len(WORDS),
}
GATED = {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
ARCHITECTURES = {
    "llama": {**SMALL, **GATED},
    "llama-tied": {**SMALL, **GATED, "tie_word_embeddings": True},
    "gpt2": {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": len(WORDS),
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {**SMALL, "intermediate_size": 24},
    "phi": {**SMALL, "intermediate_size": 24},  # its output layer has a bias
    "gemma": {**SMALL, **GATED},
    "qwen3": {**SMALL, **GATED},
}
INIT = ("<RS>=<s>", "<super_bot>=the best bot ever")


def make_tokenizer():
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def make_model(name, rows=12, dtype=torch.float32, head=AutoModelForCausalLM):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name.removesuffix("-tied")](
        **{**ARCHITECTURES[name], "vocab_size": rows}
    )
    model = head.from_config(config, dtype=dtype)
    for (
        parameter
    ) in model.parameters():  # biases start at zero, which would hide a mean that is not taken
        torch.nn.init.normal_(parameter)
    return model


def tables(model):
    output = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight] + ([output.weight] if output is not None else [])
    return [
        table.detach().clone()
        for table in found + ([output.bias] if getattr(output, "bias", None) is not None else [])
    ]


def expected(table, rows):
    means = [table[1], table[[3, 4, 5, 6]].float().mean(0).to(table.dtype)]
    grown = torch.cat([table, table.new_zeros(max(0, rows - len(table)), *table.shape[1:])])
    grown[len(WORDS)], grown[len(WORDS) + 1] = means
    return grown


def add_with_rows(tokenizer, model, init):
    new = add_tokens(tokenizer, init)
    set_rows(model, new)
    return new


@pytest.mark.parametrize("spare", [0, 1, 2, 9])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_are_means_in_every_table_and_adding_twice_is_adding_once(name, spare):
    tokenizer, model = make_tokenizer(), make_model(name, len(WORDS) + spare)
    before, state = tables(model), torch.random.get_rng_state()
    new = add_with_rows(tokenizer, model, INIT)
    assert [tuple(t) for t in new] == [
        ("<RS>", 12, (1,), True),
        ("<super_bot>", 13, (3, 4, 5, 6), True),
    ]
    assert torch.equal(state, torch.random.get_rng_state())
    rows = max(len(WORDS) + spare, 14)
    after = tables(model)
    assert len(after) == (3 if name == "phi" else 2)
    for old, now in zip(before, after, strict=True):
        assert torch.equal(now, expected(old, rows))  # bit-identical wherever nothing was declared
    assert model.config.vocab_size == rows
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (name in ("llama-tied", "gpt2", "gemma"))
    assert tokenizer("the <super_bot><RS>", add_special_tokens=False)["input_ids"] == [3, 13, 12]
    assert model(torch.tensor([[3, 13, 12]])).logits.shape[-1] == rows

    with torch.no_grad():  # as if trained: a row that exists is left as it is
        model.get_input_embeddings().weight[13] = 7.0
    trained = tables(model)
    again = add_with_rows(tokenizer, model, INIT)
    assert [(t.id, t.added) for t in again] == [(12, False), (13, False)]
    assert all(torch.equal(a, b) for a, b in zip(trained, tables(model), strict=True))
    more = add_with_rows(tokenizer, model, (*INIT, "<later>=the bot"))
    assert (more[2].id, more[2].added) == (14, True)
    assert torch.equal(tables(model)[0][14], trained[0][[3, 5]].mean(0))
    assert all(
        torch.equal(old[:14], now[:14]) for old, now in zip(trained, tables(model), strict=True)
    )


def test_an_extended_tokenizer_with_a_model_that_lacks_the_rows(tmp_path):
    tokenizer = make_tokenizer()
    add_tokens(tokenizer, INIT)
    tokenizer.save_pretrained(tmp_path)
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(tmp_path), make_model("llama")
    before = tables(model)
    new = add_with_rows(tokenizer, model, INIT)
    assert [t.added for t in new] == [False, False] and tokenizer.get_added_vocab()[
        "<super_bot>"
    ] == 13
    assert all(
        torch.equal(now, expected(old, 14)) for old, now in zip(before, tables(model), strict=True)
    )


def test_a_classifier_has_one_table_and_low_precision_means_are_taken_in_float32():
    tokenizer = make_tokenizer()
    model = make_model("llama", dtype=torch.bfloat16, head=AutoModelForSequenceClassification)
    before = tables(model)
    add_with_rows(tokenizer, model, INIT)
    assert len(before) == 1 and torch.equal(tables(model)[0], expected(before[0], 14))


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("<RS>", "needs a token, '=' and the text"),
        ("=the", "needs a token"),
        ("<RS>=", "needs a token"),
        ("<RS>= ", "encodes to no token"),
        ("<RS>=zzz", "unknown to the tokenizer"),
        ("<RS>=the <RS>", "contains the new token '<RS>'"),
        (" <RS>=the", "white space"),
        ("bot=the best", "ordinary piece of the vocabulary"),
    ],
)
def test_bad_tokens_change_nothing(init, message):
    tokenizer, model = make_tokenizer(), make_model("llama")
    before = tables(model)
    with pytest.raises(ValueError, match=message):
        add_with_rows(tokenizer, model, ("<ok>=the", init))
    assert "<ok>" not in tokenizer.get_vocab() and len(tokenizer) == len(WORDS)
    assert all(torch.equal(a, b) for a, b in zip(before, tables(model), strict=True))


def test_the_same_token_twice_and_one_inside_the_text_of_another():
    with pytest.raises(ValueError, match="more than once"):
        add_tokens(make_tokenizer(), ("<RS>=the", "<RS>=bot"))
    with pytest.raises(ValueError, match="contains the new token '<b2>'"):
        add_tokens(make_tokenizer(), ("<a2>=the <b2>", "<b2>=bot"))
    assert parse_init_token("<a>=b=c") == ("<a>", "b=c")


def test_ids_beyond_the_table_name_both_sizes():
    tokenizer = make_tokenizer()
    check_vocabulary(tokenizer, make_model("llama"))
    for model in (make_model("llama", 11), make_model("llama-tied", 11)):
        with pytest.raises(ValueError, match=r"ids up to 11 \('e'\).*has 11 rows"):
            check_vocabulary(tokenizer, model)
