"""What a generation is asked for and what it gives: settings, checks of prompts, where an answer
ends and how its text is cut.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from ta.command_line import SEED, Range, check_config
from ta.generation.metrics import check_metrics

BROKEN = (
    "the model's logits are not numbers (NaN): its weights or the arithmetic (dtype) are broken"
)


@dataclass(frozen=True)
class GenerateConfig:
    max_new_tokens: Annotated[int, Range(1)] = 128
    """Tokens of an answer at most, its end token counted."""
    temperature: Annotated[float, Range(0)] = 0.0
    """0 takes the most probable token; above 0 samples."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Sample among the most probable tokens that together reach this probability."""
    top_k: Annotated[int, Range(0)] = 0
    """Sample among this many most probable tokens; 0 is all."""
    num_answers: Annotated[int, Range(1)] = 1
    """Answers for each prompt."""
    beams: Annotated[int, Range(1, 1024)] = 1
    """Beam search of this width, through transformers' generate or vLLM's."""
    repetition_penalty: Annotated[float, Range(0, above=True)] = 1.0
    """Above 1 makes tokens of the prompt and of the answer so far less probable (CTRL, arXiv
    1909.05858)."""
    stop_strings: tuple[str, ...] = ()
    """An answer ends where one of these is complete."""
    keep_stop: bool = False
    """Leave the stop string or end token in the text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    seed: Annotated[int, SEED] = 0
    """Seed of the sampling; what a record gets does not depend on the records beside it."""
    slots: Annotated[int, Range(1)] = 64
    """Answers that the hf engine generates at the same time (a memory knob)."""

    def check(self) -> None:
        """ValueError for settings that are impossible together, and for an empty stop string."""
        if not all(self.stop_strings):
            raise ValueError(
                f"--stop-strings {self.stop_strings} cannot be: give strings that are not empty"
            )
        if 0 < self.temperature < 1e-6:
            raise ValueError(
                f"--temperature {self.temperature} is too low to divide by: give 0, which takes "
                "the most probable token"
            )
        if self.beams > 1 and self.temperature:
            raise ValueError(
                f"--beams {self.beams} searches and --temperature {self.temperature} samples: "
                "give one of them"
            )
        if 1 < self.beams < self.num_answers:
            raise ValueError(
                f"--num-answers {self.num_answers} are more than --beams {self.beams} can give: "
                "raise beams"
            )
        if self.beams == 1 and not self.temperature and self.num_answers > 1:
            raise ValueError(
                f"--num-answers {self.num_answers} would be the same answer: "
                "give a --temperature above 0, or beams"
            )
        if not self.temperature and (self.top_p < 1 or self.top_k):
            raise ValueError(
                "--top-p and --top-k choose what is sampled, and --temperature 0 takes the most "
                "probable token: give a temperature"
            )


@dataclass(frozen=True)
class SamplesConfig:
    samples_data: tuple[str, ...] = ()
    """Sources of chats that are answered and scored at each evaluation, written like --val-data.
    Default: the first records of each source of --val-data."""
    sample_records: Annotated[int, Range(0)] = 64
    """Records of each source that are answered; 0 turns samples off."""
    sample_show: Annotated[int, Range(0)] = 6
    """Answers shown on the screen at each evaluation; all are kept in samples.jsonl."""
    sample_max_new_tokens: Annotated[int | None, Range(1)] = None
    """Tokens of an answer at most. Default: 64; in grpo.py --max-new-tokens."""
    sample_settings: tuple[str, ...] = ()
    """Settings of generation, each name:key=value,... as in generate.py; figures carry the name.
    Example: beams:beams=4 warm:temperature=0.8,num_answers=4. Default: the most probable tokens."""
    sample_metrics: tuple[str, ...] = ("accuracy",)
    """Metrics of ta/generation/metrics.py that are made of answers and references, such as accuracy
    (exact match), rouge_l, meteor, perplexity, self_bleu_of_prompt; kl_to_reference where the
    method has a reference."""
    sample_random_cut: bool = False
    """End each prompt before a random answer (seeded) instead of the last one."""
    sample_reward_model: str = ""
    """Folder of a reward model; the mean reward of the answers is the figure reward."""

    def check(self) -> None:
        """ValueError for metrics and settings that do not exist or cannot be made here."""
        known = [name for name in MEASURED if name != "rewards" or self.sample_reward_model]
        if "reward" in self.sample_metrics and not self.sample_reward_model:
            raise ValueError("metric reward: give a reward model's folder in --sample-reward-model")
        check_metrics((name for name in self.sample_metrics if name != KL), known)
        self.settings(())

    def settings(self, stop_strings: Sequence[str], longest: int = 64) -> dict[str, GenerateConfig]:
        """The settings of generation by name, which end answers at `stop_strings` too.

        Where they say nothing else, after `longest` tokens. ValueError for a name that comes twice.
        """
        longest = self.sample_max_new_tokens or longest
        default = GenerateConfig(longest, stop_strings=tuple(stop_strings))
        return named_settings("--sample-settings", self.sample_settings, default)


KL = "kl_to_reference"
MEASURED = (
    *("predictions", "labels", "answers", "references", "logprobs"),
    *("tokens", "vocab_size", "groups", "rewards"),
)


@dataclass(frozen=True)
class VllmConfig:
    gpu_memory_utilization: Annotated[float, Range(0, 1, above=True)] = 0.9
    """Share of a device's memory that vLLM takes."""
    kv_cache_gb: Annotated[float | None, Range(0, above=True)] = None
    """Memory for keys and values in GiB. Default: what is left on a GPU, 1 on CPU."""
    max_model_len: Annotated[int | None, Range(1)] = None
    """Tokens of prompt and answer at most. Default: the model's context."""
    enforce_eager: bool = False
    """Skip compilation and CUDA graphs: starts sooner, runs slower. Always so on CPU."""


@dataclass(frozen=True)
class VllmModelConfig:
    """How vLLM takes a model that does not train."""

    tensor_parallel_size: Annotated[int, Range(1)] = 1
    """Devices that share each layer; must divide the attention heads."""
    adapter_in_vllm: Literal["merged", "runtime"] = "merged"
    """Merge the adapter into its base first, or let vLLM apply it at run time (plain LoRA only)."""


def with_stop_strings(config: GenerateConfig, more: Sequence[str]) -> GenerateConfig:
    """The settings with further stop strings, such as those of a chat template."""
    return dataclasses.replace(config, stop_strings=(*config.stop_strings, *more))


class Answer(NamedTuple):
    """One answer to a prompt."""

    # all that was generated, the end token and the stop string's tokens included
    ids: list[int]
    # without them, unless keep_stop
    text: str
    finish: Literal["stop", "length"]
    # log p of each id in nats, before penalty and temperature
    logprobs: list[float]


def answers_to_json(
    answers: Sequence[Answer], logprobs: Literal["none", "sum", "tokens"] = "none"
) -> list[dict]:
    """Answers as objects of a candidates record: id, content, finish.

    Log-probabilities (nats) where asked: "sum" of the whole answer, "tokens" of each id too.
    """
    shown = []
    for k, answer in enumerate(answers):
        shown.append({"id": str(k), "content": answer.text, "finish": answer.finish})
        if logprobs != "none":
            shown[k]["logprob"] = sum(answer.logprobs)
        if logprobs == "tokens":
            shown[k] |= {"tokens": answer.ids, "logprobs": answer.logprobs}
    return shown


def parse_settings(text: str, default: GenerateConfig) -> tuple[str, GenerateConfig]:
    """(name, settings) of "name" or "name:temperature=0.7,num_answers=4,stop_strings=('a','b')".

    What is not named stays as in `default`. ValueError for a text of another form, for settings
    that do not exist, and for values that cannot be.
    """
    name, _, given = text.partition(":")
    known = {field.name for field in dataclasses.fields(GenerateConfig)}
    if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
        raise ValueError(
            f"settings {text!r} start with no name of letters, digits, - and _: "
            "give name:temperature=0.7,num_answers=4"
        )
    try:
        call = ast.parse(f"f({given})", mode="eval").body
        changes = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        if call.args:
            raise ValueError("a value without a key")
    except (SyntaxError, ValueError, AttributeError) as error:
        raise ValueError(
            f"settings {text!r} are not of the form "
            "name:temperature=0.7,num_answers=4,stop_strings=('a','b')"
        ) from error
    for key, value in changes.items():
        if key not in known:
            raise ValueError(
                f"settings {text!r} name {key!r}: known are {', '.join(sorted(known))}"
            )
        kind = type(getattr(default, key))
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"settings {text!r}: {key}={value!r} is no {kind.__name__}")
    settings = dataclasses.replace(default, **changes)
    check_config(settings)
    return name, settings


def named_settings(
    flag: str, texts: Sequence[str], default: GenerateConfig
) -> dict[str, GenerateConfig]:
    """The settings that the texts of a flag name, or `default` under no name.

    ValueError where two have one name, as they would write one file.
    """
    named = [parse_settings(text, default) for text in texts]
    if len(dict(named)) < len(named):
        raise ValueError(f"{flag} use a name twice: give each its own name")
    return dict(named) or {"": default}


def check_prompts(
    prompts: Sequence[Sequence[int]], vocabulary: int, context: int | None, room: int = 1
) -> None:
    """ValueError with the count and the first number of prompts that cannot be answered.

    They are empty, hold ids outside the embedding table of `vocabulary` rows, or leave no room in
    the `context` of so many tokens (None: no limit). `room`: tokens that must fit behind a prompt;
    0 where it is read and not answered.
    """
    for prompt in prompts:
        if isinstance(prompt, str | int) or isinstance(next(iter(prompt), 0), str | dict):
            raise ValueError(f"{prompt!r:.60} is no prompt; give lists of token ids")
    empty = [i for i, p in enumerate(prompts) if len(p) == 0]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(prompts)} prompts are empty (the first is number {empty[0]}): "
            "a prompt needs at least one token"
        )
    outside = [i for i, p in enumerate(prompts) if min(p) < 0 or max(p) >= vocabulary]
    if outside:
        raise ValueError(
            f"{len(outside)} of {len(prompts)} prompts hold token ids outside the model's "
            f"{vocabulary} embeddings (the first is number {outside[0]}): "
            "give the tokenizer that belongs to the model"
        )
    long = [i for i, p in enumerate(prompts) if context is not None and len(p) + room > context]
    if long:
        fault = "leave no room for an answer" if room else "do not fit"
        most, mend = context - room, "give fewer new or virtual tokens"
        raise ValueError(
            f"{len(long)} of {len(prompts)} prompts {fault} in the model's context of {context} "
            f"tokens (number {long[0]} has {len(prompts[long[0]])}): "
            + (f"cut them with --max-tokens {most}" if most > 0 else mend)
        )


def context_of(config) -> int | None:
    """Tokens that a model of this transformers config can look at; None where it has no limit."""
    config = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        if isinstance(limit := getattr(config, name, None), int) and limit > 0:
            return limit
    return None


class Ending(NamedTuple):
    """What ends an answer, and how its text is cut there."""

    tokenizer: object
    stop_ids: frozenset[int]
    config: GenerateConfig

    def reached(self, ids: list[int]) -> bool:
        """Whether the last token ends the answer."""
        stops = self.config.stop_strings
        if ids[-1] in self.stop_ids or not stops:
            return ids[-1] in self.stop_ids
        # every token of a stop string has a byte of it
        tail = ids[-max(len(stop.encode()) for stop in stops) - 4 :]
        return any(stop in self._decode(tail) for stop in stops) and any(
            stop in self._decode(ids) for stop in stops
        )

    def answer(self, ids: list[int], logprobs: list[float]) -> Answer:
        """The finished answer of all ids that were generated."""
        return Answer(ids, self.text(ids), "stop" if self.reached(ids) else "length", logprobs)

    def text(self, ids: list[int]) -> str:
        """What is shown of generated ids, with stop and special tokens as the settings say."""
        keep, skip = self.config.keep_stop, self.config.skip_special_tokens
        if ids and ids[-1] in self.stop_ids and not keep:
            ids = ids[:-1]
        whole = self._decode(ids)
        places = [(whole.find(stop), stop) for stop in self.config.stop_strings if stop in whole]
        if not places:
            return self._decode(ids, skip) if skip else whole
        at, stop = min(places)
        cut = at + len(stop) if keep else at
        # whole tokens before the cut lose their special ones; a token cut through gives characters
        for n in range(len(ids), -1, -1):
            before = self._decode(ids[:n])
            if len(before) <= cut and whole.startswith(before):
                return self._decode(ids[:n], skip) + whole[len(before) : cut]
        return whole[:cut]

    def _decode(self, ids: list[int], skip: bool = False) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
