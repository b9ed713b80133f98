"""Classification of dialogues: one of --num-labels classes, scored at the last token; cross-entropy with class weights, or focal loss.

    python recipes/classify.py                                     # built-in tiny model and data, three classes
    python recipes/classify.py --model-path MODEL --data texts.jsonl --val-data held_out.jsonl --num-labels 2 --out runs/classify
    python recipes/classify.py --class-weights auto --gamma 2 ...  # rare classes count alike; easy records count less
    torchrun --nproc-per-node 8 recipes/classify.py ...            # the same losses on 8 devices

A line of data: {"messages": [{"role": "user", "content": "It rains."}], "label": 2}
The export loads with transformers' AutoModelForSequenceClassification.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ta.cli import cli
from ta.parallel import rank, say
from ta.train import run_folder
from ta.train.loop import LoopConfig, train
from ta.train.run import RunConfig, finish, open_parts, open_run


@dataclass(frozen=True)
class Classify(RunConfig):
    loop: LoopConfig = LoopConfig(out="runs/classify")
    num_labels: int = 3
    """Classes; labels are 0 to num_labels - 1."""
    class_weights: tuple[str, ...] = ()
    """One weight a class, in order; or auto, which makes every class count alike. Default: none."""
    gamma: float = 0.0
    """Focal loss: how much less a record counts the surer the model is of it (2 is usual); 0 is cross-entropy."""


def weights_of(config: Classify, labels):
    """(C,) class weights or None; ValueError for what is no list of num_labels weights from 0."""
    import torch

    from ta.objectives import balanced_weights

    given = config.class_weights
    if not given:
        return None
    if given == ("auto",):
        return balanced_weights(labels, config.num_labels)
    try:
        weights = [float(text) for text in given]
    except ValueError:
        weights = []
    if (
        len(weights) != config.num_labels
        or not all(0 <= weight < float("inf") for weight in weights)
        or not any(weights)
    ):
        raise ValueError(
            f"--class-weights {' '.join(given)}: give auto, or {config.num_labels} numbers from 0 on, not all of them 0"
        )
    return torch.tensor(weights)


def step(weights, gamma, model, batch):
    """Sum of the loss over records, their number, and how many are right."""
    from ta.objectives import class_loss

    scores = model.scores(batch.seqs)  # (N, C)
    values = class_loss(scores, batch.labels, class_weights=weights, gamma=gamma)
    return values.sum(), len(values), {"accuracy": (scores.argmax(1) == batch.labels).sum()}


def evaluate(run, config: Classify, weights, done: int) -> dict[str, float]:
    """Loss and metrics of all held-out records, and a table of the first ones."""
    import torch

    from ta.data.answer_batches import scores_of
    from ta.generation.metrics import measure, roc_auc
    from ta.objectives import class_loss

    held_out = run.data.held_out
    scores = scores_of(run.model, held_out, len(held_out.origin), config.loop.max_tokens_per_micro)[
        :, 0
    ]  # (records, C)
    labels, said = torch.tensor(held_out.extras["label"]).long(), scores.argmax(1)
    figures = {
        "loss": class_loss(scores, labels, class_weights=weights, gamma=config.gamma).mean().item()
    }
    names = ("accuracy", "balanced_accuracy", "precision", "recall", "f1")
    figures |= measure(names, predictions=said.tolist(), labels=labels.tolist())
    if config.num_labels == 2:
        figures["roc_auc"] = roc_auc((scores[:, 1] - scores[:, 0]).tolist(), labels.tolist())
    if rank() == 0:
        show(run, config, done, scores.softmax(1), labels.tolist())
    return figures


def show(run, config: Classify, done: int, probabilities, labels: list[int]) -> None:
    """Append the first held-out records to samples.jsonl and print some."""
    rows, origin = [], run.data.held_out.origin
    for i, (shares, label) in enumerate(
        zip(probabilities[: config.cherry.cherry_records].tolist(), labels, strict=False)
    ):
        text = run.tokenizer.fast.decode(
            run.data.held_out.ids[slice(*run.data.held_out.offsets[i : i + 2])],
            skip_special_tokens=True,
        )
        sample = {
            "step": done,
            "line": int(origin[i][1]),
            "text": text,
            "label": label,
            "predicted": shares.index(max(shares)),
        }
        run_folder.append(
            Path(config.loop.out) / "samples.jsonl",
            sample | {"probabilities": [round(p, 6) for p in shares]},
        )
        rows.append((text, sample["predicted"], f"{max(shares):.3f}", label))
    if rows:
        say(
            f"\nsamples at step {done}\n{run_folder.table(rows[: config.cherry.cherry_show], ('text', 'class', 'probability', 'right class'))}\n"
        )


def main(config: Classify) -> None:
    from ta.data.answer_batches import classes, labels_of

    if config.num_labels < 2 or config.gamma < 0:
        raise ValueError(
            f"--num-labels {config.num_labels} --gamma {config.gamma}: give 2 classes or more, and a gamma from 0 on"
        )
    parts = open_parts(config, "class", model_kind="seq_cls", num_labels=config.num_labels)
    weights = weights_of(config, labels_of(parts.data.train, config.num_labels))
    same = {
        "num_labels": config.num_labels,
        "class_weights": list(config.class_weights),
        "gamma": config.gamma,
    }
    with open_run(
        config, parts, dress=partial(classes, num_labels=config.num_labels), identity=same
    ) as run:
        figures = partial(evaluate, run, config, weights) if run.held_out else None
        train(
            run.model,
            run.feed,
            partial(step, weights, config.gamma),
            config.loop,
            run.optim,
            identity=run.identity,
            evaluate=figures,
        )
        finish(run, config)


if __name__ == "__main__":
    cli(main, Classify)
