"""vLLM as an engine of `generate` and `score`: token ids in, the same answers out.

What vLLM cannot honour is refused, never dropped.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from ta.chat.render import Tokens
from ta.flags import changed_settings
from ta.folders import ModelConfig, model_folder, resolve
from ta.generation.settings import (
    Answer,
    Ending,
    GenerateConfig,
    VllmConfig,
    VllmModelConfig,
    check_prompts,
    context_of,
)
from ta.generation.vllm_checks import (
    check_head,
    check_installed,
    check_parallel,
    check_tables,
    lora_rank,
    refuse_settings,
)
from ta.model.load import cast_parameters, load_for_inference
from ta.parallel import world

AT_ONCE = 1024  # requests handed over together: what a killed run loses at most
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of a LoRA adapter that vLLM makes room for


def check_engine(
    engine: str,
    *groups: VllmConfig | VllmModelConfig,
    settings: Iterable[GenerateConfig] = (),
) -> None:
    """ValueError where vLLM's settings are given to another engine (hf, or the URL of a server).

    Also where torchrun started several processes of vLLM, and for `settings` of generation that
    vLLM would change.
    """
    if engine not in ("hf", "vllm") and not engine.startswith(("http://", "https://")):
        raise ValueError(f"--engine {engine}: give hf, vllm, or the URL of a vLLM server")
    if engine == "vllm" and world() > 1:
        raise ValueError(
            "vLLM starts its own processes: run it without torchrun, with --tensor-parallel-size"
        )
    for generation in settings if engine == "vllm" else ():
        refuse_settings(generation)
    for group in groups if engine != "vllm" else ():
        for name in changed_settings(group):
            raise ValueError(
                f"--{name.replace('_', '-')} is a setting of vLLM: add --engine vllm, "
                "or leave it out"
            )


@dataclass
class VllmEngine:
    """A running vLLM; keep it open for several settings."""

    llm: Any
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    context: int
    lora: Any = None
    # the temporary folder of merged weights and tokenizer, deleted with the engine
    folder: Any = field(default=None, repr=False)

    def put_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Put (name, tensor) in the place of all weights of an engine started for rollouts.

        The names are those of the model's folder, a tied head's beside its table's. What is cached
        of the old weights is dropped.
        """
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.llm.reset_prefix_cache()


def start_vllm(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: VllmConfig,
    how: VllmModelConfig = VllmModelConfig(),  # noqa: B008 it is frozen
    *,
    seed: int = 0,
    num_labels: int = 0,
    embeds: bool = False,
    rollouts: bool = False,
) -> VllmEngine:
    """Start vLLM on the folders that `model` names, in the dtype that the hf engine would use.

    With `rollouts` it runs in this process, `put_weights` changes its weights, and
    log-probabilities are those after temperature. An adapter is merged into its base or applied at
    run time. With `num_labels` the model is a classifier or reward model, for `score`; with
    `embeds` prompts are given as embeddings.
    ValueError: vLLM is not installed; a tensor-parallel size that the model cannot be cut by; an
    adapter that vLLM cannot apply; a head that it reads otherwise; a model that it does not run.
    """
    check_installed()
    if model.model_args:
        raise ValueError(
            f"--model-args {' '.join(model.model_args)} are arguments of transformers, "
            "which vLLM does not take: give --engine hf"
        )
    cuda = torch.cuda.is_available()
    dtype = {"auto": "bfloat16" if cuda else "float32"}.get(model.dtype, model.dtype)
    if dtype == "float64":
        raise ValueError("--dtype float64 is not in vLLM: give float32 or bfloat16, or --engine hf")
    sources = resolve(model)
    folder = model_folder(sources.base, model.hub)
    settings = AutoConfig.from_pretrained(
        folder, local_files_only=not model.hub, trust_remote_code=model.trust_remote_code
    )
    check_parallel(settings.get_text_config(decoder=True), how.tensor_parallel_size)
    temporary = tempfile.TemporaryDirectory(prefix="ta-vllm-")
    lora, more = None, {}
    if embeds:
        more["enable_prompt_embeds"] = True
    if rollouts:
        more["logprobs_mode"] = "processed_logprobs"
    if num_labels:
        check_head(settings)
        more["runner"] = "pooling"
    if sources.adapter is not None:
        rank = lora_rank(sources.adapter, how.adapter_in_vllm == "runtime")
        if how.adapter_in_vllm == "runtime":
            lora = sources.adapter
            room = next((known for known in RANKS if known >= rank), rank)
            more |= {"enable_lora": True, "max_lora_rank": room}
        else:
            folder = temporary.name
            _merge(model, getattr(torch, dtype), folder, num_labels)
    check_tables(folder)
    if folder != temporary.name:
        # vLLM looks for it beside the tokenizer, and waits
        settings.save_pretrained(temporary.name)
    tokenizer.save_pretrained(temporary.name)  # with its new tokens, wherever the weights lie
    # vLLM takes these from the environment alone
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if rollouts or (not cuda and how.tensor_parallel_size == 1):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a minute less to start
    memory = config.kv_cache_gb if config.kv_cache_gb is not None or cuda else 1.0
    if memory is not None:
        more["kv_cache_memory_bytes"] = int(memory * 2**30)
    llm = _start(
        model=folder,
        tokenizer=temporary.name,
        dtype=dtype,
        seed=seed,
        tensor_parallel_size=how.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_model_len=config.max_model_len,
        enforce_eager=config.enforce_eager or not cuda,
        generation_config="vllm",  # a model's own sampling settings must not leak in
        max_logprobs=-1,  # beam search asks for as many as it needs
        trust_remote_code=model.trust_remote_code,
        **more,
    )
    about = llm.llm_engine.model_config
    limits = (context_of(settings), config.max_model_len, about.max_model_len)
    request = None
    if lora is not None:
        from vllm.lora.request import LoRARequest

        request = LoRARequest("adapter", 1, str(Path(lora).resolve()))
    context = min(filter(None, limits))
    return VllmEngine(llm, tokenizer, about.get_vocab_size(), context, request, temporary)


def _merge(model: ModelConfig, dtype: torch.dtype, folder: str, num_labels: int) -> None:
    """Write the model with its adapter merged in float32 into `folder`, in `dtype`."""
    exact = replace(model, dtype="float32")
    merged = load_for_inference(exact, num_labels=num_labels or None)
    cast_parameters(merged, dtype)
    merged.save_pretrained(folder)


def _start(**arguments: Any) -> Any:
    try:
        from vllm import LLM

        return LLM(**arguments)
    except (ValueError, RuntimeError, AssertionError, KeyError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ValueError(
            f"vLLM does not run {arguments['model']}: {reason.strip()}; --engine hf may"
        ) from error


def generate_vllm(
    engine: VllmEngine,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    stop_ids: Collection[int],
    on_answer: Callable[[int, list[Answer]], None] | None = None,
    embeds: Sequence[Tensor] | None = None,
    keys: Sequence[int] | None = None,
) -> list[list[Answer]]:
    """`generate` on a running vLLM, which calls this: the same answers when greedy (to rounding).

    Sampling has other random numbers, seeded alike. embeds: for each prompt (L, D) in place of its
    tokens' embeddings, on an engine started for them.
    """
    refuse_settings(config, embeds is not None)
    # an exception inside an engine's step would hang the next call
    check_prompts(prompts, engine.vocabulary, engine.context)
    limits = [min(config.max_new_tokens, engine.context - len(prompt)) for prompt in prompts]
    ending = Ending(engine.tokenizer, frozenset(stop_ids), config)
    run = _sample if config.beams == 1 else _search
    keys = range(len(prompts)) if keys is None else keys
    answers: list[list[Answer]] = []
    at_once = max(1, AT_ONCE // max(config.num_answers, config.beams))
    for start in range(0, len(prompts), at_once):
        part = slice(start, start + at_once)
        if embeds is None:
            requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts[part]]
        else:
            requests = [{"prompt_embeds": rows.cpu()} for rows in embeds[part]]
        results = run(engine, requests, limits[part], config, stop_ids, keys[part])
        for i, generated in enumerate(results, start):
            answers.append([ending.answer(ids, logprobs) for ids, logprobs in generated])
            if on_answer is not None:
                on_answer(i, answers[-1])
    return answers


# For each prompt its answers, each as (ids, log-probabilities)
Generated = list[list[tuple[list[int], list[float]]]]


def _sample(engine, prompts, limits, config, stop_ids, numbers) -> Generated:
    """Greedy decoding or sampling; `numbers` seed what each prompt gets."""
    from vllm import SamplingParams

    n, cut = config.num_answers, bool(config.stop_strings)
    requests = [prompt for prompt in prompts for _ in range(n)]
    parameters = [
        SamplingParams(**sampling_of(config, limit, stop_ids, number, k), detokenize=cut)
        for limit, number in zip(limits, numbers, strict=True)
        for k in range(n)
    ]
    made = engine.llm.generate(requests, parameters, lora_request=engine.lora, use_tqdm=False)
    outputs = iter([request.outputs[0] for request in made])
    return [[_answer_of(next(outputs)) for _ in range(n)] for _ in prompts]


def sampling_of(
    config: GenerateConfig, limit: int, stop_ids: Collection[int], number: int, k: int
) -> dict[str, Any]:
    """vLLM's parameters for answer `k` of at most `limit` tokens to a prompt seeded by `number`."""
    seed = hashlib.blake2b(f"{config.seed} {number} {k}".encode(), digest_size=4).digest()
    return {
        "max_tokens": limit,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "repetition_penalty": config.repetition_penalty,
        "seed": int.from_bytes(seed) if config.temperature else None,
        "stop": list(config.stop_strings),
        "stop_token_ids": sorted(stop_ids),
        # the ids given end an answer, and no others
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 0,
    }


def _search(engine, prompts, limits, config, stop_ids, numbers) -> Generated:
    """Beam search as transformers does it: vLLM gives the next tokens, the beams are kept here.

    Ended beams are ranked by their log-probability a token of the answer. vLLM's own search divides
    by the tokens of prompt and answer, which favours early ends.
    """
    from vllm import SamplingParams

    width = config.beams
    kept = max(2, 1 + len(stop_ids)) * width
    next_token = SamplingParams(max_tokens=1, temperature=0, logprobs=kept, detokenize=False)

    def rank(beam: tuple[list[int], list[float]]) -> float:
        return sum(beam[1]) / len(beam[1])

    running: Generated = [[([], [])] for _ in prompts]
    ended: Generated = [[] for _ in prompts]
    while live := [(i, beam) for i, beams in enumerate(running) for beam in beams]:
        requests = [
            {"prompt_token_ids": prompts[i]["prompt_token_ids"] + ids} for i, (ids, _) in live
        ]
        done = engine.llm.generate(requests, next_token, lora_request=engine.lora, use_tqdm=False)
        running = [[] for _ in prompts]
        for (i, (ids, logprobs)), result in zip(live, done, strict=True):
            running[i] += [
                ([*ids, token], [*logprobs, entry.logprob])
                for token, entry in result.outputs[0].logprobs[0].items()
            ]
        for i in {i for i, _ in live}:
            beams = sorted(running[i], key=rank, reverse=True)[:kept]
            last = len(beams[0][0]) == limits[i]
            complete = [beam for beam in beams[:width] if last or beam[0][-1] in stop_ids]
            ended[i] = sorted(ended[i] + complete, key=rank, reverse=True)[:width]
            going = [] if last else [beam for beam in beams if beam[0][-1] not in stop_ids]
            running[i] = going[:width]
            full = len(ended[i]) == width
            if full and running[i] and rank(running[i][0]) <= rank(ended[i][-1]):
                running[i] = []
    return [beams[: config.num_answers] for beams in ended]


def _answer_of(output: Any) -> tuple[list[int], list[float]]:
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return list(output.token_ids), [step[token].logprob for token, step in steps]


def score_vllm(engine: VllmEngine, sequences: Sequence[Tokens]) -> list[list[float]]:
    """`score` on an engine started with `num_labels`, which calls this."""
    from vllm import PoolingParams

    check_prompts([tokens.ids for tokens in sequences], engine.vocabulary, engine.context, room=0)
    requests = [{"prompt_token_ids": list(tokens.ids)} for tokens in sequences]
    plain = PoolingParams(use_activation=False)
    return [
        done.outputs.data.double().tolist()
        for done in engine.llm.encode(requests, plain, pooling_task="classify", use_tqdm=False)
    ]
