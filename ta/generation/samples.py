"""Cherry-picks: generate answers to a few held-out records during training, score them, show them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ta.chat.encode import Drop
from ta.chat.messages import ANSWER, canonical_role, random_cut
from ta.generation.generate import GenerateConfig, generate
from ta.generation.metrics import check_metrics, measure
from ta.media.dialogue import Media, encode_media
from ta.parallel import rank, say
from ta.train import run_folder

if TYPE_CHECKING:
    from torch import Tensor

    from ta.chat.template import ChatConfig
    from ta.chat.tokenizer import ChatTokenizer
    from ta.model.language_model import LanguageModel


Embed = Callable[["LanguageModel", Sequence[Sequence[int]], Sequence[Media]], Iterable["Tensor"]]


@dataclass(frozen=True)
class CherryConfig:
    cherry_records: int = 64
    """Held-out records that are answered and scored at each evaluation; 0 turns cherry-picks off."""
    cherry_show: int = 6
    """Answers shown on the screen at each evaluation; all are kept in samples.jsonl."""
    cherry_max_new_tokens: int = 64
    """Tokens of an answer at most."""
    cherry_metrics: tuple[str, ...] = ("accuracy",)
    """Metrics of ta/generation/metrics.py that take predictions and references, such as accuracy (exact match), rouge_l, meteor, perplexity."""
    cherry_random_cut: bool = False
    """End each prompt before a random answer (seeded) instead of the last one."""


MEASURED = ("predictions", "labels", "answers", "references", "logprobs")


def check_cherries(config: CherryConfig) -> None:
    """ValueError for metrics that do not exist or that answers and references do not suffice for."""
    check_metrics(config.cherry_metrics, MEASURED)


def dialogue_of(record: dict) -> list[dict]:
    """The messages of a record of any kind that ends in the answer wanted: a chat's own, a context with the chosen or the desirable answer."""
    if "messages" in record:
        return record["messages"]
    if "answer_w" in record:
        return [*record["context"], record["answer_w"]]
    return [*record["context"], record["answer"]]


def prompts_of(
    records: Sequence[dict], tokenizer: ChatTokenizer, chat: ChatConfig, cut_seed: int | None = None
) -> list[tuple[int, list[int], str, Media]]:
    """(place in `records`, prompt ids, right answer, pictures and sounds) of every record whose prompt fits; the right answer is the one that
    was taken off.

    A labelled answer that is not desirable has no right answer beside it and is left out.
    """
    places, chats, answers = [], [], []
    for i, record in enumerate(records):
        if record.get("is_desirable") is False:
            continue
        messages = [{**m, "role": canonical_role(m["role"])} for m in dialogue_of(record)]
        if cut_seed is not None and any(m["role"] == ANSWER for m in messages):
            messages = messages[: len(random_cut(messages, random.Random(f"{cut_seed} {i}"))) + 1]
        while len(messages) > 1 and messages[-1]["role"] != ANSWER:
            messages.pop()
        places.append(i)
        chats.append(messages)
        answers.append(messages[-1]["content"] if messages[-1]["role"] == ANSWER else "")
    prompts = encode_media(chats, tokenizer, chat, prompts=True)
    found = zip(places, prompts, answers, strict=True)
    return [
        (i, prompt[0].ids, answer, prompt[1])
        for i, prompt, answer in found
        if not isinstance(prompt, Drop)
    ]


def pick_cherries(
    model: LanguageModel,
    records: Sequence[dict],
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    config: CherryConfig,
    folder: Path,
    step: int,
    seed: int = 0,
    embed: Embed | None = None,
) -> dict[str, float]:
    """Answer `records` greedily, append them to folder/samples.jsonl, show some, and return the chosen metrics.

    `embed(model, prompts, media)` gives the prompts' embeddings (L, D) where records have pictures or sounds.
    """
    chosen = prompts_of(records, tokenizer, chat, seed if config.cherry_random_cut else None)
    if not chosen:
        return {}
    settings = GenerateConfig(
        max_new_tokens=config.cherry_max_new_tokens, stop_strings=tuple(tokenizer.stop_strings)
    )
    prompts, media = [ids for _, ids, _, _ in chosen], [items for *_, items in chosen]
    embeds = list(embed(model, prompts, media)) if embed else None
    answers = [
        a[0]
        for a in generate(
            model, tokenizer.fast, prompts, settings, tokenizer.stop_ids, embeds=embeds
        )
    ]
    texts, references = [a.text for a in answers], [reference for _, _, reference, _ in chosen]
    if rank() == 0:
        rows = []
        for (i, _, reference, items), answer in zip(chosen, answers, strict=True):
            question = next((m["content"] for m in reversed(dialogue_of(records[i])[:-1])), "")
            if items:
                texts_of = (
                    [question]
                    if isinstance(question, str)
                    else [part["content"] for part in question if part["type"] == "text"]
                )
                question = " ".join(dict.fromkeys([*(f"[{path}]" for _, path in items), *texts_of]))
            sample = {
                "step": step,
                "id": records[i].get("id", i),
                "prompt": question,
                "answer": answer.text,
                "reference": reference,
            }
            found = {key: records[i][key] for key in ("passages",) if key in records[i]}
            run_folder.append(folder / "samples.jsonl", sample | found | {"finish": answer.finish})
            rows.append((question, answer.text, reference))
        say(
            f"\nsamples at step {step}\n{run_folder.table(rows[: config.cherry_show], ('question', 'answer', 'right answer'))}\n"
        )
    logprobs = [answer.logprobs for answer in answers]
    return measure(
        config.cherry_metrics,
        **dict(zip(MEASURED, (texts, references, texts, references, logprobs), strict=True)),
    )
