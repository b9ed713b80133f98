"""The built-in records are right, split and repeatable; the tokenizer loses no text; the tiny models load back as they were."""

import json
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ta.builtin import models, tasks
from ta.builtin.data_files import SIZES
from ta.data.records import (
    check_candidates,
    check_chat,
    check_class,
    check_labelled,
    check_pair,
    check_question,
)
from ta.data.sources import USED

MAKERS = {
    "chats": (tasks.chats, check_chat),
    "wordy": (tasks.wordy, check_chat),
    "concise": (tasks.concise, check_pair),
    "preferences": (tasks.preferences, check_pair),
    "labelled": (tasks.labelled, check_labelled),
    "candidates": (tasks.candidates, check_candidates),
    "classes": (tasks.classes, check_class),
}


def solve(messages):
    """The right answer to the last question, worked out from the text alone."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    *facts, _ = asked[0].split("\n")
    question = asked[-1].split("\n")[-1]
    if question == "repeat?":
        return facts[0]
    if question == "sum?":
        return str(sum(int(fact.split()[1]) for fact in facts))
    return next(fact for fact in facts if fact.split()[0] + "?" == question)


def stated(record):
    """What a record states, whatever the order."""
    messages = record.get("messages") or record["context"]
    text = next(message["content"] for message in messages if message["role"] == "user")
    if text.startswith("Words:"):
        return tuple(sorted(re.match(r"Words: (.*?)\.", text)[1].split()))
    *facts, question = text.split("\n")
    return tuple(sorted(facts[0].split() if question == "repeat?" else facts))


def test_solver_by_hand():
    ask = lambda *texts: solve([{"role": "user", "content": text} for text in texts])
    assert ask("cup red\nkey gold\nkey?") == "key gold"
    assert ask("cup red\nkey gold\nkey?", "cup?") == "cup red"
    assert ask("Ida 7\nLeo 8\nsum?") == "15"
    assert ask("cat rice owl\nrepeat?") == "cat rice owl"


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_are_right(split):
    for record in tasks.chats(split, 400):
        for place, message in enumerate(record["messages"]):
            if message["role"] == "assistant":
                assert message["content"] == solve(record["messages"][:place])
        assert record["messages"][-1]["content"] == record["answer"]
    for record in tasks.preferences(split, 400):
        assert (
            record["answer_w"]["content"]
            == solve(record["context"])
            != record["answer_l"]["content"]
        )
    labelled = tasks.labelled(split, 400)
    assert all(
        record["is_desirable"] == (record["answer"]["content"] == solve(record["context"]))
        for record in labelled
    )
    assert 0.4 < sum(record["is_desirable"] for record in labelled) / 400 < 0.6
    pairs = tasks.concise(split, 400)
    assert all(record["answer_w"]["content"] == solve(record["context"]) for record in pairs)
    assert all(record["answer_w"] != record["answer_l"] for record in pairs)
    for records, name, share in ((pairs, "answer_l", 1 / 2), (labelled, "answer", 1 / 4)):
        wordy = [r[name]["content"] == f"{solve(r['context'])}, of course!" for r in records]
        assert abs(sum(wordy) / 400 - share) < 0.06
    for record in tasks.candidates(split, 400):
        texts = [answer["content"] for answer in record["answers"]]
        assert (
            len(set(texts)) == len(texts) >= 2
            and texts.count(solve(record["messages"])) == 1
            and record["answer"] == solve(record["messages"])
        )
    for record in tasks.classes(split, 400):
        words = record["messages"][0]["content"][len("Words: ") : -1].split()
        assert sum(word in tasks.TOPICS[record["label"]] for word in words) == 2


def test_wordy_chats_are_the_same_with_three_of_four_answers_in_more_words():
    bare, more = (
        [message for record in make("train", 400) for message in record["messages"]]
        for make in (tasks.chats, tasks.wordy)
    )
    changed = [(b, m) for b, m in zip(bare, more, strict=True) if b != m]
    for b, m in changed:
        assert m == {"role": "assistant", "content": f"{b['content']}, of course!"}
    assert 0.7 < len(changed) / sum(b["role"] == "assistant" for b in bare) < 0.8


def test_chats_are_varied():
    records = tasks.chats("train", 500)
    # those that are practised are others
    assert tasks.practice("train", 20) != records[:20]
    assert {r["id"].split("-")[0] for r in records} == {"lookup", "repeat", "add"}
    for kind in SIZES:
        (record,) = getattr(tasks, kind)("train", 1)
        assert USED.issuperset(record), f"a field of {kind} that no method reads"
    roles = [tuple(message["role"] for message in record["messages"]) for record in records]
    assert any(role[0] == "system" for role in roles) and any(
        role.count("user") > 1 for role in roles
    )
    assert (
        all(role[-1] == "assistant" for role in roles)
        and len({record["id"] for record in records}) == 500
    )


@pytest.mark.parametrize("kind", MAKERS)
def test_repeatable_disjoint_and_accepted(kind):
    make, check = MAKERS[kind]
    train, held_out = make("train", 2000), make("held_out", 500)
    assert make("train", 2000) == train and make("train", 20) == train[:20]
    assert not {stated(record) for record in train} & {stated(record) for record in held_out}
    assert [check(record) for record in held_out] == held_out


def test_records_equal_in_another_process():
    made = "(tasks.chats('train', 50), models._trained_backend())"
    code = f"from ta.builtin import models, tasks; import hashlib; print(hashlib.sha256(repr({made}).encode()).hexdigest())"
    run = lambda seed: subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ".", "PYTHONHASHSEED": seed, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run("1").stdout == run("2").stdout


def test_classes_are_equally_frequent():
    labels = [record["label"] for record in tasks.classes("train", 4000)]
    assert all(abs(labels.count(label) / 4000 - 1 / 3) < 0.03 for label in range(3))


TOKENIZER = models.tiny_tokenizer()
ODD = ["<|im_end|>", "<|", " ", "\n", "cat", "é", "\x00", "\u200d", "🙂"]


@settings(deadline=None, max_examples=300)
@given(
    st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from(ODD)).map("".join)
)
def test_text_survives_the_tokenizer(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_tokenizer_words_template_and_special_tokens():
    for word in (
        *tasks.NAMES,
        *tasks.COLOURS,
        *tasks.THINGS,
        *(w for topic in tasks.TOPICS for w in topic),
    ):
        assert len(TOKENIZER.encode(word)) <= 2, word
    assert 400 <= len(TOKENIZER) <= 1024 and TOKENIZER.pad_token_id != TOKENIZER.eos_token_id
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    opened = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
    assert TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == opened
    answered = [*chat, {"role": "assistant", "content": "A"}]
    assert TOKENIZER.apply_chat_template(answered, tokenize=False) == opened + "A<|im_end|>\n"
    with pytest.raises(Exception, match="unknown role tool"):
        TOKENIZER.apply_chat_template([{"role": "tool", "content": "x"}])
    models.tiny_tokenizer().add_tokens(["<new>"])
    assert len(models.tiny_tokenizer()) == len(TOKENIZER)


def test_model_is_seeded_and_about_a_million_weights():
    before = torch.random.get_rng_state()
    one, same, other = (models.tiny_model(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one) and any(
        not torch.equal(one[name], other[name]) for name in one
    )
    model = models.tiny_model()
    assert 0.7e6 < sum(weight.numel() for weight in model.parameters()) < 1.3e6
    assert {weight.dtype for weight in model.parameters()} == {
        torch.float32
    } and model.config.head_dim >= 32
    stops = model.generation_config
    assert (stops.eos_token_id, stops.pad_token_id) == (
        TOKENIZER.eos_token_id,
        TOKENIZER.pad_token_id,
    )


@pytest.mark.parametrize("num_labels", [None, 3])
def test_folder_loads_back_equal(tmp_path, num_labels):
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaForSequenceClassification,
    )

    models.write_tiny(tmp_path / "tiny", seed=5, num_labels=num_labels)
    kind = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "tiny").eval(),
        AutoTokenizer.from_pretrained(tmp_path / "tiny"),
    )
    made = models.tiny_model(5)
    if num_labels is not None:
        config = models.tiny_config(num_labels=num_labels)
        made = models._seeded(LlamaForSequenceClassification, config, 5)
    chat = tasks.chats("train", 1)[0]["messages"]
    text = TOKENIZER.apply_chat_template(chat, tokenize=False)
    assert (
        tokenizer.encode(text) == TOKENIZER.encode(text)
        and tokenizer.chat_template == TOKENIZER.chat_template
    )
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        None,
    )
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, made(ids).logits)
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_jsonl_is_whole_or_absent(tmp_path):
    path = tmp_path / "records.jsonl"
    tasks.write_jsonl(path, [{"text": "é\n"}, {"n": 1}])
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [
        {"text": "é\n"},
        {"n": 1},
    ]

    def torn():
        yield {"n": 2}
        raise RuntimeError("torn")

    with pytest.raises(RuntimeError, match="torn"):
        tasks.write_jsonl(path, torn())
    assert len(path.read_text("utf-8").splitlines()) == 2 and list(tmp_path.iterdir()) == [path]


def test_each_answer_stands_in_one_passage_whose_words_no_question_has():
    """So that only what was learned leads from a question to its passage; held-out questions ask for pairs that no other one does."""
    catalogue = {
        passage["id"]: f"{passage['title']}\n{passage['text']}" for passage in tasks.passages()
    }
    asked = {split: tasks.questions(split, 300) for split in ("train", "held_out")}
    for record in (*asked["train"], *asked["held_out"]):
        assert (
            check_question(record)["gold"] == record["gold"]
            and record["messages"][-1]["content"] == record["answer"]
        )
        assert [name for name, text in catalogue.items() if record["answer"] in text] == record[
            "gold"
        ]
        words = set(re.findall(r"\w+", record["messages"][0]["content"]))
        assert not words & {
            word for text in catalogue.values() for word in re.findall(r"[a-z]+", text)
        }
    known, new = ({record["gold"][0] for record in asked[split]} for split in asked)
    assert not known & new and {half for name in new for half in name.split("-")} <= {
        half for name in known for half in name.split("-")
    }
    reading = tasks.readings("train", 1)[0]
    assert (
        reading["messages"][0]["content"]
        == f"{catalogue[reading['gold'][0]]}\n\n{asked['train'][0]['messages'][0]['content']}"
    )
