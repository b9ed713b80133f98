"""A CUDA device without a GPU: tensors say `cuda`, and kernels of the CPU compute on memory of the host.

It refuses what a GPU refuses and counts what makes the host wait; nothing here is fast. `EMULATED_GPU=1` with this folder on
PYTHONPATH gives every Python process such a device (sitecustomize.py), so that recipes and tests marked gpu run on it:

    EMULATED_GPU=1 PYTHONPATH=tests/emulated_gpu python -m pytest -m gpu

A process that ends writes what it counted into the file EMULATED_GPU_LOG, where that is set, as lines of JSON. A compiler of C++ (c++) and torch built for CPUs alone are needed.
Left out: Triton, so also torch.compile, quantized kernels, memory figures, and several devices a process.
"""

import atexit
import collections
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KINDS = ("wait", "pageable", "race")
counts: collections.Counter = collections.Counter()


def build() -> Path:
    """The compiled device, made once for this torch; FileNotFoundError without a compiler."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    source = HERE / "gpu.cpp"
    version = (torch / "version.py").read_bytes() + str(torch).encode()
    key = hashlib.sha256(source.read_bytes() + version).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"emulated-gpu-{os.getuid()}-{key}.so"
    if not library.exists():
        aside = library.with_suffix(f".{os.getpid()}")
        includes = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
        libraries = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu"]
        command = ["c++", "-shared", "-fPIC", "-std=c++20", "-O1", *includes, str(source)]
        subprocess.run([*command, "-o", str(aside), *libraries], check=True, capture_output=True)
        aside.replace(library)
    return library


def load() -> ctypes.CDLL:
    """The device, registered before anything asks torch for one."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    for needed in [*(torch / "lib").glob("libgomp*"), torch / "lib/libc10.so"]:
        ctypes.CDLL(str(needed), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(torch / "lib/libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    library = str(build())
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # it tells of each kernel that takes the place of another
        try:
            gpu = ctypes.CDLL(library)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    gpu.gpu_record.restype = ctypes.c_void_p
    gpu.gpu_replay.argtypes = [ctypes.c_void_p]
    for name in ("gpu_replay", "gpu_is_strict"):
        getattr(gpu, name).restype = ctypes.c_bool
    for name in ("gpu_set_strict", "gpu_set_quiet"):
        getattr(gpu, name).argtypes = [ctypes.c_bool]
    gpu.gpu_seed.argtypes = [ctypes.c_uint64]
    gpu.gpu_resize.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return gpu


def caller() -> str:
    """The line of ours that asked, as folder/file.py:function."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "ta") or path.is_relative_to(ROOT / "recipes"):
            return f"{path.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def install() -> None:
    """Give this process its device; before torch is imported."""
    gpu = load()
    import torch

    @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p)
    def heard(kind, what):
        counts[KINDS[kind], what.decode(), caller()] += 1

    gpu.heard = heard  # lives as long as the device
    gpu.gpu_listen(heard)
    set_cuda(torch, gpu)
    set_storage(torch, gpu)
    set_attention(torch, gpu)
    set_collectives(torch)
    if log := os.environ.get("EMULATED_GPU_LOG"):
        leave = os._exit

        def written_then_left(code):
            write(log)
            leave(code)

        # a process of a group ends by this, others by their last handler
        os._exit = written_then_left
        atexit.register(write, log)


def write(path: str) -> None:
    with open(path, "a") as file:
        for (kind, what, where), times in counts.items():
            line = {"kind": kind, "what": what, "where": where, "times": times}
            file.write(json.dumps(line) + "\n")


def set_cuda(torch, gpu) -> None:
    """torch.cuda and torch.accelerator, as far as they are used: one stream, and graphs that record operators."""
    cuda = torch.cuda
    rank = int(os.environ.get("LOCAL_RANK", "0"))

    def synchronize(*device):
        counts["wait", "synchronize", caller()] += 1
        gpu.gpu_settle()

    class Event:
        def __init__(self, *how, **more):
            pass

        def record(self, *stream):
            pass

        wait = record

        def synchronize(self):
            counts["event", "synchronize", caller()] += 1
            gpu.gpu_settle()

        def query(self):
            return True

        def elapsed_time(self, end):
            return 1.0

    class Stream:
        device = torch.device("cuda", rank)
        cuda_stream = 0

        def __init__(self, *how, **more):
            pass

        def wait_stream(self, other):
            pass

        wait_event = wait_stream

        def record_event(self, *event):
            return Event()

        def is_capturing(self):
            return False

        def synchronize(self):
            synchronize()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    class Graph:
        launches = None

        def replay(self):
            if not gpu.gpu_replay(self.launches):
                raise RuntimeError("a recorded operator failed")

    @contextlib.contextmanager
    def recorded(graph, *how, **more):
        graph.launches = gpu.gpu_record()
        try:
            yield
        finally:
            gpu.gpu_recorded()

    def available():
        return os.environ.get("CUDA_VISIBLE_DEVICES") != ""

    memory = 80 << 30
    properties = types.SimpleNamespace(
        name="emulated", total_memory=memory, major=9, minor=0, multi_processor_count=132
    )
    nothing = lambda: lambda *how, **more: None
    state = torch.zeros(16, dtype=torch.uint8)
    replaced = {
        "init": nothing(),
        "_lazy_init": nothing(),
        "is_available": available,
        "is_initialized": lambda: available(),
        "is_bf16_supported": lambda *how, **more: True,
        "device_count": lambda: available() * int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": lambda: rank,
        "set_device": nothing(),
        "device": lambda device: contextlib.nullcontext(),
        "get_device_name": lambda *device: properties.name,
        "get_device_capability": lambda *device: (9, 0),
        "get_device_properties": lambda *device: properties,
        "mem_get_info": lambda *device: (memory, memory),
        "memory_stats": lambda *device: {},
        "memory_allocated": lambda *device: 1 << 20,
        "max_memory_allocated": lambda *device: 1 << 20,
        "memory_reserved": lambda *device: 1 << 20,
        "max_memory_reserved": lambda *device: 1 << 20,
        "reset_peak_memory_stats": nothing(),
        "empty_cache": nothing(),
        "synchronize": synchronize,
        "manual_seed": lambda seed: gpu.gpu_seed(seed % 2**64),
        "manual_seed_all": lambda seed: gpu.gpu_seed(seed % 2**64),
        "get_rng_state": lambda *device: state.clone(),
        "set_rng_state": nothing(),
        "get_rng_state_all": lambda: [state.clone()],
        "set_rng_state_all": nothing(),
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda *device: Stream(),
        "default_stream": lambda *device: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": recorded,
        "graph_pool_handle": nothing(),
        "get_sync_debug_mode": lambda: 2 * gpu.gpu_is_strict(),
        "set_sync_debug_mode": lambda mode: gpu.gpu_set_strict(mode in (2, "error")),
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    torch.Event = Event
    # functions of their own: the compiler has a rule for each name
    torch.accelerator.current_stream = lambda *device: Stream()
    torch.accelerator.synchronize = lambda *device: synchronize()
    torch.accelerator.current_device_index = lambda: rank


def set_storage(torch, gpu) -> None:
    """What storages do in code for CUDA alone."""
    resize, clone = torch.UntypedStorage.resize_, torch.UntypedStorage.clone

    def resize_(self, size):
        if self.device.type != "cuda":
            return resize(self, size)
        if size != self.nbytes():
            gpu.gpu_resize(self._cdata, size)
        return self

    def cloned(self):
        if self.device.type != "cuda":
            return clone(self)
        whole = torch.empty(0, dtype=torch.uint8, device=self.device)
        return whole.set_(self, 0, (self.nbytes(),), (1,)).clone().untyped_storage()

    torch.UntypedStorage.resize_, torch.UntypedStorage.clone = resize_, cloned


def set_collectives(torch) -> None:
    """Process groups for CUDA tensors are those of gloo."""
    module = torch.distributed.distributed_c10d
    start = module.init_process_group

    def init_process_group(backend=None, *how, **more):
        return start(backend and backend.replace("nccl", "gloo"), *how, **more)

    module.init_process_group = torch.distributed.init_process_group = init_process_group


def attention_of(torch, q, k, v, ends_q, ends_k, max_q, max_k, scale, window, grad=None):
    """Attention of each document on its own, in float32: outputs and log-sum-exps, or gradients for `grad`."""
    total, groups = len(q), q.shape[1] // k.shape[1]
    out, lse = torch.full(q.shape, torch.nan), torch.zeros(q.shape[1], total)
    grads = [torch.zeros(x.shape) for x in (q, k, v)]
    assert len(ends_q) == len(ends_k) and ends_q[-1] <= len(q) and ends_k[-1] <= len(k)
    for i in range(len(ends_q) - 1):
        at_q, at_k = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        query, key, value = q[at_q].float(), k[at_k].float(), v[at_k].float()
        n, m = len(query), len(key)
        assert n <= max_q and m <= max_k, "a document is longer than the given maximum"
        if not n:
            continue
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        distance = torch.arange(n)[:, None] + m - n - torch.arange(m)
        left, right = window
        seen = (distance >= -right) if right >= 0 else torch.ones_like(distance, dtype=bool)
        if left >= 0:
            seen = seen & (distance <= left)
        scores = scores.masked_fill(~seen, -torch.inf)
        lse[:, at_q] = scores.logsumexp(-1)
        p = (scores - lse[:, at_q, None]).exp().nan_to_num(0)
        out[at_q] = torch.einsum("hqk,khd->qhd", p, value)
        if grad is None:
            continue
        given = grad[at_q].float()
        of_p = torch.einsum("qhd,khd->hqk", given, value)
        of_scores = p * (of_p - (of_p * p).sum(-1, keepdim=True)) * scale
        folded = lambda x: x.view(len(x), -1, groups, x.shape[-1]).sum(2)
        grads[0][at_q] = torch.einsum("hqk,khd->qhd", of_scores, key)
        grads[1][at_k] = folded(torch.einsum("hqk,qhd->khd", of_scores, query))
        grads[2][at_k] = folded(torch.einsum("hqk,qhd->khd", p, given))
    return (out, lse) if grad is None else grads


def set_attention(torch, gpu) -> None:
    """varlen_attn, with what FlashAttention asks of its arguments."""
    from torch.nn.attention import varlen

    def on_host(q, k, v, ends_q, ends_k, max_q, max_k, causal, scale, window, grad=None):
        tensors = (q, k, v, ends_q, ends_k)
        if not all(tensor.is_cuda for tensor in tensors):
            raise RuntimeError("varlen_attn: tensors on two devices")
        if q.dtype not in (torch.float16, torch.bfloat16) or {x.dtype for x in (k, v)} != {q.dtype}:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if q.shape[-1] % 8 or q.shape[-1] > 256:
            raise RuntimeError("FlashAttention: head width")
        left, right = window or (-1, -1)
        gpu.gpu_set_quiet(True)
        try:
            q, k, v, ends_q, ends_k = (x.detach().cpu() for x in tensors)
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            sizes = (ends_q.tolist(), ends_k.tolist(), max_q, max_k)
            bounds = (left, 0 if causal else right)
            grad = None if grad is None else grad.cpu()
            found = attention_of(torch, q, k, v, *sizes, scale, bounds, grad)
            return [x.to(tensors[0].device) for x in found]
        finally:
            gpu.gpu_set_quiet(False)

    def forward(q, *rest, **more):
        given, causal, scale, window = rest[:6], *(*rest[6:9], False, None, None)[:3]
        out, lse = on_host(q, *given, causal, scale, window)
        return out.to(q.dtype), lse, torch.zeros(2, dtype=torch.uint64, device=q.device)

    def backward(grad, q, k, v, out, lse, *rest, **more):
        ends, causal, scale, window = rest[:4], rest[4], *(*rest[6:8], None, None)[:2]
        found = on_host(q, k, v, *ends, causal, scale, window, grad=grad)
        return tuple(x.to(q.dtype) for x in found)

    varlen._varlen_attn.register_kernel("cuda")(forward)
    varlen._varlen_attn_backward.register_kernel("cuda")(backward)
