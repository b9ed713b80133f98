"""Samples during training: answer a few held-out records, score the answers, show and keep them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ta.chat.encode import Drop, encode_prompts, is_text
from ta.chat.messages import canonical_role, template_arguments
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import ChatTokenizer
from ta.data.batch import Batch
from ta.data.prepare import Prepared, first_records
from ta.data.sources import Drops, source_names
from ta.files import append_line, read_json_lines
from ta.generation.evaluation import having, measured, metric_inputs
from ta.generation.generate import generate
from ta.generation.metrics import spacing_note
from ta.generation.prompts import Encode, asked, read_prompts
from ta.generation.score import kl_to_reference, reward_answers
from ta.generation.settings import KL, Answer, GenerateConfig, SamplesConfig, answers_to_json
from ta.model.language_model import LanguageModel
from ta.model.new_rows import table_rows
from ta.parallel import rank, say
from ta.screen import progress, table
from ta.training.run_folder import Run

# (model, chats, their prompts) -> embeddings (L, D) of each prompt
Embed = Callable[[LanguageModel, Sequence[list[dict]], Sequence[list[int]]], Iterable[Tensor]]
# (model, prompts, settings) -> the answers to each and their rewards
Respond = Callable[
    [LanguageModel, list["Prompt"], GenerateConfig],
    tuple[list[list[Answer]], list[list[float | None]]],
]


class Prompt(NamedTuple):
    """A record with its question asked: the chat up to it, its token ids, the answer taken off."""

    record: dict
    chat: list[dict]
    ids: list[int]
    # None where no answer follows the question
    reference: str | None
    # name of the source
    source: str = ""


class Sample(NamedTuple):
    """The answers to a prompt, with a reward for each where there is a reward model."""

    prompt: Prompt
    answers: list[Answer]
    rewards: list[float | None]


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
    source: str = "",
) -> list[Prompt]:
    """The prompts of the records, of those whose prompt fits.

    The reference is the answer that follows the question, else what the record has as "reference".
    A labelled answer that is not desirable has no right answer beside it and is left out, as is a
    plain text, which asks nothing.
    """
    prompts = []
    for i, record in enumerate(records):
        if record.get("is_desirable") is False or is_text(dialogue_of(record)):
            continue
        cut = None if cut_seed is None else random.Random(f"{cut_seed} {i}")
        dialogue = [{**m, "role": canonical_role(m["role"])} for m in dialogue_of(record)]
        question, reference = asked(dialogue, cut)
        if reference is None:
            reference = record.get("reference")
        if question:
            prompts.append(Prompt(record, question, [], reference, source))
    given = [template_arguments(prompt.record) for prompt in prompts]
    encoded = encode([prompt.chat for prompt in prompts], tokenizer, chat, given)
    return [
        prompt._replace(ids=ids)
        for prompt, ids in zip(prompts, encoded, strict=True)
        if not isinstance(ids, Drop)
    ]


def all_prompts(
    data: Prepared | Sequence[dict] | None,
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    config: SamplesConfig,
    seed: int,
    encode: Encode,
) -> list[Prompt]:
    """The prompts of the config's own sources, else of each source of the held-out data."""
    n, cut = config.sample_records, config.sample_random_cut
    prompts = []
    if config.samples_data:
        texts = config.samples_data
        for text, name in zip(texts, source_names(texts), strict=True):
            read = read_prompts([text], tokenizer, chat, Drops(), seed, cut, encode)[:n]
            prompts += [
                Prompt(record, record["messages"], ids, record.get("reference"), name)
                for record, ids in read
            ]
        return prompts
    cut_seed = seed if cut else None
    if not hasattr(data, "origin"):
        return prompts_of(data[:n], tokenizer, chat, cut_seed, encode)
    for i, source in enumerate(data.info["sources"]):
        records = first_records(data._replace(origin=data.origin[data.origin[:, 0] == i]), n)
        prompts += prompts_of(records, tokenizer, chat, cut_seed, encode, source["name"])
    return prompts


def generate_samples(
    run: Run,
    model: LanguageModel,
    tokenizer: ChatTokenizer,
    data: Prepared | Sequence[dict] | None,
    step: int,
    *,
    longest: int = 64,
    encode: Encode = encode_prompts,
    embed: Embed | None = None,
    reference: Callable[[Batch], Tensor] | None = None,
    respond: Respond | None = None,
) -> dict[str, float]:
    """Answer some records, append the answers to samples.jsonl, show some, and measure them.

    The run has the settings, in the groups chat and samples; answers end after `longest` tokens
    where these say nothing else. Returns the metrics chosen: NAME over all answers, NAME@SETTINGS
    where settings have names, and NAME/SOURCE beside it where there are several sources. `encode`
    makes token ids of chats, and `embed` embeddings of prompts, where records hold more than text.
    `reference` gives the (N,) log-probabilities of sequences for kl_to_reference. `respond` answers
    and rewards in place of the model. {} where there is nothing to answer or where the model is a
    classifier.
    """
    config, chat, path = run.config.samples, run.config.chat, run.folder / "samples.jsonl"
    if not (data or config.samples_data) or not config.sample_records or not model.generates:
        return {}
    if KL in config.sample_metrics and (reference is None or embed):
        raise ValueError(
            f"metric {KL}: this run has no reference model beside it; leave it out (sft.py, dpo.py "
            "with a loss that has a reference, and kto.py have one)"
        )
    prompts = all_prompts(data, tokenizer, chat, config, run.seed, encode)
    if not prompts:
        return {}
    if step == 0:
        say(spacing_note(config.sample_metrics, [prompt.reference or "" for prompt in prompts]))
    named = config.settings(tokenizer.stop_strings, longest)
    show = {"show": rank() == 0, "delay": 2, "leave": False}
    # the bar is gone before anything else is printed
    with progress(len(named) * len(prompts), "samples", "answer", **show) as bar:
        respond = respond or _by_model(model, tokenizer, prompts, embed, bar)
        made = {name: respond(model, prompts, settings) for name, settings in named.items()}
    figures: dict[str, float] = {}
    for name, (answers, rewards) in made.items():
        if config.sample_reward_model:
            chats = [prompt.chat for prompt in prompts]
            texts = [[answer.text for answer in group] for group in answers]
            rewards = reward_answers(config.sample_reward_model, chats, texts, run.device)
        samples = [*map(Sample, prompts, answers, rewards)]
        if rank() == 0:
            _keep(samples, step, name, path, config.sample_show)
        end = f"@{name}" if name else ""
        for source, own in _by_source(samples).items():
            for metric, value in _figures(config, own, model, reference).items():
                figures[f"{metric}{end}{source}"] = value
    return figures


def _by_model(
    model: LanguageModel,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    embed: Embed | None,
    bar: Any,
) -> Respond:
    """The model's own answers, without rewards."""
    ids = [prompt.ids for prompt in prompts]
    embeds = list(embed(model, [prompt.chat for prompt in prompts], ids)) if embed else None

    def respond(model, prompts, settings):
        answers = generate(
            model,
            tokenizer.fast,
            ids,
            settings,
            tokenizer.stop_ids,
            on_answer=lambda *_: bar.update(),
            embeds=embeds,
        )
        return answers, [[None] * settings.num_answers for _ in prompts]

    return respond


def _by_source(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """All samples under "", and where there are several sources those of each under /SOURCE."""
    groups = {"": list(samples)}
    if len({sample.prompt.source for sample in samples}) > 1:
        for sample in samples:
            groups.setdefault(f"/{sample.prompt.source}", []).append(sample)
    return groups


def _figures(
    config: SamplesConfig, samples: Sequence[Sample], model, reference
) -> dict[str, float]:
    """The figure of each metric; those of references are over the answers that have one."""
    size = table_rows(model.base)
    inputs, rewarded = [], False
    for prompt, answers, rewards in samples:
        record: dict = {"answers": answers_to_json(answers, "tokens")}
        if prompt.reference is not None:
            record["reference"] = prompt.reference
        given = metric_inputs(record) | {"vocab_size": size}
        given["tokens"] = [answer.ids for answer in answers]
        if own := [reward for reward in rewards if reward is not None]:
            given["rewards"], rewarded = own, True
        inputs.append(given)
    values = {}
    for name in dict.fromkeys([*config.sample_metrics, *["reward"] * rewarded]):
        if name == KL:
            ids = [(s.prompt.ids, answer.ids) for s in samples for answer in s.answers]
            values[name] = kl_to_reference(model, reference, ids)
        else:
            values[name] = measured(name, having(name, inputs))
    return {name: value for name, value in values.items() if value == value}


def _rows(samples: Sequence[Sample], step: int, settings: str) -> list[dict]:
    """The lines of samples.jsonl, one an answer; `row` is the same at every step."""
    rows = []
    for place, (prompt, answers, rewards) in enumerate(samples):
        for k, answer in enumerate(answers):
            row = {
                "step": step,
                "row": f"{settings} {place} {k}".strip(),
                "id": prompt.record.get("id", place),
                "prompt": asked_text(prompt.chat),
                "chat": prompt.chat,
                "answer": answer.text,
                "reference": prompt.reference,
            }
            more = {
                "source": prompt.source,
                "settings": settings,
                "reward": rewards[k],
                "passages": prompt.record.get("passages"),
            }
            row |= {name: value for name, value in more.items() if value not in (None, "")}
            rows.append(row | {"finish": answer.finish})
    return rows


def _keep(samples: Sequence[Sample], step: int, settings: str, path: Path, n: int) -> None:
    """Append the rows to `path`, and print n, each beside its answer at the first evaluation there.

    The title counts the answers that changed since the last one.
    """
    rows, earlier = _rows(samples, step, settings), {}
    for row in rows:
        append_line(path, row)
    for row in read_json_lines(path):
        if row["step"] < step and "row" in row:  # rollouts stand there too
            earlier.setdefault(row["step"], {})[row["row"]] = row["answer"]
    first, last = (earlier.get(at(earlier, default=0), {}) for at in (min, max))
    header = ["question", "before", "answer", "right answer", "reward"]
    changed = [row for row in rows if last.get(row["row"], row["answer"]) != row["answer"]]
    cells = []
    for row in rows[:n]:
        before = first.get(row["row"], "")
        same = "(the same)" if before == row["answer"] else before
        reward = f"{row['reward']:.3g}" if "reward" in row else ""
        dialogue = whole_dialogue(row["chat"])
        cells.append((dialogue, same, row["answer"], row["reference"] or "", reward))
    if not cells:
        return
    # a column without a cell is left out
    kept = [i for i in range(len(header)) if any(row[i] for row in cells)]
    shown = table([[row[i] for i in kept] for row in cells], [header[i] for i in kept])
    title = f"samples at step {step}" + (f", {settings}" if settings else "")
    title += f", {len(changed)} of {len(rows)} answers changed since the last time" if last else ""
    say(f"\n{title}\n{shown}\n")


def whole_dialogue(chat: Sequence[dict]) -> str:
    """The messages, a line each with its role, of a short chat; of a long one the last message."""
    if len(chat) == 1:
        return asked_text(chat)
    text = "\n".join(f"{message['role']}: {asked_text([message])}" for message in chat)
    return text if len(text) <= 400 else f"… {asked_text(chat[-1:])}"


def asked_text(chat: Sequence[dict]) -> str:
    """The last message, with pictures and sounds of the whole chat before it as [path]."""

    def parts(message: dict) -> list[dict]:
        content = message["content"]
        return content if isinstance(content, list) else [message]

    def is_media(part: dict) -> bool:
        return part.get("type", "text") != "text"

    paths = [f"[{p['content']}]" for message in chat for p in parts(message) if is_media(p)]
    texts = [p["content"] for last in chat[-1:] for p in parts(last) if not is_media(p)]
    return " ".join(dict.fromkeys([*paths, *texts]))
