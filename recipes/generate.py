"""Answer every chat of a dataset with a base or a trained model: one JSON line a record, in input order, resumable, on one process or many.

    python recipes/generate.py --model-path runs/sft/final --data chats.jsonl --out answers.jsonl
    python recipes/generate.py --model-path runs/sft/final --data chats.jsonl --out answers.jsonl \\
        --settings greedy "warm:temperature=0.8,num_answers=4"        (answers.greedy.jsonl, answers.warm.jsonl)
    torchrun --nproc-per-node 8 recipes/generate.py ...                (each process takes every 8th record)
    python recipes/generate.py --engine vllm --tensor-parallel-size 2 ...

A line of data: {"id": 1, "messages": [{"role": "user", "content": "2 + 2?"}]}; an answer at its end is taken off and kept as "reference".
A line of the output has the record's fields and {"answers": [{"id": "0", "content": "4", "finish": "stop"}], "key": "..."}.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ta import parallel
from ta.builtin import data_files
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.command_line import cli
from ta.data.sources import Drops
from ta.files import hash_json
from ta.folders import ModelConfig, fingerprint, resolve
from ta.generation import answers_file
from ta.generation.answers_file import progress
from ta.generation.prompts import read_prompts
from ta.generation.settings import (
    GenerateConfig,
    check_prompts,
    check_settings,
    parse_settings,
    to_json,
)
from ta.generation.vllm_engine import VllmConfig
from ta.media.settings import MediaFiles, reopen_media
from ta.model.inference import open_generator, vllm_settings
from ta.rag.passages import RetrievalConfig
from ta.rag.retrieval import retrieve_for_prompts


@dataclass(frozen=True)
class Generate:
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    chat: ChatConfig = ChatConfig()
    generation: GenerateConfig = GenerateConfig()
    vllm: VllmConfig = VllmConfig()
    media: MediaFiles = MediaFiles()
    retrieval: RetrievalConfig = RetrievalConfig()
    data: tuple[str, ...] = ()
    """Sources of chats: file.jsonl, file.jsonl@0.1 (share), file.jsonl@500 (count); none: built-in held-out chats."""
    out: str = "answers.jsonl"
    """File to write."""
    settings: tuple[str, ...] = ()
    """Several settings in one run, each name:key=value,... over the flags here; each writes its own file, OUT with the name in it."""
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
    max_bad_share: float = 0.01
    """With skip: more bad records than this share are an error again."""
    resume: bool = False
    """Go on where a stopped run left off: answers that are there are kept."""
    overwrite: bool = False
    """Replace an output that exists."""


def main(config: Generate) -> None:
    # each process works on its own share and waits for no other
    rank, world, device = parallel.rank(), parallel.world(), parallel.pick_device()
    named = [parse_settings(text, config.generation) for text in config.settings] or [
        ("", config.generation)
    ]
    outs = [
        Path(config.out).with_suffix((name and f".{name}") + Path(config.out).suffix)
        for name, _ in named
    ]
    if len(set(outs)) < len(outs):
        raise ValueError(
            "--settings use a name twice and would write one file twice: give each its own name"
        )
    vllm = vllm_settings(config.engine, config.vllm, world)
    for (_, settings), out in zip(named, outs, strict=True):
        check_settings(settings)
        answers_file.check(out, config.resume, config.overwrite, rank, world)
    model, sources = config.model, resolve(config.model)
    media = reopen_media(sources.media or sources.base, config.media, config.data, device)
    tokenizer = load_chat_tokenizer(
        model, config.tokenizer, config.chat, media.placeholders if media else {}
    )
    paths = (
        config.data
        or data_files.data_or_builtin(
            (), (), "pictures" if media else "questions" if config.retrieval.index else "chats"
        )[1]
    )
    drops = Drops(config.on_bad_record, config.max_bad_share)
    records = read_prompts(
        paths, tokenizer, config.chat, drops, config.generation.seed, config.random_cut
    )
    if drops.counts:
        print(f"left out: {drops.table()}", file=sys.stderr)
    records = retrieve_for_prompts(config.retrieval, records, tokenizer, config.chat, device)
    engine, vocabulary, context = open_generator(
        model, tokenizer, device, vllm, config.generation.seed, media
    )
    check_prompts([prompt for _, prompt, _ in records], vocabulary, context)
    who = [
        fingerprint(sources.base, model.hub),
        fingerprint(sources.adapter) if sources.adapter else "",
        model.dtype,
        config.engine,
    ]
    for (name, settings), out in zip(named, outs, strict=True):
        answers_file.begin(out, config.overwrite, rank, world)
        settings = dataclasses.replace(
            settings, stop_strings=(*settings.stop_strings, *tokenizer.stop_strings)
        )
        what = [
            *who,
            config.logprobs,
            config.with_prompt,
            dataclasses.asdict(settings) | {"slots": 0},
        ]  # slots change no answer
        keys = [hash_json([what, i, *record])[:16] for i, record in enumerate(records)]
        there = answers_file.done(out, keys)
        mine = [i for i in range(rank, len(records), world) if keys[i] not in there]
        with (
            answers_file.Part(out, rank) as part,
            progress(name or "generate", len(mine), rank == 0) as advance,
        ):

            def finished(
                n, answers, mine=mine, keys=keys, settings=settings, part=part, advance=advance
            ):
                data, prompt, _ = records[mine[n]]
                text = tokenizer.fast.decode(
                    prompt, skip_special_tokens=settings.skip_special_tokens
                )
                shown = ({"prompt": text} if config.with_prompt else {}) | {
                    "answers": to_json(answers, config.logprobs)
                }
                part.append(data | shown | {"key": keys[mine[n]]})
                advance(answers)

            seen = {"media": [records[i][2] for i in mine]} if media else {}
            engine(
                [records[i][1] for i in mine],
                settings,
                tokenizer.stop_ids,
                on_answer=finished,
                keys=mine,
                **seen,
            )
        if answers_file.publish(out, keys):
            print(
                f"{out}: {len(keys):,} records, {len(there):,} of them from before", file=sys.stderr
            )


if __name__ == "__main__":
    cli(main, Generate)
