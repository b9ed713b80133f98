"""Every run starts from what the last one ended with, or is refused in one line: folders of each kind at each path flag, and chains of runs."""

import contextlib
import io
import json
import shutil
from types import SimpleNamespace

import judged
import pytest
import torch
from conftest import settings_of
from safetensors.torch import load_file, save_file
from test_encoders import save_clip
from transformers import AutoTokenizer

from ta.builtin import tasks
from ta.builtin.model_folders import builtin_encoder, tiny_folder
from ta.builtin.pictures import write_pictures
from ta.builtin.tasks import write_jsonl
from ta.command_line import cli
from ta.folders import ModelConfig
from ta.model.load import load_base

pytestmark = pytest.mark.slow
QUICK = ("--batch-size", 2, "--steps", 1, "--sample-records", 0, "--log-every", 1)
RECORDS = {
    "sft": "chats",
    "dpo": "concise",
    "kto": "labelled",
    "rm": "preferences",
    "classify": "classes",
}


def call(recipe, *flags):
    """(exit code, lines on the screen) of a recipe that runs in this process; progress bars are left out."""
    module, said = judged.recipe(recipe), io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
        pytest.raises(SystemExit) as end,
    ):
        cli(module.main, settings_of(module), [str(flag) for flag in flags])
    lines = [line for line in said.getvalue().splitlines() if line.strip() and "it/s]" not in line]
    return end.value.code, lines


def refusal(code, lines):
    """The one line of a refusal; nothing where there are more, or another exit code."""
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[0] if code == 2 and errors == lines[-1:] else ""


def losses(run):
    """Held-out losses of a run, before, during and after training."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["val_loss"] for row in rows if "val_loss" in row]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Records of each recipe, and a function that runs one: make(recipe, name, *flags) -> folder of the run."""
    folder = tmp_path_factory.mktemp("chains")
    for name in RECORDS.values():
        make_records = getattr(tasks, name)
        write_jsonl(folder / f"{name}.jsonl", make_records("train", 8))
        write_jsonl(folder / f"{name}-val.jsonl", make_records("held_out", 4))
    passages = [{"id": f"p{i}", "text": f"Key {i} is red."} for i in range(6)]
    write_jsonl(folder / "passages.jsonl", passages)
    questions = [
        {
            "messages": [
                {"role": "user", "content": f"Key {i}?"},
                {"role": "assistant", "content": "red"},
            ],
            "gold": [f"p{i}"],
        }
        for i in range(6)
    ]
    write_jsonl(folder / "questions.jsonl", questions)
    write_pictures(folder / "pictures", 6, 3)
    save_clip(folder / "clip", whole=False)
    data = {
        recipe: ("--data", folder / f"{name}.jsonl", "--val-data", folder / f"{name}-val.jsonl")
        for recipe, name in RECORDS.items()
    }
    pictures = folder / "pictures"
    data["multimodal"] = (
        *("--data", pictures / "train.jsonl", "--val-data", pictures / "held_out.jsonl"),
        *("--image-root", pictures / "images"),
    )
    data["rag"] = ("--data", folder / "questions.jsonl", "--val-data", folder / "questions.jsonl")
    data["grpo"] = (*data["sft"], "--num-answers", 2, "--max-new-tokens", 4)
    data = {recipe: (*flags, *QUICK) for recipe, flags in data.items()}

    def make(recipe, name, *flags):
        code, lines = call(recipe, *data.get(recipe, ()), "--out", folder / name, *flags)
        assert code == 0, lines
        return folder / name

    return SimpleNamespace(folder=folder, data=data, make=make)


BASE = ("--model-path", tiny_folder())
NEW = ("--init-tokens", "<q>=cup")


@pytest.fixture(scope="module")
def runs(place):
    """{name: folder} of runs that others start from."""
    large = ("--lr", "1e-2")
    see = ("--image-encoder", "builtin", "--model-path", "builtin-pictures", *large)
    made = {
        "sft": ("sft", *BASE, *large),
        "sft new": ("sft", *BASE, *NEW, *large),
        "lora": ("sft", *BASE, "--adapter", "lora", "--lora-dropout", 0.1, *large),
        "lora new": ("sft", *BASE, "--adapter", "lora", *NEW, *large),
        "prompt": ("sft", *BASE, "--adapter", "prompt", *large),
        "prompt new": ("sft", *BASE, "--adapter", "prompt", *NEW, *large),
        "prefix new": ("sft", *BASE, "--adapter", "prefix", *NEW, *large),
        "p-tuning new": ("sft", *BASE, "--adapter", "p-tuning", *NEW, *large),
        "rm": ("rm", *BASE, *large),
        "rm lora": ("rm", *BASE, "--adapter", "lora", *large),
        "classify": ("classify", *BASE, *large),
        "classify lora": ("classify", *BASE, "--adapter", "lora", *large),
        "see": ("multimodal", *see),
        "see lora": ("multimodal", *see, "--adapter", "lora"),
    }
    folders = {name: place.make(recipe, name, *flags) for name, (recipe, *flags) in made.items()}
    index = place.make("build_index", "index", "--passages", place.folder / "passages.jsonl")
    retrieval = ("--index", index, *large, "--encoder-lr", "1e-2")
    folders["rag"] = place.make("rag", "rag", *BASE, *retrieval)
    return folders


# what each kind of run may be followed by with the same figure, at exactly the figure it ended with
CAUSAL = ("sft", "sft new", "lora", "lora new")
CAUSAL += ("prompt", "prompt new", "prefix new", "p-tuning new")
SAME = [("sft", start) for start in CAUSAL]
SAME += [("rm", "rm"), ("rm", "rm lora"), ("classify", "classify"), ("classify", "classify lora")]
SAME += [("multimodal", "see"), ("multimodal", "see lora")]


@pytest.mark.parametrize(("recipe", "start"), SAME)
def test_a_run_begins_where_the_last_one_ended(place, runs, tmp_path, recipe, start):
    """As a run folder, its final/, and with --adapter lora: on top of a whole model, refused on an adapter."""
    before, after = losses(runs[start])
    assert abs(before - after) > 1e-3
    for i, folder in enumerate((runs[start], runs[start] / "final")):
        flags = (*place.data[recipe], "--model-path", folder, "--out", tmp_path / f"{i}")
        code, lines = call(recipe, *flags)
        assert code == 0, lines
        assert losses(tmp_path / f"{i}")[0] == pytest.approx(after, abs=1e-5)
    code, lines = call(recipe, *flags[:-1], tmp_path / "lora", "--adapter", "lora")
    if (runs[start] / "final" / "adapter_config.json").exists():
        assert "leave --adapter out to go on with that one, or merge it" in refusal(code, lines)
    else:
        assert code == 0, lines
        assert losses(tmp_path / "lora")[0] == pytest.approx(after, abs=1e-5)


STILL = ("--lr", "1e-30")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("stored", [True, False])
def test_an_adapter_over_a_base_of_few_bits_goes_on(place, tmp_path, bits, stored):
    """The base is stored in few bits, or made so by --quantize; sft goes on, also after a dpo that learns nothing."""
    pytest.importorskip("bitsandbytes", reason="holds weights in few bits; install bitsandbytes")
    base, lora = tiny_folder(), ("--adapter", "lora")
    few = () if stored else ("--quantize", bits)
    if stored:
        load_base(ModelConfig(str(base)), quantize=bits).save_pretrained(tmp_path / "stored")
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "stored")
        base = tmp_path / "stored"

    def go(recipe, name, *flags):
        out = tmp_path / name
        code, lines = call(recipe, *place.data[recipe], *few, *flags, "--out", out)
        assert code == 0, lines
        return out

    first = go("sft", "first", "--model-path", base, *lora, "--lr", "1e-2")
    before, after = losses(first)
    assert abs(before - after) > 1e-3
    still = go("dpo", "dpo", "--model-path", first, *STILL)
    for i, start in enumerate((first, first / "final", still)):
        assert losses(go("sft", f"{i}", "--model-path", start))[0] == pytest.approx(after, abs=1e-5)
    refused = call("rm", *place.data["rm"], *few, "--model-path", first, "--out", tmp_path / "rm")
    assert "merge it with recipes/merge.py" in refusal(*refused)


THROUGH = [
    ("dpo", "sft"),
    ("dpo", "lora"),
    ("dpo", "lora new"),
    ("dpo", "prompt new"),
    ("kto", "sft new"),
    ("kto", "lora new"),
    ("sft", "see"),
    ("dpo", "see"),
    ("sft", "see lora"),
    ("kto", "see lora"),
    ("grpo", "sft"),
    ("grpo", "lora new"),
    ("rag", "sft"),
    ("rag", "lora new"),
]


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize(("recipe", "start"), THROUGH)
def test_a_method_between_changes_nothing_but_what_it_trains(
    place, runs, tmp_path, recipe, start, adapter
):
    """A run of another method that learns nothing, and after it the first method: the figure is still that of the first run.

    A model that sees goes on to see.
    """
    sees = "see" in start
    first = "multimodal" if sees else "sft"
    between = (*place.data[recipe], "--model-path", runs[start], *STILL, "--out", tmp_path / "b")
    if recipe == "rag":
        between += ("--index", place.folder / "index", "--encoder-lr", 0)
    code, lines = call(recipe, *between, "--adapter", adapter)
    if adapter == "lora" and (runs[start] / "final" / "adapter_config.json").exists():
        assert "leave --adapter out to go on" in refusal(code, lines)
        return
    assert code == 0, lines
    assert (tmp_path / "b" / "final" / "media.json").exists() == sees
    after = (*place.data[first], "--model-path", tmp_path / "b", "--out", tmp_path / "c")
    code, lines = call(first, *after)
    assert code == 0, lines
    assert losses(tmp_path / "c")[0] == pytest.approx(losses(runs[start])[1], abs=1e-5)


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("sft", (*BASE, "--adapter", "prompt", *NEW)),
        ("sft", (*BASE, "--adapter", "lora", *NEW)),
        ("sft", ("--adapter", "lora", "--lora-modules-to-save", "embed_tokens")),
    ],
)
def test_one_process_goes_on_from_two(place, runs, forked, tmp_path, recipe, flags):
    """With rows of new tokens that no adapter weight holds, and with a model that sees, whose table has two names."""
    if BASE[0] not in flags:
        flags = (*flags, "--model-path", runs["see"])
    data = (*place.data[recipe], "--batch-size", 4)
    forked(recipe, *data, *flags, "--lr", "1e-2", "--out", tmp_path / "two", processes=2)
    sees = runs["see"] in flags
    assert (tmp_path / "two" / "final" / "media.json").exists() == sees
    on = ("--model-path", tmp_path / "two", "--out", tmp_path / "one")
    code, lines = call(recipe, *place.data[recipe], *on)
    assert code == 0, lines
    assert losses(tmp_path / "one")[0] == pytest.approx(losses(tmp_path / "two")[1], abs=1e-5)


def test_the_index_and_the_encoder_of_rag_go_on(place, runs, tmp_path):
    """Retriever and generator both start where they ended, named by the run alone; its index answers questions."""
    again = ("--model-path", runs["rag"], "--index", runs["rag"], "--out", tmp_path / "again")
    code, lines = call("rag", *place.data["rag"], *again)
    assert code == 0, lines
    assert losses(tmp_path / "again")[0] == pytest.approx(losses(runs["rag"])[1], abs=1e-5)
    asked = ("--data", place.folder / "questions.jsonl", "--max-new-tokens", 2)
    model = ("--model-path", runs["rag"], "--index", runs["rag"])
    code, lines = call("generate", *model, *asked, "--out", tmp_path / "answers.jsonl")
    assert code == 0, lines
    answers = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert all(len(answer["passages"]) == 1 for answer in answers)


def test_a_reward_model_starts_from_a_whole_model_and_scores(place, runs, tmp_path):
    """Its body is that of the run before; an adapter of a language model has to be merged first."""
    flags = (*place.data["rm"], *STILL, "--out", tmp_path / "rm")
    code, lines = call("rm", *flags, "--model-path", runs["lora"])
    assert "merge it with recipes/merge.py and give the merged folder" in refusal(code, lines)
    code, lines = call("merge", "--model-path", runs["lora"], "--out", tmp_path / "merged")
    assert code == 0, lines
    code, lines = call("rm", *flags, "--model-path", tmp_path / "merged")
    assert code == 0, lines
    candidates = [
        {
            "messages": [{"role": "user", "content": "cup?"}],
            "answers": [{"id": "a", "content": "red"}, {"id": "b", "content": "no"}],
        }
    ]
    write_jsonl(tmp_path / "candidates.jsonl", candidates)
    for model in (tmp_path / "rm", runs["rm lora"]):
        out = tmp_path / f"scored-{model.name}.jsonl"
        asked = ("--data", tmp_path / "candidates.jsonl", "--out", out)
        code, lines = call("score", "--model-path", model, *asked)
        assert code == 0, lines
        assert json.loads(out.read_text())["rewards"].keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--image-projector", "c_abs"), "goes on with its own mlp"),
        (("--image-projector-path", "runs/x"), "goes on with its own projector"),
        (("--image-encoder", "none"), "goes on with its own builtin"),
        (("--image-token", "<x>"), "goes on with its own <img>"),
        (("--image-embeddings", 4), "goes on with its own 16"),
        (("--media-tokens", "<a>", "<b>"), r"goes on with its own"),
    ],
)
def test_a_flag_that_contradicts_a_model_that_sees(place, runs, tmp_path, flags, words):
    start = ("--model-path", runs["see"], "--out", tmp_path / "out")
    code, lines = call("multimodal", *place.data["multimodal"], *start, *flags)
    assert words in refusal(code, lines) and flags[0] in lines[-1]


@pytest.fixture(scope="module")
def kinds(place, runs):
    """{kind: folder} of all that may stand behind a path flag."""
    plain = place.folder / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(runs["lora"] / "final" / name, plain)
    (place.folder / "empty").mkdir()
    (place.folder / "features").mkdir()
    features = place.folder / "features" / "features.safetensors"
    pictures = ("--root", place.folder / "pictures" / "images", "--workers", 0)
    place.make("preprocess_images", features.relative_to(place.folder), *pictures)
    return {
        **{name: runs[name] for name in ("sft", "lora", "prompt", "see", "see lora")},
        **{name: runs[name] for name in ("rm", "rm lora", "classify", "rag")},
        "base": tiny_folder(),
        "final": runs["sft"] / "final",
        "plain": plain,
        "encoder": builtin_encoder(),
        "clip": place.folder / "clip",
        "index": place.folder / "index",
        "features": place.folder / "features",
        "checkpoint": next((runs["sft"] / "checkpoints").iterdir()),
        "records": place.folder / "pictures",
        "empty": place.folder / "empty",
        "file": place.folder / "chats.jsonl",
        "gone": place.folder / "gone",
    }


def flags_for(place, recipe, flag):
    """What a recipe needs beside a path flag."""
    if recipe == "build_index":
        return ("--passages", place.folder / "passages.jsonl")
    if recipe == "score":
        message = {"role": "user", "content": "cup?"}
        candidates = {"messages": [message], "answers": [{"id": "a", "content": "red"}]}
        write_jsonl(place.folder / "candidates.jsonl", [candidates])
        return ("--data", place.folder / "candidates.jsonl")
    if recipe in ("rm", "classify"):
        return (*place.data[recipe], *STILL)
    if recipe == "multimodal":
        clip = flag == "--image-encoder-path"
        return (*place.data[recipe], "--image-encoder", "clip" if clip else "builtin")
    flags = place.data.get(recipe, ())
    if recipe == "generate":
        flags = ("--data", place.folder / "questions.jsonl", "--max-new-tokens", 1)
    if recipe == "rag" and flag != "--index":
        flags += ("--index", place.folder / "index")
    return flags if flag == "--model-path" else (*flags, *BASE)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-50])


def lie(file):
    """The header is said to be longer than any file."""
    file.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def pickle(file):
    torch.save({"a": torch.zeros(2)}, file)


def rename(file):
    tensors = load_file(file)
    save_file({f"base.{name}": tensor for name, tensor in tensors.items()}, file, {"format": "pt"})


def widen(file):
    tensors = {name: torch.cat([x, x]) for name, x in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def lose(file):
    file.unlink()


def tear(file):
    file.write_text("{")


def listed(file):
    file.write_text("[]")


WEIGHTS, SETTINGS = (truncate, lie, pickle, rename, widen, lose), (tear, listed, lose)
DAMAGED = {  # recipe, flag, kind of folder: its files
    ("sft", "--model-path", "base"): ("model.safetensors", "config.json"),
    ("rm", "--model-path", "rm"): ("model.safetensors", "config.json"),
    ("sft", "--adapter-path", "lora"): ("adapter_model.safetensors", "adapter_config.json"),
    ("dpo", "--ref-path", "base"): ("model.safetensors", "config.json"),
    ("multimodal", "--image-encoder-path", "clip"): (
        *("model.safetensors", "config.json", "preprocessor_config.json"),
    ),
    ("multimodal", "--model-path", "see"): ("projectors/image.safetensors", "media.json"),
    ("multimodal", "--image-features", "features"): ("features.safetensors",),
    ("build_index", "--encoder-path", "encoder"): ("model.safetensors", "config.json"),
    ("generate", "--index", "index"): ("vectors.safetensors", "manifest.json"),
}
HARMLESS = {  # what loads all the same, and may
    # without media.json it is a language model, and an encoder is named
    ("see", "media.json", lose),
}


@pytest.mark.parametrize(("recipe", "flag", "kind"), DAMAGED)
def test_a_damaged_folder_is_one_line(place, kinds, tmp_path, recipe, flag, kind):
    flags = flags_for(place, recipe, flag)
    for i, name in enumerate(DAMAGED[recipe, flag, kind]):
        for damage in WEIGHTS if name.endswith(".safetensors") else SETTINGS:
            source = kinds[kind] / "final" if (kinds[kind] / "final").exists() else kinds[kind]
            folder = tmp_path / f"{i}-{damage.__name__}"
            shutil.copytree(source, folder)
            damage(folder / name)
            given = folder / name if kind == "features" else folder
            out = tmp_path / f"out-{i}-{damage.__name__}"
            code, lines = call(recipe, *flags, flag, given, "--out", out)
            if (kind, name, damage) in HARMLESS:
                assert code == 0, lines
            else:
                assert refusal(code, lines), (name, damage.__name__, code, lines)


WHOLE = {"base", "sft", "final", "rag"}
TEXT = WHOLE | {"lora", "plain", "prompt"}
SEES = {"see", "see lora"}
LORA = {"lora", "plain"}
USED = {  # recipe, flag: the kinds that are used; all others are refused
    ("sft", "--model-path"): TEXT | SEES,
    ("sft", "--adapter-path"): LORA | {"prompt"},
    ("sft", "--tokenizer-path"): TEXT - {"plain"} | SEES | {"rm", "rm lora", "classify"},
    ("dpo", "--model-path"): TEXT | SEES,
    ("dpo", "--ref-path"): TEXT,
    ("kto", "--model-path"): TEXT | SEES,
    ("rm", "--model-path"): WHOLE | {"rm", "rm lora", "encoder"},
    ("classify", "--model-path"): WHOLE | {"classify", "encoder"},
    ("multimodal", "--model-path"): WHOLE | SEES,
    ("multimodal", "--image-encoder-path"): {"clip"},
    ("multimodal", "--image-projector-path"): SEES,
    ("multimodal", "--image-features"): set(),
    ("rag", "--model-path"): TEXT | SEES,
    ("rag", "--index"): {"index", "rag"},
    ("rag", "--encoder-path"): {"encoder"},
    ("build_index", "--encoder-path"): WHOLE | {"encoder", "see", "rm", "classify"},
    ("generate", "--model-path"): TEXT | SEES,
    ("generate", "--adapter-path"): LORA | {"prompt"},
    ("generate", "--index"): {"index", "rag"},
    ("score", "--model-path"): {"rm", "rm lora"},
    ("merge", "--model-path"): LORA | {"see lora", "rm lora"},
    ("merge", "--adapter-path"): LORA | {"rm lora"},
    ("to_llava", "--model-path"): set(),
}


@pytest.mark.parametrize(("recipe", "flag"), USED)
def test_what_may_stand_behind_a_path_flag(place, kinds, tmp_path, recipe, flag):
    """Each kind of folder is used, or refused in one line; a new head stands on the body that was given."""
    flags = flags_for(place, recipe, flag)
    for kind, folder in kinds.items():
        code, lines = call(recipe, *flags, flag, folder, "--out", tmp_path / kind)
        if kind in USED[recipe, flag]:
            assert code == 0, (kind, lines)
            if recipe in ("rm", "classify") and kind in WHOLE:
                given, kept = body(folder), body(tmp_path / kind)
                assert given.keys() == kept.keys() and len(kept) > 10
                assert all(torch.equal(tensor, kept[name]) for name, tensor in given.items())
        else:
            assert refusal(code, lines), (kind, code, lines)


def body(folder):
    """The weights of a model's folder, or of a run, without those of its head."""
    final = folder / "final" if (folder / "final").exists() else folder
    tensors = load_file(final / "model.safetensors")
    return {name: t for name, t in tensors.items() if name.startswith("model.")}
