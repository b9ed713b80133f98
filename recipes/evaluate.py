"""Measure answers: named figures with their intervals, in all and for each record.

    python recipes/evaluate.py --answers answers.jsonl --metrics accuracy rouge_l
    python recipes/evaluate.py --answers a.jsonl --against b.jsonl --reward-model runs/rm/final
    python recipes/evaluate.py --model-path runs/sft/final --data held_out.jsonl    # answers first
    python recipes/evaluate.py --model-path MODEL --data chats.jsonl --perplexity   # of its answers
    python recipes/evaluate.py --model-path runs/rag/final --index runs/rag/final/index \\
        --data questions.jsonl --perplexity     # and how much the passages help: retrieval_utility

A line of answers is what recipes/generate.py and score.py write, or any object with an answer (or
prediction, output, response) and a reference (or label, target, gold_answer):

    {"id": 1, "answer": "4", "reference": "4"}

The output holds each figure with the interval in which it lies with 95 % by the bootstrap over
records, and the figures of each record. With --against, a line says of each metric by how much the
second file is better than the first, and in which share of the records.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import ta
from ta import Range
from ta.chat.encode import PROMPT, Drop, refuse_idle
from ta.chat.messages import template_arguments
from ta.command_line import when_stopped
from ta.files import locked_file, write_atomic
from ta.generation import evaluation
from ta.generation.metrics import METRICS, check_metrics


@dataclass(frozen=True)
class Config:
    model: ta.ModelConfig = ta.ModelConfig()
    tokenizer: ta.TokenizerConfig = ta.TokenizerConfig()
    chat: ta.ChatConfig = ta.ChatConfig()
    generation: ta.GenerateConfig = ta.GenerateConfig()
    retrieval: ta.rag.RetrievalConfig = ta.rag.RetrievalConfig()
    answers: str = ""
    """File of answers to measure. Default: the model answers --data."""
    against: str = ""
    """A second file of answers to the same records, to be compared with the first."""
    data: tuple[str, ...] = ()
    """Sources of chats that the model answers. Default: built-in held-out chats."""
    perplexity: bool = False
    """Measure how probable the model finds the answers that stand in --data, and with --index how
    much more probable behind the passages found (retrieval_utility); nothing is generated."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Metrics of ta/generation/metrics.py, such as accuracy, contains, rouge_l, meteor, bleu,
    length, self_bleu_of_prompt, adjusted_distinct_1, perplexity, recall_at_1."""
    reward_model: str = ""
    """Folder of a reward model: the figure reward is the mean reward of the answers."""
    max_tokens_per_micro: Annotated[int, Range(1)] = 8192
    """Tokens in one forward pass of --perplexity: the memory knob."""
    out: str = "evaluation.json"
    """File to write: figures in all and for each record."""
    overwrite: bool = False
    """Replace an output that exists."""


def metrics_of(config: Config) -> list[str]:
    """The names of the metrics; ValueError for flags that cannot go together."""
    if config.against and not config.answers:
        raise ValueError("--against FILE is compared with --answers FILE: give both")
    for flag in ("data", "perplexity"):
        if config.answers and getattr(config, flag):
            raise ValueError(f"--answers are there, so --{flag} has no effect: leave one out")
    retrieves = config.retrieval.index and not config.answers
    if config.retrieval != ta.rag.RetrievalConfig() and not retrieves:
        raise ValueError("settings of retrieval are for --data with --index: leave them out")
    if not config.perplexity or retrieves:
        refuse_idle(config.chat, PROMPT.idle, "the answers measured are whole ones")
    if config.perplexity:
        if config.reward_model or config.metrics != Config.metrics:
            raise ValueError("--perplexity generates nothing for other metrics: leave them out")
        return ["perplexity"] + ["retrieval_utility"] * bool(config.retrieval.index)
    rewarded = ["reward"] if config.reward_model else []
    names = list(dict.fromkeys([*config.metrics, *rewarded]))
    if not names:
        raise ValueError("no metric to measure: give some in --metrics")
    check_metrics(names, {key for metric in METRICS.values() for key in metric.inputs})
    if config.against:
        evaluation.check_comparable(names)
    named = config.model.model_path != "builtin" or config.tokenizer.tokenizer_path
    if counted := config.answers and not named and in_tokens(names):
        raise ValueError(f"metric {counted[0]} counts tokens: name the model in --model-path")
    return names


def in_tokens(names: list[str]) -> list[str]:
    """The metrics that count tokens, which a tokenizer makes of the answers."""
    return [name for name in names if "tokens" in METRICS[name].inputs]


def read_data(config: Config, tokenizer) -> list[tuple[dict, list[int]]]:
    """(record, token ids of its prompt) of every chat of --data."""
    builtin, drops = "questions" if config.retrieval.index else "chats", ta.Drops()
    files = ta.given_or_held_out(config.data, builtin, config.model.hub)
    prompts = ta.read_prompts(files, tokenizer, config.chat, drops)
    if drops.counts:
        ta.parallel.tell(f"left out: {drops.table()}")
    return prompts


def with_passages(config: Config, prompts, tokenizer, device: str) -> list[tuple[dict, list[int]]]:
    """The prompts with the passages found for them; without --index as they are."""
    by = (tokenizer, config.chat, device, config.model.hub)
    return ta.rag.retrieve_for_prompts(config.retrieval, prompts, *by)


def model_answers(config: Config, tokenizer, device: str) -> list[dict]:
    """Records with the answers of the model to --data."""
    prompts = with_passages(config, read_data(config, tokenizer), tokenizer, device)
    model = ta.load_for_inference(config.model, device)
    ids = [tokens for _, tokens in prompts]
    ta.check_prompts(ids, *ta.limits_of(model))
    settings = ta.with_stop_strings(config.generation, tokenizer.stop_strings)
    kept = "nothing is written; generate.py keeps its answers, and --answers FILE measures them"
    with when_stopped(lambda: kept), ta.progress(len(ids), "answers", "record") as bar:
        answers = ta.generate(
            model,
            tokenizer.fast,
            ids,
            settings,
            tokenizer.stop_ids,
            on_answer=lambda *_: bar.update(),
        )
    return [
        record | {"answers": ta.answers_to_json(group, "tokens")}
        for (record, _), group in zip(prompts, answers, strict=True)
    ]


def given_answers(config: Config, tokenizer, device: str) -> list[dict]:
    """For each record of --data the log-probabilities of its answers' tokens under the model.

    With an index they are of the last answer, alone and behind the passages found for its question.
    """
    model, _ = ta.wrap(ta.load_for_inference(config.model, device))
    budget = config.max_tokens_per_micro
    if not config.retrieval.index:
        files = ta.given_or_held_out(config.data, "chats", config.model.hub)
        data = ta.prepare_chats(files, tokenizer, config.chat, ta.DataConfig())
        sequences = [ta.sequence(data, i) for i in range(len(data.origin))]
        return [{"logprobs": row} for row in ta.answer_logprobs(model, sequences, budget)]
    prompts = [prompt for prompt in read_data(config, tokenizer) if "reference" in prompt[0]]
    chats = [record["messages"] for record, _ in prompts]
    turns = [[{"role": "assistant", "content": record["reference"]}] for record, _ in prompts]
    arguments = [template_arguments(record) for record, _ in prompts]
    whole = ta.encode_answers(chats, turns, tokenizer, config.chat, arguments)
    if dropped := [drop for drop in whole if isinstance(drop, Drop)]:
        raise ValueError(f"{len(dropped)} answers do not fit ({dropped[0].detail})")
    learned = [zip(tokens.ids, tokens.weights, strict=True) for (tokens,) in whole]
    answers = [[i for i, weight in pairs if weight] for pairs in learned]
    rows, found = [], with_passages(config, prompts, tokenizer, device)
    for asked in (prompts, found):
        sequences = [
            (ids + answer, [0.0] * len(ids) + [1.0] * len(answer))
            for (_, ids), answer in zip(asked, answers, strict=True)
        ]
        ta.check_prompts([ids for ids, _ in sequences], *ta.limits_of(model), room=0)
        rows.append(ta.answer_logprobs(model, sequences, budget))
    return [
        record | {"logprobs": alone, "passage_logprobs": [behind]}
        for (record, _), alone, behind in zip(found, *rows, strict=True)
    ]


def with_rewards(config: Config, records: list[dict], device: str) -> list[dict]:
    """The records with rewards of the reward model, which needs their messages."""
    if any("messages" not in record for record in records):
        raise ValueError("--reward-model needs the messages before each answer: give them")
    chats = [record["messages"] for record in records]
    texts = [[answer["content"] for answer in record["answers"]] for record in records]
    rewards = ta.reward_answers(config.reward_model, chats, texts, device)
    return [
        record | {"rewards": dict(zip((a["id"] for a in record["answers"]), group, strict=True))}
        for record, group in zip(records, rewards, strict=True)
    ]


def main(config: Config) -> dict:
    """Measure; returns {metric: Figure}, or {metric: Comparison} of two files."""
    with locked_file(config.out, config.overwrite):
        names, device = metrics_of(config), ta.parallel.pick_device()
        if in_tokens(names) or not config.answers:
            config = ta.prefer_trained_builtin(config)
            tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat)
        if config.answers:
            files = filter(None, [config.answers, config.against])
            sides = evaluation.paired([evaluation.read_answers(file) for file in files])
        elif config.perplexity:
            sides = [given_answers(config, tokenizer, device)]
        else:
            sides = [model_answers(config, tokenizer, device)]
        if config.reward_model:
            sides = [with_rewards(config, side, device) for side in sides]
        inputs = [[evaluation.metric_inputs(record) for record in side] for side in sides]
        if in_tokens(names):
            inputs = [evaluation.with_tokens(side, tokenizer.fast) for side in inputs]
        references = [text for record in inputs[0] for text in record.get("references", ())]
        ta.parallel.say(ta.spacing_note(names, references))

        measure = evaluation.compare if config.against else evaluation.figure
        figures = {name: measure(name, *inputs, config.generation.seed) for name in names}
        ids = [record.get("id", place) for place, record in enumerate(sides[0])]
        write_atomic(Path(config.out), evaluation.to_json(figures, inputs, ids))
        print(ta.table(*evaluation.table_of(figures)))
        ta.parallel.tell(f"{config.out}: figures of {len(ids):,} records")
        return figures


if __name__ == "__main__":
    ta.cli(main, Config)
