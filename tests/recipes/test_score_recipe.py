"""recipes/score.py and recipes/sample.py: rewards and classes equal plain transformers', choices follow the rewards."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ta.builtin import models, tasks


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path):
    models.write_tiny(tmp_path / "rm", num_labels=1)
    models.write_tiny(tmp_path / "classes", num_labels=3)
    tasks.write_jsonl(tmp_path / "candidates.jsonl", tasks.candidates("held_out", 20))
    tasks.write_jsonl(tmp_path / "chats.jsonl", tasks.classes("held_out", 20))
    return tmp_path


def plain_scores(folder, chats):
    """Logits of each chat alone through plain transformers."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        return [
            model(tokenizer.apply_chat_template(c, return_tensors="pt", return_dict=False)).logits[
                0
            ]
            for c in chats
        ]


def test_system_prompts_of_sources_and_tools_of_records_are_scored(door, files):
    tokenizer = AutoTokenizer.from_pretrained(files / "rm")
    tokenizer.chat_template = "{{ tools | length if tools else '' }}" + tokenizer.chat_template
    tokenizer.save_pretrained(files / "rm")
    asked = {"role": "user", "content": "2 + 2?"}
    tools = [{"type": "function", "function": {"name": "add"}}]
    record = {"messages": [asked], "tools": tools, "answers": [{"content": "4"}]}
    tasks.write_jsonl(files / "tools.jsonl", [record])
    given = f"{files / 'tools.jsonl'}@system=Be brief."
    out = files / "scored.jsonl"
    assert door("score", "--model-path", files / "rm", "--data", given, "--out", out)[0] == 0
    told, answer = (
        {"role": r, "content": c} for r, c in (("system", "Be brief."), ("assistant", "4"))
    )
    model = AutoModelForSequenceClassification.from_pretrained(files / "rm")
    ids = tokenizer.apply_chat_template(
        [told, asked, answer], tools=tools, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        wanted = model(ids).logits.item()
    (rewards,) = [line["rewards"] for line in lines(out)]
    assert rewards["0"] == pytest.approx(wanted, abs=1e-4)


def test_rewards_equal_transformers_and_drive_the_choice(door, files):
    out = files / "scored.jsonl"
    assert (
        door(
            "score",
            "--model-path",
            files / "rm",
            "--data",
            files / "candidates.jsonl",
            "--out",
            out,
        )[0]
        == 0
    )
    scored = lines(out)
    assert [r["id"] for r in scored] == [r["id"] for r in tasks.candidates("held_out", 20)]
    for record in scored:
        chats = [
            [*record["messages"], {"role": "assistant", "content": a["content"]}]
            for a in record["answers"]
        ]
        for answer, logits in zip(
            record["answers"], plain_scores(files / "rm", chats), strict=True
        ):
            assert record["rewards"][answer["id"]] == pytest.approx(logits.item(), abs=1e-4)
    best = files / "best.jsonl"
    assert door("sample", "--data", out, "--out", best)[0] == 0
    for before, after in zip(scored, lines(best), strict=True):
        assert [a["id"] for a in after["answers"]] == [
            max(before["rewards"], key=before["rewards"].get)
        ]
    chats = files / "chats2.jsonl"
    assert (
        door(
            "sample", "--data", out, "--out", chats, "--method", "rejection", "--n", 2, "--as-chats"
        )[0]
        == 0
    )
    assert len(lines(chats)) == 40 and all(
        r["messages"][-1]["role"] == "assistant" for r in lines(chats)
    )
    assert len({r["id"] for r in lines(chats)}) == 40


def test_classes_and_probabilities(door, files):
    out = files / "out.jsonl"
    flags = (
        "score",
        "--model-path",
        files / "classes",
        "--kind",
        "class",
        "--data",
        files / "chats.jsonl",
        "--out",
        out,
    )
    assert door(*flags)[0] == 0
    records = lines(out)
    for record, logits in zip(
        records, plain_scores(files / "classes", [r["messages"] for r in records]), strict=True
    ):
        assert record["probabilities"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-4)
        assert record["prediction"] == logits.argmax().item() and "label" in record
    assert door(*flags)[0] == 2
    before = out.read_bytes()
    assert door(*flags, "--resume")[0] == 0 and out.read_bytes() == before
    code, said = door(*flags, "--resume", "--dtype", "float64")
    assert code == 2 and "made of other data, another model or other settings" in said
    assert out.read_bytes() == before


def test_wrong_input_is_answered(door, files):
    few = [json.dumps(record) for record in tasks.candidates("held_out", 5)]
    few.append(
        json.dumps(
            {
                "messages": [{"role": "user", "content": "?"}],
                "answers": [{"id": "a", "content": "word " * 1000}],
            }
        )
    )
    (files / "long.jsonl").write_text("\n".join(few))
    cases = [
        (("score", "--data", files / "candidates.jsonl"), "no reward model or classifier"),
        (("score", "--model-path", files / "rm"), "no data"),
        (
            ("score", "--model-path", files / "classes", "--data", files / "candidates.jsonl"),
            "3 scores",
        ),
        (
            (
                "score",
                "--model-path",
                files / "rm",
                "--data",
                files / "candidates.jsonl",
                "--max-tokens",
                3,
            ),
            "max_tokens",
        ),
        (
            ("score", "--model-path", files / "rm", "--data", files / "long.jsonl"),
            " prompts do not fit in the model's context of 1024",
        ),
        (
            ("sample", "--data", files / "candidates.jsonl"),
            "candidates.jsonl:1: answer '0' has no reward",
        ),
    ]
    for (recipe, *flags), message in cases:
        code, text = door(recipe, *flags, "--out", files / "new.jsonl")
        assert code == 2 and message in text and not (files / "new.jsonl").exists(), (recipe, text)


@pytest.mark.parametrize(("name", "kind"), [("rm", "candidates"), ("classes", "class")])
def test_scores_that_are_no_numbers_are_told_and_not_written(door, files, name, kind):
    weights = files / name / "model.safetensors"
    tensors = load_file(weights)
    tensors["score.weight"][0, 3] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    data = {"rm": "candidates", "classes": "chats"}[name]
    flags = ("--model-path", files / name, "--data", files / f"{data}.jsonl", "--kind", kind)
    code, said = door("score", *flags, "--out", files / "new.jsonl")
    assert code == 2 and said.startswith("error: the model's logits are not numbers (NaN)")
    assert not (files / "new.jsonl").exists()


def candidate(texts, rewards, name="a"):
    """A scored record with these answers."""
    answers = [{"id": str(i), "content": text} for i, text in enumerate(texts)]
    asked = [{"role": "user", "content": "?"}]
    given = {str(i): reward for i, reward in enumerate(rewards)}
    return {"id": name, "messages": asked, "answers": answers, "rewards": given}


def test_what_is_chosen_is_no_repeat_and_can_be_chosen_from_again(door, tmp_path):
    """Of equal answers the best rewarded stays; rewards are those of the chosen; the output is an input."""
    tasks.write_jsonl(
        tmp_path / "scored.jsonl", [candidate("aabbc", [1, 3, 2, 2, 0]), candidate("zz", [1, 1])]
    )
    for method in ("best", "rejection", "random"):
        flags = ("--method", method, "--n", "4", "--overwrite")
        code, said = door(
            "sample", "--data", tmp_path / "scored.jsonl", "--out", tmp_path / "one.jsonl", *flags
        )
        assert code == 0 and "4 answers that repeat another one" not in said
        assert "3 answers that repeat another one of their record were left out" in said
        first, second = lines(tmp_path / "one.jsonl")
        assert {a["id"] for a in first["answers"]} == {"1", "2", "4"}
        assert first["rewards"] == {
            a["id"]: [1, 3, 2, 2, 0][int(a["id"])] for a in first["answers"]
        }
        assert len(second["answers"]) == 1 == len(second["rewards"])
        again = ("--data", tmp_path / "one.jsonl", "--n", "1", "--overwrite")
        assert door("sample", *again, "--out", tmp_path / "two.jsonl")[0] == 0
        assert lines(tmp_path / "two.jsonl")[0]["rewards"] == {"1": 3}
    kept = ("--keep-duplicates", "--n", "9", "--out", tmp_path / "all.jsonl")
    assert door("sample", "--data", tmp_path / "scored.jsonl", *kept)[0] == 0
    assert [len(r["answers"]) for r in lines(tmp_path / "all.jsonl")] == [5, 2]
    code, said = door("sample", "--data", tmp_path / "scored.jsonl", *kept)
    assert code == 2 and "exists: give another file, or --overwrite" in said
    (tmp_path / "thesis.txt").write_text("mine")
    mine = ("--out", tmp_path / "thesis.txt", "--overwrite")
    code, said = door("sample", "--data", tmp_path / "scored.jsonl", *mine)
    assert code == 2 and "holds no JSON lines" in said


def test_pairs_set_the_best_against_the_worst(door, tmp_path):
    """And the next best against the next worst; equal rewards are no pair. dpo.py's checker reads them."""
    from ta.data.records import check_pair

    tasks.write_jsonl(
        tmp_path / "scored.jsonl",
        [candidate("abcde", [1, 5, 2, 4, 2], "x"), candidate("ab", [1, 1]), candidate("a", [3])],
    )
    for n, wanted in ((1, ["ba"]), (2, ["ba", "de"]), (5, ["ba", "de"])):
        flags = ("--as-pairs", "--n", n, "--out", tmp_path / "pairs.jsonl", "--overwrite")
        code, said = door("sample", "--data", tmp_path / "scored.jsonl", *flags)
        assert code == 0 and "2 records have no two answers of different reward" in said
        pairs = [check_pair(pair) for pair in lines(tmp_path / "pairs.jsonl")]
        assert [p["answer_w"]["content"] + p["answer_l"]["content"] for p in pairs] == wanted
        assert pairs[0]["id"] == ("x" if n == 1 else "x-0")
        assert (pairs[0]["reward_w"], pairs[0]["reward_l"]) == (5, 1)
    code, said = door(
        "sample", "--data", tmp_path / "scored.jsonl", "--as-pairs", "--method", "random"
    )
    assert code == 2 and "leave --method random out" in said


def test_rejection_sampling_as_the_readme_shows_it(door, files):
    """Its four commands, one after another, on small files: what one writes the next reads, and chats of chosen answers train."""
    import shlex
    from pathlib import Path

    text = (Path(__file__).parent.parent.parent / "README.md").read_text()
    block = (
        text.split("Rejection sampling is four commands", 1)[1]
        .split("```sh\n", 1)[1]
        .split("```", 1)[0]
    )
    commands = [shlex.split(line)[1:] for line in block.strip().splitlines()]
    assert [Path(command[0]).stem for command in commands] == ["generate", "score", "sample", "sft"]
    models.write_tiny(files / "sft")
    (files / "candidates.jsonl").unlink()
    for folder, path in (("runs/sft/final", files / "sft"), ("runs/rm/final", files / "rm")):
        commands = [
            [str(path) if word == folder else word for word in command] for command in commands
        ]
    commands = [
        [
            str(files / word) if word.endswith(".jsonl") or word.startswith("runs/") else word
            for word in c
        ]
        for c in commands
    ]
    commands[0] += ["--data", str(files / "chats.jsonl"), "--max-new-tokens", "6"]
    commands[3] += ["--steps", "2", "--batch-size", "4", "--log-every", "1"]
    for path, *flags in commands:
        code, said = door(Path(path).stem, *flags)
        assert code == 0, said
    scored, chosen = lines(files / "scored.jsonl"), lines(files / "chosen.jsonl")
    assert (
        len(scored) == 20
        and all(len(record["rewards"]) == 8 for record in scored)
        and 20 < len(chosen) <= 40  # two of a record, unless all its answers are the same
    )
    assert len({json.dumps(chat) for chat in chosen}) == len(chosen)
    path, *flags = commands[0]
    for flag, value in (("--data", "scored.jsonl"), ("--out", "new.jsonl")):
        flags[len(flags) - 1 - flags[::-1].index(flag) + 1] = str(files / value)
    assert door("generate", *flags)[0] == 0
    assert not any("rewards" in record for record in lines(files / "new.jsonl"))
    assert chosen[0]["messages"][-1]["content"] in [
        answer["content"] for answer in scored[0]["answers"]
    ]
    assert (files / "runs/rejection/final/config.json").exists()
