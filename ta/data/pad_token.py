"""A padding token that ends no sequence, for models that score the last token.

transformers reads a score at the last token that is not padding, also of a text without padding:
where the token that ends a text is the padding token, it would read another place than training.
"""

from __future__ import annotations

from ta.chat.template import export_template
from ta.chat.tokenizer import ChatTokenizer, add_tokens
from ta.data.prepare import Prepared
from ta.parallel import say

# what is added to a tokenizer that has no token to spare
PAD = "<|pad|>"


def with_own_pad_token(tokenizer: ChatTokenizer, *data: Prepared | None) -> ChatTokenizer:
    """The tokenizer with a padding token that ends no sequence of `data`; None is no data.

    Its own is kept where it ends none. Otherwise another of its special tokens takes that part, or
    one is added, and a line says which.
    """
    fast = tokenizer.fast
    ends: set[int] = set()
    for prepared in data:
        if prepared is not None:
            ends.update(prepared.ids[prepared.offsets[1:] - 1].tolist())
    if fast.pad_token_id is not None and fast.pad_token_id not in ends:
        return tokenizer
    before, new = fast.pad_token, list(tokenizer.new_tokens)
    spare = _spare_tokens(tokenizer, ends)
    if not spare:
        new += add_tokens(fast, [f"{PAD}={fast.convert_ids_to_tokens(min(ends))}"])
        spare = [PAD]
    fast.pad_token = spare[0]
    why = "the tokenizer has none" if before is None else f"{before} ends texts here"
    say(
        f"padding is {fast.pad_token}, as {why} and transformers reads scores at the last token "
        f"that is not padding; a base under an adapter needs config.pad_token_id = "
        f"{fast.pad_token_id}"
    )
    return tokenizer._replace(new_tokens=new)


def _spare_tokens(tokenizer: ChatTokenizer, ends: set[int]) -> list[str]:
    """Special tokens that end no sequence and that no text holds, the likeliest first."""
    fast, template = tokenizer.fast, export_template(tokenizer.template)
    named = (fast.bos_token, fast.eos_token)
    spare = [
        token.content
        for id, token in sorted(fast.added_tokens_decoder.items())
        if token.special
        and id not in ends
        and token.content != fast.unk_token
        and token.content not in tokenizer.vocabulary.content
        and (token.content in named or token.content not in template)
    ]
    return sorted(spare, key=lambda text: (text in named, "pad" not in text.lower()))
