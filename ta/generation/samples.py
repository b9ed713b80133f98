"""Samples during training: answer a few held-out records, score the answers, show and keep them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from ta.chat.encode import Drop, encode_prompts, is_text
from ta.chat.messages import ANSWER, canonical_role, is_question, random_cut, template_arguments
from ta.command_line import Range, table
from ta.data.prepare import first_records
from ta.files import append_line
from ta.generation.generate import generate
from ta.generation.metrics import check_metrics, measure
from ta.generation.settings import GenerateConfig
from ta.parallel import rank, say

if TYPE_CHECKING:
    from torch import Tensor

    from ta.chat.template import ChatConfig
    from ta.chat.tokenizer import ChatTokenizer
    from ta.data.prepare import Prepared
    from ta.model.language_model import LanguageModel

    # (chats, tokenizer, config, their template arguments) -> token ids or a Drop for each
    Encode = Callable[[Sequence[list[dict]], ChatTokenizer, ChatConfig, Sequence[dict]], list]
    # (model, chats, their prompts) -> embeddings (L, D) of each prompt
    Embed = Callable[[LanguageModel, Sequence[list[dict]], Sequence[list[int]]], Iterable[Tensor]]


@dataclass(frozen=True)
class SamplesConfig:
    sample_records: Annotated[int, Range(0)] = 64
    """Held-out records that are answered and scored at each evaluation; 0 turns samples off."""
    sample_show: Annotated[int, Range(0)] = 6
    """Answers shown on the screen at each evaluation; all are kept in samples.jsonl."""
    sample_max_new_tokens: Annotated[int, Range(1)] = 64
    """Tokens of an answer at most."""
    sample_metrics: tuple[str, ...] = ("accuracy",)
    """Metrics of ta/generation/metrics.py that take predictions and references, such as accuracy
    (exact match), rouge_l, meteor, perplexity."""
    sample_random_cut: bool = False
    """End each prompt before a random answer (seeded) instead of the last one."""

    def check(self) -> None:
        """ValueError for metrics that do not exist or need more than answers and references."""
        check_metrics(self.sample_metrics, MEASURED)


MEASURED = ("predictions", "labels", "answers", "references", "logprobs")


class Prompt(NamedTuple):
    """A record with its question asked: the chat up to it, its token ids, the answer taken off."""

    record: dict
    chat: list[dict]
    ids: list[int]
    reference: str


def dialogue_of(record: dict) -> list[dict]:
    """The messages of a record of any kind, which end in the answer wanted.

    A chat's own messages, or a context with the chosen or the desirable answer.
    """
    if "messages" in record:
        return record["messages"]
    answer = record["answer_w"] if "answer_w" in record else record["answer"]
    return [*record["context"], answer]


def prompts_of(
    records: Sequence[dict],
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    cut_seed: int | None = None,
    encode: Encode = encode_prompts,
) -> list[Prompt]:
    """The prompts of the records, of those whose prompt fits.

    The answer taken off is the reference.

    A labelled answer that is not desirable has no right answer beside it and is left out, as is a
    plain text, which asks nothing.
    """
    chosen, chats, answers = [], [], []
    for i, record in enumerate(records):
        if record.get("is_desirable") is False or is_text(dialogue_of(record)):
            continue
        messages = [{**m, "role": canonical_role(m["role"])} for m in dialogue_of(record)]
        asked = next((k for k, m in enumerate(messages) if is_question(m)), len(messages))
        if cut_seed is not None and any(m["role"] == ANSWER for m in messages[asked:]):
            kept = random_cut(messages, random.Random(f"{cut_seed} {i}"))
            messages = messages[: len(kept) + 1]
        while len(messages) > 1 and messages[-1]["role"] != ANSWER:
            messages.pop()
        chosen.append(record)
        chats.append(messages)
        answers.append((messages[-1]["role"] == ANSWER and messages[-1]["content"]) or "")
    encoded = encode(chats, tokenizer, chat, [template_arguments(record) for record in chosen])
    prompts = zip(chosen, chats, encoded, answers, strict=True)
    return [Prompt(*fields) for fields in prompts if not isinstance(fields[2], Drop)]


def generate_samples(
    model: LanguageModel,
    tokenizer: ChatTokenizer,
    data: Prepared | Sequence[dict] | None,
    chat: ChatConfig,
    config: SamplesConfig,
    folder: Path,
    step: int,
    *,
    seed: int = 0,
    encode: Encode = encode_prompts,
    embed: Embed | None = None,
) -> dict[str, float]:
    """Answer the first records of `data` greedily, append them to samples.jsonl, show some.

    Returns the metrics chosen. `encode` makes token ids of chats, and `embed` embeddings of
    prompts, where records hold more than text. {} where there is nothing to answer or where the
    model is a classifier.
    """
    if not data or not config.sample_records or not model.generates:
        return {}
    records = data[: config.sample_records]
    if hasattr(data, "origin"):
        records = first_records(data, config.sample_records)
    cut_seed = seed if config.sample_random_cut else None
    chosen = prompts_of(records, tokenizer, chat, cut_seed, encode)
    if not chosen:
        return {}
    settings = GenerateConfig(
        max_new_tokens=config.sample_max_new_tokens, stop_strings=tuple(tokenizer.stop_strings)
    )
    prompts = [prompt.ids for prompt in chosen]
    embeds = list(embed(model, [p.chat for p in chosen], prompts)) if embed else None
    answers = [
        group[0]
        for group in generate(
            model, tokenizer.fast, prompts, settings, tokenizer.stop_ids, embeds=embeds
        )
    ]
    if rank() == 0:
        rows = []
        for place, (prompt, answer) in enumerate(zip(chosen, answers, strict=True)):
            sample = {
                "step": step,
                "id": prompt.record.get("id", place),
                "prompt": asked_text(prompt.chat),
                "answer": answer.text,
                "reference": prompt.reference,
            }
            if "passages" in prompt.record:
                sample["passages"] = prompt.record["passages"]
            append_line(folder / "samples.jsonl", sample | {"finish": answer.finish})
            rows.append((sample["prompt"], answer.text, prompt.reference))
        shown = table(rows[: config.sample_show], ("question", "answer", "right answer"))
        say(f"\nsamples at step {step}\n{shown}\n")
    texts, references = [a.text for a in answers], [prompt.reference for prompt in chosen]
    logprobs = [answer.logprobs for answer in answers]
    measured: tuple[Any, ...] = (texts, references, texts, references, logprobs)
    return measure(config.sample_metrics, **dict(zip(MEASURED, measured, strict=True)))


def asked_text(chat: Sequence[dict]) -> str:
    """The last message before the answer, with what is no text as [path]."""
    asked = chat[:-1]
    if not asked:
        return ""
    paths = []
    for message in asked:
        content = message["content"]
        parts = content if isinstance(content, list) else [message]
        paths += [f"[{p['content']}]" for p in parts if p.get("type", "text") != "text"]
    content = asked[-1]["content"]
    texts = [content]
    if isinstance(content, list):
        texts = [part["content"] for part in content if part["type"] == "text"]
    elif asked[-1].get("type", "text") != "text":
        texts = []
    return " ".join(dict.fromkeys([*paths, *texts]))
