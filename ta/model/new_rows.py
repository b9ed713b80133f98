"""New tokens: add them to a tokenizer and start their embedding rows at the mean of a text that says what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class NewToken(NamedTuple):
    """One declared token: its text, its id, the ids whose rows are averaged into its own, and whether it was not there before."""

    text: str
    id: int
    pieces: tuple[int, ...]
    added: bool


def parse_init_token(text: str) -> tuple[str, str]:
    """`"<RS>=<s>"` -> `("<RS>", "<s>")`: split at the first `=`; ValueError when there is none or a side is empty."""
    token, equals, meaning = text.partition("=")
    if not equals or not token.strip() or not meaning:
        raise ValueError(
            f"new token {text!r}: needs a token, '=' and the text it starts from; give for example '<RS>=<s>'"
        )
    return token, meaning


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None, init_tokens: Sequence[str]
) -> list[NewToken]:
    """Add each `token=text` to the tokenizer and set its row in every table of `model` to the mean of the rows of the text's pieces.

    Both are changed in place; without a model only the tokenizer is (then `set_rows(model, new)` finishes the work). A token that the
    tokenizer has already keeps its id and its row, so adding twice is adding once. Everything is checked before anything is changed.
    Returns one NewToken per entry, in order. ValueError for a token or text that cannot work and for a tokenizer larger than the model.
    """
    pairs = [parse_init_token(text) for text in init_tokens]
    _check_pairs(pairs)
    known, vocabulary = tokenizer.get_added_vocab(), tokenizer.get_vocab()
    for token, _ in pairs:
        if token in vocabulary and token not in known:
            raise ValueError(
                f"new token {token!r}: is an ordinary piece of the vocabulary already; give another, such as '<{token}>'"
            )
    pieces = {token: _pieces(tokenizer, token, text) for token, text in pairs}
    if model is not None:
        check_vocabulary(tokenizer, model, besides=[token for token, _ in pairs])
    absent = [token for token, _ in pairs if token not in known]
    _extend(tokenizer, absent)
    ids = tokenizer.get_added_vocab()
    new = [NewToken(token, ids[token], pieces[token], token in absent) for token, _ in pairs]
    if model is not None:
        set_rows(model, new)
    return new


def set_rows(model: PreTrainedModel, new: Sequence[NewToken]) -> None:
    """Set the rows of the added tokens, and of those the tables have no row for, in the input and output tables (and the output bias).

    A table with spare rows is used as it is; a smaller one is enlarged, never shrunk. All other rows keep their bits.
    """
    import torch

    rows = min(table.shape[0] for table in tables(model).values())
    unset = [token for token in new if token.added or token.id >= rows]
    needed = max((token.id + 1 for token in unset), default=0)
    if needed > rows:
        resize(model, needed)
    with torch.no_grad():
        for table in tables(model).values():  # (V, D), and (V,) for an output bias
            means = [
                table[list(token.pieces)].float().mean(dim=0).to(table.dtype) for token in unset
            ]
            for token, mean in zip(unset, means, strict=True):
                table[token.id] = mean


def resize(model: PreTrainedModel, rows: int) -> None:
    """Enlarge the token tables of `model` to `rows`; the rows that were there keep their bits and the global random state stays."""
    import torch

    weight = model.get_input_embeddings().weight
    assert rows >= weight.shape[0], (rows, weight.shape)
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        model.resize_token_embeddings(rows, mean_resizing=False)


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, besides: Sequence[str] = ()
) -> None:
    """ValueError when the tokenizer can give an id that the embedding table has no row for; tokens in `besides` are not looked at."""
    rows = min(table.shape[0] for table in tables(model).values())
    token, size = max(
        ((token, id + 1) for token, id in tokenizer.get_vocab().items() if token not in besides),
        key=lambda t: t[1],
    )
    if size > rows:
        raise ValueError(
            f"the tokenizer has ids up to {size - 1} ({token!r}), but the embedding table of the model has {rows} rows: it would need {size}; "
            "give the tokenizer that belongs to the model, or declare the further tokens with --init-tokens 'token=text'"
        )


def tables(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors with one row a token: input (V, D), output (V, D) where it is another tensor, output_bias (V,) where there is one."""
    found = {"input": model.get_input_embeddings().weight}
    output = model.get_output_embeddings()
    if output is not None and output.weight is not found["input"]:
        found["output"] = output.weight
    if getattr(output, "bias", None) is not None:
        found["output_bias"] = output.bias
    return found


def _check_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    tokens = [token for token, _ in pairs]
    for token, text in pairs:
        if tokens.count(token) > 1:
            raise ValueError(
                f"new token {token!r}: is given more than once; give each token one text"
            )
        if token != token.strip():
            raise ValueError(
                f"new token {token!r}: begins or ends with white space, which tokenizers strip; give it without"
            )
        if inside := [other for other in tokens if other in text]:
            raise ValueError(
                f"new token {token!r}: its text {text!r} contains the new token {inside[0]!r}; give a text of known words"
            )


def _pieces(tokenizer: PreTrainedTokenizerBase, token: str, text: str) -> tuple[int, ...]:
    """The ids of `text` by the tokenizer as it is; one id when the text is a token that was added to it, such as "<s>"."""
    added = tokenizer.get_added_vocab()
    ids = [added[text]] if text in added else tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"new token {token!r}: its text {text!r} encodes to no token; give a text with words in it"
        )
    if text not in added and set(ids) == {tokenizer.unk_token_id}:
        raise ValueError(
            f"new token {token!r}: its text {text!r} is unknown to the tokenizer; give a text of known words"
        )
    return tuple(ids)


def _extend(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    for token in tokens:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if ids != [tokenizer.get_added_vocab()[token]]:
            raise ValueError(
                f"new token {token!r}: another token takes a part of it (ids {ids}); give a text that no other token begins"
            )
