"""transformers' own generate, for what the slot engine cannot hold: beam search, prefix tuning, and
models with caches of their own kind.

Letters: B rows, L prompt tokens, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ta.generation.slot_engine import choose, left_pad, uniforms


def _batches(prompts, jobs, config, rows: int, virtual: bool) -> Iterator[list[int]]:
    """Jobs in batches of like length.

    Of one length where padding would be penalised, or stand behind virtual tokens, or where limits
    differ.
    """
    equal = (
        config.repetition_penalty != 1
        or virtual
        or any(job.limit < config.max_new_tokens for job in jobs)
    )
    order = sorted(range(len(jobs)), key=lambda j: len(prompts[jobs[j].prompt]))
    batch: list[int] = []
    for j in order:
        if batch and (
            len(batch) == rows
            or (equal and len(prompts[jobs[j].prompt]) != len(prompts[jobs[batch[0]].prompt]))
        ):
            yield batch
            batch = []
        batch.append(j)
    if batch:
        yield batch


def _inputs(prompts, jobs, batch, embeds, device) -> dict:
    chosen = [jobs[j].prompt for j in batch]
    padded = left_pad([prompts[i] for i in chosen], device)
    padded.pop("position_ids")  # generate makes its own of the mask
    if embeds is not None:
        padded["inputs_embeds"] = left_pad([embeds[i] for i in chosen], device)["inputs_embeds"]
    return padded


def run_driven(inner, prompts, jobs, config, sampling, advance, finished, embeds, virtual) -> None:
    """transformers' generate runs the model and keeps its cache.

    Our own function chooses every token.

    virtual: an adapter puts virtual tokens in front.
    """
    device = next(inner.parameters()).device
    for batch in _batches(prompts, jobs, config, config.slots, virtual):
        ids, logprobs, done = [[] for _ in batch], [[] for _ in batch], [False] * len(batch)
        draws = [(*uniforms(jobs[j], sampling), 0.0) for j in batch]

        def pick(_, logits, batch=batch, ids=ids, logprobs=logprobs, done=done, draws=draws):
            """The next token of every row (transformers' step), which is noted with its
            log-probability.
            """
            drawn = (
                torch.tensor([draw[len(row)] for draw, row in zip(draws, ids, strict=True)])
                if config.temperature
                else None
            )
            seen = None
            if config.repetition_penalty != 1:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                for row, j in enumerate(batch):
                    seen[
                        row, torch.tensor([*prompts[jobs[j].prompt], *ids[row]], dtype=torch.long)
                    ] = True
            tokens, logps = choose(logits, drawn, seen, sampling)
            for row, (token, logp) in enumerate(zip(tokens.tolist(), logps.tolist(), strict=True)):
                if not done[row]:
                    ids[row].append(token)
                    logprobs[row].append(logp)
                    done[row] = (
                        advance(batch[row], ids[row]) or len(ids[row]) == jobs[batch[row]].limit
                    )
            return torch.full_like(logits, -torch.inf).scatter(1, tokens[:, None], 0.0)

        inner.generate(
            **_inputs(prompts, jobs, batch, embeds, device),
            max_new_tokens=max(jobs[j].limit for j in batch),
            do_sample=False,
            logits_processor=[pick],
            stopping_criteria=[lambda _, __, done=done: torch.tensor(done, device=device)],
        )
        for row, j in enumerate(batch):
            finished(j, ids[row], logprobs[row])


def run_beams(inner, prompts, jobs, config, ending, finished, embeds, virtual) -> None:
    """transformers' beam search; log-probabilities from one more forward over each answer."""
    device = next(inner.parameters()).device
    firsts = jobs[:: config.num_answers]
    for batch in _batches(prompts, firsts, config, max(1, config.slots // config.beams), virtual):
        inputs = _inputs(prompts, firsts, batch, embeds, device)
        width = inputs["input_ids"].shape[1]

        def stopped(rows, _, width=width):
            return torch.tensor(
                [bool(row[width:]) and ending.reached(row[width:]) for row in rows.tolist()],
                device=device,
            )

        out = inner.generate(
            **inputs,
            max_new_tokens=firsts[batch[0]].limit,
            num_beams=config.beams,
            num_return_sequences=config.num_answers,
            repetition_penalty=config.repetition_penalty,
            do_sample=False,
            eos_token_id=sorted(ending.stop_ids) or None,
            pad_token_id=min(ending.stop_ids, default=0),
            stopping_criteria=[stopped] if config.stop_strings else [],
        )
        for n, row in enumerate(out[:, width:].tolist()):
            prompt = batch[n // config.num_answers]
            ends = (k for k in range(1, len(row) + 1) if ending.reached(row[:k]))
            ids = row[: next(ends, len(row))]
            before = {"input_ids": torch.tensor([[*prompts[prompt], *ids]], device=device)}
            if embeds is not None:
                table = inner.get_input_embeddings()
                before = {
                    "inputs_embeds": torch.cat(
                        [embeds[prompt].to(device), table(torch.tensor(ids, device=device))]
                    )[None]
                }
            logits = inner(**before, use_cache=False).logits[0, -len(ids) - 1 : -1].float()
            chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids, device=device)[:, None])[
                :, 0
            ]
            finished(prompt * config.num_answers + n % config.num_answers, ids, chosen.tolist())
