"""Dialogues to token ids and loss weights: rendered, tokenized, masked, cut by whole messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

from ta.chat.cut import cut_dialogue
from ta.chat.jinja import NO_ARGUMENTS, Arguments
from ta.chat.messages import (
    ANSWER,
    Chat,
    Message,
    check_messages,
    is_question,
    leading_systems,
    message_weight,
    strip_trailing_answers,
    with_system,
)
from ta.chat.render import Piece, Rendered, Tokenized, Tokens, render_chat, tokenize_chats
from ta.chat.template import ChatConfig, check_chat_config
from ta.chat.tokenizer import ChatTokenizer

LossOn = Literal["answers", "last", "all"]


class Drop(NamedTuple):
    """A record that cannot be used."""

    reason: str
    detail: str


class EncodeRule(NamedTuple):
    """What a method needs of its dialogues; the rest is as the user's ChatConfig says."""

    # which messages are learned; None: as the ChatConfig says
    loss_on: LossOn | None = None
    # whether the latest messages stay when a dialogue is cut; None: as the ChatConfig says
    keep_end: bool | None = None
    # whether an answer is opened behind the last message, for generation
    opened: bool = False

    def within(self, config: ChatConfig) -> EncodeRule:
        """The rule with what the ChatConfig says in place of None."""
        keep_end = config.keep_end if self.keep_end is None else self.keep_end
        return EncodeRule(self.loss_on or config.loss_on, keep_end, self.opened)

    @property
    def end_in_answer(self) -> bool:
        """Whether what stays of a dialogue ends in an answer."""
        return not self.opened and self.loss_on != "all"

    @property
    def idle(self) -> list[str]:
        """The settings of what is learned that change nothing, whatever the ChatConfig says."""
        if self == AS_CONFIGURED:
            return []
        return ["loss_on", "split_turns", *["cut_answer"] * (not self.end_in_answer)]


AS_CONFIGURED = EncodeRule()
ONE_ANSWER = EncodeRule(loss_on="last", keep_end=True)
PROMPT = EncodeRule(keep_end=True, opened=True)


def refuse_idle(config: ChatConfig, idle: Sequence[str], why: str) -> None:
    """ValueError for a setting given of those in `idle`, which have no effect; `why` says it."""
    for name in idle:
        value = getattr(config, name)
        if value != getattr(ChatConfig, name):
            said = "" if value is True else f" {value}"
            raise ValueError(
                f"--{name.replace('_', '-')}{said} has no effect, as {why}: leave it out"
            )


def loss_weights(messages: Chat, loss_on: LossOn, opened: bool = False) -> list[float]:
    """What each token of a message weighs in the loss, for each message; 0: not learned.

    A message's own `loss` wins over `loss_on`. With `opened` the last message is an answer that is
    still to come. ValueError for a `loss` that is no weight, and for another `loss_on`.
    """
    if loss_on not in get_args(LossOn):
        raise ValueError(f"loss_on {loss_on!r}: give one of {', '.join(get_args(LossOn))}")
    last = len(messages) - (not opened)
    return [
        message_weight(
            message,
            i,
            loss_on == "all" or (message["role"] == ANSWER if loss_on == "answers" else i == last),
        )
        for i, message in enumerate(messages)
    ]


def encode_dialogues(
    dialogues: Sequence[Sequence[Chat]],
    tokenizer: ChatTokenizer,
    config: ChatConfig,
    rule: EncodeRule = AS_CONFIGURED,
    arguments: Sequence[Arguments] | None = None,
    notes: Sequence[list[str]] | None = None,
) -> list[list[Tokens] | Drop]:
    """The sequences of each group of dialogues, in order, or why it cannot be used.

    The dialogues of a group differ in their last message only and share one cut. `arguments` has
    for each group what the template is given beside the messages (`template_arguments`); `notes`
    has a list for each group, which gets a line for each thing that the template leaves out.
    ValueError for a dialogue that is wrong (encode its group alone to know which) and for settings
    that are wrong.
    """
    check_chat_config(config)
    rule = rule.within(config)
    groups = [[_prepared(dialogue, config) for dialogue in group] for group in dialogues]
    arguments = arguments or [NO_ARGUMENTS] * len(groups)
    jobs = [CutToFit(*given, rule) for given in zip(groups, arguments, strict=True)]
    while waiting := [job for job in jobs if job.result is None]:
        rendered = []
        for job in waiting:
            for dialogue in job.group:
                messages = [dialogue[i] for i in job.stay]
                weights = loss_weights(messages, rule.loss_on, rule.opened)
                rendered.append(job.render(messages, weights, tokenizer))
        tokenized = iter(tokenize_chats(rendered, tokenizer.vocabulary))
        for job in waiting:
            variants = [next(tokenized) for _ in job.group]
            if is_text(job.group[0]):
                # BOS, where the tokenizer itself puts it in front of a text
                bos, (ids, weights) = tokenizer.fast.bos_token_id, variants[0].tokens
                if tokenizer.fast("")["input_ids"][:1] == [bos]:
                    ids.insert(0, bos)
                    weights.insert(0, 0.0)
            job.fit(variants, config)
    for job, said in zip(jobs, notes or (), strict=False):
        if isinstance(job.result, list):
            said += dict.fromkeys(job.notes)
    return [job.result for job in jobs]


@dataclass
class CutToFit:
    """A group of dialogues on its way to token ids."""

    group: Sequence[Chat]
    arguments: Arguments
    rule: EncodeRule
    # whether the last answer is cut at the limit, and whether messages are left out for it
    cut: bool = False
    shorter: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        # the places of the messages that stay; the sequences, or why there are none
        self.stay, self.result = _of_use(self.group, self.rule)

    def render(self, messages: Chat, weights: list[float], tokenizer: ChatTokenizer) -> Rendered:
        """What stays of a dialogue, in pieces."""
        if not is_text(messages):
            given = weights, self.rule.opened, self.arguments, self.notes
            return render_chat(messages, tokenizer.template, *given)
        # special tokens in it are real: all of it is what the model writes
        end = tokenizer.fast.eos_token or ""
        text = messages[0]["content"].removesuffix(end) + end
        return [[Piece(text, message_weight(messages[0], 0, True), "template")]]

    def fit(self, variants: Sequence[Tokenized], config: ChatConfig) -> None:
        """Set the result; where it is longer than `max_tokens`, fewer messages stay instead."""
        rule, limit = self.rule, config.max_tokens
        longest = max(variants, key=lambda variant: len(variant.tokens.ids))
        size = len(longest.tokens.ids)
        sequences = [variant.tokens for variant in variants]
        over = limit is not None and size > limit
        if over and self.cut:
            self.notes.append("the last answer is cut and teaches no end")
            sequences = [Tokens(x[:limit], w[:limit]) for x, w in sequences]
        if self.cut or not over:
            self.result = sequences
            if self.shorter:
                self.notes.append("messages are left out, since all do not fit in max_tokens")
            if not rule.opened and not all(any(tokens.weights) for tokens in sequences):
                why = "no token of the chat has a weight: see loss_on and the messages' own loss"
                self.result = Drop("nothing to learn", why)
            return
        # what a template writes once (BOS) counts with the first message; should that message go,
        # the next round counts again
        messages = [self.group[0][i] for i in self.stay]
        places = _cut(messages, longest, limit, rule)
        if config.cut_answer and rule.end_in_answer:
            ending = _cut_in_answer(messages, longest, limit, rule.keep_end)
            self.cut = len(ending) > len(places)
            places = max(places, ending, key=len)
        self.shorter |= len(places) < len(messages)
        self.stay = [self.stay[place] for place in places]
        # the next round says again what is left out
        self.notes.clear()
        if not self.stay:
            what = "prompt" if rule.opened else "answer" if rule.end_in_answer else "message"
            what = "text" if is_text(messages) else what
            detail = f"{size} tokens, and no whole {what} within {limit}"
            self.result = Drop(f"no {what} fits in max_tokens", detail)


def is_text(dialogue: Chat) -> bool:
    """Whether a dialogue is a plain text, which no template writes around."""
    return bool(dialogue) and bool(dialogue[-1].get("plain"))


def _of_use(group: Sequence[Chat], rule: EncodeRule) -> tuple[list[int], Drop | None]:
    """The places of the messages that are of use, were there no limit on tokens; why none are."""
    messages = group[0] if group else []
    roles = [message["role"] for message in messages]
    if rule.end_in_answer and not is_text(messages):
        stay = cut_dialogue(roles, [0] * len(roles), None, rule.keep_end)
    else:
        asks = not rule.opened or is_text(messages) or any(map(is_question, messages))
        stay = [*range(len(messages))] if asks else []
    if stay:
        return stay, None
    if rule.opened or ANSWER in roles:
        what = "be answered" if rule.opened else "follow from one"
        return [], Drop("no question", f"no message of a user is there, so nothing can {what}")
    return [], Drop("no answer", "the chat has no message that could be learned")


def _cut(messages: Chat, tokenized: Tokenized, max_tokens: int, rule: EncodeRule) -> list[int]:
    """The places of the messages that stay of a dialogue over `max_tokens`."""
    roles = [message["role"] for message in messages]
    if rule.keep_end:
        # a question right behind its picture begins what is kept as little as an answer does
        # nor does what a tool gave begin it, when its call is gone
        behind = [False, *("parts" in message for message in messages)]
        for i, role in enumerate(roles):
            if role == "tool" or (behind[i] and role == messages[i - 1]["role"]):
                roles[i] = ANSWER
    lengths = list(tokenized.lengths)
    fixed = lengths.pop() if rule.opened else 0
    return cut_dialogue(roles, lengths, max_tokens, rule.keep_end, rule.end_in_answer, fixed)


def _cut_in_answer(
    messages: Chat, tokenized: Tokenized, max_tokens: int, keep_end: bool
) -> list[int]:
    """The places of the messages up to an answer that reaches over the limit; [] for none.

    Where the latest messages are kept, it is the last answer with what it answers.
    """
    if is_text(messages):
        return [0]
    if keep_end:
        first = leading_systems(messages)
        asked = max(i for i, message in enumerate(messages) if is_question(message))
        while asked > first and messages[asked]["role"] == "tool":
            asked -= 1
        return [*range(first), *range(asked, len(messages))]
    ends = [*accumulate(tokenized.lengths)]
    over = next(i for i, end in enumerate(ends) if end > max_tokens)
    answers = messages[over]["role"] == ANSWER and any(map(is_question, messages[:over]))
    learned = any(tokenized.tokens.weights[ends[over] - tokenized.lengths[over] : max_tokens])
    return [*range(over + 1)] if answers and learned else []


def encode_chats(
    chats: Sequence[Chat],
    tokenizer: ChatTokenizer,
    config: ChatConfig,
    rule: EncodeRule = AS_CONFIGURED,
    arguments: Sequence[Arguments] | None = None,
) -> list[Tokens | Drop]:
    """Training sequences, one a chat, in order.

    `arguments` has what the template is given beside each chat's messages. ValueError for a chat
    that is wrong (encode it alone to know which).
    """
    results = encode_dialogues([[chat] for chat in chats], tokenizer, config, rule, arguments)
    return [result if isinstance(result, Drop) else result[0] for result in results]


def encode_chat(
    messages: Chat,
    tokenizer: ChatTokenizer,
    config: ChatConfig,
    arguments: Arguments = NO_ARGUMENTS,
) -> Tokens | Drop:
    """`encode_chats` for one chat."""
    return encode_chats([messages], tokenizer, config, arguments=[arguments])[0]


def turns_of(messages: Chat) -> list[list[Message]]:
    """The chat up to each of its answers that is to be learned, with that one alone learned."""
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == ANSWER and message_weight(message, i, True):
            turns.append([*({**before, "loss": False} for before in messages[:i]), message])
    return turns


def with_answers(context: Chat, answers: Chat) -> list[list[Message]]:
    """The context followed by each of the answers; nothing of the context is learned."""
    before = [{**message, "loss": False} for message in context]
    return [[*before, {"role": ANSWER, **answer}] for answer in answers]


def encode_answers(
    contexts: Sequence[Chat],
    answers: Sequence[Chat],
    tokenizer: ChatTokenizer,
    config: ChatConfig,
    arguments: Sequence[Arguments] | None = None,
) -> list[list[Tokens] | Drop]:
    """For each context the sequences of its answers, all with the same cut context.

    KTO has one answer, a pair two, candidates many. Only the answer is learned. The latest
    messages stay, whatever `keep_end` says: the answer is what the record is about.
    """
    dialogues = [with_answers(*group) for group in zip(contexts, answers, strict=True)]
    return encode_dialogues(dialogues, tokenizer, config, ONE_ANSWER, arguments)


def encode_prompts(
    chats: Sequence[Chat],
    tokenizer: ChatTokenizer,
    config: ChatConfig,
    arguments: Sequence[Arguments] | None = None,
) -> list[list[int] | Drop]:
    """Prompts for generation: trailing answers off, the answer's prefix opened.

    A prompt's ids are the first ids of `encode_chat(chat + [answer])`. Over `max_tokens` the
    earliest messages go, whatever `keep_end` says: the last question is what is asked. A chat
    without a question is a Drop.
    """
    asked = [strip_trailing_answers(chat) for chat in chats]
    results = encode_chats(asked, tokenizer, config, PROMPT, arguments)
    return [result if isinstance(result, Drop) else result.ids for result in results]


def encode_prompt(
    messages: Chat,
    tokenizer: ChatTokenizer,
    config: ChatConfig,
    arguments: Arguments = NO_ARGUMENTS,
) -> list[int]:
    """`encode_prompts` for one; ValueError where nothing is asked or it does not fit."""
    result = encode_prompts([messages], tokenizer, config, [arguments])[0]
    if isinstance(result, Drop):
        remedy = "give a question" if result.reason == "no question" else "raise --max-tokens"
        raise ValueError(f"{result.reason}: {result.detail}; {remedy}")
    return result


def _prepared(dialogue: Chat, config: ChatConfig) -> list[Message]:
    """The dialogue with the role's one name and the system prompt that the user asks for."""
    check_messages(dialogue)
    messages = [{**m, "role": ANSWER} if m["role"] == "bot" else m for m in dialogue]
    if is_text(messages):
        if len(messages) > 1 or config.system_prompt is not None:
            raise ValueError(
                "a plain text has no place for a system prompt; leave out --system-prompt and "
                "system= for it"
            )
        return messages
    return with_system(messages, config.system_prompt, config.ignore_system_prompt)
