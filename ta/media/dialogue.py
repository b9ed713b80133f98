"""Pictures and sounds in chats: placeholder text for each, and those that a cut dialogue keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ta.chat.encode import Drop, encode_prompts
from ta.chat.jinja import Arguments
from ta.chat.messages import Message, parts_of
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import ChatTokenizer, Placeholder
from ta.data.jsonl import BadRecord
from ta.data.prepare import RecordKind
from ta.data.records import check_media

Media = list[tuple[str, str]]  # (modality, path as the record gives it), in the order of the text


def place_media(
    messages: Sequence[Message], placeholders: Mapping[str, Placeholder]
) -> list[Message]:
    """The messages with placeholder text where a picture or sound stood.

    Such a message carries `parts`, its text cut into (text, what it stands for): (modality, path)
    of a picture or sound, or None. Only there do media tokens count, whatever users type. BadRecord
    for a modality without a placeholder and for a file that cannot be used.
    """
    placed = []
    for message in messages:
        texts = []
        for part in parts_of(message):
            kind, content = part["type"], part["content"]
            if kind == "text":
                texts.append((content, None))
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
            texts.append((placeholders[kind].text, (kind, content)))
        rest = {key: value for key, value in message.items() if key != "type"}
        if isinstance(message["content"], list) or any(media for _, media in texts):
            rest |= {"content": "".join(text for text, _ in texts), "parts": texts}
        placed.append(rest)
    return placed


def kept_media(
    placed: Sequence[Message], ids: list[int], tokenizer: ChatTokenizer, latest: bool
) -> Media:
    """Those of the pictures and sounds in placed messages whose placeholders stand in `ids`.

    Cutting takes whole messages from one end, and neither system messages nor trailing ones hold
    media: the first ones are left, or with `latest` the last.
    """
    media = [item for message in placed for _, item in message.get("parts", ()) if item]
    total = sum(ids.count(known.id) // known.count for known in tokenizer.placeholders.values())
    return media[len(media) - total :] if latest else media[:total]


def media_of_prompt(chat: Sequence[Message], ids: list[int], tokenizer: ChatTokenizer) -> Media:
    """Those of the chat's pictures and sounds that stand in the token ids of its prompt."""
    return kept_media(place_media(chat, tokenizer.placeholders), ids, tokenizer, latest=True)


def encode_media_prompts(
    chats: Sequence[Sequence[Message]],
    tokenizer: ChatTokenizer,
    config: ChatConfig,
    arguments: Sequence[Arguments] | None = None,
) -> list[list[int] | Drop]:
    """Token ids of each chat's prompt, pictures and sounds as placeholders, or a Drop."""
    placed = [place_media(chat, tokenizer.placeholders) for chat in chats]
    return encode_prompts(placed, tokenizer, config, arguments)


def placed_chat(record: dict, tokenizer: ChatTokenizer) -> list[list[Message]]:
    """The record's messages, with placeholders for pictures and sounds, as one dialogue."""
    return [place_media(record["messages"], tokenizer.placeholders)]


MEDIA_CHATS = RecordKind("media", check_media, placed_chat, answer_optional=True, media=kept_media)
prepare_media_chats = MEDIA_CHATS.prepare
