"""Pictures and sounds in chats: placeholder text for each, and which a cut dialogue keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ta.chat.encode import Drop, encode_prompts
from ta.chat.jinja import Arguments
from ta.chat.messages import Message
from ta.data.jsonl import BadRecord
from ta.data.prepare import RecordKind, prepare
from ta.data.records import check_media

if TYPE_CHECKING:
    from ta.chat.template import ChatConfig
    from ta.chat.tokenizer import ChatTokenizer, Placeholder

Media = list[tuple[str, str]]  # (modality, path as the record gives it), in the order of the text


def place_media(
    messages: Sequence[Message], placeholders: Mapping[str, Placeholder]
) -> tuple[list[Message], Media]:
    """The messages with placeholder text where a picture or sound stood, and these in order.

    Such a message carries `parts`, its text cut into (text, whether it is placeholders): only there
    do media tokens count, whatever users type. BadRecord for a modality without a placeholder and
    for a file that cannot be used.
    """
    placed, media = [], []
    for message in messages:
        parts = message["content"]
        if not isinstance(parts, list):
            parts = [{"type": message.get("type", "text"), "content": parts}]
        texts = []
        for part in parts:
            kind, content = part["type"], part["content"]
            if kind == "text":
                texts.append((content, False))
                continue
            if kind not in placeholders:
                known = " and ".join(placeholders) or "none"
                raise BadRecord(
                    f"no {kind} encoder",
                    f"{content!r} is {kind}, and the encoders given read {known}; "
                    f"give --{kind}-encoder",
                )
            try:
                placeholders[kind].check(content)
            except ValueError as error:
                raise BadRecord(f"{kind} cannot be used", str(error)) from None
            texts.append((placeholders[kind].text, True))
            media.append((kind, content))
        rest = {key: value for key, value in message.items() if key != "type"}
        if any(is_media for _, is_media in texts):
            rest |= {"content": "".join(text for text, _ in texts), "parts": texts}
        placed.append(rest)
    return placed, media


def encode_media(
    chats: Sequence[Sequence[Message]],
    tokenizer: ChatTokenizer,
    config: ChatConfig,
    arguments: Sequence[Arguments] | None = None,
) -> list[tuple[list[int], Media] | Drop]:
    """`encode_prompts` of chats with pictures and sounds, each with those that are not cut away."""
    placeholders = tokenizer.placeholders
    placed = [place_media(chat, placeholders) for chat in chats]
    messages = [messages for messages, _ in placed]
    results = encode_prompts(messages, tokenizer, config, arguments)
    for n, (_, media) in enumerate(placed):
        if not isinstance(results[n], Drop):
            results[n] = results[n], kept_media(media, results[n], placeholders, latest=True)
    return results


def kept_media(
    media: Media, ids: Sequence[int], placeholders: Mapping[str, Placeholder], latest: bool
) -> Media:
    """Those of the media whose placeholders stand in `ids`.

    Cutting takes whole messages from one end, and neither system messages nor trailing ones hold
    media: the first ones are left, or with `latest` the last.
    """
    total = sum(ids.count(known.id) // known.count for known in placeholders.values())
    return media[len(media) - total :] if latest else media[:total]


def placed_chat(record: dict, tokenizer: ChatTokenizer) -> list[list[Message]]:
    """The record's messages, with placeholders for pictures and sounds, as one dialogue."""
    return [place_media(record["messages"], tokenizer.placeholders)[0]]


def media_of_record(record: dict, ids: list[int], tokenizer: ChatTokenizer, latest: bool) -> Media:
    """Those of the record's pictures and sounds that stand in `ids`."""
    media = place_media(record["messages"], tokenizer.placeholders)[1]
    return kept_media(media, ids, tokenizer.placeholders, latest)


MEDIA_CHATS = RecordKind(
    "media", check_media, placed_chat, answer_optional=True, media=media_of_record
)
prepare_media_chats = partial(prepare, kind=MEDIA_CHATS)
