"""Pictures and sounds in chats: the placeholder text that stands for each, and which of them a cut dialogue keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ta.chat.encode import Drop, encode_chats, encode_prompts
from ta.chat.pieces import Tokens, Vocabulary
from ta.chat.template import ChatConfig, Message, Template
from ta.data.jsonl import BadRecord

Media = list[tuple[str, str]]  # (modality, path as the record gives it), in the order of the text


class Slot(NamedTuple):
    """How one picture or sound of a modality stands in the text."""

    start: str  # token before its placeholders
    token: str  # the placeholder, which stands `count` times
    end: str  # token behind them
    count: int
    check: Callable[[str], None]  # ValueError unless the file of this path can be used
    mark: str = ""  # changes where other files may be usable
    id: int = -1  # of the placeholder, once the tokenizer knows it

    @property
    def text(self) -> str:
        return self.start + self.token * self.count + self.end


def new_tokens(slots: Mapping[str, Slot]) -> dict[str, str]:
    """{token: text that its embedding row starts from} of all slots."""
    meanings = {slot.token: name for name, slot in slots.items()}
    return meanings | {
        token: text
        for slot in slots.values()
        for token, text in ((slot.start, "begin"), (slot.end, "end"))
    }


def place_media(
    messages: Sequence[Message], slots: Mapping[str, Slot]
) -> tuple[list[Message], Media]:
    """The messages with placeholder text where a picture or sound stood, and these in order.

    Such a message carries `parts`, its text cut into (text, whether it is placeholders): only there do media tokens count, whatever users type.
    BadRecord for a modality without a slot and for a file that cannot be used.
    """
    placed, media = [], []
    for message in messages:
        given = message["content"]
        parts = (
            given
            if isinstance(given, list)
            else [{"type": message.get("type", "text"), "content": given}]
        )
        rest = {key: value for key, value in message.items() if key != "type"}
        if all(part["type"] == "text" for part in parts):
            placed.append(rest)
            continue
        texts = []
        for part in parts:
            if part["type"] == "text":
                texts.append((part["content"], False))
                continue
            slot = slots.get(part["type"])
            if slot is None:
                known = " and ".join(slots) or "none"
                raise BadRecord(
                    f"no {part['type']} encoder",
                    f"{part['content']!r} is {part['type']}, and the encoders given read {known}; give --{part['type']}-encoder",
                )
            try:
                slot.check(part["content"])
            except ValueError as error:
                raise BadRecord(f"{part['type']} cannot be used", str(error)) from None
            texts.append((slot.text, True))
            media.append((part["type"], part["content"]))
        placed.append(rest | {"content": "".join(text for text, _ in texts), "parts": texts})
    return placed, media


def encode_media(
    chats: Sequence[Sequence[Message]],
    template: Template,
    vocabulary: Vocabulary,
    config: ChatConfig,
    slots: Mapping[str, Slot],
    prompts: bool = False,
) -> list[tuple[Tokens, Media] | Drop]:
    """encode_chats (or encode_prompts, whose tokens weigh nothing) of chats with pictures and sounds: each with those that were not cut away."""
    placed = [place_media(chat, slots) for chat in chats]
    encode = encode_prompts if prompts else encode_chats
    results = encode([messages for messages, _ in placed], template, vocabulary, config)
    found: list[tuple[Tokens, Media] | Drop] = []
    for result, (_, media) in zip(results, placed, strict=True):
        if isinstance(result, Drop):
            found.append(result)
            continue
        tokens = Tokens(result, [0.0] * len(result)) if prompts else result
        found.append((tokens, _kept(media, tokens.ids, slots, prompts or config.keep_end)))
    return found


def _kept(media: Media, ids: Sequence[int], slots: Mapping[str, Slot], latest: bool) -> Media:
    """Cutting takes whole messages from one end, and neither system messages nor trailing ones hold media: the first or the latest are left."""
    counts = {name: ids.count(slot.id) // slot.count for name, slot in slots.items()}
    total = sum(counts.values())
    kept = media[len(media) - total :] if latest else media[:total]
    assert all(sum(name == modality for modality, _ in kept) == n for name, n in counts.items())
    return kept
