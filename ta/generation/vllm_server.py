"""A vLLM server as an engine of rollouts, or as a teacher: token ids in, token ids out.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

Its weights are changed by its own `reload_weights`, from a folder that both machines see, or by its
own weight transfer where it was started with --weight-transfer-config.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ta.chat.tokenizer import ChatTokenizer
from ta.data.batch import Batch, sequences_of
from ta.files import writing
from ta.generation.settings import Answer, Ending, GenerateConfig
from ta.generation.vllm_checks import refuse_settings
from ta.generation.vllm_engine import sampling_of
from ta.generation.weight_transfer import WeightTransfer
from ta.parallel import barrier, on_rank_zero, rank, whole_tensor

# seconds in which the server must answer
WAIT = 600
# encoded by both tokenizers, which must give the same ids
SAMPLE = 'The 12 quick foxes, naïve as "ever": {x: 3.14}\n\tумно 你好 🙂'


@dataclass
class VllmServer:
    """A running server that serves one model."""

    url: str
    # the name under which it serves
    model: str
    # tokens of prompt and answer at most
    context: int
    # where weights are handed over
    folder: Path | None = None
    # hands them over without a file
    transfer: WeightTransfer | None = None

    def post(self, path: str, **body: Any) -> Any:
        """The JSON that the server answers; ValueError with what it says of an error."""
        return _request(f"{self.url}/{path}", body)

    def put_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Put (name, tensor) in the place of all weights; what is cached of the old ones goes.

        All processes take part, since tensors may be sharded; the first one alone hands them over.
        """
        if rank():
            for _, tensor in weights:
                whole_tensor(tensor)
        else:
            (self.transfer.send if self.transfer else self._put_file)(weights)
            self.post("reset_prefix_cache")
        barrier()

    def _put_file(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        from safetensors.torch import save_file

        # tensors that are tied are written twice, which safetensors does not do by itself
        tensors = {
            name: whole_tensor(tensor).cpu().contiguous().clone() for name, tensor in weights
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing(self.folder / "model.safetensors") as path:
            save_file(tensors, path, {"format": "pt"})
        where = {"weights_path": str(self.folder.resolve())}
        self.post("collective_rpc", method="reload_weights", kwargs=where)

    def generate(
        self,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        config: GenerateConfig,
        stop_ids: Collection[int],
        keys: Sequence[int],
    ) -> list[list[Answer]]:
        """`generate` on the server: the same answers when greedy (to rounding)."""
        refuse_settings(config)
        if config.beams > 1:
            raise ValueError(f"--beams {config.beams}: a server searches no beams, leave it out")
        ending, n = Ending(tokenizer, frozenset(stop_ids), config), config.num_answers

        def ask(number: int) -> Answer:
            i, k = divmod(number, n)
            limit = min(config.max_new_tokens, self.context - len(prompts[i]))
            given = sampling_of(config, limit, stop_ids, keys[i], k)
            prompt = {"model": self.model, "prompt": list(prompts[i]), "return_token_ids": True}
            (choice,) = self.post("v1/completions", **prompt, **given)["choices"]
            return ending.answer(choice["token_ids"], choice["logprobs"]["token_logprobs"])

        with ThreadPoolExecutor(config.slots) as threads:
            answers = list(threads.map(ask, range(len(prompts) * n)))
        return [answers[i : i + n] for i in range(0, len(answers), n)]

    def logprobs(self, batch: Batch) -> Tensor:
        """(M,) log p of each learned token of a batch, by the weights that it serves."""

        def ask(ids: list[int]) -> list[float]:
            body = {"model": self.model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
            (choice,) = self.post("v1/completions", **body)["choices"]
            steps = zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)
            return [step[str(token)]["logprob"] for token, step in steps]

        with ThreadPoolExecutor(64) as threads:
            found = list(threads.map(ask, sequences_of(batch)))
        places = batch.positions.flatten()[batch.learned].tolist()
        values = [found[i][at] for i, at in zip(batch.owners.tolist(), places, strict=True)]
        return torch.tensor(values, device=batch.tokens.device)


def open_server(
    url: str, flag: str, tokenizer: ChatTokenizer, folder: Path | None = None
) -> VllmServer:
    """The server at a URL that `flag` gives; ValueError where none answers or it fits not.

    `folder` is where weights are handed over, if it gets any.
    """
    url = url.rstrip("/").removesuffix("/v1")
    try:
        (served, *_) = _request(f"{url}/v1/models")["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{flag} {url}: no vLLM server answers there ({error})") from None
    server = VllmServer(url, served["id"], served["max_model_len"], folder)
    body = {"model": server.model, "prompt": SAMPLE, "add_special_tokens": False}
    ours = tokenizer.fast.encode(SAMPLE, add_special_tokens=False)
    if server.post("tokenize", **body)["tokens"] != ours:
        raise ValueError(
            f"{flag} {url}: its tokenizer gives other ids, so tokens cannot be compared; "
            "give a server of the same vocabulary"
        )
    if folder is not None:
        server.transfer = on_rank_zero(partial(_transfer_to, server))
    return server


def _transfer_to(server: VllmServer) -> WeightTransfer | None:
    """The weight transfer that a server was started with, if it was."""
    config = _request(f"{server.url}/server_info?config_format=json")["vllm_config"]
    if (given := config["weight_transfer_config"]) is None:
        return None
    workers = _request(f"{server.url}/get_world_size")["world_size"]
    return WeightTransfer(server.url, given["backend"], workers, server.post)


def _request(address: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:300]
        hint = "; start it with VLLM_SERVER_DEV_MODE=1" if error.code == 404 else ""
        raise ValueError(f"{address} answers {error.code}{hint}: {said}") from None
    except OSError as error:
        raise ValueError(f"{address}: {error}") from None
    return json.loads(text) if text else None
