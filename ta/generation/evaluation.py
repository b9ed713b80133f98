"""Figures of many answers: each metric in all and for each record, with intervals, and two sets of
answers side by side.

A record here is a mapping from the inputs of metrics (ta/generation/metrics.py) to what it has of
them: a list with an entry for each of its answers, and `groups` with one list. Intervals are those
of the percentile bootstrap over records (Efron 1979): records are what was drawn, and the answers
of one record belong together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from ta.generation.metrics import METRICS, Metric, check_metrics

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

    if METRICS[name].of != "each":
        raise ValueError(
            f"metric {name} has no value of its own for each record, so two files cannot be "
            "compared by it record by record; leave it out or measure each file alone"
        )
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
