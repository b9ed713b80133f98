"""transformers' own generate, for what the slot engine cannot hold: beam search, prefix tuning, and
models with caches of their own kind.

Letters: B rows, L prompt tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from ta.generation.settings import BROKEN
from ta.generation.slot_engine import Work, choose, left_pad
from ta.model.language_model import base_model


def _batches(
    inner, work: Work, n: int, rows: int, virtual: bool
) -> Iterator[list[tuple[int, int]]]:
    """(prompt, answer) of `n` answers to each prompt, in batches of prompts of like length.

    Of one length where padding would be penalised, or stand behind virtual tokens, or be seen by
    the model, or where limits differ.
    """
    config = work.ending.config
    short = any(limit < config.max_new_tokens for limit in work.limits)
    equal = (
        config.repetition_penalty != 1 or virtual or short or sees_padding(inner, base_model(inner))
    )
    length = lambda place: len(work.prompts[place[0]]) if equal else 0
    for _, alike in groupby(work.by_length(n), length):
        places = list(alike)
        for start in range(0, len(places), rows):
            yield places[start : start + rows]


def takes_positions(base) -> bool:
    """Whether a model is told the positions of its tokens; others count columns or real tokens."""
    return "position_ids" in inspect.signature(base.forward).parameters


def sees_padding(run: Callable, base) -> bool:
    """Whether padding before a prompt moves its logits, as in models that read no mask.

    run: what is called with the keyword arguments of the transformers model `base`.
    """
    table, ids = base.get_input_embeddings().weight, [2, 1, 3] * 4
    inputs = left_pad([ids, ids * 2], table.device)
    if not takes_positions(base):
        del inputs["position_ids"]
    padded = run(**inputs, use_cache=False).logits[0, -1].float()
    first = inputs["input_ids"][:1, -len(ids) :]
    alone = run(input_ids=first, use_cache=False).logits[0, -1].float()
    half = table.dtype.itemsize < 4 or torch.is_autocast_enabled(table.device.type)
    return not (padded - alone).norm() < (0.1 if half else 1e-3) * alone.norm()


def _computes_again(inner, work: Work, virtual: bool) -> bool:
    """Whether prompts are embeddings that the model's generate refuses.

    Every token then takes a pass over all tokens before it.
    """
    taken = inspect.signature(base_model(inner).prepare_inputs_for_generation).parameters
    return work.embeds is not None and (virtual or "inputs_embeds" not in taken)


def _inputs(work: Work, batch: Sequence[tuple[int, int]], device) -> dict[str, Tensor]:
    """The arguments of generate for a batch, but for positions, which it makes."""
    padded = left_pad([work.prompts[i] for i, _ in batch], device)
    if work.embeds is not None:
        padded |= left_pad([work.embeds[i] for i, _ in batch], device)
    del padded["position_ids"]
    return padded


def run_driven(inner, work: Work, temperature: float, virtual: bool) -> None:
    """transformers' generate runs the model and keeps its cache.

    Our own function chooses every token.

    temperature: of the model's own distribution. virtual: an adapter puts virtual tokens in front.
    """
    device, config = inner.device, work.ending.config
    again = _computes_again(inner, work, virtual)
    for batch in _batches(inner, work, config.num_answers, config.slots, virtual or again):
        rows = [work.row(*place) for place in batch]

        def pick(_, logits: Tensor, rows=rows) -> Tensor:
            """Choose the next token of every row, which is then the only one possible."""
            drawn, seen = None, None
            if config.temperature:
                drawn = torch.tensor([(*row.uniforms, 0.0)[len(row.ids)] for row in rows])
            if config.repetition_penalty != 1:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                for marks, row in zip(seen, rows, strict=True):
                    marks[[*work.prompts[row.prompt], *row.ids]] = True
            tokens, logprobs = choose(logits, drawn, seen, config)
            work.take(rows, tokens, logprobs)
            return torch.full_like(logits, -torch.inf).scatter(1, tokens[:, None], 0.0)

        inputs = _inputs(work, batch, device)
        while again and not all(row.ended for row in rows):
            embeds = inputs["inputs_embeds"]
            logits = inner(inputs_embeds=embeds, use_cache=False).logits[:, -1]
            tokens = pick(None, logits / temperature).argmax(-1, keepdim=True)
            new = inner.get_input_embeddings()(tokens)
            inputs["inputs_embeds"] = torch.cat([embeds, new], dim=1)
        if again:
            continue
        inner.generate(
            **inputs,
            max_new_tokens=max(row.limit for row in rows),
            do_sample=False,
            logits_processor=[TemperatureLogitsWarper(temperature), pick],
            stopping_criteria=[
                lambda *_, rows=rows: torch.tensor([row.ended for row in rows], device=device)
            ],
        )


def run_beams(inner, work: Work, temperature: float, virtual: bool) -> None:
    """transformers' beam search; log-probabilities from one more forward over each answer.

    temperature, virtual: as above. ValueError for logits that are no numbers, and for embeddings
    that the model's generate refuses.
    """

    def own(_, logps: Tensor) -> Tensor:
        """Log-probabilities of the next token under the model's own distribution."""
        if logps.isnan().any():
            raise ValueError(BROKEN)
        return logps if temperature == 1.0 else (logps / temperature).log_softmax(-1)

    device, ending, config = inner.device, work.ending, work.ending.config
    n, processors = config.num_answers, [own]
    if _computes_again(inner, work, virtual):
        raise ValueError(
            "beams: this model's search takes no pictures and sounds; leave beams at 1"
        )
    if config.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    rows = max(1, config.slots // config.beams)
    for batch in _batches(inner, work, 1, rows, virtual):
        inputs = _inputs(work, batch, device)
        width = inputs["input_ids"].shape[1]

        def stopped(rows: Tensor, _, width=width) -> Tensor:
            answers = rows[:, width:].tolist()
            ended = [bool(ids) and ending.reached(ids) for ids in answers]
            return torch.tensor(ended, device=device)

        out = inner.generate(
            **inputs,
            max_new_tokens=work.limits[batch[0][0]],
            num_beams=config.beams,
            num_return_sequences=n,
            logits_processor=processors,
            do_sample=False,
            eos_token_id=sorted(ending.stop_ids) or None,
            pad_token_id=min(ending.stop_ids, default=0),
            stopping_criteria=[stopped] if config.stop_strings else [],
        )
        for place, row in enumerate(out[:, width:].tolist()):
            prompt = batch[place // n][0]
            ends = (k for k in range(1, len(row) + 1) if ending.reached(row[:k]))
            ids = torch.tensor(row[: next(ends, len(row))], device=device)
            if work.embeds is None:
                before = torch.tensor(work.prompts[prompt], device=device)
                whole = {"input_ids": torch.cat([before, ids])[None]}
            else:
                tokens = inner.get_input_embeddings()(ids)
                before = work.embeds[prompt].to(device)
                whole = {"inputs_embeds": torch.cat([before, tokens])[None]}
            logits = inner(**whole, use_cache=False).logits[0, -len(ids) - 1 : -1]
            chosen = (logits.float() / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            work.finish(prompt, place % n, ids.tolist(), chosen.tolist())
