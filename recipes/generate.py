"""Answer every chat of a dataset with a base or a trained model: one JSON line a record.

    python recipes/generate.py --model-path runs/sft/final --data chats.jsonl --out answers.jsonl
    python recipes/generate.py --model-path runs/sft/final --data chats.jsonl --out answers.jsonl \\
        --settings greedy "warm:temperature=0.8,num_answers=4"    # a file for each
    torchrun --nproc-per-node 8 recipes/generate.py ...     # each takes every 8th record
    python recipes/generate.py --engine vllm --tensor-parallel-size 2 ...

Lines stand in input order; a run that was stopped goes on with --resume.

A line of data: {"id": 1, "messages": [{"role": "user", "content": "2 + 2?"}]}
An answer at its end is taken off and kept as "reference". A line of the output has the record's
fields and {"answers": [{"id": "0", "content": "4", "finish": "stop"}], "key": "..."}.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import ta
from ta import Range
from ta.chat.encode import PROMPT, refuse_idle
from ta.files import hash_json

OF_OLD_ANSWERS = ("rewards",)  # fields of a record that are untrue of new answers
AT_ONCE = 256  # prompts of pictures or sounds whose embeddings are held at one time


@dataclass(frozen=True)
class Config:
    model: ta.ModelConfig = ta.ModelConfig()
    tokenizer: ta.TokenizerConfig = ta.TokenizerConfig()
    chat: ta.ChatConfig = ta.ChatConfig()
    generation: ta.GenerateConfig = ta.GenerateConfig()
    vllm: ta.VllmConfig = ta.VllmConfig()
    vllm_model: ta.VllmModelConfig = ta.VllmModelConfig()
    media: ta.media.MediaFiles = ta.media.MediaFiles()
    retrieval: ta.rag.RetrievalConfig = ta.rag.RetrievalConfig()
    data: tuple[str, ...] = ()
    """Sources of chats: file.jsonl, file.jsonl@0.1 (share), file.jsonl@500 (count); none:
    built-in held-out chats."""
    out: str = "answers.jsonl"
    """File to write."""
    settings: tuple[str, ...] = ()
    """Several settings in one run, each name:key=value,... over the flags here; each writes its own
    file, OUT with the name in it."""
    engine: Literal["hf", "vllm"] = "hf"
    """Our engine over transformers' models, or vLLM."""
    random_cut: bool = False
    """End each prompt before a random answer (seeded) instead of after the last question."""
    logprobs: Literal["none", "sum", "tokens"] = "none"
    """Log-probabilities to keep: none, of the whole answer, or of each token too (nats)."""
    with_prompt: bool = False
    """Keep the prompt as the model saw it, decoded, as "prompt"."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Stop at a record that cannot be read or answered, or count and leave it out."""
    max_bad_share: Annotated[float, Range(0, 1)] = 0.01
    """With skip: more bad records than this share are an error again."""
    resume: bool = False
    """Go on where a stopped run left off: answers that are there are kept. Log-probabilities of the
    others can differ in their last digits from those of a run that was not stopped."""
    overwrite: bool = False
    """Replace an output that exists."""


def output_path(config: Config, name: str) -> Path:
    """OUT, with the name of the settings before its ending."""
    out = Path(config.out)
    return out.with_suffix((name and f".{name}") + out.suffix)


def read_data(config: Config, tokenizer, media, device: str) -> list[tuple[dict, list[int]]]:
    """(record, token ids of its prompt) of every chat, with passages in the prompt where asked."""
    builtin = "pictures" if media else "questions" if config.retrieval.index else "chats"
    files = ta.given_or_held_out(config.data, builtin, config.model.hub)
    drops = ta.Drops(config.on_bad_record, config.max_bad_share)
    prompts = ta.read_prompts(
        files,
        tokenizer,
        config.chat,
        drops,
        config.generation.seed,
        config.random_cut,
        encode=ta.media.encode_media_prompts if media else ta.encode_prompts,
    )
    for form, n in sum(drops.formats.values(), Counter()).items():
        ta.parallel.tell(f"read as {form.name}: {n:,} {form.unit}")
    if drops.counts:
        ta.parallel.tell(f"left out: {drops.table()}")
    if config.retrieval.index and any(map(has_media, prompts)):
        raise ValueError(
            "--index with a model of pictures or sounds: passages are found for text alone; "
            "leave it out"
        )
    by = (tokenizer, config.chat, device, config.model.hub)
    return ta.rag.retrieve_for_prompts(config.retrieval, prompts, *by)


def has_media(prompt: tuple[dict, list[int]]) -> bool:
    """Whether pictures or sounds stand in the messages of a record."""
    return any(
        isinstance(message["content"], list) or message.get("type", "text") != "text"
        for message in prompt[0]["messages"]
    )


def load_engine(config: Config, tokenizer, media, device: str):
    """The model that answers: ours over transformers', or a started vLLM."""
    if config.engine == "hf":
        return ta.load_for_inference(config.model, device)
    asked = (config.model, tokenizer.fast, config.vllm, config.vllm_model)
    return ta.start_vllm(*asked, seed=config.generation.seed, embeds=media is not None)


def load_projectors(config: Config, tokenizer, media, model):
    """What embeds prompts with pictures and sounds, around our model or its embedding table."""
    if media is None:
        return None
    if config.engine == "vllm":
        model = ta.media.EmbeddingTable(ta.load_for_inference(config.model))  # vLLM holds the rest
    return ta.media.media_model_for_inference(media, tokenizer, model)


def keys_of(config: Config, settings: ta.GenerateConfig, prompts, tokenizer, media) -> list[str]:
    """For each prompt a hash of all that its answers depend on."""
    made_by = [
        ta.model_key(config.model, tokenizer, config.chat),
        config.engine,
        config.logprobs,
        config.with_prompt,
        dataclasses.asdict(settings) | {"slots": 0},  # their number changes no answer
    ]
    files = [[]] * len(prompts)
    if media:
        made_by.append(ta.media.media_content(media))
        chats = [record["messages"] for record, _ in prompts]
        files = ta.media.prompts_media(media, tokenizer, chats, [ids for _, ids in prompts])
    return [
        hash_json([made_by, i, *prompt, content])[:16]
        for i, (prompt, content) in enumerate(zip(prompts, files, strict=True))
    ]


def answer(config: Config, model, tokenizer, prompts, settings, places, keys, out, embeds=None):
    """Answer the prompts at `places`; a record is written as soon as it has its answers."""

    def finished(n: int, answers: list) -> None:
        i = places[n]
        record, ids = prompts[i]
        made = {key: value for key, value in record.items() if key not in OF_OLD_ANSWERS}
        if config.with_prompt:
            special = settings.skip_special_tokens
            made["prompt"] = tokenizer.fast.decode(ids, skip_special_tokens=special)
        made |= {"answers": ta.answers_to_json(answers, config.logprobs), "key": keys[i]}
        out.append(made, tokens=sum(len(a.ids) for a in answers))

    ta.generate(
        model,
        tokenizer.fast,
        [prompts[i][1] for i in places],
        settings,
        tokenizer.stop_ids,
        on_answer=finished,
        embeds=embeds,
        keys=places,  # a record's answers do not depend on the records beside it
    )


def main(config: Config) -> None:
    refuse_idle(config.chat, PROMPT.idle, "answers are generated and none is learned")
    config = ta.prefer_trained_builtin(config)
    # each process works on its own share and waits for no other
    device = ta.parallel.pick_device()
    named = ta.named_settings("--settings", config.settings, config.generation)
    ta.check_engine(config.engine, config.vllm, config.vllm_model, settings=named.values())
    outs = [
        (name, settings, ta.AnswersFile(output_path(config, name), config.resume, config.overwrite))
        for name, settings in named.items()
    ]
    sources = ta.resolve(config.model)
    media = ta.media.reopen_media(
        sources.media or sources.base, config.media, config.data, device, hub=config.model.hub
    )
    tokenizer = ta.load_chat_tokenizer(
        config.model, config.tokenizer, config.chat, media.placeholders if media else {}
    )
    prompts = read_data(config, tokenizer, media, device)
    model = load_engine(config, tokenizer, media, device)
    projectors = load_projectors(config, tokenizer, media, model)
    ta.check_prompts([ids for _, ids in prompts], *ta.limits_of(model))

    at_once = AT_ONCE if media else len(prompts)
    for name, settings, out in outs:
        settings = ta.with_stop_strings(settings, tokenizer.stop_strings)
        keys = keys_of(config, settings, prompts, tokenizer, media)
        done = out.done(keys)
        todo = out.share(keys, done)
        with out.writing(len(todo), name or "generate"):
            for start in range(0, len(todo), at_once):
                places, embeds = todo[start : start + at_once], None
                if media:
                    chats = [prompts[i][0]["messages"] for i in places]
                    ids = [prompts[i][1] for i in places]
                    known = media, tokenizer, projectors
                    embeds = list(ta.media.embed_media_prompts(*known, chats, ids))
                answer(config, model, tokenizer, prompts, settings, places, keys, out, embeds)
        out.publish(keys, done)


if __name__ == "__main__":
    ta.cli(main, Config)
