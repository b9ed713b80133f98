"""The named methods of root modules on sharded weights: two processes give what one gives."""

import math
import signal
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import together
from small import tiny
from transformers import BertConfig, BertModel, GPT2Config, GPT2ForSequenceClassification

from ta import parallel
from ta.builtin.models import tiny_tokenizer
from ta.data.batch import lay_out
from ta.generation.generate import generate
from ta.generation.graphs import Graphs
from ta.generation.settings import GenerateConfig
from ta.media.modalities import Modalities
from ta.media.multimodal import MediaBatch, MediaModel
from ta.model.adapters import AdapterConfig, add_adapter
from ta.model.attention import register
from ta.model.language_model import base_model, wrap
from ta.rag.embedding import TextEncoder, Texts
from ta.rag.embedding_settings import EmbeddingSettings
from ta.rag.joint import RagModel

FEATURES = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TEXTS = Texts(torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
KINDS = ("plain", "tied", "lora", "checkpointed", "native", "classifier", "media", "retrieval")


def root_of(kind):
    """A root module in float64, the same on every process."""
    if kind == "classifier":
        torch.manual_seed(0)
        shape = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "num_labels": 3}
        config = GPT2Config(**shape, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        model = GPT2ForSequenceClassification._from_config(
            config, attn_implementation=register()
        ).double()
        model.config.pad_token_id = 0
        return wrap(model)[0]
    root = tiny(dtype=torch.float64, tie_word_embeddings=kind == "tied")
    if kind == "lora":
        root.inner = add_adapter(root.inner, AdapterConfig(adapter="lora"), range(10, 40))
        for name, parameter in root.named_parameters():
            if "lora_B" in name:  # zero at first, so that A would have no gradient
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    if kind == "native":
        root = wrap(add_adapter(root.inner, AdapterConfig(adapter="prompt")))[0]
    if kind == "checkpointed":
        parallel.checkpoint_activations(root)
    torch.manual_seed(1)
    if kind == "media":
        projectors = {"image": torch.nn.Linear(5, 32).double()}
        known = SimpleNamespace(placeholders={"image": SimpleNamespace(id=9)})
        return MediaModel(root, projectors, Modalities({}), known)
    if kind == "retrieval":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(vocab_size=32, intermediate_size=32, **sizes, **quiet)
        return RagModel(
            root,
            TextEncoder(BertModel(config).double(), EmbeddingSettings("mean", True, "", "", 64)),
        )
    return root


def batch_of(kind, documents, packed):
    """A batch of documents (numbers); in media each has three placeholders for one picture."""
    generator = np.random.default_rng(4)
    ids = [generator.integers(10, 64, 8 + 3 * i) for i in range(2)]
    weights = [generator.random(len(x)).astype(np.float32) for x in ids]
    if kind == "media":
        for x in ids:
            x[2:5] = 9
    batch = lay_out([ids[i] for i in documents], [weights[i] for i in documents], packed)
    return MediaBatch(batch, image=FEATURES[list(documents)]) if kind == "media" else batch


def results_of(kind, documents):
    """What every method gives for the documents, and the gradient of the loss by name."""
    root = root_of(kind)
    if parallel.world() > 1:
        device = parallel.init()
        if parallel.rank():
            root.to("meta")
            base_model(root.inner).tie_weights()
        parallel.shard(root, device, half=False)
    root.train()
    batch = batch_of(kind, documents, root.packed)
    out, loss = {}, 0.0
    with torch.no_grad():
        if kind == "classifier":
            out["scores"] = root.scores(batch)
        else:
            out["logprobs"] = root.logprobs(batch)
            if root.packed:
                out["hidden"] = root.hidden(batch)[0]
    with torch.no_grad(), parallel.unsharded(root):
        # as where a round of rollouts has fewer prompts than processes
        if parallel.rank() == 0:
            root.inner(input_ids=torch.arange(10, 14)[None])
    if kind == "plain":
        prompts = [[5 + i] * (3 + i) for i in documents]
        config, call, inside = GenerateConfig(max_new_tokens=4), Graphs.__call__, []

        def recorded(graphs, *key):
            """Within a pass of the root, where blocks do not make other streams wait."""
            state = root._get_fsdp_state()._state_ctx if parallel.world() > 1 else None
            inside.append(state is None or state.iter_forward_root is not None)
            return call(graphs, *key)

        with parallel.unsharded(root), mock.patch.object(Graphs, "__call__", recorded):
            made = generate(root, tiny_tokenizer(), prompts, config, [], fixed_shapes=True)
        assert inside and all(inside)
        out["answers"] = torch.tensor([answer.ids for (answer,) in made])
        # on shards all processes answer all prompts, whatever their own arithmetic gives
        noise = lambda module, inputs, logits: logits + 9 * parallel.rank() * torch.rand(64)
        hook = root.base.get_output_embeddings().register_forward_hook(noise)
        made = generate(root, tiny_tokenizer(), [[5] * 3, [6] * 4], config, [])
        hook.remove()
        out["together"] = torch.tensor([made[i][0].ids for i in documents])
    # what an optimizer that is made after an evaluation would hold
    held = dict(root.named_parameters())
    assert parallel.world() == 1 or all(hasattr(value, "to_local") for value in held.values())
    if kind == "classifier":
        loss = loss + root.scores(batch).square().sum()
    else:
        loss = loss + root.loss(batch)
    if kind == "media":
        out["embed"] = root.embed(batch).detach()[0]
    if kind == "retrieval":
        texts = Texts(*(tensor[list(documents)] for tensor in TEXTS))
        out["embed"] = root.embed(texts).detach()
        loss = loss + root.embed(texts).square()[:, 0].sum()
    loss.backward()
    out["loss"] = loss.detach()[None]
    scale = parallel.world()  # FSDP2 gives the mean over processes
    for name, parameter in held.items():
        if (grad := parameter.grad) is not None:
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            out[f"gradient of {name}"] = grad * scale
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_what_one_gives(kind, tmp_path):
    """Each of two processes has one of two documents; loss, gradient, log p and the rest agree."""
    whole = results_of(kind, (0, 1))

    def main(rank):
        signal.alarm(60)  # a process that waits in vain for the other one ends
        torch.save(results_of(kind, (rank,)), tmp_path / f"{rank}.pt")
        parallel.close()

    codes = together(main, 2, tmp_path / "said")
    assert codes == [0, 0], (tmp_path / "said").read_text()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys() == whole.keys()
    assert sum(name.startswith("gradient") for name in whole) >= 1
    for name, value in whole.items():
        if name == "loss":
            other = first[name] + second[name]
        elif name.startswith("gradient"):
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
            other = first[name]
        else:
            other = torch.cat([first[name], second[name]])
        torch.testing.assert_close(other, value, rtol=1e-6, atol=1e-9, msg=name)
        assert math.isfinite(value.sum().item()) and value.abs().sum() > 0, name
