"""Classification of dialogues into --num-labels classes, scored at the last token.

The loss is cross-entropy with class weights, or focal loss.

    python recipes/classify.py                         # built-in tiny model and data, three classes
    python recipes/classify.py --model-path MODEL --data texts.jsonl --num-labels 2
    python recipes/classify.py --class-weights auto    # rare classes count as much as frequent ones
    python recipes/classify.py --gamma 2 ...           # easy records count less (focal loss)
    torchrun --nproc-per-node 8 recipes/classify.py ...    # the same losses on 8 devices

A record, one line of the file:

    {"messages": [{"role": "user", "content": "It rains."}], "label": 2}

The export loads with transformers' AutoModelForSequenceClassification.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import ta
from ta import Range


@dataclass(frozen=True)
class Config:
    model: ta.ModelConfig = ta.ModelConfig()
    tokenizer: ta.TokenizerConfig = ta.TokenizerConfig()
    adapter: ta.AdapterConfig = ta.AdapterConfig()
    compute: ta.ComputeConfig = ta.ComputeConfig()
    chat: ta.ChatConfig = ta.ChatConfig()
    data: ta.DataConfig = ta.DataConfig()
    batches: ta.BatchConfig = ta.BatchConfig()
    optim: ta.OptimConfig = ta.OptimConfig()
    loop: ta.LoopConfig = ta.LoopConfig(out="runs/classify")
    samples: ta.SamplesConfig = ta.SamplesConfig()
    num_labels: Annotated[int | None, Range(2)] = None
    """Classes; labels are 0 to num_labels - 1. Default: as many as --labels, else 3."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in order, where labels are text; the export keeps them."""
    class_weights: tuple[str, ...] = ()
    """One weight a class, in order; or auto, which makes every class count alike. Default: none."""
    gamma: Annotated[float, Range(0)] = 0.0
    """Focal loss: how much less a record counts the surer the model is of it (2 is usual); 0 is
    cross-entropy."""


def with_num_labels(config: Config) -> Config:
    """The config with its number of classes; ValueError where names and number differ."""
    labels, given, n = config.labels, config.num_labels, len(config.labels)
    differ = n > 1 and len(set(labels)) == n
    if labels and not (differ and given in (None, n)):
        raise ValueError(
            f"--labels {' '.join(labels)}: give two or more different names, as many as "
            "--num-labels where that is given too"
        )
    return replace(config, num_labels=given or n or 3)


def weights_of(config: Config, labels):
    """(C,) class weights, or None without --class-weights.

    ValueError unless they are auto or num_labels numbers from 0 on.
    """
    import torch

    given, n = config.class_weights, config.num_labels
    if not given:
        return None
    if given == ("auto",):
        return ta.losses.balanced_weights(labels, n)
    try:
        weights = torch.tensor([float(text) for text in given])
    except ValueError:
        weights = torch.zeros(n)
    sound = weights.isfinite().all() and weights.min() >= 0 and weights.any()
    if len(weights) != n or not sound:
        raise ValueError(
            f"--class-weights {' '.join(given)}: give auto, or {n} numbers from 0 on, not all of "
            "them 0"
        )
    return weights


def step(weights, gamma, model, batch):
    """The sum of the loss over records, the number of records, and the number of right classes."""

    scores = model.scores(batch.sequences)  # (N, C)
    values = ta.losses.class_loss(scores, batch.labels, class_weights=weights, gamma=gamma)  # (N,)
    return values.sum(), len(values), {"accuracy": (scores.argmax(1) == batch.labels).sum()}


def figures_of(config: Config, scores, weights, labels) -> dict[str, float]:
    """Loss and metrics of (n, C) scores against (n,) labels."""

    losses = ta.losses.class_loss(scores, labels, class_weights=weights, gamma=config.gamma)
    names = ("accuracy", "balanced_accuracy", "precision", "recall", "f1")
    predicted = scores.argmax(1).tolist()
    figures = {"loss": losses.mean().item()}
    figures |= ta.measure(names, predictions=predicted, labels=labels.tolist())
    if config.num_labels == 2:
        gap = (scores[:, 1] - scores[:, 0]).tolist()
        figures["roc_auc"] = ta.roc_auc(gap, labels.tolist())
    return figures


def show_classes(config: Config, run, tokenizer, data, probabilities, labels, done: int) -> None:
    """Append the first held-out records to samples.jsonl and print some of them."""

    rows = []
    chosen = probabilities[: config.samples.sample_records].tolist()
    for i, (shares, label) in enumerate(zip(chosen, labels, strict=False)):
        text = tokenizer.fast.decode(ta.sequence(data, i)[0], skip_special_tokens=True)
        best, rounded = shares.index(max(shares)), [round(p, 6) for p in shares]
        sample = {"step": done, "line": int(data.origin[i][1]), "text": text, "label": label}
        sample |= {"predicted": best, "probabilities": rounded}
        ta.append_line(run.folder / "samples.jsonl", sample)
        rows.append((text, best, f"{max(shares):.3f}", label))
    header = ("text", "class", "probability", "right class")
    shown = ta.table(rows[: config.samples.sample_show], header)
    ta.parallel.say(f"\nsamples at step {done}\n{shown}\n" if rows else "")


def main(config: Config):
    """Train; returns the folder of the export and the last figures of held-out records."""
    import torch

    config = with_num_labels(config)
    run = ta.start_run(config)
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat, day=run.day)
    files, val_files = ta.data_or_builtin(
        config.data.data, config.data.val_data, "classes", config.model.hub
    )
    prepare = partial(ta.prepare_classes, labels=config.labels)
    asked = (tokenizer, config.chat, config.data, run.seed)
    train_data, val_data = prepare(files, *asked), prepare(val_files, *asked)
    weights = weights_of(config, ta.labels_of(train_data, config.num_labels))
    val_labels = torch.tensor(ta.labels_of(val_data, config.num_labels)) if val_data else None
    tokenizer = ta.with_own_pad_token(tokenizer, train_data, val_data)
    model = ta.load_model(
        config.model,
        config.adapter,
        config.compute,
        tokenizer,
        run.device,
        num_labels=config.num_labels,
        label_names=config.labels,
        seed=run.seed,
    )
    ta.check_context(model, train_data, val_data)

    batches = ta.train_batches(
        train_data, config.batches, packed=model.packed, collate=ta.collate_classes
    )
    optim = ta.with_default_lr(
        config.optim, config.model, config.adapter, full=2e-5, adapted=2e-4, builtin=1.5e-3
    )
    on_device = None if weights is None else weights.to(run.device)
    learn = partial(step, on_device, config.gamma)

    def evaluate(done):
        n, budget = len(val_data.origin), config.batches.max_tokens_per_micro
        scores = ta.scores_of(model, val_data, n, budget)[:, 0]  # (n, C)
        if ta.parallel.rank() == 0:
            probabilities = scores.softmax(1)
            show_classes(config, run, tokenizer, val_data, probabilities, val_labels.tolist(), done)
        figures = figures_of(config, scores, weights, val_labels)
        for source, rows in ta.source_rows(val_data).items():
            own = figures_of(config, scores[rows], weights, val_labels[rows])
            figures |= {f"{name}/{source}": value for name, value in own.items()}
        return figures

    ta.preview(train_data, tokenizer, val_data)
    figures = ta.train(
        run,
        model,
        batches,
        learn,
        ta.make_optimizer(model, optim),
        optim,
        evaluate=evaluate if val_data else None,
    )
    return ta.export_run(run, model, tokenizer, train_data, figures)


if __name__ == "__main__":
    ta.cli(main, Config)
