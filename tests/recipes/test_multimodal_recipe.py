"""recipes/multimodal.py, preprocess_images.py, generate.py and to_llava.py as a user runs them with pictures, from flags to answers."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from export_reader import OTHER, asked
from safetensors.torch import load_file, save_file
from test_encoders import save_clip, save_siglip

from ta.builtin.pictures import write_pictures
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.folders import ModelConfig
from ta.media.modalities import reopen_media
from ta.media.multimodal import embed_media_prompts, media_model_for_inference
from ta.media.settings import MediaFiles
from ta.model.load import load_for_inference

pytestmark = pytest.mark.slow
QUICK = (
    "--batch-size",
    4,
    "--log-every",
    1,
    "--cherry-max-new-tokens",
    6,
    "--cherry-records",
    5,
    "--lr",
    "1e-3",
    "--image-encoder",
    "builtin",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 12, 3)
    save_clip(folder / "clip", whole=True)
    return folder


@pytest.fixture
def flags(place):
    return (
        "--data",
        place / "train.jsonl",
        "--val-data",
        place / "held_out.jsonl",
        "--image-root",
        place / "images",
        *QUICK,
    )


def losses(folder):
    return [row["loss"] for row in map(json.loads, open(folder / "metrics.jsonl")) if "loss" in row]


def lines(path):
    return [json.loads(line) for line in open(path)]


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_export_alone_answers_as_the_trained_model_did(forked, flags, place, tmp_path, adapter):
    said = forked(
        "multimodal", *flags, "--steps", 3, "--adapter", adapter, "--out", tmp_path / "run"
    )
    assert "samples" in said and "held_out/00000.png" in said and "samples at step 3" in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == page.count("<article>") == 5
    final = tmp_path / "run" / "final"
    assert {"media.json", "projectors", "tokenizer.json"} <= {path.name for path in final.iterdir()}
    ask = (
        "--data",
        place / "held_out.jsonl",
        "--image-root",
        place / "images",
        "--max-new-tokens",
        6,
        "--with-prompt",
        "--no-skip-special-tokens",
    )
    forked("generate", "--model-path", final, *ask, "--out", tmp_path / "a.jsonl")
    answers = lines(tmp_path / "a.jsonl")
    samples = [row for row in lines(tmp_path / "run" / "samples.jsonl") if row["step"] == 3]
    assert [row["answer"] for row in samples] == [
        row["answers"][0]["content"].removesuffix("<|im_end|>") for row in answers[:5]
    ]
    assert [row["reference"] for row in samples] == [row["reference"] for row in answers[:5]]
    assert (
        all(row["prompt"].count("<img>") == 16 for row in answers)
        and answers[0]["messages"][0]["content"] == "held_out/00000.png"
    )
    if adapter == "lora":
        merged = (
            "--model-path",
            json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"],
        )
        forked("merge", *merged, "--adapter-path", final, "--out", tmp_path / "merged")
        forked("generate", "--model-path", tmp_path / "merged", *ask, "--out", tmp_path / "b.jsonl")
        assert [row["answers"] for row in lines(tmp_path / "b.jsonl")] == [
            row["answers"] for row in answers
        ]


def test_features_made_before_train_to_the_same_bits(forked, door, flags, place, tmp_path):
    cache = tmp_path / "c.safetensors"
    said = forked(
        "preprocess_images",
        "--root",
        place / "images",
        "--out",
        cache,
        "--batch-size",
        4,
        "--workers",
        0,
    )
    assert "features of 15 files, 0 of them from before" in said
    for name, more in (("live", ()), ("cached", ("--image-features", cache))):
        forked("multimodal", *flags, "--steps", 3, *more, "--out", tmp_path / name)
    assert losses(tmp_path / "live") == losses(tmp_path / "cached")
    one, other = (
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("live", "cached")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)

    root = tmp_path / "images"
    shutil.copytree(place / "images", root)
    stale = (
        *flags,
        "--image-root",
        root,
        "--image-features",
        cache,
        "--steps",
        1,
        "--out",
        tmp_path / "no",
    )
    (root / "train" / "00004.png").write_bytes((root / "train" / "00005.png").read_bytes())
    code, text = door("multimodal", *stale)
    assert code == 2 and "train.jsonl:5" in text and "stale" in text
    shutil.copy(place / "images" / "train" / "00004.png", root / "train" / "00004.png")
    assert door("multimodal", *stale, "--dry-run")[0] == 0
    (root / "held_out" / "00001.png").write_bytes(b"x")
    code, text = door("multimodal", *stale)
    assert code == 2 and "held_out.jsonl:" in text and "stale" in text
    foreign = (
        *flags,
        "--image-encoder",
        "clip",
        "--image-encoder-path",
        place / "clip",
        "--image-features",
        cache,
        "--out",
        tmp_path / "no",
    )
    code, text = door("multimodal", *foreign)
    assert code == 2 and "another encoder" in text and not (tmp_path / "no").exists()
    code, text = door("preprocess_images", "--root", place / "images", "--out", cache)
    assert code == 2 and "exists" in text


def test_two_processes_equal_one(forked, flags, tmp_path):
    more = ("--steps", 3, "--max-tokens-per-micro", 300)
    for processes in (1, 2):
        forked("multimodal", *flags, *more, "--out", tmp_path / str(processes), processes=processes)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-5)
    for name in ("model.safetensors", "projectors/image.safetensors"):
        one, two = (load_file(tmp_path / n / "final" / name) for n in "12")
        assert one.keys() == two.keys() and all(
            torch.allclose(one[key], two[key], atol=1e-5) for key in one
        )
    samples = [
        [row["answer"] for row in lines(tmp_path / n / "samples.jsonl") if row["step"] == 0]
        for n in "12"
    ]
    assert samples[0] == samples[1]


def test_resume_is_bitwise(forked, flags, place, tmp_path):
    more = (
        "--steps",
        4,
        "--save-every",
        2,
        "--keep",
        0,
        "--image-projector",
        "c_abs",
        "--image-embeddings",
        4,
        "--projector-width",
        16,
    )
    forked("multimodal", *flags, *more, "--out", tmp_path / "run")
    shard = tmp_path / "run" / "checkpoints" / "step-00000004"
    kept, before = (shard / "shard-0.safetensors").read_bytes(), losses(tmp_path / "run")
    shutil.rmtree(shard), shutil.rmtree(tmp_path / "run" / "final")
    same_root = place / "clip" / ".." / "images"  # a folder is compared, not how it is written
    again = (*flags, *more, "--image-root", same_root, "--out", tmp_path / "run")
    said = forked("multimodal", *again, "--resume")
    assert "at step 2" in said and losses(tmp_path / "run") == before
    assert (shard / "shard-0.safetensors").read_bytes() == kept
    text = forked(
        "multimodal",
        *flags,
        *more,
        "--out",
        tmp_path / "run",
        "--resume",
        "--projector-lr",
        "5e-3",
        code=2,
    )
    assert "projector_lr was 0.001 and is 0.005" in text
    swapped = tmp_path / "images"
    shutil.copytree(place / "images", swapped)
    swap(swapped / "train" / "00000.png", swapped / "train" / "00001.png")
    moved = (*flags, *more, "--image-root", swapped, "--out", tmp_path / "run", "--resume")
    assert "media was" in forked("multimodal", *moved, code=2)


def swap(one, other):
    """Each picture under the other's name."""
    first, second = one.read_bytes(), other.read_bytes()
    assert first != second
    one.write_bytes(second), other.write_bytes(first)


def test_answers_are_gone_on_with_only_where_pictures_and_projectors_are_the_same(
    forked, door, flags, place, tmp_path
):
    forked("multimodal", *flags, "--steps", 1, "--out", tmp_path / "run")
    root, final = tmp_path / "images", tmp_path / "run" / "final"
    shutil.copytree(place / "images", root)
    ask = ("--model-path", final, "--data", place / "held_out.jsonl", "--image-root", root)
    ask = (*ask, "--max-new-tokens", 4, "--out", tmp_path / "a.jsonl")
    assert door("generate", *ask)[0] == 0
    answers = (tmp_path / "a.jsonl").read_bytes()

    def resumed():
        code, said = door("generate", *ask, "--resume")
        assert (tmp_path / "a.jsonl").read_bytes() == answers
        return code, said

    code, said = resumed()
    assert code == 0 and "11 records, 11 of them from before" in said
    pictures = root / "held_out" / "00000.png", root / "held_out" / "00001.png"
    swap(*pictures)
    assert resumed()[0] == 2
    swap(*pictures)
    assert resumed()[0] == 0
    projector = final / "projectors" / "image.safetensors"
    save_file({name: 2 * x for name, x in load_file(projector).items()}, projector)
    code, said = resumed()
    assert code == 2 and "made of other data, another model or other settings" in said


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("--image-encoder", "none"), "no encoder: give --image-encoder"),
        (("--image-encoder", "resnet"), "give one of builtin, clip"),
        (("--image-embeddings", 9), "16, not 9: leave --image-embeddings"),
        (("--audio-embeddings", 9), "--audio-embeddings 9 has no effect without --audio-encoder"),
        (("--audio-token", "<s>"), "--audio-token <s> has no effect without --audio-encoder"),
        (("--projector-width", 8), "--projector-width 8 has no effect without a c_abstractor"),
        (
            ("--image-projector", "c_abs", "--image-embeddings", 25),
            "cannot make 25 tokens of the encoder's 16",
        ),
        (("--image-features", "FILE"), "not a cache"),
        (("--image-root", "NONE"), "no such folder"),
        (("--audio-encoder", "builtin"), "--audio-encoder builtin reads image"),
        (("--freeze-language-model", "--adapter", "lora"), "--freeze-language-model"),
        (("--image-projector-path", "FILE"), "weight a is"),
        (("--projector-lr", 0), "--projector-lr 0"),
    ],
)
def test_what_cannot_work_is_refused(door, flags, tmp_path, change, word):
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "f.safetensors")
    change = [
        {"FILE": tmp_path / "f.safetensors", "NONE": tmp_path / "none"}.get(value, value)
        for value in change
    ]
    code, text = door("multimodal", *flags, *change, "--out", tmp_path / "run")
    assert code == 2 and word in text and not (tmp_path / "run").exists()


def test_llava_layout_gives_equal_logits(forked, door, flags, place, tmp_path):
    from PIL import Image
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    clip = ("--image-encoder", "clip", "--image-encoder-path", place / "clip")
    forked("multimodal", *flags, *clip, "--steps", 3, "--out", tmp_path / "run")
    said = forked(
        "to_llava", "--model-path", tmp_path / "run" / "final", "--out", tmp_path / "llava"
    )
    assert "logits agree" in said
    towers = [
        key
        for key in load_file(tmp_path / "llava" / "model.safetensors")
        if key.startswith("vision_tower.")
    ]
    assert towers and all(key.startswith("vision_tower.vision_model.") for key in towers), (
        "the names that vLLM reads"
    )
    model, tokenizer = (
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval(),
        AutoTokenizer.from_pretrained(tmp_path / "llava"),
    )
    image = model.config.image_token_index
    ids = [[1, *[image] * model.config.image_seq_length, 2, 3]]
    what = {"folder": str(tmp_path / "llava"), "kind": "llava", "base": None, "ids": ids}
    here, *others = (asked(p, **what, texts=["hi"]) for p in dict.fromkeys([None, OTHER]))
    for other in others:
        assert other["ids"] == here["ids"] and other["chat"] == here["chat"]
        assert np.allclose(other["logits"], here["logits"], atol=1e-4), other["version"]
    forked("generate", "--model-path", tmp_path / "run" / "final", "--data", place / "held_out.jsonl", "--image-root", place / "images",
           "--max-new-tokens", 6, "--out", tmp_path / "a.jsonl", "--with-prompt", "--no-skip-special-tokens")  # fmt: skip
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "llava")
    media = reopen_media(
        tmp_path / "run" / "final",
        MediaFiles(image_root=str(place / "images")),
        (str(place / "held_out.jsonl"),),
        "cpu",
    )
    config = ModelConfig(model_path=str(tmp_path / "run" / "final"))
    chat, settings = ChatConfig(), TokenizerConfig()
    known = load_chat_tokenizer(config, settings, chat, placeholders=media.placeholders)
    ours = media_model_for_inference(media, known, load_for_inference(config))
    ours.inner.set_attn_implementation("sdpa")
    for row in lines(tmp_path / "a.jsonl")[:4]:
        name = row["messages"][0]["content"]
        pixels = processor(Image.open(place / "images" / name), return_tensors="pt")["pixel_values"]
        ids = torch.tensor([tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]])
        out = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=6, do_sample=False)
        assert (
            tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            == row["answers"][0]["content"]
        )
        chats = [row["messages"]]
        (embeds,) = embed_media_prompts(media, known, ours, chats, ids.tolist())
        with torch.no_grad():
            gap = (
                ours.inner(inputs_embeds=embeds[None]).logits
                - model(input_ids=ids, pixel_values=pixels).logits
            )
        assert gap.abs().max() < 1e-4
    code, text = door("to_llava", "--model-path", tmp_path / "llava", "--out", tmp_path / "x")
    assert code == 2 and "no media.json" in text


def test_siglip_takes_the_llava_layout_too(forked, flags, place, tmp_path):
    from transformers import AutoImageProcessor, LlavaForConditionalGeneration

    save_siglip(place / "siglip", whole=True)
    # as a whole processor is saved; its type is that of the model beside it
    given = json.loads((place / "siglip" / "preprocessor_config.json").read_text())
    del given["image_processor_type"]
    (place / "siglip" / "processor_config.json").write_text(json.dumps({"image_processor": given}))
    (place / "siglip" / "preprocessor_config.json").unlink()
    siglip = ("--image-encoder", "siglip", "--image-encoder-path", place / "siglip")
    forked("multimodal", *flags, *siglip, "--steps", 1, "--out", tmp_path / "run")
    said = forked(
        "to_llava", "--model-path", tmp_path / "run" / "final", "--out", tmp_path / "llava"
    )
    gap = float(re.search(r"logits agree to (\S+)\)", said).group(1))
    assert (
        gap < 1e-4
        and LlavaForConditionalGeneration.from_pretrained(
            tmp_path / "llava"
        ).config.vision_config.model_type
        == "siglip_vision_model"
    )
    processor = AutoImageProcessor.from_pretrained(tmp_path / "llava", backend="pil")
    assert (processor.size.height, processor.size.width) == (28, 28)
    assert type(processor).__name__ == "SiglipImageProcessorPil"


def test_the_inspector_shows_placeholders(forked, place):
    flags = (
        "--data",
        place / "held_out.jsonl",
        "--image-root",
        place / "images",
        "--image-encoder",
        "builtin",
    )
    said = forked("inspect_data", "--kind", "media", *flags, "--examples", 1)
    assert "11 of 11 from" in said and said.count("[<img>, 16 tokens]") == said.count("<MS>") > 0
