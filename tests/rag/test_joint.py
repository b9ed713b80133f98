"""Retriever and generator together: the loss against brute force, what gives the encoder a gradient, what changes nothing; candidates by hand."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from small import sft_step

from ta.builtin import models, tasks
from ta.chat.encode import encode_chats
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.data.batch import lay_out
from ta.data.loader import micro_batches
from ta.data.prepare import DataConfig, prepare_questions
from ta.folders import ModelConfig
from ta.model.adapters import AdapterConfig
from ta.model.load import ComputeConfig, load_model
from ta.rag import joint
from ta.rag.embedding import open_encoder, tokenize
from ta.rag.embedding_settings import EncoderConfig
from ta.rag.index import begin_index, build_index, open_index
from ta.rag.passages import PassageSettings, put_before, read_passages, text_of
from ta.rag.retrieval import candidate_rows, prompts_with_passages, retriever_of

SCALE = 3.0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of generator and encoder in float64, its retriever, and Questions batches of 6 records with answers of other lengths."""
    folder = tmp_path_factory.mktemp("rag")
    models.write_encoder(folder / "encoder")
    models.write_small(folder / "generator")
    passages = tasks.passages()[:40]
    tasks.write_jsonl(
        folder / "passages.jsonl",
        [p | {"text": p["text"] * (i % 3 + 1)} for i, p in enumerate(passages)],
    )
    names = [p["id"] for p in passages]
    records = [q for q in tasks.questions("train", 400) if q["gold"][0] in names][:6]
    for i, record in enumerate(records):
        record["messages"][-1]["content"] *= i % 3 + 1
    del records[5]["gold"]
    records[4]["messages"][-1]["loss"] = 0.5
    tasks.write_jsonl(folder / "questions.jsonl", records)
    begin_index(
        folder / "index",
        [str(folder / "passages.jsonl")],
        EncoderConfig(encoder_path=str(folder / "encoder")),
    )
    build_index(folder / "index", "cpu")
    index = open_index(folder / "index")
    encoder, encoder_tokenizer = open_encoder(
        index.encoder, index.embedding_settings, dtype="float64"
    )
    config = ModelConfig(model_path=str(folder / "generator"), dtype="float64")
    tokenizer = load_chat_tokenizer(config, TokenizerConfig(), ChatConfig())
    model = load_model(
        config,
        AdapterConfig(),
        ComputeConfig(),
        tokenizer,
        around=partial(joint.RagModel, encoder=encoder),
    )
    retriever = retriever_of(
        index, encoder_tokenizer, tokenizer, ChatConfig(), PassageSettings(3, 256, "\n\n")
    )
    prepared = prepare_questions(
        [str(folder / "questions.jsonl")],
        tokenizer,
        ChatConfig(),
        DataConfig(),
    )
    collate = joint.question_collate(prepared, index.passages)
    return model, retriever, prepared, collate


def batches(made, k=3, max_tokens=8192, records=6, **more):
    model, retriever, prepared, collate = made
    asked = micro_batches(prepared, np.arange(records), 8192, True, collate)
    return joint.with_passages(
        retriever._replace(passage_settings=PassageSettings(k, 256, "\n\n")),
        model,
        asked,
        max_tokens_per_micro=max_tokens,
        **more,
    )


def total(made, parts, scale=SCALE):
    """(Loss over the batches, gradients by name)."""
    made[0].zero_grad(set_to_none=True)
    loss = 0.0
    for batch in parts:
        value, count, _ = joint.rag_step(scale, made[0], batch)
        assert count == len(batch.found)
        value.backward()
        loss += value.item()
    return loss, {
        name: p.grad.clone() for name, p in made[0].named_parameters() if p.grad is not None
    }


def brute(made, k, gold=False):
    """The definition, question by question and passage by passage: transformers' logits, a plain encoder, a sum over probabilities."""
    model, retriever, prepared, collate = made
    (asked,) = micro_batches(prepared, np.arange(6), 8192, True, collate)
    model.zero_grad(set_to_none=True)
    table, texts = (
        retriever.table.double(),
        [text_of(p) for p in read_passages(retriever.index.passages, range(40))],
    )
    loss = 0.0
    for record in asked.records:
        chat, right = record["messages"], record["gold"]
        ids = torch.tensor([retriever.encoder_tokenizer(chat[0]["content"]).input_ids])
        hidden = model.encoder.model(input_ids=ids).last_hidden_state.mean(1)[0]
        q = hidden / hidden.norm()
        rows = sorted(range(40), key=lambda row: -(q.float() @ retriever.table[row]).item())[:k]
        if gold and right and right[0] not in rows:
            rows[-1] = right[0]
        scores = SCALE * torch.stack([q @ table[row] for row in rows])
        answers = []
        for row in rows:
            tokenizer = retriever.tokenizer
            tokens = encode_chats(
                [put_before(chat, [texts[row]], "\n\n")],
                tokenizer,
                ChatConfig(),
            )[0]
            logps = model.inner(input_ids=torch.tensor([tokens.ids])).logits[0].log_softmax(-1)
            answers.append(
                sum(
                    tokens.weights[t] * logps[t - 1, tokens.ids[t]]
                    for t in range(1, len(tokens.ids))
                    if tokens.weights[t]
                )
            )
        loss = loss - torch.log((scores.softmax(0) * torch.stack(answers).exp()).sum())
    loss.backward()
    return loss.item(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def agree(one, two, tolerance=1e-9):
    assert one[0] == pytest.approx(two[0], rel=tolerance)
    assert one[1].keys() == two[1].keys()
    for name, value in one[1].items():
        torch.testing.assert_close(value, two[1][name], rtol=1e-7, atol=tolerance, msg=name)


@pytest.mark.parametrize("gold", [False, True])
def test_the_loss_is_that_of_brute_force(made, gold):
    """Values and gradients in float64; the positions that predict are those before the answer's tokens, so targets are shifted."""
    agree(total(made, batches(made, gold=gold)), brute(made, 3, gold))


def test_one_passage_is_fine_tuning_on_the_joined_text_and_the_encoder_learns_nothing(made):
    model = made[0]
    (batch,) = batches(made, k=1)
    loss, gradients = total(made, [batch])
    assert not any(
        gradient.any() for name, gradient in gradients.items() if name.startswith("encoder.")
    )
    model.zero_grad(set_to_none=True)
    sft, weight, _ = sft_step(model, batch.sequences)
    sft.backward()
    plain = {name: p.grad for name, p in model.named_parameters() if name.startswith("inner.")}
    agree(
        (loss, {name: g for name, g in gradients.items() if name.startswith("inner.")}),
        (sft.item(), plain),
    )
    assert weight > len(batch.found)


def test_more_passages_give_the_encoder_a_gradient(made):
    _, gradients = total(made, batches(made))
    still = [name for name, g in gradients.items() if name.startswith("encoder.") and not g.any()]
    assert not still and any(name.startswith("encoder.") for name in gradients)


def test_micro_batches_padding_and_the_order_of_passages_change_nothing(made):
    model = made[0]
    parts = batches(made, gold=True, in_batch=1)
    expected = total(made, parts)
    longest = max(
        sum(batch.sequences.lengths) for batch in batches(made, gold=True, in_batch=1, records=1)
    )
    many = batches(made, max_tokens=2 * longest, gold=True, in_batch=1)
    assert len(parts) == 1 < len(many)
    agree(total(made, many), expected)
    model.mode = "padded"
    try:
        agree(total(made, batches(made, gold=True, in_batch=1)), expected)
    finally:
        model.mode = "packed"
    (batch,) = parts
    q, k = batch.vectors.shape[:2]
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    cells = batch.cells // k * k + order.argsort()[batch.cells % k]
    agree(total(made, [batch._replace(vectors=batch.vectors[:, order], cells=cells)]), expected)
    ids = [
        batch.sequences.tokens[0, e - n + 1 : e + 1].numpy()
        for e, n in zip(batch.sequences.ends.tolist(), batch.sequences.lengths, strict=True)
    ]
    assert len(ids) == len(batch.cells) <= q * k


def test_a_batch_without_questions_runs_and_counts_nothing(made):
    """As on a process that has none left."""
    (batch,) = batches(made, records=1)
    empty = batch._replace(
        sequences=lay_out([], []),
        questions=type(batch.questions)(*(x[:1] for x in batch.questions)),
        vectors=batch.vectors[:0],
        cells=batch.cells[:0],
        found=[],
        gold=[],
    )
    loss, gradients = total(made, [empty])
    assert loss == 0 and not any(g.any() for g in gradients.values())


def test_candidates_by_hand():
    found, gold, records = [[1, 2, 3], [4, 5, 6], [1, 5, 7]], [[9], [5], []], [12, 10, 11]
    assert candidate_rows(records, found, gold, 2, False, 0) == [[1, 2], [4, 5], [1, 5]]
    assert candidate_rows(records, found, gold, 2, True, 0) == [[1, 9], [4, 5], [1, 5]]
    # in the order of records: 10 has passage 5, 11 has 1, 12 has 9; each takes from those that follow it, in a circle, none twice
    assert candidate_rows(records, found, gold, 2, False, 1) == [[1, 2, 5], [4, 5, 1], [1, 5, 9]]
    assert candidate_rows(records, found, gold, 2, True, 5) == [[1, 9, 5], [4, 5, 1, 9], [1, 5, 9]]


def test_a_question_whose_passages_do_not_fit_is_refused(made):
    with pytest.raises(
        ValueError,
        match=r"with its 3 passages takes \d+ tokens, more than --max-tokens-per-micro 30",
    ):
        batches(made, max_tokens=30)


def test_under_a_limit_passages_give_way_and_questions_do_not(made):
    model, retriever, prepared, collate = made
    limit = int(np.diff(prepared.offsets).max()) + 3
    tight = retriever._replace(chat=ChatConfig(max_tokens=limit))
    asked = micro_batches(prepared, np.arange(6), 8192, True, collate)
    whole = batches(made)[0].sequences.lengths
    for batch in joint.with_passages(tight, model, asked):
        assert max(batch.sequences.lengths) <= limit < max(whole) and len(batch.cells) == 18
        assert len(batch.sequences.owners.unique()) == 18  # every sequence keeps its answer


def test_answers_read_what_training_reads(made):
    """The prompt of inference is the beginning of the sequence that training saw for the same passage, and names it with its score."""
    model, retriever, prepared, collate = made
    one = retriever._replace(passage_settings=PassageSettings(1, 256, "\n\n"))
    (asked,) = micro_batches(prepared, np.arange(6), 8192, True, collate)
    (batch,) = batches(made, k=1)
    embed = lambda texts: model.embed(texts)
    found = prompts_with_passages(
        one, embed, [{"messages": record["messages"]} for record in asked.records]
    )
    starts = np.cumsum([0, *batch.sequences.lengths])
    for (record, prompt), start, rows in zip(found, starts, batch.found, strict=False):
        assert batch.sequences.tokens[0, start : start + len(prompt)].tolist() == prompt
        (passage,) = record["passages"]
        assert (
            passage["id"] == read_passages(one.index.passages, rows)[0]["id"]
            and -1 <= passage["score"] <= 1
        )
        assert record["messages"][0]["content"].startswith(passage["id"].replace("-", " "))


def test_tools_of_a_record_reach_the_template_beside_passages(made, tmp_path):
    """In training and in prompts: the ids of apply_chat_template, with the passage in the question."""
    model, retriever, _, _ = made
    models.write_small(tmp_path / "generator")
    (tmp_path / "generator" / "chat_template.jinja").write_text(
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = load_chat_tokenizer(
        ModelConfig(str(tmp_path / "generator")), TokenizerConfig(), ChatConfig()
    )
    tools = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]
    record = {"messages": tasks.questions("train", 1)[0]["messages"], "tools": tools}
    tasks.write_jsonl(tmp_path / "asked.jsonl", [record | {"id": "q"}])
    prepared = prepare_questions(
        [str(tmp_path / "asked.jsonl")],
        tokenizer,
        ChatConfig(),
        DataConfig(),
    )
    one = retriever._replace(tokenizer=tokenizer, passage_settings=PassageSettings(1, 256, "\n\n"))
    collate = joint.question_collate(prepared, one.index.passages)
    asked = micro_batches(prepared, np.arange(1), 8192, True, collate)
    (batch,) = joint.with_passages(one, model, asked)
    ((read, prompt),) = prompts_with_passages(one, lambda texts: model.embed(texts), [record])
    fast = tokenizer.fast
    wanted = fast.apply_chat_template(read["messages"], tools=tools, return_dict=False)
    assert batch.sequences.tokens[0].tolist() == wanted
    asked = fast.apply_chat_template(
        read["messages"][:-1], tools=tools, add_generation_prompt=True, return_dict=False
    )
    assert prompt == asked and "[lookup]" in fast.decode(prompt)
    assert read["messages"][0]["content"] != record["messages"][0]["content"]


def test_gold_that_is_no_passage_is_named_by_its_line(made, tmp_path):
    _, retriever, _, _ = made
    record = tasks.questions("train", 1)[0] | {"gold": ["unheard-of"]}
    tasks.write_jsonl(tmp_path / "q.jsonl", [record])
    prepared = prepare_questions(
        [str(tmp_path / "q.jsonl")],
        retriever.tokenizer,
        ChatConfig(),
        DataConfig(),
    )
    with pytest.raises(ValueError, match=r"q\.jsonl:1: gold names passage 'unheard-of'"):
        joint.question_collate(prepared, retriever.index.passages)


def test_figures_by_hand(made):
    """Recall and MRR of the lists found; the utility is the gain of the answer's mean log-probability, here from the batch's own sums."""
    model = made[0]
    lists = lambda gold: [[g[0] if i % 2 and g else 39, 38, *g, 37] for i, g in enumerate(gold)]
    parts = [batch._replace(found=lists(batch.gold)) for batch in batches(made, ranked=10)]
    values = joint.retrieval_figures(model, parts, 3)
    golds = [g for batch in parts for g in batch.gold]
    hits = [i for i, g in enumerate(golds) if g and i % 2]
    assert len(golds) == 6 and sum(map(bool, golds)) == 5
    assert (
        values["recall_at_1"] == pytest.approx(len(hits) / 5)
        and values["recall_at_3"] == values["recall_at_5"] == 1.0
    )
    assert values["mrr"] == pytest.approx((len(hits) + (5 - len(hits)) / 3) / 5) and np.isfinite(
        values["retrieval_utility"]
    )


def test_reembedding_with_unchanged_weights_gives_the_table_again(made):
    model, retriever, _, _ = made
    torch.testing.assert_close(
        joint.reembedded(retriever, model).float(), retriever.table, rtol=0, atol=1e-6
    )


def test_a_question_over_the_limit_is_counted(made, tmp_path):
    _, retriever, _, _ = made
    records = tasks.questions("train", 2)
    records[1]["messages"][0]["content"] *= 30
    tasks.write_jsonl(tmp_path / "q.jsonl", records)
    config = replace(ChatConfig(), max_tokens=40)
    prepared = prepare_questions(
        [str(tmp_path / "q.jsonl")],
        retriever.tokenizer,
        config,
        DataConfig(),
    )
    ((reason, entry),) = prepared.info["drops"].items()
    assert (
        reason == "no answer fits in max_tokens"
        and entry["count"] == 1
        and entry["first"][0].endswith("q.jsonl:2")
    )


S, U1, A1, U2, A2, U3 = (
    {"role": role, "content": content}
    for role, content in (
        ("system", "be brief"),
        ("user", "cup red?"),
        ("assistant", "key"),
        ("user", "lamp blue?"),
        ("assistant", "tea"),
        ("user", "and then?"),
    )
)


@pytest.mark.parametrize(
    "chat, end",
    [
        ([U1, A1], 2),
        ([U1, A1, U2], 2),
        ([S, U1, A1, U2, A2, U3], 5),
        ([S, U1, A1, U2, {**A2, "loss": False}, U3], 3),
        ([U1, A1, U2, {**A2, "loss": 0}], 2),
        ([U1, {**A1, "loss": False}, U2, A2, U3], 4),
    ],
)
def test_passages_are_those_of_the_question_whose_answer_is_learned(made, tmp_path, chat, end):
    model, retriever, _, _ = made
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"messages": chat}) + "\n")
    known = (retriever.tokenizer, ChatConfig(), DataConfig())
    prepared = prepare_questions([str(file)], *known)
    collate = joint.question_collate(prepared, retriever.index.passages)
    asked = micro_batches(prepared, np.arange(1), 8192, True, collate)
    (batch,) = joint.with_passages(retriever, model, asked)
    question, answer = chat[end - 2]["content"], chat[end - 1]["content"]
    asks = tokenize(
        [question], retriever.encoder_tokenizer, retriever.index.embedding_settings, "query"
    )
    assert batch.questions.ids[0][batch.questions.mask[0] > 0].tolist() == list(asks[0])
    texts = [text_of(p) for p in read_passages(retriever.index.passages, batch.found[0])]
    sequences = np.split(batch.sequences.tokens[0].numpy(), batch.sequences.ends.numpy()[:-1] + 1)
    written = [retriever.tokenizer.fast.decode(ids) for ids in sequences]
    assert len(set(written)) == len(texts) == 3
    for text, passage in zip(written, texts, strict=True):
        assert f"{passage}\n\n{question}" in text
        assert answer in text.split(question)[1]
        assert all(later["content"] not in text for later in chat[end:])
    learned = retriever.tokenizer.fast.decode(batch.sequences.targets)
    assert learned.count(answer) == 3 and (answer == "key" or "key" not in learned)


def test_a_frozen_encoder_keeps_its_bits_and_a_generator_that_reads_ids_gets_them(made):
    """In half precision frozen weights are rounded, which an encoder that is exported must not be."""
    index = made[1].index
    encoder, _ = open_encoder(index.encoder, index.embedding_settings)

    def around(generator):
        generator.reads_ids = True
        return joint.RagModel(generator, encoder).requires_grad_(False)

    tokenizer = load_chat_tokenizer(ModelConfig(), TokenizerConfig(), ChatConfig())
    settings = AdapterConfig(), ComputeConfig(), tokenizer
    model = load_model(ModelConfig(dtype="bfloat16"), *settings, around=around)
    kinds = {part: {p.dtype for p in of.parameters()} for part, of in model.named_children()}
    assert kinds == {"inner": {torch.bfloat16}, "encoder": {torch.float32}} and model.reads_ids
