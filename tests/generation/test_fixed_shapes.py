"""Tests of decode steps of fixed shapes: recorded and replayed as a GPU would, they give the answers of the plain engine."""

import pytest
import torch
from generation.test_generate import ARCHITECTURES, TOKENIZER, build, ids_of, random_prompts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ta.generation import slot_engine
from ta.generation.generate import generate
from ta.generation.graphs import Graphs
from ta.generation.settings import GenerateConfig

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::is_nonzero", "aten::equal")  # fmt: skip


class Tape(TorchDispatchMode):
    """Operations in their order with their arguments: what a CUDA graph keeps of a call."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITS:
            raise RuntimeError(f"{func._schema.name} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def replay(self, result):
        """The operations once more, on the same outside tensors; the new tensors in place of `result`."""
        new = {}

        def now(x):
            return tree_map_only(torch.Tensor, lambda t: new.get(id(t), t), x)

        for func, args, kwargs, out in self.steps:
            again = func(*now(args), **now(kwargs))
            for before, after in zip(flat(out), flat(again), strict=True):
                new[id(before)] = after
        return now(result)


def flat(out):
    return [
        x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)
    ]


@pytest.fixture
def recorded(monkeypatch):
    """A device that records: [(rows, width) of each recording], in buckets narrow enough for small prompts."""
    found = []

    def record(self, work):
        tape = Tape()
        with tape:
            out = work()
        found.append(1)
        return lambda: tape.replay(out)

    def __init__(self, work, device):
        plain(self, work, device)
        self.records = True

    def refuse(text):
        raise AssertionError(text)

    plain = Graphs.__init__
    monkeypatch.setattr(Graphs, "__init__", __init__)
    monkeypatch.setattr(Graphs, "record", record)
    monkeypatch.setattr(slot_engine, "NARROWEST", 8)
    monkeypatch.setattr(slot_engine, "say_once", refuse)
    return found


def both(model, prompts, config, stop=(), **more):
    plain = generate(model, TOKENIZER, prompts, config, stop, fixed_shapes=False, **more)
    fixed = generate(model, TOKENIZER, prompts, config, stop, fixed_shapes=True, **more)
    assert ids_of(fixed) == ids_of(plain)
    for a, b in zip(fixed, plain, strict=True):
        assert [(x.text, x.finish) for x in a] == [(x.text, x.finish) for x in b]
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(torch.tensor(x.logprobs), torch.tensor(y.logprobs), atol=2e-5)
    return fixed


@pytest.mark.parametrize("slots", [3, 64])
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if "no-plain-cache" not in n])
def test_replayed_steps_give_the_plain_answers(name, slots, recorded):
    model, prompts = build(name), random_prompts()
    free = generate(model, TOKENIZER, prompts[:1], GenerateConfig(max_new_tokens=10), [])
    got = both(model, prompts, GenerateConfig(max_new_tokens=20, slots=slots), free[0][0].ids[9:10])
    assert recorded and len({len(ids) for ids in ids_of(got)}) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.9, "num_answers": 3},
        {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "num_answers": 2},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 1.2, "temperature": 1.1, "top_p": 0.9, "num_answers": 3},
    ],
)
def test_sampling_and_penalty_replay(settings, recorded):
    got = both(build(), random_prompts(7), GenerateConfig(max_new_tokens=20, slots=6, **settings))
    assert recorded and len({tuple(ids) for ids in ids_of(got)}) == len(ids_of(got))


def test_what_a_row_gets_after_its_end_is_thrown_away(recorded):
    """Stop strings are seen one step late; the answers, their texts and what is told of each token do not show it."""
    model, prompts, told = build(), random_prompts(8), {}
    free = generate(model, TOKENIZER, prompts, GenerateConfig(max_new_tokens=24), [])
    target = TOKENIZER.decode(free[0][0].ids[4:7])
    config = GenerateConfig(max_new_tokens=24, stop_strings=(target,), slots=3)
    both(model, prompts, config)
    got = generate(
        model, TOKENIZER, prompts, config, [], fixed_shapes=True,
        on_token=lambda i, k, ids: told.setdefault(i, []).append(ids[-1]),
    )  # fmt: skip
    assert recorded and got[0][0].finish == "stop"
    assert told == {i: row[0].ids for i, row in enumerate(got)}


def test_embeddings_and_adapters_replay(recorded):
    import peft

    model, prompts = build(), random_prompts(7)
    with torch.no_grad():
        embeds = [model.get_input_embeddings()(torch.tensor(p)) for p in prompts]
    zeros, config = [[0] * len(p) for p in prompts], GenerateConfig(max_new_tokens=15, slots=4)
    assert ids_of(both(model, zeros, config, embeds=embeds)) == ids_of(both(model, prompts, config))
    for settings in (
        peft.LoraConfig(
            task_type="CAUSAL_LM", init_lora_weights=False, target_modules="all-linear"
        ),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ):
        both(peft.get_peft_model(build(), settings).eval(), prompts, config)


@pytest.mark.slow
def test_a_buffer_that_moves_and_grows_is_recorded_anew(recorded):
    """Long answers to short prompts outgrow the buffer; where only short rows are left, steps narrow again."""
    model = build("gpt2-learned-positions")  # a position outside its table is an error
    prompts = [[5], *random_prompts(6, 1, 30), (random_prompts(1, 2)[0] * 250)[:250]]
    got = both(model, prompts, GenerateConfig(max_new_tokens=200, slots=3))
    assert max(len(ids) for ids in ids_of(got)) == 200 and len(got[-1][0].ids) == 6


@pytest.mark.slow
def test_few_shapes_and_no_look_at_values():
    """One whole graph for every pair of rows and width, whatever the rows hold: recompilations equal buckets."""
    ran, seen = [], []

    def backend(module, inputs):
        ran.append(len(module.graph.nodes))
        return module.forward

    class Compiled(Graphs):
        def __init__(self, work, device):
            super().__init__(
                torch.compile(work, backend=backend, fullgraph=True, dynamic=False), device
            )

        def __call__(self, *key):
            seen.append(key)
            return super().__call__(*key)

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=64):
        patch.setattr(slot_engine, "NARROWEST", 16)
        patch.setattr(slot_engine, "Graphs", Compiled)
        both(
            build(), random_prompts(8), GenerateConfig(max_new_tokens=24, slots=4, temperature=0.7)
        )
    assert len(ran) == len(set(seen)) and len(seen) > 8 * len(ran)
    assert len(set(ran)) == 1  # the same operations in each


def test_the_buffers_are_freed_with_the_last_answer(recorded):
    """No circle of objects keeps the keys and values until the next garbage collection."""
    import gc
    import weakref

    made = []

    class Layer(slot_engine.SlotLayer):
        def __init__(self, window):
            super().__init__(window)
            made.append(weakref.ref(self))

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slot_engine, "SlotLayer", Layer)
            config = GenerateConfig(max_new_tokens=12)
            generate(build(), TOKENIZER, random_prompts(4), config, [], fixed_shapes=True)
        assert recorded and made and not [ref for ref in made if ref() is not None]
    finally:
        gc.enable()


def test_widths_and_rows_of_buckets():
    assert [slot_engine.bucket(n) for n in (1, 128, 129, 192, 193, 256, 257, 385, 769)] == [
        128, 128, 192, 192, 256, 256, 384, 512, 1024,
    ]  # fmt: skip
    for slots, rows, want in (
        (64, (64, 17, 16, 5, 4, 2, 1), (64, 64, 16, 16, 4, 4, 1)),
        (3, (1, 3), (3, 3)),
    ):
        assert tuple(slot_engine.rows_bucket(n, slots) for n in rows) == want


def broken(model, change):
    """`model` whose steps of fixed shapes, which it knows by the cache, have other inputs."""

    def before(module, args, kwargs):
        fixed = kwargs["past_key_values"].is_compileable
        return args, kwargs | (
            change(kwargs["input_ids"], kwargs["attention_mask"]) if fixed else {}
        )

    model.register_forward_pre_hook(before, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ids, mask: {"input_ids": ids.clamp(max=ids.max().item())}, "waits for the device"),
        (lambda ids, mask: {"attention_mask": torch.ones_like(mask)}, "other logits"),
    ],
)
def test_a_model_that_cannot_is_said_once_and_runs_plainly(change, reason, recorded, monkeypatch):
    said, prompts = [], random_prompts()
    monkeypatch.setattr(slot_engine, "say_once", said.append)
    both(broken(build(), change), prompts, GenerateConfig(max_new_tokens=12, slots=4))
    assert len(said) == 1 and reason in said[0] and "without CUDA graphs" in said[0]


def test_broken_weights_are_said_one_step_late(recorded, monkeypatch):
    monkeypatch.setattr(slot_engine, "say_once", lambda text: None)
    model = build()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        generate(model, TOKENIZER, [[1]], GenerateConfig(), [], fixed_shapes=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(
    "name", ["llama", "mistral-window", "gemma3-hybrid", "gpt2-learned-positions"]
)
def test_graphs_on_a_gpu_give_the_plain_answers(name, monkeypatch):
    def refuse(text):
        raise AssertionError(text)

    monkeypatch.setattr(slot_engine, "say_once", refuse)
    # where there are several, not on the current one
    model, prompts = build(name).cuda(torch.cuda.device_count() - 1), random_prompts(20)
    for settings in ({}, {"temperature": 0.9, "top_p": 0.9}, {"repetition_penalty": 1.3}):
        both(model, prompts, GenerateConfig(max_new_tokens=40, slots=8, **settings))
