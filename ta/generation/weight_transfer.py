"""vLLM's own weight transfer: weights go from this process to a server's workers, without a file.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs \
        --weight-transfer-config '{"backend": "nccl"}'
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ta.generation.vllm_checks import INSTALL

if TYPE_CHECKING:
    from torch import Tensor


class WeightTransfer:
    """The trainer's end of vLLM's transfer: number 0 of its group, before the server's workers.

    To vLLM's own engine it is the module whose parameters go, and the client that tells the server.
    """

    def __init__(self, url: str, backend: str, workers: int, post: Callable[..., Any]):
        """Meet the workers of the server at a URL; `post(path, **body)` asks it, as VllmServer's.

        ValueError: another backend than nccl; no vLLM or CUDA device here; what the server says.
        """
        import torch

        self.begun = begun = f"{url} was started with --weight-transfer-config"
        if backend != "nccl":
            raise ValueError(f"{begun} of {backend!r}: give nccl, or leave it out")
        if find_spec("vllm") is None:
            raise ValueError(f"{begun}, which needs vLLM here too: leave it out, or {INSTALL}")
        if not torch.accelerator.is_available():
            raise ValueError(f"{begun} of nccl, which needs a CUDA device here too: leave it out")
        from vllm.distributed.weight_transfer import ModuleSource, WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self.post, self.weights = post, []
        about = NCCLTrainerInitInfo(*_free_address(url), world_size=workers + 1, rank=0)
        begin = partial(WeightTransferTrainerFactory.trainer_init, about)
        self.engine = self._outcome_of(partial(begin, client=self, source=ModuleSource(self)))

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Put (name, tensor) in the place of all weights; ValueError with what the server says."""
        self.weights = list(weights)
        self._outcome_of(self.engine.send_weights)
        self.weights = []

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """The (name, tensor) that are sent."""
        return self.weights

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let the workers join."""
        self._tell("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        """Let the workers expect weights."""
        self._tell("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let the workers receive weights, until all have them."""
        self._tell("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let the workers answer with the new weights."""
        self._tell("finish_weight_update", weight_version=weight_version)

    def _tell(self, path: str, **body: Any) -> None:
        try:
            self.post(path, **body)
        except ValueError as error:
            self.outcomes.put(error)
            raise

    def _outcome_of(self, act: Callable[[], Any]) -> Any:
        """What `act` gives; ValueError where it fails, or what it tells the server does."""
        outcomes = self.outcomes = SimpleQueue()

        def put() -> None:
            try:
                outcomes.put(act())
            except Exception as error:
                outcomes.put(error)

        # it waits for the workers, also where the server has refused
        Thread(target=put, daemon=True).start()
        outcome = outcomes.get()
        if isinstance(outcome, Exception):
            raise ValueError(f"{self.begun}, but no weights go: {outcome}")
        return outcome


def _free_address(url: str) -> tuple[str, int]:
    """An address of this machine on the way to a server, and a port that is free there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        # nothing is sent
        way.connect((urlsplit(url).hostname, 9))
        address, _ = way.getsockname()
    with socket.socket() as free:
        free.bind((address, 0))
        return free.getsockname()
