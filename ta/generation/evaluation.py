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

from ta.data.jsonl import naming, parse_record
from ta.data.readers import read_rows
from ta.files import json_text
from ta.generation.metrics import METRICS, check_metrics
from ta.parallel import say

# names of fields in files of answers
ANSWER = ("answer", "prediction", "output", "response", "completion")
REFERENCE = ("reference", "label", "target", "gold_answer", "expected")

Inputs = dict[str, Any]  # of metrics, of one record

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
        with naming(f"{path}:{line}"):
            records.append(check_answers(parse_record(raw)))
    return records


def check_answers(data: dict) -> dict:
    """A record with its "answers" as [{"id", "content", ...}], and its "reference" if it has one.

    One answer may also stand as a text, in one of the fields ANSWER, and the reference in one of
    REFERENCE.
    """
    given = data.get("answers") or _first(data, ANSWER)
    if given is None:
        names = ", ".join(ANSWER)
        raise ValueError(f"no answers: give some as generate.py writes them, or one of {names}")
    answers = []
    for place, answer in enumerate(given if isinstance(given, list) else [given]):
        answer = answer if isinstance(answer, dict) else {"content": answer}
        if not isinstance(answer.get("content"), (str, int, float)):
            raise ValueError(f"answer {place + 1} has no text as its content")
        name = str(answer.get("id", place))
        answers.append(answer | {"id": name, "content": str(answer["content"])})
    if rewards := data.get("rewards"):
        own = [rewards.get(a["id"]) for a in answers] if isinstance(rewards, dict) else None
        if not _numbers(own):
            raise ValueError("rewards lacks an answer: give each id its number")
    reference = _first(data, REFERENCE)
    return data | {"answers": answers} | ({} if reference is None else {"reference": reference})


def metric_inputs(record: Mapping[str, Any]) -> Inputs:
    """What the metrics are made of, as far as a record has it.

    Beside answers and a reference that is what generate.py writes of passages ("gold" names those
    wanted), what score.py writes of rewards and classes, and log-probabilities of given answers.
    A field of another form is none of them.
    """
    inputs: Inputs = {}
    if answers := record.get("answers"):
        texts = [answer["content"] for answer in answers]
        inputs = {"answers": texts, "groups": [texts]}
        if "reference" in record:
            right = [str(record["reference"])] * len(texts)
            inputs |= {"references": right, "predictions": texts, "labels": right}
        logprobs = [answer.get("logprobs") for answer in answers]
        if all(map(_numbers, logprobs)):
            inputs["logprobs"] = logprobs
        if rewards := record.get("rewards"):
            inputs["rewards"] = [rewards[answer["id"]] for answer in answers]
    label, scores = record.get("label"), record.get("probabilities")
    if isinstance(label, int) and _numbers(scores) and len(scores) == 2:
        inputs |= {"labels": [label], "predictions": [record.get("prediction")]}
        inputs["scores"] = scores[1:]
    if isinstance(label, str) and "class" in record:
        inputs |= {"labels": [label], "predictions": [record["class"]]}
    gold, passages = record.get("gold"), record.get("passages")
    if gold is not None and _list_of(dict, passages):
        # one id or a list; passages of an index have texts as ids
        gold = gold if isinstance(gold, list) else [gold]
        inputs["gold"] = [[str(name) for name in gold]]
        inputs["retrieved"] = [[str(passage.get("id")) for passage in passages]]
    if _numbers(record.get("logprobs")):
        inputs["logprobs"] = [record["logprobs"]]
    if _list_of(list, record.get("passage_logprobs")):
        inputs["passage_logprobs"] = [record["passage_logprobs"]]
    return inputs


def _list_of(kind: Any, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, kind) for part in value)


def _numbers(value: Any) -> bool:
    return _list_of(int | float, value)


def _first(record: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def with_tokens(inputs: Sequence[Inputs], tokenizer: Any) -> list[Inputs]:
    """The inputs with the token ids of the answers, without those that a template adds."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    size = len(tokenizer)
    return [x | {"tokens": list(map(ids, x["answers"])), "vocab_size": size} for x in inputs]


def paired(sides: Sequence[list[dict]]) -> Sequence[list[dict]]:
    """The records that all files have, side by side: by id, else by messages, else by place.

    A line says how many are left out.
    """
    for name in ("id", "messages"):
        keys = [[json.dumps(record.get(name)) for record in side] for side in sides]
        if all(len(set(some)) == len(some) and "null" not in some for some in keys):
            tables = [dict(zip(*pair, strict=True)) for pair in zip(keys, sides, strict=True)]
            shared = [key for key in keys[0] if all(key in table for table in tables)]
            if alone := sum(map(len, sides)) - len(sides) * len(shared):
                say(f"left out: {alone:,} records that one file alone has")
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


def values_of(name: str, records: Sequence[Inputs]) -> list[float]:
    """The metric of each record alone; nan where a record lacks an input or has no value."""
    return [measured(name, [record]) for record in records]


def figure(name: str, records: Sequence[Inputs], seed: int = 0) -> Figure:
    """A metric over all answers of the records that have its inputs, with its interval.

    Metrics of variety have no interval: a resample repeats answers, which is what they count.
    ValueError for a metric that does not exist or that no record has the inputs of.
    """
    import numpy as np

    check_metrics([name], dict.fromkeys(key for record in records for key in record))
    metric = METRICS[name]
    kept = having(name, records)
    value = measured(name, kept)
    if metric.of != "each":
        again = lambda drawn: measured(name, [kept[i] for i in drawn])
        n = len(kept) if metric.of == "all" else 0
        return Figure(value, *interval(again, n, SLOW_DRAWS, seed), len(kept))
    values = np.array(values_of(name, kept))
    sizes = np.array([len(record[metric.inputs[0]]) for record in kept])
    whole = ~np.isnan(values)
    values, sizes = values[whole], sizes[whole]
    mean = lambda drawn: np.average(values[drawn], weights=sizes[drawn])
    return Figure(value, *interval(mean, len(values), DRAWS, seed), len(values))


def interval(
    statistic: Callable[[Any], float], n: int, draws: int, seed: int = 0
) -> tuple[float, float] | tuple[None, None]:
    """The percentile interval of `statistic` over resamples of n records, given as (n,) numbers.

    (None, None) of fewer than two records, and where no resample has a value.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    values = [statistic(random.integers(0, n, n)) for _ in range(draws if n > 1 else 0)]
    if all(value != value for value in values):
        return None, None
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
    first: Sequence[Inputs],
    second: Sequence[Inputs],
    seed: int = 0,
) -> Comparison:
    """The paired difference of a metric between two sets of answers, record by record.

    ValueError for a metric that has no value for each record, or for none.
    """
    import numpy as np

    check_comparable([name])
    before, after = (np.array(values_of(name, side)) for side in (first, second))
    both = ~np.isnan(after - before)
    if not both.any():
        raise ValueError(f"metric {name} has a value for no record of both files: leave it out")
    before, after = before[both], after[both]
    figures = []
    for values in (after - before, (np.sign(after - before) + 1) / 2):
        ends = interval(lambda at, v=values: v[at].mean(), len(values), DRAWS, seed)
        figures.append(Figure(float(values.mean()), *ends, len(values)))
    return Comparison(float(before.mean()), float(after.mean()), *figures)


def table_of(figures: Mapping[str, Figure | Comparison]) -> tuple[list[tuple], tuple[str, ...]]:
    """The rows and the header of a table for a person."""
    rows: list[tuple] = []
    header = ("metric", "value [95 %]", "records")
    for name, found in figures.items():
        if isinstance(found, Figure):
            rows.append((name, _shown(found), f"{found.records:,}"))
        else:
            header = ("metric", "first", "second", "second - first", "second better in")
            sides = f"{found.first:.4g}", f"{found.second:.4g}"
            rows.append((name, *sides, _shown(found.difference), _shown(found.wins)))
    return rows, header


def _shown(found: Figure) -> str:
    """0.512 [0.41, 0.62]"""
    interval = "" if found.low is None else f" [{found.low:.4g}, {found.high:.4g}]"
    return f"{found.value:.4g}{interval}"


def to_json(figures: Mapping[str, Any], sides: Sequence[Sequence[dict]], ids: Sequence) -> str:
    """The figures in all and, for each record, the values of each side."""
    each = {name: [values_of(name, side) for side in sides] for name in figures}
    records = [{"id": key} for key in ids]
    for name, of_sides in each.items():
        for record, *values in zip(records, *of_sides, strict=True):
            record[name] = values
    whole = {name: _plain(found) for name, found in figures.items()}
    return json_text({"figures": whole, "records": records}, ensure_ascii=False, indent=1) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return {name: _plain(part) for name, part in value._asdict().items()}
    return value


def measured(name: str, records: Sequence[Inputs]) -> float:
    """A metric over all answers of the records; nan where one lacks an input."""
    if len(having(name, records)) < len(records):
        return math.nan
    inputs = []
    for key in METRICS[name].inputs:
        given = [record[key] for record in records]
        # one number for all records, or a list of each
        single = given and not isinstance(given[0], list)
        inputs.append(given[0] if single else list(chain.from_iterable(given)))
    return METRICS[name].function(*inputs)


def having(name: str, records: Sequence[Inputs]) -> list[Inputs]:
    """The records that have all inputs of a metric."""
    inputs = set(METRICS[name].inputs)
    return [record for record in records if inputs <= record.keys()]
