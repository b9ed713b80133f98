"""Figures of many answers: each metric in all and for each record, with intervals, and two sets of
answers side by side.

A record here is a mapping from the inputs of metrics (ta/generation/metrics.py) to what it has of
them: a list with an entry for each of its answers, and `groups` with one list. Intervals are those
of the percentile bootstrap over records (Efron 1979): records are what was drawn, and the answers
of one record belong together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from ta.data.jsonl import BadRecord, parse_record
from ta.data.readers import read_rows
from ta.generation.metrics import METRICS, Metric, check_metrics

# names of fields in files of answers
ANSWER = ("answer", "prediction", "output", "response", "completion")
REFERENCE = ("reference", "label", "target", "gold_answer", "expected")

LEVEL = 0.95
# resamples of a mean of records, and of a metric that is computed anew for each resample
DRAWS, SLOW_DRAWS = 2000, 200


class Figure(NamedTuple):
    """A value with the interval in which it lies by the bootstrap; None where there is none."""

    value: float
    low: float | None
    high: float | None
    # records that it is made of
    records: int


def read_answers(path: str) -> list[dict]:
    """The records of a file of answers, checked; ValueError with the line of one that is none."""
    records = []
    for line, raw in read_rows(path):
        try:
            records.append(check_answers(parse_record(raw)))
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from None
    return records


def check_answers(data: dict) -> dict:
    """A record with its "answers" as [{"id", "content", ...}], and its "reference" if it has one.

    One answer may also stand as a text, in one of the fields ANSWER, and the reference in one of
    REFERENCE.
    """
    given = data.get("answers") or _first(data, ANSWER)
    if given is None:
        names = ", ".join(ANSWER)
        raise BadRecord(
            "no answers", f"no answers: give some as generate.py writes them, or one of {names}"
        )
    answers = []
    for place, answer in enumerate(given if isinstance(given, list) else [given]):
        answer = answer if isinstance(answer, dict) else {"content": answer}
        if not isinstance(answer.get("content"), (str, int, float)):
            raise BadRecord("content is not text", f"answer {place + 1} has no text as its content")
        name = str(answer.get("id", place))
        answers.append(answer | {"id": name, "content": str(answer["content"])})
    if (rewards := data.get("rewards")) and not {answer["id"] for answer in answers} <= set(
        rewards
    ):
        raise BadRecord("rewards do not fit", "rewards lacks an answer: give each id its number")
    reference = _first(data, REFERENCE)
    return data | {"answers": answers} | ({} if reference is None else {"reference": reference})


def metric_inputs(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the metrics are made of, as far as a record has it.

    Beside answers and a reference that is what generate.py writes of passages ("gold" names those
    wanted), what score.py writes of rewards and classes, and log-probabilities of given answers.
    """
    answers = record.get("answers", ())
    texts = [answer["content"] for answer in answers]
    inputs: dict[str, Any] = {"answers": texts, "groups": [texts]} if texts else {}
    if texts and "reference" in record:
        right = [str(record["reference"])] * len(texts)
        inputs |= {"references": right, "predictions": texts, "labels": right}
    if texts and all("logprobs" in answer for answer in answers):
        inputs["logprobs"] = [answer["logprobs"] for answer in answers]
    if texts and (rewards := record.get("rewards")):
        inputs["rewards"] = [rewards[answer["id"]] for answer in answers]
    if "label" in record and len(record.get("probabilities", ())) == 2:
        inputs |= {"labels": [record["label"]], "predictions": [record["prediction"]]}
        inputs["scores"] = record["probabilities"][1:]
    if "gold" in record and "passages" in record:
        inputs["gold"] = [record["gold"]]
        inputs["retrieved"] = [[passage["id"] for passage in record["passages"]]]
    given = ("logprobs", "passage_logprobs")
    return inputs | {name: [record[name]] for name in given if name in record}


def _first(record: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def with_tokens(inputs: Sequence[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """The inputs with the token ids of the answers, without those that a template adds."""
    return [
        record
        | {
            "tokens": [
                tokenizer(x, add_special_tokens=False)["input_ids"] for x in record["answers"]
            ]
        }
        | {"vocab_size": len(tokenizer)}
        for record in inputs
    ]


def paired(sides: Sequence[list[dict]]) -> Sequence[list[dict]]:
    """The records that all files have, side by side: by id, else by messages, else by place."""
    for name in ("id", "messages"):
        keys = [[json.dumps(record.get(name)) for record in side] for side in sides]
        if all(len(set(some)) == len(some) and "null" not in some for some in keys):
            tables = [dict(zip(*pair, strict=True)) for pair in zip(keys, sides, strict=True)]
            shared = [key for key in keys[0] if all(key in table for table in tables)]
            sides = [[table[key] for key in shared] for table in tables]
            break
    if len(sizes := {len(side) for side in sides}) > 1:
        raise ValueError(
            f"the files have {' and '.join(map(str, sorted(sizes)))} records and no ids by which "
            "they pair up: give each record an id"
        )
    if not sides[0]:
        raise ValueError("the two files have no record in common: give answers to the same records")
    return sides


def check_comparable(names: Iterable[str]) -> None:
    """ValueError for a metric by which two files cannot be compared record by record."""
    for name in names:
        if METRICS[name].of != "each":
            raise ValueError(
                f"metric {name} has no value of its own for each record, so two files cannot be "
                "compared by it record by record; leave it out or measure each file alone"
            )


def values_of(name: str, records: Sequence[Mapping[str, Any]]) -> list[float]:
    """The metric of each record alone; nan where a record lacks an input or has no value."""
    return [_measured(METRICS[name], [record]) for record in records]


def figure(name: str, records: Sequence[Mapping[str, Any]], seed: int = 0) -> Figure:
    """A metric over all answers of the records that have its inputs, with its interval.

    Metrics of variety have no interval: a resample repeats answers, which is what they count.
    ValueError for a metric that does not exist or that no record has the inputs of.
    """
    import numpy as np

    check_metrics([name], {key for record in records for key in record})
    metric = METRICS[name]
    kept = [record for record in records if all(key in record for key in metric.inputs)]
    value = _measured(metric, kept)
    if metric.of == "variety" or len(kept) < 2:
        return Figure(value, None, None, len(kept))
    if metric.of == "each":
        sizes = np.array([len(record[metric.inputs[0]]) for record in kept], float)
        sums = np.array(values_of(name, kept)) * sizes
        whole = ~np.isnan(sums)
        sums, sizes = sums[whole], sizes[whole]
        if len(sums) < 2:
            return Figure(value, None, None, len(sums))
        low, high = interval(
            lambda drawn: sums[drawn].sum() / sizes[drawn].sum(), len(sums), DRAWS, seed
        )
        return Figure(value, low, high, len(sums))
    low, high = interval(
        lambda drawn: _measured(metric, [kept[i] for i in drawn]), len(kept), SLOW_DRAWS, seed
    )
    return Figure(value, low, high, len(kept))


def interval(
    statistic: Callable[[Any], float], n: int, draws: int, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of `statistic` over resamples of n records, given as (n,) numbers."""
    import numpy as np

    random = np.random.default_rng(seed)
    values = [statistic(random.integers(0, n, n)) for _ in range(draws)]
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


class Comparison(NamedTuple):
    """A metric of two sets of answers to the same records."""

    first: float
    second: float
    # second - first, the mean over records
    difference: Figure
    # share of records in which the second has the higher value; ties count half
    wins: Figure


def compare(
    name: str,
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    seed: int = 0,
) -> Comparison:
    """The paired difference of a metric between two sets of answers, record by record.

    ValueError for a metric that has no value for each record, and for sets of unequal length.
    """
    import numpy as np

    check_comparable([name])
    before, after = np.array(values_of(name, first)), np.array(values_of(name, second))
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} records do not pair up")
    both = ~(np.isnan(before) | np.isnan(after))
    before, after = before[both], after[both]
    gaps = after - before
    wins = (np.sign(gaps) + 1) / 2
    figures = []
    for values in (gaps, wins):
        ends = (None, None)
        if len(values) > 1:
            ends = interval(lambda at, v=values: v[at].mean(), len(values), DRAWS, seed)
        mean = float(values.mean()) if len(values) else math.nan
        figures.append(Figure(mean, *ends, len(values)))
    if not len(gaps):
        return Comparison(math.nan, math.nan, *figures)
    return Comparison(float(before.mean()), float(after.mean()), *figures)


def table_of(figures: Mapping[str, Figure | Comparison]) -> tuple[list[tuple], tuple[str, ...]]:
    """The rows and the header of a table for a person."""
    rows: list[tuple] = []
    for name, found in figures.items():
        if isinstance(found, Figure):
            rows.append((name, _shown(found), f"{found.records:,}"))
        else:
            sides = f"{found.first:.4g}", f"{found.second:.4g}"
            rows.append((name, *sides, _shown(found.difference), _shown(found.wins)))
    if len(rows[0]) == 3:
        return rows, ("metric", "value [95 %]", "records")
    return rows, ("metric", "first", "second", "second - first", "second better in")


def _shown(found: Figure) -> str:
    """0.512 [0.41, 0.62]"""
    interval = "" if found.low is None else f" [{found.low:.4g}, {found.high:.4g}]"
    return f"{found.value:.4g}{interval}"


def to_json(figures: Mapping[str, Any], sides: Sequence[Sequence[dict]], ids: Sequence) -> str:
    """The figures in all and, for each record, the values of each side; nan is null."""
    each = {name: [values_of(name, side) for side in sides] for name in figures}
    records = [
        {"id": key} | {name: [_plain(side[i]) for side in of] for name, of in each.items()}
        for i, key in enumerate(ids)
    ]
    whole = {name: _plain(found) for name, found in figures.items()}
    return json.dumps({"figures": whole, "records": records}, ensure_ascii=False, indent=1) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return {name: _plain(part) for name, part in value._asdict().items()}
    return None if value != value else value


def _measured(metric: Metric, records: Sequence[Mapping[str, Any]]) -> float:
    """The metric over all answers of the records; nan where they lack an input."""
    if any(key not in record for record in records for key in metric.inputs):
        return math.nan
    inputs = []
    for key in metric.inputs:
        given = [record[key] for record in records]
        # one number for all records, or a list of each
        single = given and not isinstance(given[0], list)
        inputs.append(given[0] if single else list(chain.from_iterable(given)))
    return metric.function(*inputs)
