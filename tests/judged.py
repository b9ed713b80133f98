"""Recipes as modules, pairs and labelled answers made in code, and the sums of a recipe's step over micro-batches: for tests."""

import importlib.util
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from conftest import ROOT
from small import prepared

from ta.data.loader import micro_batches
from ta.training.loop import add_sums
from ta.training.progress import means


@cache
def recipe(name):
    """recipes/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pair_set(n=13, seed=0, margins=True, **more):
    """n pairs with a common context each."""
    margin = np.random.default_rng(seed).random(n) if margins else np.full(n, np.nan)
    return prepared(n, seed, k=2, **more)._replace(extras={"margin": margin})


def labelled_set(n=13, seed=0, desirable=None, **more):
    """n answers, learned from their first token to their last; about half of them desirable."""
    data = prepared(n, seed, learn=1.0, **more)
    given = (
        (np.random.default_rng(seed).random(n) < 0.5)
        if desirable is None
        else np.full(n, desirable)
    )
    return data._replace(extras={"desirable": given.astype(float)})


def gradients(model, data, collate, step, before=None, budget=64, packed=True, records=None):
    """(loss, {metric: mean}, {name: gradient}) of one step over `records`, cut into micro-batches of `budget` tokens."""
    records = np.arange(len(data.origin)) if records is None else np.asarray(records)
    batches = micro_batches(data, records, budget, packed, collate)
    batches = before(model, batches) if before else batches
    model.zero_grad()
    sums = {}
    for batch in batches:
        loss, n, metrics = step(model, batch)
        loss.backward()
        add_sums(sums, loss, n, batch, metrics)
    sums = {name: float(value) for name, value in sums.items()}
    count = int(sums["count"])
    found = {name: p.grad / count for name, p in model.named_parameters() if p.grad is not None}
    return SimpleNamespace(
        loss=sums["loss"] / count,
        metrics={name: value for name, value in means(sums).items() if name != "loss"},
        grads=found,
        count=count,
        batches=len(batches),
    )


def agree(ours, theirs, tolerance=1e-11):
    """Same loss, metrics and gradients."""
    assert ours.count == theirs.count
    torch.testing.assert_close(
        torch.tensor(ours.loss), torch.tensor(theirs.loss), rtol=tolerance, atol=tolerance
    )
    for key in ours.metrics:
        torch.testing.assert_close(
            torch.tensor(ours.metrics[key]), torch.tensor(theirs.metrics[key]), rtol=1e-9, atol=1e-9
        )
    for name, grad in ours.grads.items():
        torch.testing.assert_close(grad, theirs.grads[name], rtol=1e-8, atol=tolerance, msg=name)
