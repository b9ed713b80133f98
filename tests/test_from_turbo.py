"""Settings files of turbo-alignment become commands that the recipes take, and every field is used or named."""

import json
import subprocess
import sys

import judged
import pytest
import tyro

from ta import __main__ as command
from ta.flags import translate_flags
from ta.from_turbo import METHODS, TRAINER, from_turbo, script

TEMPLATE = {
    "prompt_template": {
        "role_tag_mapping": {"bot": "<bot>", "user": "<user>", "system": "<system>"},
        "prefix_template": "<RS>{role}\n",
        "suffix_template": "</RS>",
    },
    "max_tokens_count": 150,
}
NEW_TOKENS = {"<RS>": "<s>", "</RS>": "</s>", "<bot>": "the best bot ever"}
LORA = {
    "name": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "v_proj"],
}


def dataset(kind, file, nested=False, **more):
    chat = {"chat_settings": TEMPLATE} if nested else TEMPLATE
    source = {"name": "own", "records_path": file, "sample_rate": 1.0}
    return {"sources": [source], "dataset_type": kind, **chat, **more}


def training(kind, nested=False, **more):
    model = {"model_path": "base", "model_type": "causal", "transformers_settings": {}}
    settings = {
        "train_dataset_settings": dataset(kind, "train.jsonl", nested),
        "val_dataset_settings": dataset(kind, "val.jsonl", nested),
        "model_settings": model,
        "tokenizer_settings": {},
        "special_tokens_settings": {"bos_token": "<s>", "eos_token": "</s>"},
        "trainer_settings": {
            "evaluation_strategy": "steps",
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 16,
            "eval_steps": 32,
            "save_steps": 64,
            "logging_steps": 1,
            "learning_rate": 0.0003,
            "num_train_epochs": 2,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
            "bf16": True,
            "fp16": False,
            "optim": "adamw_torch",
            "adam_epsilon": 1e-6,
            "max_grad_norm": 2.0,
            "save_total_limit": 3,
            "gradient_checkpointing": True,
        },
        "wandb_settings": {"project_name": "alignment", "run_name": "one", "entity": "us"},
        "seed": 3,
        "log_path": "out",
    }
    for path, value in more.items():
        group, names = settings, path.split("__")
        for name in names[:-1]:
            group = group.setdefault(name, {})
        group[names[-1]] = value
    return settings


def parsed(words):
    """The config that a recipe makes of a command's flags."""
    recipe, *flags = words
    config_class = judged.recipe(recipe).Config
    flat = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(config_class, args=translate_flags(flags, config_class), config=flat)


def only(settings):
    made = from_turbo(settings)
    assert len(made.commands) == 1
    return made.commands[0][0], parsed(made.commands[0]), made.notes


def test_fine_tuning_with_an_adapter_and_new_tokens():
    settings = training(
        "chat",
        model_settings__peft_settings=LORA,
        model_settings__embeddings_initialization_strategy=NEW_TOKENS,
        model_settings__model_kwargs={"attn_implementation": "sdpa"},
    )
    settings["train_dataset_settings"] |= {"only_answer_loss": True, "keep_end": True}
    settings["train_dataset_settings"]["sources"] = [
        {
            "name": "a",
            "records_path": "a.jsonl",
            "num_samples": 360,
            "system_prompt": "Be kind, now",
        },
        {"name": "b", "records_path": "b.jsonl", "sample_rate": 0.25, "offset": 5, "n_rows": 10},
    ]
    recipe, config, notes = only(settings)
    assert recipe == "sft"
    assert config.data.data == (
        "a.jsonl@360,system=Be kind, now",
        "b.jsonl@0.25,offset=5,rows=10",
    )
    assert config.data.val_data == ("val.jsonl",)
    assert config.chat.prefix_template == "<RS>{role}\\n" and config.chat.suffix_template == "</RS>"
    assert set(config.chat.role_tags) == {"assistant=<bot>", "user=<user>", "system=<system>"}
    assert (
        config.chat.max_tokens == 150 and config.chat.loss_on == "answers" and config.chat.keep_end
    )
    assert (config.adapter.adapter, config.adapter.lora_rank) == ("lora", 8)
    assert config.adapter.lora_targets == ("q_proj", "v_proj")
    assert config.tokenizer.init_tokens == tuple(f"{t}={text}" for t, text in NEW_TOKENS.items())
    assert config.model.model_path == "base" and config.model.dtype == "bfloat16"
    assert config.model.model_args == ("attn_implementation=sdpa",)
    assert config.batches.batch_size == 32 and config.batches.epochs == 2
    assert (config.optim.lr, config.optim.warmup, config.optim.clip) == (0.0003, 0.1, 2.0)
    assert (config.loop.eval_every, config.loop.save_every, config.loop.out) == (32, 64, "out")
    assert config.compute.activation_checkpointing and config.batches.seed == 3
    assert config.loop.log == ("wandb",) and config.samples.sample_records == 0
    said = "\n".join(notes)
    assert "adam_epsilon = 1e-06" in said and "project_name" in said and "optim " not in said


def test_what_a_field_left_out_meant_is_carried_over():
    settings = training("chat", model_settings__peft_settings={"name": "LORA"})
    settings["trainer_settings"] = {}
    config = only(settings)[1]
    assert (config.optim.lr, config.optim.warmup, config.optim.beta2) == (3e-4, 0, 0.999)
    assert (config.batches.batch_size, config.batches.epochs) == (128, 3)
    assert (config.loop.eval_every, config.loop.save_every, config.loop.keep) == (150, 150, 1)
    assert (config.loop.keep_best, config.loop.patience) == ("loss", 0)
    adapter = config.adapter
    assert (adapter.lora_rank, adapter.lora_alpha, adapter.lora_dropout) == (16, 16, 0.05)
    assert adapter.lora_targets == ("q_proj", "v_proj") and config.model.dtype == "bfloat16"
    settings["trainer_settings"] = {"load_best_model_at_end": False, "max_steps": 7, "bf16": True}
    config = only(settings)[1]
    assert config.loop.keep_best == "" and (config.batches.steps, config.batches.epochs) == (7, 1)


def test_cherry_picks_and_early_stopping():
    """The records picked, all of them, answered by the settings given; the best weights are exported."""
    picked = {
        "dataset_settings": dataset("chat", "picked.jsonl", random_cut=True),
        "generator_transformers_settings": {
            "num_beams": 3,
            "do_sample": False,
            "stop_strings": "E",
        },
        "custom_generation_settings": {"skip_special_tokens": False},
        "metric_settings": [{"type": "length"}, {"type": "rouge"}, {"type": "kl"}],
    }
    settings = training(
        "chat", cherry_pick_settings=picked, early_stopping_settings={"patience": 4}
    )
    _, config, notes = only(settings)
    samples = config.samples
    assert samples.samples_data == ("picked.jsonl",) and samples.sample_random_cut
    (answers,) = samples.settings(()).values()
    assert (answers.beams, answers.max_new_tokens, answers.temperature) == (3, 15, 0)
    assert answers.stop_strings == ("E",) and not answers.skip_special_tokens
    assert samples.sample_metrics == ("length", "rouge_1", "rouge_l")
    assert samples.sample_records >= 10**6 and any("kl is not measured" in note for note in notes)
    assert (config.loop.keep_best, config.loop.patience) == ("loss", 4)
    picked["dataset_settings"]["sources"][0] = {"records_path": "p.jsonl", "num_samples": 5}
    picked["generator_transformers_settings"] = {}
    settings["early_stopping_settings"]["threshold"] = 0.1
    _, config, notes = only(settings)
    assert config.samples.samples_data == ("p.jsonl@5",) and config.samples.sample_records == 5
    (answers,) = config.samples.settings(()).values()
    assert (answers.temperature, answers.top_k, answers.stop_strings) == (1, 50, ("</s>",))
    assert any(note.startswith("early_stopping_settings.threshold = 0.1: ") for note in notes)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"only_last_replica_loss": True}, "last"),
        ({"only_answer_loss": False}, "all"),
        ({"only_answer_loss": True}, "answers"),
    ],
)
def test_what_is_learned(flags, expected):
    settings = training("chat")
    settings["train_dataset_settings"] |= flags
    assert only(settings)[1].chat.loss_on == expected
    pairs = training("pair_preferences")
    pairs["train_dataset_settings"] |= flags
    _, config, notes = only(pairs)
    assert config.chat.loss_on == "answers"
    named = [note for note in notes if "--loss-on" in note]
    assert len(named) == (expected != "answers"), "it would be refused"


def test_every_method_of_training():
    pairs = training(
        "pair_preferences",
        nested=True,
        trainer_settings__loss_settings={"loss_type": "ipo", "beta": 0.01},
        trainer_settings__sync_ref_settings={
            "sync_ref_model": True,
            "alpha": 0.9,
            "sync_ref_steps": 7,
        },
    )
    recipe, config, _ = only(pairs)
    assert (recipe, config.loss, config.beta) == ("dpo", "ipo", 0.01)
    assert (config.reference.reference, config.reference.sync_every) == ("synced", 7)
    rewards = training("pair_preferences", model_settings__model_type="seq_cls")
    assert only(rewards)[0] == "rm"
    kto = training("kto", trainer_settings__desirable_weight=1.33)
    recipe, config, _ = only(kto)
    assert (recipe, config.desirable_weight) == ("kto", 1.33)
    classes = training(
        "classification",
        nested=True,
        model_settings__model_kwargs={"num_labels": 3, "return_dict": True},
        trainer_settings__loss_settings={"alpha": "auto", "gamma": 1.0},
    )
    recipe, config, _ = only(classes)
    assert (recipe, config.num_labels, config.class_weights, config.gamma) == (
        "classify",
        3,
        ("auto",),
        1.0,
    )


@pytest.mark.parametrize("loss", judged.recipe("dpo").FLAGS)
def test_every_loss_has_the_settings_it_had(loss):
    """The loss takes the flags, and what was left out there is 0.1 where our usual value is another."""
    named = {"loss_type": "kto" if loss == "kto_pair" else loss, "beta": 0.1}
    for own in (named, {"loss_type": named["loss_type"]}):
        pairs = training("pair_preferences", trainer_settings__loss_settings=own)
        config = only(pairs)[1]
        settings = judged.recipe("dpo").loss_settings(config)
        assert config.loss == loss and settings.pop("beta", 0.1) == 0.1
        more = {"slic_hf": {"delta": 1, "alpha": 0.1}, "cpo": {"alpha": 1}}
        more |= {"simpo": {"gamma": 0.1}, "dpop": {"penalty": 0.1}}
        assert settings == more.get(loss, settings)


def test_pictures():
    media = {
        "modality_token_mapping": {"image": "<img>", "audio": "<audio>"},
        "modality_reader_settings_mapping": {"image": {"reader_type": "clip"}, "audio": None},
        "n_modality_embeddings": 225,
        "start_modality_token": "<MS>",
        "end_modality_token": "</MS>",
    }
    settings = training("multimodal")
    settings["train_dataset_settings"] |= media
    settings["val_dataset_settings"] |= media
    settings["modality_encoder_settings_mapping"] = {
        "image": {"modality_encoder_type": "clip", "encoder_path": "clip", "is_pickle": True},
        "audio": None,
    }
    settings["modality_projector_mapping"] = {"image": "c_abs", "audio": None}
    settings["modality_projector_initialization_mapping"] = {"image": "p/c_abs.pt", "audio": None}
    recipe, config, notes = only(settings)
    assert recipe == "multimodal" and config.media.image_encoder == "clip"
    assert config.media.image_projector == "c_abstractor"
    assert config.media.image_projector_path == "p/c_abs.safetensors"
    assert config.media.image_embeddings == 225 and config.media.media_tokens == ("<MS>", "</MS>")
    assert any("preprocess_images" in note for note in notes)
    assert any("ta convert" in note for note in notes)


def test_retrieval_builds_its_index_first():
    settings = training("chat")
    generator = settings["model_settings"]
    settings["model_settings"] = {
        "generator_settings": generator,
        "question_encoder_settings": {"model_path": "encoder", "model_type": "encoder"},
        "index_settings": {"index_path": "docs.faiss", "passages_path": "docs"},
        "retrieval_settings": {
            "n_docs": 3,
            "max_doc_length": 1500,
            "query_encoder_max_length": 512,
        },
    }
    made = from_turbo(settings)
    build, train = made.commands
    assert build[0] == "build_index" and parsed(build).encoder.encoder_path == "encoder"
    config = parsed(train)
    assert train[0] == "rag" and config.retrieval.num_passages == 3
    assert any("docs: write its passages" in note for note in made.notes)


def inference(**more):
    model = {"model_path": "base", "model_type": "causal", "adapter_path": "adapter"}
    one = {"model_settings": model, "tokenizer_settings": {"use_fast": False}, **more}
    return {
        "inference_settings": [one],
        "dataset_settings": dataset("chat", "data.jsonl"),
        "save_path": "answers",
    }


def test_answers_keep_the_defaults_they_had():
    settings = inference(
        use_vllm=True,
        generation_settings=[
            {"transformers_settings": {"num_beams": 3, "max_new_tokens": 500, "do_sample": False}},
            {"custom_settings": {"generation_eos_token": "</RS>", "skip_special_tokens": False}},
            {
                "transformers_settings": {
                    "temperature": 0.6,
                    "top_p": 0.1,
                    "stop_strings": ["a", "b"],
                }
            },
        ],
    )
    made = from_turbo(settings)
    beams, default, sampled = (parsed(words) for words in made.commands)
    assert beams.generation.beams == 3 and beams.generation.max_new_tokens == 500
    assert beams.engine == "vllm" and beams.model.adapter_path == "adapter"
    assert default.generation.temperature == 1 and default.generation.top_k == 50
    assert default.generation.max_new_tokens == 15 and default.generation.stop_strings == ("</RS>",)
    assert not default.generation.skip_special_tokens
    assert sampled.generation.temperature == 0.6 and sampled.generation.top_p == 0.1
    assert sampled.generation.stop_strings == ("a", "b")
    assert len({config.out for config in (beams, default, sampled)}) == 3
    assert (
        any("tokenizer.json" in note for note in made.notes) is False
    )  # use_fast false costs nothing


def test_classes_samples_features_and_merging():
    classes = inference()
    classes["dataset_settings"] = dataset("classification", "data.jsonl", nested=True)
    made = from_turbo(classes)
    assert made.commands[0][0] == "score" and parsed(made.commands[0]).kind == "class"
    chosen = {
        "dataset_settings": {
            "sources": [{"name": "a", "records_path": "a.jsonl", "sample_rate": 1}],
            "chat_dataset": TEMPLATE,
            "dataset_type": "sampling",
        },
        "rm": {"model_path": "rm", "model_type": "seq_cls", "model_kwargs": {"num_labels": 1}},
        "tokenizer_settings": {"tokenizer_path": "rm"},
        "N": 3,
        "beta": 0.01,
        "save_path": "chosen.jsonl",
    }
    score, sample = from_turbo(chosen).commands
    assert (score[0], sample[0]) == ("score", "sample")
    assert parsed(score).model.model_path == "rm"
    config = parsed(sample)
    assert (config.method, config.n, config.beta) == ("rejection", 3, 0.01)
    del chosen["rm"], chosen["beta"]
    assert parsed(from_turbo(chosen).commands[0]).method == "random"
    features = {
        "reader": "clip",
        "encoder_settings": {"modality_encoder_type": "clip", "encoder_path": "clip"},
        "modality": "image",
        "dataset_path": "images",
        "batch_size": 128,
        "output_file_path": "/output",
    }
    recipe, config, notes = only(features)
    assert (recipe, config.root, config.out) == (
        "preprocess_images",
        "images",
        "/output.safetensors",
    )
    assert notes == []
    merge = {
        "model_settings": {"model_path": "base", "model_type": "causal"},
        "adapter_path": "adapter",
        "save_path": "merged",
    }
    recipe, config, notes = only(merge)
    assert (recipe, config.model.adapter_path, config.out) == ("merge", "adapter", "merged")


def test_a_field_that_nobody_reads_is_named():
    settings = training("chat", trainer_settings__neftune_noise_alpha=5, strange__thing=[1, 2])
    notes = from_turbo(settings).notes
    assert "trainer_settings.neftune_noise_alpha = 5: there is no counterpart" in notes
    assert "strange.thing = [1, 2]: there is no counterpart" in notes


FIELDS = TRAINER | METHODS["kto"]


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_the_trainer_is_used(name):
    settings = training("kto", **{f"trainer_settings__{name}": 1})
    made = from_turbo(settings)
    assert FIELDS[name] in made.commands[0] and not any(name in note for note in made.notes)


def test_of_two_fields_for_one_flag_the_one_in_use_counts():
    settings = training("chat", trainer_settings__warmup_steps=0, trainer_settings__max_steps=-1)
    made = from_turbo(settings)
    assert made.commands[0].count("--warmup") == 1 and parsed(made.commands[0]).optim.warmup == 0.1
    assert not any("max_steps" in note for note in made.notes)
    both = {"vllm_settings": {"top_k": 7}, "transformers_settings": {"top_k": 9}}
    for vllm, top_k in ((True, 7), (False, 9)):
        made = from_turbo(inference(use_vllm=vllm, generation_settings=[both]))
        assert parsed(made.commands[0]).generation.top_k == top_k


def test_defaults_and_names_of_every_version():
    sync = {"sync_ref_model": True, "sync_steps": 7}
    pairs = training(
        "pair_preferences",
        trainer_settings__sync_ref_settings=sync,
        logging_settings={"run_name": "one"},
    )
    del pairs["wandb_settings"]
    _, config, _ = only(pairs)
    assert (config.reference.sync_every, config.loop.log) == (7, ("wandb",))
    assert only(training("kto"))[1].desirable_weight == 1.33
    engine = {"tensor_parallel_size": 2}
    made = from_turbo(inference(vllm_engine_settings=engine, generation_settings=[{}]))
    assert parsed(made.commands[0]).vllm_model.tensor_parallel_size == 2


def test_a_field_that_only_another_command_has_is_named():
    answers = inference(generation_settings=[{}])
    model = answers["inference_settings"][0]["model_settings"]
    model["transformers_settings"] = {"load_in_8bit": True}
    tuning = training("chat", trainer_settings__beta=0.1)
    for settings, flag, field in ((answers, "--quantize", "8bit"), (tuning, "--beta", "beta")):
        made = from_turbo(settings)
        assert flag not in made.commands[0] and parsed(made.commands[0])
        assert any(f"{field} = " in note for note in made.notes)


def test_records_of_two_sources_of_one_name_are_two_files():
    settings = training("chat")
    for name, own in (("train", "a"), ("val", "b")):
        source = {"name": "own", "records_data": [{"id": own}]}
        settings[f"{name}_dataset_settings"]["sources"] = [source]
    made = from_turbo(settings)
    config = parsed(made.commands[0])
    files = [*config.data.data, *config.data.val_data]
    assert [made.files[file] for file in files] == [[{"id": "a"}], [{"id": "b"}]]


def test_a_script_runs_nothing_that_stands_in_a_settings_file(tmp_path):
    """Not as a value that looks like a flag, and not behind a note."""
    bad = f"--x; touch {tmp_path / 'ran'}"
    settings = training("chat", **{"model_settings__model_path": bad, f"a\n{bad[5:]}": 1})
    settings["wandb_settings"]["tags"] = [bad]
    text = script(from_turbo(settings))
    subprocess.run(["sh", "-c", f"ta() {{ :; }}\n{text}"], check=True)
    assert "touch" in text and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"a": 1}, "no settings of turbo-alignment"),
        (training("ddpo"), "'ddpo' cannot be trained"),
        (training("chat", model_settings__peft_settings={"name": "IA3"}), "IA3"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        from_turbo(settings)


def test_the_command_writes_records_and_prints_a_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = training("chat")
    records = [{"messages": [{"role": "user", "content": "é"}, {"role": "bot", "content": "b"}]}]
    settings["train_dataset_settings"]["sources"] = [
        {"name": "inline", "records_data": records, "sample_rate": 1}
    ]
    (tmp_path / "s.json").write_text(json.dumps(settings))
    for code in (0, 2):  # the second time the records would replace a file
        monkeypatch.setattr(sys, "argv", ["ta", "from-turbo", "s.json"])
        with pytest.raises(SystemExit, match=str(code)):
            command.main()
    shown = capsys.readouterr().out
    assert shown.startswith("# ") and "ta sft \\\n    --data inline.jsonl \\\n" in shown
    assert shown.strip() == script(from_turbo(settings))
    assert [
        json.loads(line) for line in (tmp_path / "inline.jsonl").read_text().splitlines()
    ] == records
