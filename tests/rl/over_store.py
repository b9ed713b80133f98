"""vLLM's NCCL weight transfer where no CUDA is: its communicator alone is another, which sends through the store at which trainer and workers have met."""

from types import SimpleNamespace


class Communicator:
    """In the place of vLLM's PyNcclCommunicator."""

    def __init__(self, group, device):
        self.group = group

    def broadcast(self, tensor, src, stream=None):
        tensor.copy_(self.group.broadcast(tensor, src))

    def destroy(self):
        pass


def register():
    """Called in the processes of a server, where it is a plugin, and by the test in the trainer's."""
    import torch
    import vllm.distributed.device_communicators.pynccl as pynccl
    from vllm.distributed.weight_transfer import packed_tensor

    pynccl.PyNcclCommunicator = Communicator
    stream = SimpleNamespace(synchronize=lambda: None)
    packed_tensor._get_streams = lambda device, number: [stream] * number
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.synchronize = lambda: None
